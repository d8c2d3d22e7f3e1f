"""Feature factorization: low-rank factors of a linear layer that keep its *outputs* (Bolaco, arXiv 2405.10616, section 3).

Notation
    W    (m, n)  weight;  y = W x + beta;  beta (m,), zero where the layer has no bias
    C    (n, n)  covariance of x;  mu (n,) mean of x
    Cy   (m, m)  covariance of y = W C W^T; its eigenvalues, largest first, are lambda
    k            min(m, n): the rank beyond which nothing is left

Among all maps y' = B A x + b of rank r, A = U_r^T W, B = U_r, b = beta + (I - U_r U_r^T) W mu minimises E|y - y'|^2, with U the
eigenvectors of Cy, and the minimum is the sum of the lambdas that were left out. No inverse is taken, so a singular C is no
special case, and one decomposition serves every rank.

Two-sided weighting (docs/methods.md, "Two-sided weighting") minimises E|Gamma (y - y')|^2 instead. With Gamma^2 = E[g g^T], the
second moment of the loss gradient g with respect to y, half of that is the second-order estimate of the loss itself, in nats per
token when the loss is the cross entropy of labels drawn from the model (then Gamma^2 is the block of the KL divergence's Fisher
matrix, up to the Kronecker assumption that x and g are independent; K-FAC, arXiv 1503.05671, section 3). Either side of W will do,
the narrower is cheaper:
    output side  Gamma^2 (m, m):  P Lambda P^T = Gamma Cy Gamma;   B = Gamma^-1 P_r,     A = P_r^T Gamma W
    input side   K (n, n) = W^T Gamma^2 W, the second moment of the gradient with respect to x:
                 Q Lambda Q^T = K^1/2 C K^1/2;                     B = W K^-1/2 Q_r,     A = Q_r^T K^1/2
The gradient's moments are damped towards those of the unweighted problem, so that the inverses exist.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, TypeGuard

import torch

from lrserve.compression.groups import Group
from lrserve.errors import NotFiniteError

_DAMPING = 1e-2  # share of the unweighted problem: directions that no gradient was seen in still count a little
_RIDGE = 1e-9  # smallest eigenvalue of a damped moment, over its largest

Side = Literal["input", "output"]
GradientOf = Callable[[Group], tuple[Side, torch.Tensor] | None]
"""Gives a group's second moment of the loss gradient, and on which side; None weighs all its outputs alike."""


@dataclass(frozen=True)
class Factors:
    """One group's low-rank factors, the map y' = B z + b with z (r,) the r coordinates that are kept of x.

    Two factors: z = A x, A (r, n), and `order` is None. Identity block: z = x_J + A x_Jc, A (r, n - r), with J the first r and Jc
    the other entries of `order` (n,), a permutation of the inputs. Fewer inputs: z = x_J, A (r, 0), and `order` (r,) is J alone.
    B (m, r), b (m,).

    `feeding` (members r, d): the rows that give those fewer inputs, in ascending order of the inputs and member after member, as
    training left them; None takes the dense model's.
    """

    A: torch.Tensor
    B: torch.Tensor
    b: torch.Tensor
    order: torch.Tensor | None = None
    feeding: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        """Rows of A."""
        return int(self.A.shape[0])

    def merged(self) -> torch.Tensor:
        """Return the weight (m, n) that the factors stand for."""
        if self.order is None:
            return self.B @ self.A
        weight = torch.empty(self.B.shape[0], len(self.order), dtype=self.B.dtype, device=self.B.device)
        weight[:, self.order.long()] = torch.cat([self.B, self.B @ self.A], dim=1)
        return weight


@dataclass(frozen=True)
class Spectrum:
    """Everything from which the factors of any rank are sliced.

    U (m, k), V (k, n): B and A of full rank, most important column and row first. eigenvalues (k,): what each of them is worth,
    largest first and never negative. offset (m,) = W mu, mean (k,) = V mu, beta (m,).
    """

    U: torch.Tensor
    V: torch.Tensor
    eigenvalues: torch.Tensor
    offset: torch.Tensor
    mean: torch.Tensor
    beta: torch.Tensor

    @classmethod
    def of(
        cls,
        U: torch.Tensor,
        V: torch.Tensor,
        eigenvalues: torch.Tensor,
        W: torch.Tensor,
        mu: torch.Tensor,
        beta: torch.Tensor | None,
    ) -> Spectrum:
        """Add to a decomposition of W (m, n) what makes up for the mean mu (n,) and the layer's own bias beta (m,) or None."""
        return cls(U, V, eigenvalues, offset=W @ mu, mean=V @ mu, beta=W.new_zeros(len(W)) if beta is None else beta.to(W))

    def cut(self, rank: int) -> Factors:
        """Return the optimal two factors of a rank from 1 to k.

        Raises:
            ValueError: a rank outside 1..k.
        """
        k = self.U.shape[1]
        if not 1 <= rank <= k:
            raise ValueError(f"rank {rank} is outside 1..{k}")
        B, A = self.U[:, :rank], self.V[:rank]
        return Factors(A=A, B=B, b=self.beta + self.offset - B @ self.mean[:rank])

    def errors(self) -> torch.Tensor:
        """Expected squared error of every rank 0..k, float64 (k + 1,), down to 0; exact on the calibration tokens.

        In squared units of the output or, of a two-sided factorization, twice the expected loss in nats per token.
        """
        return tails(self.eigenvalues)


def tails(eigenvalues: torch.Tensor) -> torch.Tensor:
    """Return the sums of all but the first 0..k of k eigenvalues, float64 (k + 1,)."""
    values = eigenvalues.double()
    return torch.cat([values.flip(0).cumsum(0).flip(0), values.new_zeros(1)])


class FactorSource(Protocol):
    """Where a plan's factors come from: the spectra of all ranks, or what an improvement made of one plan's."""

    def cut(self, name: str, rank: int) -> Factors:
        """Return the two factors of the group of that name at one rank."""


def factorize(
    W: torch.Tensor,
    C: torch.Tensor,
    mu: torch.Tensor,
    beta: torch.Tensor | None = None,
    gradient: tuple[Side, torch.Tensor] | None = None,
) -> Spectrum:
    """Decompose one (stacked) weight for every rank at once, in float64.

    Args:
        W: (m, n), any float dtype.
        C: (n, n), symmetric positive semidefinite. The identity with a zero `mu` gives the plain SVD of W.
        mu: (n,).
        beta: (m,), the layer's own bias.
        gradient: second moment of the loss gradient, ("output", (m, m)) with respect to y or ("input", (n, n)) with respect
            to x; None weighs all outputs alike.

    All are on one device, which computes and holds the result.

    Raises:
        NotFiniteError: a weight or statistic that is not finite.
    """
    require_finite(W, C, mu, gradient)
    W64, C64, mu64 = W.double(), C.double(), mu.double()
    if not _weighs(gradient):
        U, V, values = _unweighted(W64, C64)
    elif gradient[0] == "output":
        U, V, values = _output_side(W64, C64, gradient[1].double())
    else:
        U, V, values = _input_side(W64, C64, gradient[1].double())
    return Spectrum.of(U, V, values, W64, mu64, beta)


def require_finite(W: torch.Tensor, C: torch.Tensor, mu: torch.Tensor, gradient: tuple[Side, torch.Tensor] | None) -> None:
    """Refuse numbers that nothing can be solved from.

    Raises:
        NotFiniteError: one of them, or the gradient's moment, is not finite.
    """
    moments = () if gradient is None else (gradient[1],)
    if not all(torch.isfinite(tensor).all() for tensor in (W, C, mu, *moments)):
        raise NotFiniteError("a weight, covariance or gradient is not finite; check the checkpoint and the calibration text")


def moved(gradient: tuple[Side, torch.Tensor] | None, device: torch.device) -> tuple[Side, torch.Tensor] | None:
    """Return a gradient's moment on a device."""
    return None if gradient is None else (gradient[0], gradient[1].to(device))


def sensitivity(W: torch.Tensor, gradient: tuple[Side, torch.Tensor] | None) -> torch.Tensor:
    """Return F (p, n) such that |F (x - x')|^2 is the error of the outputs as `factorize` weighs it: Gamma W, K^1/2, or W."""
    if not _weighs(gradient):
        return W
    if gradient[0] == "output":
        return _roots(_damped_output(gradient[1].double()))[0] @ W
    return _roots(_damped_input(gradient[1].double(), W))[0]


def _weighs(gradient: tuple[Side, torch.Tensor] | None) -> TypeGuard[tuple[Side, torch.Tensor]]:
    return gradient is not None and float(gradient[1].trace()) > 0


_Decomposition = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _unweighted(W: torch.Tensor, C: torch.Tensor) -> _Decomposition:
    """For m > n, W = Q R with Q (m, n) orthonormal: the eigenvectors of R C R^T are carried back by Q, without an (m, m) matrix."""
    m, n = W.shape
    if m <= n:
        values, U = _eigh(W @ C @ W.T)
        return U, U.T @ W, values
    Q, R = torch.linalg.qr(W)
    values, P = _eigh(R @ C @ R.T)
    return Q @ P, P.T @ R, values


def _output_side(W: torch.Tensor, C: torch.Tensor, moment: torch.Tensor) -> _Decomposition:
    root, inverse = _roots(_damped_output(moment))
    values, P = _eigh(root @ (W @ C @ W.T) @ root)
    k = min(W.shape)
    return inverse @ P[:, :k], P[:, :k].T @ (root @ W), values[:k]


def _input_side(W: torch.Tensor, C: torch.Tensor, moment: torch.Tensor) -> _Decomposition:
    root, inverse = _roots(_damped_input(moment, W))
    values, Q = _eigh(root @ C @ root)
    k = min(W.shape)
    return W @ (inverse @ Q[:, :k]), Q[:, :k].T @ root, values[:k]


def _damped_output(moment: torch.Tensor) -> torch.Tensor:
    return moment + _DAMPING * moment.trace() / len(moment) * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)


def _damped_input(moment: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
    gram = W.T @ W
    scale = gram.trace()
    return moment + _DAMPING * moment.trace() / scale * gram if scale > 0 else moment


def _eigh(symmetric: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues, largest first and never negative, and their eigenvectors."""
    values, vectors = torch.linalg.eigh((symmetric + symmetric.T) / 2)
    return values.flip(0).clamp_min(0), vectors.flip(1)


def _roots(moment: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric square root and its inverse; eigenvalues below the ridge are lifted to it."""
    values, vectors = _eigh(moment)
    values = values.clamp_min(float(values[0]) * _RIDGE)
    return (vectors * values.sqrt()) @ vectors.T, (vectors * values.rsqrt()) @ vectors.T
