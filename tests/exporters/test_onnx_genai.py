"""The ONNX folder in onnxruntime-genai: greedy tokens of one prompt and of a batch, against transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_onnx_exporter import make, prompts, reference

from exporters.onnx import OnnxExporter
from exporters.onnx_profiles import Profile
from lrserve.engines.transcripts import Transcript

PAD = 0
NEW_TOKENS = 32
LENGTHS = (24, 9)
TIE = 1e-3


def generate(folder: Path, rows: list[list[int]]) -> list[list[int]]:
    """What onnxruntime-genai continues a batch with, padded on the right as its tokenizer pads."""
    import onnxruntime_genai as genai

    width = max(map(len, rows))
    model = genai.Model(str(folder))
    params = genai.GeneratorParams(model)
    params.set_search_options(batch_size=len(rows), max_length=width + NEW_TOKENS, do_sample=False)
    generator = genai.Generator(model, params)
    generator.append_tokens(np.array([row + [PAD] * (width - len(row)) for row in rows], np.int32))
    tokens: list[Any] = []
    while not generator.is_done():
        generator.generate_next_token()
        tokens.append(np.asarray(generator.get_next_tokens()))
    return np.stack(tokens, axis=1).tolist()


def assert_same(tokens: list[int], expected: Transcript) -> None:
    """Greedy tokens are equal up to the first near tie, which comes late."""
    ties = [step for step, margin in enumerate(expected.margins) if margin < TIE]
    decided = ties[0] if ties else NEW_TOKENS
    assert decided > NEW_TOKENS // 2
    assert len(tokens) == NEW_TOKENS
    assert tokens[:decided] == list(expected.tokens[:decided])


@pytest.mark.parametrize("profile", ["genai", "portable"])
@pytest.mark.parametrize("name", ["llama-llama3-rope", "mistral", "qwen2-sliding-tied", "qwen3-sliding", "gemma3"])
def test_greedy_tokens_are_those_of_transformers(name: str, profile: Profile, tmp_path: Path) -> None:
    model = make(name)
    rows = [[token for token in row[:length] if token != PAD] for row, length in zip(prompts(2), LENGTHS, strict=True)]
    expected = [reference(model, row, NEW_TOKENS) for row in rows]
    used = {token for transcript in expected for token in transcript.tokens}
    never = next(token for token in range(3, 128) if token not in used)  # an end token would end a row early
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": never, "pad_token_id": PAD}))
    OnnxExporter(profile).export(model, tmp_path, tmp_path, torch.float32)
    [alone] = generate(tmp_path / "onnx", rows[:1])
    assert_same(alone, expected[0])
    for tokens, transcript in zip(generate(tmp_path / "onnx", rows), expected, strict=True):
        assert_same(tokens, transcript)
