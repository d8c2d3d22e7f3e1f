"""The estimate before a run: every stage once, growing with what makes it grow; every family can be timed without weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tiny import FAMILIES_TESTED, dense_model, write_dense, write_text

from lrserve.allocation.speed import token_counts
from lrserve.pipeline.estimate import (
    Forward,
    StageCost,
    by_stage,
    disk_needed,
    estimate,
    in_words,
    time_forward,
    workload_seconds,
)
from lrserve.pipeline.job import Job, open_job
from lrserve.recipe import Recipe

SMALL: dict[str, Any] = {
    "target.ratio": 0.2,
    "calibration": {"sequences": 8, "length": 32},
    "factorization.fisher_tokens": 128,
    "search": {"validation_tokens": 128, "probe_tokens": 64, "validation_pool": 128, "validation_length": 32},
    "report": {"tokens": 64, "length": 32, "prompts": 1, "prompt_tokens": 8},
}


@pytest.fixture(scope="module")
def open_family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Job]:
    @cache
    def make(architecture: str) -> Job:
        folder = tmp_path_factory.mktemp("estimate")
        write_dense(dense_model(architecture, layers=4), folder / "model")
        write_text(folder / "text.jsonl", 100)
        overrides = {"model": str(folder / "model"), "text.calibration": str(folder / "text.jsonl"), **SMALL}
        return open_job(Recipe.load(None, overrides), say=lambda line: None)

    return make


@pytest.fixture
def job(open_family: Callable[[str], Job]) -> Job:
    return open_family("LlamaForCausalLM")


def changed(job: Job, section: str, **settings: Any) -> Job:
    part = getattr(job.recipe, section).model_copy(update=settings)
    return replace(job, recipe=job.recipe.model_copy(update={section: part}))


def forward_of(job: Job) -> Forward:
    return Forward(1e-3, 1e-4, dict.fromkeys(token_counts(job.recipe.workloads), 0.02))


def costs_of(job: Job) -> dict[str, StageCost]:
    return {cost.stage: cost for cost in estimate(job, forward_of(job))}


@pytest.mark.parametrize("architecture", FAMILIES_TESTED)
def test_every_family_can_be_timed(architecture: str, open_family: Callable[[str], Job]) -> None:
    job = open_family(architecture)
    forward = time_forward(job)
    assert 0 < forward.decoder < 1
    assert 0 < forward.head < 1
    assert set(forward.rows) == set(token_counts(job.recipe.workloads))
    assert all(seconds > 0 for seconds in forward.rows.values())


def test_stages_stand_in_the_order_of_the_run(job: Job) -> None:
    stages = ["2 calibrate", "2 gradients", "3 factorize", "4 search", "4 latency", "4 measure", "5 improve", "6 export and prove"]
    assert list(costs_of(job)) == stages
    assert "2 gradients" not in costs_of(changed(job, "factorization", fisher=()))
    assert "5 improve" not in costs_of(changed(job, "factorization", refine="none"))
    for stage in stages:
        assert f"| {stage} " in by_stage(list(costs_of(job).values()))


def test_time_grows_with_what_is_asked_for(job: Job) -> None:
    base = costs_of(job)

    def grown(stage: str, section: str, **settings: Any) -> float:
        return costs_of(changed(job, section, **settings))[stage].seconds / base[stage].seconds

    assert grown("2 gradients", "factorization", fisher_tokens=256) == pytest.approx(2)
    assert grown("4 search", "search", trials=48) > 1.3
    assert grown("4 measure", "search", measured_plans=6) == pytest.approx(8 / 5)
    assert grown("5 improve", "factorization", refine_steps=250) > 5
    recovered = costs_of(changed(job, "factorization", recover_minutes=10.0, refine="none"))["5 improve"]
    assert recovered.seconds == pytest.approx(600)
    compiled = costs_of(changed(job, "engine", enforce_eager=True))["4 latency"].seconds
    assert compiled < base["4 latency"].seconds


def test_disk_and_memory_hold_what_is_written(job: Job) -> None:
    parameters = sum(parameter.numel() for parameter in job.source.skeleton().parameters())
    costs = costs_of(changed(job, "target", ratio=None, min_speedup=1.1))
    assert costs["6 export and prove"].disk == parameters * (2 + 4)  # bfloat16 for vLLM, float32 for ONNX Runtime
    assert costs["6 export and prove"].memory > 2 * 4 * parameters
    hidden = job.windows["calibration"].numel() * 64 * 2
    assert costs["2 calibrate"].disk > 2 * hidden


def test_the_disk_holds_what_passes_at_its_fullest_moment() -> None:
    costs = [StageCost("a", 1.0, 5, 0, 30), StageCost("b", 1.0, 7, 0, 20), StageCost("c", 1.0, 11, 0, 3)]
    assert disk_needed(costs) == [(12 + 30, 0), (12 + 3, 11)]
    assert disk_needed(costs[1:]) == [(7 + 20, 0), (7 + 3, 11)]


def test_a_target_that_fixes_a_size_takes_less_disk(job: Job) -> None:
    def needed(**target: float) -> int:
        costs = costs_of(changed(job, "target", **{"ratio": None, **target}))
        return max(map(sum, disk_needed(list(costs.values()))))

    assert needed(ratio=0.4) < needed(ratio=0.2) < needed(min_speedup=1.1)
    assert needed(max_bytes=0.6) < needed(min_speedup=1.1)


def test_processes_that_shard_a_recovery_share_what_copies_hold_each(job: Job) -> None:
    def memory(**settings: Any) -> int:
        return costs_of(changed(job, "factorization", recover_minutes=1.0, **settings))["5 improve"].memory

    alone, copies, parts = memory(), memory(recover_processes=4), memory(recover_processes=4, recover_sharded=True)
    assert memory(recover_sharded=True) == alone
    assert alone < parts < copies


def test_a_workload_is_its_prefill_and_its_decode_steps(job: Job) -> None:
    forward = forward_of(job)
    calls = sum(w.output_tokens for w in job.recipe.workloads.values())  # one prefill, and a step for each further token
    assert workload_seconds(job.recipe.workloads, forward) == pytest.approx(0.02 * calls)


def test_in_words() -> None:
    costs = [StageCost("a", 100.0, 2 * 10**9, 3 * 10**9), StageCost("b", 50.0, 10**9, 5 * 10**9)]
    assert disk_needed(costs) == [(2 * 10**9, 0), (2 * 10**9, 10**9)]
    words = in_words(costs)
    assert "about 2 min 30 s, 3.0 GB of disk, and 5.0 GB of memory" in words


def test_a_checkpoint_can_be_estimated_without_its_weights(job: Job, tmp_path: Path) -> None:
    """Only config.json is read: a dry run of a large model must not load it."""
    (tmp_path / "config.json").write_text((job.source.path / "config.json").read_text())
    bare = replace(job, source=replace(job.source, path=tmp_path))
    assert time_forward(bare).decoder > 0
