"""The search space: budgets by construction, base plans first."""

from __future__ import annotations

import optuna
import pytest
import torch
from allocation.searching import GROUPS, LATENCIES, LOSSES, OFFERS, SPEED, TAILS, WORKLOADS, space

from lrserve.allocation.goal import limit_of
from lrserve.allocation.losses import by_level
from lrserve.allocation.plan import Offers
from lrserve.allocation.space import SearchSpace
from lrserve.allocation.speed import Shape, SpeedModel, shapes_to_measure
from lrserve.compression.groups import Group, Mixture
from lrserve.compression.level import DENSE
from lrserve.errors import InfeasibleTargetError
from lrserve.recipe import Search, Target, Workload


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_factors_that_are_slower_than_dense_have_to_be_worth_it(weight: float) -> None:
    groups = [
        Group(name=name, kind="o", layer=0, members=(name,), out_features=(256,), in_features=n)
        for name, n in (("slow", 256), ("fast", 320))
    ]
    latencies = {Shape(n, 256, None): {1: 100.0} for n in (256, 320)}
    for rank in range(16, 256, 16):
        latencies |= {Shape(256, 256, rank): {1: 200.0}, Shape(320, 256, rank): {1: 50.0}}
    workloads = {"only": Workload(prompt_tokens=1, output_tokens=100, concurrency=1)}
    speed = SpeedModel(groups, workloads, {"only": 0.1}, latencies, OFFERS)
    levels = {group.name: OFFERS.levels(group) for group in groups}
    losses = {"loss_aware": by_level(groups, levels, {"slow": 0.001 * TAILS, "fast": 0.002 * TAILS}, {})}
    search = Search(speed_weight=weight)
    trial = optuna.trial.FixedTrial({"base": "loss_aware", **{f"o.{run}": 1.0 for run in range(3)}})
    plan = SearchSpace(groups, Target(ratio=0.2), search, losses, speed, OFFERS).suggest(trial)
    assert (plan.ranks["slow"] is None) == (weight > 0)


@pytest.mark.parametrize("target", [Target(), Target(max_ppl_increase=0.5)])
def test_without_a_budget_the_best_guess_is_tried_at_several_speedups(target: Target) -> None:
    first = space(target).first_trials()
    plans = {name: space(target).suggest(optuna.trial.FixedTrial(parameters)) for name, parameters in first.items()}
    for name, plan in plans.items():
        asked = float(name.split()[1].removesuffix("x"))
        assert asked - 0.001 <= SPEED.speedup(plan) < asked * 1.05
    assert {name.split()[0] for name in first} == {"loss_aware", "probed", "uniform"}
    assert sum(name.startswith("loss_aware") for name in first) == (6 if target.front else 3)
    fastest = max(first.values(), key=lambda row: row["speedup"])["speedup"] ** (1 if target.front else 4 / 3)
    best = space(target).fit.cheapest_loss(LOSSES["loss_aware"], SPEED.budget(fastest))
    lost = sum(LOSSES["loss_aware"][name][level] for name, level in best.levels.items())
    assert lost == pytest.approx(1.25 * limit_of(target), rel=0.2)


def test_every_plan_meets_the_budget() -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(30):
        assert SPEED.speedup(space(Target(min_speedup=1.2)).suggest(study.ask())) >= 1.2
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(30):
        assert 0.3 <= space(Target(ratio=0.3)).suggest(study.ask()).ratio(GROUPS) < 0.36


def test_a_model_that_compression_only_slows_down_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    latencies = {shape: dict.fromkeys(row, 50.0 if shape.rank is None else 60.0) for shape, row in LATENCIES.items()}
    slow = SpeedModel(GROUPS, WORKLOADS, {"chat": 0.5, "decode": 0.1}, latencies, OFFERS)
    with pytest.raises(InfeasibleTargetError, match="compression makes this model slower here"):
        SearchSpace(GROUPS, Target(), Search(), LOSSES, slow, OFFERS)


def test_infeasible_targets_are_refused_at_once() -> None:
    with pytest.raises(InfeasibleTargetError, match="out of reach"):
        space(Target(min_speedup=50))
    with pytest.raises(InfeasibleTargetError, match="smallest levels"):
        space(Target(ratio=0.99))


def test_a_unit_that_cannot_have_a_precision_is_not_rounded() -> None:
    mixture = Mixture("mixture", "experts", 0, ("experts",), (32,), 64, experts=4, active=2)
    offers = Offers(16, "narrow", ("int8",))
    latencies = {shape: {1: 1.0 * shape.experts * shape.m} for shape in shapes_to_measure([mixture], offers)}
    workloads = {"only": Workload(prompt_tokens=1, output_tokens=100, concurrency=1)}
    speed = SpeedModel([mixture], workloads, {"only": 0.1}, latencies, offers)
    errors = torch.cat([torch.linspace(1, 0, 5), torch.linspace(1, 0, 65)]).double()
    losses = {"probed": by_level([mixture], {"mixture": offers.levels(mixture)}, {"mixture": errors}, {})}
    found = SearchSpace([mixture], Target(ratio=0.4), Search(), losses, speed, offers)
    for base in ("probed", "uniform"):
        trial = optuna.trial.FixedTrial({"base": base, "experts.0": 1.0, "experts.0.weights": "int8"})
        plan = found.suggest(trial)
        assert plan.levels["mixture"] in (mixture.fewer(2), mixture.narrower(32)), "the largest of each that the budget allows"
    faster = {shape: {1: row[1] / (2 if shape.experts < 4 else 1)} for shape, row in latencies.items()}
    by_kind = SpeedModel([mixture], workloads, {"only": 0.1}, faster, offers)
    times = [by_kind.cost(mixture, level) for level in (mixture.fewer(2), mixture.narrower(32), DENSE)]
    assert times == pytest.approx([times[2] / 4, times[2] / 2, times[2]])
    assert SpeedModel([mixture], workloads, {"only": 0.1}, dict.fromkeys(latencies), offers).untimed == {"mixture"}
