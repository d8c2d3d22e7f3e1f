"""Baselines of bench/quality.py and bench/search.py: the papers' factorizations, from the statistics that lrserve uses.

Notation: that of lrserve/compression/factorize.py, and
    S    (n, n)  invertible map of the inputs;  W S = L Sigma R^T its singular value decomposition, L (m, k), largest first
    M    (n, n)  second moment E[x x^T], uncentred

`svd`, `asvd` and `svd_llm` truncate the SVD of W S and undo S on the right, which minimises |(W - W') S|_F over all W' of rank r.
They differ in S only:
    svd      S = I                                                          |W - W'|_F
    asvd     S diagonal, from the size of each input channel                a diagonal stand-in for E|y - y'|^2
    svd_llm  S S^T = M, by Cholesky                                         E|y - y'|^2, without a bias
Since L_r Sigma_r R_r^T S^-1 = L_r L_r^T W, the factors are B = L_r and A = L_r^T W: the papers' map, without taking S^-1, so that
inputs that are nearly or exactly dependent do no harm. None of the three knows a feature bias: b = beta. `lord` and `bolaco` are
the feature form (factorize.py), whose bias is part of them, on the covariance of one pool and on the pooled one.

Each factorizes one linear's W (m, n) or several stacked ones. The papers factorize q, k, v, gate and up one by one (`separate` in
lrserve/compression/groups.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

import torch

from lrserve.compression.calibrate import read_statistics
from lrserve.compression.covariance import Covariance
from lrserve.compression.factorize import Spectrum, factorize
from lrserve.compression.groups import Group
from lrserve.compression.spectra import Decompose
from lrserve.errors import CalibrationError

_JITTER = 1e-10  # of the second moment's mean eigenvalue: first addition to its diagonal, where Cholesky needs one
_FLOOR = 1e-6  # of the largest channel's size: the least that a channel counts as

Baseline = Callable[[torch.Tensor, Covariance, torch.Tensor | None], Spectrum]
"""Factorizes W (m, n) on the statistics of its inputs, with the layer's bias beta (m,) or None."""


def svd(W: torch.Tensor, statistics: Covariance, beta: torch.Tensor | None = None) -> Spectrum:
    """Truncate the SVD of the weight; looks at no activation. `errors()` is |W - W'|_F^2.

    Raises:
        CalibrationError: a weight that is not finite.
    """
    return _through(W, torch.eye(W.shape[1], dtype=torch.float64), beta)


def asvd(W: torch.Tensor, statistics: Covariance, beta: torch.Tensor | None = None, *, alpha: float = 0.5) -> Spectrum:
    """Scale each input channel by its size to the power alpha before the SVD (ASVD, arXiv 2312.05821, section 3).

    The paper's size is the mean of |x_i|; here it is the root mean square of x_i, since |x_i| is not among the statistics. A
    channel counts as at least 1e-6 of the largest; where no channel was ever other than zero, and with alpha 0, this is `svd`.
    `errors()` is |(W - W') S|_F^2. The paper's own rank search, by sensitivity, is not part of this.

    Raises:
        CalibrationError: a weight or statistic that is not finite.
    """
    size = statistics.second_moment().diagonal().clamp_min(0).sqrt()
    largest = size.max()
    scale = torch.ones_like(size) if largest == 0 else size.clamp_min(_FLOOR * largest) ** alpha
    return _through(W, torch.diag(scale), beta)


def svd_llm(W: torch.Tensor, statistics: Covariance, beta: torch.Tensor | None = None) -> Spectrum:
    """Whiten the inputs by the Cholesky factor of M before the SVD (SVD-LLM, arXiv 2403.07378, section 3.1).

    `errors()` is E|y - y'|^2. Where M is not positive definite to working precision its diagonal is raised: by 1e-10 of its mean
    eigenvalue first, tenfold at each further attempt. Directions that no token was seen in then count a little, as in `svd`, which
    is also what a layer of zero inputs gets. The paper's fine-tuning of the factors is not part of this.

    Raises:
        CalibrationError: a weight or statistic that is not finite.
    """
    return _through(W, _whitening(statistics.second_moment()), beta)


def lord(W: torch.Tensor, statistics: Covariance, beta: torch.Tensor | None = None) -> Spectrum:
    """Keep the outputs' largest principal components, on the plain covariance of all tokens (LoRD, arXiv 2309.14021, section 2).

    Raises:
        CalibrationError: a weight or statistic that is not finite.
    """
    total = statistics.total()
    return factorize(W, total.C, total.mu, beta)


def bolaco(W: torch.Tensor, statistics: Covariance, beta: torch.Tensor | None = None) -> Spectrum:
    """Keep the outputs' largest principal components, on the pooled covariance (Bolaco, arXiv 2405.10616, section 3).

    Raises:
        CalibrationError: a weight or statistic that is not finite.
    """
    return factorize(W, statistics.C, statistics.mu, beta)


BASELINES: Final[Mapping[str, Baseline]] = {"svd": svd, "asvd": asvd, "svd-llm": svd_llm, "lord": lord, "bolaco": bolaco}


def _through(W: torch.Tensor, S: torch.Tensor, beta: torch.Tensor | None) -> Spectrum:
    W64 = W.double()
    if not (torch.isfinite(W64).all() and torch.isfinite(S).all()):
        raise CalibrationError("a weight or covariance is not finite; check the checkpoint and the calibration text")
    L, values, _ = torch.linalg.svd(W64 @ S, full_matrices=False)
    return Spectrum(
        U=L,
        V=L.T @ W64,
        eigenvalues=values.square(),
        offset=W64.new_zeros(len(W64)),
        mean=W64.new_zeros(len(values)),
        beta=W64.new_zeros(len(W64)) if beta is None else beta.double(),
    )


def _whitening(M: torch.Tensor) -> torch.Tensor:
    """Lower triangular S with S S^T = M, float64; jittered as `svd_llm` says, the identity for M = 0."""
    if not torch.isfinite(M).all():
        raise CalibrationError("a covariance is not finite; check the checkpoint and the calibration text")
    scale = float(M.diagonal().mean())
    unit = torch.eye(len(M), dtype=torch.float64)
    if scale <= 0:
        return unit
    jitter = 0.0
    while True:
        S: torch.Tensor
        S, failed = torch.linalg.cholesky_ex(M / scale + jitter * unit)
        if not failed:
            return S * math.sqrt(scale)
        jitter = max(10 * jitter, _JITTER)


def baseline(name: str, statistics: Path, pairs: Sequence[tuple[Group, Group]]) -> Decompose:
    """Return one of `BASELINES` for single linears, on the statistics of the fused groups that they are of (`groups.separate`)."""
    origin = {single.name: fused for single, fused in pairs}
    return lambda group, weight, bias: BASELINES[name](weight, read_statistics(statistics, origin[group.name]), bias)
