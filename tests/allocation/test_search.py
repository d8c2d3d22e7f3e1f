"""The study: budgets, base plans first, resuming, choosing."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest
import torch

from lrserve.allocation.plan import RankPlan
from lrserve.allocation.search import Evaluated, SearchSpace, candidates, choose, pareto_front, run_study
from lrserve.allocation.speed import Shape, SpeedModel
from lrserve.compression.groups import KINDS, Group
from lrserve.errors import InfeasibleTargetError
from lrserve.recipe import Search, Target, Workload

GROUPS = [
    Group(name=f"{layer}.{kind}", kind=kind, layer=layer, members=(f"{layer}.{kind}",), out_features=(256,), in_features=256)
    for layer in range(4)
    for kind in KINDS
]
TAILS = torch.linspace(1, 0, 257, dtype=torch.float64) ** 2
SENSITIVITIES = {group.name: 1.0 + group.layer for group in GROUPS}
LOSSES = {
    "loss_aware": {name: TAILS * sensitivity for name, sensitivity in SENSITIVITIES.items()},
    "greedy": {group.name: TAILS for group in GROUPS},
}
LATENCIES = {Shape(256, 256, None): (100.0, 3000.0)} | {
    Shape(256, 256, r, ordered=ordered): (10.0 + r, 100.0 + 20 * r) for r in range(16, 128, 16) for ordered in (False, True)
}
SPEED = SpeedModel(GROUPS, Workload(prompt_tokens=64, output_tokens=101, concurrency=4), 0.5, LATENCIES, 16, "low_rank")
SETTINGS = Search(trials=9, depth_groups=2)


def evaluate(plan: RankPlan) -> float:
    """A smooth stand-in for perplexity: each group's error weighs by its depth."""
    return 10 + sum(SENSITIVITIES[n] * float(TAILS[r]) for n, r in plan.ranks.items() if r is not None)


def space(target: Target, dense: float = 10.0) -> SearchSpace:
    return SearchSpace(GROUPS, target, SETTINGS, LOSSES, SPEED, dense_perplexity=dense, structure="low_rank")


@pytest.mark.parametrize("sampler", ["gp", "tpe"])
def test_every_trial_meets_the_ratio_and_the_base_plans_come_first(tmp_path: Path, sampler: str) -> None:
    settings = SETTINGS.model_copy(update={"sampler": sampler})
    trials = run_study(space(Target(ratio=0.3)), evaluate, settings, tmp_path / "s.sqlite3", seed=0)
    assert [trial.origin for trial in trials[:3]] == ["loss_aware", "greedy", "uniform"]
    assert len(trials) == 9
    for trial in trials:
        assert 0.3 <= trial.plan.ratio(GROUPS) < 0.36
        assert trial.perplexity == evaluate(trial.plan)
    assert len({trial.plan.key() for trial in trials}) >= 6


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_factors_that_are_slower_than_dense_have_to_be_worth_it(weight: float) -> None:
    groups = [
        Group(name=name, kind="o", layer=0, members=(name,), out_features=(256,), in_features=n)
        for name, n in (("slow", 256), ("fast", 320))
    ]
    latencies = {Shape(n, 256, None): (100.0, 0.0) for n in (256, 320)}
    for rank in range(16, 256, 16):
        latencies |= {Shape(256, 256, rank): (200.0, 0.0), Shape(320, 256, rank): (50.0, 0.0)}
    speed = SpeedModel(groups, Workload(prompt_tokens=1, output_tokens=101, concurrency=1), 0.1, latencies, 16, "low_rank")
    losses = {base: {"slow": 0.001 * TAILS, "fast": 0.002 * TAILS} for base in ("loss_aware", "greedy")}
    search = Search(speed_weight=weight)
    trial = optuna.trial.FixedTrial({"base": "loss_aware", **{f"o.{run}": 1.0 for run in range(3)}})
    plan = SearchSpace(groups, Target(ratio=0.2), search, losses, speed, 10.0, "low_rank").suggest(trial)
    assert (plan.ranks["slow"] is None) == (weight > 0)
    trial = optuna.trial.FixedTrial({"base": "greedy", **{f"o.{run}": 1.0 for run in range(3)}})
    plan = SearchSpace(groups, Target(ratio=0.2), search, losses, speed, 10.0, "low_rank").suggest(trial)
    assert plan.ranks["slow"] is not None  # its losses are in no unit that seconds could be added to


def test_every_trial_meets_a_speedup(tmp_path: Path) -> None:
    trials = run_study(space(Target(min_speedup=1.2)), evaluate, SETTINGS, tmp_path / "s.sqlite3", seed=0)
    assert all(SPEED.speedup(trial.plan) >= 1.2 for trial in trials)
    assert trials[0].plan.ranks != trials[1].plan.ranks


def test_a_perplexity_limit_searches_over_ratios(tmp_path: Path) -> None:
    trials = run_study(space(Target(max_ppl_increase=0.5)), evaluate, SETTINGS, tmp_path / "s.sqlite3", seed=0)
    assert len({round(trial.plan.ratio(GROUPS), 1) for trial in trials}) > 1


def test_a_killed_study_resumes_to_the_same_trials(tmp_path: Path) -> None:
    target = Target(ratio=0.3)
    whole = run_study(space(target), evaluate, SETTINGS, tmp_path / "whole.sqlite3", seed=3)

    calls = 0

    def dies(plan: RankPlan) -> float:
        nonlocal calls
        calls += 1
        if calls in (2, 6):
            raise KeyboardInterrupt
        return evaluate(plan)

    path = tmp_path / "cut.sqlite3"
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run_study(space(target), dies, SETTINGS, path, seed=3)
    resumed = run_study(space(target), dies, SETTINGS, path, seed=3)
    assert [t.plan.key() for t in resumed] == [t.plan.key() for t in whole]
    study = optuna.load_study(study_name="lrserve", storage=f"sqlite:///{path}")
    states = [trial.state.name for trial in study.trials]
    assert states.count("FAIL") == 2
    assert states.count("COMPLETE") == 9


def test_more_trials_go_on_where_fewer_ended(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite3"
    first = run_study(space(Target(ratio=0.3)), evaluate, SETTINGS.model_copy(update={"trials": 4}), path, seed=0)
    reports: list[int] = []
    more = run_study(space(Target(ratio=0.3)), evaluate, SETTINGS, path, seed=0, progress=lambda done, last: reports.append(done))
    assert more[:4] == first
    assert reports == [4, 5, 6, 7, 8, 9]


def test_infeasible_targets_are_refused_at_once() -> None:
    with pytest.raises(InfeasibleTargetError, match="out of reach"):
        space(Target(min_speedup=50))
    with pytest.raises(InfeasibleTargetError, match="smallest ranks"):
        space(Target(ratio=0.99))


def evaluated(perplexity: float, speed: float) -> Evaluated:
    plan = RankPlan({group.name: None for group in GROUPS} | {"id": int(perplexity)})
    return Evaluated(plan, perplexity, speed, "trial", 0)


def test_front_candidates_and_choice() -> None:
    a, b, c, d = evaluated(10, 1.0), evaluated(11, 1.2), evaluated(12, 1.1), evaluated(15, 2.0)
    trials = [d, c, b, a]
    assert pareto_front(trials) == [a, b, d]

    def picked(target: Target, count: int) -> list[Evaluated]:
        return candidates(trials, target, space(target), count)

    assert picked(Target(ratio=0.2), 2) == [a, b]  # the plans of this test are all predicted to be equally fast
    assert picked(Target(min_speedup=1.1), 2) == [a, d]
    assert picked(Target(max_ppl_increase=0.15), 5) == [a, b]
    with pytest.raises(InfeasibleTargetError, match="the best of the search has 10.00"):
        candidates(trials, Target(max_ppl_increase=0.1), space(Target(max_ppl_increase=0.1), dense=5.0), 5)
    measured = [(a, 0.9), (b, 1.1), (d, 1.8)]

    def choice(target: Target, among: list[tuple[Evaluated, float]]) -> Evaluated:
        return choose(among, target, space(target))

    assert choice(Target(min_speedup=1.05), measured) is b
    assert choice(Target(max_ppl_increase=0.9), measured) is d
    assert choice(Target(max_ppl_increase=0.2), measured) is b
    assert choice(Target(ratio=0.2), measured) is d  # 50 % more perplexity, but twice as fast
    assert choice(Target(ratio=0.2), measured[:2]) is b
    with pytest.raises(InfeasibleTargetError, match="no measured plan reaches 1.3x"):
        choice(Target(min_speedup=1.3), measured[:2])
    with pytest.raises(InfeasibleTargetError, match="faster than dense"):
        choice(Target(max_ppl_increase=0.9), [(a, 0.9)])
