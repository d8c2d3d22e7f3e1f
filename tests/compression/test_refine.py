"""Refinement against the dense block's outputs by Adam, and that it resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from blockwise import Ranks, error, finite, plain_factors, same, strong_plan, windows
from tiny import FAMILIES_TESTED, dense_model

from lrserve.compression import sequential
from lrserve.compression.factorize import Factors, FactorSource
from lrserve.compression.groups import find_groups
from lrserve.compression.refine import adam
from lrserve.compression.sequential import walk
from lrserve.compression.training import TrainedFactors
from lrserve.errors import CalibrationError

BATCH = 5 * 12  # five windows, so the last batch is not full


def refine_adam(
    model: Any, ranks: Ranks, source: FactorSource, tokens: torch.Tensor, folder: Path, **options: Any
) -> TrainedFactors:
    how = {name: options.pop(name) for name in ("steps", "learning_rate", "seed") if name in options}
    return walk(model, ranks, tokens, folder, adam(source, **how), **options)


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


def test_an_interrupted_refinement_resumes_with_the_same_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = dense_model("LlamaForCausalLM", layers=3)
    ranks = strong_plan(model)
    source = plain_factors(model, ranks, windows(), tmp_path / "plain")
    options: dict[str, Any] = {"batch_tokens": BATCH, "steps": 4}
    whole = refine_adam(model, ranks, source, windows(), tmp_path / "whole", **options)
    save = sequential.write_tensors

    def fail_at_the_second(path: Path, tensors: Any) -> None:
        if "00001" in path.name:
            raise Interrupted
        save(path, tensors)

    monkeypatch.setattr(sequential, "write_tensors", fail_at_the_second)
    with pytest.raises(Interrupted):
        refine_adam(model, ranks, source, windows(), tmp_path / "cut", **options)
    monkeypatch.setattr(sequential, "write_tensors", save)
    steps: list[int] = []
    resumed = refine_adam(model, ranks, source, windows(), tmp_path / "cut", **options, progress=steps.append)
    assert same(resumed, whole)
    assert not same(resumed, source)
    assert steps == [1, 2, 3]


@pytest.mark.parametrize("shape", [(1, 1), (2, 3)])
def test_fewer_tokens_than_coordinates_give_finite_factors(shape: tuple[int, int], tmp_path: Path) -> None:
    model = dense_model("LlamaForCausalLM")
    ranks = [(group, group.full_rank) for group in find_groups(model)]
    tokens = windows(*shape)
    source = plain_factors(model, ranks, tokens, tmp_path / "plain")
    assert finite(refine_adam(model, ranks, source, tokens, tmp_path / "refined", batch_tokens=BATCH), ranks)


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
    with pytest.raises(CalibrationError, match="block 0 is not finite after 0 steps; its factors or its inputs are not"):
        refine_adam(model, ranks[:1], source, windows(), tmp_path, steps=1, batch_tokens=BATCH)
