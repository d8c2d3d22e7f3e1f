"""The papers' allocations: v dense, budgets met by construction, shared shares, the same study after an interruption."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bolaco import bolaco, lord_plan
from lrserve.allocation.plan import Plan
from lrserve.compression.groups import Group, separate
from lrserve.errors import InfeasibleTargetError, InputError

LAYERS = 8
FUSED = [
    Group(name=f"{i}.{kind}", kind=kind, layer=i, members=tuple(f"{i}.{m}_proj" for m in members), out_features=rows, in_features=n)
    for i in range(LAYERS)
    for kind, members, rows, n in (
        ("qkv", ("q", "k", "v"), (96, 48, 48), 96),
        ("o", ("o",), (96,), 96),
        ("gate_up", ("gate", "up"), (192, 192), 96),
        ("down", ("down",), (96,), 192),
    )
]
GROUPS = [single for single, _ in separate(FUSED)]
DENSE = sum(group.dense_parameters for group in GROUPS)


def evaluate(plan: Plan) -> float:
    """A stand-in for the divergence: what a linear lost weighs by its depth."""
    return sum((1 + g.layer) * (1 - (level.rank or 0) / g.full_rank) ** 2 for g, level in plan.changed(GROUPS))


def searched(path: Path, runs: int = 1, trials: int = 12, **options: object) -> Plan:
    settings: dict[str, object] = {"evaluate": evaluate, "seed": 0, **options}
    return bolaco(GROUPS, 0.7 * DENSE, 8, runs, trials, path=path, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("runs", [1, 4])
def test_every_trial_keeps_v_dense_and_meets_the_budget(runs: int, tmp_path: Path) -> None:
    tried: list[Plan] = []

    def recorded(plan: Plan) -> float:
        tried.append(plan)
        return evaluate(plan)

    lowest: list[float] = []
    plan = searched(tmp_path / "s.sqlite3", runs, evaluate=recorded, progress=lambda done, best: lowest.append(best))
    assert len(tried) == len({p.key() for p in tried})
    for trial in tried:
        assert trial.structure == "low_rank"
        assert 0.67 * DENSE < trial.parameters(GROUPS) <= 0.7 * DENSE
        assert all(trial.ranks[g.name] is None for g in GROUPS if g.kind == "v")
    assert list(plan.ranks) == [g.name for g in GROUPS]
    check_shares(tried[-1], runs)
    assert evaluate(plan) == min(map(evaluate, tried)) == lowest[-1]
    assert lowest == sorted(lowest, reverse=True)
    study = optuna.load_study(study_name="bolaco", storage=f"sqlite:///{tmp_path / 's.sqlite3'}")
    assert set(study.trials[0].params) == {f"{kind}.{run}" for kind in ("qk", "o", "gate", "up", "down") for run in range(runs)}


def check_shares(plan: Plan, runs: int) -> None:
    """q and k keep the same ratio, and so do the layers of a run, but for one rank step of rounding."""
    kept: dict[str, list[float]] = {}
    for group in GROUPS:
        run = group.layer * runs // LAYERS
        kind = "qk" if group.kind in "qk" else group.kind
        kept.setdefault(f"{kind}.{run}", []).append(group.parameters(plan.ranks[group.name], "low_rank") / group.dense_parameters)
    widest_step = 0.26  # of k, 48 x 96
    assert all(max(ratios) - min(ratios) <= widest_step for ratios in kept.values())
    assert max(map(max, kept.values())) - min(map(min, kept.values())) > 0.3


def test_the_search_finds_more_than_chance(tmp_path: Path) -> None:
    lowest: list[float] = []
    searched(tmp_path / "s.sqlite3", 1, 20, progress=lambda done, best: lowest.append(best))
    assert lowest[-1] < 0.98 * lowest[9]  # ten trials are random


def test_a_killed_study_resumes_to_the_same_trials(tmp_path: Path) -> None:
    whole: list[Plan] = []
    cut: list[Plan] = []
    searched(tmp_path / "whole.sqlite3", evaluate=lambda plan: whole.append(plan) or evaluate(plan), seed=3)
    dies = {0, 5, 11}

    def fragile(plan: Plan) -> float:
        if len(cut) in dies:
            dies.remove(len(cut))
            raise KeyboardInterrupt
        cut.append(plan)
        return evaluate(plan)

    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            searched(tmp_path / "cut.sqlite3", evaluate=fragile, seed=3)
    searched(tmp_path / "cut.sqlite3", evaluate=fragile, seed=3)
    assert [p.key() for p in cut] == [p.key() for p in whole]
    study = optuna.load_study(study_name="bolaco", storage=f"sqlite:///{tmp_path / 'cut.sqlite3'}")
    assert [t.state.name for t in study.trials].count("FAIL") == 3


def test_what_is_not_finite_never_wins(tmp_path: Path) -> None:
    values = iter([float("nan"), float("inf"), 3.0, float("nan"), 2.0])
    tried: list[Plan] = []
    plan = searched(tmp_path / "s.sqlite3", trials=5, evaluate=lambda p: tried.append(p) or next(values))
    assert plan == tried[4]


@settings(max_examples=60, deadline=None)
@given(keep=st.floats(0.45, 1.0), step=st.sampled_from([1, 4, 8]))
def test_lord_halves_q_and_k_and_solves_for_the_rest(keep: float, step: int) -> None:
    plan = lord_plan(GROUPS, keep * DENSE, step)
    assert plan.structure == "low_rank"
    assert plan.parameters(GROUPS) <= keep * DENSE
    rest: dict[str, set[int | None]] = {}
    for group in GROUPS:
        rank = plan.ranks[group.name]
        if group.kind == "v":
            assert rank is None
        elif group.kind in "qk":
            assert rank is not None
            assert group.parameters(rank, "low_rank") <= 0.5 * group.dense_parameters < group.parameters(rank + step, "low_rank")
        else:
            rest.setdefault(group.kind, set()).add(rank)
    for ranks in rest.values():  # alike, but for what rounding left over
        numbers = {rank for rank in ranks if rank is not None}
        assert not numbers or max(numbers) - min(numbers) <= step


def test_impossible_budgets_and_fused_groups_are_refused(tmp_path: Path) -> None:
    for budget in (0.0, 0.1 * DENSE):
        with pytest.raises(InfeasibleTargetError, match="v is dense"):
            lord_plan(GROUPS, budget, 8)
        with pytest.raises(InfeasibleTargetError, match="v is dense"):
            bolaco(GROUPS, budget, 8, 1, 2, evaluate, tmp_path / "s.sqlite3", seed=0)
    with pytest.raises(InfeasibleTargetError, match="more than half"):
        lord_plan(GROUPS, 0.7 * DENSE, 64)
    with pytest.raises(InputError, match="gate_up, qkv"):
        lord_plan(FUSED, 0.7 * DENSE, 8)
    with pytest.raises(InputError, match="0 runs"):
        searched(tmp_path / "s.sqlite3", 0)
