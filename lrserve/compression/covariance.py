"""Pooled covariance of a layer's inputs (Bolaco, arXiv 2405.10616, section 3).

Notation
    x    (t, n)  inputs of a layer for t tokens
    n_k          tokens in pool k;  s_k (n,) their sum;  S_k (n, n) the sum of x^T x
    M2   (n, n)  scatter around each pool's own mean:  sum_k (S_k - s_k s_k^T / n_k)
    C    (n, n)  pooled covariance:  M2 / sum_k (n_k - 1)
    mu   (n,)    pooled mean:  sum_k s_k / sum_k n_k
    mu_k (n,)    mean of pool k:  s_k / n_k;  N = sum_k n_k

Each pool is centred on its own mean, so the scatter between pools is dropped; a single pool gives the plain covariance. The pools'
means and sizes are kept: with them the plain covariance of all tokens and their second moment, which other methods want, follow
    (N - 1) C_total = M2 + sum_k n_k (mu_k - mu) (mu_k - mu)^T        N E[x x^T] = M2 + sum_k n_k mu_k mu_k^T
Within a pool, products of 16-bit inputs are formed and summed in float32, whose rounding is far below the inputs' own, and those of
wider inputs in float64; across pools everything is float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from lrserve.errors import CalibrationError, NotFiniteError

_BLOCK = 192  # columns per block of the symmetric product: small enough to save work, large enough for fast GEMMs


@dataclass(frozen=True)
class Covariance:
    """Statistics of one layer's inputs: C (n, n), mu (n,), and each pool's mean (pools, n) and token count (pools,) int64."""

    C: torch.Tensor
    mu: torch.Tensor
    pool_means: torch.Tensor
    pool_tokens: torch.Tensor

    @property
    def tokens(self) -> int:
        """Tokens that were seen."""
        return int(self.pool_tokens.sum())

    @property
    def pools(self) -> int:
        """Pools that they were in."""
        return len(self.pool_tokens)

    def total(self) -> Covariance:
        """Return the statistics of the same tokens in one pool, K = 1: C takes up the scatter between the pools; float64."""
        means, mu = self.pool_means.double(), self.mu.double()
        centred = means - mu
        scatter = self._within() + centred.T @ (self.pool_tokens.double()[:, None] * centred)
        return Covariance(
            C=scatter / max(self.tokens - 1, 1),
            mu=mu,
            pool_means=mu[None],
            pool_tokens=self.pool_tokens.sum()[None],
        )

    def second_moment(self) -> torch.Tensor:
        """Return E[x x^T] (n, n), uncentred, over all tokens; float64."""
        means = self.pool_means.double()
        return (self._within() + means.T @ (self.pool_tokens.double()[:, None] * means)) / self.tokens

    def _within(self) -> torch.Tensor:
        return self.C.double() * (self.tokens - self.pools)


@contextmanager
def exact_products(x: torch.Tensor) -> Iterator[None]:
    """Let float32 copies of 16-bit values be multiplied in fewer bits, accumulating in float32.

    On the CPU oneDNN multiplies bfloat16 values in bfloat16, on a GPU tensor cores those of both 16-bit formats in TF32, which has
    their bits. Nothing is lost, since the inputs *are* such values. AMX/AVX-512 machines do it three times as fast, tensor cores
    several times.
    """
    if x.device.type == "cuda" and x.dtype.itemsize == 2:
        matmul, precision = torch.backends.cuda.matmul, "tf32"
    elif x.device.type == "cpu" and x.dtype is torch.bfloat16:
        matmul, precision = torch.backends.mkldnn.matmul, "bf16"  # type: ignore[attr-defined]
    else:
        yield
        return
    before = matmul.fp32_precision
    matmul.fp32_precision = precision
    try:
        yield
    finally:
        matmul.fp32_precision = before


class _Moments:
    """Sum (n,) and upper triangle of x^T x (n, n) of the open pool, the triangle in rows of blocks."""

    def __init__(self, n: int, dtype: torch.dtype, device: torch.device | str) -> None:
        self.tokens = 0
        self.dtype = torch.float32 if dtype.itemsize <= 2 else torch.float64
        self._starts = range(0, n, _BLOCK)
        self._sum = torch.zeros(1, n, dtype=self.dtype, device=device)
        self._rows = [torch.zeros(min(_BLOCK, n - start), n - start, dtype=self.dtype, device=device) for start in self._starts]

    def add(self, x: torch.Tensor) -> None:
        """Add tokens x (t, n)."""
        with exact_products(x):
            wide = x.to(self.dtype)
            self._sum.addmm_(wide.new_ones(1, x.shape[0]), wide)  # several times as fast as x.sum(0)
            for start, row in zip(self._starts, self._rows, strict=True):
                row.addmm_(wide[:, start : start + _BLOCK].T, wide[:, start:])
        self.tokens += x.shape[0]

    def take(self, scatter: torch.Tensor) -> torch.Tensor:
        """Add the pool's scatter around its own mean to `scatter`'s upper triangle and return its sum (n,), float64; start anew."""
        own = self._sum[0].to(torch.float64, copy=True)
        for start, row in zip(self._starts, self._rows, strict=True):
            upper = scatter[start : start + _BLOCK, start:]
            upper += row
            upper.addr_(own[start : start + _BLOCK], own[start:], alpha=-1 / self.tokens)
            row.zero_()
        self._sum.zero_()
        self.tokens = 0
        return own


class CovarianceAccumulator:
    """Collects `Covariance` of an n-wide input without keeping activations. Accumulators of disjoint pools merge exactly.

    Memory: the closed pools' scatter, the open pool's triangle, and the sum (n,) of each pool.
    """

    def __init__(self, n: int, device: torch.device | str = "cpu") -> None:
        self.n = n
        self._M2 = torch.zeros(n, n, dtype=torch.float64, device=device)  # its upper triangle
        self._sums: list[torch.Tensor] = []  # of each closed pool (n,), float64
        self._sizes: list[int] = []
        self._pool: _Moments | None = None

    def update(self, x: torch.Tensor) -> None:
        """Add tokens x (..., n) to the open pool."""
        if self._pool is None:
            self._pool = _Moments(self.n, x.dtype, x.device)
        self._pool.add(x.reshape(-1, self.n))

    def close_pool(self) -> None:
        """Centre the open pool on its own mean and start the next one; nothing happens when it is empty."""
        if self._pool is None or self._pool.tokens == 0:
            return
        self._sizes.append(self._pool.tokens)
        self._sums.append(self._pool.take(self._M2))

    def state(self) -> dict[str, torch.Tensor]:
        """Close the open pool and return what `from_state` needs, on the CPU.

        `scatter` (n, n), the upper triangle of M2, and `sums` (pools, n) in float64, and `sizes` (pools,) int64.
        """
        self.close_pool()
        sums = torch.stack(self._sums) if self._sums else self._M2.new_zeros(0, self.n)
        return {"scatter": self._M2.cpu(), "sums": sums.cpu(), "sizes": torch.tensor(self._sizes, dtype=torch.int64)}

    @classmethod
    def from_state(cls, state: Mapping[str, torch.Tensor]) -> CovarianceAccumulator:
        """Return an accumulator of the closed pools that gave a `state`, on the CPU."""
        found = cls(state["scatter"].shape[0])
        found._M2 = state["scatter"].clone()
        found._sums, found._sizes = list(state["sums"]), state["sizes"].tolist()
        return found

    def merge(self, other: CovarianceAccumulator) -> None:
        """Add another accumulator's pools behind this one's; both open pools are closed first."""
        self.close_pool()
        other.close_pool()
        self._M2 += other._M2.to(self._M2.device)
        self._sums += [total.to(self._M2.device) for total in other._sums]
        self._sizes += other._sizes

    def finish(self) -> Covariance:
        """Close the open pool and return the pooled statistics.

        Raises:
            CalibrationError: no token was seen.
            NotFiniteError: a statistic is not finite.
        """
        self.close_pool()
        if not self._sizes:
            raise CalibrationError("no token reached this layer; give more calibration text")
        tokens, pools = sum(self._sizes), len(self._sizes)
        C = (self._M2.triu() + self._M2.triu(1).T) / max(tokens - pools, 1)
        sums, sizes = torch.stack(self._sums), torch.tensor(self._sizes).to(self._M2.device)
        mu = sums.sum(0) / tokens
        if not (torch.isfinite(C).all() and torch.isfinite(mu).all()):
            raise NotFiniteError(
                "activations are not finite: the model overflows in this dtype on this text; "
                "load it in bfloat16 or float32, and check the weights"
            )
        return Covariance(C=C, mu=mu, pool_means=sums / sizes[:, None], pool_tokens=sizes)
