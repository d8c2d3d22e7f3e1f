"""Rounding and its residual against brute force: never worse than rounding to nearest, and optimal in the metric."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lrserve.compression import quantize as quantizing
from lrserve.compression import residual as repairing
from lrserve.compression.level import PRECISIONS, SCHEMES, Precision
from lrserve.compression.quantize import Rounded, quantize, round_to_nearest, rounded_to
from lrserve.compression.residual import residual_spectrum, rounded_factors
from lrserve.errors import CalibrationError

FEEDBACK = [precision for precision in PRECISIONS if SCHEMES[precision].bits == 4]


def problem(m: int, n: int, seed: int = 0, tokens: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and a second moment of inputs of very different sizes that few or many tokens gave."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(m, n, generator=generator)
    mixing = torch.randn(n, n, generator=generator) / n**0.5 + torch.diag(torch.rand(n, generator=generator) * 2)
    x = torch.randn(tokens or 4 * n, n, generator=generator) @ mixing
    return W, (x.T @ x / len(x)).double()


def lost(W: torch.Tensor, rounded: Rounded, H: torch.Tensor, gradient: torch.Tensor | None = None) -> float:
    return weighted(W - rounded.dense(), H, gradient)


def weighted(E: torch.Tensor, H: torch.Tensor, gradient: torch.Tensor | None = None) -> float:
    """tr(Gamma^2 E H E^T), with the metrics as the code damps them."""
    R, L = (repairing._root(moment) for moment in (H, gradient))
    M = E.double() if R is None else E.double() @ R
    if L is not None:
        M = L[:, None] * M if L.ndim == 1 else L.T @ M
    return float(M.square().sum())


def lost_by_row(W: torch.Tensor, rounded: Rounded, metric: torch.Tensor) -> torch.Tensor:
    E = (W - rounded.dense()).double()
    return ((E @ metric) * E).sum(1)


@pytest.mark.parametrize("weighted_inputs", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_searched_scales_lose_no_more_than_rounding_to_nearest(precision: Precision, weighted_inputs: bool) -> None:
    W, H = problem(24, 256)
    W[0, ::7] *= 20  # outliers
    diagonal = torch.diag(H.diagonal()) if weighted_inputs else None
    metric = torch.eye(256).double() if diagonal is None else quantizing._damped(diagonal)
    found = lost_by_row(W, quantize(W, precision, diagonal), metric)
    nearest = lost_by_row(W, round_to_nearest(W, precision), metric)
    assert (found <= nearest * (1 + 1e-5)).all()
    if SCHEMES[precision].bits == 4:
        assert found.sum() < 0.97 * nearest.sum()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("precision", FEEDBACK)
def test_no_row_loses_by_feedback(precision: Precision, seed: int) -> None:
    W, H = problem(24, 256, seed)
    metric = quantizing._damped(H)
    found = quantize(W, precision, H)
    rows = [lost_by_row(W, rounded, metric) for rounded in (found, rounded_to(W, found.scales, precision))]
    assert (rows[0] <= rows[1] * (1 + 1e-4)).all()
    assert lost(W, found, H) < lost(W, round_to_nearest(W, precision), H)


@pytest.mark.parametrize("precision", FEEDBACK)
def test_feedback_lowers_the_error_of_correlated_inputs(precision: Precision) -> None:
    W, _ = problem(32, 256)
    x = torch.randn(1024, 16) @ torch.randn(16, 256) + 0.1 * torch.randn(1024, 256)
    H = (x.T @ x).double() / 1024
    found = quantize(W, precision, H)
    assert lost(W, found, H) < 0.5 * lost(W, rounded_to(W, found.scales, precision), H)


@pytest.mark.parametrize("precision", FEEDBACK)
def test_feedback_is_gptq(precision: Precision) -> None:
    """Against the textbook's loop: round a column, spread its error, drop it from the inverse."""
    W, H = problem(6, 128, 5)
    scheme = SCHEMES[precision]
    scales = quantize(W, precision, H).scales
    metric = quantizing._damped(H)
    values, errors = quantizing._with_feedback(W, metric, scales, scheme)
    left, inverse = W.double(), torch.linalg.inv(metric)
    for k in range(128):
        s = scales[:, k // scheme.group]  # type: ignore[operator]
        q = (left[:, k] / s).round().clamp(-8, 7)
        assert ((q - values[:, k]).abs() <= 1).all()
        q = values[:, k].double()
        error = (left[:, k] - q * s) / inverse[k, k]
        left = left - torch.outer(error, inverse[k])
        inverse = inverse - torch.outer(inverse[:, k], inverse[k]) / inverse[k, k]
        inverse[:, k] = inverse[k] = 0
        inverse[k, k] = 1.0
    E = W.double() - Rounded(precision, values, scales).dense()
    torch.testing.assert_close(errors.double(), ((E @ metric) * E).sum(1), rtol=1e-3, atol=0)


def test_weights_that_are_on_a_grid_are_found_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    scales = torch.rand(16, 4, generator=generator).bfloat16().float() + 0.5
    values = torch.randint(-8, 8, (16, 128), generator=generator).float()
    values.view(16, 4, 32)[:, :, 0] = -8
    W = (values.view(16, 4, 32) * scales.bfloat16().float()[:, :, None]).view(16, 128)
    torch.testing.assert_close(quantize(W, "int4_g32").dense(), W)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", ["zero", "one token", "tiny", "huge", "dead inputs"])
def test_singular_metrics_give_finite_weights_and_residuals(precision: Precision, kind: str) -> None:
    W, H = problem(8, 128, tokens=1 if kind == "one token" else None)
    H = H * {"zero": 0.0, "tiny": 1e-30, "huge": 1e12}.get(kind, 1.0)
    if kind == "dead inputs":
        H[:64] = H[:, :64] = 0
    rounded = quantize(W, precision, H)
    assert rounded.dense().isfinite().all()
    assert (W - rounded.dense()).abs().max() < 4
    spectrum = residual_spectrum(W - rounded.dense(), H)
    assert spectrum.errors().isfinite().all()
    assert spectrum.cut(8).dense().isfinite().all()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_zero_weights_stay_zero(precision: Precision) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        assert not quantize(torch.zeros(4, 128), precision, torch.eye(128), dtype).dense().any()


def test_what_cannot_be_rounded_is_refused() -> None:
    W, H = problem(4, 48)
    with pytest.raises(ValueError, match="48 inputs do not divide into groups of 32"):
        quantize(W, "int4_g32", H)
    with pytest.raises(CalibrationError, match="not finite"):
        quantize(W, "int8", H * float("nan"))
    with pytest.raises(CalibrationError, match="not finite"):
        residual_spectrum(W, H, torch.full((4,), float("inf")))
    for rank in (0, 5):
        with pytest.raises(ValueError, match=r"outside 1\.\.4"):
            residual_spectrum(W).cut(rank)


def gradient_of(m: int, kind: str | None, seed: int = 0) -> torch.Tensor | None:
    g = torch.randn(3 * m, m, generator=torch.Generator().manual_seed(seed)).double() * torch.rand(m) * 3
    return {"full": g.T @ g / len(g), "diagonal": g.square().mean(0), None: None}[kind]


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(1, 9),
    n=st.integers(1, 9),
    seed=st.integers(0, 99),
    tokens=st.integers(1, 20),
    kind=st.sampled_from(["full", "diagonal", None]),
)
def test_the_residual_of_every_rank_is_optimal_and_its_error_is_known(
    m: int, n: int, seed: int, tokens: int, kind: str | None
) -> None:
    E, H = problem(m, n, seed, tokens)
    gradient = gradient_of(m, kind, seed)
    spectrum = residual_spectrum(E, H, gradient)
    errors = spectrum.errors()
    assert len(errors) == min(m, n) + 1
    for rank in range(min(m, n) + 1):
        B, A = spectrum.B[:, :rank], spectrum.A[:rank]
        torch.testing.assert_close(weighted(E - B @ A, H, gradient), float(errors[rank]), rtol=1e-4, atol=1e-5 * float(errors[0]))
        for _ in range(3):  # competitors near by and far away
            other = (B + 0.1 * torch.randn_like(B)) @ (A + 0.1 * torch.randn_like(A))
            assert weighted(E - other, H, gradient) >= float(errors[rank]) * (1 - 1e-4) - 1e-6 * float(errors[0])


def test_without_a_gradient_the_residual_is_eora() -> None:
    E, H = problem(12, 20)
    damped = H + repairing._DAMPING * H.diagonal().mean() * torch.eye(20)
    values, vectors = torch.linalg.eigh(damped)
    root = vectors * values.sqrt()
    U, S, Vh = torch.linalg.svd(E.double() @ root, full_matrices=False)
    expected = (U[:, :5] * S[:5]) @ Vh[:5] @ (vectors / values.sqrt()).T
    spectrum = residual_spectrum(E, H)
    torch.testing.assert_close((spectrum.B[:, :5] @ spectrum.A[:5]).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["full", "diagonal", None])
def test_leading_ranks_are_those_of_the_whole(kind: str | None) -> None:
    E, H = problem(160, 192)
    gradient = gradient_of(160, kind)
    whole, leading = residual_spectrum(E, H, gradient), residual_spectrum(E, H, gradient, ranks=16)
    assert len(leading.values) == 16
    torch.testing.assert_close(leading.total, whole.total, rtol=1e-5, atol=0)
    torch.testing.assert_close(leading.errors(), whole.errors()[:17], rtol=5e-3, atol=0)
    torch.testing.assert_close(leading.values[:4], whole.values[:4], rtol=1e-2, atol=0)


def test_int8_factors_cost_little() -> None:
    W, H = problem(96, 128)
    E = W - round_to_nearest(W, "int4_g32").dense()
    spectrum = residual_spectrum(E, H)
    residual = spectrum.cut(16)
    assert residual.rank == 16
    assert residual.A.dtype == residual.B.dtype == torch.int8
    gained = float(spectrum.errors()[0] - spectrum.errors()[16])
    assert weighted(E - residual.dense(), H) < float(spectrum.errors()[16]) + 0.02 * gained


def test_zero_factors_stay_zero() -> None:
    assert not rounded_factors(torch.zeros(3, 2), torch.zeros(2, 4)).dense().any()
