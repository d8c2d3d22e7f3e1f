"""The compressed layers inside vLLM: y = B z + b, two matrix multiplications per fused group. Imports vLLM.

z = A x or, for an identity block, z = x_J + T x_Jc; where an MLP has lost neurons, z = x, and there is one multiplication. For the
members of a fused group (q, k, v; gate, up) z is shared and the rows of B are stacked, so the group costs two multiplications
however many members it has, with the bias in the second one's epilogue. Where the linears of a fused layer have factors of their
own, or are dense, one multiplication gives every z and the dense outputs, and each B is one more (`PerShardMethod`).

Tensor parallel, following vLLM's slicing of the dense layer:
- column-parallel: A (r, n), or T and `order`, on every rank; of B and b each rank takes its rows of each member (key and
  value heads are replicated where there are fewer of them than ranks).
- row-parallel: each rank takes its columns of A, and the partial A x (r wide, not m wide) is summed over the ranks.
  With LoRA the sum has to come after the output, where LoRA adds its own partial product. A rank that sees a stretch of x
  sees only some of an identity block's J and Jc: there its columns of [I T], put back into the order of the inputs, are
  made into an A while loading. That is the same map, at the cost of two factors (r n of T's r (n - r) values and r^2 more).
  So are those of a linear alone in a fused layer, whose rows stand between the others'.
- MLPs with fewer neurons: each rank takes its share of those that are left, as vLLM does with all of them.

vLLM does not notice a quantized parameter that no tensor was loaded into, so this file counts what arrives.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from vllm.config import get_current_vllm_config_or_none
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearMethodBase,
    QKVParallelLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)

from lrserve.compression.lowrank import GroupSpec, is_permutation
from lrserve.errors import ArtifactError
from lrserve.serving.kernels import Factor, Precision, first_factor, quantized_kernel

_QKV = {"q": 0, "k": 1, "v": 2}

_REORDERED = (
    "this lrserve artifact has fewer neurons in its MLPs than the dense model, or keeps them in another order: LoRA adapters of "
    "gate_proj, up_proj or down_proj do not fit unless they were trained on the artifact; those of the attention are not affected. "
    "To serve such adapters, compress with factorization.structure: low_rank"
)


@dataclass(frozen=True)
class _Slice:
    """A stretch of one axis of a checkpoint tensor: the axis' full length there, and where this rank's part lies."""

    full: int
    start: int
    length: int

    def of(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        return tensor.narrow(dim, self.start, self.length)


@dataclass
class _Loading:
    """Puts checkpoint tensors into one group's factors, checks their shapes, and remembers which have come."""

    prefix: str
    spec: GroupSpec
    first: nn.Parameter | None
    """What A or T is loaded into, from its row `first_row` on. Its data may move to another device in between."""
    second: Factor
    columns: _Slice
    """Of A; of B where there is no A."""
    rows: list[_Slice]
    """Of each member's B and b."""
    first_row: int = 0
    materialise: bool = False
    """Whether an identity block's T becomes (a part of) an A."""
    order: torch.Tensor | None = None
    T: torch.Tensor | None = None
    """T (r, n - r), kept until `order` has come as well where it becomes an A."""
    seen: set[str] = field(default_factory=set)

    def load_first(self, parameter: torch.Tensor, tensor: torch.Tensor, shard: str | int | None = None) -> None:
        self._check_together("A.weight", shard)
        assert self.first is not None
        name, rank, n = f"{self.prefix}.A.weight", self.spec.rank, self.columns.full
        block = self.spec.structure == "identity_block"
        _check_shape(name, tensor, (rank, n - rank if block else n))
        if self.materialise:
            self.T = tensor.to(self.first.device, self.first.dtype, copy=True)  # vLLM may reuse the tensor's memory
        else:
            self._put(tensor if block else self.columns.of(tensor, 1))
        self.seen.add(name)
        self._materialise()

    def load_order(self, parameter: torch.Tensor, tensor: torch.Tensor, shard: str | int | None = None) -> None:
        self._check_together("A.order", shard)
        name, n = f"{self.prefix}.A.order", self.columns.full
        if not self.spec.gathers:
            raise _unexpected(name, f"says {'that its inputs are ordered' if self.spec.ordered else self.spec.structure}")
        _check_shape(name, tensor, (n,))
        if not is_permutation(tensor):
            raise ArtifactError(f"{name} is no permutation of the {n} inputs in int32. Export the artifact again")
        self.order = parameter.data.copy_(tensor)
        self.seen.add(name)
        self._materialise()

    def _materialise(self) -> None:
        """Make this rank's columns of [I T] into A (r, n / ranks) as soon as T and `order` have both come."""
        if self.T is None or self.order is None:
            return
        whole = torch.cat([torch.eye(len(self.T), dtype=self.T.dtype, device=self.T.device), self.T], dim=1)
        places = self.order.argsort().to(whole.device)  # of the inputs in J and Jc
        self._put(whole.index_select(1, self.columns.of(places, 0)))
        self.T = None

    def _put(self, rows: torch.Tensor) -> None:
        assert self.first is not None
        self.first.data.narrow(0, self.first_row, len(rows)).copy_(rows)

    def load_second(self, parameter: torch.Tensor, tensor: torch.Tensor, shard: str | int | None = None) -> None:
        index = _index(shard)
        is_bias = parameter is self.second.bias
        name = f"{self._member(index)}.B.{'bias' if is_bias else 'weight'}"
        rows = self.rows[index]
        _check_shape(name, tensor, (rows.full,) if is_bias else (rows.full, self.spec.rank))
        offset = sum(earlier.length for earlier in self.rows[:index])
        part = rows.of(tensor, 0) if is_bias or self.first is not None else self.columns.of(tensor, 1)
        parameter.data.narrow(0, offset, rows.length).copy_(part)
        self.seen.add(name)

    def refuse(self, parameter: torch.Tensor, tensor: torch.Tensor, shard: str | int | None = None) -> None:
        """Loader of the dense layer's own parameters, which a factorized layer must not have."""
        raise ArtifactError(
            f"{self.prefix}: config.json says it is factorized, but the checkpoint also has a dense tensor "
            f"{tuple(tensor.shape)} for it. Export the artifact again"
        )

    def finish(self) -> list[str]:
        """Let go of what loading needed, and return the names of tensors that have not come."""
        names = [] if self.first is None else [f"{self.prefix}.A.weight"]
        if self.spec.gathers:
            names.append(f"{self.prefix}.A.order")
        for index in range(len(self.rows)):
            names += [f"{self._member(index)}.B.weight", f"{self._member(index)}.B.bias"]
        # vLLM keeps the loaders, and through them would keep these beside their packed forms
        self.first = self.T = self.order = None
        return [name for name in names if name not in self.seen]

    def _member(self, index: int) -> str:
        return _sibling(self.prefix, self.spec.members[index])

    def _check_together(self, tensor: str, shard: str | int | None) -> None:
        if shard is not None:
            name = f"{self._member(_index(shard))}.{tensor}"
            raise _unexpected(name, f"lists {', '.join(self.spec.members)} as one group")


class LowRankLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """What vLLM asks of one factorized layer: its parameters, what to do once they are loaded, and the product."""

    def __init__(self, prefix: str, spec: GroupSpec, precision: Precision | None = None) -> None:
        self.prefix, self.spec, self.precision = prefix, spec, precision
        self._loading: _Loading | None = None
        self._dummy = False
        self._reduce_inside = False  # sum over the ranks between A and B
        self._first_rank_only = False  # the output is summed over the ranks later: b may be added once
        self._materialised = False  # A is made of a part of [I T]

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Hang the factors into the layer as `layer.A` (r, n) or (r, n - r) and `layer.B` (m, r), in this rank's sizes."""
        if len(output_partition_sizes) != len(self.spec.members):
            raise ArtifactError(
                f"{self.prefix}: config.json has {len(self.spec.members)} members ({', '.join(self.spec.members)}), "
                f"vLLM's layer is made of {len(output_partition_sizes)} linears. Export the artifact again"
            )
        rank, structure = self.spec.rank, self.spec.structure
        _check_identity_block(self.prefix, self.spec, input_size)
        split_input = isinstance(layer, RowParallelLinear)
        if structure == "narrow_in":
            input_size_per_partition, input_size = _share(self.prefix, rank, layer.tp_size if split_input else 1), rank
        self._materialised = structure == "identity_block" and input_size_per_partition < input_size
        layer.A = None
        if structure != "narrow_in":
            layer.A = first_factor(
                "low_rank" if self._materialised else structure,
                input_size_per_partition,
                rank,
                ordered=self.spec.ordered,
                dtype=params_dtype,
            )
        places = torch.arange(input_size)
        if self._materialised and self.spec.gathers:
            layer.A.order = nn.Parameter(places, requires_grad=False)
        width = input_size_per_partition if layer.A is None else rank
        layer.B = Factor(width, sum(output_partition_sizes), bias=True, dtype=params_dtype)
        position = layer.tp_rank if split_input else 0
        loading = _Loading(
            prefix=self.prefix,
            spec=self.spec,
            first=None if layer.A is None else layer.A.weight,
            second=layer.B,
            columns=_Slice(input_size, position * input_size_per_partition, input_size_per_partition),
            rows=[_rows(layer, index, size) for index, size in enumerate(output_partition_sizes)],
            materialise=self._materialised,
            order=places if self.spec.ordered else None,
        )
        if layer.A is not None:
            layer.A.weight.weight_loader = loading.load_first
        if self.spec.gathers:
            layer.A.order.weight_loader = loading.load_order
        layer.B.weight.weight_loader = loading.load_second
        layer.B.bias.weight_loader = loading.load_second
        # vLLM's code expects a weight (LoRA asks for its device). A tensor for it, or for the dense layer's own bias,
        # which vLLM makes after this with the layer's loader, contradicts config.json.
        layer.weight = nn.Parameter(torch.empty(0, dtype=params_dtype), requires_grad=False)
        layer.weight.weight_loader = loading.refuse
        layer.weight_loader = loading.refuse

        config = get_current_vllm_config_or_none()
        lora = config is not None and config.lora_config is not None
        self._loading, self._dummy = loading, _is_dummy(config)
        if lora and (self.spec.ordered or structure == "narrow_in"):
            warnings.warn(_REORDERED, stacklevel=2)
        if split_input and layer.tp_size > 1:
            self._reduce_inside = layer.reduce_results and not lora and layer.A is not None
            self._first_rank_only = not self._reduce_inside and layer.tp_rank > 0
            if self._reduce_inside:
                layer.reduce_results = False  # vLLM's forward then does not sum the output again

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check that every factor has come, and bring the factors into the kernels' layout.

        Raises:
            ArtifactError: a factor is missing from the checkpoint, by name.
        """
        assert self._loading is not None
        missing = self._loading.finish()
        if missing and not self._dummy:
            raise _incomplete(self.prefix, missing)
        if layer.bias is not None:
            # The whole bias is B.bias. The dense layer's own was never loaded, and whoever still adds it (vLLM hands it
            # out where skip_bias_add is set) must add nothing.
            layer.bias.data.zero_()
        if self._materialised and self.spec.gathers:
            del layer.A.order
        if layer.A is not None:
            layer.A.pack(self.precision)
        layer.B.pack(self.precision)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Multiply x (..., n) -> (..., m); `bias`, the dense layer's own, is part of B's and ignored."""
        z = x if layer.A is None else layer.A.multiply(x)
        if self._reduce_inside:
            z = tensor_model_parallel_all_reduce(z)
        y: torch.Tensor = layer.B.multiply(z, with_bias=not self._first_rank_only)
        return y


class PerShardMethod(LinearMethodBase):  # type: ignore[misc]
    """A layer of several linears (`members`), each with factors of its own or, where its spec is None, dense.

    The first product is by one stacked weight: every A_i (r_i, n), and the dense members' W_i. z_i goes through B_i, and what the
    dense members give is an output already.
    """

    def __init__(
        self, prefix: str, members: Sequence[str], specs: Sequence[GroupSpec | None], precision: Precision | None = None
    ) -> None:
        self.prefix, self.members, self.specs, self.precision = prefix, tuple(members), tuple(specs), precision
        self._widths: list[int] = []
        """Of what the first product gives for each member: r_i, or this rank's outputs."""
        self._dummy = False

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Hang the stacked first weight into the layer as `layer.A`, and each member's B (m_i, r_i) as `layer.B[i]`."""
        if len(output_partition_sizes) != len(self.specs):
            raise ArtifactError(
                f"{self.prefix}: config.json lists {', '.join(self.members)} one by one, vLLM's layer is made of "
                f"{len(output_partition_sizes)} linears. Export the artifact again"
            )
        rows = [_rows(layer, index, size) for index, size in enumerate(output_partition_sizes)]
        self._widths = [own.length if spec is None else spec.rank for spec, own in zip(self.specs, rows, strict=True)]
        layer.A = Factor(input_size, sum(self._widths), bias=True, dtype=params_dtype)
        layer.A.bias.data.zero_()  # of what no dense member's bias is loaded into
        layer.B = nn.ModuleList()
        parts: list[_Loading | _LoadingDense] = []
        for index, (spec, own) in enumerate(zip(self.specs, rows, strict=True)):
            name, start = _sibling(self.prefix, self.members[index]), sum(self._widths[:index])
            if spec is None:
                layer.B.append(nn.Identity())
                parts.append(_LoadingDense(name, layer.A, own, start))
                continue
            _check_identity_block(name, spec, input_size)
            layer.B.append(Factor(spec.rank, own.length, bias=True, dtype=params_dtype))
            parts.append(
                _Loading(
                    prefix=name,
                    spec=spec,
                    first=layer.A.weight,
                    second=layer.B[index],
                    columns=_Slice(input_size, 0, input_size),
                    rows=[own],
                    first_row=start,
                    materialise=spec.structure == "identity_block",
                    order=torch.arange(input_size) if spec.ordered else None,
                )
            )
        self._loading = _LoadingApart(self.prefix, parts)
        # vLLM renames q_proj.B.weight to qkv_proj.B.weight and finds the loader there; these parameters hold nothing.
        layer.A.weight.weight_loader = self._loading.load_first
        for holder, name, loader in (
            (layer.A, "order", self._loading.load_order),
            (layer.B, "weight", partial(self._loading.load_second, "weight")),
            (layer.B, "bias", partial(self._loading.load_second, "bias")),
            (layer, "weight", self._loading.load_dense),
        ):
            empty = nn.Parameter(torch.empty(0, dtype=params_dtype), requires_grad=False)
            empty.weight_loader = loader  # type: ignore[attr-defined]
            setattr(holder, name, empty)
        layer.weight_loader = self._loading.load_dense  # of the dense layer's own bias, which vLLM makes after this
        self._dummy = _is_dummy(get_current_vllm_config_or_none())

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check that every tensor has come, and bring the weights into the kernels' layout.

        Raises:
            ArtifactError: a tensor is missing from the checkpoint, by name.
        """
        missing = self._loading.finish(biased=layer.bias is not None)
        if missing and not self._dummy:
            raise _incomplete(self.prefix, missing)
        if layer.bias is not None:
            layer.bias.data.zero_()  # see LowRankLinearMethod
        del layer.A.order, layer.B.weight, layer.B.bias
        layer.A.pack(self.precision)
        for second in layer.B:
            if isinstance(second, Factor):
                second.pack(self.precision)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Multiply x (..., n) -> (..., m); `bias`, the dense layer's own, is part of A's or B's and ignored."""
        parts = layer.A.multiply(x).split_with_sizes(self._widths, -1)
        outputs = [
            second.multiply(part) if isinstance(second, Factor) else part for part, second in zip(parts, layer.B, strict=True)
        ]
        return torch.cat(outputs, -1)


@dataclass
class _LoadingDense:
    """As `_Loading`, for a dense member, whose W and bias are `stacked`'s from row `first_row` on."""

    prefix: str
    stacked: Factor | None
    rows: _Slice
    first_row: int
    seen: set[str] = field(default_factory=set)

    def load(self, tensor: torch.Tensor) -> None:
        assert self.stacked is not None
        kind = "bias" if tensor.ndim == 1 else "weight"
        whole = getattr(self.stacked, kind)
        _check_shape(f"{self.prefix}.{kind}", tensor, (self.rows.full, *whole.shape[1:]))
        whole.data.narrow(0, self.first_row, self.rows.length).copy_(self.rows.of(tensor, 0))
        self.seen.add(kind)

    def finish(self, *, biased: bool) -> list[str]:
        self.stacked = None
        return [f"{self.prefix}.{kind}" for kind in ("weight", "bias") if kind not in self.seen and (biased or kind == "weight")]


@dataclass(frozen=True)
class _LoadingApart:
    """Sends a checkpoint's tensors to the member that they are of."""

    prefix: str
    parts: Sequence[_Loading | _LoadingDense]

    def load_first(self, parameter: torch.Tensor, tensor: torch.Tensor, shard: str | int | None = None) -> None:
        self._compressed(shard, "A.weight").load_first(parameter, tensor)

    def load_order(self, parameter: torch.Tensor, tensor: torch.Tensor, shard: str | int | None = None) -> None:
        self._compressed(shard, "A.order").load_order(torch.empty_like(tensor, dtype=torch.int64), tensor)

    def load_second(self, kind: str, parameter: torch.Tensor, tensor: torch.Tensor, shard: str | int | None = None) -> None:
        part = self._compressed(shard, f"B.{kind}")
        part.load_second(getattr(part.second, kind), tensor)

    def load_dense(self, parameter: torch.Tensor, tensor: torch.Tensor, shard: str | int | None = None) -> None:
        part = self._part(shard, "bias" if tensor.ndim == 1 else "weight")
        if isinstance(part, _LoadingDense):
            part.load(tensor)
        else:
            part.refuse(parameter, tensor)

    def finish(self, *, biased: bool) -> list[str]:
        missing: list[str] = []
        for part in self.parts:
            missing += part.finish(biased=biased) if isinstance(part, _LoadingDense) else part.finish()
        return missing

    def _compressed(self, shard: str | int | None, tensor: str) -> _Loading:
        part = self._part(shard, tensor)
        if isinstance(part, _LoadingDense):
            raise _unexpected(f"{part.prefix}.{tensor}", "says that the layer is dense")
        return part

    def _part(self, shard: str | int | None, tensor: str) -> _Loading | _LoadingDense:
        if shard is None:
            raise _unexpected(f"{self.prefix}.{tensor}", "lists its linears one by one")
        return self.parts[_index(shard)]


class DenseMethod(UnquantizedLinearMethod):  # type: ignore[misc]
    """vLLM's own dense layer, quantized when its weight has been loaded if that is asked for."""

    def __init__(self, precision: Precision | None) -> None:
        super().__init__()
        self.precision = precision
        self._quantized: Any = None

    def process_weights_after_loading(self, layer: Any) -> None:
        """Quantize the weight, or bring it into the kernels' layout."""
        if self.precision is None:
            super().process_weights_after_loading(layer)
        else:
            self._quantized = quantized_kernel(layer, self.precision)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Multiply x (..., n) -> (..., m)."""
        y: torch.Tensor = (
            super().apply(layer, x, bias) if self._quantized is None else self._quantized.apply_weights(layer, x, bias)
        )
        return y


class FewerOutputsMethod(DenseMethod):
    """vLLM's own dense layer with fewer outputs than the model's config says: gate and up of an MLP that has lost neurons."""

    def __init__(self, prefix: str, spec: GroupSpec, precision: Precision | None = None) -> None:
        super().__init__(precision)
        self.prefix, self.spec = prefix, spec
        self._missing: set[int] = set()

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Give the layer its real sizes, which its loaders go by, and then its weight."""
        members, width = len(output_partition_sizes), _share(self.prefix, self.spec.rank, layer.tp_size)
        layer.output_sizes = [self.spec.rank] * members
        layer.output_partition_sizes = [width] * members
        layer.output_size, layer.output_size_per_partition = members * self.spec.rank, members * width
        load = extra_weight_attrs["weight_loader"]

        def checked(parameter: torch.Tensor, tensor: torch.Tensor, shard: int = 0) -> None:
            if tuple(tensor.shape) != (self.spec.rank, input_size):
                raise ArtifactError(
                    f"{self.prefix}: {self.spec.members[shard]} is {tuple(tensor.shape)} in the checkpoint; config.json makes it "
                    f"{(self.spec.rank, input_size)}. Export the artifact again"
                )
            load(parameter, tensor, shard)
            self._missing.discard(shard)

        if not _is_dummy(get_current_vllm_config_or_none()):
            self._missing = set(range(members))
        super().create_weights(
            layer,
            input_size_per_partition,
            layer.output_partition_sizes,
            input_size,
            layer.output_size,
            params_dtype,
            **{**extra_weight_attrs, "weight_loader": checked},
        )

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check that every linear has come, and bring the weight into the kernels' layout.

        Raises:
            ArtifactError: a linear is missing from the checkpoint, by name.
        """
        if self._missing:
            raise _incomplete(self.prefix, [self.spec.members[index] for index in sorted(self._missing)])
        super().process_weights_after_loading(layer)


def _sibling(prefix: str, member: str) -> str:
    """Return the full name of a linear beside the module `prefix`."""
    parent, _, _ = prefix.rpartition(".")
    return f"{parent}.{member}" if parent else member


def _check_shape(name: str, tensor: torch.Tensor, expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != expected:
        raise ArtifactError(
            f"{name} is {tuple(tensor.shape)} in the checkpoint; config.json's rank and the model's sizes make it "
            f"{expected}. Export the artifact again"
        )


def _unexpected(name: str, config: str) -> ArtifactError:
    return ArtifactError(f"{name} is in the checkpoint, but config.json {config}. Export the artifact again")


def _index(shard: str | int | None) -> int:
    """Return the place among a layer's linears of what vLLM calls a shard."""
    return _QKV[shard] if isinstance(shard, str) else shard or 0


def _check_identity_block(prefix: str, spec: GroupSpec, n: int) -> None:
    if spec.structure == "identity_block" and spec.rank >= n:
        raise ArtifactError(
            f"{prefix}: an identity block of rank {spec.rank} leaves nothing of {n} inputs. Export the artifact again"
        )


def _is_dummy(config: Any) -> bool:
    """Say whether vLLM makes the weights up, so that none will be loaded."""
    return config is not None and config.load_config.load_format == "dummy"


def _incomplete(prefix: str, missing: list[str]) -> ArtifactError:
    return ArtifactError(
        f"{prefix}: missing from the checkpoint: {', '.join(missing)}. "
        "The artifact is incomplete: run lrserve verify on it, or export it again"
    )


def _share(prefix: str, neurons: int, ranks: int) -> int:
    """Return how many of an MLP's neurons each of the tensor-parallel ranks has."""
    if neurons % ranks:
        raise ArtifactError(
            f"{prefix}: {neurons} neurons cannot be divided among {ranks} ranks; serve with another tensor_parallel_size, or "
            f"compress with search.rank_step a multiple of {ranks}"
        )
    return neurons // ranks


def _rows(layer: Any, index: int, size: int) -> _Slice:
    """Rows of member `index` that this rank holds: `size` of them."""
    if not isinstance(layer, ColumnParallelLinear):
        return _Slice(size, 0, size)
    replicas = layer.num_kv_head_replicas if isinstance(layer, QKVParallelLinear) and index > 0 else 1
    return _Slice(size * layer.tp_size // replicas, (layer.tp_rank // replicas) * size, size)
