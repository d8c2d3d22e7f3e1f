"""Closed-form allocators: plans without a search, as its starting points and as baselines.

Each but `uniform` minimises an additive loss, solved by `BudgetFit.cheapest_loss`: for each unit the loss that it alone is expected
to cause at every level, in nats. What removing costs by rank is what tells them apart:

    fisher      half the two-sided factorization's expected error: the second-order estimate of the KL divergence
    probed      the relative error of the output, scaled to the KL divergence that was measured at one rank of each unit
    loss_aware  the geometric mean of the two: an estimate from the whole calibration text, and one beyond second order

What rounding costs is measured in each unit alone, once for each precision; a residual leaves of it the share that the residual's
spectrum says, and of an MLP with fewer neurons only what is left is rounded.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from lrserve.allocation.plan import BudgetFit, Plan
from lrserve.compression.groups import Group
from lrserve.compression.level import Level, Precision

Errors = Mapping[str, torch.Tensor]
"""For each unit an error or a loss at every rank, or number of experts, float64 (k + 1,) (`Group.error_index`)."""
Losses = Mapping[str, Mapping[Level, float]]
"""For each unit the expected loss of every level that it can have, in nats."""

_SMALLEST = 1e-6  # an error of nothing at the probed rank does not make lower ones harmless


def uniform(fit: BudgetFit, budget: float) -> Plan:
    """Give every unit the same share of its dense cost; nothing is rounded."""
    return fit.fit({group.name: 1.0 for group in fit.groups}, budget)


def least_loss(fit: BudgetFit, of_ranks: Errors, budget: float) -> Plan:
    """Minimise the sum of the units' losses by rank; nothing is rounded.

    Raises:
        InfeasibleTargetError: as `BudgetFit.require`.
    """
    levels = {unit.name: [level for _, level in fit.levels(unit.name) if level.weights is None] for unit in fit.groups}
    losses = {
        unit.name: {
            level: 0.0 if level.rank is None else float(of_ranks[unit.name][unit.error_index(level)]) for level in levels[unit.name]
        }
        for unit in fit.groups
    }
    return fit.cheapest_loss(losses, budget, lambda name, level: level.weights is None)


def relative(errors: Errors) -> dict[str, torch.Tensor]:
    """Return each unit's error over its error at rank 0 (zeros where that is zero)."""
    return {name: error / error[0] if error[0] > 0 else error for name, error in errors.items()}


def fisher(errors: Errors, unweighted: Errors | None = None) -> dict[str, torch.Tensor]:
    """Return the KL divergence that two-sided factorizations expect, in nats per token.

    Args:
        errors: per unit the expected error at every rank.
        unweighted: losses in nats of units that were not factorized two-sided: their errors are in squared units of the output.
    """
    return {name: error / 2 for name, error in errors.items()} | dict(unweighted or {})


def probed(errors: Errors, probes: Mapping[str, tuple[int | None, float]]) -> dict[str, torch.Tensor]:
    """Return losses that go through what was measured.

    Args:
        errors: per unit the expected error at every rank.
        probes: per unit the rank at which it alone was factorized, and the KL divergence that this caused, in nats.
    """
    shares = relative(errors)
    losses = {}
    for name, (rank, divergence) in probes.items():
        at_probe = _SMALLEST if rank is None else max(float(shares[name][rank]), _SMALLEST)
        losses[name] = shares[name] * max(divergence, 0.0) / at_probe
    return losses


def loss_aware(first: Errors, second: Errors) -> dict[str, torch.Tensor]:
    """Return the geometric mean of two estimates of the same losses."""
    return {name: (loss * second[name]).sqrt() for name, loss in first.items()}


def estimates(errors: Errors, probes: Mapping[str, tuple[int | None, float]], weighted: Collection[str]) -> dict[str, Errors]:
    """Return what each allocator takes for the loss of a rank, by its name, best guess first.

    Args:
        errors: per unit the expected error at every rank.
        probes: as for `probed`.
        weighted: names of the units that were factorized two-sided. What was probed stands in for the others in `fisher`; with
            none there is no `fisher`, and no `loss_aware`.
    """
    by_probe = probed(errors, probes)
    if not weighted:
        return {"probed": by_probe}
    by_gradient = fisher(errors, {name: loss for name, loss in by_probe.items() if name not in weighted})
    return {"loss_aware": loss_aware(by_probe, by_gradient), "probed": by_probe, "fisher": by_gradient}


@dataclass(frozen=True)
class RoundingLoss:
    """What rounding one unit costs in one precision, in nats, and which share of it is left beside residuals of these ranks."""

    loss: float
    left: Mapping[int, float] = field(default_factory=dict)


def by_level(
    units: Sequence[Group],
    levels: Mapping[str, Sequence[Level]],
    of_ranks: Errors,
    rounding: Mapping[str, Mapping[Precision, RoundingLoss]],
) -> dict[str, dict[Level, float]]:
    """Return the loss of every level: that of its rank, and that of rounding what is left.

    Args:
        units: what a plan decides on.
        levels: those that each unit can have.
        of_ranks: what one of `estimates` takes for the loss of a rank.
        rounding: what was measured of each unit by precision.
    """
    table: dict[str, dict[Level, float]] = {}
    for unit in units:
        own = table[unit.name] = {}
        for level in levels[unit.name]:
            loss = 0.0 if level.rank is None else float(of_ranks[unit.name][unit.error_index(level)])
            if level.weights is not None:
                found = rounding[unit.name][level.weights]
                kept = level.rank / unit.n if unit.fed_by and level.rank is not None else 1.0
                loss += kept * max(found.loss, 0.0) * (found.left[level.residual] if level.residual else 1.0)
            own[level] = loss
    return table
