"""Error propagation: the closed form against reduced-rank regression, and the walk against hooks on whole models."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from blockwise import Ranks, compressed_copy, error, finite, inputs_of, outputs, plain_factors, same, strong_plan, windows
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import FAMILIES_TESTED, dense_model

from lrserve.compression import sequential
from lrserve.compression.factorize import factorize
from lrserve.compression.groups import Group, find_groups
from lrserve.compression.propagate import factorize_compensated, propagation
from lrserve.compression.sequential import PairedAccumulator, PairedCovariance, walk
from lrserve.compression.spectra import stacked_weight
from lrserve.compression.training import TrainedFactors
from lrserve.errors import CalibrationError

BATCH = 5 * 12  # five windows, so the last batch is not full


def pairs_of(x: torch.Tensor, x_hat: torch.Tensor, batch: int = 7) -> PairedCovariance:
    accumulator = PairedAccumulator(x.shape[1], x.dtype)
    for part, part_hat in zip(x.split(batch), x_hat.split(batch), strict=True):
        accumulator.update(part, part_hat)
    return accumulator.finish()


def problem(m: int, n: int, seed: int, tokens: int = 60) -> tuple[torch.Tensor, ...]:
    """W, beta, and inputs of which the second differ from the first by a linear map and by noise."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = normal(tokens, n) @ normal(n, n) + normal(n)
    x_hat = x @ (torch.eye(n, dtype=torch.float64) + 0.5 * normal(n, n)) + normal(n) + 0.3 * normal(tokens, n)
    return normal(m, n), normal(m), x, x_hat


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_paired_statistics_equal_those_of_torch(dtype: torch.dtype) -> None:
    _, _, x, x_hat = (tensor.to(dtype) for tensor in problem(3, 6, 0))
    found = pairs_of(x, x_hat)
    both = torch.cat([x, x_hat], dim=1).double().T.cov()
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype is torch.bfloat16 else {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(found.G, both[:6, 6:], **tolerance)
    torch.testing.assert_close(found.H, both[6:, 6:], **tolerance)
    torch.testing.assert_close(found.mu, x.double().mean(0), **tolerance)
    torch.testing.assert_close(found.mu_hat, x_hat.double().mean(0), **tolerance)


def test_infinite_inputs_are_an_error_on_either_side() -> None:
    x = torch.ones(4, 3)
    for one, other in ((x * float("inf"), x), (x, x * float("inf"))):
        with pytest.raises(CalibrationError, match="not finite"):
            pairs_of(one, other)


def best_error(x: torch.Tensor, x_hat: torch.Tensor, W: torch.Tensor, rank: int, Gamma: torch.Tensor) -> torch.Tensor:
    """Reduced-rank regression of Gamma y on x^, by a projection and a singular value decomposition of all tokens."""
    y = outputs(x, W, None) @ Gamma.T
    y, design = y - y.mean(0), x_hat - x_hat.mean(0)
    fitted = design @ torch.linalg.lstsq(design, y).solution
    U, S, Vh = torch.linalg.svd(fitted, full_matrices=False)
    return (y - U[:, :rank] * S[:rank] @ Vh[:rank]).square().sum()


@settings(max_examples=30, deadline=None)
@given(m=st.integers(1, 8), n=st.integers(1, 8), seed=st.integers(0, 999))
def test_without_damping_every_rank_reaches_the_reduced_rank_regression(m: int, n: int, seed: int) -> None:
    W, beta, x, x_hat = problem(m, n, seed)
    spectrum = factorize_compensated(W, beta, pairs_of(x, x_hat), damping=1e-13)
    y = outputs(x, W, beta)
    for rank in range(1, min(m, n) + 1):
        factors = spectrum.cut(rank)
        found = (y - outputs(x_hat, factors.merged(), factors.b)).square().sum()
        best = best_error(x, x_hat, W, rank, torch.eye(m, dtype=torch.float64))
        torch.testing.assert_close(found, best, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("side", ["input", "output"])
def test_a_gradient_moment_weighs_the_outputs(side: str) -> None:
    W, beta, x, _ = problem(7, 9, 1, tokens=200)
    x_hat = x.flip(1) + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    Gamma = torch.diag(10.0 ** torch.arange(7).double().neg())
    moment = Gamma @ Gamma if side == "output" else W.T @ Gamma @ Gamma @ W
    y, pairs = outputs(x, W, beta), pairs_of(x, x_hat)

    def weighted_error(gradient: Any) -> torch.Tensor:
        factors = factorize_compensated(W, beta, pairs, gradient, damping=1e-9).cut(2)
        return ((y - outputs(x_hat, factors.merged(), factors.b)) @ Gamma).square().sum()

    best = best_error(x, x_hat, W, 2, Gamma)
    assert weighted_error((side, moment)) < 1.2 * best
    assert weighted_error(None) > 1.5 * best


def test_full_strength_is_full_and_options_out_of_range_are_refused() -> None:
    W, beta, x, x_hat = problem(4, 5, 3)
    pairs = pairs_of(x, x_hat)
    half = factorize_compensated(W, beta, pairs, strength=0.5).cut(4).merged()
    ends = [factorize_compensated(W, beta, pairs, strength=strength).cut(4).merged() for strength in (0.0, 1.0)]
    torch.testing.assert_close(ends[0], W)
    assert (ends[1] - W).abs().max() > 0.1
    torch.testing.assert_close(half, (ends[0] + ends[1]) / 2)
    for options in ({"damping": 0.0}, {"strength": 1.5}, {"strength": -0.1}):
        with pytest.raises(ValueError, match="damping"):
            factorize_compensated(W, beta, pairs, **options)


def run(model: Any, ranks: Ranks, folder: Path, tokens: torch.Tensor | None = None, **options: Any) -> TrainedFactors:
    how = {name: options.pop(name) for name in ("gradient", "damping", "strength") if name in options}
    tokens = windows() if tokens is None else tokens
    return walk(model, ranks, tokens, folder, propagation(**how), **{"batch_tokens": BATCH, **options})


def features_of_the_compressed_inputs(model: Any, ranks: Ranks, tokens: torch.Tensor) -> TrainedFactors:
    """The same by hooks on whole models: group after group, each factorized for its inputs behind those before it."""
    dense = inputs_of(model, [group for group, _ in ranks], tokens)
    done: dict[str, Any] = {}
    for index, (group, rank) in enumerate(ranks):
        compressed = compressed_copy(model, ranks[:index], TrainedFactors(done))
        x_hat = inputs_of(compressed, [group], tokens)[group.name]
        W, beta = stacked_weight(model, group)
        bias = outputs(dense[group.name].mean(0), W, beta)
        factors = factorize(W, x_hat.T.cov(), x_hat.mean(0)).cut(rank)
        done[group.name] = type(factors)(factors.A, factors.B, bias - outputs(x_hat.mean(0), factors.merged(), None))
    return TrainedFactors(done)


@pytest.mark.parametrize("architecture", FAMILIES_TESTED)
@pytest.mark.parametrize("options", [{"strength": 0.0}, {"damping": 1e9}])
def test_without_compensation_the_factors_are_those_of_the_compressed_features(
    architecture: str, options: dict[str, float], tmp_path: Path
) -> None:
    model = dense_model(architecture, layers=3)
    ranks = strong_plan(model)
    found = run(model, ranks, tmp_path, **options)
    expected = features_of_the_compressed_inputs(model, ranks, windows())
    compensated = run(model, ranks, tmp_path / "compensated")
    for group, rank in ranks:
        one, other = found.cut(group.name, rank), expected.cut(group.name, rank)
        torch.testing.assert_close(one.merged().double(), other.merged(), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(one.b.double(), other.b, rtol=1e-3, atol=1e-3)
    assert (compensated.cut(*last(ranks)).merged() - found.cut(*last(ranks)).merged()).abs().max() > 0.05


def last(ranks: Ranks) -> tuple[str, int]:
    return ranks[-1][0].name, ranks[-1][1]


@pytest.mark.parametrize("architecture", FAMILIES_TESTED)
def test_the_final_hidden_states_come_closer_to_the_dense_ones(architecture: str, tmp_path: Path) -> None:
    model = dense_model(architecture, layers=3)
    ranks = strong_plan(model)
    plain = error(model, ranks, plain_factors(model, ranks, windows(), tmp_path / "plain"), windows())
    propagated = error(model, ranks, run(model, ranks, tmp_path / "propagated"), windows())
    assert 0.01 < propagated < 0.9 * plain


def test_a_bfloat16_model_gives_nearly_the_same_factors(tmp_path: Path) -> None:
    model = dense_model("LlamaForCausalLM").bfloat16()
    ranks = strong_plan(model)
    rough = run(model, ranks, tmp_path / "rough")
    exact = run(copy.deepcopy(model).float(), ranks, tmp_path / "exact")
    plain = plain_factors(model.float(), ranks, windows(), tmp_path / "plain")
    errors = [error(model, ranks, factors, windows()) for factors in (rough, exact, plain)]
    assert errors[0] < errors[1] + 0.1 * (errors[2] - errors[1])


def test_a_dense_plan_gives_no_factors_and_the_model_stays_as_it_is(tmp_path: Path) -> None:
    model = dense_model("LlamaForCausalLM")
    modules = dict(model.named_modules())
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    assert run(model, [], tmp_path / "dense").tensors() == {}
    ranks = strong_plan(model)
    names = {key.rpartition(".")[0] for key in run(model, ranks, tmp_path / "some").tensors()}
    assert names == {group.name for group, _ in ranks}
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())


def test_a_full_rank_plan_reproduces_the_dense_model(tmp_path: Path) -> None:
    model = dense_model("LlamaForCausalLM")
    ranks = [(group, group.full_rank) for group in find_groups(model)]
    assert error(model, ranks, run(model, ranks, tmp_path), windows()) < 1e-6


def test_a_plan_that_ends_early_walks_no_further(tmp_path: Path) -> None:
    model = dense_model("LlamaForCausalLM", layers=4)
    groups = [group for group in find_groups(model) if group.layer == 1]
    steps: list[int] = []
    run(model, [(group, 8) for group in groups], tmp_path, progress=steps.append)
    assert steps == [0, 1, 2]
    assert not list(tmp_path.glob("hidden*"))


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("where", ["while a group is solved", "before a block is published", "after a block is published"])
def test_an_interrupted_walk_resumes_with_the_same_result(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = dense_model("LlamaForCausalLM", layers=4)
    ranks = strong_plan(model)
    whole = run(model, ranks, tmp_path / "whole")
    folder = tmp_path / "cut"

    def fail_at_down(group: Group) -> None:
        if (group.layer, group.kind) == (2, "down"):
            raise Interrupted

    def fail_to_save(path: Path, tensors: Any) -> None:
        if "00002" in path.name:
            raise Interrupted
        save(path, tensors)

    def fail_behind(done: int) -> None:
        if done == 2:
            raise Interrupted

    options: dict[str, Any] = {}
    save = sequential.write_tensors
    if where == "while a group is solved":
        options["gradient"] = fail_at_down
    elif where == "before a block is published":
        monkeypatch.setattr(sequential, "write_tensors", fail_to_save)
    else:
        options["progress"] = fail_behind
    with pytest.raises(Interrupted):
        run(model, ranks, folder, **options)
    monkeypatch.setattr(sequential, "write_tensors", save)
    steps: list[int] = []
    assert same(run(model, ranks, folder, progress=steps.append), whole)
    assert steps == [2, 3, 4]
    again: list[int] = []
    assert same(run(model, ranks, folder, progress=again.append), whole)
    assert again == [4]


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (2, 3)])
def test_fewer_tokens_than_inputs_give_finite_factors(shape: tuple[int, int], tmp_path: Path) -> None:
    model = dense_model("LlamaForCausalLM")
    ranks = strong_plan(model)
    tokens = windows(*shape)
    for index, options in enumerate(({}, {"gradient": lambda group: ("input", torch.ones(group.n, group.n))})):
        assert finite(run(model, ranks, tmp_path / str(index), tokens, **options), ranks)


def test_a_model_that_overflows_is_refused_by_its_block(tmp_path: Path) -> None:
    model = dense_model("LlamaForCausalLM")
    model.get_submodule("model.layers.1.mlp.down_proj").weight.data.fill_(3e38)
    with pytest.raises(CalibrationError, match="block 1"):
        run(model, strong_plan(model), tmp_path)
