"""Real vLLM engines on tiny random artifacts of the families that `make test` does not serve, held against transformers in float32.

What ONNX Runtime computes of them is in tests/exporters.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import (
    FAMILIES_TESTED,
    MULTIMODAL,
    SERVED_IN_TESTS,
    VOCABULARY,
    WITH_EXPERTS,
    Rounding,
    dense_model,
    factorized_model,
    rounded_model,
    write_artifact,
    write_dense,
    write_text,
)
from vllm_engine import Serving
from with_torchvision import python_path

import lrserve  # noqa: F401 - registers the quantizer
from lrserve.allocation.plan import Plan
from lrserve.engines.transcripts import Transcript, transcribe_checkpoint
from lrserve.engines.vllm import Engine
from lrserve.errors import AgreementError
from lrserve.pipeline.agreement import agree
from lrserve.pipeline.inspect import verify
from lrserve.pipeline.run import compress_and_export
from lrserve.recipe import Recipe

pytestmark = pytest.mark.soak

TOLERANCE = 1e-3
NEW_TOKENS = 12
_RANDOM = random.Random(0)
PROMPTS = [[_RANDOM.randrange(VOCABULARY) for _ in range(length)] for length in (40, 1, 17)]
ROUNDINGS = (
    Rounding("int8"),
    Rounding("int8", "narrow", 8),
    Rounding("int4_g32", None, 8),
    Rounding("int8", "low_rank"),
    Rounding("int4_g32", "narrow", 8),
)
SERVED_HERE = [name for name in FAMILIES_TESTED if name not in SERVED_IN_TESTS]

EngineFor = Callable[[Path, int], AbstractContextManager[Engine]]
JOB: dict[str, Any] = {
    "target.ratio": 0.4,
    "calibration": {"sequences": 8, "length": 32},
    "factorization": {"fisher_tokens": 128, "refine_steps": 2, "refine_tokens": 128},
    "search": {
        "trials": 6,
        "rank_step": 8,
        "probe_tokens": 64,
        "validation_tokens": 256,
        "validation_pool": 512,
        "validation_length": 32,
        "measured_plans": 1,
    },
    "workloads": {"decode": {"prompt_tokens": 4, "output_tokens": 8, "concurrency": 2}},
    "engine": {"repeats": 1, "enforce_eager": True, "dtype": "float32"},  # a random router has near ties, which 16 bits decide
    "report": {"tokens": 64, "length": 32, "prompts": 2, "prompt_tokens": 8},
    "export": ["vllm"],
}


@pytest.fixture
def engine_for(request: pytest.FixtureRequest, serving: Serving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EngineFor:
    """Serve a folder on so many ranks; of multimodal models by a worker that finds torchvision, which vLLM needs for them."""
    if request.node.callspec.params["architecture"] not in MULTIMODAL:
        return lambda folder, ranks: serving(folder, tensor_parallel_size=ranks)
    monkeypatch.setenv("PYTHONPATH", python_path(tmp_path / "torchvision"))
    return lambda folder, ranks: Engine(
        folder, dtype="float32", max_model_len=64, max_num_seqs=4, threads=1, kv_cache_gib=0.05, tensor_parallel_size=ranks
    )


def check(row: Callable[..., None], kind: str, model: Any, place: Path, engine_for: EngineFor, ranks: int = 1) -> None:
    """Write an artifact, serve it, and record a row: its cases are the prompts, and all of them fail together."""
    started = time.perf_counter()
    folder = write_artifact(model, place / "model")
    reference = transcribe_checkpoint(folder, torch.float32, PROMPTS, NEW_TOKENS)
    with engine_for(folder, ranks) as engine:
        found: Sequence[Transcript] = engine.transcribe(PROMPTS, NEW_TOKENS)
    failed, note = 0, ""
    try:
        agreed = agree("vLLM", reference, found, TOLERANCE)
        note = f"largest difference {agreed['max_logprob_difference']:.1g} nats"
    except AgreementError as error:
        failed, note = len(PROMPTS), str(error)
    row(kind, len(PROMPTS), failed, time.perf_counter() - started, note)


@pytest.mark.parametrize("architecture", SERVED_HERE)
def test_vllm_computes_what_transformers_does(
    architecture: str, tmp_path: Path, engine_for: EngineFor, soak_row: Callable[..., None]
) -> None:
    # five layers: every kind of group in every structure, linears apart from their group, and some that are dense
    model = factorized_model(architecture, layers=5, apart=True)
    check(soak_row, f"{architecture} in vLLM", model, tmp_path, engine_for)


@pytest.mark.parametrize("architecture", ["Phi3ForCausalLM", "Starcoder2ForCausalLM", "Gemma3ForConditionalGeneration"])
def test_rounded(architecture: str, tmp_path: Path, engine_for: EngineFor, soak_row: Callable[..., None]) -> None:
    model = rounded_model(architecture, *ROUNDINGS, layers=len(ROUNDINGS))
    check(soak_row, f"{architecture} in vLLM, rounded", model, tmp_path, engine_for)


@pytest.mark.parametrize("architecture", ["Gemma3ForCausalLM", "Phi3ForCausalLM", "Starcoder2ForCausalLM", "MixtralForCausalLM"])
def test_two_ranks(architecture: str, tmp_path: Path, engine_for: EngineFor, soak_row: Callable[..., None]) -> None:
    model = factorized_model(architecture, layers=5, apart=True)
    check(soak_row, f"{architecture} in vLLM, 2 ranks", model, tmp_path, engine_for, ranks=2)


@pytest.mark.parametrize("architecture", WITH_EXPERTS)
def test_the_whole_job_on_a_mixture_of_experts(architecture: str, tmp_path: Path, soak_row: Callable[..., None]) -> None:
    started = time.perf_counter()
    write_dense(dense_model(architecture), tmp_path / "model")
    write_text(tmp_path / "text.jsonl", 200)
    settings = {"model": str(tmp_path / "model"), "text.calibration": str(tmp_path / "text.jsonl"), **JOB}
    compress_and_export(Recipe.load(None, settings), tmp_path / "out", work=tmp_path / "work", say=lambda line: None)
    assert "match the manifest" in verify(tmp_path / "out")
    plan = Plan.read(tmp_path / "out/lrserve/plan.json")
    mixtures = [level for name, level in plan.levels.items() if name.endswith(".experts")]
    assert any(level.rank for level in mixtures), "attention alone has not so many parameters"
    soak_row(f"{architecture}, the whole job", 1, 0, time.perf_counter() - started, ", ".join(map(str, mixtures)))
