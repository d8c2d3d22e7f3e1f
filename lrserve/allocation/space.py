"""The space that the Optuna study searches: how suggested numbers become a plan.

A trial suggests how to divide a budget: a base allocator, and a multiplier for each group kind in each run of layers. For the
allocators that minimise an additive loss the multipliers scale what a cell's losses count, and the loss is minimised again; for
`uniform` they scale its share. Either way the plan meets the budget by construction. What the user fixed decides the budget:

    target                   budget
    ratio                    parameters
    min_speedup              predicted time; the trial also suggests how far beyond the asked speedup to go
    max_ppl_increase, none   predicted time; the trial also suggests the speedup, up to where the best guess of the losses
                             is a quarter beyond the limit of the perplexity, or of the front (`goal.FRONT_LIMIT`)

Where the budget counts parameters, allocators whose loss is in nats add what the objective says of time: w times the predicted
share of the dense run that a group's factors take more than its dense linears, or less. So factors that are slower than dense have
to be worth it. The first trials are the allocators themselves, the best guess at several speedups where none is fixed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
import torch

from lrserve.allocation.goal import limit_of
from lrserve.allocation.losses import GREEDY, Losses, least_loss
from lrserve.allocation.plan import BudgetFit, RankPlan
from lrserve.allocation.speed import SpeedModel
from lrserve.compression.groups import Group, Structure
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


class SearchSpace:
    """Turns suggested parameters into a plan that meets the budget."""

    def __init__(
        self,
        groups: Sequence[Group],
        target: Target,
        search: Search,
        losses: Mapping[str, Losses],
        speed: SpeedModel,
        structure: Structure = "identity_block",
    ) -> None:
        """Check at once that the target can be met.

        `losses` are the additive losses to minimise, by the name of the base allocator that they make; `uniform` comes besides.

        Raises:
            InfeasibleTargetError: the smallest ranks everywhere do not meet the target.
        """
        self._groups = list(groups)
        self._target = target
        self._losses = losses
        self.bases = (*losses, UNIFORM)
        self._speed = speed
        self.fit = BudgetFit(groups, search.rank_step, structure, None if target.ratio else speed.cost)
        self._kinds = list(dict.fromkeys(group.kind for group in groups))
        self._time_losses = self._time_as_loss(search.speed_weight)
        layers = max(group.layer for group in groups) + 1
        self._runs = min(search.depth_groups, layers)
        self._run_of = {group.name: group.layer * self._runs // layers for group in groups}
        if target.min_speedup and self.fit.smallest_cost > speed.budget(target.min_speedup):
            smallest = self.fit.fit({group.name: 1.0 for group in groups}, self.fit.smallest_cost)
            raise InfeasibleTargetError(
                f"min-speedup {target.min_speedup:g} is out of reach: with every group at its smallest rank, "
                f"{speed.speedup(smallest):.2f}x is predicted for these workloads; ask for less, or for more requests at once"
            )
        if target.ratio:
            self.fit.require(self.parameter_budget())
        elif not target.min_speedup:
            self._fastest = self._fastest_within(_BEYOND * limit_of(target))

    def _time_as_loss(self, weight: float) -> dict[str, torch.Tensor]:
        """Return for each group at every rank the relative time that it takes beyond its dense linears; weighted."""
        losses = {}
        for group in self._groups:
            extra = torch.zeros(group.full_rank + 1, dtype=torch.float64)
            for _, rank in self.fit.levels(group.name)[:-1]:
                extra[rank] = self._speed.cost(group, rank) - self._speed.cost(group, None)
            losses[group.name] = weight * extra
        return losses

    def _fastest_within(self, loss: float) -> float:
        """Return the largest predicted speedup that the best guess's losses, in nats, allow."""
        losses = self._losses[self.bases[0]]

        def lost(speedup: float) -> float:
            plan = least_loss(self.fit, losses, max(self._speed.budget(speedup), self.fit.smallest_cost))
            return sum(float(losses[name][rank]) for name, rank in plan.ranks.items() if rank is not None)

        low, high = 1.0, self._speed.speedup(self.fit.fit({group.name: 1.0 for group in self._groups}, self.fit.smallest_cost))
        if high <= low:
            raise InfeasibleTargetError(
                f"with every group at its smallest rank, {high:.2f}x of dense is predicted for these workloads: compression makes "
                "this model slower here; give more requests at once, or ask for a --ratio"
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
        multipliers = {self._name(kind, run): 1.0 for kind in self._kinds for run in range(self._runs)}
        rows: dict[str, dict[str, Any]] = {base: {"base": base, **multipliers} for base in self.bases}
        if self._target.ratio:
            return rows
        if self._target.min_speedup:
            return {base: {**row, "speedup": self._target.min_speedup * _FIRST_MARGIN} for base, row in rows.items()}
        parts = _FIRST["front" if self._target.front else "limit"]
        speedups = [math.exp(part * math.log(self._fastest)) for part in parts]
        pairs = [(self.bases[0], speedup) for speedup in speedups] + [(base, speedups[0]) for base in self.bases[1:]]
        return {f"{base} {speedup:.3f}x": {**rows[base], "speedup": speedup} for base, speedup in pairs}

    def parameter_budget(self) -> float:
        """Parameters that a plan may have under a ratio target."""
        return (1 - (self._target.ratio or 0.0)) * self.fit.dense_cost

    @staticmethod
    def _name(kind: str, run: int) -> str:
        return f"{kind}.{run}"

    def suggest(self, trial: optuna.Trial) -> RankPlan:
        """Suggest a plan."""
        base = trial.suggest_categorical("base", self.bases)
        multipliers: dict[tuple[str, int], float] = {
            (kind, run): trial.suggest_float(self._name(kind, run), *_MULTIPLIER, log=True)
            for kind in self._kinds
            for run in range(self._runs)
        }
        if self._target.ratio:
            budget = self.parameter_budget()
        else:
            asked = self._target.min_speedup
            low, high = (asked * _SPEED_MARGIN[0], asked * _SPEED_MARGIN[1]) if asked else (self._fastest**_SLOWEST, self._fastest)
            # the fastest plans may lie inside the margin: what is asked beyond them is cut back
            budget = max(self._speed.budget(trial.suggest_float("speedup", low, high)), self.fit.smallest_cost)
        weights = {g.name: multipliers[g.kind, self._run_of[g.name]] for g in self._groups}
        if base == UNIFORM:
            return self.fit.fit(weights, budget)
        losses = {name: loss * weights[name] for name, loss in self._losses[base].items()}
        if base != GREEDY and self._target.ratio:  # the other budgets count the time
            losses = {name: loss + self._time_losses[name] for name, loss in losses.items()}
        return least_loss(self.fit, losses, budget)
