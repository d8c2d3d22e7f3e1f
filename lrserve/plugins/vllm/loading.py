"""Putting a checkpoint's tensors into the parameters of compressed layers. Imports vLLM.

vLLM does not notice a quantized parameter that no tensor was loaded into, so these loaders check shapes and count what arrives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import ColumnParallelLinear, QKVParallelLinear

from lrserve.compression.spec import GroupSpec, is_permutation
from lrserve.errors import ArtifactError
from lrserve.plugins.vllm.kernels import Factor

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


@dataclass
class Loading:
    """Puts checkpoint tensors into one group's factors, checks their shapes, and remembers which have come."""

    prefix: str
    spec: GroupSpec
    first: nn.Parameter | None
    """What A or T is loaded into, from its row `first_row` on. Its data may move to another device in between."""
    second: Factor
    columns: Slice
    """Of A; of B where there is no A."""
    rows: list[Slice]
    """Of each member's B and b."""
    first_row: int = 0
    materialise: bool = False
    """Whether an identity block's T becomes (a part of) an A."""
    order: torch.Tensor | None = None
    T: torch.Tensor | None = None
    """T (r, n - r), kept until `order` has come as well where it becomes an A."""
    seen: set[str] = field(default_factory=set)

    def load_first(self, parameter: torch.Tensor, tensor: torch.Tensor, shard: str | int | None = None) -> None:
        """Load `A.weight`: A (r, n), or T (r, n - r) of an identity block."""
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
        """Load `A.order` (n,) of an identity block."""
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
        block = torch.cat([torch.eye(len(self.T), dtype=self.T.dtype, device=self.T.device), self.T], dim=1)
        places = self.order.argsort().to(block.device)  # of the inputs in J and Jc
        self._put(block.index_select(1, self.columns.of(places, 0)))
        self.T = None

    def _put(self, rows: torch.Tensor) -> None:
        assert self.first is not None
        self.first.data.narrow(0, self.first_row, len(rows)).copy_(rows)

    def load_second(self, parameter: torch.Tensor, tensor: torch.Tensor, shard: str | int | None = None) -> None:
        """Load a member's rows of B, or of b."""
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
        return sibling(self.prefix, self.spec.members[index])

    def _check_together(self, tensor: str, shard: str | int | None) -> None:
        if shard is not None:
            name = f"{self._member(_index(shard))}.{tensor}"
            raise _unexpected(name, f"lists {', '.join(self.spec.members)} as one group")


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
        _check_shape(f"{self.prefix}.{kind}", tensor, (self.rows.full, *parameter.shape[1:]))
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
        self._compressed(shard, "A.weight").load_first(parameter, tensor)

    def load_order(self, parameter: torch.Tensor, tensor: torch.Tensor, shard: str | int | None = None) -> None:
        """Send `A.order` to the member of this shard."""
        self._compressed(shard, "A.order").load_order(torch.empty_like(tensor, dtype=torch.int64), tensor)

    def load_second(self, kind: str, parameter: torch.Tensor, tensor: torch.Tensor, shard: str | int | None = None) -> None:
        """Send `B.weight` or `B.bias` (`kind`) to the member of this shard."""
        part = self._compressed(shard, f"B.{kind}")
        part.load_second(getattr(part.second, kind), tensor)

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


def check_identity_block(prefix: str, spec: GroupSpec, n: int) -> None:
    """Refuse an identity block that leaves nothing of its n inputs."""
    if spec.structure == "identity_block" and spec.rank >= n:
        raise ArtifactError(
            f"{prefix}: an identity block of rank {spec.rank} leaves nothing of {n} inputs. Export the artifact again"
        )


def is_dummy(config: Any) -> bool:
    """Say whether vLLM makes the weights up, so that none will be loaded."""
    return config is not None and config.load_config.load_format == "dummy"


def incomplete(prefix: str, missing: list[str]) -> ArtifactError:
    """Return the error that names the tensors which the checkpoint lacks."""
    return ArtifactError(
        f"{prefix}: missing from the checkpoint: {', '.join(missing)}. "
        "The artifact is incomplete: run lrserve verify on it, or export it again"
    )


def share_of_neurons(prefix: str, neurons: int, ranks: int) -> int:
    """Return how many of an MLP's neurons each of the tensor-parallel ranks has."""
    if neurons % ranks:
        raise ArtifactError(
            f"{prefix}: {neurons} neurons cannot be divided among {ranks} ranks; serve with another tensor_parallel_size, or "
            f"compress with search.rank_step a multiple of {ranks}"
        )
    return neurons // ranks


def rows_of(layer: Any, index: int, size: int) -> Slice:
    """Rows of member `index` that this rank holds: `size` of them."""
    if not isinstance(layer, ColumnParallelLinear):
        return Slice(size, 0, size)
    replicas = layer.num_kv_head_replicas if isinstance(layer, QKVParallelLinear) and index > 0 else 1
    return Slice(size * layer.tp_size // replicas, (layer.tp_rank // replicas) * size, size)
