"""The low-rank residual of a rounded weight, in closed form for every rank at once. Pure maths.

Notation, besides that of quantize.py (W, Q, H)
    E       (m, n)   W - Q, or whatever else a layer's weight lacks
    Gamma^2 (m, m)   second moment E[g g^T] of the loss gradient g by the outputs; of its diagonal alone (m,)
    L, R             Cholesky factors: Gamma^2 = L L^T (m, m),  H = R R^T (n, n)
    B (m, r), A (r, n)   the residual: the layer multiplies by Q + B A

The residual of rank r that minimises tr(Gamma^2 (E - B A) H (E - B A)^T) is the leading part of an SVD, L^T E R = U S V^T:
B = L^-T U_r S_r and A = V_r^T R^-1, and what is left is the sum of the other squared singular values: twice the expected loss in
nats per token where Gamma^2 and H are what quantize.py says. Without Gamma this is EoRA (arXiv 2410.21271, section 3), whose
eigenvectors are one square root of H as a Cholesky factor is another; with diagonal metrics it is the weighted SVD of LQ-LoRA
(arXiv 2311.12023, section 3.3).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lrserve.compression.quantize import Residual
from lrserve.errors import CalibrationError

_DAMPING = 1e-2  # share of a metric's mean diagonal that is added to it
_LARGEST = 127  # of an int8 factor
_OVERSAMPLING, _ITERATIONS = 16, 4  # of the randomized SVD
_TINY = 1e-30


@dataclass(frozen=True)
class ResidualSpectrum:
    """The residuals of every rank 0..k, from which one is cut.

    B (m, k), A (k, n): most important column and row first, float32. values (k,): what each is worth, largest first, and `total`
    the sum of all, those beyond k as well; float64.
    """

    B: torch.Tensor
    A: torch.Tensor
    values: torch.Tensor
    total: float

    def errors(self) -> torch.Tensor:
        """What is left at every rank 0..k, float64 (k + 1,), never negative, before the factors are rounded."""
        return (self.total - torch.cat([self.values.new_zeros(1), self.values.cumsum(0)])).clamp_min(0)

    def cut(self, rank: int) -> Residual:
        """Return the optimal residual of a rank from 1 to k, its factors rounded to int8 with one scale a rank.

        Raises:
            ValueError: a rank outside 1..k.
        """
        if not 1 <= rank <= len(self.values):
            raise ValueError(f"rank {rank} is outside 1..{len(self.values)}")
        return rounded_factors(self.B[:, :rank], self.A[:rank])


def rounded_factors(B: torch.Tensor, A: torch.Tensor) -> Residual:
    """Round B (m, r) and A (r, n) to int8, each column of B and row of A by its largest entry."""
    columns = (B.float().abs().amax(0) / _LARGEST).clamp_min(_TINY)
    rows = (A.float().abs().amax(1) / _LARGEST).clamp_min(_TINY)
    return Residual(
        A=(A.float() / rows[:, None]).round().to(torch.int8),
        B=(B.float() / columns).round().to(torch.int8),
        scales=columns * rows,
    )


def residual_spectrum(
    E: torch.Tensor, H: torch.Tensor | None = None, gradient: torch.Tensor | None = None, ranks: int | None = None
) -> ResidualSpectrum:
    """Decompose what a weight lacks, for every rank or for the leading ones.

    Args:
        E: (m, n), any float dtype.
        H: (n, n), symmetric positive semidefinite; it may be singular, None weighs all inputs alike.
        gradient: (m, m), or (m,) its diagonal; it may be singular, None weighs all outputs alike.
        ranks: how many ranks are wanted; far fewer than min(m, n) are found by subspace iteration (Halko et al., arXiv 0909.4061,
            algorithm 4.4) in float32, which takes a fraction of the time. None decomposes all of them in float64.

    Raises:
        CalibrationError: an input that is not finite.
    """
    if not all(torch.isfinite(tensor).all() for tensor in (E, H, gradient) if tensor is not None):
        raise CalibrationError("a weight or a moment is not finite; check the checkpoint and the calibration text")
    full = min(E.shape)
    few = ranks is not None and ranks + _OVERSAMPLING < full // 2
    dtype = torch.float32 if few else torch.float64
    R, L = _root(H), _root(gradient)
    M = E.to(dtype)
    M = M if R is None else M @ R.to(dtype)
    if L is not None:
        M = L.to(dtype)[:, None] * M if L.ndim == 1 else L.to(dtype).T @ M
    k = full if ranks is None else min(ranks, full)
    U, S, V = _leading(M, k) if few else _svd(M, k)
    B, A = (U * S).double(), V.double()
    if L is not None:
        B = B / L[:, None] if L.ndim == 1 else torch.linalg.solve_triangular(L.T, B, upper=True)
    if R is not None:
        A = torch.linalg.solve_triangular(R.T, A, upper=True)
    return ResidualSpectrum(B.float(), A.T.contiguous().float(), S.double().square(), float(M.double().square().sum()))


def _root(moment: torch.Tensor | None) -> torch.Tensor | None:
    """Return the Cholesky factor of a damped moment, or the roots (m,) of a diagonal one; None where it weighs nothing."""
    if moment is None:
        return None
    moment = moment.double()
    diagonal = moment if moment.ndim == 1 else moment.diagonal()
    mean = float(diagonal.mean())
    if mean <= 0:
        return None
    if moment.ndim == 1:
        return (moment + _DAMPING * mean).sqrt()
    lifted = (moment + moment.T).div_(2)
    lifted.diagonal().add_(_DAMPING * mean)
    root: torch.Tensor = torch.linalg.cholesky(lifted)
    return root


def _svd(M: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    return U[:, :k], S[:k], Vh[:k].T


def _leading(M: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Find k singular triplets of M (m, n) by subspace iteration from a fixed random start."""
    generator = torch.Generator(M.device).manual_seed(0)
    start = torch.randn(M.shape[1], k + _OVERSAMPLING, generator=generator, dtype=M.dtype, device=M.device)
    basis = torch.linalg.qr(M @ start).Q
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(M @ torch.linalg.qr(M.T @ basis).Q).Q
    U, S, V = _svd(basis.T @ M, k)
    return basis @ U, S, V
