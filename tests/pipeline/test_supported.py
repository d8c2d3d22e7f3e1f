"""Engines are tried on two random layers before the work: what they cannot build, or compute otherwise, is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny import RENDERED, dense_model, write_dense, write_text
from transformers import AutoModelForCausalLM

from lrserve.engines.onnx import OnnxEngine
from lrserve.errors import ArtifactError, InputError, UnsupportedModelError
from lrserve.pipeline.job import Job, open_job
from lrserve.pipeline.run import load_exporters
from lrserve.pipeline.supported import require_divisible, require_engines
from lrserve.recipe import Factorization, Recipe

Open = Callable[..., tuple[Job, list[str]]]


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Open:
    """Open a tiny model with changed entries of its config; with the job come its lines."""
    monkeypatch.setenv("LRSERVE_CACHE", str(tmp_path / "cache"))

    def make(architecture: str, engine: str, layers: int = 4, **entries: Any) -> tuple[Job, list[str]]:
        model, lines = dense_model(architecture, layers=layers), list[str]()
        model.config.update(entries)
        folder = write_dense(AutoModelForCausalLM.from_config(model.config), tmp_path / "model")
        write_text(tmp_path / "text.jsonl", 100)
        overrides = {
            "model": str(folder),
            "text.calibration": str(tmp_path / "text.jsonl"),
            "engine.runtime": engine,
            "export": [engine],
            "calibration": {"sequences": 2, "length": 32},
            "search": {"validation_tokens": 64, "probe_tokens": 64, "validation_pool": 64, "validation_length": 32},
            "report": {"tokens": 64, "length": 32, "prompts": 1, "prompt_tokens": 8},
        }
        return open_job(Recipe.load(None, overrides), lines.append), lines

    return make


def check(job: Job) -> None:
    require_engines(job, load_exporters(job.recipe.export, job.recipe.engine))


@pytest.mark.parametrize(
    ("engine", "search", "weights", "message"),
    [
        (
            {"tensor_parallel_size": 2},
            {},
            None,
            r"search\.width_step 16: 2 GPUs .* in steps of 64 neurons; set search\.width_step: 64",
        ),
        ({"tensor_parallel_size": 3}, {"width_step": 64}, [], r"width_step 64: 3 GPUs .* in steps of 3 neurons; set .*: 66"),
        ({"tensor_parallel_size": 2}, {"width_step": 64}, None, None),
        ({"tensor_parallel_size": 2}, {}, ["int8"], None),
        ({}, {"rank_step": 7}, None, None),
        ({"tensor_parallel_size": 3, "runtime": "onnx"}, {}, None, None),  # which uses one GPU
    ],
)
def test_neurons_must_divide_among_gpus(
    opened: Open, engine: dict[str, Any], search: dict[str, int], weights: list[str] | None, message: str | None
) -> None:
    job, _ = opened("LlamaForCausalLM", engine.get("runtime", "vllm"))
    recipe = job.recipe
    recipe = recipe.model_copy(
        update={
            "engine": recipe.engine.model_copy(update=engine),
            "search": recipe.search.model_copy(update=search),
            "factorization": Factorization(weights=weights),
        }
    )
    with nullcontext() if message is None else pytest.raises(InputError, match=message):
        require_divisible(replace(job, recipe=recipe))


def test_neurons_of_experts_must_divide_among_gpus_in_every_structure(opened: Open) -> None:
    for architecture, error in (
        ("Qwen3MoeForCausalLM", pytest.raises(InputError, match="3 GPUs")),
        ("LlamaForCausalLM", nullcontext()),
    ):
        job, _ = opened(architecture, "vllm")
        factorization = job.recipe.factorization.model_copy(update={"structure": "low_rank"})
        engine = job.recipe.engine.model_copy(update={"tensor_parallel_size": 3})
        with error:
            require_divisible(replace(job, recipe=job.recipe.model_copy(update={"factorization": factorization, "engine": engine})))


@pytest.mark.parametrize("architecture", RENDERED)
def test_onnx_runtime_can_run_every_family(
    architecture: str, opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, lines = opened(architecture, "onnx")
    before = sorted(path.name for path in (tmp_path / "model").iterdir())
    check(job)
    assert "onnxruntime" in lines[-1]
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == before
    monkeypatch.setattr(OnnxEngine, "start", lambda self: pytest.fail("started again"))
    check(job)  # the cache knows
    other = replace(job, source=replace(job.source, path=tmp_path / "other"))
    (tmp_path / "other").mkdir()
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 3e-5}))
    with pytest.raises(pytest.fail.Exception, match="started again"):
        check(other)


def test_an_engine_that_computes_something_else_is_refused(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    job, _ = opened("LlamaForCausalLM", "onnx")
    right = OnnxEngine.transcribe

    def wrong(self: OnnxEngine, prompts: Any, new_tokens: int) -> Any:
        return right(self, [[*prompt[:5], (prompt[5] + 1) % 256, *prompt[6:]] for prompt in prompts], new_tokens)

    monkeypatch.setattr(OnnxEngine, "transcribe", wrong)
    with pytest.raises(UnsupportedModelError, match="onnxruntime .* computes something else than transformers"):
        check(job)


def test_an_engine_that_does_not_start_is_refused_in_one_line(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    job, _ = opened("LlamaForCausalLM", "onnx")
    monkeypatch.setattr("lrserve.engines.onnx.WORKER_COMMAND", ("false",))
    with pytest.raises(UnsupportedModelError, match="onnxruntime .* cannot run this model on this machine: .* ended") as caught:
        check(job)
    assert "\n" not in str(caught.value)


def test_a_cache_that_cannot_be_written_is_named(opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job, _ = opened("LlamaForCausalLM", "onnx")
    (tmp_path / "file").touch()
    monkeypatch.setenv("LRSERVE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ArtifactError, match="LRSERVE_CACHE"):
        check(job)


@pytest.mark.engine
@pytest.mark.usefixtures("forked_engines")
@pytest.mark.parametrize(
    ("architecture", "entries", "message"),
    [
        ("LlamaForCausalLM", {"head_dim": 100}, "cannot run this model on this machine: .*head_dim"),
        ("Qwen3ForCausalLM", {"attention_bias": True}, "computes something else than transformers"),
    ],
)
def test_what_vllm_does_not_build_is_refused(architecture: str, entries: dict[str, Any], message: str, opened: Open) -> None:
    job, _ = opened(architecture, "vllm", **entries)
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        check(job)
    assert "\n" not in str(caught.value)
