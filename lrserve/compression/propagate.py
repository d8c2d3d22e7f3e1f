"""Error propagation: factors for the inputs that a group has in the compressed model (AA-SVD, arXiv 2604.02119).

Notation, besides that of sequential.py (x, x^, mu, mu^, G, H) and factorize.py (W, beta, Gamma, K)
    d          damping times the mean of H's diagonal
    R (n, n)   the best linear guess of x - mu from x^ - mu^:  (G + d I) (H + d I)^-1
    M (m, n)   W R: the best full-rank map from x^ to the dense outputs y = W x + beta

The error of a rank-r map on x^ is E|Gamma (y - y')|^2 = const + E|Gamma (M - B A) (x^ - mu^)|^2, since what R leaves of x is not
correlated with x^ (exactly for d = 0). So the factors are those of `factorize` with M in the place of W and H in that of C, and the
outputs are matched in the mean by b = beta + W mu - B A mu^. The gradient's moment is the dense model's: on the output side Gamma^2
stays, on the input side K = W^T Gamma^2 W becomes M^T Gamma^2 M = R^T K R.

Damping shrinks R towards the identity, which compensates for nothing: with R = I the factors are those of the features of x^. R is
fitted on the calibration tokens and has n^2 coefficients, so with few tokens per input it needs damping to hold on other text.

In full, R takes back more than compression added: like every regression on noisy inputs it shrinks the signal too, a little in each
block, and the blocks add up. Between R and I lies a better map, M = W (s R + (1 - s) I) with the strength s; docs/methods.md has
the measurements.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from lrserve.compression.factorize import Factors, GradientOf, Side, Spectrum, factorize, moved
from lrserve.compression.groups import Group
from lrserve.compression.narrow import Neurons, narrow
from lrserve.compression.sequential import PairedCovariance, Step, group_by_group

STRENGTH = 0.75
"""Share of the compensation that a `propagation` makes unless it is told otherwise."""


def compensation(pairs: PairedCovariance, damping: float, strength: float) -> torch.Tensor:
    """Return strength R + (1 - strength) I, float64 (n, n); the identity where x^ does not vary."""
    identity = torch.eye(len(pairs.H), dtype=torch.float64, device=pairs.H.device)
    d = damping * pairs.H.trace() / len(pairs.H)
    if not d > 0:
        return identity
    R = torch.linalg.solve(pairs.H + d * identity, (pairs.G + d * identity).T).T  # H is symmetric
    return torch.lerp(identity, R, strength)


def factorize_compensated(
    W: torch.Tensor,
    beta: torch.Tensor,
    pairs: PairedCovariance,
    gradient: tuple[Side, torch.Tensor] | None = None,
    *,
    damping: float = 1e-2,
    strength: float = 1.0,
    solve: Callable[..., Spectrum | Neurons] = factorize,
) -> Spectrum | Neurons:
    """Decompose a weight for its compressed inputs, for every rank at once, in float64.

    Args:
        W: (m, n).
        beta: (m,), the layer's own bias.
        pairs: statistics of the layer's inputs in the dense and in the compressed model, on the device of W.
        gradient: second moment of the dense model's loss gradient, as for `factorize`.
        damping: positive, in units of the mean variance of x^.
        strength: 1 compensates in full, 0 not at all.
        solve: `factorize`, or `narrow`.

    Raises:
        CalibrationError: a weight or statistic that is not finite.
        ValueError: an option out of range.
    """
    if not damping > 0 or not 0 <= strength <= 1:
        raise ValueError(f"damping {damping} must be positive and strength {strength} within 0..1")
    R = compensation(pairs, damping, strength)
    if gradient is not None and gradient[0] == "input":
        gradient = "input", R.T @ gradient[1].double() @ R
    spectrum = solve(W.double() @ R, pairs.H, pairs.mu_hat, beta, gradient)
    return replace(spectrum, offset=W.double() @ pairs.mu)


def propagation(gradient: GradientOf = lambda group: None, *, damping: float = 1e-2, strength: float = STRENGTH) -> Step:
    """Return the step of a `walk` that finds every group's factors anew, each for its compressed inputs.

    Args:
        gradient: a group's gradient moment (`GradientStore.read`), or None to weigh its outputs alike.
        damping: positive, in units of the mean variance of the group's compressed inputs.
        strength: 1 compensates in full, 0 not at all.

    Raises, when it is taken:
        CalibrationError: gradients that are not finite.
        ValueError: damping, strength or a rank out of range.
    """

    def solve(group: Group, rank: int, W: torch.Tensor, beta: torch.Tensor, pairs: PairedCovariance) -> Factors:
        method, moment = narrow if group.fed_by else factorize, moved(gradient(group), W.device)
        spectrum = factorize_compensated(W, beta, pairs, moment, damping=damping, strength=strength, solve=method)
        return spectrum.cut(rank)

    return group_by_group(solve)
