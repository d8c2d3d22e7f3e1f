"""Pooled covariance of a layer's inputs (Bolaco, arXiv 2405.10616, section 3).

Notation
    x    (t, n)  inputs of a layer for t tokens
    n_k          tokens in pool k;  s_k (n,) their sum;  S_k (n, n) the sum of x^T x
    M2   (n, n)  scatter around each pool's own mean:  sum_k (S_k - s_k s_k^T / n_k)
    C    (n, n)  pooled covariance:  M2 / sum_k (n_k - 1)
    mu   (n,)    pooled mean:  sum_k s_k / sum_k n_k

Each pool is centred on its own mean, so the scatter between pools is dropped; a single pool gives the plain covariance.
Products are formed and summed in float32 within a batch, and in float64 across batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from lrserve.errors import CalibrationError

_BLOCK = 512  # columns per block of the symmetric product: small enough to save work, large enough for fast GEMMs


@dataclass(frozen=True)
class Covariance:
    """Statistics of one layer's inputs: C (n, n) and mu (n,) in float64, over `tokens` tokens in `pools` pools."""

    C: torch.Tensor
    mu: torch.Tensor
    tokens: int
    pools: int


@contextmanager
def _exact_bfloat16_products(x: torch.Tensor) -> Iterator[None]:
    """Let oneDNN multiply float32 copies of bfloat16 values in bfloat16, accumulating in float32.

    Nothing is lost, since the inputs *are* bfloat16 values, and AMX/AVX-512 machines do it three times as fast.
    """
    if x.dtype is not torch.bfloat16 or x.device.type != "cpu":
        yield
        return
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sum (n,) and x^T x (n, n), both in float32, of x (t, n).

    Only the blocks on and above the diagonal of x^T x are computed, then mirrored.
    """
    n = x.shape[1]
    with _exact_bfloat16_products(x):
        x32 = x.float()
        total = x32.new_ones(1, x.shape[0]) @ x32  # several times as fast as x.sum(0)
        if n <= _BLOCK:
            return total[0], x32.T @ x32
        S = torch.empty(n, n, dtype=torch.float32, device=x.device)
        for start in range(0, n, _BLOCK):
            stop = min(start + _BLOCK, n)
            S[start:stop, start:] = x32[:, start:stop].T @ x32[:, start:]
            S[stop:, start:stop] = S[start:stop, stop:].T
    return total[0], S


class CovarianceAccumulator:
    """Collects C and mu of an n-wide input without keeping activations. Accumulators of disjoint pools merge exactly."""

    def __init__(self, n: int, device: torch.device | str = "cpu") -> None:
        self.n = n
        self._M2 = torch.zeros(n, n, dtype=torch.float64, device=device)
        self._sum = torch.zeros(n, dtype=torch.float64, device=device)
        self._tokens = 0
        self._pools = 0
        self._degrees = 0
        self._pool_S = torch.zeros_like(self._M2)
        self._pool_sum = torch.zeros_like(self._sum)
        self._pool_tokens = 0

    def update(self, x: torch.Tensor) -> None:
        """Add tokens x (..., n) to the open pool."""
        x = x.reshape(-1, self.n)
        total, S = moments(x)
        self._pool_S += S
        self._pool_sum += total
        self._pool_tokens += x.shape[0]

    def close_pool(self) -> None:
        """Centre the open pool on its own mean and start the next one; nothing happens when it is empty."""
        if self._pool_tokens == 0:
            return
        self._M2 += self._pool_S - torch.outer(self._pool_sum, self._pool_sum) / self._pool_tokens
        self._sum += self._pool_sum
        self._tokens += self._pool_tokens
        self._degrees += self._pool_tokens - 1
        self._pools += 1
        self._pool_S.zero_()
        self._pool_sum.zero_()
        self._pool_tokens = 0

    def merge(self, other: CovarianceAccumulator) -> None:
        """Add another accumulator's pools to this one's; both open pools are closed first."""
        self.close_pool()
        other.close_pool()
        self._M2 += other._M2
        self._sum += other._sum
        self._tokens += other._tokens
        self._degrees += other._degrees
        self._pools += other._pools

    def finish(self) -> Covariance:
        """Close the open pool and return the pooled statistics.

        Raises:
            CalibrationError: no token was seen, or a statistic is not finite.
        """
        self.close_pool()
        if self._tokens == 0:
            raise CalibrationError("no token reached this layer; give more calibration text")
        C = self._M2 / max(self._degrees, 1)
        C = (C + C.T) / 2
        mu = self._sum / self._tokens
        if not (torch.isfinite(C).all() and torch.isfinite(mu).all()):
            raise CalibrationError(
                "activations are not finite: the model overflows in this dtype on this text; "
                "load it in bfloat16 or float32, and check the weights"
            )
        return Covariance(C=C, mu=mu, tokens=self._tokens, pools=self._pools)
