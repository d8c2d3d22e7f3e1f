"""What the search is after: its objectives and constraints, the front, which plans to measure, and which one to take.

What the user fixed decides what the study minimises, with L = log(ppl / dense ppl) on the validation text, s the throughput over
dense and w `search.speed_weight`:

    target             objective               constraint
    ratio, max_bytes   L - w log(s)
    min_speedup        L                       s is at least what was asked
    max_ppl_increase   -log(s)                 ppl is within the limit
    none: the front    L and -tokens/s, both   L is at most `FRONT_LIMIT`

Trials know s from the table of single layers (`allocation/speed.py`). The front is then measured on the engine, plan by plan; each
measurement corrects the predictions by which the next one is picked. What users would serve instead, the dense model rounded to one
precision everywhere, is measured besides and may be chosen like any other plan.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lrserve.allocation.plan import Plan
from lrserve.errors import InfeasibleTargetError
from lrserve.recipe import Target

FRONT_LIMIT = 1.0
"""Nats above dense: nobody serves a model of 2.7 times the perplexity, and without a limit the study would look for the fastest."""

Speedup = Callable[[Plan], float]
"""Predicts a plan's throughput over dense."""


@dataclass(frozen=True)
class Evaluated:
    """A finished trial.

    nll: mean negative log likelihood of each validation window, in nats, in the order of the windows; those of the first windows
        only where the trial was stopped early, and `perplexity` is an estimate then.
    tokens_per_second: as the table of single layers predicts it.
    origin: the name of a base plan, `trial N`, or of a plan that stands for what users would serve instead.
    trial: its number in the study; None for a plan that is no trial of it.
    fits: whether its size is what was asked for.
    usual: whether it is no trial of any study, but stands for what users would serve instead.

    A perplexity that is no number counts as infinite. Such a plan is `finite` no more: it is infeasible, and no rival of others.
    """

    plan: Plan
    perplexity: float
    tokens_per_second: float
    origin: str
    trial: int | None
    nll: tuple[float, ...] = ()
    complete: bool = True
    fits: bool = True
    usual: bool = False

    @property
    def finite(self) -> bool:
        """Whether the perplexity is a number."""
        return math.isfinite(self.perplexity)


def limit_of(target: Target) -> float:
    """Return the largest log(perplexity / dense perplexity) that a plan may have, in nats; where there is a limit."""
    return math.log1p(target.max_ppl_increase) if target.max_ppl_increase else FRONT_LIMIT


@dataclass(frozen=True)
class Goal:
    """The target, and the dense model's perplexity on the validation text."""

    target: Target
    speed_weight: float
    dense_perplexity: float

    @property
    def metrics(self) -> dict[str, str]:
        """Return the study's objectives by name, with their directions."""
        if self.target.front:
            return {"log(ppl / dense ppl)": "minimize", "tokens per second": "maximize"}
        if self.target.max_ppl_increase:
            return {"-log(speedup)": "minimize"}
        weight = f" - {self.speed_weight:g} log(speedup)" if self.target.sized else ""
        return {f"log(ppl / dense ppl){weight}": "minimize"}

    def loss(self, perplexity: float) -> float:
        """Return log(perplexity / dense perplexity), in nats; infinite where the perplexity is not finite."""
        return math.log(min(perplexity, 1e30) / self.dense_perplexity) if math.isfinite(perplexity) else math.inf

    def objective(self, perplexity: float, speedup: float) -> float:
        """Return what is minimised, of a perplexity and a speedup over dense, predicted or measured; a front's is the loss."""
        loss = self.loss(perplexity)
        if self.target.max_ppl_increase and math.isfinite(loss):
            return -math.log(speedup)
        return loss - (self.speed_weight * math.log(speedup) if self.target.sized else 0.0)

    def constraints(self, perplexity: float, speedup: float) -> dict[str, float]:
        """Return what has to be zero or less, by name."""
        if self.target.sized:
            return {}
        if self.target.min_speedup:
            return {"speedup": math.log(self.target.min_speedup / speedup)}
        return {"perplexity": self.loss(perplexity) - limit_of(self.target)}

    def feasible(self, perplexity: float, speedup: float) -> bool:
        """Whether every constraint is met."""
        return all(value <= 0 for value in self.constraints(perplexity, speedup).values())


def pareto_front(trials: Sequence[Evaluated], speedup: Speedup) -> list[Evaluated]:
    """Return the plans that no other beats in both perplexity and predicted speed, best perplexity first."""
    front: list[Evaluated] = []
    rated = [(trial, speedup(trial.plan)) for trial in trials if trial.complete and trial.finite]
    fastest = -math.inf
    for trial, speed in sorted(rated, key=lambda item: (item[0].perplexity, -item[1])):
        if speed > fastest:
            front.append(trial)
            fastest = speed
    return front


def knee(points: Mapping[int, tuple[float, float]]) -> int:
    """Return the key of the point (gain, loss) that lies furthest below the chord from (0, 0) to the largest gain and its loss.

    That is the knee of a front by normal-boundary intersection (Das, Structural Optimization 18, 1999), dense at the origin.
    """
    gain, loss = max(points.values())
    gain, loss = max(gain, 1e-12), max(loss, 1e-12)
    return max(points, key=lambda key: (points[key][0] / gain - points[key][1] / loss, points[key][0]))


def next_candidate(trials: Sequence[Evaluated], measured: Sequence[Evaluated], goal: Goal, speedup: Speedup) -> Evaluated | None:
    """Pick the plan of the front that is most worth measuring next; None where there is none left.

    The best by the predicted objective. For a speedup, where all that is left is predicted to fall short, the fastest if it is
    faster than all that were measured. For the front the knee, then what lies furthest from all that was measured in log(speedup).

    Raises:
        InfeasibleTargetError: no plan keeps the perplexity limit, or no perplexity is finite.
    """
    front = pareto_front(trials, speedup)
    if not front and trials:
        raise InfeasibleTargetError(
            f"none of the {len(trials)} trials has a finite validation perplexity; ask for less, or set engine.dtype to bfloat16 "
            "or float32"
        )
    if goal.target.max_ppl_increase or goal.target.front:
        limit = goal.dense_perplexity * math.exp(limit_of(goal.target))
        if front[0].perplexity > limit:
            raise InfeasibleTargetError(
                f"no plan has a validation perplexity of {limit:.2f} ({goal.dense_perplexity:.2f} x "
                f"{math.exp(limit_of(goal.target)):.3g}) or less: the best of the search has {front[0].perplexity:.2f}; "
                "allow more, or give more trials or calibration text"
            )
        front = [trial for trial in front if trial.perplexity <= limit]
    seen = {trial.plan.key() for trial in measured}
    left = [trial for trial in front if trial.plan.key() not in seen]
    if not left:
        return None
    speeds = {index: speedup(trial.plan) for index, trial in enumerate(left)}
    if goal.target.front:
        if not measured:
            return left[knee({i: (math.log(s), goal.loss(left[i].perplexity)) for i, s in speeds.items()})]
        known = [math.log(speedup(trial.plan)) for trial in measured]
        return left[max(speeds, key=lambda i: min(abs(math.log(speeds[i]) - other) for other in known))]
    if goal.target.min_speedup and max(speeds.values()) < goal.target.min_speedup:
        fastest = max(speeds, key=lambda i: speeds[i])
        return left[fastest] if all(speedup(trial.plan) < speeds[fastest] for trial in measured) else None
    possible = [i for i, s in speeds.items() if goal.feasible(left[i].perplexity, s)]
    return left[min(possible, key=lambda i: goal.objective(left[i].perplexity, speeds[i]))]


@dataclass(frozen=True)
class MeasuredSpeed:
    """What the engine said of a plan: its speedup, and the least that it can be told from."""

    trial: Evaluated
    speedup: float
    at_least: float


def _was_measured(found: MeasuredSpeed) -> bool:
    return 0 < found.speedup < math.inf and found.trial.finite


def _reaches_target(found: MeasuredSpeed, goal: Goal) -> bool:
    return found.trial.fits and (not goal.target.min_speedup or found.speedup >= goal.target.min_speedup)


def _beats_dense(found: MeasuredSpeed, goal: Goal) -> bool:
    """Whether a plan is faster than dense beyond the spread, where the target promises that it is faster."""
    promised = not goal.target.sized and (goal.target.min_speedup or 1.0) >= 1
    return not promised or found.at_least > 1


def choose(measured: Sequence[MeasuredSpeed], goal: Goal) -> Evaluated:
    """Choose by *measured* speedups: the best objective that meets the target; of the front the knee.

    Under a target that fixes a size nothing is promised of the speed. Otherwise the plan is faster than dense beyond the spread.

    Raises:
        InfeasibleTargetError: none reaches the speedup, none is faster than dense, or none has a finite speedup.
    """
    measured = [found for found in measured if _was_measured(found)]
    if not measured:
        raise InfeasibleTargetError("the engine gave no plan a finite speedup; repeat the command on a quieter machine")
    rows = [f"{f.trial.origin} perplexity {f.trial.perplexity:.2f} at {f.speedup:.2f}x" for f in measured]
    left = [found for found in measured if _reaches_target(found, goal)]
    if not left:
        raise InfeasibleTargetError(
            f"no measured plan reaches {goal.target.min_speedup:g}x of dense ({'; '.join(rows)}); ask for less, or give more trials"
        )
    left = [found for found in left if _beats_dense(found, goal)]
    if not left:
        lowest = "; ".join(f"{row}, at least {f.at_least:.2f}x" for row, f in zip(rows, measured, strict=True))
        which = f"no plan that reaches {goal.target.min_speedup:g}x" if goal.target.min_speedup else "no plan"
        raise InfeasibleTargetError(
            f"{which} is faster than dense beyond the spread of its measurements ({lowest}); serve the dense model, "
            "allow more loss, or measure on a quieter machine or with more engine.repeats"
        )
    if goal.target.front:
        return left[knee({i: (math.log(f.speedup), goal.loss(f.trial.perplexity)) for i, f in enumerate(left)})].trial
    return min(left, key=lambda found: goal.objective(found.trial.perplexity, found.speedup)).trial


def rule(goal: Goal) -> str:
    """Say which of the measured plans `choose` chooses, to stand after 'the choice is'."""
    target = goal.target
    if target.sized:
        weight = "" if goal.speed_weight == 1 else f"{goal.speed_weight:g} "
        return f"the lowest log(perplexity / dense perplexity) - {weight}log(speedup), with the speedup of the fastest rounds"
    faster = ", of those whose spread lies above dense" if (target.min_speedup or 1.0) >= 1 else ""
    if target.min_speedup:
        return f"the lowest perplexity of those that reach {target.min_speedup:g}x{faster}"
    if target.max_ppl_increase:
        return f"the fastest within the limit of the perplexity{faster}"
    return f"the knee, which lies furthest below the line from the dense model to the fastest plan{faster}"


def why_not(found: MeasuredSpeed, chosen: MeasuredSpeed, goal: Goal) -> str:
    """Say why `choose` chose another plan than the measured one `found`."""
    target = goal.target
    if not _was_measured(found):
        return "its perplexity or its measured speedup is not finite"
    if not found.trial.fits:
        return "it is larger than what was asked for"
    if not _reaches_target(found, goal):
        return f"it misses the target: {found.speedup:.3f}x measured, {target.min_speedup:g}x asked for"
    if not _beats_dense(found, goal):
        return f"its speedup cannot be told from dense: {found.at_least:.3f}x in the lowest of the spread"
    both = found, chosen
    if target.front:
        own, best = (f"{goal.loss(plan.trial.perplexity):.3f} nats at {plan.speedup:.3f}x" for plan in both)
        return f"it is further from the knee: {own}, the chosen plan {best}"
    objectives = [goal.objective(plan.trial.perplexity, plan.speedup) for plan in both]
    if objectives[0] == objectives[1]:
        return "it is as good by the rule, and was measured later"
    if target.sized:
        own, best = (
            f"{objective:+.3f} ({goal.loss(plan.trial.perplexity):+.3f} nats at {plan.speedup:.3f}x)"
            for objective, plan in zip(objectives, both, strict=True)
        )
        return f"its loss less its gain is {own}, that of the chosen plan {best}"
    if target.min_speedup:
        own, best = (f"{plan.trial.perplexity:.2f}" for plan in both)
        return f"it reaches the target with a higher perplexity: {own}, the chosen plan {best}"
    return f"it keeps the limit and is slower: {found.speedup:.3f}x, the chosen plan {chosen.speedup:.3f}x"
