"""Feature factorization: low-rank factors of a linear layer that keep its *outputs* (Bolaco, arXiv 2405.10616, section 3).

Notation
    W    (m, n)  weight;  y = W x + beta;  beta (m,), zero where the layer has no bias
    C    (n, n)  covariance of x;  mu (n,) mean of x
    Cy   (m, m)  covariance of y = W C W^T; its eigenvalues, largest first, are lambda
    k            min(m, n): the rank beyond which nothing is left
    U    (m, k)  orthonormal; its first r columns span the best r-dimensional space for y
    V    (k, n)  U^T W

Among all maps y' = B A x + b of rank r, A = U_r^T W, B = U_r, b = beta + (I - U_r U_r^T) W mu minimises E|y - y'|^2, and the
minimum is the sum of the lambdas that were left out. No inverse is taken, so a singular C is no special case, and one
decomposition serves every rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lrserve.errors import CalibrationError


@dataclass(frozen=True)
class Factors:
    """One group's low-rank factors: y' = B (A x) + b with A (r, n), B (m, r), b (m,)."""

    A: torch.Tensor
    B: torch.Tensor
    b: torch.Tensor

    @property
    def rank(self) -> int:
        """Rows of A."""
        return int(self.A.shape[0])


@dataclass(frozen=True)
class Spectrum:
    """Everything from which the factors of any rank are sliced.

    U (m, k), V (k, n), eigenvalues (k,) largest first and never negative, offset (m,) = W mu, beta (m,).
    """

    U: torch.Tensor
    V: torch.Tensor
    eigenvalues: torch.Tensor
    offset: torch.Tensor
    beta: torch.Tensor

    def cut(self, rank: int) -> Factors:
        """Return the optimal factors of a rank from 1 to k.

        Raises:
            ValueError: a rank outside 1..k.
        """
        k = self.U.shape[1]
        if not 1 <= rank <= k:
            raise ValueError(f"rank {rank} is outside 1..{k}")
        B, A = self.U[:, :rank], self.V[:rank]
        b = self.beta + self.offset - B @ (B.T @ self.offset)
        return Factors(A=A, B=B, b=b)

    def relative_errors(self) -> torch.Tensor:
        """Expected squared error of every rank 0..k over the output's total variance, float64 (k + 1,), from 1 down to 0.

        Exact on the calibration tokens. A layer whose outputs do not vary at all loses nothing at any rank: zeros.
        """
        values = self.eigenvalues.double()
        tails = torch.cat([values.flip(0).cumsum(0).flip(0), values.new_zeros(1)])
        return tails / tails[0] if tails[0] > 0 else torch.zeros_like(tails)


def factorize(W: torch.Tensor, C: torch.Tensor, mu: torch.Tensor, beta: torch.Tensor | None = None) -> Spectrum:
    """Decompose one (stacked) weight for every rank at once, in float64.

    For m <= n the eigenvectors are those of Cy. For m > n, W = Q R with Q (m, n) orthonormal, and the eigenvectors of
    the smaller R C R^T are carried back by Q: the same space, without an (m, m) matrix.

    Args:
        W: (m, n), any float dtype.
        C: (n, n), symmetric positive semidefinite. The identity with a zero `mu` gives the plain SVD of W.
        mu: (n,).
        beta: (m,), the layer's own bias.

    Raises:
        CalibrationError: a weight or statistic that is not finite.
    """
    W64, C64, mu64 = W.double(), C.double(), mu.double()
    if not (torch.isfinite(W64).all() and torch.isfinite(C64).all() and torch.isfinite(mu64).all()):
        raise CalibrationError("a weight or a covariance is not finite; check the checkpoint and the calibration text")
    m, n = W64.shape
    if m <= n:
        values, U = torch.linalg.eigh(W64 @ C64 @ W64.T)
    else:
        Q, R = torch.linalg.qr(W64)
        values, P = torch.linalg.eigh(R @ C64 @ R.T)
        U = Q @ P
    U, values = U.flip(1), values.flip(0).clamp_min(0)
    return Spectrum(
        U=U,
        V=U.T @ W64,
        eigenvalues=values,
        offset=W64 @ mu64,
        beta=torch.zeros(m, dtype=torch.float64) if beta is None else beta.double(),
    )
