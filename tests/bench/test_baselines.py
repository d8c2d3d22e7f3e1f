"""The papers' factorizations against brute force in the metric that each one minimises, and on degenerate statistics."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from baselines import BASELINES, asvd, bolaco, lord, svd, svd_llm
from lrserve.compression.covariance import Covariance, CovarianceAccumulator
from lrserve.compression.factorize import Factors, factorize
from lrserve.errors import CalibrationError


def statistics(x: torch.Tensor, pool: int | None = None) -> Covariance:
    accumulator = CovarianceAccumulator(x.shape[1])
    for part in x.split(pool or len(x)):
        accumulator.update(part)
        accumulator.close_pool()
    return accumulator.finish()


def problem(m: int, n: int, tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """W (m, n) and inputs (tokens, n) with a mean and channels of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(m, n, generator=generator, dtype=torch.float64)
    sizes = torch.logspace(0, -2, n, dtype=torch.float64)[torch.randperm(n, generator=generator)]
    x = torch.randn(tokens, n, generator=generator, dtype=torch.float64) * sizes
    return W, x + torch.randn(n, generator=generator, dtype=torch.float64) * sizes


def squared_error(W: torch.Tensor, factors: Factors, x: torch.Tensor) -> torch.Tensor:
    """Mean over the tokens of |y - y'|^2, bias included."""
    return (x @ (W - factors.merged()).T - factors.b).square().sum(1).mean()


@settings(max_examples=40, deadline=None)
@given(m=st.integers(1, 9), n=st.integers(1, 9), tokens=st.integers(1, 20), pool=st.integers(1, 20), seed=st.integers(0, 999))
def test_svd_llm_is_optimal_without_a_bias_at_every_rank(m: int, n: int, tokens: int, pool: int, seed: int) -> None:
    W, x = problem(m, n, tokens, seed)
    spectrum = svd_llm(W, statistics(x, pool))
    singular = torch.linalg.svdvals(W @ x.T) / tokens**0.5
    for rank in range(1, min(m, n) + 1):
        best = singular[rank:].square().sum()
        found = squared_error(W, spectrum.cut(rank), x)
        torch.testing.assert_close(found, best, rtol=1e-6, atol=1e-8 * float(singular.square().sum()))
        torch.testing.assert_close(spectrum.errors()[rank], best, rtol=1e-6, atol=1e-8 * float(singular.square().sum()))


@settings(max_examples=40, deadline=None)
@given(m=st.integers(1, 9), n=st.integers(1, 9), tokens=st.integers(10, 30), seed=st.integers(0, 999))
def test_lord_is_optimal_with_a_bias_however_the_tokens_were_pooled(m: int, n: int, tokens: int, seed: int) -> None:
    W, x = problem(m, n, tokens, seed)
    spectrum = lord(W, statistics(x, 4))
    singular = torch.linalg.svdvals(W @ (x - x.mean(0)).T) / tokens**0.5
    for rank in range(1, min(m, n) + 1):
        best = singular[rank:].square().sum()
        found = squared_error(W, spectrum.cut(rank), x)
        torch.testing.assert_close(found, best, rtol=1e-6, atol=1e-8 * float(singular.square().sum()))


def test_each_is_best_in_its_own_metric() -> None:
    W, x = problem(12, 10, 400, 0)
    x[200:] += 3 * torch.randn(10, dtype=torch.float64)  # pools of different means
    measured = statistics(x, 200)
    S = x.square().mean(0).sqrt().sqrt()
    metrics = {
        "svd": lambda f: (W - f.merged()).square().sum(),
        "asvd": lambda f: ((W - f.merged()) * S).square().sum(),
        "svd-llm": lambda f: squared_error(W, Factors(f.A, f.B, torch.zeros(12)), x),
        "lord": lambda f: squared_error(W, f, x),
        "bolaco": lambda f: ((W - f.merged()) @ measured.C @ (W - f.merged()).T).trace(),
    }
    factors = {name: baseline(W, measured, None).cut(3) for name, baseline in BASELINES.items()}
    for name, metric in metrics.items():
        values = {other: float(metric(found)) for other, found in factors.items()}
        assert min(values, key=values.__getitem__) == name
        if name in ("svd", "asvd", "svd-llm"):
            torch.testing.assert_close(float(BASELINES[name](W, measured, None).errors()[3]), values[name], rtol=1e-6, atol=0)


def test_svd_truncates_the_weight() -> None:
    W, x = problem(8, 5, 20, 1)
    factors = svd(W, statistics(x)).cut(2)
    U, values, Vh = torch.linalg.svd(W, full_matrices=False)
    torch.testing.assert_close(factors.merged(), U[:, :2] @ torch.diag(values[:2]) @ Vh[:2])


def test_asvd_scales_the_channels() -> None:
    W, x = problem(8, 5, 20, 2)
    measured = statistics(x)
    torch.testing.assert_close(asvd(W, measured, alpha=0.0).cut(2).merged(), svd(W, measured).cut(2).merged())
    S = x.square().mean(0).sqrt() ** 0.5
    U, values, Vh = torch.linalg.svd(W * S, full_matrices=False)
    torch.testing.assert_close(asvd(W, measured).cut(2).merged(), U[:, :2] @ torch.diag(values[:2]) @ Vh[:2] / S)


def test_svd_llm_is_the_feature_form_of_the_second_moment() -> None:
    W, x = problem(7, 9, 300, 3)
    measured = statistics(x)
    without_bias = factorize(W, measured.second_moment(), torch.zeros(9))
    for rank in (1, 4, 7):
        torch.testing.assert_close(svd_llm(W, measured).cut(rank).merged(), without_bias.cut(rank).merged())


def test_one_pool_makes_lord_and_bolaco_the_same() -> None:
    W, x = problem(7, 9, 30, 4)
    measured = statistics(x)
    torch.testing.assert_close(lord(W, measured).cut(3).merged(), bolaco(W, measured).cut(3).merged())


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("shape", [(12, 5), (5, 12)])
def test_the_layers_own_bias_and_full_rank_are_kept(name: str, shape: tuple[int, int]) -> None:
    W, x = problem(*shape, 40, 5)
    beta = torch.randn(shape[0], dtype=torch.float64)
    factors = BASELINES[name](W.float(), statistics(x, 10), beta).cut(5)
    torch.testing.assert_close(factors.merged(), W.float().double())
    torch.testing.assert_close(factors.b, beta)
    if name in ("svd", "asvd", "svd-llm"):
        assert torch.equal(BASELINES[name](W, statistics(x), beta).cut(2).b, beta)


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-12, 1.0, 1e6])
@pytest.mark.parametrize("tokens", ["one", "two", "alike", "two channels"])
@pytest.mark.parametrize("shape", [(12, 5), (5, 12)])
def test_degenerate_statistics_give_finite_factors(name: str, scale: float, tokens: str, shape: tuple[int, int]) -> None:
    W, x = problem(*shape, 30, 6)
    inputs = {"one": x[:1], "two": x[:2], "alike": x[:1].expand(30, -1), "two channels": x * (torch.arange(shape[1]) < 2)}
    found = statistics(inputs[tokens] * scale, 10)
    stored = Covariance(found.C.float(), found.mu.float(), found.pool_means.float(), found.pool_tokens)  # as read from disk
    for measured in (found, stored):
        spectrum = BASELINES[name](W, measured, None)
        for rank in range(1, 6):
            factors = spectrum.cut(rank)
            for tensor in (factors.A, factors.B, factors.b):
                assert torch.isfinite(tensor.bfloat16()).all()
            assert factors.A.abs().max() <= 1.001 * torch.linalg.matrix_norm(W, 2)
        errors = spectrum.errors()
        assert torch.isfinite(errors).all()
        assert (errors[:-1] >= errors[1:]).all()


@pytest.mark.parametrize("name", BASELINES)
def test_what_is_not_finite_is_refused(name: str) -> None:
    W, x = problem(4, 3, 10, 7)
    measured = statistics(x)
    with pytest.raises(CalibrationError, match="not finite"):
        BASELINES[name](W * float("nan"), measured, None)
    if name != "svd":
        broken = Covariance(measured.C * float("nan"), measured.mu, measured.pool_means, measured.pool_tokens)
        with pytest.raises(CalibrationError, match="not finite"):
            BASELINES[name](W, broken, None)
