"""Evolution in bench/search.py: as many evaluations as the other methods have, every plan within its ratio."""

from __future__ import annotations

from pathlib import Path

import torch

from lrserve.allocation.plan import BudgetFit, Offers, Plan
from lrserve.compression.groups import Group
from search import RATIOS, evolve_each, hypervolume

GROUPS = [
    Group(name=f"g{i}", kind="o", layer=i, members=(f"g{i}",), out_features=(96 + 32 * i,), in_features=128) for i in range(8)
]


def test_evolution_evaluates_as_many_plans_as_there_are_trials(tmp_path: Path) -> None:
    fit = BudgetFit(GROUPS, Offers(8, "low_rank"))
    losses = {g.name: torch.linspace(1.0, 0.0, g.full_rank + 1, dtype=torch.float64) * (1 + g.layer) for g in GROUPS}
    tried: list[Plan] = []

    def evaluate(plan: Plan) -> float:
        tried.append(plan)
        return sum((1 + g.layer) * (1 - (plan.ranks[g.name] or g.full_rank) / g.full_rank) for g in GROUPS)

    for trials in (8, 24):
        tried.clear()
        evolve_each(fit, losses, trials, evaluate, tmp_path, seed=0)
        assert len(tried) == trials
        each = trials // len(RATIOS)
        for i, ratio in enumerate(RATIOS):
            own = tried[i * each : (i + 1) * each]
            assert all(plan.ratio(GROUPS) >= ratio - 1e-9 for plan in own)
            assert len({plan.key() for plan in own}) > 1


def test_hypervolume_is_the_dominated_area() -> None:
    from search import REFERENCE

    worst = REFERENCE[0]
    assert hypervolume([]) == 0
    assert hypervolume([(worst / 2, 1.5), (worst / 4, 1.2), (worst / 2, 1.1), (2 * worst, 9.0)]) == (
        worst * 0.75 * (1.2 - 1.0) + worst * 0.5 * (1.5 - 1.2)
    )
