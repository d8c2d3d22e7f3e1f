"""Mixtures of fewer and narrower experts on a real vLLM engine, held against transformers in float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from integration.test_vllm import NEW_TOKENS, PROMPTS, assert_agree, engine_for
from tiny import EXPERTS_KEPT, factorized_model, write_artifact
from transformers import AutoModelForCausalLM

import lrserve  # noqa: F401 - registers the quantizer
from lrserve.allocation.speed import Shape
from lrserve.engines.transcripts import transcribe_model

pytestmark = pytest.mark.engine


def test_vllm_computes_what_transformers_does_and_times_the_experts(tmp_path: Path) -> None:
    folder = write_artifact(factorized_model("MixtralForCausalLM", layers=len(EXPERTS_KEPT)), tmp_path / "model")
    reference = transcribe_model(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), PROMPTS, NEW_TOKENS)
    shapes = [Shape(256, width, None, "experts", experts=count, active=2) for count, width in ((8, 512), (2, 512), (8, 64))]
    with engine_for(folder) as engine:
        for expected, found in zip(reference, engine.transcribe(PROMPTS, NEW_TOKENS), strict=True):
            assert_agree(expected, found)
        table = engine.latency_table(shapes, [1, 64], dtype="float32")
        again = engine.transcribe(PROMPTS[:1], NEW_TOKENS)  # the layers that were timed are no part of the engine
    assert_agree(reference[0], again[0])
    rows = [row for row in table if row is not None]
    assert len(rows) == 3
    assert all(row[0] > 0 for row in rows)
    assert rows[0][1] > rows[1][1], "of as many rows, more experts read more weights"
    assert rows[0][1] > 2 * rows[2][1]
