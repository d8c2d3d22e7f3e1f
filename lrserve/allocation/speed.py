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

from lrserve.allocation.plan import RankPlan, rank_choices
from lrserve.compression.groups import Group, Structure
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
    structure: Structure = "low_rank"
    ordered: bool = False


def shapes_to_measure(groups: Sequence[Group], step: int, structure: Structure) -> list[Shape]:
    """List each distinct dense shape, and its factors of one structure at about a dozen ranks spread over the choices."""
    shapes: dict[Shape, None] = {}
    for group in groups:
        choices = rank_choices(group, step, structure)
        shapes[Shape(group.n, group.m, None)] = None
        stride = max(1, math.ceil(len(choices) / _TABLE_RANKS))
        for rank in [*choices[::stride], *choices[-1:]]:
            shapes[Shape(group.n, group.m, rank, structure, group.ordered)] = None
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
    ) -> None:
        """Take the measured dense run and, per shape, the microseconds of one decode step and of one prefill chunk.

        All factors in the table have one structure: that of the plans to be predicted.
        """
        self.groups = list(groups)
        self.workload = workload
        self.dense_seconds = dense_seconds
        self._ranks: dict[tuple[int, int, bool], list[int]] = {}
        self._seconds: dict[tuple[int, int, bool], list[float]] = {}
        self._dense: dict[tuple[int, int], float] = {}
        chunks = math.ceil(workload.concurrency * workload.prompt_tokens / _PREFILL_CHUNK)
        for shape, (decode, prefill) in sorted(latencies.items(), key=lambda item: item[0].rank or 0):
            seconds = 1e-6 * ((workload.output_tokens - 1) * decode + chunks * prefill)
            if shape.rank is None:
                self._dense[shape.n, shape.m] = seconds
                continue
            key = (shape.n, shape.m, shape.ordered)
            self._ranks.setdefault(key, []).append(shape.rank)
            column = self._seconds.setdefault(key, [])
            # more rank is never faster: what the clock says against that is noise
            column.append(max(seconds, column[-1]) if column else seconds)

    def cost(self, group: Group, rank: int | None) -> float:
        """Predicted seconds that the group's layer takes over the whole run; a `Cost` for `BudgetFit`."""
        if rank is None:
            return self._dense[group.n, group.m]
        key = (group.n, group.m, group.ordered)
        ranks, seconds = self._ranks[key], self._seconds[key]
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
