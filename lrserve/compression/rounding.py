"""Rounding the groups of a plan: their weights, and what is added to them, in the metric of what calibration knows of their inputs.

A group is rounded after its structure is decided: neurons are removed first, then the rest is rounded, then repaired.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from lrserve.compression.groups import Group
from lrserve.compression.level import SCHEMES, Level, Precision
from lrserve.compression.quantize import Residual, Rounded, quantize
from lrserve.compression.residual import ResidualSpectrum, residual_spectrum
from lrserve.compression.smoothing import smoothed_moment

MomentOf = Callable[[Group], torch.Tensor]
"""Gives a second moment (n, n) of a group's inputs."""


@dataclass(frozen=True)
class RoundedWeight:
    """A rounded weight (m, n), and what is added to it."""

    weight: Rounded
    residual: Residual | None = None


class Rounding:
    """Rounds the stacked weights of groups, one at a time on a device of its own; what comes and goes is on the CPU."""

    def __init__(
        self,
        moments: MomentOf,
        gradients: Callable[[Group], torch.Tensor | None],
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        """Take what gives groups' moments, the dtype of what is not an integer, and the device that computes.

        `moments` are E[x x^T]; `gradients` those of the gradients by the outputs (m, m), or the diagonals (m,) of these, or None.
        """
        self._moments, self._metrics, self._gradients, self.dtype = moments, moments, gradients, dtype
        self._device = device

    @property
    def weighed(self) -> bool:
        """Whether what rounding costs is measured by other moments than E[x x^T] (`measure_by`)."""
        return self._metrics is not self._moments

    def measure_by(self, metrics: MomentOf) -> None:
        """Let what rounding costs be measured by other moments than E[x x^T]: those in which tokens weigh by their gradients."""
        self._metrics = metrics

    def sizes(self, group: Group, inputs: torch.Tensor | None = None) -> torch.Tensor:
        """Return the root mean squares of a group's inputs, of those `inputs` (k,) that are left."""
        sizes = self._moments(group).diagonal().clamp_min(0).sqrt()
        return sizes if inputs is None else sizes[inputs]

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
        found = quantize(W.to(self._device), weights, self._metric(group, inputs, scales), self.dtype)
        return replace(found, values=found.values.cpu(), scales=found.scales.cpu())

    def residual(
        self,
        group: Group,
        W: torch.Tensor,
        rounded: Rounded,
        *,
        inputs: torch.Tensor | None = None,
        outputs: torch.Tensor | None = None,
        ranks: int | None = None,
    ) -> ResidualSpectrum:
        """Return what makes up for rounding a group's weight W (m, n), at every rank or at the leading `ranks`.

        Where neurons were removed, W reads those `inputs` of the group's only, or gives those `outputs` only.
        """
        gradient = self._gradients(group)
        if gradient is not None and outputs is not None:
            gradient = gradient[outputs] if gradient.ndim == 1 else gradient[outputs][:, outputs]
        gradient = None if gradient is None else gradient.to(self._device)
        found = residual_spectrum((W - rounded.dense()).to(self._device), self._metric(group, inputs, None), gradient, ranks)
        return replace(found, B=found.B.cpu(), A=found.A.cpu(), values=found.values.cpu())

    def _metric(self, group: Group, inputs: torch.Tensor | None, scales: torch.Tensor | None) -> torch.Tensor:
        H = self._metrics(group)
        H = H if inputs is None else H[inputs][:, inputs]
        return (H if scales is None else smoothed_moment(H, scales)).to(self._device)

    def __call__(
        self,
        group: Group,
        W: torch.Tensor,
        level: Level,
        *,
        inputs: torch.Tensor | None = None,
        outputs: torch.Tensor | None = None,
        scales: torch.Tensor | None = None,
    ) -> RoundedWeight:
        """Round a group's stacked weight W (m, n) to what a level says, with its residual; otherwise as `weight` and `residual`."""
        assert level.weights is not None
        weight = self.weight(group, W, level.weights, inputs=inputs, scales=scales)
        if not level.residual:
            return RoundedWeight(weight)
        spectrum = self.residual(group, W, weight, inputs=inputs, outputs=outputs, ranks=level.residual)
        return RoundedWeight(weight, spectrum.cut(min(level.residual, len(spectrum.values))))


def rounds_inputs(level: Level) -> bool:
    """Whether the inputs of layers at this level are rounded as well."""
    return level.weights is not None and SCHEMES[level.weights].rounds_inputs
