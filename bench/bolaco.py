"""Baselines of bench/quality.py and bench/search.py: the rank allocations of Bolaco and LoRD, for single linears.

Both leave v dense and store two factors. Both allocate linears one by one, not fused groups (`separate` in
lrserve/compression/groups.py).

Bolaco (arXiv 2405.10616, section 4) reduces the search space to the shares of five kinds - q and k together, o, gate, up, down - in
each of a few runs of layers: "5x1" has one run, "5x4" four. A Gaussian process with a Matern 5/2 kernel, expected improvement and
50 trials find the shares. Two things differ from the authors' code. `BudgetFit` scales a trial's shares to the budget; the authors
draw again until they fit. The sampler is Optuna's, which maximises the logarithm of the expected improvement; the authors use
OpenBox. The study is one SQLite file; each suggestion comes from a sampler seeded by the seed and the trial's index, so a resumed
study is the same study.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

import optuna

from lrserve.allocation.losses import uniform
from lrserve.allocation.plan import BudgetFit, Offers, Plan
from lrserve.allocation.study import gp_sampler, open_study, run_trial
from lrserve.compression.groups import Group
from lrserve.errors import InfeasibleTargetError, InputError

_STRUCTURE: Final = "low_rank"
_SEARCHED = {"q": "qk", "k": "qk", "o": "o", "gate": "gate", "up": "up", "down": "down"}  # kind of linear -> kind of share
_SHARES = (0.2, 1.0)
_ATTENTION_SHARE = 0.5  # of q, k and o in the first trial, and of q and k in LoRD's plan


def bolaco(
    groups: Sequence[Group],
    budget: float,
    step: int,
    runs: int,
    trials: int,
    evaluate: Callable[[Plan], float],
    path: Path,
    *,
    seed: int,
    progress: Callable[[int, float], None] = lambda done, best: None,
) -> Plan:
    """Search shares by Bayesian optimisation and return the plan of the lowest value; runs or resumes until there are `trials`.

    The first trial is the authors' code's: half for q, k and o, the kept ratio for the others, before scaling.

    Args:
        groups: every linear of the decoder, one by one.
        budget: parameters that all of them, v included, may have.
        step: ranks are multiples of it.
        runs: equal runs of layers with shares of their own, 1 or 4 in the paper; at most one a layer.
        trials: 50 in the paper.
        evaluate: what to minimise, of a plan; no plan is evaluated twice. Whatever is not finite counts as worst.
        path: the SQLite file, private to these inputs.
        seed: of the samplers.
        progress: called after each trial with the number of finished ones and the lowest value so far.

    Raises:
        InputError: groups that are not single linears.
        InfeasibleTargetError: not even the smallest ranks beside a dense v meet the budget.
    """
    _check(groups, runs, trials)
    searched = [group for group in groups if group.kind in _SEARCHED]
    fit = BudgetFit(searched, Offers(step, _STRUCTURE))
    left = _left(groups, {group.name: None for group in groups if group.kind == "v"}, fit, budget)
    layers = max(group.layer for group in groups) + 1
    runs = min(runs, layers)
    parameter = {group.name: f"{_SEARCHED[group.kind]}.{group.layer * runs // layers}" for group in searched}
    names = list(dict.fromkeys(parameter.values()))
    kept = min(max(budget / sum(group.dense_parameters for group in groups), _SHARES[0]), _SHARES[1])

    first = {name: _ATTENTION_SHARE if name.startswith(("qk", "o")) else kept for name in names}
    study = open_study("bolaco", path)
    done = [
        (float(trial.value), Plan.of_ranks(trial.user_attrs["ranks"], _STRUCTURE))
        for trial in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    ]
    seen = {plan.key(): value for value, plan in done}
    while len(done) < trials:

        def objective(trial: optuna.Trial) -> float:
            shares = {name: trial.suggest_float(name, *_SHARES) for name in names}
            plan = _complete(groups, fit.fit({name: shares[parameter[name]] for name in parameter}, left).ranks)
            value = seen[plan.key()] if plan.key() in seen else evaluate(plan)
            value = value if math.isfinite(value) else math.inf
            trial.set_user_attr("ranks", plan.ranks)
            done.append((value, plan))
            seen[plan.key()] = value
            return value

        run_trial(study, gp_sampler(seed * 1_000_003 + len(done)), None if done else first, objective)
        progress(len(done), min(value for value, _ in done))
    return min(done[:trials], key=lambda item: item[0])[1]


def lord_plan(groups: Sequence[Group], budget: float, step: int) -> Plan:
    """Return LoRD's allocation (arXiv 2309.14021) at a budget: v dense, q and k at half, o, gate, up and down alike for the rest.

    Args:
        groups: every linear of the decoder, one by one.
        budget: parameters that all of them, v included, may have.
        step: ranks are multiples of it; q and k get the largest that keeps at most half of their parameters.

    Raises:
        InputError: groups that are not single linears.
        InfeasibleTargetError: no rank halves q or k, or not even the smallest ranks of the others meet the budget.
    """
    _check(groups)
    fixed: dict[str, int | None] = {}
    for group in groups:
        if group.kind == "v":
            fixed[group.name] = None
        elif group.kind in ("q", "k"):
            half = _ATTENTION_SHARE * group.dense_parameters
            ranks = [r for r in range(step, group.full_rank + 1, step) if group.parameters(r, _STRUCTURE) <= half]
            if not ranks:
                raise InfeasibleTargetError(
                    f"{group.name}: factors of rank {step} have {group.parameters(step, _STRUCTURE)} parameters, more than half of "
                    f"its {group.dense_parameters}; lower search.rank_step"
                )
            fixed[group.name] = ranks[-1]
    fit = BudgetFit([group for group in groups if group.name not in fixed], Offers(step, _STRUCTURE))
    return _complete(groups, {**fixed, **uniform(fit, _left(groups, fixed, fit, budget)).ranks})


def _check(groups: Sequence[Group], runs: int = 1, trials: int = 1) -> None:
    other = sorted({group.kind for group in groups} - {*_SEARCHED, "v"})
    if other:
        raise InputError(f"groups of kind {', '.join(other)}: these plans are for single linears; take fused groups apart first")
    if runs < 1 or trials < 1:
        raise InputError(f"{runs} runs of layers and {trials} trials: both must be 1 or more")


def _left(groups: Sequence[Group], fixed: Mapping[str, int | None], fit: BudgetFit, budget: float) -> float:
    """Return what the budget leaves for the groups of `fit` when the others have the ranks of `fixed`."""
    taken = sum(group.parameters(fixed[group.name], _STRUCTURE) for group in groups if group.name in fixed)
    if taken + fit.smallest_cost > budget:
        raise InfeasibleTargetError(
            f"the budget is {budget:.0f} parameters, but the linears whose ranks are fixed (v is dense) have {taken} and the "
            f"smallest ranks of the others {fit.smallest_cost:.0f}; ask for less compression or lower search.rank_step"
        )
    return budget - taken


def _complete(groups: Sequence[Group], ranks: Mapping[str, int | None]) -> Plan:
    """Return a plan for all groups, in their order; those without a rank are dense."""
    return Plan.of_ranks({group.name: ranks.get(group.name) for group in groups}, _STRUCTURE)
