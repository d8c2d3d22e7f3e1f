"""Real vLLM engines on tiny random artifacts, held against transformers in float32.

One engine is started as lrserve does it, which takes 10 to 20 seconds; the others have forked workers (conftest.py).
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import SERVED_IN_TESTS, VOCABULARY, factorized_model, write_artifact
from transformers import AutoModelForCausalLM
from vllm_engine import Serving

import lrserve  # noqa: F401 - registers the quantizer
from lrserve.allocation.speed import Shape
from lrserve.engines.transcripts import Transcript, transcribe_model
from lrserve.engines.vllm import Engine
from lrserve.engines.workloads import in_turns
from lrserve.errors import ArtifactError, EngineError, InputError

pytestmark = pytest.mark.engine

TOLERANCE = 1e-3
NEW_TOKENS = 12
_RANDOM = random.Random(0)
PROMPTS = [[_RANDOM.randrange(VOCABULARY) for _ in range(length)] for length in (40, 1, 17)]


def engine_for(folder: Path) -> Engine:
    return Engine(folder, dtype="float32", max_model_len=64, max_num_seqs=4, threads=1, kv_cache_gib=0.05)


def assert_agree(reference: Transcript, other: Transcript) -> None:
    assert other.logprobs == pytest.approx(reference.logprobs, abs=TOLERANCE)
    assert len(other.tokens) == len(other.margins) == NEW_TOKENS
    for expected, token, margin in zip(reference.tokens, other.tokens, reference.margins, strict=True):
        if margin <= TOLERANCE:
            break  # a near tie: what follows may differ
        assert token == expected


@pytest.mark.parametrize("architecture", SERVED_IN_TESTS)
def test_vllm_computes_what_transformers_does(architecture: str, tmp_path: Path, serving: Serving) -> None:
    # five layers: every kind of group in every structure, linears apart from their group, and some that are dense
    folder = write_artifact(factorized_model(architecture, layers=5, apart=True), tmp_path / "model")
    reference = transcribe_model(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), PROMPTS, NEW_TOKENS)
    measured = architecture == "LlamaForCausalLM"
    with engine_for(folder) if measured else serving(folder) as engine:
        for expected, found in zip(reference, engine.transcribe(PROMPTS, NEW_TOKENS), strict=True):
            assert_agree(expected, found)
        if measured:
            check_measurements(engine)


def check_measurements(engine: Engine) -> None:
    runs = in_turns({"a": engine, "b": engine}, lambda e, seed: e.throughput(8, 4, 3, seed=seed), 2, seed=0)
    assert {name: len(results) for name, results in runs.items()} == {"a": 2, "b": 2}
    for result in (*runs["a"], *runs["b"]):
        assert result.output_tokens == 12
        assert result.cpu_seconds > 0
        assert result.output_tokens_per_second == pytest.approx(12 / result.seconds)

    shapes = [
        Shape(512, 768, None),
        Shape(512, 768, 32, "low_rank"),
        Shape(512, 768, 32, "identity_block"),
        Shape(512, 768, 32, "identity_block", True),
    ]
    table = engine.latency_table(shapes, [1, 64], dtype="bfloat16")
    assert len(table) == len(shapes)
    assert all(len(row) == 2 and min(row) > 0 for row in table)

    with pytest.raises(InputError, match="concurrency 5 is more than the engine's max_num_seqs, 4"):
        engine.throughput(8, 4, 5)
    with pytest.raises(InputError, match="64"):
        engine.throughput(60, 5, 1)
    with pytest.raises(EngineError, match="last lines of"):
        engine.latency_table(shapes, [1], dtype="no_such_dtype")
    assert len(engine.transcribe([[5, 6]], 1)) == 1  # still serving after the errors


def test_missing_factor_fails_the_load_by_name(tmp_path: Path, serving: Serving) -> None:
    folder = write_artifact(factorized_model("LlamaForCausalLM"), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.self_attn.qkv_proj.A.order"], tensors["model.layers.0.self_attn.k_proj.B.bias"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    missing = r"model\.layers\.0\.self_attn\.k_proj\.B\.bias, model\.layers\.0\.self_attn\.qkv_proj\.A\.order"
    with pytest.raises(ArtifactError, match=f"missing from the checkpoint: {missing}"), serving(folder):
        pass


def test_engine_that_cannot_start_says_why_and_leaves_no_process(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["NoSuchModel"], "model_type": "llama"}))
    engine = engine_for(tmp_path)
    with pytest.raises(EngineError, match="last lines of"):
        engine.start()
    with pytest.raises(EngineError, match="not running"):
        engine.transcribe([[1, 2]], 1)
