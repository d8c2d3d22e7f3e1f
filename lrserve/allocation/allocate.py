"""Closed-form allocators: rank plans without a search, as its starting points and as baselines."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lrserve.allocation.plan import BudgetFit, RankPlan


def uniform(fit: BudgetFit, budget: float) -> RankPlan:
    """Give every group the same share of its dense cost."""
    return fit.fit({group.name: 1.0 for group in fit.groups}, budget)


def loss_aware(
    fit: BudgetFit, relative_errors: Mapping[str, torch.Tensor], weights: Mapping[str, float], budget: float
) -> RankPlan:
    """Minimise the weighted sum of the groups' expected relative errors, exact from the spectra.

    Args:
        fit: the groups, rank step and cost.
        relative_errors: per group name, `Spectrum.relative_errors()`.
        weights: per group name. With sensitivities (measured KL divergence over the relative error at the probed rank, in nats) the
            sum is the divergence that the groups cause one by one; equal weights give the greedy plan.
        budget: in the fit's cost unit.

    Raises:
        InfeasibleTargetError: as `BudgetFit.require`.
    """
    return fit.cheapest_loss({name: (errors * weights[name]).tolist() for name, errors in relative_errors.items()}, budget)
