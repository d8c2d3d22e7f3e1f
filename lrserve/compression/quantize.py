"""Rounding weight matrices to few bits, in the layouts that engines have kernels for. Pure maths.

Notation
    W    (m, n)          weight;  g neighbouring inputs of a row share one scale, g = n where the scheme has one scale a row
    q    (m, n)          what is stored of W: integers, or 8-bit floating point numbers
    s    (m, n / g)      scales;  Q = q s, the weight that the engine multiplies by
    H    (n, n)          metric of the inputs: rounding costs tr((W - Q) H (W - Q)^T)

H is the second moment of the inputs: layers gain no bias here, so it is not centred. Best is E[|g|^2 x x^T] / E[|g|^2], with g the
gradient of the loss by the outputs (GuidedQuant, arXiv 2505.07004): a token that the loss does not feel weighs little then, however
large its activations are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lrserve.compression.level import SCHEMES, Precision, Scheme
from lrserve.compression.packing import dequantize
from lrserve.errors import CalibrationError

_TINY = 1e-12
_DAMPING = 1e-2  # share of H's mean diagonal that is added to it
_COLUMNS = 64  # rounded before the columns after them are corrected
_ROWS = 8 * _COLUMNS  # of U that are held at once
_ENTRIES = 1 << 18  # of a weight whose scales are searched at once: they stay in the processor's cache
_PEAKS = (0.75, 0.8, 0.85, 0.9, 0.95, 1.0, 1.05)  # largest magnitudes that are tried, in units of the largest entry
_REPEATS = 2  # of rounding with the best scales and fitting these to what was rounded


@dataclass(frozen=True)
class Rounded:
    """A rounded weight: `values` (m, n), int8 whatever the bits (float8_e4m3fn for fp8), and float32 `scales` (m, n / g).

    Scales of groups may be negative: the integer -8 is then the largest positive weight of its group.
    """

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
        return dequantize(self.values.float(), self.scales)


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
    m, n = W.shape
    units = W.float().view(m, scales.shape[1], -1) / scales[:, :, None]
    values = _nearest(units, SCHEMES[precision])
    return Rounded(precision, values.view(m, n).to(_stored(precision)), scales)


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
    return rounded_to(W, _storable(peaks / scheme.largest, scheme, dtype), precision)


def quantize(W: torch.Tensor, precision: Precision, H: torch.Tensor | None = None, dtype: torch.dtype = torch.bfloat16) -> Rounded:
    """Round W (m, n) with searched scales and, to 4 bits, with error feedback, so that little is lost in the metric H (n, n).

    Scales: of `_PEAKS`, and with groups of either sign, the one that loses least in the diagonal of H, each fitted by least
    squares to the integers that it gives, as llama.cpp does with an importance matrix. Feedback: column by column,
    the columns that follow make up for what rounding changed (GPTQ, arXiv 2210.17323, section 4). A row that loses less by
    rounding to nearest, with the same scales, is rounded so. A singular or zero H is no special case: it is damped.

    Args:
        W: (m, n), any float dtype.
        precision: one whose groups divide n.
        H: (n, n), symmetric positive semidefinite, in any unit; None weighs all inputs alike.
        dtype: in which scales of groups are stored.

    Raises:
        CalibrationError: a weight or H is not finite.
        ValueError: n is no multiple of the group.
    """
    scheme = SCHEMES[precision]
    if not scheme.fits(W.shape[1]):
        raise ValueError(f"{W.shape[1]} inputs do not divide into groups of {scheme.group}")
    if not torch.isfinite(W).all() or (H is not None and not torch.isfinite(H).all()):
        raise CalibrationError(
            "a weight or the moments of its inputs are not finite; check the checkpoint and the calibration text"
        )
    W = W.float()
    diagonal = torch.ones(W.shape[1], device=W.device) if H is None else _damped_diagonal(H).float()
    scales = torch.cat([_searched(part, scheme, diagonal, dtype) for part in W.split(max(1, _ENTRIES // W.shape[1]))])
    nearest = rounded_to(W, scales, precision)
    if H is None or scheme.bits > 4:
        return nearest
    metric = _damped(H)
    values, lost = _with_feedback(W, metric, scales, scheme)
    errors = W - nearest.dense()
    better = lost < ((errors @ metric.float()) * errors).sum(1)
    return Rounded(precision, torch.where(better[:, None], values, nearest.values), scales)


def _searched(W: torch.Tensor, scheme: Scheme, diagonal: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Find the scales (m, n / g) of some rows (m, n), given the diagonal (n,) of the metric."""
    m, n = W.shape
    x = W.view(m, -1, scheme.group or n)
    weight = (diagonal / diagonal.mean()).view(x.shape[1:])
    weighted = x * weight
    peaks = x.gather(2, x.abs().argmax(2, keepdim=True))
    peaks = torch.where(peaks.abs() < _TINY, _TINY, peaks)
    candidates = [peaks.abs() * share / scheme.largest for share in _PEAKS]
    if scheme.group is not None:
        candidates = [peaks * share / end for share in _PEAKS for end in (scheme.largest, -scheme.largest - 1)]

    def error(q: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return (x - q * s).square_().mul_(weight).sum(2, keepdim=True)

    def fitted(q: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        fit = (q * weighted).sum(2, keepdim=True) / (q.square() * weight).sum(2, keepdim=True).clamp_min(_TINY)
        fit = _storable(fit, scheme, dtype)
        return torch.where(fit.abs() < _TINY, s, fit)

    best = _storable(peaks.abs() / scheme.largest, scheme, dtype)
    least = error(_nearest(x / best, scheme), best)
    for candidate in candidates:
        q = _nearest(x / candidate, scheme)
        scales = fitted(q, candidate)
        lost = error(q, scales)
        best, least = torch.where(lost < least, scales, best), torch.minimum(lost, least)
    for _ in range(_REPEATS):
        scales = fitted(_nearest(x / best, scheme), best)
        lost = error(_nearest(x / scales, scheme), scales)
        best, least = torch.where(lost < least, scales, best), torch.minimum(lost, least)
    return best[:, :, 0]


def _with_feedback(W: torch.Tensor, H: torch.Tensor, scales: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor]:
    """Return q (m, n), int8, and what each row (m,) loses in the metric H (n, n), which is positive definite.

    With H^-1 = U^T U, U upper triangular, the best that columns j > k can do about an error e of column k is to lose e U_kj / U_kk,
    and e^2 / U_kk^2 is left. Columns stand in rows here, which are contiguous.
    """
    n, g = W.shape[1], W.shape[1] // scales.shape[1]
    L = torch.linalg.cholesky(H.flip(0, 1))
    pivots = L.diagonal().flip(0).reciprocal().cpu().tolist()
    left, steps = W.T.contiguous(), scales.T.contiguous()
    values = torch.empty(left.shape, dtype=torch.int8, device=W.device)
    lost = torch.zeros(len(W), device=W.device)
    for start in range(0, n, _COLUMNS):
        stop = min(start + _COLUMNS, n)
        if start % _ROWS == 0:
            first, U = start, _rows_of_inverse(L, start, min(start + _ROWS, n)).float()
        errors = torch.empty(stop - start, len(W), device=W.device)
        for k in range(start, stop):
            s = steps[k // g]
            q = _nearest(left[k] / s, scheme)
            values[k] = q
            torch.div(left[k] - q * s, pivots[k], out=errors[k - start])
            if k + 1 < stop:
                left[k + 1 : stop].addr_(U[k - first, k + 1 - first : stop - first], errors[k - start], alpha=-1)
        lost += errors.square().sum(0)
        left[stop:].addmm_(U[start - first : stop - first, stop - first :].T, errors, alpha=-1)
    return values.T.contiguous(), lost


def _rows_of_inverse(L: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Return rows `start` to `stop` of U from their diagonal on: U is L^-1 with its rows and columns in reverse order."""
    size, count = len(L) - start, stop - start
    unit = torch.eye(count, dtype=L.dtype, device=L.device)
    right = torch.cat([unit.new_zeros(count, size - count), unit], dim=1)
    rows: torch.Tensor = torch.linalg.solve_triangular(L[:size, :size], right, upper=False, left=False)
    return rows.flip(0, 1)


def _damped(H: torch.Tensor) -> torch.Tensor:
    """Return H / its mean diagonal plus a little of the identity, float64, which is positive definite even where H is singular."""
    H = H.double()
    mean = float(H.diagonal().mean())
    H = (H + H.T).div_(2 * mean) if mean > 0 else torch.zeros_like(H)
    H.diagonal().add_(_DAMPING)
    return H


def _damped_diagonal(H: torch.Tensor) -> torch.Tensor:
    """Return the diagonal (n,) of `_damped`, without a matrix."""
    diagonal = H.diagonal().double()
    mean = float(diagonal.mean())
    return (diagonal / mean if mean > 0 else torch.zeros_like(diagonal)) + _DAMPING


def _nearest(units: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Round weights in units of their scale to what can be stored, in float32."""
    if scheme.floating:
        return units.clamp(-scheme.largest, scheme.largest).to(torch.float8_e4m3fn).float()
    return units.round().clamp_(-scheme.largest - 1, scheme.largest)


def _stored(precision: Precision) -> torch.dtype:
    return torch.float8_e4m3fn if SCHEMES[precision].floating else torch.int8


def _storable(scales: torch.Tensor, scheme: Scheme, dtype: torch.dtype) -> torch.Tensor:
    """Round scales to what is stored: `dtype` where a row has several, else float32."""
    if scheme.group is None:
        return scales.float()
    rounded = scales.to(dtype).float()
    return torch.where(rounded == 0, torch.finfo(dtype).tiny, rounded)
