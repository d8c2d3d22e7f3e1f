"""Closed-form allocators: rank plans without a search, as its starting points and as baselines."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lrserve.allocation.plan import BudgetFit, RankPlan


def uniform(fit: BudgetFit, budget: float) -> RankPlan:
    """Give every group the same share of its dense cost."""
    return fit.fit({group.name: 1.0 for group in fit.groups}, budget)


def greedy(fit: BudgetFit, relative_errors: Mapping[str, torch.Tensor], budget: float) -> RankPlan:
    """Minimise the sum of expected relative errors, exact from the spectra: every group's output counts alike.

    Args:
        fit: the groups, rank step and cost.
        relative_errors: per group name, `Spectrum.relative_errors()`.
        budget: in the fit's cost unit.
    """
    return fit.cheapest_loss({name: errors.tolist() for name, errors in relative_errors.items()}, budget)


def loss_aware(
    fit: BudgetFit, relative_errors: Mapping[str, torch.Tensor], sensitivities: Mapping[str, float], budget: float
) -> RankPlan:
    """Minimise the sum of sensitivity times relative error: the divergence that each group alone was measured to cause.

    Args:
        fit: the groups, rank step and cost.
        relative_errors: per group name, `Spectrum.relative_errors()`.
        sensitivities: per group name, measured KL divergence over the relative error at the probed rank, in nats.
        budget: in the fit's cost unit.
    """
    losses = {name: (errors * sensitivities[name]).tolist() for name, errors in relative_errors.items()}
    return fit.cheapest_loss(losses, budget)
