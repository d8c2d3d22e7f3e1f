"""Refinement against the dense block's outputs: least squares, Adam, and that both resume."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from blockwise import Ranks, compressed_copy, error, finite, inputs_of, outputs, plain_factors, same, strong_plan, windows
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import FAMILIES_TESTED, dense_model

from lrserve.compression import sequential
from lrserve.compression.factorize import Factors, FactorSource
from lrserve.compression.groups import find_groups
from lrserve.compression.refine import adam, closed_form, refit
from lrserve.compression.sequential import PairedAccumulator, walk
from lrserve.compression.spectra import stacked_weight
from lrserve.compression.training import TrainedFactors
from lrserve.errors import CalibrationError

BATCH = 5 * 12  # five windows, so the last batch is not full


def refine_closed_form(
    model: Any, ranks: Ranks, source: FactorSource, tokens: torch.Tensor, folder: Path, **walking: Any
) -> TrainedFactors:
    return walk(model, ranks, tokens, folder, closed_form(source), **walking)


def refine_adam(
    model: Any, ranks: Ranks, source: FactorSource, tokens: torch.Tensor, folder: Path, **options: Any
) -> TrainedFactors:
    how = {name: options.pop(name) for name in ("steps", "learning_rate", "seed") if name in options}
    return walk(model, ranks, tokens, folder, adam(source, **how), **options)


METHODS = [refine_closed_form, refine_adam]


@settings(max_examples=30, deadline=None)
@given(
    m=st.integers(1, 6),
    n=st.integers(1, 6),
    tokens=st.integers(1, 30),
    damping=st.sampled_from([1e-12, 1e-4, 1.0, 1e6]),
    seed=st.integers(0, 999),
)
def test_refitting_never_increases_the_error_and_reaches_least_squares(
    m: int, n: int, tokens: int, damping: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rank = min(m, n)
    W, beta, x, x_hat = normal(m, n), normal(m), normal(tokens, n), normal(tokens, n)
    A = torch.linalg.qr(normal(n, rank))[0].T
    before = Factors(A=A, B=normal(m, rank), b=normal(m))
    accumulator = PairedAccumulator(n, x.dtype)
    accumulator.update(x, x_hat)
    after = refit(before, W, beta, accumulator.finish(), damping)
    y = outputs(x, W, beta)

    def squared_error(factors: Factors) -> torch.Tensor:
        return (y - outputs(x_hat, factors.merged(), factors.b)).square().sum()

    assert torch.equal(after.A, A)
    assert squared_error(after) <= squared_error(before) + 1e-9
    if damping < 1e-9 and tokens > 2 * rank + 1:
        design = torch.cat([x_hat @ A.T, torch.ones(tokens, 1).double()], dim=1)
        best = (y - design @ torch.linalg.lstsq(design, y).solution).square().sum()
        torch.testing.assert_close(squared_error(after), best, rtol=1e-6, atol=1e-6)


def test_a_damping_that_is_not_positive_is_refused() -> None:
    accumulator = PairedAccumulator(2, torch.float32)
    accumulator.update(torch.ones(3, 2), torch.ones(3, 2))
    factors = Factors(A=torch.eye(2), B=torch.eye(2), b=torch.zeros(2))
    with pytest.raises(ValueError, match="positive"):
        refit(factors, torch.eye(2).double(), torch.zeros(2), accumulator.finish(), 0.0)


@pytest.mark.parametrize("architecture", FAMILIES_TESTED)
def test_closed_form_lowers_the_error_of_every_groups_outputs(architecture: str, tmp_path: Path) -> None:
    model = dense_model(architecture)
    ranks = strong_plan(model)
    source = plain_factors(model, ranks, windows(), tmp_path / "plain")
    refined = refine_closed_form(model, ranks, source, windows(), tmp_path / "refined", batch_tokens=BATCH)
    groups = [group for group, _ in ranks]
    dense = inputs_of(model, groups, windows())
    compressed = inputs_of(compressed_copy(model, ranks, refined), groups, windows())
    ratios = []
    for group, rank in ranks:
        y = outputs(dense[group.name], *stacked_weight(model, group))
        before, after = (
            (y - outputs(compressed[group.name], f.merged(), f.b)).square().mean()
            for f in (source.cut(group.name, rank), refined.cut(group.name, rank))
        )
        ratios.append((after / before).item())
    assert max(ratios) <= 1 + 1e-4
    assert min(ratios) < 0.95
    assert error(model, ranks, refined, windows()) < error(model, ranks, source, windows())


@pytest.mark.parametrize("architecture", FAMILIES_TESTED)
def test_adam_lowers_the_error_of_the_blocks_outputs(architecture: str, tmp_path: Path) -> None:
    model = dense_model(architecture, layers=1)
    ranks = strong_plan(model)
    source = plain_factors(model, ranks, windows(), tmp_path / "plain")
    refined = refine_adam(model, ranks, source, windows(), tmp_path / "refined", steps=40, learning_rate=3e-3, batch_tokens=BATCH)
    before, after = (error(model, ranks, factors, windows()) for factors in (source, refined))
    assert 0 < after < 0.9 * before


def test_tokens_of_massive_activations_do_not_dominate(tmp_path: Path) -> None:
    model = dense_model("LlamaForCausalLM", layers=1)
    ranks = strong_plan(model)
    tokens = windows()
    model.get_input_embeddings().weight.data[tokens.unique()[:4]] *= 300
    source = plain_factors(model, ranks, tokens, tmp_path / "plain")
    refined = refine_adam(model, ranks, source, tokens, tmp_path / "refined", steps=40, learning_rate=3e-3, batch_tokens=BATCH)
    before, after = (error(model, ranks, factors, tokens) for factors in (source, refined))
    assert 0 < after < 0.82 * before


def test_adam_follows_what_the_blocks_before_became(tmp_path: Path) -> None:
    model = dense_model("LlamaForCausalLM", layers=3)
    ranks = strong_plan(model)
    source = plain_factors(model, ranks, windows(), tmp_path / "plain")
    options: dict[str, Any] = {"steps": 30, "learning_rate": 3e-3, "batch_tokens": BATCH}
    refined = refine_adam(model, ranks, source, windows(), tmp_path / "refined", **options)
    alone = {
        group.name: refine_adam(model, own, source, windows(), tmp_path / f"{layer}", **options).cut(group.name, rank)
        for layer in range(3)
        for own in [[(group, rank) for group, rank in ranks if group.layer == layer]]
        for group, rank in own
    }
    errors = [error(model, ranks, factors, windows()) for factors in (refined, TrainedFactors(alone), source)]
    assert errors[0] < 0.95 * errors[1]
    assert errors[0] < 0.9 * errors[2]


def test_adam_is_decided_by_its_seed(tmp_path: Path) -> None:
    model = dense_model("LlamaForCausalLM", layers=1)
    ranks = strong_plan(model)
    source = plain_factors(model, ranks, windows(), tmp_path / "plain")

    def run(name: str, seed: int) -> TrainedFactors:
        return refine_adam(model, ranks, source, windows(), tmp_path / name, steps=3, seed=seed, batch_tokens=BATCH)

    assert same(run("a", 1), run("b", 1))
    assert not same(run("c", 2), run("d", 1))


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("method", METHODS)
def test_an_interrupted_refinement_resumes_with_the_same_result(
    method: Callable[..., TrainedFactors], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = dense_model("LlamaForCausalLM", layers=3)
    ranks = strong_plan(model)
    source = plain_factors(model, ranks, windows(), tmp_path / "plain")
    options: dict[str, Any] = {"batch_tokens": BATCH} | ({"steps": 4} if method is refine_adam else {})
    whole = method(model, ranks, source, windows(), tmp_path / "whole", **options)
    save = sequential.write_tensors

    def fail_at_the_second(path: Path, tensors: Any) -> None:
        if "00001" in path.name:
            raise Interrupted
        save(path, tensors)

    monkeypatch.setattr(sequential, "write_tensors", fail_at_the_second)
    with pytest.raises(Interrupted):
        method(model, ranks, source, windows(), tmp_path / "cut", **options)
    monkeypatch.setattr(sequential, "write_tensors", save)
    steps: list[int] = []
    resumed = method(model, ranks, source, windows(), tmp_path / "cut", **options, progress=steps.append)
    assert same(resumed, whole)
    assert not same(resumed, source)
    assert steps == [1, 2, 3]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(1, 1), (2, 3)])
def test_fewer_tokens_than_coordinates_give_finite_factors(
    method: Callable[..., TrainedFactors], shape: tuple[int, int], tmp_path: Path
) -> None:
    model = dense_model("LlamaForCausalLM")
    ranks = [(group, group.full_rank) for group in find_groups(model)]
    tokens = windows(*shape)
    source = plain_factors(model, ranks, tokens, tmp_path / "plain")
    assert finite(method(model, ranks, source, tokens, tmp_path / "refined", batch_tokens=BATCH), ranks)


def test_a_loss_that_is_not_finite_is_an_error(tmp_path: Path) -> None:
    model = dense_model("LlamaForCausalLM", layers=1)
    ranks = strong_plan(model)
    source = plain_factors(model, ranks, windows(), tmp_path / "plain")
    with pytest.raises(CalibrationError, match="learning rate"):
        refine_adam(model, ranks, source, windows(), tmp_path / "refined", steps=20, learning_rate=1e36, batch_tokens=BATCH)


def test_factors_that_are_not_finite_are_named(tmp_path: Path) -> None:
    model = dense_model("LlamaForCausalLM", layers=1)
    ranks = strong_plan(model)
    source = TrainedFactors(
        {
            group.name: Factors(A=torch.eye(rank, group.n), B=torch.full((group.m, rank), torch.nan), b=torch.zeros(group.m))
            for group, rank in ranks
        }
    )
    with pytest.raises(CalibrationError, match=r"qkv_proj\.B is not finite; keep this group dense"):
        refine_closed_form(model, ranks[:1], source, windows(), tmp_path, batch_tokens=BATCH)


def test_fewer_inputs_are_refitted_as_the_matrix_that_picks_them() -> None:
    torch.manual_seed(0)
    accumulator = PairedAccumulator(6, torch.float32)
    x = torch.randn(50, 6) @ torch.randn(6, 6)
    accumulator.update(x, x + 0.1 * torch.randn(50, 6))
    W, beta, order = torch.randn(4, 6).double(), torch.randn(4).double(), torch.tensor([4, 1, 3], dtype=torch.int32)
    B, b = torch.randn(4, 3), torch.zeros(4)
    pairs = accumulator.finish()
    picking = refit(Factors(A=torch.eye(6)[order.long()], B=B, b=b), W, beta, pairs, 1e-2)
    fewer = refit(Factors(A=torch.empty(3, 0), B=B, b=b, order=order, feeding=torch.randn(6, 5)), W, beta, pairs, 1e-2)
    torch.testing.assert_close(fewer.B, picking.B)
    torch.testing.assert_close(fewer.b, picking.b)
    assert fewer.order is order
    assert fewer.feeding is None  # B' is for the inputs of the pairs, which come from dense rows
