"""Predicting a plan's speed from measured latencies of single layers.

One run of a workload with P prompt tokens, S output tokens and c requests at once is a prefill of c P tokens (in chunks of at
most `PREFILL_CHUNK`) and S - 1 decode steps of c tokens. The dense model's run is measured as a whole, in T seconds; a plan is
predicted to take T plus, for each group, the difference between its factors' and its dense latency over all those calls.
Everything outside the linear layers is thus measured, not modelled, and the dense plan is predicted exactly. What the engine then
says of whole plans corrects times and differences by factors for each workload (`SpeedModel.corrected`).

Several workloads are a mix: a machine that serves the dense model spends a given share of its time on each. A plan's *relative
time* is what the same requests take it, over the dense model's: the mean over the workloads, weighted by their shares. So
it is additive over groups, and its inverse, the speedup, says how much less machine the same traffic needs.
"""

from __future__ import annotations

import copy
import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

from lrserve.allocation.plan import Offers, Plan
from lrserve.compression.groups import Group, Mixture, Stored
from lrserve.compression.level import DENSE, SCHEMES, Level, Precision
from lrserve.recipe import Workload, shares

PREFILL_CHUNK: Final = 4096
"""Most tokens in one forward pass: engines are started with it (`max_num_batched_tokens`)."""
_TABLE_WEIGHTS = 10**9  # dense weights of a group times ranks measured: larger layers are measured at fewer ranks, and interpolated
_FEWEST_RANKS = 12  # but at about so many
_TRUST = 0.05**2  # squared relative change of time at which a measured plan counts as much as the table


@dataclass(frozen=True)
class Shape:
    """A layer to time: n inputs, m outputs, and the rank of its factors (None: dense) and what they are stored as.

    `ordered`: an identity block need not reorder its inputs. `weights`: what its weights are rounded to. `residual`: rank of what
    is added to a dense layer's. `experts`, where it is not 0: of a mixture of so many experts with n inputs and m neurons, of which
    the router chooses `active` for each row.
    """

    n: int
    m: int
    rank: int | None
    structure: Stored = "low_rank"
    ordered: bool = False
    weights: Precision | None = None
    residual: int = 0
    experts: int = 0
    active: int = 0


def shapes_of(group: Group, level: Level, offers: Offers) -> list[Shape]:
    """List the layers that multiply for a unit: its own, and those of an MLP that is allocated as one.

    An MLP with fewer neurons is dense layers of other sizes.
    """
    if isinstance(group, Mixture):
        experts, width = group.sizes(level)
        return [Shape(group.m, width, None, "experts", experts=experts, active=group.active)]
    rank, shape = level.rank, partial(Shape, weights=level.weights, residual=level.residual)
    if group.fed_by:
        kept = group.n if rank is None else rank
        return [shape(kept, group.m, None), shape(group.fed_by.n, group.fed_by.rows_per_neuron * kept, None)]
    if rank is None:
        return [shape(group.n, group.m, None)]
    return [shape(group.n, group.m, rank, group.stored_as(offers.structure), group.ordered)]


def measured_levels(group: Group, offers: Offers) -> list[Level]:
    """Return the levels of a unit that are timed: of each precision every rank or, of large layers, some, evenly spread; and dense.

    Times of large layers are smooth and take long to measure. Residuals are timed beside dense weights, and take as long beside
    fewer.
    """
    levels = offers.levels(group)
    if isinstance(group, Mixture):
        return levels
    found: list[Level] = []
    for weights in (*offers.precisions, None):
        own = [level for level in levels if level.weights == weights]
        ranks = [level for level in own if level.rank is not None and not level.residual]
        most = _FEWEST_RANKS if weights else max(_FEWEST_RANKS, _TABLE_WEIGHTS // group.dense_parameters)
        stride = max(1, math.ceil(len(ranks) / most))
        found += dict.fromkeys([*ranks[::stride], *ranks[-1:]])
        found += [level for level in own if level.rank is None]
    return found


def output_layers(shape: tuple[int, int], offers: Offers) -> list[Shape]:
    """List the output layer (m, n) dense and rounded, if it may be rounded."""
    m, n = shape
    return [Shape(n, m, None), Shape(n, m, None, weights=offers.embedding)] if offers.embedding else []


def shapes_to_measure(groups: Sequence[Group], offers: Offers, output_layer: tuple[int, int] | None = None) -> list[Shape]:
    """List each distinct layer of the units at `measured_levels`, and the output layer (m, n) where it may be rounded."""
    shapes = [shape for group in groups for level in measured_levels(group, offers) for shape in shapes_of(group, level, offers)]
    return list(dict.fromkeys([*shapes, *(output_layers(output_layer, offers) if output_layer else [])]))


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


@dataclass(frozen=True)
class _Curve:
    """Microseconds of one precision by number of rows: at ascending ranks, at the dense structure, and what each residual adds."""

    ranks: list[int]
    by_rank: dict[int, list[float]]
    dense: dict[int, float]
    residuals: dict[int, dict[int, float]]

    def microseconds(self, level: Level, rows: int) -> float:
        extra = self.residuals[level.residual][rows] if level.residual else 0.0
        rank, ranks, column = level.rank, self.ranks, self.by_rank[rows]
        if rank is None:
            return self.dense[rows] + extra
        i = bisect_left(ranks, rank)
        if i == len(ranks) or ranks[i] == rank or i == 0:
            return column[min(i, len(ranks) - 1)] + extra
        part = (rank - ranks[i - 1]) / (ranks[i] - ranks[i - 1])
        return column[i - 1] + part * (column[i] - column[i - 1]) + extra


_CurveKind = tuple[Precision | None, bool]
"""What the levels of one curve have in common: a precision, and whether experts are removed."""
_Key = tuple[bool, tuple[Shape, ...], _CurveKind]


def _curve_kind(level: Level) -> _CurveKind:
    return level.weights, bool(level.experts)


def _curves_of(group: Group, precisions: Sequence[Precision]) -> list[_CurveKind]:
    if isinstance(group, Mixture):
        return [(None, False), (None, True)]
    return [(weights, False) for weights in (None, *precisions)]


class SpeedModel:
    """Predicts the time of any plan of the offered levels, for a mix of workloads."""

    def __init__(
        self,
        groups: Sequence[Group],
        workloads: Mapping[str, Workload],
        dense_seconds: Mapping[str, float],
        latencies: Mapping[Shape, Mapping[int, float] | None],
        offers: Offers,
        output_layer: tuple[int, int] | None = None,
    ) -> None:
        """Take, per workload, the seconds of the measured dense run and, per shape and number of rows, microseconds of one call.

        The table holds `shapes_to_measure` of the same groups, offers and output layer (m, n) at `token_counts`; None is a layer
        that the engine cannot run. `offers` then has the precisions of which it can run every layer that was timed. A unit of
        which a time is not finite, and a mixture that the engine cannot run, stay dense and are among the `untimed`. The output
        layer stays dense as well if its time is not finite.
        """
        self.groups = list(groups)
        self._shares = shares(workloads)
        self._factors = dict.fromkeys(workloads, 1.0)
        self._rounded: dict[str, dict[Precision, float]] = {name: {} for name in workloads}
        # microseconds of a call become relative time of its workload
        self._weights = {
            name: {rows: 1e-6 * number / dense_seconds[name] for rows, number in calls(workload).items()}
            for name, workload in workloads.items()
        }
        # the output layer computes for the last token of each request alone: rows, and microseconds to relative time
        self._output_passes = {
            name: (workload.concurrency, 1e-6 * workload.output_tokens / dense_seconds[name])
            for name, workload in workloads.items()
        }
        self.dense_tokens_per_second = sum(
            self._shares[name] * workload.concurrency * workload.output_tokens / dense_seconds[name]
            for name, workload in workloads.items()
        )
        runnable = [p for p in offers.precisions if all(us is not None for shape, us in latencies.items() if shape.weights == p)]
        self.offers = replace(offers, precisions=tuple(runnable))
        timed = {
            shape for shape, us in latencies.items() if (shape.weights if us is None else all(map(math.isfinite, us.values())))
        }
        if output_layer and not timed.issuperset(output_layers(output_layer, offers)):
            self.offers = replace(self.offers, embedding=None)
        self.untimed = frozenset(group.name for group in self.groups if not timed.issuperset(self._shapes(group)))
        self.offers = replace(self.offers, dense=self.offers.dense | self.untimed)
        self._output_change = {name: self._output_layer(name, latencies, output_layer) for name in workloads}
        self._curves: dict[_Key, _Curve] = {}
        for group in self.groups:
            for kind in _curves_of(group, runnable) if group.name not in self.untimed else ():
                if (key := self._key(group, kind)) not in self._curves:
                    self._curves[key] = self._curve(group, kind, latencies, token_counts(workloads))

    def _shapes(self, group: Group) -> set[Shape]:
        return {shape for level in measured_levels(group, self.offers) for shape in shapes_of(group, level, self.offers)}

    def _curve(
        self,
        group: Group,
        kind: _CurveKind,
        latencies: Mapping[Shape, Mapping[int, float] | None],
        counts: Sequence[int],
    ) -> _Curve:
        weights, removes = kind
        levels = [level for level in measured_levels(group, self.offers) if level.weights == weights]
        levels = [level for level in levels if level.rank is None or bool(level.experts) == removes]
        factors = sorted((level for level in levels if level.rank is not None), key=lambda level: level.rank or 0)

        def microseconds(level: Level, rows: int) -> float:
            return sum((latencies[shape] or {})[rows] for shape in shapes_of(group, level, self.offers))

        whole = Level(weights=weights)
        dense = {rows: microseconds(whole, rows) for rows in counts} if whole in levels else {}
        return _Curve(
            [level.rank for level in factors if level.rank is not None],
            {rows: _ascending([microseconds(level, rows) for level in factors]) for rows in counts},
            dense,
            {
                level.residual: {rows: max(microseconds(level, rows) - dense[rows], 0.0) for rows in counts}
                for level in levels
                if level.residual
            },
        )

    def _output_layer(
        self, name: str, latencies: Mapping[Shape, Mapping[int, float] | None], shape: tuple[int, int] | None
    ) -> float:
        """Return the relative time that the output layer takes beyond dense in every plan."""
        if shape is None or self.offers.embedding is None:
            return 0.0
        dense, rounded = (latencies[layer] or {} for layer in output_layers(shape, self.offers))
        rows, passes = self._output_passes[name]
        return passes * (rounded[rows] - dense[rows])

    def keeping_dense(self, names: Collection[str]) -> SpeedModel:
        """Return the model that offers these units nothing else."""
        model = copy.copy(self)
        model.offers = replace(self.offers, dense=self.offers.dense.union(names))
        return model

    def without_what_never_pays(self) -> SpeedModel:
        """Return the model that offers no precision that has fewer bits than another one and is nowhere faster."""
        left: list[Precision] = []
        for weights in sorted(self.offers.precisions, key=lambda p: (-SCHEMES[p].bits, SCHEMES[p].group or math.inf)):
            rivals = [p for p in left if SCHEMES[p].bits > SCHEMES[weights].bits]
            if any(self._faster(group, weights, rivals) for group in self.groups):
                left.append(weights)
        model = copy.copy(self)
        model.offers = replace(self.offers, precisions=tuple(p for p in self.offers.precisions if p in left))
        return model

    def _faster(self, group: Group, weights: Precision, rivals: Sequence[Precision]) -> bool:
        """Whether a unit is faster in a precision than dense, and than in all rivals that it can have."""
        levels = set(self.offers.levels(group))
        whole = Level(weights=weights)
        others = [DENSE, *(level for p in rivals if (level := Level(weights=p)) in levels)]
        return whole in levels and self.cost(group, whole) < min(self.cost(group, level) for level in others)

    def corrected(self, measured: Sequence[tuple[Plan, Mapping[str, float]]]) -> SpeedModel:
        """Return the uncorrected model of the same table with factors, for each workload, on what it predicts.

        One on the times of each precision, from the plan that rounds most units to it and removes nothing: layers are timed one by
        one, and an engine that compiles the model starts them at another cost. And one on the changes of time by ranks, the
        least-squares factor through all plans, drawn towards 1: one plan that changes the time by 5 % counts as much as the table.

        Args:
            measured: plans, and for each workload the relative time that the engine found. Those that are not finite say nothing.
        """
        measured = [(plan, times) for plan, times in measured if all(map(math.isfinite, times.values()))]
        model = copy.copy(self)
        model._factors = dict.fromkeys(self._factors, 1.0)
        model._rounded = {name: self._rounded_factors(name, measured) for name in self._factors}
        for name in self._factors:
            pairs = []
            for plan, times in measured:
                kept = sum(
                    model._change(name, group, Level(None, level.weights, level.residual))
                    for group, level in plan.changed(self.groups)
                )
                whole = sum(model._change(name, group, level) for group, level in plan.changed(self.groups))
                pairs.append((whole - kept, times[name] - 1 - self._output_change[name] - kept))
            products, squares = sum(x * y for x, y in pairs), sum(x * x for x, _ in pairs)
            model._factors[name] = max((products + _TRUST) / (squares + _TRUST), 0.0)
        return model

    def _rounded_factors(self, name: str, measured: Sequence[tuple[Plan, Mapping[str, float]]]) -> dict[Precision, float]:
        """Return the factors on a workload's times of each precision that a plan was measured in alone."""
        factors: dict[Precision, float] = {}
        for precision in self.offers.precisions:
            alone = [
                (changed, times[name])
                for plan, times in measured
                if (changed := plan.changed(self.groups)) and {level for _, level in changed} == {Level(weights=precision)}
            ]
            if alone:
                changed, time = max(alone, key=lambda found: len(found[0]))
                before, after = (sum(self._table(name, group, to) for group, _ in changed) for to in (DENSE, changed[0][1]))
                factors[precision] = max(time - 1 - self._output_change[name] + before, _TRUST) / after
        return factors

    def _key(self, group: Group, kind: _CurveKind) -> _Key:
        return group.ordered, tuple(shapes_of(group, DENSE, self.offers)), kind

    def _table(self, name: str, group: Group, level: Level) -> float:
        if group.name in self.untimed:
            return 0.0  # it stays dense in every plan, and only changes count
        curve = self._curves[self._key(group, _curve_kind(level))]
        return sum(weight * curve.microseconds(level, rows) for rows, weight in self._weights[name].items())

    def _change(self, name: str, group: Group, level: Level) -> float:
        """Predict the relative time that a unit takes beyond dense."""
        whole = Level(weights=level.weights)
        rounded = self._rounded[name].get(level.weights, 1.0) if level.weights else 1.0
        kept = rounded * self._table(name, group, whole) - self._table(name, group, DENSE) if level.weights else 0.0
        if level == whole:
            return kept
        return kept + self._factors[name] * rounded * (self._table(name, group, level) - self._table(name, group, whole))

    def cost(self, group: Group, level: Level) -> float:
        """Predict the unit's part of the mix's relative time; a `Cost` for `BudgetFit`."""
        return sum(
            share * (self._table(name, group, DENSE) + self._change(name, group, level)) for name, share in self._shares.items()
        )

    def relative_times(self, plan: Plan) -> dict[str, float]:
        """Predict, for each workload, the plan's time over the dense model's."""
        changed = plan.changed(self.groups)

        def time(name: str) -> float:
            own = self._output_change[name] if plan.embedding else 0.0
            return max(1 + own + sum(self._change(name, group, level) for group, level in changed), 1e-9)

        return {name: time(name) for name in self._shares}

    def speedups(self, plan: Plan) -> dict[str, float]:
        """Predict, for each workload, the throughput over the dense model's."""
        return {name: 1 / time for name, time in self.relative_times(plan).items()}

    def speedup(self, plan: Plan) -> float:
        """Predict the throughput of the mix over the dense model's."""
        times = self.relative_times(plan)
        return 1 / sum(share * times[name] for name, share in self._shares.items())

    def tokens_per_second(self, plan: Plan) -> float:
        """Predict output tokens per second of the mix."""
        return self.dense_tokens_per_second * self.speedup(plan)

    def budget(self, speedup: float) -> float:
        """Return the relative time that all groups together may take for a predicted speedup; may be negative."""
        output_layer = sum(share * self._output_change[name] for name, share in self._shares.items())
        return sum(self.cost(group, DENSE) for group in self.groups) - (1 - 1 / speedup) - output_layer
