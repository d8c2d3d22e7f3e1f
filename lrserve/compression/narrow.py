"""Removing neurons of an MLP in closed form: its `down` projection reads fewer inputs, and makes up for the others.

Notation, besides that of factorize.py (W, C, mu, beta, Gamma; x (n,) are the MLP's neurons)
    J            the k neurons that stay, the first k of one order
    s (n,)       standard deviation of each neuron, the ridge included;  R (n, n) = C / (s s^T), their correlation
    F (p, n)     what a change of x costs: the loss grows by E|F (x - x')|^2 / 2;  F = Gamma W, or W where outputs count alike
    S (n, n)     covariance of what the chosen neurons do not predict of x / s;  G = F s S

Given x_J the best linear guess of x is mu + C_.J C_JJ^-1 (x_J - mu_J), so the layer becomes y' = B x_J + b with
B = W C_.J C_JJ^-1 (m, k) and b = beta + W mu - B mu_J: a dense layer of k inputs, after k rows of `gate` and `up`. That is the
compensation of MoDeGPT's MLPs (arXiv 2408.09632, section 3.2) with a bias, which a centred C needs. They choose J by ridge leverage
scores of C; here J grows by the neuron that lowers E|F (x - x')|^2 most, |G_.j|^2 / S_jj, so that one order serves every width.

What it takes to solve for any width is the order and W s R (m, n). C is read again where a width is cut, so nothing of (n, n) is
stored beside the statistics.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lrserve.compression.factorize import Factors, Side, require_finite, sensitivity, tails

_RIDGE = 1e-3  # of each neuron's own variance: the guess of x is fitted on the calibration tokens, and has to hold on others
_BLOCK = 32  # neurons chosen between two updates of S, at least
_UPDATES = 112  # of S, at most: each of them reads and writes all of it
_CANDIDATES = 4  # times the block: neurons that are looked at more closely


@dataclass(frozen=True)
class Neurons:
    """An MLP's neurons by what they are worth, and what its `down` projection is solved from for any number of them.

    order (n,) int32: most important first. eigenvalues (n,): what each of them is worth in that order, never negative. WR (m, n) =
    W s R, scales (n,) = s, offset (m,) = W mu, mean (n,) = mu, beta (m,). C (n, n) is the covariance that they come from.
    """

    order: torch.Tensor
    eigenvalues: torch.Tensor
    WR: torch.Tensor
    scales: torch.Tensor
    offset: torch.Tensor
    mean: torch.Tensor
    beta: torch.Tensor
    C: torch.Tensor

    def cut(self, width: int) -> Factors:
        """Solve for a number of neurons from 1 to n: factors by the order (k,) of their inputs, ascending.

        Solves in C's dtype, whose rounding is far below the ridge, or in float64 where C is too close to singular for it.

        Raises:
            ValueError: a width outside 1..n.
        """
        n = len(self.order)
        if not 1 <= width <= n:
            raise ValueError(f"width {width} is outside 1..{n}")
        J = self.order[:width].long().sort().values
        s = self.scales[J].to(self.C.dtype)
        correlation = self.C.index_select(0, J.to(self.C.device)).to(J.device).index_select(1, J)
        correlation.div_(s).div_(s[:, None]).fill_diagonal_(1.0)
        B = (_solved(correlation, self.WR[:, J].T) / s[:, None]).T.to(self.WR.dtype)
        return Factors(A=B.new_zeros(width, 0), B=B, b=self.beta + self.offset - B @ self.mean[J], order=J.int())

    def errors(self) -> torch.Tensor:
        """Expected squared error of every width 0..n (`Spectrum.errors`)."""
        return tails(self.eigenvalues)


def narrow(
    W: torch.Tensor,
    C: torch.Tensor,
    mu: torch.Tensor,
    beta: torch.Tensor | None = None,
    gradient: tuple[Side, torch.Tensor] | None = None,
) -> Neurons:
    """Order the inputs of a weight by what they are worth.

    Args:
        W: (m, n).
        C: (n, n), symmetric positive semidefinite; kept by what is returned.
        mu: (n,).
        beta: (m,), the layer's own bias.
        gradient: second moment of the loss gradient, as for `factorize`.

    The order is found in float32, in units in which every neuron varies by 1; two matrices of C's size and dtype are held.

    Raises:
        NotFiniteError: a weight or statistic that is not finite.
    """
    require_finite(W, C, mu, gradient)
    R, s = _correlation(C)
    W64 = W.double()
    F = sensitivity(W64, gradient)
    WR = (W64 * s).to(C) @ R
    order, worth = _ordered(WR if F is W64 else (F * s).to(C) @ R, R)
    return Neurons(
        order=order.int(),
        eigenvalues=worth,
        WR=WR,
        scales=s,
        offset=W64 @ mu.double(),
        mean=mu.to(WR),
        beta=WR.new_zeros(len(W)) if beta is None else beta.to(WR),
        C=C,
    )


def ranked(W: torch.Tensor, M: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Order the inputs of a weight W (m, n) as `narrow` does, where a bias cannot be added.

    M (n, n) is the second moment of the inputs, in the place of C, and mu is zero.

    Returns:
        The inputs (n,) in the order in which they are chosen, and the error E|W (x - x')|^2 (n + 1,) where 0, 1, ..., n stay.

    Raises:
        NotFiniteError: a weight or moment that is not finite.
    """
    require_finite(W, M, M.new_zeros(len(M)), None)
    R, s = _correlation(M)
    order, worth = _ordered((W.double() * s).to(M) @ R, R)
    return order, tails(worth)


def compensated(W: torch.Tensor, M: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Return B (m, k), the weight of the inputs `kept` (k,) of W (m, n) that makes up for the others, in float64 (`ranked`)."""
    R, s = _correlation(M.double())
    return _solved(R[kept][:, kept], R[kept] @ (W.double() * s).T).T / s[kept]


def _solved(R: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Solve R x = right for R (k, k) positive definite and right (k, m), in R's dtype if that will do."""
    root, failed = torch.linalg.cholesky_ex(R)
    if failed:
        root = torch.linalg.cholesky(R.double())
    return torch.cholesky_solve(right.to(root), root)


def _correlation(C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return R (n, n), in C's dtype, and s (n,), in float64: of C with a ridge."""
    variance = C.diagonal().double()
    unit = float(variance.mean())
    s = (variance + _RIDGE * (variance + _RIDGE * (unit if unit > 0 else 1.0))).sqrt()
    return (C / s[:, None].to(C)).div_(s.to(C)).fill_diagonal_(1.0), s


def _ordered(G: torch.Tensor, S: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the inputs (n,) by what they are worth, and that (n,), float64, given G = F s S (p, n) and S, which is used up."""
    size = float(G.double().square().mean().sqrt())
    size = size if size > 0 else 1.0
    order, worth = _order((G / size).float(), S.float())
    return order, size**2 * worth.double()


def _order(G: torch.Tensor, S: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the inputs (n,) in the order in which they are chosen, and what each lowers the error by (n,); both are used up.

    A block of them at a time: the most promising candidates are chosen among one by one, and then taken out of S together. Rows and
    columns of inputs that are chosen are cut out once they are a quarter. Nothing here is read back by the host, which would have
    to wait for a GPU each time.
    """
    n = len(S)
    step = max(_BLOCK, n // _UPDATES)
    inputs = torch.arange(n, device=S.device)  # of which S still has rows
    left = torch.ones(n, dtype=torch.bool, device=S.device)
    order: list[torch.Tensor] = []
    worths: list[torch.Tensor] = []
    for done in range(0, n, step):
        if n - done <= 0.75 * len(S):
            stay = left.byte().argsort(descending=True, stable=True)[: n - done]
            G, S, inputs, left = G[:, stay], S[stay][:, stay], inputs[stay], left[stay]
        worth = (G.square().sum(0) / S.diagonal()).masked_fill(~left, -1.0)
        block = min(step, n - done)
        candidates = worth.topk(min(_CANDIDATES * block, n - done)).indices
        chosen = candidates[_greedy(G[:, candidates], S[candidates][:, candidates], block)]
        L = torch.linalg.cholesky(S[chosen][:, chosen])
        known = torch.linalg.solve_triangular(L, S[chosen], upper=False)
        columns = torch.linalg.solve_triangular(L, G[:, chosen].T, upper=False)  # of F times the Cholesky factor of the first S
        G.addmm_(columns.T, known, alpha=-1)
        S.addmm_(known.T, known, alpha=-1)
        left.index_fill_(0, chosen, False)
        order.append(inputs[chosen])
        worths.append(columns.square().sum(1))
    return torch.cat(order), torch.cat(worths)


def _greedy(G: torch.Tensor, S: torch.Tensor, count: int) -> torch.Tensor:
    """Choose `count` of a few inputs one by one, given G (p, c) and S (c, c), which is used up."""
    gram = G.T @ G
    worth, variance = gram.diagonal(), S.diagonal()
    left = torch.ones(len(S), dtype=torch.bool, device=S.device)
    chosen: list[torch.Tensor] = []
    for _ in range(count):
        gain = torch.where(left, worth / variance, -1.0)  # those that were chosen may have no variance left
        j = gain.argmax(0, keepdim=True)  # (1,)
        chosen.append(j)
        left.index_fill_(0, j, False)
        root = variance[j].sqrt()
        s, g = S.index_select(1, j)[:, 0] / root, gram.index_select(1, j)[:, 0] / root
        # G_.i loses g_j s_i: its inner products follow from those of G
        gram.addmm_(torch.stack([s, g], 1), torch.stack([g - gain[j] * s, s]), alpha=-1)
        S.addr_(s, s, alpha=-1)
    return torch.cat(chosen)
