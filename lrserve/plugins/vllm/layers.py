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

vLLM does not notice a quantized parameter that no tensor was loaded into, so loading.py counts what arrives.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from vllm.config import get_current_vllm_config_or_none
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    RowParallelLinear,
    UnquantizedLinearMethod,
)

from lrserve.compression.spec import GroupSpec
from lrserve.errors import ArtifactError
from lrserve.plugins.vllm.kernels import Factor, Precision, first_factor, quantized_kernel
from lrserve.plugins.vllm.loading import (
    Loading,
    LoadingApart,
    LoadingDense,
    Slice,
    check_identity_block,
    incomplete,
    is_dummy,
    rows_of,
    share_of_neurons,
    sibling,
)

_REORDERED = (
    "this lrserve artifact has fewer neurons in its MLPs than the dense model, or keeps them in another order: LoRA adapters of "
    "gate_proj, up_proj or down_proj do not fit unless they were trained on the artifact; those of the attention are not affected. "
    "To serve such adapters, compress with factorization.structure: low_rank"
)


class LowRankLinearMethod(LinearMethodBase):
    """What vLLM asks of one factorized layer: its parameters, what to do once they are loaded, and the multiplication."""

    def __init__(self, prefix: str, spec: GroupSpec, precision: Precision | None = None) -> None:
        self.prefix, self.spec, self.precision = prefix, spec, precision
        self._loading: Loading | None = None
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
        check_identity_block(self.prefix, self.spec, input_size)
        split_input = isinstance(layer, RowParallelLinear)
        if structure == "narrow_in":
            input_size_per_partition, input_size = share_of_neurons(self.prefix, rank, layer.tp_size if split_input else 1), rank
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
        loading = Loading(
            prefix=self.prefix,
            spec=self.spec,
            first=None if layer.A is None else layer.A.weight,
            second=layer.B,
            columns=Slice(input_size, position * input_size_per_partition, input_size_per_partition),
            rows=[rows_of(layer, index, size) for index, size in enumerate(output_partition_sizes)],
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
        self._loading, self._dummy = loading, is_dummy(config)
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
            raise incomplete(self.prefix, missing)
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


class PerShardMethod(LinearMethodBase):
    """A layer of several linears (`members`), each with factors of its own or, where its spec is None, dense.

    The first multiplication is by one stacked weight: every A_i (r_i, n), and the dense members' W_i. z_i goes through B_i; what
    the dense members give is an output already.
    """

    def __init__(
        self, prefix: str, members: Sequence[str], specs: Sequence[GroupSpec | None], precision: Precision | None = None
    ) -> None:
        self.prefix, self.members, self.specs, self.precision = prefix, tuple(members), tuple(specs), precision
        self._widths: list[int] = []
        """Of what the first multiplication gives for each member: r_i, or this rank's outputs."""
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
        rows = [rows_of(layer, index, size) for index, size in enumerate(output_partition_sizes)]
        self._widths = [own.length if spec is None else spec.rank for spec, own in zip(self.specs, rows, strict=True)]
        layer.A = Factor(input_size, sum(self._widths), bias=True, dtype=params_dtype)
        layer.A.bias.data.zero_()  # of what no dense member's bias is loaded into
        layer.B = nn.ModuleList()
        parts: list[Loading | LoadingDense] = []
        for index, (spec, own) in enumerate(zip(self.specs, rows, strict=True)):
            name, start = sibling(self.prefix, self.members[index]), sum(self._widths[:index])
            if spec is None:
                layer.B.append(nn.Identity())
                parts.append(LoadingDense(name, layer.A, own, start))
                continue
            check_identity_block(name, spec, input_size)
            layer.B.append(Factor(spec.rank, own.length, bias=True, dtype=params_dtype))
            parts.append(
                Loading(
                    prefix=name,
                    spec=spec,
                    first=layer.A.weight,
                    second=layer.B[index],
                    columns=Slice(input_size, 0, input_size),
                    rows=[own],
                    first_row=start,
                    materialise=spec.structure == "identity_block",
                    order=torch.arange(input_size) if spec.ordered else None,
                )
            )
        self._loading = LoadingApart(self.prefix, parts)
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
        self._dummy = is_dummy(get_current_vllm_config_or_none())

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check that every tensor has come, and bring the weights into the kernels' layout.

        Raises:
            ArtifactError: a tensor is missing from the checkpoint, by name.
        """
        missing = self._loading.finish(biased=layer.bias is not None)
        if missing and not self._dummy:
            raise incomplete(self.prefix, missing)
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


class DenseMethod(UnquantizedLinearMethod):
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
        members, width = len(output_partition_sizes), share_of_neurons(self.prefix, self.spec.rank, layer.tp_size)
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

        if not is_dummy(get_current_vllm_config_or_none()):
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
            raise incomplete(self.prefix, [self.spec.members[index] for index in sorted(self._missing)])
        super().process_weights_after_loading(layer)
