"""Calibration by shards: the merged statistics and factors are those of one process, and what is missing is named."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import dense_model, write_dense, write_text

from lrserve.compression.calibrate import read_statistics
from lrserve.compression.gradients import GradientStore
from lrserve.compression.spectra import SpectrumStore
from lrserve.errors import InputError
from lrserve.pipeline.collect import backpropagate, calibrate_blocks, calibrate_shard, require_shards
from lrserve.pipeline.job import Job, open_job
from lrserve.pipeline.run import factorize_groups
from lrserve.pipeline.shard import Shard
from lrserve.pipeline.stages import MODULES
from lrserve.recipe import Recipe
from lrserve.storage.work import WorkFolder, work_folder

SMALL: dict[str, Any] = {
    "calibration": {"sequences": 9, "length": 32, "pool_sequences": 2, "batch_tokens": 128},
    "factorization": {"fisher_tokens": 160, "structure": "low_rank"},
    "search": {"validation_tokens": 256, "validation_pool": 512, "validation_length": 32, "probe_tokens": 64},
    "engine": {"dtype": "float32"},
    "report": {"tokens": 64, "length": 32, "prompts": 1, "prompt_tokens": 8},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("collect")
    write_dense(dense_model("Qwen2ForCausalLM"), place / "model")
    write_text(place / "text.jsonl", 200)
    return place


def recipe(place: Path, **overrides: Any) -> Recipe:
    settings = {"model": str(place / "model"), "text.calibration": str(place / "text.jsonl"), **SMALL, **overrides}
    return Recipe.load(None, settings)


def job_of(place: Path, **overrides: Any) -> Job:
    return open_job(recipe(place, **overrides), lambda line: None)


def shards(place: Path, work: Path, count: int, **overrides: Any) -> None:
    for index in reversed(range(1, count + 1)):
        calibrate_shard(recipe(place, **overrides), Shard(index, count), work, say=lambda line: None)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[WorkFolder]:
    with work_folder(tmp_path / "work", lambda line: None, MODULES) as folder:
        yield folder


def collect(job: Job, folder: WorkFolder) -> tuple[Path, GradientStore, SpectrumStore]:
    model = job.source.load(job.dtype)
    statistics, gradients = calibrate_blocks(job, model, folder), backpropagate(job, model, folder)
    assert gradients is not None
    return statistics, gradients, factorize_groups(job, model, statistics, gradients, folder)


@pytest.mark.parametrize("count", [1, 3, 5])
def test_shards_give_the_factors_of_one_process(place: Path, tmp_path: Path, folder: WorkFolder, count: int) -> None:
    job = job_of(place)
    with work_folder(tmp_path / "whole", lambda line: None, MODULES) as whole:
        statistics, gradients, store = collect(job, whole)
    shards(place, folder.root, count)
    require_shards(job, folder)
    merged, merged_gradients, merged_store = collect(job, folder)
    assert not list(folder.root.glob("calibration-*/hidden*")), "nothing was calibrated again"
    for group in job.groups:
        one, other = read_statistics(statistics, group), read_statistics(merged, group)
        assert one.pool_tokens.tolist() == other.pool_tokens.tolist() == [64, 64, 64, 64, 32]
        for field in ("C", "mu", "pool_means"):
            torch.testing.assert_close(getattr(other, field), getattr(one, field), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(merged_gradients.read(group)[1], gradients.read(group)[1], rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(merged_gradients.token_weights(group), gradients.token_weights(group), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(merged_gradients.outputs(group), gradients.outputs(group), rtol=1e-5, atol=1e-8)
        one_map, other_map = (f.B @ f.A for f in (source.cut(group.name, 16) for source in (store, merged_store)))
        torch.testing.assert_close(other_map, one_map, rtol=1e-4, atol=1e-4)


def test_a_run_without_shards_needs_none_and_a_merged_one_keeps_its_statistics(place: Path, folder: WorkFolder) -> None:
    job = job_of(place)
    require_shards(job, folder)
    shards(place, folder.root, 2)
    collect(job, folder)
    for path in folder.root.glob("shard-2-of-2/*/*.safetensors"):
        path.unlink()
    require_shards(job, folder)
    collect(job, folder)


@pytest.mark.parametrize("stage", ["calibration", "gradients"])
def test_a_shard_that_is_missing_is_named_before_any_work(place: Path, folder: WorkFolder, stage: str) -> None:
    shards(place, folder.root, 3)
    (damaged, *_) = folder.root.glob(f"shard-2-of-3/{stage}-*/*.safetensors")
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(
        InputError, match=rf"not all {stage} of this run's inputs: 2/3 is missing; run 'lrserve calibrate --shard 2/3"
    ):
        require_shards(job_of(place), folder)
    calibrate_shard(recipe(place), Shard(2, 3), folder.root, say=lambda line: None)  # makes it whole again
    require_shards(job_of(place), folder)


def test_shards_of_other_inputs_are_not_taken(place: Path, folder: WorkFolder) -> None:
    shards(place, folder.root, 2, seed=1)
    with pytest.raises(InputError, match="not all calibration of this run's inputs: 1/2, 2/2 are missing"):
        require_shards(job_of(place), folder)


def test_more_shards_than_pools_are_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match="--shard 1/6: there are 5 pools of calibration.pool_sequences 2 sequences; give at most 5"
    ):
        calibrate_shard(recipe(place), Shard(1, 6), tmp_path, say=lambda line: None)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_shard_goes_on(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("lrserve.pipeline.collect.collect_gradients", interrupt)
        calibrate_shard(recipe(place), Shard(1, 2), tmp_path, say=lambda line: None)
    said: list[str] = []
    calibrate_shard(recipe(place), Shard(1, 2), tmp_path, say=said.append)
    assert any("covariances of 2 blocks" in line and "(all reused)" in line for line in said)
    assert any("gradients: moments" in line and "reused" not in line for line in said)


def test_parts_are_whole_steps_and_cover_everything_once() -> None:
    for items in (1, 5, 8, 17):
        for step in (1, 2, 4, 20):
            for count in (1, 2, 3, 9):
                parts = [Shard(index, count).part(items, step) for index in range(1, count + 1)]
                assert [item for part in parts for item in range(items)[part]] == list(range(items))
                assert all(part.start % step == 0 for part in parts)
