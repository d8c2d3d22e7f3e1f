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
        scatter = self._within().addmm_(centred.T, self.pool_tokens.double()[:, None] * centred)
        return Covariance(
            C=scatter.div_(max(self.tokens - 1, 1)),
            mu=mu,
            pool_means=mu[None],
            pool_tokens=self.pool_tokens.sum()[None],
        )

    def second_moment(self) -> torch.Tensor:
        """Return E[x x^T] (n, n), uncentred, over all tokens; float64."""
        means = self.pool_means.double()
        return self._within().addmm_(means.T, self.pool_tokens.double()[:, None] * means).div_(self.tokens)

    def _within(self) -> torch.Tensor:
        return self.C.to(torch.float64, copy=True).mul_(self.tokens - self.pools)


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


class Triangle:
    """The upper triangle of a symmetric matrix (n, n) in one tensor, half the matrix's size.

    `rows` are views of `values`, blocks of neighbouring rows (b, n - start), each from its diagonal block on.
    """

    def __init__(self, n: int, values: torch.Tensor) -> None:
        self.n, self.values = n, values
        self.starts = range(0, n, _BLOCK)
        blocks = values.split(_block_sizes(n))
        self.rows = [block.view(-1, n - start) for start, block in zip(self.starts, blocks, strict=True)]

    @classmethod
    def zeros(cls, n: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Triangle:
        """Return the triangle of a matrix of zeros."""
        return cls(n, torch.zeros(triangle_size(n), dtype=dtype, device=device))

    @classmethod
    def of(cls, matrix: torch.Tensor) -> Triangle:
        """Return the triangle of a symmetric matrix (n, n)."""
        n = len(matrix)
        return cls(n, torch.cat([matrix[start : start + _BLOCK, start:].flatten() for start in range(0, n, _BLOCK)]))

    def add_products(self, x: torch.Tensor) -> None:
        """Add x^T x for x (t, n) of the same dtype."""
        for start, row in zip(self.starts, self.rows, strict=True):
            row.addmm_(x[:, start : start + _BLOCK].T, x[:, start:])

    def matrix(self) -> torch.Tensor:
        """Return the matrix (n, n)."""
        whole = self.values.new_empty(self.n, self.n)
        for start, row in zip(self.starts, self.rows, strict=True):
            end = start + len(row)
            diagonal, right = row[:, : len(row)], row[:, len(row) :]
            whole[start:end, start:end] = diagonal.triu() + diagonal.triu(1).T
            whole[start:end, end:] = right
            whole[end:, start:end] = right.T
        return whole


def _block_sizes(n: int) -> list[int]:
    return [min(_BLOCK, n - start) * (n - start) for start in range(0, n, _BLOCK)]


def triangle_size(n: int) -> int:
    """Return how many numbers a `Triangle` has."""
    return sum(_block_sizes(n))


class _Moments:
    """Sum (n,) and upper triangle of x^T x (n, n) of the open pool."""

    def __init__(self, n: int, dtype: torch.dtype, device: torch.device | str) -> None:
        self.tokens = 0
        self.dtype = torch.float32 if dtype.itemsize <= 2 else torch.float64
        self._sum = torch.zeros(1, n, dtype=self.dtype, device=device)
        self._products = Triangle.zeros(n, self.dtype, device)

    def add(self, x: torch.Tensor) -> None:
        """Add tokens x (t, n)."""
        with exact_products(x):
            wide = x.to(self.dtype)
            self._sum.addmm_(wide.new_ones(1, x.shape[0]), wide)  # several times as fast as x.sum(0)
            self._products.add_products(wide)
        self.tokens += x.shape[0]

    def take(self, scatter: Triangle) -> torch.Tensor:
        """Add the pool's scatter around its own mean to `scatter` and return its sum (n,), float64; start anew."""
        own = self._sum[0].to(torch.float64, copy=True)
        for start, row, whole in zip(scatter.starts, self._products.rows, scatter.rows, strict=True):
            whole += row
            whole.addr_(own[start : start + _BLOCK], own[start:], alpha=-1 / self.tokens)
        self._products.values.zero_()
        self._sum.zero_()
        self.tokens = 0
        return own


class CovarianceAccumulator:
    """Collects `Covariance` of an n-wide input without keeping activations. Accumulators of disjoint pools merge exactly.

    Memory: the triangles of the closed pools' scatter and of the open pool, and the sum (n,) of each pool.
    """

    def __init__(self, n: int, device: torch.device | str = "cpu") -> None:
        self.n = n
        self._M2 = Triangle.zeros(n, torch.float64, device)
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

        `scatter`, the values of M2's triangle, and `sums` (pools, n) in float64, and `sizes` (pools,) int64.
        """
        self.close_pool()
        scatter = self._M2.values
        sums = torch.stack(self._sums) if self._sums else scatter.new_zeros(0, self.n)
        return {"scatter": scatter.cpu(), "sums": sums.cpu(), "sizes": torch.tensor(self._sizes, dtype=torch.int64)}

    @classmethod
    def from_state(cls, state: Mapping[str, torch.Tensor]) -> CovarianceAccumulator:
        """Return an accumulator of the closed pools that gave a `state`, on the CPU."""
        found = cls(state["sums"].shape[1])
        found._M2.values.copy_(state["scatter"])
        found._sums, found._sizes = list(state["sums"]), state["sizes"].tolist()
        return found

    def merge(self, other: CovarianceAccumulator) -> None:
        """Add another accumulator's pools behind this one's; both open pools are closed first."""
        self.close_pool()
        other.close_pool()
        device = self._M2.values.device
        self._M2.values += other._M2.values.to(device)
        self._sums += [total.to(device) for total in other._sums]
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
        sums, sizes = torch.stack(self._sums), torch.tensor(self._sizes).to(self._M2.values.device)
        mu = sums.sum(0) / tokens
        if not (torch.isfinite(self._M2.values).all() and torch.isfinite(mu).all()):
            raise NotFiniteError(
                "activations are not finite: the model overflows in this dtype on this text; "
                "load it in bfloat16 or float32, and check the weights"
            )
        C = self._M2.matrix().div_(max(tokens - pools, 1))
        return Covariance(C=C, mu=mu, pool_means=sums / sizes[:, None], pool_tokens=sizes)
