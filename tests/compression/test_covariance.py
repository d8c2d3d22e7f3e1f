"""Pooled covariance against torch.cov of all tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lrserve.compression.covariance import CovarianceAccumulator, Triangle, triangle_size
from lrserve.errors import CalibrationError


def collect(x: torch.Tensor, pool: int, batch: int = 7) -> CovarianceAccumulator:
    accumulator = CovarianceAccumulator(x.shape[1])
    for start in range(0, len(x), pool):
        for rows in x[start : start + pool].split(batch):
            accumulator.update(rows)
        accumulator.close_pool()
    return accumulator


def direct(x: torch.Tensor, pool: int) -> torch.Tensor:
    parts = [part.double() for part in x.split(pool)]
    return sum((len(p) - 1) * p.T.cov() if len(p) > 1 else torch.zeros(x.shape[1], x.shape[1]).double() for p in parts) / sum(
        len(p) - 1 for p in parts
    )


def test_one_pool_is_the_plain_covariance() -> None:
    x = torch.randn(200, 12) + 5
    covariance = collect(x, 200).finish()
    torch.testing.assert_close(covariance.C, x.double().T.cov(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(covariance.mu, x.double().mean(0), rtol=1e-6, atol=1e-6)
    assert (covariance.tokens, covariance.pools) == (200, 1)


@settings(max_examples=30, deadline=None)
@given(tokens=st.integers(3, 60), pool=st.integers(2, 20), cut=st.integers(1, 59), seed=st.integers(0, 99))
def test_pools_match_the_definition_and_merge_is_exact(tokens: int, pool: int, cut: int, seed: int) -> None:
    x = torch.randn(tokens, 5, generator=torch.Generator().manual_seed(seed))
    whole = collect(x, pool).finish()
    torch.testing.assert_close(whole.C, direct(x, pool), rtol=1e-4, atol=1e-5)
    cut = min(cut // pool * pool, tokens)  # between pools
    if 0 < cut < tokens:
        left, right = collect(x[:cut], pool), collect(x[cut:], pool)
        left.merge(right)
        merged = left.finish()
        torch.testing.assert_close(merged.C, whole.C)
        torch.testing.assert_close(merged.mu, whole.mu)
        assert merged.tokens == whole.tokens == tokens


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 60),
    pool=st.integers(1, 12),
    cuts=st.tuples(st.integers(0, 60), st.integers(0, 60)),
    order=st.permutations(range(3)),
    seed=st.integers(0, 99),
)
def test_any_order_of_merges_equals_the_direct_statistics(
    tokens: int, pool: int, cuts: tuple[int, int], order: list[int], seed: int
) -> None:
    x = torch.randn(tokens, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 + 3
    first, second = sorted(min(cut // pool * pool, tokens) for cut in cuts)  # between pools
    shards = [x[:first], x[first:second], x[second:]]

    def collected() -> list[CovarianceAccumulator]:
        return [collect(shards[i], pool) for i in order]

    a, b, c = collected()
    a.merge(b)
    a.merge(c)
    left = a.finish()
    a, b, c = collected()
    b.merge(c)
    a.merge(b)
    right = a.finish()
    direct_moment = x.T @ x / tokens
    direct_total = (x - x.mean(0)).T @ (x - x.mean(0)) / max(tokens - 1, 1)
    for found in (left, right, collect(x, pool).finish()):
        torch.testing.assert_close(found.C, left.C, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found.mu, x.mean(0), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found.second_moment(), direct_moment, rtol=1e-11, atol=1e-11)
        total = found.total()
        torch.testing.assert_close(total.C, direct_total, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(total.second_moment(), direct_moment, rtol=1e-11, atol=1e-11)
        assert (found.tokens, total.tokens, total.pools) == (tokens, tokens, 1)
        assert found.pools == -(-tokens // pool)
    assert torch.equal(left.pool_means, right.pool_means)
    if tokens > pool and pool > 1:
        torch.testing.assert_close(left.C, direct(x, pool), rtol=1e-11, atol=1e-11)


def test_scatter_between_pools_is_dropped_until_the_total_is_asked_for() -> None:
    x = torch.cat([torch.randn(50, 4), torch.randn(50, 4) + 100])
    pooled = collect(x, 50).finish()
    assert pooled.C.diagonal().max() < 10
    assert collect(x, 100).finish().C.diagonal().min() > 1000
    torch.testing.assert_close(pooled.total().C, x.double().T.cov(), rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(pooled.pool_means, torch.stack([part.double().mean(0) for part in x.split(50)]))
    assert pooled.pool_tokens.tolist() == [50, 50]


@pytest.mark.parametrize("n", [192, 193, 700])
def test_widths_beyond_one_block(n: int) -> None:
    x = (torch.randn(40, n) + 1).bfloat16()
    covariance = collect(x, 40).finish()
    torch.testing.assert_close(covariance.C, x.double().T.cov(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(covariance.mu, x.double().mean(0), rtol=1e-5, atol=1e-5)
    assert torch.equal(covariance.C, covariance.C.T)


def test_a_mean_far_larger_than_the_spread_does_not_cancel() -> None:
    x = torch.randn(4000, 6, dtype=torch.float64) + 300
    C = collect(x.float(), 4000, batch=500).finish().C
    torch.testing.assert_close(C, x.T.cov(), rtol=0.05, atol=0.05)


def test_nothing_seen_and_infinite_inputs_are_errors() -> None:
    with pytest.raises(CalibrationError, match="more calibration text"):
        CovarianceAccumulator(3).finish()
    accumulator = CovarianceAccumulator(3)
    accumulator.update(torch.full((4, 3), float("inf")))
    with pytest.raises(CalibrationError, match="not finite"):
        accumulator.finish()


def test_one_token_gives_a_zero_covariance() -> None:
    accumulator = CovarianceAccumulator(3)
    accumulator.update(torch.ones(1, 3))
    assert torch.equal(accumulator.finish().C, torch.zeros(3, 3).double())


@pytest.mark.parametrize("n", [1, 5, 192, 193, 500])
def test_a_triangle_is_half_of_its_matrix_and_gives_it_back(n: int) -> None:
    matrix = torch.randn(n, n)
    matrix = matrix + matrix.T
    triangle = Triangle.of(matrix)
    assert len(triangle.values) == triangle_size(n) <= n * (n + 192) / 2
    assert torch.equal(triangle.matrix(), matrix)
    assert torch.equal(Triangle(n, triangle.values.clone()).matrix(), matrix)
    assert not Triangle.zeros(n, torch.float32).matrix().any()
