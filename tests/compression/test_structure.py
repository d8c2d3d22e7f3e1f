"""Structures store the same map, and rounding it to bfloat16 costs no more than is promised."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import FACTORED

from lrserve.compression.factorize import Factors, factorize
from lrserve.compression.groups import Stored
from lrserve.compression.structure import MAX_INTERPOLATION, structured

U = 2.0**-8  # unit roundoff of bfloat16


def covariance(kind: str, n: int, generator: torch.Generator) -> torch.Tensor:
    x = torch.randn(n, 2 * n, generator=generator, dtype=torch.float64)
    C = x @ x.T
    if kind == "one token":
        return torch.outer(x[:, 0], x[:, 0])
    if kind == "outlier":
        scale = torch.ones(n, dtype=torch.float64)
        scale[0] = 1e3
        return scale[:, None] * C * scale
    return C * {"full": 1.0, "tiny": 1e-30, "zero": 0.0}[kind]


def rounded(factors: Factors) -> torch.Tensor:
    return Factors(factors.A.bfloat16().double(), factors.B.bfloat16().double(), factors.b, factors.order).merged()


@settings(max_examples=80, deadline=None)
@given(
    m=st.integers(1, 12),
    n=st.integers(2, 12),
    seed=st.integers(0, 999),
    kind=st.sampled_from(["full", "one token", "outlier", "tiny", "zero"]),
    two_sided=st.booleans(),
    structure=st.sampled_from(FACTORED),
)
def test_every_rank_is_finite_and_within_the_stated_bound_in_bfloat16(
    m: int, n: int, seed: int, kind: str, two_sided: bool, structure: Stored
) -> None:
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(m, n, generator=generator, dtype=torch.float64)
    C, mu = covariance(kind, n, generator), torch.randn(n, generator=generator, dtype=torch.float64)
    gradient = ("input", W.T @ covariance(kind, m, generator) @ W) if two_sided and m > 1 else None
    spectrum = factorize(W, C, mu, None, gradient)
    for rank in range(1, min(m, n) + (structure == "low_rank")):
        plain = spectrum.cut(rank)
        factors = structured(plain, structure)
        # the same map
        torch.testing.assert_close(factors.merged(), plain.merged(), rtol=1e-6, atol=1e-6 * float(plain.merged().abs().max()))
        assert torch.equal(factors.b, plain.b)
        for tensor in (factors.A, factors.B, factors.b):
            assert torch.isfinite(tensor.bfloat16()).all()
        # and within the bound of the module's docstring
        size = factors.A.norm() if structure == "low_rank" else math.sqrt(rank + float(factors.A.square().sum()))
        assert size <= math.sqrt(rank + 4 * rank * (n - rank)) + 1e-9
        error = (rounded(factors) - factors.merged()).norm()
        assert error <= (2 * U + U**2) * factors.B.norm() * size * (1 + 1e-9)


@settings(max_examples=60, deadline=None)
@given(r=st.integers(1, 10), extra=st.integers(1, 20), seed=st.integers(0, 9999), skew=st.floats(0, 4))
def test_identity_blocks_interpolate_with_bounded_weights(r: int, extra: int, seed: int, skew: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(r, r + extra, generator=generator, dtype=torch.float64)
    A = A * torch.logspace(0, -skew, r + extra, dtype=torch.float64)[torch.randperm(r + extra, generator=generator)]
    B = torch.randn(4, r, generator=generator, dtype=torch.float64)
    block = structured(Factors(A=A, B=B, b=torch.zeros(4)), "identity_block")
    assert block.order is not None
    assert sorted(block.order.tolist()) == list(range(r + extra))
    assert block.A.shape == (r, extra)
    assert block.A.abs().max() <= MAX_INTERPOLATION * (1 + 1e-6)
    torch.testing.assert_close(block.merged(), B @ A)


def test_pivots_that_column_pivoting_leaves_too_weak_are_exchanged() -> None:
    """Kahan's matrix: QR with column pivoting keeps its order, and interpolation weights grow like 2^n."""
    n, c = 24, 0.6
    s = math.sqrt(1 - c * c)
    kahan = torch.diag(torch.tensor([s**i * (1 + 1e-7 * (n - i)) for i in range(n)], dtype=torch.float64))
    kahan = kahan @ (torch.eye(n, dtype=torch.float64) - c * torch.ones(n, n, dtype=torch.float64).triu(1))
    A = kahan[: n - 1]
    naive = torch.linalg.solve(A[:, : n - 1], A[:, n - 1 :])
    assert naive.abs().max() > MAX_INTERPOLATION  # the test's own premise
    block = structured(Factors(A=A, B=torch.eye(n - 1, dtype=torch.float64), b=torch.zeros(n - 1)), "identity_block")
    assert block.A.abs().max() <= MAX_INTERPOLATION * (1 + 1e-6)
    torch.testing.assert_close(block.merged(), A)


@pytest.mark.parametrize("structure", FACTORED)
def test_a_weight_of_lower_rank_than_asked_is_kept(structure: Stored) -> None:
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(9, 2, generator=generator).double() @ torch.randn(2, 7, generator=generator).double()
    factors = structured(factorize(W, torch.eye(7), torch.zeros(7)).cut(5), structure)
    torch.testing.assert_close(factors.merged(), W)
