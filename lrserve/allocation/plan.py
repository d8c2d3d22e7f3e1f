"""Plans, and fitting one into a budget by construction.

A plan says for every unit (`groups.allocated`) its level: how much of it stays, how its weights are rounded, and the rank of what
is added to make up for that. Its cost may be counted in parameters, in bytes or in predicted seconds; the fit is the same.

Where each unit asks for a share of its dense cost, a common scale is found by bisection so that the shares, clamped to
[smallest rank, dense] and rounded down to the rank step, stay within the budget; what is left over goes step by step to the units
that were rounded down furthest. Where each level has a loss, the sum of the losses is minimised.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Protocol

from lrserve.compression.groups import STRUCTURES, Group, Mixture, Structure
from lrserve.compression.level import DENSE, PRECISIONS, SCHEMES, Level, Precision
from lrserve.errors import InfeasibleTargetError, InputError

_FORMAT_VERSION = 3


@dataclass(frozen=True)
class Plan:
    """The one representation of a decision: each unit's level by name, and the structure of those that are not dense.

    With the structure `narrow` the rank of a `down` unit is the number of neurons that its MLP keeps (`groups.allocated`), and with
    every structure that of a mixture the number of neurons that its experts keep together (`groups.Mixture`).
    `embedding` is what the embedding and the output layer are rounded to.
    """

    levels: Mapping[str, Level]
    structure: Structure = "identity_block"
    embedding: Precision | None = None

    @classmethod
    def of_ranks(cls, ranks: Mapping[str, int | None], structure: Structure = "identity_block") -> Plan:
        """Return the plan of these ranks in which nothing is rounded."""
        return cls({name: Level(rank) for name, rank in ranks.items()}, structure)

    @property
    def ranks(self) -> dict[str, int | None]:
        """Each unit's rank; None where its structure is dense."""
        return {name: level.rank for name, level in self.levels.items()}

    def changed(self, units: Sequence[Group]) -> list[tuple[Group, Level]]:
        """List the units that are not left as they are, with their levels, in layer order."""
        return [(unit, level) for unit in units if (level := self.levels[unit.name]) != DENSE]

    def parameters(self, units: Sequence[Group]) -> int:
        """Parameters of the decoder's linears under this plan; those of residuals are not counted."""
        return sum(unit.parameters(self.levels[unit.name].rank, unit.stored_as(self.structure)) for unit in units)

    def ratio(self, units: Sequence[Group]) -> float:
        """Share of the decoder's linear parameters that the plan removes."""
        return 1 - self.parameters(units) / sum(unit.dense_parameters for unit in units)

    def byte_share(self, units: Sequence[Group], itemsize: int) -> float:
        """Bytes of the decoder's linears over those of the dense model, whose values have `itemsize` bytes."""
        cost = byte_cost(self.structure, itemsize)
        return sum(cost(unit, self.levels[unit.name]) for unit in units) / sum(cost(unit, DENSE) for unit in units)

    def key(self) -> tuple[tuple[str, str], ...]:
        """A hashable form, for recognising a plan that was tried before."""
        common = [("structure", self.structure), *([("embedding", self.embedding)] if self.embedding else [])]
        return (*common, *sorted((name, str(level)) for name, level in self.levels.items()))

    def to_json(self) -> dict[str, dict[str, object]]:
        """Return the levels' JSON form."""
        return {name: level.to_json() for name, level in self.levels.items()}

    @classmethod
    def from_json(
        cls, levels: Mapping[str, Mapping[str, object]], structure: Structure, embedding: Precision | None = None
    ) -> Plan:
        """Read what `to_json` gave.

        Raises:
            ValueError: a level that is none, or an unknown precision.
        """
        if embedding not in (None, *PRECISIONS):
            raise ValueError(f"unknown precision {embedding!r} of the embedding")
        return cls({name: Level.from_json(level) for name, level in levels.items()}, structure, embedding)

    def write(self, path: Path) -> None:
        """Write plan.json."""
        data: dict[str, object] = {"format_version": _FORMAT_VERSION, "structure": self.structure}
        data |= {"embedding": self.embedding} if self.embedding else {}
        data["levels"] = self.to_json()
        path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Plan:
        """Read plan.json; format version 2 had ranks alone.

        Raises:
            InputError: not a plan of these formats.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            version, structure = data["format_version"], data["structure"]
            if version not in (2, _FORMAT_VERSION) or structure not in STRUCTURES:
                raise ValueError("unknown version or structure")
            levels = {n: {"rank": r} for n, r in data["ranks"].items()} if version == 2 else data["levels"]
            return cls.from_json(levels, structure, data.get("embedding"))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path} is not a plan of format version {_FORMAT_VERSION}: {error}") from None


class Cost(Protocol):
    """What a unit costs at a level. Must not decrease with the rank."""

    def __call__(self, group: Group, level: Level) -> float:
        """Return the cost in the budget's unit."""


def parameter_cost(structure: Structure) -> Cost:
    """Count parameters."""
    return lambda group, level: group.parameters(level.rank, group.stored_as(structure))


def byte_cost(structure: Structure, itemsize: int) -> Cost:
    """Count the bytes that are stored, of values of `itemsize` bytes where they are not rounded."""
    return lambda group, level: group.stored_bytes(level, group.stored_as(structure), itemsize)


def rank_choices(group: Group, step: int, structure: Structure) -> list[int]:
    """Return the ranks, or numbers of neurons, at which a group is smaller than the dense linears.

    They are multiples of `step` below the break-even rank.
    For a layer so small that not even `step` saves, the list is empty: the group stays dense.
    """
    stored = group.stored_as(structure)
    return [r for r in range(step, group.full_rank + 1, step) if group.parameters(r, stored) < group.dense_parameters]


@dataclass(frozen=True)
class Offers:
    """Which levels units may have: multiples of `step` as ranks, these precisions, and residuals of these ranks.

    `width_step`: of which numbers of neurons are multiples; None is `step`.
    Weights of fewer than 8 bits alone have residuals. Factors are rounded to 8 bits only, and have none. `embedding`: of all plans.
    `dense`: the names of units that are left as they are.
    """

    step: int
    structure: Structure = "identity_block"
    precisions: tuple[Precision, ...] = ()
    residuals: tuple[int, ...] = ()
    embedding: Precision | None = None
    dense: frozenset[str] = frozenset()
    width_step: int | None = None

    def levels(self, group: Group) -> list[Level]:
        """List the levels of one unit, dense last."""
        if group.name in self.dense:
            return [DENSE]
        if isinstance(group, Mixture):
            return [*group.levels(self.width_step or self.step), DENSE]
        step = self.width_step or self.step if group.stored_as(self.structure) == "narrow_in" else self.step
        ranks: list[int | None] = [*rank_choices(group, step, self.structure), None]
        levels = [
            Level(rank, weights, residual)
            for weights in self.precisions
            for rank in ranks
            if group.can_round(rank, weights, group.stored_as(self.structure))
            for residual in ((0, *self.residuals) if SCHEMES[weights].bits < 8 else (0,))
        ]
        return [*levels, *map(Level, ranks)]


class BudgetFit:
    """Fits plans of a fixed set of units into budgets, under one cost (None: parameters)."""

    def __init__(self, groups: Sequence[Group], offers: Offers, cost: Cost | None = None) -> None:
        self.groups, self.structure, self.embedding = list(groups), offers.structure, offers.embedding
        cost = cost or parameter_cost(offers.structure)
        self._levels: dict[str, list[tuple[float, Level]]] = {}
        self._by_rank: dict[str, dict[Precision | None, list[tuple[float, Level]]]] = {}
        for group in self.groups:
            found = [(cost(group, level), level) for level in offers.levels(group)]
            self._levels[group.name] = found
            self._by_rank[group.name] = {w: _ascending(found, w) for w in (None, *offers.precisions)}
        self.dense_cost = sum(levels[-1][0] for levels in self._levels.values())
        self.smallest_cost = sum(min(value for value, _ in levels) for levels in self._levels.values())

    def require(self, budget: float) -> None:
        """Raise InfeasibleTargetError unless the cheapest levels everywhere meet the budget."""
        self._require(self.smallest_cost, budget)

    def _require(self, smallest: float, budget: float) -> None:
        if smallest > budget:
            raise InfeasibleTargetError(
                f"the target leaves {budget / self.dense_cost:.1%} of the dense cost, but the smallest levels need "
                f"{smallest / self.dense_cost:.1%}; ask for less compression, or lower search.rank_step and search.width_step"
            )

    def levels(self, name: str) -> list[tuple[float, Level]]:
        """Return the costs of the levels that a unit can have; the last is dense."""
        return list(self._levels[name])

    def unrounded(self, name: str) -> list[tuple[float, int | None]]:
        """Return the costs and ranks of the levels at which nothing is rounded, cheapest first; the last is dense."""
        return [(cost, level.rank) for cost, level in self._by_rank[name][None]]

    def cost(self, plan: Plan) -> float:
        """Return what a plan of these levels costs."""
        return sum(next(c for c, level in self._levels[name] if level == chosen) for name, chosen in plan.levels.items())

    def cheapest(self) -> Plan:
        """Return the plan of the cheapest levels."""
        return self._plan({name: min(levels, key=lambda found: found[0])[1] for name, levels in self._levels.items()})

    def _plan(self, levels: Mapping[str, Level]) -> Plan:
        return Plan(dict(levels), self.structure, self.embedding)

    def fit(self, shares: Mapping[str, float], budget: float, weights: Mapping[str, Precision | None] | None = None) -> Plan:
        """Return the plan that divides `budget` in proportion to shares of each unit's dense cost.

        Args:
            shares: positive, one per unit; only their proportions matter.
            budget: in the unit of the cost.
            weights: what each unit is rounded to, where it can be; None rounds nothing. There are no residuals.

        Raises:
            InfeasibleTargetError: not even the smallest ranks everywhere meet the budget.
        """
        wanted = weights or {}
        table = {name: of.get(wanted.get(name)) or of[None] for name, of in self._by_rank.items()}
        self._require(sum(levels[0][0] for levels in table.values()), budget)

        def at(scale: float) -> dict[str, int]:
            chosen = {}
            for name, levels in table.items():
                asked = shares[name] * scale * levels[-1][0] * (1 + 1e-9)
                chosen[name] = max((i for i, (cost, _) in enumerate(levels) if cost <= asked), default=0)
            return chosen

        def total(chosen: Mapping[str, int]) -> float:
            return sum(table[name][index][0] for name, index in chosen.items())

        low, high = 0.0, 1.0 / min(shares.values())
        for _ in range(60):
            middle = (low + high) / 2
            if total(at(middle)) <= budget:
                low = middle
            else:
                high = middle
        chosen = at(low)
        spent = total(chosen)
        while True:
            best: tuple[float, str] | None = None
            for name, index in chosen.items():
                levels = table[name]
                if index + 1 == len(levels) or spent + levels[index + 1][0] - levels[index][0] > budget:
                    continue
                deficit = shares[name] * low - levels[index][0] / levels[-1][0]
                if best is None or deficit > best[0]:
                    best = (deficit, name)
            if best is None:
                break
            levels = table[best[1]]
            spent += levels[chosen[best[1]] + 1][0] - levels[chosen[best[1]]][0]
            chosen[best[1]] += 1
        return self._plan({name: table[name][index][1] for name, index in chosen.items()})

    def cheapest_loss(
        self,
        losses: Mapping[str, Mapping[Level, float]],
        budget: float,
        offered: Callable[[str, Level], bool] = lambda name, level: True,
    ) -> Plan:
        """Return the plan of least additive loss within the budget: a multiple-choice knapsack, by its Lagrangian relaxation.

        Along the lower convex hull of each unit's levels, the steps that save most loss for their cost are taken first; what is
        left over then goes to whatever step saves most for what it costs (Kellerer et al., Knapsack Problems, 2004, section 11.2).

        Args:
            losses: for each unit the loss of every level; a dense unit loses nothing.
            budget: in the unit of the cost.
            offered: which levels may be chosen, by the unit's name; those that are cheapest may be anyway, if nothing else fits.

        Raises:
            InfeasibleTargetError: as `require`.
        """
        self.require(budget)
        fronts = {name: self._front(name, losses[name], offered) for name in self._levels}
        if sum(front[0][0] for front in fronts.values()) > budget:
            fronts = {name: self._front(name, losses[name], lambda name, level: True) for name in self._levels}
        chosen = dict.fromkeys(fronts, 0)
        spent = sum(front[0][0] for front in fronts.values())
        steps = []
        for name, front in fronts.items():
            corners = _hull(front)
            steps += [(_rate(front[a], front[b]), name, a, b) for a, b in pairwise(corners)]
        for _, name, before, after in sorted(steps, key=lambda step: (-step[0], step[1], step[2])):
            extra = fronts[name][after][0] - fronts[name][before][0]
            if chosen[name] == before and spent + extra <= budget:
                chosen[name] = after
                spent += extra
        while True:  # spend what the hull's steps left over where it buys most
            best: tuple[float, str, int] | None = None
            for name, index in chosen.items():
                front = fronts[name]
                for upper in range(index + 1, len(front)):
                    if spent + front[upper][0] - front[index][0] > budget:
                        break
                    rate = _rate(front[index], front[upper])
                    if best is None or rate > best[0]:
                        best = rate, name, upper
            if best is None:
                break
            _, name, upper = best
            spent += fronts[name][upper][0] - fronts[name][chosen[name]][0]
            chosen[name] = upper
        return self._plan({name: fronts[name][index][2] for name, index in chosen.items()})

    def _front(
        self, name: str, losses: Mapping[Level, float], offered: Callable[[str, Level], bool]
    ) -> list[tuple[float, float, Level]]:
        """Return the cost, loss and level of those of a unit's levels that no other beats in both, cheapest first."""
        found = [(cost, losses[level], level) for cost, level in self._levels[name] if offered(name, level)]
        front: list[tuple[float, float, Level]] = []
        for cost, loss, level in sorted(found, key=lambda point: point[:2]):
            if not front or loss < front[-1][1]:
                front.append((cost, loss, level))
        return front


def _ascending(levels: Sequence[tuple[float, Level]], weights: Precision | None) -> list[tuple[float, Level]]:
    """Return the levels of one precision without residuals whose cost is below that of the dense structure's, and that one.

    Those of a mixture, which come in two ways, are in the order of their costs.
    """
    own = [(cost, level) for cost, level in levels if level.weights == weights and not level.residual]
    dense = [cost for cost, level in own if level.rank is None]
    found = [(cost, level) for cost, level in own if level.rank is None or cost < min(dense, default=math.inf)]
    return sorted(found, key=lambda pair: pair[0]) if any(level.experts for _, level in found) else found


def _rate(cheaper: tuple[float, float, Level], dearer: tuple[float, float, Level]) -> float:
    """Return the loss that is saved for one unit of cost."""
    return (cheaper[1] - dearer[1]) / max(dearer[0] - cheaper[0], 1e-300)


def _hull(front: Sequence[tuple[float, float, Level]]) -> list[int]:
    """Return the corners of the lower convex hull of points whose cost grows and whose loss falls."""
    corners: list[int] = []
    for index in range(len(front)):
        while len(corners) > 1 and _rate(front[corners[-2]], front[corners[-1]]) <= _rate(front[corners[-1]], front[index]):
            corners.pop()
        corners.append(index)
    return corners
