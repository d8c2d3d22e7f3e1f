"""Removing neurons of an MLP in closed form: its `down` projection reads fewer inputs, and makes up for the others.

Notation, besides that of factorize.py (W, C, mu, beta, Gamma; x (n,) are the MLP's neurons)
    J            the k neurons that stay, in the order in which they were chosen
    F (p, n)     what a change of x costs: the loss grows by E|F (x - x')|^2 / 2;  F = Gamma W, or W where outputs count alike
    S (n, n)     covariance of what the chosen neurons do not predict of x

Given x_J the best linear guess of x is mu + C_.J C_JJ^-1 (x_J - mu_J), so the layer becomes y' = B x_J + b with
B = W C_.J C_JJ^-1 (m, k) and b = beta + W mu - B mu_J: a dense layer of k inputs, after k rows of `gate` and `up`. That is the
compensation of MoDeGPT's MLPs (arXiv 2408.09632, section 3.2) with a bias, which a centred C needs. They choose J by ridge leverage
scores of C; here J grows by the neuron that lowers E|F (x - x')|^2 most, |F S_.j|^2 / S_jj, so that one order serves every width.

With C = L L^T in that order, B = (W L)_.k (L_kk)^-1 for the first k columns: a `Spectrum` with U = W L and V = L^-1, whose first k
rows know J alone.
"""

from __future__ import annotations

import torch

from lrserve.compression.factorize import Side, Spectrum, checked, sensitivity

_RIDGE = 1e-3  # of each neuron's own variance: the guess of x is fitted on the calibration tokens, and has to hold on others
_BLOCK = 32  # neurons chosen between two updates of S
_CANDIDATES = 8  # times the block: neurons that are looked at more closely


def narrow(
    W: torch.Tensor,
    C: torch.Tensor,
    mu: torch.Tensor,
    beta: torch.Tensor | None = None,
    gradient: tuple[Side, torch.Tensor] | None = None,
) -> Spectrum:
    """Order the inputs of a weight by what they are worth, and find the weight of every number of them; in float64.

    Args:
        W: (m, n).
        C: (n, n), symmetric positive semidefinite.
        mu: (n,).
        beta: (m,), the layer's own bias.
        gradient: second moment of the loss gradient, as for `factorize`.

    Raises:
        CalibrationError: a weight or statistic that is not finite.
    """
    W, C, mu = checked(W, C, mu, gradient)
    C, scale = _damped(C)
    F = sensitivity(W, gradient)
    order = _order(F, C)
    L = torch.linalg.cholesky(C[order][:, order])
    V = torch.zeros_like(C)
    V[:, order] = torch.linalg.solve_triangular(L, torch.eye(len(L), dtype=L.dtype, device=L.device), upper=False)
    return Spectrum.of(W[:, order] @ L, V, scale * (F[:, order] @ L).square().sum(0), W, mu, beta)


def ranked(W: torch.Tensor, M: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Order the inputs of a weight W (m, n) as `narrow` does, where a bias cannot be added, in float64.

    M (n, n) is the second moment of the inputs, in the place of C, and mu is zero.

    Returns:
        The inputs (n,) in the order in which they are chosen, and the error E|W (x - x')|^2 (n + 1,) where 0, 1, ..., n stay.

    Raises:
        NotFiniteError: a weight or moment that is not finite.
    """
    W, M, _ = checked(W, M, M.new_zeros(len(M)), None)
    C, scale = _damped(M)
    order = _order(W, C)
    values = scale * (W[:, order] @ torch.linalg.cholesky(C[order][:, order])).square().sum(0)
    return order, torch.cat([values.flip(0).cumsum(0).flip(0), values.new_zeros(1)])


def compensated(W: torch.Tensor, M: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Return B (m, k), the weight of the inputs `kept` (k,) of W (m, n) that makes up for the others, in float64 (`ranked`)."""
    C, _ = _damped(M.double())
    L = torch.linalg.cholesky(C[kept][:, kept])
    return torch.cholesky_solve(C[kept] @ W.double().T, L).T


def _damped(C: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Return C over its mean diagonal, with a ridge, and that mean: V is then of the order of 1, whatever the units of x."""
    scale = float(C.diagonal().mean())
    scale = scale if scale > 0 else 1.0
    C = C / scale
    return C + _RIDGE * torch.diag(C.diagonal() + _RIDGE), scale


def _order(F: torch.Tensor, C: torch.Tensor) -> torch.Tensor:
    """Return the inputs (n,) in the order in which they are chosen.

    A block of them at a time: the most promising candidates are chosen among one by one, and then taken out of S together. Nothing
    here is read back by the host, which would have to wait for a GPU each time.
    """
    S, G = C.clone(), F @ C
    left = torch.ones(len(C), dtype=torch.bool, device=C.device)
    order: list[torch.Tensor] = []
    for done in range(0, len(C), _BLOCK):
        worth = (G.square().sum(0) / S.diagonal()).masked_fill(~left, -1.0)
        block = min(_BLOCK, len(C) - done)
        candidates = worth.topk(min(_CANDIDATES * block, len(C) - done)).indices
        chosen = candidates[_greedy(G[:, candidates], S[candidates][:, candidates], block)]
        L = torch.linalg.cholesky(S[chosen][:, chosen])
        known = torch.linalg.solve_triangular(L, S[chosen], upper=False)
        G -= torch.linalg.solve_triangular(L, G[:, chosen].T, upper=False).T @ known
        S -= known.T @ known
        left.index_fill_(0, chosen, False)
        order.append(chosen)
    return torch.cat(order)


def _greedy(G: torch.Tensor, S: torch.Tensor, count: int) -> torch.Tensor:
    """Choose `count` of a few inputs one by one, given F S (p, c) and S (c, c)."""
    gram = G.T @ G
    worth = gram.diagonal().clone()
    S = S.clone()
    variance = S.diagonal().clone()
    left = torch.ones(len(S), dtype=torch.bool, device=S.device)
    chosen: list[torch.Tensor] = []
    for _ in range(count):
        j = (worth / variance).masked_fill(~left, -1.0).argmax(0, keepdim=True)  # (1,)
        chosen.append(j)
        left.index_fill_(0, j, False)
        root = variance[j].sqrt()
        s, g = S.index_select(1, j)[:, 0] / root, gram.index_select(1, j)[:, 0] / root
        # G_.i loses g_j s_i: its inner products follow from those of G
        gram = gram - torch.outer(g, s) - torch.outer(s, g) + (worth[j] / variance[j]) * torch.outer(s, s)
        S = S - torch.outer(s, s)
        worth, variance = gram.diagonal(), S.diagonal().clamp_min(0)
        variance = torch.where(left, variance, 1.0)
    return torch.cat(chosen)
