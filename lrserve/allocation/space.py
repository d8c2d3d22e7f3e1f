"""The space that the Optuna study searches: how suggested numbers become a plan.

A trial suggests how to divide a budget: a base allocator and, for each unit kind in each run of layers, a multiplier and what may
be done to its weights: anything, no rounding, or one precision. For the allocators that minimise an additive loss the multipliers
scale what a cell's losses count, and the loss is minimised again; for `uniform` they scale its share. Either way the plan meets the
budget by construction. What the user fixed decides the budget:

    target                   budget
    ratio                    parameters
    max_bytes                bytes
    min_speedup              predicted time; the trial also suggests how far beyond the asked speedup to go
    max_ppl_increase, none   predicted time; the trial also suggests the speedup, up to where the best guess of the losses
                             is a quarter beyond the limit of the perplexity, or of the front (`goal.FRONT_LIMIT`)

Where the budget counts parameters or bytes, the losses add what the objective says of time: w times the predicted share of the
dense run that a unit takes more at a level than dense, or less. So levels that are slower than dense have to be worth it. The first
trials are the allocators themselves, the best guess at several speedups where none is fixed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import optuna

from lrserve.allocation.goal import limit_of
from lrserve.allocation.losses import Losses
from lrserve.allocation.plan import BudgetFit, Offers, Plan, byte_cost
from lrserve.allocation.speed import SpeedModel
from lrserve.compression.groups import Group
from lrserve.compression.level import DENSE, Level
from lrserve.errors import InfeasibleTargetError
from lrserve.recipe import Search, Target

_MULTIPLIER = (0.5, 2.0)
_SPEED_MARGIN = (1.0, 1.25)
_FIRST_MARGIN = 1.02
_BISECTIONS = 20
_LEAST = 1e-3  # so that there is something to suggest
_BEYOND = 1.25  # times the limit: losses do not quite add up
_SLOWEST = 1 / 12  # part of the largest log(speedup) below which a plan is as good as dense
_FIRST = {"front": (1 / 2, 1 / 6, 1 / 3, 2 / 3, 5 / 6, 1), "limit": (1 / 2, 1 / 4, 3 / 4)}
"""Parts of the largest log(speedup) at which the best guess is tried first; the other bases are tried at the first of them."""
UNIFORM = "uniform"
ANY, UNROUNDED = "any", "unrounded"
"""What a trial may offer a cell, besides the name of one precision."""


class SearchSpace:
    """Turns suggested parameters into a plan that meets the budget."""

    def __init__(
        self,
        groups: Sequence[Group],
        target: Target,
        search: Search,
        losses: Mapping[str, Losses],
        speed: SpeedModel,
        offers: Offers,
        itemsize: int = 2,
    ) -> None:
        """Check at once that the target can be met.

        `losses` are the additive losses to minimise, by the name of the base allocator that they make; `uniform` comes besides.
        `itemsize` are the bytes of a value that is not rounded.

        Raises:
            InfeasibleTargetError: the cheapest levels everywhere do not meet the target.
        """
        self._groups = list(groups)
        self._target = target
        self.bases = (*losses, UNIFORM)
        self._speed = speed
        size = byte_cost(offers.structure, itemsize) if target.max_bytes else None
        self._timed = not target.sized
        self.fit = BudgetFit(groups, offers, speed.cost if self._timed else size)
        self._losses = losses
        self._time_losses = {group.name: self._time_as_loss(group, search.speed_weight) for group in groups}
        self._offers = (ANY, UNROUNDED, *offers.precisions) if offers.precisions else ()
        self._kinds = list(dict.fromkeys(group.kind for group in groups))
        layers = max(group.layer for group in groups) + 1
        self._runs = min(search.depth_groups, layers)
        self._cell_of = {group.name: (group.kind, group.layer * self._runs // layers) for group in groups}
        if target.min_speedup and self.fit.smallest_cost > speed.budget(target.min_speedup):
            raise InfeasibleTargetError(
                f"min-speedup {target.min_speedup:g} is out of reach: with every unit at its fastest level, "
                f"{speed.speedup(self.fit.cheapest()):.2f}x is predicted for these workloads; ask for less, or for more requests "
                "at once"
            )
        if not self._timed:
            self.fit.require(self.budget())
        elif not target.min_speedup:
            self._fastest = self._fastest_within(_BEYOND * limit_of(target))

    def _time_as_loss(self, group: Group, weight: float) -> dict[Level, float]:
        """Return the relative time that a unit takes at each level beyond dense, weighted; nothing where the budget counts it."""
        dense = self._speed.cost(group, DENSE)
        levels = [level for _, level in self.fit.levels(group.name)]
        return {level: 0.0 if self._timed else weight * (self._speed.cost(group, level) - dense) for level in levels}

    def _fastest_within(self, loss: float) -> float:
        """Return the largest predicted speedup that the best guess's losses, in nats, allow."""
        losses = self._losses[self.bases[0]]

        def lost(speedup: float) -> float:
            plan = self.fit.cheapest_loss(losses, max(self._speed.budget(speedup), self.fit.smallest_cost))
            return sum(losses[name][level] for name, level in plan.levels.items())

        low, high = 1.0, self._speed.speedup(self.fit.cheapest())
        if high <= low:
            raise InfeasibleTargetError(
                f"with every unit at its fastest level, {high:.2f}x of dense is predicted for these workloads: compression makes "
                "this model slower here; give more requests at once, or ask for a --ratio or --max-bytes"
            )
        for _ in range(_BISECTIONS):
            middle = math.sqrt(low * high)
            if lost(middle) <= loss:
                low = middle
            else:
                high = middle
        return max(low, 1 + _LEAST)

    def first_trials(self) -> dict[str, dict[str, Any]]:
        """Return the parameters of the base plans themselves, by their names."""
        cells: dict[str, Any] = {}
        for cell in self._cells():
            cells[_multiplier(*cell)] = 1.0
            cells |= {_offer(*cell): ANY} if self._offers else {}
        rows: dict[str, dict[str, Any]] = {base: {"base": base, **cells} for base in self.bases}
        if not self._timed:
            return rows
        if self._target.min_speedup:
            return {base: {**row, "speedup": self._target.min_speedup * _FIRST_MARGIN} for base, row in rows.items()}
        parts = _FIRST["front" if self._target.front else "limit"]
        speedups = [math.exp(part * math.log(self._fastest)) for part in parts]
        pairs = [(self.bases[0], speedup) for speedup in speedups] + [(base, speedups[0]) for base in self.bases[1:]]
        return {f"{base} {speedup:.3f}x": {**rows[base], "speedup": speedup} for base, speedup in pairs}

    def holds(self, plan: Plan) -> bool:
        """Whether a plan of another space with these inputs is made of what this one offers."""
        offered = {name: {level for _, level in self.fit.levels(name)} for name in self._cell_of}
        return plan.embedding == self.fit.embedding and all(plan.levels[name] in levels for name, levels in offered.items())

    def budget(self) -> float:
        """Parameters or bytes that a plan may have, under a target that counts them."""
        kept = 1 - self._target.ratio if self._target.ratio else (self._target.max_bytes or 1.0)
        return kept * self.fit.dense_cost

    def _cells(self) -> list[tuple[str, int]]:
        return [(kind, run) for kind in self._kinds for run in range(self._runs)]

    def suggest(self, trial: optuna.Trial) -> Plan:
        """Suggest a plan."""
        base = trial.suggest_categorical("base", self.bases)
        cells = self._cells()
        multipliers = {cell: trial.suggest_float(_multiplier(*cell), *_MULTIPLIER, log=True) for cell in cells}
        offers = {cell: trial.suggest_categorical(_offer(*cell), self._offers) if self._offers else ANY for cell in cells}
        if not self._timed:
            budget = self.budget()
        else:
            asked = self._target.min_speedup
            low, high = (asked * _SPEED_MARGIN[0], asked * _SPEED_MARGIN[1]) if asked else (self._fastest**_SLOWEST, self._fastest)
            # the fastest plans may lie inside the margin: what is asked beyond them is cut back
            budget = max(self._speed.budget(trial.suggest_float("speedup", low, high)), self.fit.smallest_cost)
        scales = {name: multipliers[cell] for name, cell in self._cell_of.items()}
        offered = {name: self._offer_to(name, offers[cell]) for name, cell in self._cell_of.items()}
        if base == UNIFORM and (found := self._uniform(scales, offered, budget)) is not None:
            return found
        losses = self._losses[self.bases[0] if base == UNIFORM else base]
        scaled = {
            name: {level: losses[name][level] * scales[name] + extra for level, extra in own.items()}
            for name, own in self._time_losses.items()
        }
        return self.fit.cheapest_loss(scaled, budget, lambda name, level: _allows(offered[name], level))

    def _offer_to(self, name: str, offer: str) -> str:
        """Return what a cell's offer is to one of its units: no rounding, where the unit cannot have that precision."""
        can = any(_allows(offer, level) for _, level in self.fit.levels(name))
        return offer if can else UNROUNDED

    def _uniform(self, shares: Mapping[str, float], offered: Mapping[str, str], budget: float) -> Plan | None:
        """Return the plan of these shares, in the precisions offered or, if that is too dear, in the first one that is not."""
        cells: dict[str, Any] = {name: None if offer in (ANY, UNROUNDED) else offer for name, offer in offered.items()}
        for weights in [cells, *(dict.fromkeys(shares, precision) for precision in self._offers[2:])]:
            try:
                return self.fit.fit(shares, budget, weights)
            except InfeasibleTargetError:
                continue
        return None


def _multiplier(kind: str, run: int) -> str:
    return f"{kind}.{run}"


def _offer(kind: str, run: int) -> str:
    return f"{kind}.{run}.weights"


def _allows(offer: str, level: Level) -> bool:
    return offer == ANY or (level.weights or UNROUNDED) == offer
