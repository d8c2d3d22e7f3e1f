"""Predicting a plan's speed from measured latencies of single layers.

One run of a workload with P prompt tokens, S output tokens and c requests at once is a prefill of c P tokens (in chunks of at
most `PREFILL_CHUNK`) and S - 1 decode steps of c tokens. The dense model's run is measured as a whole, in T seconds; a plan is
predicted to take T plus, for each group, the difference between its factors' and its dense latency over all those calls.
Everything outside the linear layers is thus measured, not modelled, and the dense plan is predicted exactly. What the engine then
says of whole plans corrects the differences by one factor for each workload (`SpeedModel.corrected`).

Several workloads are a mix: a machine that serves the dense model spends a given share of its time on each. A plan's *relative
time* is what the same requests take it, over the dense model's: the mean over the workloads, weighted by their shares. So
it is additive over groups, and its inverse, the speedup, says how much less machine the same traffic needs.
"""

from __future__ import annotations

import copy
import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from lrserve.allocation.plan import RankPlan, rank_choices
from lrserve.compression.groups import Group, Stored, Structure
from lrserve.recipe import Workload, shares

PREFILL_CHUNK: Final = 4096
"""Most tokens in one forward pass: engines are started with it (`max_num_batched_tokens`)."""
_TABLE_WEIGHTS = 10**9  # dense weights of a group times ranks measured: larger layers are measured at fewer ranks, and interpolated
_FEWEST_RANKS = 12  # but at about so many
_TRUST = 0.05**2  # squared relative change of time at which a measured plan counts as much as the table


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
    """Return every choice or, of large layers, some of them, evenly spread, the smallest and the largest among them.

    Times of large layers are smooth and take long to measure.
    """
    choices = rank_choices(group, step, structure)
    stride = max(1, math.ceil(len(choices) / max(_FEWEST_RANKS, _TABLE_WEIGHTS // group.dense_parameters)))
    return list(dict.fromkeys([*choices[::stride], *choices[-1:]]))


def shapes_to_measure(groups: Sequence[Group], step: int, structure: Structure) -> list[Shape]:
    """List each distinct layer of the dense model, and of its compressed groups at `measured_ranks`."""
    shapes: dict[Shape, None] = {}
    for group in groups:
        for rank in [None, *measured_ranks(group, step, structure)]:
            shapes |= dict.fromkeys(shapes_of(group, rank, structure))
    return list(shapes)


def calls(workload: Workload) -> Counter[int]:
    """Count how often a run passes so many rows of input through every layer: {rows: calls}."""
    rows = workload.concurrency * workload.prompt_tokens
    count: Counter[int] = Counter()
    count[workload.concurrency] += workload.output_tokens - 1
    count[min(rows, PREFILL_CHUNK)] += math.ceil(rows / PREFILL_CHUNK)
    return count


def token_counts(workloads: Mapping[str, Workload]) -> list[int]:
    """Return every number of rows that a layer sees in one of the workloads, ascending."""
    return sorted({rows for workload in workloads.values() for rows in calls(workload)})


def _ascending(times: list[float]) -> list[float]:
    """Return the nearest times of which none is below the one before: more rank is never faster, what the clock says is noise."""
    from scipy.optimize import isotonic_regression

    return isotonic_regression(times).x.tolist() if times else []


class SpeedModel:
    """Predicts the time of any plan of one structure, for a mix of workloads."""

    def __init__(
        self,
        groups: Sequence[Group],
        workloads: Mapping[str, Workload],
        dense_seconds: Mapping[str, float],
        latencies: Mapping[Shape, Mapping[int, float]],
        step: int,
        structure: Structure,
    ) -> None:
        """Take, per workload, the seconds of the measured dense run and, per shape and number of rows, microseconds of one call.

        The table holds `shapes_to_measure` of the same groups, step and structure at `token_counts`.
        """
        self.groups = list(groups)
        self._shares = shares(workloads)
        self._factors = dict.fromkeys(workloads, 1.0)
        # microseconds of a call become relative time of its workload
        self._weights = {
            name: {rows: 1e-6 * number / dense_seconds[name] for rows, number in calls(workload).items()}
            for name, workload in workloads.items()
        }
        self.dense_tokens_per_second = sum(
            self._shares[name] * workload.concurrency * workload.output_tokens / dense_seconds[name]
            for name, workload in workloads.items()
        )
        self._structure: Structure = structure
        self._curves: dict[tuple[bool, tuple[Shape, ...]], tuple[list[int], dict[int, list[float]], dict[int, float]]] = {}
        counts = token_counts(workloads)
        for group in self.groups:
            key = self._key(group)
            if key in self._curves:
                continue

            def microseconds(rank: int | None, rows: int, group: Group = group) -> float:
                return sum(latencies[shape][rows] for shape in shapes_of(group, rank, structure))

            ranks = measured_ranks(group, step, structure)
            columns = {rows: _ascending([microseconds(rank, rows) for rank in ranks]) for rows in counts}
            self._curves[key] = ranks, columns, {rows: microseconds(None, rows) for rows in counts}

    def corrected(self, measured: Sequence[tuple[RankPlan, Mapping[str, float]]]) -> SpeedModel:
        """Return the uncorrected model of the same table with one factor for each workload on all predicted changes of time.

        The least-squares factor through what was measured, drawn towards 1: one plan that changes the time by 5 % counts as
        much as the table.

        Args:
            measured: plans, and for each workload the relative time that the engine found.
        """
        model = copy.copy(self)
        model._factors = dict.fromkeys(self._factors, 1.0)
        predicted = [model.relative_times(plan) for plan, _ in measured]
        factors = {}
        for name in self._factors:
            pairs = [(table[name] - 1, times[name] - 1) for table, (_, times) in zip(predicted, measured, strict=True)]
            products, squares = sum(x * y for x, y in pairs), sum(x * x for x, _ in pairs)
            factors[name] = max((products + _TRUST) / (squares + _TRUST), 0.0)
        model._factors = factors
        return model

    def _key(self, group: Group) -> tuple[bool, tuple[Shape, ...]]:
        return group.ordered, tuple(shapes_of(group, None, self._structure))

    def _microseconds(self, group: Group, rank: int | None, rows: int) -> float:
        ranks, columns, dense = self._curves[self._key(group)]
        if rank is None:
            return dense[rows]
        column, i = columns[rows], bisect_left(ranks, rank)
        if i == len(ranks) or ranks[i] == rank or i == 0:
            return column[min(i, len(ranks) - 1)]
        part = (rank - ranks[i - 1]) / (ranks[i] - ranks[i - 1])
        return column[i - 1] + part * (column[i] - column[i - 1])

    def _time(self, name: str, group: Group, rank: int | None) -> float:
        table = sum(weight * self._microseconds(group, rank, rows) for rows, weight in self._weights[name].items())
        return self._factors[name] * table

    def cost(self, group: Group, rank: int | None) -> float:
        """Predict the group's part of the mix's relative time; a `Cost` for `BudgetFit`."""
        return sum(share * self._time(name, group, rank) for name, share in self._shares.items())

    def relative_times(self, plan: RankPlan) -> dict[str, float]:
        """Predict, for each workload, the plan's time over the dense model's."""
        changed = [(group, rank) for group in self.groups if (rank := plan.ranks[group.name]) is not None]
        return {
            name: max(1 + sum(self._time(name, group, rank) - self._time(name, group, None) for group, rank in changed), 1e-9)
            for name in self._shares
        }

    def speedups(self, plan: RankPlan) -> dict[str, float]:
        """Predict, for each workload, the throughput over the dense model's."""
        return {name: 1 / time for name, time in self.relative_times(plan).items()}

    def speedup(self, plan: RankPlan) -> float:
        """Predict the throughput of the mix over the dense model's."""
        times = self.relative_times(plan)
        return 1 / sum(share * times[name] for name, share in self._shares.items())

    def tokens_per_second(self, plan: RankPlan) -> float:
        """Predict output tokens per second of the mix."""
        return self.dense_tokens_per_second * self.speedup(plan)

    def budget(self, speedup: float) -> float:
        """Return the relative time that all groups together may take for a predicted speedup; may be negative."""
        return sum(self.cost(group, None) for group in self.groups) - (1 - 1 / speedup)
