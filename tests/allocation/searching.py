"""A small search: groups, losses, latencies and a smooth stand-in for perplexity."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from lrserve.allocation.goal import Goal
from lrserve.allocation.losses import by_level
from lrserve.allocation.plan import Offers, Plan
from lrserve.allocation.quality import Judgement
from lrserve.allocation.space import SearchSpace
from lrserve.allocation.speed import Shape, SpeedModel
from lrserve.compression.groups import KINDS, Group
from lrserve.recipe import Search, Target, Workload

GROUPS = [
    Group(name=f"{layer}.{kind}", kind=kind, layer=layer, members=(f"{layer}.{kind}",), out_features=(256,), in_features=256)
    for layer in range(4)
    for kind in KINDS
]
TAILS = torch.linspace(1, 0, 257, dtype=torch.float64) ** 2
SENSITIVITIES = {group.name: 1.0 + group.layer for group in GROUPS}
OFFERS = Offers(16, "low_rank")
LEVELS = {group.name: OFFERS.levels(group) for group in GROUPS}
LOSSES = {
    "loss_aware": by_level(GROUPS, LEVELS, {name: TAILS * sensitivity / 10 for name, sensitivity in SENSITIVITIES.items()}, {}),
    "probed": by_level(GROUPS, LEVELS, {group.name: TAILS for group in GROUPS}, {}),
}
WORKLOADS = {
    "chat": Workload(prompt_tokens=64, output_tokens=101, concurrency=4),
    "decode": Workload(prompt_tokens=4, output_tokens=51, concurrency=1, share=0.5),
}
LATENCIES = {Shape(256, 256, None): {1: 60.0, 4: 100.0, 256: 3000.0}} | {
    Shape(256, 256, r, ordered=ordered): {1: 6.0 + r, 4: 10.0 + r, 256: 100.0 + 20 * r}
    for r in range(16, 128, 16)
    for ordered in (False, True)
}
SPEED = SpeedModel(GROUPS, WORKLOADS, {"chat": 0.5, "decode": 0.1}, LATENCIES, OFFERS)
SETTINGS = Search(trials=9, depth_groups=2)


def perplexity(plan: Plan) -> float:
    """Each group's error weighs by its depth."""
    return 10 + sum(SENSITIVITIES[n] * float(TAILS[r]) for n, r in plan.ranks.items() if r is not None)


def evaluate(plan: Plan, rivals: Sequence[Sequence[float]] = ()) -> Judgement:
    """Judge a plan on one window."""
    found = perplexity(plan)
    return Judgement(found, (math.log(found),), seconds={"forward": 0.25})


def space(target: Target) -> SearchSpace:
    """Return the space."""
    return SearchSpace(GROUPS, target, SETTINGS, LOSSES, SPEED, OFFERS)


def goal(target: Target, dense: float = 10.0) -> Goal:
    """Return what is optimised."""
    return Goal(target, 1.0, dense)
