"""Predicting a plan's speed from measured latencies of single layers.

One run of a workload with P prompt tokens, S output tokens and c requests at once is a prefill of c P tokens (in chunks of at
most `_PREFILL_CHUNK`) and S - 1 decode steps of c tokens. The dense model's run is measured as a whole, in T seconds; a plan is
predicted to take T plus, for each group, the difference between its factors' and its dense latency over all those calls.
Everything outside the linear layers is thus measured, not modelled, and the dense plan is predicted exactly.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from lrserve.allocation.plan import RankPlan, rank_choices
from lrserve.compression.groups import Group, Stored, Structure
from lrserve.recipe import Workload

_PREFILL_CHUNK = 4096
_TABLE_RANKS = 12  # ranks measured per shape; between them latency is interpolated


@dataclass(frozen=True)
class Shape:
    """A layer to time: n inputs, m outputs, and the rank of its factors (None: dense) and what they are stored as.

    `ordered`: an identity block need not reorder its inputs.
    """

    n: int
    m: int
    rank: int | None
    structure: Stored = "low_rank"
    ordered: bool = False


def shapes_of(group: Group, rank: int | None, structure: Structure) -> list[Shape]:
    """List the layers that multiply for a group: its own, and those of an MLP that is allocated as one.

    An MLP with fewer neurons is dense layers of other sizes.
    """
    if group.fed_by:
        kept = group.n if rank is None else rank
        return [Shape(kept, group.m, None), Shape(group.fed_by.n, len(group.fed_by.members) * kept, None)]
    if rank is None:
        return [Shape(group.n, group.m, None)]
    return [Shape(group.n, group.m, rank, group.stored_as(structure), group.ordered)]


def measured_ranks(group: Group, step: int, structure: Structure) -> list[int]:
    """Return about a dozen ranks spread over the choices, the smallest and the largest among them."""
    choices = rank_choices(group, step, structure)
    stride = max(1, math.ceil(len(choices) / _TABLE_RANKS))
    return list(dict.fromkeys([*choices[::stride], *choices[-1:]]))


def shapes_to_measure(groups: Sequence[Group], step: int, structure: Structure) -> list[Shape]:
    """List each distinct layer of the dense model, and of its compressed groups at `measured_ranks`."""
    shapes: dict[Shape, None] = {}
    for group in groups:
        for rank in [None, *measured_ranks(group, step, structure)]:
            shapes |= dict.fromkeys(shapes_of(group, rank, structure))
    return list(shapes)


def token_counts(workload: Workload) -> tuple[int, int]:
    """Return the rows of input that a layer sees in a decode step and in a prefill chunk."""
    return workload.concurrency, min(workload.concurrency * workload.prompt_tokens, _PREFILL_CHUNK)


class SpeedModel:
    """Predicts output tokens per second of any plan of one structure, for one workload."""

    def __init__(
        self,
        groups: Sequence[Group],
        workload: Workload,
        dense_seconds: float,
        latencies: Mapping[Shape, tuple[float, float]],
        step: int,
        structure: Structure,
    ) -> None:
        """Take the measured dense run and, per shape, the microseconds of one decode step and of one prefill chunk.

        The table holds `shapes_to_measure` of the same groups, step and structure.
        """
        self.groups = list(groups)
        self.workload = workload
        self.dense_seconds = dense_seconds
        chunks = math.ceil(workload.concurrency * workload.prompt_tokens / _PREFILL_CHUNK)

        def seconds(group: Group, rank: int | None) -> float:
            rows = [latencies[shape] for shape in shapes_of(group, rank, structure)]
            return sum(1e-6 * ((workload.output_tokens - 1) * decode + chunks * prefill) for decode, prefill in rows)

        self._structure: Structure = structure
        self._curves: dict[tuple[bool, tuple[Shape, ...]], tuple[list[int], list[float], float]] = {}
        for group in self.groups:
            key = self._key(group)
            if key not in self._curves:
                ranks = measured_ranks(group, step, structure)
                # more rank is never faster: what the clock says against that is noise
                column = list(accumulate((seconds(group, rank) for rank in ranks), max))
                self._curves[key] = ranks, column, seconds(group, None)

    def _key(self, group: Group) -> tuple[bool, tuple[Shape, ...]]:
        return group.ordered, tuple(shapes_of(group, None, self._structure))

    def cost(self, group: Group, rank: int | None) -> float:
        """Predicted seconds that the group's layers take over the whole run; a `Cost` for `BudgetFit`."""
        ranks, seconds, dense = self._curves[self._key(group)]
        if rank is None:
            return dense
        i = bisect_left(ranks, rank)
        if i == len(ranks) or ranks[i] == rank or i == 0:
            return seconds[min(i, len(ranks) - 1)]
        part = (rank - ranks[i - 1]) / (ranks[i] - ranks[i - 1])
        return seconds[i - 1] + part * (seconds[i] - seconds[i - 1])

    def seconds(self, plan: RankPlan) -> float:
        """Predict the run's wall-clock seconds."""
        change = sum(self.cost(g, rank) - self.cost(g, None) for g in self.groups if (rank := plan.ranks[g.name]) is not None)
        return max(self.dense_seconds + change, 1e-9)

    def tokens_per_second(self, plan: RankPlan) -> float:
        """Predict output tokens per second."""
        return self.workload.concurrency * self.workload.output_tokens / self.seconds(plan)

    def speedup(self, plan: RankPlan) -> float:
        """Predict the throughput over the dense model's."""
        return self.dense_seconds / self.seconds(plan)

    def budget(self, speedup: float) -> float:
        """Return the seconds that all groups together may take for a predicted speedup; may be negative."""
        return sum(self.cost(group, None) for group in self.groups) - self.dense_seconds * (1 - 1 / speedup)
