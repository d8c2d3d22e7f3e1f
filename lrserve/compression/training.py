"""Factors as trainable parameters, for what improves them after the closed form: `refine` and `recover`.

The dense model stays in its own dtype and is frozen; in the place of each factorized group's linears stand layers that multiply by
A (r, n) and by rows of B (m, r), both kept and updated in float32 and rounded to the activations' dtype for each product. Training
two factors is training the map: afterwards they are stored in whatever structure the plan names (`structured`). Where an MLP
loses neurons the linears before it give only those that are left.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from lrserve.compression.factorize import Factors, FactorSource
from lrserve.compression.groups import Group
from lrserve.compression.lowrank import keep_outputs
from lrserve.compression.structure import structured


class TrainableGroup(nn.Module):
    """One group's factors in float32: A (r, n), B (m, r), b (m,). An A that only picks inputs stays: `picked`, they come alone."""

    def __init__(self, factors: Factors, device: torch.device | str, *, picked: bool = False) -> None:
        super().__init__()
        self.picked = picked
        self.A = nn.Parameter(factors.A.to(device, torch.float32, copy=True), requires_grad=not picked)
        self.B = nn.Parameter(factors.B.to(device, torch.float32, copy=True))
        self.b = nn.Parameter(factors.b.to(device, torch.float32, copy=True))
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None

    def first(self, x: torch.Tensor) -> torch.Tensor:
        """Return z = A x, (..., r); the members of a group, called one after the other, share it."""
        if self.picked:
            return x
        if self._last is None or self._last[0] is not x:
            self._last = x, nn.functional.linear(x, self.A.to(x.dtype))
        return self._last[1]

    def forget(self) -> None:
        """Let go of the last input: A may change before it comes again."""
        self._last = None

    def factors(self) -> Factors:
        """Return the present values, on the CPU."""
        return Factors(*(parameter.detach().cpu().clone() for parameter in (self.A, self.B, self.b)))


class _Member(nn.Module):
    """One linear of a group: the rows from `start` to `stop` of its B and b."""

    def __init__(self, group: TrainableGroup, start: int, stop: int, last: bool) -> None:
        super().__init__()
        self.group, self.rows, self.last = group, slice(start, stop), last

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, b = self.group.B[self.rows].to(x.dtype), self.group.b[self.rows].to(x.dtype)
        y = nn.functional.linear(self.group.first(x), B, b)
        if self.last:
            self.group.forget()
        return y


def install_trainable(model: Any, ranks: Iterable[tuple[Group, int]], source: FactorSource) -> dict[str, TrainableGroup]:
    """Freeze a dense model, put trainable factors in the place of its factorized groups, and return them by group name.

    They start with orthonormal rows of A, whatever coordinates the source's come in: one learning rate then fits all.
    """
    model.requires_grad_(False)
    trainable = {}
    for group, rank in ranks:
        device = model.get_submodule(group.members[0]).weight.device
        factors = orthonormal(group, source.cut(group.name, rank))
        layer = TrainableGroup(factors, device, picked=group.fed_by is not None)
        if group.fed_by:
            keep_outputs(model, group.fed_by, factors.A.argmax(dim=1))
        start = 0
        for member, rows in zip(group.members, group.out_features, strict=True):
            parent, _, leaf = member.rpartition(".")
            setattr(model.get_submodule(parent), leaf, _Member(layer, start, start + rows, start + rows == group.m))
            start += rows
        trainable[group.name] = layer
    return trainable


def orthonormal(group: Group, factors: Factors) -> Factors:
    """Return two factors with orthonormal rows of A, float64; ones and zeros where a group reads fewer inputs."""
    if not group.fed_by:
        return structured(factors, "low_rank")
    narrow = structured(factors, "narrow_in")
    assert narrow.order is not None
    A = nn.functional.one_hot(narrow.order.long(), factors.A.shape[1]).to(narrow.B)
    return Factors(A=A, B=narrow.B, b=narrow.b)


class TrainedFactors:
    """Factors by group name, of one plan: what an improvement leaves. A `FactorSource` for exactly that plan."""

    def __init__(self, factors: Mapping[str, Factors]) -> None:
        self._factors = dict(factors)

    def cut(self, name: str, rank: int) -> Factors:
        """Return the group's factors.

        Raises:
            ValueError: another rank than they have.
        """
        factors = self._factors[name]
        if factors.rank != rank:
            raise ValueError(f"{name}: the improved factors have rank {factors.rank}, not {rank}")
        return factors

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return every tensor by a unique name, for a safetensors file."""
        return {f"{name}.{field}": getattr(f, field).contiguous() for name, f in self._factors.items() for field in ("A", "B", "b")}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> TrainedFactors:
        """Read back what `tensors` gave."""
        names = [name.removesuffix(".A") for name in tensors if name.endswith(".A")]
        return cls({name: Factors(*(tensors[f"{name}.{field}"] for field in ("A", "B", "b"))) for name in names})
