"""What a run holds in memory at the same time."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tiny import dense_model, write_dense, write_text

from lrserve.engines.memory import Memory
from lrserve.pipeline import holding as module
from lrserve.pipeline.holding import ALL, Holding, holding
from lrserve.pipeline.job import Job, open_job
from lrserve.recipe import Recipe


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    place = tmp_path_factory.mktemp("holding")
    write_dense(dense_model("LlamaForCausalLM"), place / "model")
    write_text(place / "text.jsonl", 100)
    settings = {
        "model": str(place / "model"),
        "text": {"calibration": str(place / "text.jsonl")},
        "calibration": {"sequences": 4, "length": 32},
        "search": {"validation_tokens": 64, "probe_tokens": 64, "validation_pool": 64, "validation_length": 32},
        "report": {"tokens": 64, "length": 32, "prompts": 2, "prompt_tokens": 12, "new_tokens": 4},
    }
    return open_job(Recipe.model_validate(settings), say=lambda line: None)


@pytest.mark.parametrize(
    ("gib", "expected"),
    [
        (6.0, ALL),
        (5.5, Holding(engines=False, tensors=True, activations=True, reference=True, engine_in_float32=True)),
        (3.0, Holding(engines=False, tensors=False, activations=True, reference=True, engine_in_float32=False)),
        (0.5, Holding(engines=False, tensors=False, activations=False, reference=False, engine_in_float32=False)),
    ],
)
def test_what_fits_is_held(job: Job, gib: float, expected: Holding) -> None:
    assert holding(replace(job, recipe=job.recipe.model_copy(update={"memory": gib}))) == expected


def test_the_machine_decides_where_the_recipe_does_not(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "free_memory", lambda: Memory(total=2**40, free=0))
    assert holding(job) == ALL
    monkeypatch.setattr(module, "free_memory", lambda: Memory(total=2**28, free=0))
    assert not holding(job).reference
    monkeypatch.setattr(module, "free_memory", lambda: None)  # a system that does not say
    assert holding(job) == ALL


@pytest.mark.parametrize(
    ("gib", "expected"),
    [
        (8, Holding(engines=True, tensors=True, activations=True, reference=True, engine_in_float32=True)),
        (6, Holding(engines=False, tensors=True, activations=True, reference=True, engine_in_float32=True)),
        (3, Holding(engines=False, tensors=True, activations=True, reference=True, engine_in_float32=False)),
    ],
)
def test_on_a_gpu_its_own_memory_decides_of_engines(job: Job, gib: int, expected: Holding, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = replace(module.runtime_of(job.recipe.engine), on_gpu=True)
    monkeypatch.setattr(module, "runtime_of", lambda settings: runtime)
    monkeypatch.setattr(module, "device_memory", lambda: gib * 2**30)
    assert holding(job) == expected


def test_the_setting_does_not_change_what_a_result_is_made_from(job: Job) -> None:
    assert replace(job, recipe=job.recipe.model_copy(update={"memory": 3.0})).provenance() == job.provenance()


def test_it_is_said_in_words() -> None:
    assert str(ALL) == (
        "engines of the dense model and of a plan side by side; weights of a plan and moments of gradients in memory; "
        "the reference in float32 at once"
    )
    told = str(Holding(engines=False, tensors=False, activations=False, reference=False, engine_in_float32=False))
    assert "one after the other" in told
    assert "moments of gradients in files; activations computed again in backward passes" in told
    assert "block by block" in told
    assert told.endswith("engines that serve in 16 bits are not proved in float32")
