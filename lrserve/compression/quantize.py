"""Rounding weight matrices to few bits, in the layouts that engines have kernels for. Pure maths.

Notation
    W    (m, n)          weight;  g neighbouring inputs of a row share one scale, g = n where the scheme has one scale a row
    q    (m, n)          what is stored of W: integers, or 8-bit floating point numbers
    s    (m, n / g)      scales;  Q = q s, the weight that the engine multiplies by
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lrserve.compression.level import SCHEMES, Precision, Scheme

_TINY = 1e-12


@dataclass(frozen=True)
class Rounded:
    """A rounded weight: `values` (m, n), int8 whatever the bits (float8_e4m3fn for fp8), and float32 `scales` (m, n / g)."""

    precision: Precision
    values: torch.Tensor
    scales: torch.Tensor

    @property
    def scheme(self) -> Scheme:
        """How it was rounded."""
        return SCHEMES[self.precision]

    def rows(self, rows: torch.Tensor | slice) -> Rounded:
        """Return some of the rows."""
        return Rounded(self.precision, self.values[rows], self.scales[rows])

    def dense(self) -> torch.Tensor:
        """Return Q (m, n), float32."""
        m, n = self.values.shape
        groups = self.values.float().view(m, self.scales.shape[1], -1)
        return (groups * self.scales[:, :, None]).view(m, n)


@dataclass(frozen=True)
class Residual:
    """What is added to a rounded weight: B diag(scales) A, with A (r, n) and B (m, r) int8 and float32 scales (r,).

    The scales of both factors are one: a scale for each rank.
    """

    A: torch.Tensor
    B: torch.Tensor
    scales: torch.Tensor

    @property
    def rank(self) -> int:
        """Rows of A."""
        return len(self.scales)

    def dense(self) -> torch.Tensor:
        """Return the sum's weight (m, n), float32."""
        return self.B.float() @ (self.scales[:, None] * self.A.float())


def rounded_to(W: torch.Tensor, scales: torch.Tensor, precision: Precision) -> Rounded:
    """Round W (m, n) to nearest with given scales (m, n / g)."""
    scheme = SCHEMES[precision]
    m, n = W.shape
    units = W.float().view(m, scales.shape[1], -1) / scales[:, :, None]
    if scheme.floating:
        values = units.clamp(-scheme.largest, scheme.largest).to(torch.float8_e4m3fn)
    else:
        values = units.round().clamp(-scheme.largest - 1, scheme.largest).to(torch.int8)
    return Rounded(precision, values.view(m, n), scales)


def inputs_in_units(x: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what an engine rounds inputs x (..., n) to, float32, and the float32 scale (..., 1) of each token.

    Each token's largest entry becomes the largest value; the gradient passes as if nothing were rounded.
    """
    scale = x.detach().abs().amax(-1, keepdim=True).float().clamp_min(_TINY) / scheme.largest
    units = x.float() * (1 / scale)  # not x / scale: the engines' kernels decide ties of 16-bit values in this way
    near = units.detach().clamp(-scheme.largest, scheme.largest)
    near = near.to(torch.float8_e4m3fn).float() if scheme.floating else near.round()
    return (units + (near - units).detach() if units.requires_grad else near), scale


def round_to_nearest(W: torch.Tensor, precision: Precision, dtype: torch.dtype = torch.bfloat16) -> Rounded:
    """Round W (m, n) with the largest entry of each row, or of each group of a row, as the largest value.

    Scales of groups are rounded to `dtype` first, in which they are stored.
    """
    scheme = SCHEMES[precision]
    m, n = W.shape
    peaks = W.float().view(m, 1 if scheme.group is None else n // scheme.group, -1).abs().amax(-1).clamp_min(_TINY)
    scales = peaks / scheme.largest
    return rounded_to(W, scales if scheme.group is None else scales.to(dtype).float(), precision)


def quantize(W: torch.Tensor, precision: Precision, H: torch.Tensor | None, dtype: torch.dtype) -> Rounded:
    return round_to_nearest(W, precision, dtype)
