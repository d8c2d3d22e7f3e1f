"""Level switching: within the budget, never worse than the start, the same after an interruption."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evolution import evolve
from lrserve.allocation.losses import uniform
from lrserve.allocation.plan import BudgetFit, Offers, Plan
from lrserve.compression.groups import Group, Structure
from lrserve.compression.level import Level
from lrserve.errors import InfeasibleTargetError, InputError

SHAPES = [(160, 96), (96, 96), (384, 96), (96, 192)] * 3 + [(4, 4)]
GROUPS = [
    Group(name=f"g{i}", kind="o", layer=i // 4, members=(f"g{i}",), out_features=(m,), in_features=n)
    for i, (m, n) in enumerate(SHAPES)
]
FIT = BudgetFit(GROUPS, Offers(8))
BUDGET = 0.7 * FIT.dense_cost


def seconds(group: Group, level: Level) -> float:
    """A cost that is no integer."""
    return group.parameters(level.rank, "identity_block") * 1.1e-7 + 1e-5


def evaluate(plan: Plan) -> float:
    """A stand-in for the divergence: what a group lost weighs by its depth."""
    return sum((1 + g.layer) ** 2 * (1 - (level.rank or 0) / g.full_rank) ** 2 for g, level in plan.changed(GROUPS))


@settings(max_examples=25, deadline=None)
@given(
    keep=st.floats(0.3, 1.0),
    seed=st.integers(0, 999),
    offspring=st.integers(1, 5),
    structure=st.sampled_from(["identity_block", "low_rank"]),
    speed=st.booleans(),
    stop=st.integers(0, 25),
)
def test_budget_kept_never_worse_and_the_same_when_interrupted(
    keep: float, seed: int, offspring: int, structure: Structure, speed: bool, stop: int
) -> None:
    fit = BudgetFit(GROUPS, Offers(8, structure), seconds if speed else None)
    budget = keep * fit.dense_cost
    start = uniform(fit, budget)
    tried: list[Plan] = []

    def recorded(plan: Plan) -> float:
        tried.append(plan)
        return evaluate(plan)

    def dies(plan: Plan) -> float:
        nonlocal stop
        stop -= 1
        if stop == -1:
            raise KeyboardInterrupt
        return evaluate(plan)

    lowest: list[float] = []
    sizes = {"generations": 5, "offspring": offspring, "seed": seed}
    with TemporaryDirectory() as folder:
        path = Path(folder) / "state.json"
        plan = evolve(fit, start, budget, recorded, path, **sizes, progress=lambda _, best: lowest.append(best))
        try:
            evolve(fit, start, budget, dies, Path(folder) / "cut.json", **sizes)
        except KeyboardInterrupt:
            stop = 1000
        assert evolve(fit, start, budget, dies, Path(folder) / "cut.json", **sizes) == plan
        assert json.loads(path.read_text()) == json.loads((Path(folder) / "cut.json").read_text())
        assert {p.name for p in Path(folder).iterdir()} == {"state.json", "cut.json"}
    for trial in tried:
        assert trial.structure == structure
        cost = sum(seconds(g, trial.levels[g.name]) if speed else g.parameters(trial.ranks[g.name], structure) for g in GROUPS)
        assert cost <= budget * (1 + 1e-11)  # the budget itself is rounded; in parameters this is less than one
    assert len(tried) <= 1 + 5 * offspring
    assert len(lowest) == 6
    assert evaluate(plan) == min(map(evaluate, tried)) == lowest[-1] <= evaluate(start)
    assert lowest == sorted(lowest, reverse=True)


def test_it_moves_rank_to_where_it_counts(tmp_path: Path) -> None:
    start = uniform(FIT, BUDGET)
    plan = evolve(FIT, start, BUDGET, evaluate, tmp_path / "s.json", generations=60, offspring=8, seed=0)
    assert evaluate(plan) < 0.8 * evaluate(start)
    assert plan.parameters(GROUPS) > 0.99 * BUDGET
    assert plan.ranks["g12"] is None  # too small to save


def test_more_generations_go_on_where_fewer_ended(tmp_path: Path) -> None:
    start = uniform(FIT, BUDGET)
    options = {"offspring": 4, "seed": 1}
    whole = evolve(FIT, start, BUDGET, evaluate, tmp_path / "whole.json", generations=9, **options)
    evolve(FIT, start, BUDGET, evaluate, tmp_path / "s.json", generations=4, **options)
    steps: list[int] = []
    more = evolve(
        FIT, start, BUDGET, evaluate, tmp_path / "s.json", generations=9, progress=lambda done, _: steps.append(done), **options
    )
    assert more == whole
    assert steps == [4, 5, 6, 7, 8, 9]


def test_what_is_not_finite_never_wins(tmp_path: Path) -> None:
    start = uniform(FIT, BUDGET)
    tried: list[Plan] = []

    def searched(generations: int, values: list[float]) -> Plan:
        def scripted(plan: Plan) -> float:
            tried.append(plan)
            return values.pop(0)

        return evolve(FIT, start, BUDGET, scripted, tmp_path / "s.json", generations=generations, offspring=2, seed=0)

    nan, inf = float("nan"), float("inf")
    assert searched(1, [nan, inf, nan]) == start
    assert searched(2, [nan, 2.0]) == tried[4]


def test_a_search_without_room_keeps_its_start(tmp_path: Path) -> None:
    dense = uniform(FIT, FIT.dense_cost)
    assert evolve(FIT, dense, FIT.dense_cost, evaluate, tmp_path / "a.json", generations=2, offspring=3, seed=0) == dense
    smallest = FIT.fit({group.name: 1.0 for group in GROUPS}, FIT.smallest_cost)
    assert evolve(FIT, smallest, FIT.smallest_cost, evaluate, tmp_path / "b.json", generations=2, offspring=3, seed=0) == smallest


def test_what_cannot_be_used_is_refused(tmp_path: Path) -> None:
    start = uniform(FIT, BUDGET)
    path = tmp_path / "s.json"
    options = {"generations": 1, "offspring": 2, "seed": 0}
    with pytest.raises(InfeasibleTargetError, match="more than the budget"):
        evolve(FIT, start, 0.5 * BUDGET, evaluate, path, **options)
    with pytest.raises(InputError, match="rank 7 is not among"):
        evolve(FIT, Plan.of_ranks({**start.ranks, "g0": 7}), BUDGET, evaluate, path, **options)
    with pytest.raises(InputError, match="structure"):
        evolve(FIT, Plan.of_ranks(start.ranks, "low_rank"), BUDGET, evaluate, path, **options)
    evolve(FIT, start, BUDGET, evaluate, path, **options)
    with pytest.raises(InputError, match="remove it to start over"):
        evolve(FIT, start, BUDGET, evaluate, path, **{**options, "seed": 1})
    for content in ("nonsense", "[]", '{"format_version": 1}'):
        path.write_text(content)
        with pytest.raises(InputError, match="remove it to start over"):
            evolve(FIT, start, BUDGET, evaluate, path, **options)
