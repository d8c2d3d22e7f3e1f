"""The closed form against brute force: the best rank-r map of the outputs, at every rank."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lrserve.compression.factorize import Side, factorize
from lrserve.errors import CalibrationError


def problem(m: int, n: int, seed: int, rank_of_C: int | None = None) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(m, n, generator=generator, dtype=torch.float64)
    root = torch.randn(n, rank_of_C or n, generator=generator, dtype=torch.float64)
    mu = torch.randn(n, generator=generator, dtype=torch.float64) * 3
    return W, root, root @ root.T, mu


@settings(max_examples=40, deadline=None)
@given(m=st.integers(1, 9), n=st.integers(1, 9), seed=st.integers(0, 999), deficit=st.integers(0, 4))
def test_every_rank_reaches_the_brute_force_optimum(m: int, n: int, seed: int, deficit: int) -> None:
    W, root, C, mu = problem(m, n, seed, rank_of_C=max(1, n - deficit))
    spectrum = factorize(W, C, mu)
    # E|y - y'|^2 = |(W - B A) root|_F^2 + |bias error|^2: its minimum over rank r is the tail of root's image's singular values
    singular = torch.linalg.svdvals(W @ root)
    for rank in range(1, min(m, n) + 1):
        factors = spectrum.cut(rank)
        error = ((W - factors.B @ factors.A) @ root).square().sum()
        bias_error = W @ mu - factors.B @ (factors.A @ mu) - factors.b
        best = singular[rank:].square().sum()
        assert error <= best + 1e-8 * singular.square().sum()
        assert bias_error.abs().max() < 1e-8
        expected = spectrum.errors()[rank]
        torch.testing.assert_close(expected, best, rtol=1e-6, atol=1e-8 * float(singular.square().sum()))


@pytest.mark.parametrize(("m", "n"), [(6, 4), (4, 6), (5, 5)])
def test_full_rank_is_the_identity(m: int, n: int) -> None:
    W, _, C, mu = problem(m, n, 0)
    beta = torch.randn(m, dtype=torch.float64)
    factors = factorize(W, C, mu, beta).cut(min(m, n))
    torch.testing.assert_close(factors.B @ factors.A, W)
    torch.testing.assert_close(factors.b, beta)


def test_identity_covariance_is_the_plain_svd() -> None:
    W = torch.randn(8, 5, dtype=torch.float64)
    factors = factorize(W, torch.eye(5), torch.zeros(5)).cut(2)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    torch.testing.assert_close(factors.B @ factors.A, U[:, :2] @ torch.diag(S[:2]) @ Vh[:2])


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-12, 1e12])
@pytest.mark.parametrize("shape", [(12, 5), (5, 12)])
def test_zero_tiny_and_huge_covariances_give_finite_factors(scale: float, shape: tuple[int, int]) -> None:
    W, _, C, mu = problem(*shape, 3, rank_of_C=1)
    spectrum = factorize(W, C * scale, mu)
    for rank in range(1, 6):
        factors = spectrum.cut(rank)
        for tensor in (factors.A, factors.B, factors.b):
            assert torch.isfinite(tensor.bfloat16()).all()
    errors = spectrum.errors()
    assert torch.isfinite(errors).all()
    assert (errors[:-1] >= errors[1:]).all()


@settings(max_examples=40, deadline=None)
@given(m=st.integers(1, 8), n=st.integers(1, 8), seed=st.integers(0, 999), side=st.sampled_from(["input", "output"]))
def test_two_sided_factors_reach_the_weighted_optimum_at_every_rank(m: int, n: int, seed: int, side: Side) -> None:
    W, root, C, mu = problem(m, n, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    g = torch.randn(m, 2 * m, generator=generator, dtype=torch.float64)
    moment = g @ g.T
    spectrum = factorize(W, C, mu, None, (side, moment if side == "output" else W.T @ moment @ W))
    # what the factorization says it weighs by: the gradient's moment, damped towards the unweighted problem
    if side == "output":
        damped = moment + 1e-2 * moment.trace() / m * torch.eye(m, dtype=torch.float64)
    else:
        share = (W.T @ moment @ W).trace() / (W.T @ W).trace()
        damped = moment + 1e-2 * share * torch.eye(m, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(damped)
    gamma = (vectors * values.sqrt()) @ vectors.T
    singular = torch.linalg.svdvals(gamma @ W @ root).square()
    scale = float(singular.sum())
    for rank in range(1, min(m, n) + 1):
        factors = spectrum.cut(rank)
        found = (gamma @ (W - factors.B @ factors.A) @ root).square().sum()
        best = singular[rank:].sum()
        assert found <= best + 1e-5 * scale  # the ridge under the inverse root
        torch.testing.assert_close(spectrum.errors()[rank], best, rtol=1e-4, atol=1e-5 * scale)
        torch.testing.assert_close(W @ mu, factors.B @ (factors.A @ mu) + factors.b, rtol=1e-6, atol=1e-6)
    full = spectrum.cut(min(m, n))
    torch.testing.assert_close(full.B @ full.A, W, rtol=1e-4, atol=1e-4)


def test_no_gradient_at_all_falls_back_to_the_features() -> None:
    W, _, C, mu = problem(5, 4, 0)
    plain, zero = factorize(W, C, mu), factorize(W, C, mu, None, ("input", torch.zeros(4, 4)))
    torch.testing.assert_close(plain.cut(2).merged(), zero.cut(2).merged())


def test_directions_that_the_loss_does_not_feel_go_first() -> None:
    W = torch.eye(3, dtype=torch.float64)
    C = torch.diag(torch.tensor([9.0, 4.0, 1.0], dtype=torch.float64))
    moment = torch.diag(torch.tensor([0.0, 1.0, 100.0], dtype=torch.float64))
    kept = factorize(W, C, torch.zeros(3), None, ("output", moment)).cut(1).merged()
    assert kept.diagonal().argmax() == 2
    assert factorize(W, C, torch.zeros(3)).cut(1).merged().diagonal().argmax() == 0


def test_what_is_not_finite_or_out_of_range_is_refused() -> None:
    W, _, C, mu = problem(4, 3, 0)
    with pytest.raises(CalibrationError, match="not finite"):
        factorize(W, C * float("nan"), mu)
    for rank in (0, 4):
        with pytest.raises(ValueError, match="outside"):
            factorize(W, C, mu).cut(rank)
