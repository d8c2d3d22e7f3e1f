"""Factors as trainable parameters, for what improves them after the closed form: `refine` and `recover`.

The dense model stays in its own dtype and is frozen; in the place of each factorized group's linears stand layers that multiply by
A (r, n) and by rows of B (m, r), both kept and updated in float32 and rounded to the activations' dtype for each multiplication.
Training two factors is training the map: afterwards they are stored in whatever structure the plan names (`structured`). Where an
MLP loses neurons the linears before it give only those that are left, and their rows learn as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lrserve.compression.experts import ExpertSource, KeptExperts
from lrserve.compression.factorize import Factors, FactorSource
from lrserve.compression.groups import Group, Mixture
from lrserve.compression.level import Level
from lrserve.compression.lowrank import keep_outputs
from lrserve.compression.sharding import whole
from lrserve.compression.spectra import stacked_weight
from lrserve.compression.structure import structured

TRAINED = 3
"""Version of what training writes, in the names of work stages: 2 has the rows that feed an MLP with fewer neurons, 3 their numbers
instead of a matrix that picks them."""
_FIELDS = ("A", "B", "b", "order", "feeding")  # of trained factors; the last two where an MLP has fewer neurons


class TrainableGroup(nn.Module):
    """One group's factors in float32: A (r, n), B (m, r), b (m,).

    With an `order` (r,), of a group that reads fewer inputs, those inputs come alone: A is empty, and `feeding` (members r, d),
    the rows that give them, is trained.
    """

    order: torch.Tensor | None

    def __init__(self, factors: Factors, device: torch.device | str) -> None:
        super().__init__()

        def parameter(value: torch.Tensor, trained: bool = True) -> nn.Parameter:
            return nn.Parameter(value.to(device, torch.float32, copy=True), requires_grad=trained)

        self.register_buffer("order", None if factors.order is None else factors.order.to(device))
        self.A = parameter(factors.A, self.order is None)
        self.B = parameter(factors.B)
        self.b = parameter(factors.b)
        self.feeding = None if factors.feeding is None else parameter(factors.feeding)
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None

    def first(self, x: torch.Tensor) -> torch.Tensor:
        """Return z = A x, (..., r); the members of a group, called one after the other, share it."""
        if self.order is not None:
            return x
        if self._last is None or self._last[0] is not x:
            self._last = x, nn.functional.linear(x, self.A.to(x.dtype))
        return self._last[1]

    def forget(self) -> None:
        """Let go of the last input: A may change before it comes again."""
        self._last = None

    def factors(self) -> Factors:
        """Return the present values, on the CPU; a collective operation if they are divided among processes."""
        return Factors(**{name: whole(tensor).cpu().clone() for name, tensor in self.state_dict().items()})


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


class _Feeding(nn.Module):
    """One of the linears that give a group's inputs: the rows from `start` to `stop` of its `feeding`, and a bias that stays."""

    def __init__(self, group: TrainableGroup, start: int, stop: int, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.group, self.rows, self.bias = group, slice(start, stop), bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.group.feeding is not None
        return nn.functional.linear(x, self.group.feeding[self.rows].to(x.dtype), self.bias)


def install_trainable(model: Any, ranks: Iterable[tuple[Group, int]], source: FactorSource) -> dict[str, TrainableGroup]:
    """Freeze a dense model, put trainable factors in the place of its factorized groups, and return them by group name.

    They start with orthonormal rows of A, where they have any, whatever coordinates the source's come in: one learning rate then
    fits all.
    """
    model.requires_grad_(False)
    trainable = {}
    for group, rank in ranks:
        device = model.get_submodule(group.members[0]).weight.device
        factors = orthonormal(group, source.cut(group.name, rank))
        if group.fed_by and factors.order is not None:
            keep_outputs(model, group.fed_by, factors.order)
            if factors.feeding is None:
                factors = replace(factors, feeding=stacked_weight(model, group.fed_by)[0])
        layer = TrainableGroup(factors, device)
        rows = group.fed_by.stacked * rank if group.fed_by else 0
        for index, member in enumerate(group.fed_by.members if group.fed_by else ()):
            bias = model.get_submodule(member).bias
            model.set_submodule(member, _Feeding(layer, index * rows, (index + 1) * rows, bias))
        start = 0
        for member, rows in zip(group.members, group.out_features, strict=True):
            parent, _, leaf = member.rpartition(".")
            setattr(model.get_submodule(parent), leaf, _Member(layer, start, start + rows, start + rows == group.m))
            start += rows
        trainable[group.name] = layer
    return trainable


def orthonormal(group: Group, factors: Factors) -> Factors:
    """Return two factors with orthonormal rows of A, or those of a group that reads fewer inputs, float64."""
    return structured(factors, "narrow_in" if group.fed_by else "low_rank")


class TrainedFactors:
    """Factors by group name, of one plan: what an improvement leaves. A `FactorSource` for exactly that plan."""

    def __init__(self, factors: Mapping[str, Factors]) -> None:
        self._factors = dict(factors)
        self._experts: ExpertSource | None = None

    def beside(self, experts: ExpertSource) -> TrainedFactors:
        """Return these factors, with the mixtures' experts of another source: no improvement changes those."""
        found = TrainedFactors(self._factors)
        found._experts = experts
        return found

    def kept(self, mixture: Mixture, level: Level) -> KeptExperts:
        """Return what a mixture keeps at a level.

        Raises:
            ValueError: these factors are not `beside` experts.
        """
        if self._experts is None:
            raise ValueError(f"{mixture.name}: the improved factors have no experts")
        return self._experts.kept(mixture, level)

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
        return {
            f"{name}.{field}": tensor.contiguous()
            for name, factors in self._factors.items()
            for field in _FIELDS
            if (tensor := getattr(factors, field)) is not None
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> TrainedFactors:
        """Read back what `tensors` gave."""
        names = [name.removesuffix(".A") for name in tensors if name.endswith(".A")]
        return cls({name: Factors(**{f: tensors[f"{name}.{f}"] for f in _FIELDS if f"{name}.{f}" in tensors}) for name in names})
