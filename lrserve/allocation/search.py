"""The Optuna study that allocates the ranks.

A trial suggests a base plan (uniform, greedy or loss-aware) and a multiplier for each group kind in each run of layers; the base
plan's shares times the multipliers are fitted into the budget, so every trial meets it by construction. Objectives: validation
log perplexity (down) and predicted output tokens per second (up). What the user fixed decides the budget's unit:

    ratio             parameters, fixed
    min_speedup       predicted seconds; the trial also suggests how far beyond the asked speedup to go
    max_ppl_increase  parameters; the trial also suggests the ratio

The first trials are the base plans themselves. The study lives in one SQLite file. Every trial's suggestion is drawn from a sampler
seeded by the run's seed and the trial's number, so a resumed study goes on as if it had not been interrupted.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import optuna
import torch

from lrserve.allocation import allocate
from lrserve.allocation.plan import BudgetFit, RankPlan, parameter_cost
from lrserve.allocation.speed import SpeedModel
from lrserve.compression.groups import KINDS, Group
from lrserve.errors import InfeasibleTargetError
from lrserve.recipe import Search, Target

_MULTIPLIER = (0.4, 2.5)
_SPEED_MARGIN = (1.0, 1.25)
_RATIOS = (0.02, 0.8)
BASES: tuple[Literal["loss_aware", "uniform", "greedy"], ...] = ("loss_aware", "uniform", "greedy")


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
        relative_errors: Mapping[str, torch.Tensor],
        sensitivities: Mapping[str, float],
        speed: SpeedModel,
    ) -> None:
        """Check at once that the target can be met.

        Raises:
            InfeasibleTargetError: the smallest ranks everywhere do not meet the target.
        """
        self._groups = list(groups)
        self._target = target
        self._errors = relative_errors
        self._sensitivities = sensitivities
        self._speed = speed
        self._fit = BudgetFit(groups, search.rank_step, speed.cost if target.min_speedup else parameter_cost)
        layers = max(group.layer for group in groups) + 1
        self._runs = min(search.depth_groups, layers)
        self._run_of = {group.name: group.layer * self._runs // layers for group in groups}
        if target.min_speedup and self._fit.smallest_cost > speed.budget(target.min_speedup):
            smallest = self._fit.fit({group.name: 1.0 for group in groups}, self._fit.smallest_cost)
            raise InfeasibleTargetError(
                f"min-speedup {target.min_speedup:g} is out of reach: with every group at its smallest rank, "
                f"{speed.speedup(smallest):.2f}x is predicted for this workload; ask for less, or for more requests at once"
            )
        if target.ratio:
            self._fit.fit({group.name: 1.0 for group in groups}, (1 - target.ratio) * self._fit.dense_cost)

    def first_trials(self) -> list[dict[str, Any]]:
        """Return the parameters of the base plans themselves."""
        multipliers = {self._name(kind, run): 1.0 for kind in KINDS for run in range(self._runs)}
        rows: list[dict[str, Any]] = [{"base": base, **multipliers} for base in BASES]
        if self._target.min_speedup:
            return [{**row, "speedup": self._target.min_speedup * 1.02} for row in rows]
        if self._target.max_ppl_increase:
            return [{**row, "ratio": ratio} for ratio in (0.1, 0.2) for row in rows]
        return rows

    @staticmethod
    def _name(kind: str, run: int) -> str:
        return f"{kind}.{run}"

    def suggest(self, trial: optuna.Trial) -> RankPlan:
        """Suggest a plan."""
        base = trial.suggest_categorical("base", BASES)
        multipliers = {
            (kind, run): trial.suggest_float(self._name(kind, run), *_MULTIPLIER, log=True)
            for kind in KINDS
            for run in range(self._runs)
        }
        if self._target.min_speedup:
            low, high = (self._target.min_speedup * margin for margin in _SPEED_MARGIN)
            # the fastest plans may lie inside the margin: what is asked beyond them is cut back
            budget = max(self._speed.budget(trial.suggest_float("speedup", low, high)), self._fit.smallest_cost)
        elif self._target.max_ppl_increase:
            wanted = (1 - trial.suggest_float("ratio", *_RATIOS)) * self._fit.dense_cost
            budget = max(wanted, self._fit.smallest_cost)
        else:
            budget = (1 - (self._target.ratio or 0.0)) * self._fit.dense_cost
        plan = self.base(base, budget)
        if all(value == 1 for value in multipliers.values()):
            return plan
        shares = self._fit.shares(plan)
        return self._fit.fit({g.name: shares[g.name] * multipliers[g.kind, self._run_of[g.name]] for g in self._groups}, budget)

    def base(self, name: str, budget: float) -> RankPlan:
        """Return one of the closed-form plans under a budget."""
        if name == "uniform":
            return allocate.uniform(self._fit, budget)
        if name == "greedy":
            return allocate.greedy(self._fit, self._errors, budget)
        return allocate.loss_aware(self._fit, self._errors, self._sensitivities, budget)


def _sampler(kind: str, seed: int) -> optuna.samplers.BaseSampler:
    if kind == "tpe":
        return optuna.samplers.TPESampler(seed=seed, multivariate=True, n_startup_trials=6)
    with _experimental():
        return optuna.samplers.GPSampler(seed=seed, n_startup_trials=6, deterministic_objective=True)


@contextmanager
def _experimental() -> Iterator[None]:
    """Use a feature that optuna marks as experimental without telling the user, who cannot do anything about it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield


def run_study(
    space: SearchSpace,
    evaluate: Callable[[RankPlan], float],
    speed: SpeedModel,
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
        speed: predicts throughput.
        search: number of trials and sampler.
        path: the SQLite file, private to these inputs.
        seed: of the samplers.
        progress: called after each trial with the number of finished ones.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        study_name="lrserve",
        storage=f"sqlite:///{path}",
        directions=["minimize", "maximize"],
        load_if_exists=True,
    )
    with _experimental():
        study.set_metric_names(["log_perplexity", "tokens_per_second"])
    for trial in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
    first = space.first_trials()
    done = _finished(study)
    seen = {evaluated.plan.key(): evaluated for evaluated in done}
    progress(len(done), None)
    while len(done) < search.trials:
        index = len(done)  # of finished trials, so that failed ones do not shift the sequence
        study.sampler = _sampler(search.sampler, seed * 1_000_003 + index)
        # a process that died between enqueueing and asking has left its trial waiting
        if index < len(first) and not study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.WAITING,)):
            study.enqueue_trial(first[index])
        trial = study.ask()
        plan = space.suggest(trial)
        known = seen.get(plan.key())
        value = known.perplexity if known else evaluate(plan)
        origin = str(first[index]["base"]) if index < len(first) else f"trial {trial.number}"
        trial.set_user_attr("ranks", dict(plan.ranks))
        trial.set_user_attr("perplexity", value)
        trial.set_user_attr("origin", origin)
        throughput = speed.tokens_per_second(plan)
        study.tell(trial, [math.log(min(value, 1e30)), throughput])
        evaluated = Evaluated(plan, value, throughput, origin, trial.number)
        done.append(evaluated)
        seen.setdefault(plan.key(), evaluated)
        progress(len(done), evaluated)
    return done


def _finished(study: optuna.Study) -> list[Evaluated]:
    return [
        Evaluated(
            plan=RankPlan(ranks=trial.user_attrs["ranks"]),
            perplexity=trial.user_attrs["perplexity"],
            tokens_per_second=trial.values[1],
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


def candidates(front: Sequence[Evaluated], target: Target, dense_perplexity: float, count: int) -> list[Evaluated]:
    """Pick the plans worth measuring on the engine, the most promising first.

    For a ratio or a speedup these spread over the front from its best perplexity; for a perplexity limit, over the part that
    keeps it, from its fastest.

    Raises:
        InfeasibleTargetError: no plan keeps the perplexity limit.
    """
    pool = list(front)
    if target.max_ppl_increase:
        limit = dense_perplexity * (1 + target.max_ppl_increase)
        pool = [e for e in reversed(pool) if e.perplexity <= limit]
        if not pool:
            best = min(e.perplexity for e in front)
            raise InfeasibleTargetError(
                f"no plan of {dense_perplexity:.2f} x {1 + target.max_ppl_increase:g} = {limit:.2f} validation perplexity or less: "
                f"the best of the search has {best:.2f}; allow more, or give more trials or calibration text"
            )
    if len(pool) <= count:
        return pool
    if count == 1:
        return pool[:1]
    return [pool[round(i * (len(pool) - 1) / (count - 1))] for i in range(count)]


def choose(measured: Sequence[tuple[Evaluated, float]], target: Target) -> Evaluated:
    """Choose among candidates with their measured speedups.

    Ratio: best perplexity. Speedup: best perplexity among those that reach it. Perplexity limit: fastest.

    Raises:
        InfeasibleTargetError: none reaches the speedup, or, under a perplexity limit, none is faster than dense.
    """
    table = "; ".join(f"{e.origin} perplexity {e.perplexity:.2f} at {speedup:.2f}x" for e, speedup in measured)
    if target.min_speedup:
        fast = [e for e, speedup in measured if speedup >= target.min_speedup]
        if not fast:
            raise InfeasibleTargetError(
                f"no measured plan reaches {target.min_speedup:g}x of dense ({table}); ask for less, or give more trials"
            )
        return min(fast, key=lambda e: e.perplexity)
    if target.max_ppl_increase:
        best, speedup = max(measured, key=lambda item: item[1])
        if speedup <= 1:
            raise InfeasibleTargetError(
                f"no plan within the perplexity limit is faster than dense ({table}); serve the dense model, or allow more"
            )
        return best
    return min((e for e, _ in measured), key=lambda e: e.perplexity)
