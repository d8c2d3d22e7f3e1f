"""The Optuna study that allocates the ranks.

A trial suggests how to divide the budget: a base allocator, and a multiplier for each group kind in each run of layers. For the
allocators that minimise an additive loss the multipliers scale what a cell's losses count, and the loss is minimised again; for
`uniform` they scale its share. Either way the plan meets the budget by construction. Where the budget counts parameters, allocators
whose loss is in nats add what the objective says of time: w times the predicted share of the dense run that a group's factors take
more than its dense linears, or less. So factors that are slower than dense have to be worth it. What the user fixed decides the
budget's unit, and the one number that the study minimises:

    target             budget                                        objective
    ratio              parameters                                    log(ppl / dense ppl) - w log(speedup)
    min_speedup        predicted seconds; the trial also suggests    log(ppl / dense ppl)
                       how far beyond the asked speedup to go
    max_ppl_increase   parameters; the trial also suggests           -log(speedup), and a steep penalty beyond the limit
                       the ratio

with ppl the validation perplexity, speedup the predicted throughput over dense, and w `search.speed_weight`. The first trials are
the allocators themselves. The study lives in one SQLite file. Every suggestion is drawn from a sampler that is seeded by the
run's seed and the trial's index, so a resumed study goes on as if it had not been interrupted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import torch

from lrserve.allocation import allocate
from lrserve.allocation.plan import BudgetFit, RankPlan
from lrserve.allocation.resumable import ask, gp_sampler, open_study
from lrserve.allocation.speed import SpeedModel
from lrserve.compression.groups import Group, Structure
from lrserve.errors import InfeasibleTargetError
from lrserve.recipe import Search, Target

_MULTIPLIER = (0.5, 2.0)
_LIMIT_PENALTY = 20.0  # nats of objective per nat of log perplexity beyond the limit
_SPEED_MARGIN = (1.0, 1.25)
_RATIOS = (0.02, 0.8)
UNIFORM = "uniform"


@dataclass(frozen=True)
class Evaluated:
    """A plan with its validation perplexity and predicted speed; `origin` names the base plan, or `trial N`."""

    plan: RankPlan
    perplexity: float
    tokens_per_second: float
    origin: str
    trial: int


class SearchSpace:
    """Turns suggested parameters into a plan that meets the budget."""

    def __init__(
        self,
        groups: Sequence[Group],
        target: Target,
        search: Search,
        losses: Mapping[str, allocate.Losses],
        speed: SpeedModel,
        dense_perplexity: float,
        structure: Structure = "identity_block",
    ) -> None:
        """Check at once that the target can be met.

        `losses` are the additive losses to minimise, by the name of the base allocator that they make; `uniform` comes besides.

        Raises:
            InfeasibleTargetError: the smallest ranks everywhere do not meet the target.
        """
        self._groups = list(groups)
        self._target = target
        self._speed_weight = search.speed_weight
        self.dense_perplexity = dense_perplexity
        self._losses = losses
        self.bases = (*losses, UNIFORM)
        self._speed = speed
        self.fit = BudgetFit(groups, search.rank_step, structure, speed.cost if target.min_speedup else None)
        self._kinds = list(dict.fromkeys(group.kind for group in groups))
        self._time_losses = self._time_as_loss(search.speed_weight if target.ratio else 1.0)
        layers = max(group.layer for group in groups) + 1
        self._runs = min(search.depth_groups, layers)
        self._run_of = {group.name: group.layer * self._runs // layers for group in groups}
        if target.min_speedup and self.fit.smallest_cost > speed.budget(target.min_speedup):
            smallest = self.fit.fit({group.name: 1.0 for group in groups}, self.fit.smallest_cost)
            raise InfeasibleTargetError(
                f"min-speedup {target.min_speedup:g} is out of reach: with every group at its smallest rank, "
                f"{speed.speedup(smallest):.2f}x is predicted for this workload; ask for less, or for more requests at once"
            )
        if target.ratio:
            self.fit.require(self.parameter_budget())

    def _time_as_loss(self, weight: float) -> dict[str, torch.Tensor]:
        """Return for each group at every rank the time that it takes beyond its dense linears, over the dense run's; weighted."""
        losses = {}
        for group in self._groups:
            extra = torch.zeros(group.full_rank + 1, dtype=torch.float64)
            for _, rank in self.fit.levels(group.name)[:-1]:
                extra[rank] = self._speed.cost(group, rank) - self._speed.cost(group, None)
            losses[group.name] = weight * extra / self._speed.dense_seconds
        return losses

    def first_trials(self) -> list[dict[str, Any]]:
        """Return the parameters of the base plans themselves."""
        multipliers = {self._name(kind, run): 1.0 for kind in self._kinds for run in range(self._runs)}
        rows: list[dict[str, Any]] = [{"base": base, **multipliers} for base in self.bases]
        if self._target.min_speedup:
            return [{**row, "speedup": self._target.min_speedup * 1.02} for row in rows]
        if self._target.max_ppl_increase:
            return [{**row, "ratio": ratio} for row in rows for ratio in (0.1, 0.2)]
        return rows

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
        if self._target.min_speedup:
            low, high = (self._target.min_speedup * margin for margin in _SPEED_MARGIN)
            # the fastest plans may lie inside the margin: what is asked beyond them is cut back
            budget = max(self._speed.budget(trial.suggest_float("speedup", low, high)), self.fit.smallest_cost)
        elif self._target.max_ppl_increase:
            wanted = (1 - trial.suggest_float("ratio", *_RATIOS)) * self.fit.dense_cost
            budget = max(wanted, self.fit.smallest_cost)
        else:
            budget = self.parameter_budget()
        weights = {g.name: multipliers[g.kind, self._run_of[g.name]] for g in self._groups}
        if base == UNIFORM:
            return self.fit.fit(weights, budget)
        losses = {name: loss * weights[name] for name, loss in self._losses[base].items()}
        if base != allocate.GREEDY and not self._target.min_speedup:  # whose budget counts the time
            losses = {name: loss + self._time_losses[name] for name, loss in losses.items()}
        return allocate.least_loss(self.fit, losses, budget)

    def speedup(self, plan: RankPlan) -> float:
        """Predict a plan's throughput over dense."""
        return self._speed.speedup(plan)

    def tokens_per_second(self, plan: RankPlan) -> float:
        """Predict a plan's output tokens per second."""
        return self._speed.tokens_per_second(plan)

    def objective(self, perplexity: float, speedup: float) -> float:
        """Return what the study minimises, for a perplexity and a speedup over dense, predicted or measured."""
        loss = math.log(min(perplexity, 1e30) / self.dense_perplexity)
        if self._target.min_speedup:
            return loss
        if self._target.max_ppl_increase:
            beyond = loss - math.log1p(self._target.max_ppl_increase)
            return _LIMIT_PENALTY * max(beyond, 0.0) - math.log(speedup)
        return loss - self._speed_weight * math.log(speedup)


def _sampler(kind: str, seed: int, first: int) -> optuna.samplers.BaseSampler:
    if kind == "tpe":
        return optuna.samplers.TPESampler(seed=seed, multivariate=True, n_startup_trials=max(6, first))
    return gp_sampler(seed, first)


def run_study(
    space: SearchSpace,
    evaluate: Callable[[RankPlan], float],
    search: Search,
    path: Path,
    *,
    seed: int,
    progress: Callable[[int, Evaluated | None], None] = lambda done, last: None,
) -> list[Evaluated]:
    """Run or resume the study until it has `search.trials` finished trials, and return them in order.

    A trial that an earlier process died in is marked as failed; the finished ones are kept.

    Args:
        space: the search space.
        evaluate: validation perplexity of a plan.
        search: number of trials and sampler.
        path: the SQLite file, private to these inputs.
        seed: of the samplers.
        progress: called after each trial with the number of finished ones.
    """
    study = open_study("lrserve", path)
    first = space.first_trials()
    done = _finished(study)
    seen = {evaluated.plan.key(): evaluated for evaluated in done}
    progress(len(done), None)
    while len(done) < search.trials:
        index = len(done)  # of finished trials, so that failed ones do not shift the sequence
        sampler = _sampler(search.sampler, seed * 1_000_003 + index, len(space.bases))
        trial = ask(study, sampler, first[index] if index < len(first) else None)
        plan = space.suggest(trial)
        known = seen.get(plan.key())
        value = known.perplexity if known else evaluate(plan)
        origin = str(first[index]["base"]) if index < len(first) else f"trial {trial.number}"
        trial.set_user_attr("ranks", dict(plan.ranks))
        trial.set_user_attr("structure", plan.structure)
        trial.set_user_attr("perplexity", value)
        trial.set_user_attr("origin", origin)
        throughput = space.tokens_per_second(plan)
        trial.set_user_attr("tokens_per_second", throughput)
        study.tell(trial, space.objective(value, space.speedup(plan)))
        evaluated = Evaluated(plan, value, throughput, origin, trial.number)
        done.append(evaluated)
        seen.setdefault(plan.key(), evaluated)
        progress(len(done), evaluated)
    return done[: search.trials]


def _finished(study: optuna.Study) -> list[Evaluated]:
    return [
        Evaluated(
            plan=RankPlan(ranks=trial.user_attrs["ranks"], structure=trial.user_attrs["structure"]),
            perplexity=trial.user_attrs["perplexity"],
            tokens_per_second=trial.user_attrs["tokens_per_second"],
            origin=trial.user_attrs["origin"],
            trial=trial.number,
        )
        for trial in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    ]


def pareto_front(evaluated: Sequence[Evaluated]) -> list[Evaluated]:
    """Return the plans that no other beats in both perplexity and predicted speed, best perplexity first."""
    front: list[Evaluated] = []
    seen = set()
    for item in sorted(evaluated, key=lambda e: (e.perplexity, -e.tokens_per_second)):
        if item.plan.key() not in seen and (not front or item.tokens_per_second > front[-1].tokens_per_second):
            front.append(item)
        seen.add(item.plan.key())
    return front


def candidates(trials: Sequence[Evaluated], target: Target, space: SearchSpace, count: int) -> list[Evaluated]:
    """Pick the plans of the front worth measuring on the engine.

    Those of the best predicted objective; for a speedup, which a measurement may deny to the best of them, plans spread from
    there to the fastest.

    Raises:
        InfeasibleTargetError: no plan keeps the perplexity limit.
    """
    front = pareto_front(trials)
    if target.min_speedup:
        if len(front) <= count or count == 1:
            return front[:count]
        return [front[round(i * (len(front) - 1) / (count - 1))] for i in range(count)]
    if target.max_ppl_increase:
        limit = space.dense_perplexity * (1 + target.max_ppl_increase)
        if front[0].perplexity > limit:
            raise InfeasibleTargetError(
                f"no plan has a validation perplexity of {limit:.2f} ({space.dense_perplexity:.2f} x "
                f"{1 + target.max_ppl_increase:g}) or less: the best of the search has {front[0].perplexity:.2f}; "
                "allow more, or give more trials or calibration text"
            )
        front = [e for e in front if e.perplexity <= limit]
    return sorted(front, key=lambda e: space.objective(e.perplexity, space.speedup(e.plan)))[:count]


def choose(measured: Sequence[tuple[Evaluated, float]], target: Target, space: SearchSpace) -> Evaluated:
    """Choose among candidates by their *measured* speedups: the best objective that meets the target.

    Under a ratio target nothing is promised of the speed; the caller gives what ranks best. Otherwise it gives the median.

    Raises:
        InfeasibleTargetError: none reaches the speedup, or, under a perplexity limit, none is faster than dense.
    """
    table = "; ".join(f"{e.origin} perplexity {e.perplexity:.2f} at {speedup:.2f}x" for e, speedup in measured)
    feasible = list(measured)
    if target.min_speedup:
        feasible = [(e, speedup) for e, speedup in measured if speedup >= target.min_speedup]
        if not feasible:
            raise InfeasibleTargetError(
                f"no measured plan reaches {target.min_speedup:g}x of dense ({table}); ask for less, or give more trials"
            )
    if target.max_ppl_increase:
        feasible = [(e, speedup) for e, speedup in measured if speedup > 1]
        if not feasible:
            raise InfeasibleTargetError(
                f"no plan within the perplexity limit is faster than dense ({table}); serve the dense model, or allow more"
            )
    return min(feasible, key=lambda item: space.objective(item[0].perplexity, item[1]))[0]
