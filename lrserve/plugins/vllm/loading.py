"""Putting a checkpoint's tensors into the parameters of compressed layers. Imports vLLM.

vLLM does not notice a quantized parameter that no tensor was loaded into, so these loaders check shapes and count what arrives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from vllm.model_executor.layers.linear import ColumnParallelLinear, QKVParallelLinear

from lrserve.compression.level import SCHEMES, Precision
from lrserve.compression.spec import GroupSpec, Tensor, is_permutation, residual_tensors, weight_tensors
from lrserve.errors import ArtifactError
from lrserve.plugins.vllm.kernels import Factor, Residual

_QKV = {"q": 0, "k": 1, "v": 2}


@dataclass(frozen=True)
class Slice:
    """A stretch of one axis of a checkpoint tensor: the axis' full length there, and where this rank's part lies."""

    full: int
    start: int
    length: int

    def of(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """Return this rank's part of a checkpoint tensor along `dim`."""
        return tensor.narrow(dim, self.start, self.length)

    def of_weight(self, kind: str, tensor: torch.Tensor, weights: Precision | None) -> torch.Tensor:
        """Return this rank's columns of the tensor `kind` of a weight (m, full), which may be rounded."""
        scheme = SCHEMES[weights] if weights else None
        per_group = scheme is not None and scheme.group is not None
        if kind == "weight_shape" or (kind == "weight_scale" and not per_group):
            return tensor
        unit = self.full // tensor.shape[1]
        return tensor.narrow(1, self.start // unit, self.length // unit)


@dataclass(frozen=True)
class Stacked:
    """As `Slice`, of linears that lie one after the other in a tensor: q, k and v, or gate and up, where they are one."""

    parts: Sequence[Slice]
    shards: Sequence[str | int]
    """What vLLM calls each of them."""

    @property
    def full(self) -> int:
        """Length in the checkpoint."""
        return sum(part.full for part in self.parts)

    @property
    def length(self) -> int:
        """Length of this rank's parts."""
        return sum(part.length for part in self.parts)

    def of(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """Return this rank's parts of a checkpoint tensor along `dim`."""
        return torch.cat([part.of(piece, dim) for part, piece in zip(self.parts, self.pieces(tensor, dim), strict=True)], dim)

    def pieces(self, tensor: torch.Tensor, dim: int) -> Sequence[torch.Tensor]:
        """Return each linear's part of a checkpoint tensor along `dim`."""
        pieces: Sequence[torch.Tensor] = tensor.split([part.full for part in self.parts], dim)
        return pieces


Rows = Sequence[Slice | Stacked]
"""Of each member."""


@dataclass
class Loading:
    """Puts checkpoint tensors into one group's factors, checks their shapes, and remembers which have come."""

    prefix: str
    spec: GroupSpec
    first: Factor | None
    """What A or T is loaded into, from its row `first_row` on. Its data may move to another device in between."""
    second: Factor
    columns: Slice
    """Of A; of B where there is no A."""
    rows: Rows
    """Of B and b."""
    first_row: int = 0
    materialise: bool = False
    """Whether an identity block's T becomes (a part of) an A."""
    order: torch.Tensor | None = None
    T: torch.Tensor | None = None
    """T (r, n - r), kept until `order` has come as well where it becomes an A."""
    seen: set[str] = field(default_factory=set)

    def load_first(self, kind: str, parameter: torch.Tensor, tensor: torch.Tensor, shard: str | int | None = None) -> None:
        """Load a tensor of A (r, n), or of T (r, n - r) of an identity block: `A.weight`, or one that a rounded one is made of."""
        self._check_together(f"A.{kind}", shard)
        assert self.first is not None
        rank, n, weights = self.spec.rank, self.columns.full, self.spec.weights
        block = self.spec.structure == "identity_block"
        name = f"{self.prefix}.A.{kind}"
        _check(name, tensor, weight_tensors(rank, n - rank if block else n, weights)[kind])
        if self.materialise:
            like = self.first.weight
            self.T = tensor.to(like.device, like.dtype, copy=True)  # vLLM may reuse the tensor's memory
        else:
            self._put(kind, tensor if block else self.columns.of_weight(kind, tensor, weights))
        self.seen.add(name)
        self._materialise()

    def load_order(self, parameter: torch.Tensor, tensor: torch.Tensor, shard: str | int | None = None) -> None:
        """Load `A.order` (n,) of an identity block."""
        self._check_together("A.order", shard)
        name, n = f"{self.prefix}.A.order", self.columns.full
        if not self.spec.gathers:
            raise _unexpected(name, f"says {'that its inputs are ordered' if self.spec.ordered else self.spec.structure}")
        _check(name, tensor, Tensor((n,), tensor.dtype))
        if not is_permutation(tensor):
            raise ArtifactError(f"{name} is no permutation of the {n} inputs in int32. Export the artifact again")
        self.order = parameter.data.copy_(tensor)
        self.seen.add(name)
        self._materialise()

    def _materialise(self) -> None:
        """Make this rank's columns of [I T] into A (r, n / ranks) as soon as T and `order` have both come."""
        if self.T is None or self.order is None:
            return
        block = torch.cat([torch.eye(len(self.T), dtype=self.T.dtype, device=self.T.device), self.T], dim=1)
        places = self.order.argsort().to(block.device)  # of the inputs in J and Jc
        self._put("weight", block.index_select(1, self.columns.of(places, 0)))
        self.T = None

    def _put(self, kind: str, rows: torch.Tensor) -> None:
        assert self.first is not None
        self.first.loaded[kind].data.narrow(0, self.first_row, len(rows)).copy_(rows)

    def load_second(self, kind: str, parameter: torch.Tensor, tensor: torch.Tensor, shard: str | int | None = None) -> None:
        """Load a member's rows of b, or of a tensor of B."""
        index = _index(shard)
        name, rows = f"{self._member(index)}.B.{kind}", self.rows[index]
        wanted = weight_tensors(rows.full, self.spec.rank, self.spec.weights) | {"bias": Tensor((rows.full,), None)}
        _check(name, tensor, wanted[kind])
        self.seen.add(name)
        if kind == "weight_shape":
            return
        part = rows.of(tensor, 0)
        if self.first is None and kind != "bias":
            part = self.columns.of_weight(kind, part, self.spec.weights)
        parameter.data.narrow(0, _offset(self.rows, index), rows.length).copy_(part)

    def refuse(self, parameter: torch.Tensor, tensor: torch.Tensor, shard: str | int | None = None) -> None:
        """Loader of the dense layer's own parameters, which a factorized layer must not have."""
        raise ArtifactError(
            f"{self.prefix}: config.json says it is factorized, but the checkpoint also has a dense tensor "
            f"{tuple(tensor.shape)} for it. Export the artifact again"
        )

    def finish(self) -> list[str]:
        """Let go of what loading needed, and return the names of tensors that have not come."""
        kinds = list(weight_tensors(8, 128, self.spec.weights))
        names = [] if self.first is None else [f"{self.prefix}.A.{kind}" for kind in kinds]
        if self.spec.gathers:
            names.append(f"{self.prefix}.A.order")
        names += [f"{self._member(index)}.B.{kind}" for index in range(len(self.rows)) for kind in [*kinds, "bias"]]
        self.T = self.order = None
        return [name for name in names if name not in self.seen]

    def _member(self, index: int) -> str:
        return sibling(self.prefix, self.spec.members[index])

    def _check_together(self, tensor: str, shard: str | int | None) -> None:
        if shard is not None:
            name = f"{self._member(_index(shard))}.{tensor}"
            raise _unexpected(name, f"lists {', '.join(self.spec.members)} as one group")


@dataclass
class LoadingResidual:
    """As `Loading`, for the residual of a group: n inputs, of which this rank has `columns`, and `rows` of each member."""

    prefix: str
    spec: GroupSpec
    residual: Residual
    columns: Slice
    rows: Rows
    seen: set[str] = field(default_factory=set)

    def hook(self) -> None:
        """Become the loader of the residual's parameters."""
        for kind, parameter in self.residual.A.loaded.items():
            parameter.weight_loader = partial(self.load_first, kind)  # type: ignore[attr-defined]
        self.residual.B.weight.weight_loader = self.load_second  # type: ignore[attr-defined]

    def load_first(self, kind: str, parameter: torch.Tensor, tensor: torch.Tensor, shard: str | int | None = None) -> None:
        """Load `residual_A.weight` (r, n) or its scales (r, 1)."""
        name = f"residual_A.{kind}"
        _check(f"{self.prefix}.{name}", tensor, residual_tensors(0, self.columns.full, self.spec.residual)[name])
        parameter.data.copy_(self.columns.of(tensor, 1) if kind == "weight" else tensor)
        self.seen.add(f"{self.prefix}.{name}")

    def load_second(self, parameter: torch.Tensor, tensor: torch.Tensor, shard: str | int | None = None) -> None:
        """Load a member's rows of `residual_B.weight` (m, r)."""
        index = _index(shard)
        rows, name = self.rows[index], f"{sibling(self.prefix, self.spec.members[index])}.residual_B.weight"
        _check(name, tensor, residual_tensors(rows.full, 0, self.spec.residual)["residual_B.weight"])
        parameter.data.narrow(0, _offset(self.rows, index), rows.length).copy_(rows.of(tensor, 0))
        self.seen.add(name)

    def finish(self) -> list[str]:
        """Return the names of tensors that have not come."""
        names = [f"{self.prefix}.residual_A.{kind}" for kind in ("weight", "weight_scale")]
        names += [f"{sibling(self.prefix, member)}.residual_B.weight" for member in self.spec.members]
        return [name for name in names if name not in self.seen]


@dataclass
class LoadingStock:
    """Checks and counts what vLLM's own loaders put into a layer whose linears have n inputs and `rows` of outputs."""

    prefix: str
    spec: GroupSpec
    n: int
    rows: Rows
    seen: set[str] = field(default_factory=set)

    def checked(self, kind: str, load: Callable[..., None]) -> Callable[..., None]:
        """Return a loader that checks a tensor, loads it by `load`, and remembers it."""

        def loader(parameter: torch.Tensor, tensor: torch.Tensor, *shard: Any) -> None:
            index = _index(*shard)
            name, rows = f"{self._member(index)}.{kind}", self.rows[index]
            wanted = weight_tensors(rows.full, self.n, self.spec.weights) | {"bias": Tensor((rows.full,), None)}
            _check(name, tensor, wanted[kind])
            if isinstance(rows, Stacked) and (dim := getattr(parameter, "output_dim", None)) is not None:
                # vLLM takes such a tensor apart too, but by the layer's loader, in whose place this one is.
                for own, piece in zip(rows.shards, rows.pieces(tensor, dim), strict=True):
                    load(parameter, piece, own)
            else:
                load(parameter, tensor, *shard)
            self.seen.add(name)

        return loader

    def finish(self, *, biased: bool) -> list[str]:
        """Return the names of tensors that have not come."""
        kinds = [*weight_tensors(8, 128, self.spec.weights), *(["bias"] if biased else [])]
        names = (f"{self._member(index)}.{kind}" for index in range(len(self.rows)) for kind in kinds)
        return [name for name in names if name not in self.seen]

    def _member(self, index: int) -> str:
        return sibling(self.prefix, self.spec.members[index])


@dataclass
class LoadingDense:
    """As `Loading`, for a dense member, whose W and bias are `stacked`'s from row `first_row` on."""

    prefix: str
    stacked: Factor | None
    rows: Slice
    first_row: int
    seen: set[str] = field(default_factory=set)

    def load(self, tensor: torch.Tensor) -> None:
        """Load the member's weight (m, n), or its bias (m,)."""
        assert self.stacked is not None
        kind = "bias" if tensor.ndim == 1 else "weight"
        parameter = getattr(self.stacked, kind)
        _check(f"{self.prefix}.{kind}", tensor, Tensor((self.rows.full, *parameter.shape[1:]), None))
        parameter.data.narrow(0, self.first_row, self.rows.length).copy_(self.rows.of(tensor, 0))
        self.seen.add(kind)

    def finish(self, *, biased: bool) -> list[str]:
        """Let go of the parameter, and return the names of tensors that have not come."""
        self.stacked = None
        return [f"{self.prefix}.{kind}" for kind in ("weight", "bias") if kind not in self.seen and (biased or kind == "weight")]


@dataclass(frozen=True)
class LoadingApart:
    """Sends a checkpoint's tensors to the member that they are of."""

    prefix: str
    parts: Sequence[Loading | LoadingDense]

    def load_first(self, parameter: torch.Tensor, tensor: torch.Tensor, shard: str | int | None = None) -> None:
        """Send `A.weight` to the member of this shard."""
        self._compressed(shard, "A.weight").load_first("weight", parameter, tensor)

    def load_order(self, parameter: torch.Tensor, tensor: torch.Tensor, shard: str | int | None = None) -> None:
        """Send `A.order` to the member of this shard."""
        self._compressed(shard, "A.order").load_order(torch.empty_like(tensor, dtype=torch.int64), tensor)

    def load_second(self, kind: str, parameter: torch.Tensor, tensor: torch.Tensor, shard: str | int | None = None) -> None:
        """Send `B.weight` or `B.bias` (`kind`) to the member of this shard."""
        part = self._compressed(shard, f"B.{kind}")
        part.load_second(kind, getattr(part.second, kind), tensor)

    def load_dense(self, parameter: torch.Tensor, tensor: torch.Tensor, shard: str | int | None = None) -> None:
        """Send a dense linear's tensor to the member of this shard; refuse it where that has factors."""
        part = self._part(shard, "bias" if tensor.ndim == 1 else "weight")
        if isinstance(part, LoadingDense):
            part.load(tensor)
        else:
            part.refuse(parameter, tensor)

    def finish(self, *, biased: bool) -> list[str]:
        """Return the names of tensors that have not come."""
        missing: list[str] = []
        for part in self.parts:
            missing += part.finish(biased=biased) if isinstance(part, LoadingDense) else part.finish()
        return missing

    def _compressed(self, shard: str | int | None, tensor: str) -> Loading:
        part = self._part(shard, tensor)
        if isinstance(part, LoadingDense):
            raise _unexpected(f"{part.prefix}.{tensor}", "says that the layer is dense")
        return part

    def _part(self, shard: str | int | None, tensor: str) -> Loading | LoadingDense:
        if shard is None:
            raise _unexpected(f"{self.prefix}.{tensor}", "lists its linears one by one")
        return self.parts[_index(shard)]


def sibling(prefix: str, member: str) -> str:
    """Return the full name of a linear beside the module `prefix`."""
    parent, _, _ = prefix.rpartition(".")
    return f"{parent}.{member}" if parent else member


def _offset(rows: Rows, index: int) -> int:
    return sum(earlier.length for earlier in rows[:index])


def _check(name: str, tensor: torch.Tensor, wanted: Tensor) -> None:
    if tuple(tensor.shape) != wanted.shape:
        raise ArtifactError(
            f"{name} is {tuple(tensor.shape)} in the checkpoint; config.json's rank and the model's sizes make it "
            f"{wanted.shape}. Export the artifact again"
        )
    if tensor.dtype != wanted.dtype and not (wanted.dtype is None and tensor.is_floating_point() and tensor.element_size() > 1):
        expected = wanted.dtype or "floating point numbers"
        raise ArtifactError(
            f"{name} is {tensor.dtype} in the checkpoint; config.json makes it {expected}. Export the artifact again"
        )


def _unexpected(name: str, config: str) -> ArtifactError:
    return ArtifactError(f"{name} is in the checkpoint, but config.json {config}. Export the artifact again")


def _index(shard: str | int | None = None) -> int:
    """Return the place among a layer's linears of what vLLM calls a shard."""
    return _QKV[shard] if isinstance(shard, str) else shard or 0


def check_identity_block(prefix: str, spec: GroupSpec, n: int) -> None:
    """Refuse an identity block that leaves nothing of its n inputs."""
    if spec.structure == "identity_block" and spec.rank >= n:
        raise ArtifactError(
            f"{prefix}: an identity block of rank {spec.rank} leaves nothing of {n} inputs. Export the artifact again"
        )


def check_members(prefix: str, spec: GroupSpec, linears: int) -> None:
    """Refuse a group of another number of linears than vLLM's layer is made of; they may be one tensor in the checkpoint."""
    if len(spec.members) not in (1, linears):
        raise ArtifactError(
            f"{prefix}: config.json has {len(spec.members)} members ({', '.join(spec.members)}), "
            f"vLLM's layer is made of {linears} linears. Export the artifact again"
        )


def check_columns(prefix: str, spec: GroupSpec, columns: Slice) -> None:
    """Refuse to divide among ranks the columns of a rounded weight that must stay together."""
    if spec.weights is None or columns.length == columns.full:
        return
    advice = "serve with another tensor_parallel_size"
    if spec.structure == "identity_block":
        raise ArtifactError(f"{prefix}: an identity block in {spec.weights} cannot be divided among ranks; {advice}")
    if not SCHEMES[spec.weights].fits(columns.length):
        raise ArtifactError(
            f"{prefix}: {columns.full} inputs cannot be divided among {columns.full // columns.length} ranks in whole groups of "
            f"{spec.weights}; {advice}"
        )


def is_dummy(config: Any) -> bool:
    """Say whether vLLM makes the weights up, so that none will be loaded."""
    return config is not None and config.load_config.load_format == "dummy"


def require_complete(prefix: str, missing: Sequence[str], *, dummy: bool) -> None:
    """Refuse a checkpoint that lacks tensors, by their names; of `dummy` weights none were loaded."""
    if missing and not dummy:
        raise ArtifactError(
            f"{prefix}: missing from the checkpoint: {', '.join(missing)}. "
            "The artifact is incomplete: run lrserve verify on it, or export it again"
        )


def share_of_neurons(prefix: str, neurons: int, ranks: int) -> int:
    """Return how many of an MLP's neurons each of the tensor-parallel ranks has."""
    if neurons % ranks:
        raise ArtifactError(
            f"{prefix}: {neurons} neurons cannot be divided among {ranks} ranks; serve with another tensor_parallel_size, or "
            f"compress with search.width_step a multiple of {ranks}"
        )
    return neurons // ranks


def columns_of(layer: Any, full: int, own: int) -> Slice:
    """Columns of a weight with `full` inputs that this rank holds: `own` of them."""
    return Slice(full, (layer.tp_rank if own < full else 0) * own, own)


def rows_of(layer: Any, index: int, size: int) -> Slice:
    """Rows of member `index` that this rank holds: `size` of them."""
    if not isinstance(layer, ColumnParallelLinear):
        return Slice(size, 0, size)
    replicas = layer.num_kv_head_replicas if isinstance(layer, QKVParallelLinear) and index > 0 else 1
    return Slice(size * layer.tp_size // replicas, (layer.tp_rank // replicas) * size, size)


def rows_of_members(layer: Any, spec: GroupSpec, sizes: Sequence[int]) -> Rows:
    """Rows of each of a group's members that this rank holds: `sizes` of the linears of vLLM's layer."""
    rows = [rows_of(layer, index, size) for index, size in enumerate(sizes)]
    if len(rows) == len(spec.members):
        return rows
    return [Stacked(rows, tuple("qkv") if isinstance(layer, QKVParallelLinear) else range(len(rows)))]
