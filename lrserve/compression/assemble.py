"""Putting a plan into a model: as the layers that are exported, or merged into dense weights to judge many plans."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import nn

from lrserve.compression.experts import ExpertSource, keep_mixtures
from lrserve.compression.factorize import Factors, FactorSource
from lrserve.compression.filed import IN_MEMORY, Filed
from lrserve.compression.groups import Group, Mixture, Structure
from lrserve.compression.layers import LowRankLinear, exact_names
from lrserve.compression.level import DENSE, SCHEMES, Level, Precision
from lrserve.compression.lowrank import (
    install_low_rank,
    keep_outputs,
    load_factors,
    load_feeding,
    load_residual,
    load_rounded,
    reorder_outputs,
    rows_of_neurons,
)
from lrserve.compression.quantize import Rounded, inputs_in_units, round_to_nearest
from lrserve.compression.rounding import Rounding, rounds_inputs
from lrserve.compression.smoothing import fold, foldable, smoothing, value_heads
from lrserve.compression.spec import specs_of
from lrserve.compression.spectra import SpectrumStore, stacked_weight
from lrserve.compression.structure import structured


class PlanSource(FactorSource, ExpertSource, Protocol):
    """Where all comes from that a plan puts into a model."""


@torch.no_grad()
def compress_model(
    model: Any,
    changed: Sequence[tuple[Group, Level]],
    structure: Structure,
    source: PlanSource,
    dtype: torch.dtype,
    rounding: Rounding | None = None,
    filed: Filed = IN_MEMORY,
) -> Any:
    """Put compressed layers in the place of a dense model's linears and return the model.

    Every parameter, dense ones included, is rounded to `dtype`, in which it will be stored; the model keeps its own, wider dtype.
    Then weights are rounded to fewer bits where their level says so: after the structure is in place, and before they are repaired.

    Args:
        model: the dense model.
        changed: the units that a plan changes, and their levels.
        structure: of the plan.
        source: gives the factors of the units that have a rank, and the experts that mixtures keep.
        dtype: of what is not rounded to fewer bits.
        rounding: rounds weights; needed where a level says so.
        filed: where the new weights are.
    """
    keep_mixtures(model, changed, source, filed)
    changed = [(unit, level) for unit, level in changed if not isinstance(unit, Mixture)]
    ranks = [(unit, level.rank) for unit, level in changed if level.rank is not None]
    specs, orders, kept = specs_of([(unit, Level(rank)) for unit, rank in ranks], structure), [], {}
    kept_rows: dict[str, torch.Tensor] = {}
    install_low_rank(model, specs)
    for unit, rank in ranks:
        factors = structured(source.cut(unit.name, rank), unit.stored_as(structure))
        load_factors(model, unit, factors, dtype)
        if specs[unit.name].ordered and factors.order is not None:
            orders.append((unit, factors.order))
        if unit.fed_by and factors.order is not None:
            kept[unit.name] = factors.order.long()
            kept_rows[unit.fed_by.name] = rows_of(unit.fed_by, factors.order)
            keep_outputs(model, unit.fed_by, factors.order)
            if factors.feeding is not None:
                load_feeding(model, unit.fed_by, factors.feeding, dtype)
        filed.modules(_modules(model, unit))
    for unit, order in orders:  # now that the factors of the layers before are in place
        reorder_outputs(model, unit, order)
    round_parameters(model, dtype)
    if rounding is not None:
        _round_weights(model, changed, rounding, kept, kept_rows, filed)
    return model


def _round_weights(
    model: Any,
    changed: Sequence[tuple[Group, Level]],
    rounding: Rounding,
    kept: Mapping[str, torch.Tensor],
    kept_rows: Mapping[str, torch.Tensor],
    filed: Filed,
) -> None:
    """Round the weights of a model whose structure is in place.

    Where neurons were removed, `kept` are the inputs that a group still reads, and `kept_rows` the outputs that it still gives.
    """
    scales: dict[str, torch.Tensor] = {}
    for unit, level in changed:
        for group in parts(unit) if rounds_inputs(level) else ():
            if foldable(model, group):
                W = next(iter(_matrices(model, group).values()))
                scales[group.name] = _input_scales(model, group, W, rounding, kept.get(group.name))
                fold(model, group, scales[group.name])
    for unit, level in changed:
        for group in parts(unit) if level.weights is not None else ():
            assert level.weights is not None
            matrices, inputs = _matrices(model, group), kept.get(group.name)
            for name, W in matrices.items():
                if len(matrices) > 1:  # factors
                    load_rounded(model, group, name, round_to_nearest(W, level.weights, rounding.dtype))
                    continue
                found = rounding(group, W, level, inputs=inputs, outputs=kept_rows.get(group.name), scales=scales.get(group.name))
                load_rounded(model, group, name, found.weight)
                if found.residual is not None:
                    load_residual(model, group, found.residual)
        if level.weights is not None:
            filed.modules(_modules(model, unit))


def _modules(model: Any, unit: Group) -> Iterator[nn.Module]:
    """Yield what a unit is made of, and what its members share, which has the name of the group."""
    for group in parts(unit):
        yield from map(model.get_submodule, group.members)
        parent, _, leaf = group.name.rpartition(".")
        if (shared := getattr(model.get_submodule(parent), leaf, None)) is not None:
            yield shared


def _input_scales(
    model: Any, group: Group, W: torch.Tensor, rounding: Rounding, inputs: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the scales that move from a group's inputs, those that are left of them, to W (m, k), which reads them."""
    return smoothing(rounding.sizes(group, inputs), W, value_heads(model, group))


def _matrices(model: Any, group: Group) -> dict[Literal["weight", "A", "B"], torch.Tensor]:
    """Return what a group's inputs are multiplied by, first things first: its stacked weight, or A (or T) and B, float32."""
    layers = [model.get_submodule(member) for member in group.members]
    if not isinstance(layers[0], LowRankLinear):
        return {"weight": stacked_weight(model, group)[0].float()}
    B = torch.cat([layer.B.weight for layer in layers]).float()
    return {"B": B} if layers[0].first is None else {"A": layers[0].first.weight.float(), "B": B}


@torch.no_grad()
def round_parameters(model: Any, dtype: torch.dtype) -> Any:
    """Round every parameter to `dtype`, but for float32 scales, and return the model, whose own, wider dtype stays."""
    exact = exact_names(model)
    for name, parameter in model.named_parameters():
        if name not in exact and parameter.dtype != dtype:  # what is mapped from a file would be copied into memory
            parameter.copy_(parameter.to(dtype))
    return model


class MergedLevels:
    """A dense model whose weights are rewritten in place to what a plan stands for, to judge many plans without rebuilding it.

    Only the units whose level changed are rewritten; the dense weights are kept aside. Inputs are rounded as the engine does it.
    Differs from the layers that are exported by the rounding of merged weights to the model's dtype and, for factors of 8 bits, by
    what rounding the inputs of the second one costs.

    Memory: the weights of the units that are not dense, where `filed` puts them. What was rounded is kept for the next plan, a byte
    for each weight and precision, in files of the folder `scratch` if there is one.
    """

    def __init__(
        self,
        model: Any,
        units: Sequence[Group],
        store: SpectrumStore,
        rounding: Rounding | None = None,
        scratch: Path | None = None,
        filed: Filed = IN_MEMORY,
    ) -> None:
        self.model, self._filed, self._rounded_in = model, filed, Filed(scratch)
        self._units = {unit.name: unit for unit in units}
        self._store, self._rounding = store, rounding
        self._levels = dict.fromkeys(self._units, DENSE)
        self._hooks: dict[str, list[Any]] = {name: [] for name in self._units}
        self._rounded: dict[tuple[str, Precision], tuple[Rounded, torch.Tensor | None]] = {}
        """Of whole groups, without residuals: their weights, and the scales of their inputs."""
        self._own = {
            member: (linear.weight, linear.bias)
            for unit in units
            for group in parts(unit)
            for member in group.members
            if not isinstance(group, Mixture)
            for linear in [model.get_submodule(member)]
        }
        self._mixtures = {
            name: model.get_submodule(name)
            for unit in units
            if isinstance(unit, Mixture)
            for name in (unit.members[0], unit.router)
        }

    def to(self, device: torch.device | str) -> None:
        """Make every unit dense and move the model: off a GPU whose memory an engine is about to take, and back."""
        self.apply({})
        self.model.to(device)

    @torch.no_grad()
    def apply(self, levels: Mapping[str, Level]) -> None:
        """Set the levels of the named units; those that are not named become dense.

        Raises:
            LinAlgError: of torch, where a decomposition does not converge; that unit is dense then.
        """
        for name, unit in self._units.items():
            level = levels.get(name, DENSE)
            if level == self._levels[name]:
                continue
            self._restore(unit)
            self._levels[name] = DENSE
            if isinstance(unit, Mixture):
                keep_mixtures(self.model, [(unit, level)] if level != DENSE else [], self._store, self._filed)
            elif level != DENSE:
                factors = None if level.rank is None else self._store.cut(name, level.rank)
                if level.weights is None:
                    assert factors is not None
                    device = self._own[unit.members[0]][0].device
                    B = factors.B.to(device)
                    merged = B @ factors.A.to(device) if factors.order is None else _spread(B, factors.order, unit.n)
                    self._set(unit, merged, factors.b)
                else:
                    self._round(unit, level, factors)
            self._levels[name] = level

    def left(self, unit: Group, precision: Precision, residuals: Sequence[int]) -> dict[int, float]:
        """Return the share of the error of rounding a unit that is left beside residuals of these ranks."""
        assert self._rounding is not None
        total = dict.fromkeys((0, *residuals), 0.0)
        for group in parts(unit):
            W = self._dense(group)
            found, _ = self._whole(group, precision)
            errors = self._rounding.residual(group, W.float().cpu(), found, ranks=max(residuals)).errors()
            for rank in total:
                total[rank] += float(errors[min(rank, len(errors) - 1)])
        return {rank: total[rank] / total[0] if total[0] > 0 else 0.0 for rank in residuals}

    def _round(self, unit: Group, level: Level, factors: Factors | None) -> None:
        if factors is not None and not unit.fed_by:
            self._round_factors(unit, level, factors)
            return
        kept = None if factors is None else structured(factors, "narrow_in")
        order = None if kept is None or kept.order is None else kept.order.long()
        if unit.fed_by:
            rows = None if order is None else rows_of(unit.fed_by, order)
            self._set_rounded(unit.fed_by, level, self._dense(unit.fed_by), rows=rows)
        if kept is None:
            self._set_rounded(unit, level, self._dense(unit))
        else:
            self._set_rounded(unit, level, kept.B, order, bias=kept.b)

    def _set_rounded(
        self,
        group: Group,
        level: Level,
        W: torch.Tensor,
        inputs: torch.Tensor | None = None,
        *,
        rows: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> None:
        """Write a group's rounded weight into the model: that of the `inputs` that are left, right in the `rows` that are used."""
        assert self._rounding is not None
        assert level.weights is not None
        W = W.float().cpu()
        if inputs is None:
            found, scales = self._whole(group, level.weights)
        else:
            found, scales = self._fresh(group, W, level.weights, inputs)
        merged = found.dense() if scales is None else found.dense() / scales
        if level.residual:
            used = slice(None) if rows is None else rows
            part = found.rows(used)
            spectrum = self._rounding.residual(group, W[used], part, inputs=inputs, outputs=rows, ranks=level.residual)
            merged[used] += spectrum.cut(min(level.residual, len(spectrum.values))).dense()
        if inputs is not None:
            merged = _spread(merged, inputs, group.n)
        self._set(group, merged, bias)
        if rounds_inputs(level):
            self._hook(group, level.weights, scales, inputs)

    def _dense(self, group: Group) -> torch.Tensor:
        """Return a group's dense weight (m, n)."""
        return torch.cat([self._own[member][0] for member in group.members])

    def _whole(self, group: Group, weights: Precision) -> tuple[Rounded, torch.Tensor | None]:
        key = group.name, weights
        if key not in self._rounded:
            found, scales = self._fresh(group, self._dense(group).float().cpu(), weights, None)
            self._rounded[key] = replace(found, values=self._rounded_in(found.values)), scales
        return self._rounded[key]

    def _fresh(
        self, group: Group, W: torch.Tensor, weights: Precision, inputs: torch.Tensor | None
    ) -> tuple[Rounded, torch.Tensor | None]:
        assert self._rounding is not None
        if not SCHEMES[weights].rounds_inputs or not foldable(self.model, group):
            return self._rounding.weight(group, W, weights, inputs=inputs), None
        scales = _input_scales(self.model, group, W, self._rounding, inputs)
        return self._rounding.weight(group, W * scales, weights, inputs=inputs, scales=scales), scales

    def _round_factors(self, unit: Group, level: Level, factors: Factors) -> None:
        assert level.weights is not None
        assert self._rounding is not None
        stored = structured(factors, "low_rank")
        A, B = stored.A.float(), stored.B.float()
        scales = torch.ones(unit.n)
        if foldable(self.model, unit):
            scales = _input_scales(self.model, unit, A, self._rounding)
        rounded = [round_to_nearest(factor, level.weights).dense() for factor in (A * scales, B)]
        self._set(unit, rounded[1] @ (rounded[0] / scales), stored.b)
        self._hook(unit, level.weights, scales, None)

    def _set(self, group: Group, W: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Write a stacked weight (m, n) and, where it is given, a bias (m,) into a group's linears."""
        rows = list(group.out_features)
        linears = [self.model.get_submodule(member) for member in group.members]
        device, dtype = linears[0].weight.device, linears[0].weight.dtype
        for linear, w in zip(linears, torch.split(self._filed(W.to(device=device, dtype=dtype)), rows), strict=True):
            linear.weight = nn.Parameter(w, requires_grad=False)
        if bias is not None:
            for linear, b in zip(linears, torch.split(bias.to(device=device, dtype=dtype), rows), strict=True):
                linear.bias = nn.Parameter(b, requires_grad=False)

    def _hook(self, group: Group, weights: Precision, scales: torch.Tensor | None, inputs: torch.Tensor | None) -> None:
        """Let a group's linears round their inputs, those that are left of them, in units of `scales`; not in float32."""
        weight = self.model.get_submodule(group.members[0]).weight
        if weight.dtype.itemsize > 2:
            return
        device = weight.device
        units = torch.ones(group.n)
        if scales is not None:
            units = scales.float() if inputs is None else units.index_copy(0, inputs, scales.float())
        left = torch.ones(group.n) if inputs is None else torch.zeros(group.n).index_fill_(0, inputs, 1.0)
        hook = _rounds(weights, units.to(device), left.to(device))
        self._hooks[self._unit_of(group)] += [
            self.model.get_submodule(member).register_forward_pre_hook(hook) for member in group.members
        ]

    def _unit_of(self, group: Group) -> str:
        return next(name for name, unit in self._units.items() if group.name in (name, unit.fed_by and unit.fed_by.name))

    def _restore(self, unit: Group) -> None:
        for handle in self._hooks[unit.name]:
            handle.remove()
        self._hooks[unit.name] = []
        if isinstance(unit, Mixture):
            for name in (unit.members[0], unit.router):
                self.model.set_submodule(name, self._mixtures[name])
            return
        for group in parts(unit):
            for member in group.members:
                linear = self.model.get_submodule(member)
                linear.weight, linear.bias = self._own[member]


def _spread(W: torch.Tensor, inputs: torch.Tensor, n: int) -> torch.Tensor:
    """Return a weight (m, n) that reads of n inputs those that W (m, k) reads."""
    return W.new_zeros(len(W), n).index_copy_(1, inputs.long().to(W.device), W)


def parts(unit: Group) -> list[Group]:
    """List the groups of a unit, those that give the inputs of the others first."""
    return [unit.fed_by, unit] if unit.fed_by else [unit]


def rows_of(group: Group, kept: torch.Tensor) -> torch.Tensor:
    """Return the rows of a stacked weight that give the neurons `kept` (k,), linear after linear."""
    return rows_of_neurons(kept, group.m, group.rows_per_neuron)


def _rounds(weights: Precision, units: torch.Tensor, left: torch.Tensor) -> Callable[[Any, tuple[torch.Tensor, ...]], tuple[Any]]:
    """Return the hook that rounds inputs; the members of a group, called one after the other with the same, share what it gives."""
    last: list[tuple[torch.Tensor, torch.Tensor]] = []

    def hook(_: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[Any]:
        x = inputs[0]
        if not last or last[0][0] is not x:
            near, token = inputs_in_units(x.float() * left / units, SCHEMES[weights])
            last[:] = [(x, (near * token * units).to(x.dtype))]
        return (last[0][1],)

    return hook
