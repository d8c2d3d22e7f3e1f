"""Rounding the groups of a plan: their weights, and what is added to them, in the metric of what calibration knows of their inputs.

A group is rounded after its structure is decided: neurons are removed first, then the rest is rounded, then repaired.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from lrserve.compression.factorize import GradientOf
from lrserve.compression.groups import Group
from lrserve.compression.level import SCHEMES, Level, Precision
from lrserve.compression.quantize import Residual, Rounded, quantize
from lrserve.compression.residual import ResidualSpectrum, residual_spectrum

MomentOf = Callable[[Group], torch.Tensor]
"""Gives the second moment E[x x^T] (n, n) of a group's inputs."""


@dataclass(frozen=True)
class RoundedWeight:
    """A rounded weight (m, n), and what is added to it."""

    weight: Rounded
    residual: Residual | None = None

    def dense(self) -> torch.Tensor:
        """Return the weight (m, n) that they stand for, float32."""
        W = self.weight.dense()
        return W if self.residual is None else W + self.residual.dense()


class Rounding:
    """Rounds the stacked weights of groups."""

    def __init__(self, moments: MomentOf, gradient: GradientOf, dtype: torch.dtype) -> None:
        """Take what gives a group's moments, and the dtype of what is stored beside integers."""
        self._moments, self._gradient, self.dtype = moments, gradient, dtype

    def moment(self, group: Group, inputs: torch.Tensor | None = None, scales: torch.Tensor | None = None) -> torch.Tensor:
        """Return the second moment of those `inputs` (k,) of a group that are left, divided by `scales` (k,)."""
        H = self._moments(group)
        H = H if inputs is None else H[inputs][:, inputs]
        return H if scales is None else H / scales / scales[:, None]

    def weight(
        self,
        group: Group,
        W: torch.Tensor,
        weights: Precision,
        *,
        inputs: torch.Tensor | None = None,
        scales: torch.Tensor | None = None,
    ) -> Rounded:
        """Round a group's stacked weight.

        Args:
            group: its names and its inputs' statistics.
            W: (m, n), or (m, k) where `inputs` are given; already multiplied by `scales`.
            weights: what it is rounded to.
            inputs: those (k,) of the n inputs that W reads, where neurons were removed.
            scales: by which its inputs are divided before they come.
        """
        return quantize(W, weights, self.moment(group, inputs, scales), self.dtype)

    def residual(self, group: Group, W: torch.Tensor, rounded: Rounded, *, inputs: torch.Tensor | None = None) -> ResidualSpectrum:
        """Return what makes up for rounding a group's weight W (m, n), at every rank."""
        gradient = self._gradient(group)
        if gradient is not None and len(gradient[1]) != (W.shape[1] if gradient[0] == "input" else W.shape[0]):
            gradient = None  # neurons were removed: it is of other rows or columns
        return residual_spectrum(W, rounded, self.moment(group, inputs), gradient)

    def __call__(
        self,
        group: Group,
        W: torch.Tensor,
        level: Level,
        *,
        inputs: torch.Tensor | None = None,
        scales: torch.Tensor | None = None,
    ) -> RoundedWeight:
        """Round a group's stacked weight W (m, n) to what a level says, with its residual; otherwise as `weight`."""
        assert level.weights is not None
        found = RoundedWeight(self.weight(group, W, level.weights, inputs=inputs, scales=scales))
        if not level.residual:
            return found
        return replace(found, residual=self.residual(group, W, found.weight, inputs=inputs).cut(level.residual))


def rounds_inputs(level: Level) -> bool:
    """Whether the inputs of layers at this level are rounded as well."""
    return level.weights is not None and SCHEMES[level.weights].rounds_inputs
