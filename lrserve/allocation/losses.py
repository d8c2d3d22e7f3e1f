"""Closed-form allocators: rank plans without a search, as its starting points and as baselines.

Each but `uniform` minimises an additive loss, solved by `BudgetFit.cheapest_loss`: for each group the loss that it alone is
expected to cause at every rank 0..k. What that loss is, is what tells them apart:

    greedy      the expected relative error of the output: exact from the spectra, blind to what the model makes of it
    fisher      half the two-sided factorization's expected error, in nats: the second-order estimate of the KL divergence
    probed      the relative error, scaled to the KL divergence that was measured at one rank of each group
    loss_aware  the geometric mean of the last two: an estimate from the whole calibration text, and one beyond second order
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final

import torch

from lrserve.allocation.plan import BudgetFit, RankPlan

Losses = Mapping[str, torch.Tensor]
"""For each group name the expected loss at every rank, float64 (k + 1,)."""

GREEDY: Final = "greedy"
"""The one of `estimates` that is not in nats."""

_SMALLEST = 1e-6  # an error of nothing at the probed rank does not make lower ones harmless


def uniform(fit: BudgetFit, budget: float) -> RankPlan:
    """Give every group the same share of its dense cost."""
    return fit.fit({group.name: 1.0 for group in fit.groups}, budget)


def least_loss(fit: BudgetFit, losses: Losses, budget: float) -> RankPlan:
    """Minimise the sum of the groups' losses.

    Raises:
        InfeasibleTargetError: as `BudgetFit.require`.
    """
    return fit.cheapest_loss({name: loss.tolist() for name, loss in losses.items()}, budget)


def greedy(errors: Losses) -> dict[str, torch.Tensor]:
    """Return each group's error over its error at rank 0 (zeros where that is zero)."""
    return {name: error / error[0] if error[0] > 0 else error for name, error in errors.items()}


def fisher(errors: Losses, unweighted: Losses | None = None) -> dict[str, torch.Tensor]:
    """Return the KL divergence that two-sided factorizations expect, in nats per token.

    Args:
        errors: per group name the expected error at every rank.
        unweighted: losses in nats of groups that were not factorized two-sided: their errors are in squared units of the output.
    """
    return {name: error / 2 for name, error in errors.items()} | dict(unweighted or {})


def probed(errors: Losses, probes: Mapping[str, tuple[int | None, float]]) -> dict[str, torch.Tensor]:
    """Return losses that go through what was measured.

    Args:
        errors: per group name the expected error at every rank.
        probes: per group name the rank at which it alone was factorized, and the KL divergence that this caused, in nats.
    """
    relative = greedy(errors)
    losses = {}
    for name, (rank, divergence) in probes.items():
        at_probe = _SMALLEST if rank is None else max(float(relative[name][rank]), _SMALLEST)
        losses[name] = relative[name] * max(divergence, 0.0) / at_probe
    return losses


def estimates(errors: Losses, probes: Mapping[str, tuple[int | None, float]], weighted: Collection[str]) -> dict[str, Losses]:
    """Return what each allocator minimises, by its name, best guess first.

    Args:
        errors: per group name the expected error at every rank.
        probes: as for `probed`.
        weighted: names of the groups that were factorized two-sided. What was probed stands in for the others in `fisher`; with
            none there is no `fisher`, and no `loss_aware`.
    """
    by_probe, by_error = probed(errors, probes), greedy(errors)
    if not weighted:
        return {"probed": by_probe, GREEDY: by_error}
    by_gradient = fisher(errors, {name: loss for name, loss in by_probe.items() if name not in weighted})
    return {"loss_aware": loss_aware(by_probe, by_gradient), "probed": by_probe, "fisher": by_gradient, GREEDY: by_error}


def loss_aware(first: Losses, second: Losses) -> dict[str, torch.Tensor]:
    """Return the geometric mean of two estimates of the same losses."""
    return {name: (loss * second[name]).sqrt() for name, loss in first.items()}
