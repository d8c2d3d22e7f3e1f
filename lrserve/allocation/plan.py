"""Rank plans, and fitting one into a budget by construction.

A plan says for every fused group: a rank, or dense. Its cost may be counted in parameters or in predicted seconds; the fit is
the same. Each group asks for a share of its dense cost; a common scale is found by bisection so that the shares, clamped to
[smallest rank, dense] and rounded down to the rank step, stay within the budget; what is left over goes step by step to the
groups that were rounded down furthest.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lrserve.compression.groups import STRUCTURES, Group, Structure
from lrserve.errors import InfeasibleTargetError, InputError

_FORMAT_VERSION = 2


@dataclass(frozen=True)
class RankPlan:
    """The one representation of a decision: each allocated group's rank by name, None for dense, and the structure.

    With the structure `narrow` the rank of a `down` group is the number of neurons that its MLP keeps (`groups.allocated`).
    """

    ranks: Mapping[str, int | None]
    structure: Structure = "identity_block"

    def factorized(self, groups: Sequence[Group]) -> list[tuple[Group, int]]:
        """List the groups that are not dense, with their ranks, in layer order."""
        return [(group, rank) for group in groups if (rank := self.ranks[group.name]) is not None]

    def parameters(self, groups: Sequence[Group]) -> int:
        """Parameters of the decoder's linears under this plan."""
        return sum(group.parameters(self.ranks[group.name], group.stored_as(self.structure)) for group in groups)

    def ratio(self, groups: Sequence[Group]) -> float:
        """Share of the decoder's linear parameters that the plan removes."""
        return 1 - self.parameters(groups) / sum(group.dense_parameters for group in groups)

    def key(self) -> tuple[tuple[str, int | str | None], ...]:
        """A hashable form, for recognising a plan that was tried before."""
        return (("structure", self.structure), *sorted(self.ranks.items()))

    def write(self, path: Path) -> None:
        """Write plan.json."""
        data = {"format_version": _FORMAT_VERSION, "structure": self.structure, "ranks": dict(self.ranks)}
        path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> RankPlan:
        """Read plan.json.

        Raises:
            InputError: not a plan of this format.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            ranks, structure = data["ranks"], data["structure"]
            if data["format_version"] != _FORMAT_VERSION or structure not in STRUCTURES:
                raise ValueError("unknown version or structure")
            if not all(r is None or (isinstance(r, int) and r > 0) for r in ranks.values()):
                raise ValueError("a rank that is neither null nor a positive integer")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path} is not a rank plan of format version {_FORMAT_VERSION}: {error}") from None
        return cls(ranks=ranks, structure=structure)


class Cost(Protocol):
    """What a group costs at a rank (None: dense). Must not decrease with the rank."""

    def __call__(self, group: Group, rank: int | None) -> float:
        """Return the cost in the budget's unit."""


def parameter_cost(structure: Structure) -> Cost:
    """Count parameters."""
    return lambda group, rank: group.parameters(rank, group.stored_as(structure))


def rank_choices(group: Group, step: int, structure: Structure) -> list[int]:
    """Ranks at which the factors are smaller than the dense linears: multiples of `step` below the break-even rank.

    For a layer so small that not even `step` saves, the list is empty: the group stays dense.
    """
    cost = parameter_cost(structure)
    return [r for r in range(step, group.full_rank + 1, step) if cost(group, r) < group.dense_parameters]


class BudgetFit:
    """Fits share requests of a fixed set of groups into budgets, under one cost (None: parameters)."""

    def __init__(
        self, groups: Sequence[Group], step: int, structure: Structure = "identity_block", cost: Cost | None = None
    ) -> None:
        self.groups = list(groups)
        self.structure: Structure = structure
        cost = cost or parameter_cost(structure)
        self._costs: dict[str, list[tuple[float, int | None]]] = {}
        for group in self.groups:
            dense = cost(group, None)
            levels: list[tuple[float, int | None]] = [
                (value, rank) for rank in rank_choices(group, step, structure) if (value := cost(group, rank)) < dense
            ]
            self._costs[group.name] = [*levels, (dense, None)]
        self.dense_cost = sum(levels[-1][0] for levels in self._costs.values())
        self.smallest_cost = sum(levels[0][0] for levels in self._costs.values())

    def require(self, budget: float) -> None:
        """Raise InfeasibleTargetError unless the smallest ranks everywhere meet the budget."""
        if self.smallest_cost > budget:
            raise InfeasibleTargetError(
                f"the target leaves {budget / self.dense_cost:.1%} of the dense cost, but the smallest ranks need "
                f"{self.smallest_cost / self.dense_cost:.1%}; ask for less compression or lower search.rank_step"
            )

    def levels(self, name: str) -> list[tuple[float, int | None]]:
        """Return the costs and ranks that a group can have, cheapest first; the last is dense."""
        return list(self._costs[name])

    def _levels(self, shares: Mapping[str, float], scale: float) -> dict[str, int]:
        chosen = {}
        for name, levels in self._costs.items():
            asked = shares[name] * scale * levels[-1][0] * (1 + 1e-9)
            chosen[name] = max((i for i, (cost, _) in enumerate(levels) if cost <= asked), default=0)
        return chosen

    def _plan(self, chosen: Mapping[str, int]) -> RankPlan:
        return RankPlan(ranks={name: self._costs[name][index][1] for name, index in chosen.items()}, structure=self.structure)

    def _total(self, chosen: Mapping[str, int]) -> float:
        return sum(self._costs[name][index][0] for name, index in chosen.items())

    def fit(self, shares: Mapping[str, float], budget: float) -> RankPlan:
        """Return the plan that divides `budget` in proportion to shares of each group's dense cost.

        Args:
            shares: positive, one per group name; only their proportions matter.
            budget: in the unit of the cost.

        Raises:
            InfeasibleTargetError: not even the smallest ranks everywhere meet the budget.
        """
        self.require(budget)
        low, high = 0.0, 1.0 / min(shares.values())
        for _ in range(60):
            middle = (low + high) / 2
            if self._total(self._levels(shares, middle)) <= budget:
                low = middle
            else:
                high = middle
        chosen = self._levels(shares, low)
        spent = self._total(chosen)
        while True:
            best: tuple[float, str] | None = None
            for name, index in chosen.items():
                levels = self._costs[name]
                if index + 1 == len(levels) or spent + levels[index + 1][0] - levels[index][0] > budget:
                    continue
                deficit = shares[name] * low - levels[index][0] / levels[-1][0]
                if best is None or deficit > best[0]:
                    best = (deficit, name)
            if best is None:
                break
            levels = self._costs[best[1]]
            spent += levels[chosen[best[1]] + 1][0] - levels[chosen[best[1]]][0]
            chosen[best[1]] += 1
        return self._plan(chosen)

    def cheapest_loss(self, losses: Mapping[str, Sequence[float]], budget: float) -> RankPlan:
        """Return the plan of least additive loss within the budget, by Lagrangian relaxation over the levels' convex hull.

        Args:
            losses: for each group name the loss at every rank 0..k; dense loses nothing.
            budget: in the unit of the cost.

        Raises:
            InfeasibleTargetError: as `fit`.
        """
        points = {
            name: [(cost, 0.0 if rank is None else float(losses[name][rank])) for cost, rank in levels]
            for name, levels in self._costs.items()
        }

        def choose(price: float) -> dict[str, int]:
            return {
                name: min(range(len(levels)), key=lambda i: (levels[i][1] + price * levels[i][0], levels[i][0]))
                for name, levels in points.items()
            }

        self.fit(dict.fromkeys(points, 1.0), budget)  # raises if infeasible
        low, high = 0.0, 1.0
        while self._total(choose(high)) > budget:
            high *= 4
            if high > 1e30:
                return self.fit(dict.fromkeys(points, 1.0), budget)
        for _ in range(100):
            middle = (low + high) / 2
            if self._total(choose(middle)) > budget:
                low = middle
            else:
                high = middle
        chosen = choose(high)
        spent = self._total(chosen)
        while True:  # spend what the hull's jumps left over where it buys most
            best: tuple[float, str, int] | None = None
            for name, index in chosen.items():
                for upper in range(index + 1, len(points[name])):
                    extra = points[name][upper][0] - points[name][index][0]
                    gain = points[name][index][1] - points[name][upper][1]
                    value = gain / extra if extra > 0 else math.inf
                    if spent + extra <= budget and gain > 0 and (best is None or value > best[0]):
                        best = (value, name, upper)
            if best is None:
                break
            _, name, upper = best
            spent += points[name][upper][0] - points[name][chosen[name]][0]
            chosen[name] = upper
        return self._plan(chosen)
