"""The whole job on a tiny model that reads images too, with the real vLLM."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from integration.test_pipeline import SMALL
from safetensors.torch import load_file
from tiny import dense_model, with_image, write_dense, write_text
from with_torchvision import python_path

from lrserve.inputs.source import Source
from lrserve.pipeline.inspect import verify
from lrserve.recipe import Recipe

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1800)]

ARCHITECTURE = "Gemma3ForConditionalGeneration"


def recipe(place: Path, **overrides: Any) -> Recipe:
    """As the whole job's, with nothing improved, on a model in `place`."""
    folder = write_dense(dense_model(ARCHITECTURE), place / "model")
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "Gemma3ImageProcessor"}))
    write_text(place / "text.jsonl", 200)
    settings = {**SMALL, "factorization": {"structure": "narrow", "weights": [], "fisher_tokens": 128, "refine": "none"}}
    inputs = {"model": str(folder), "target": {"ratio": 0.2}, "text": {"calibration": str(place / "text.jsonl")}}
    return Recipe.model_validate({**inputs, **settings, **overrides})


def test_the_llm_is_compressed_and_images_are_still_read(tmp_path: Path) -> None:
    out, chosen = tmp_path / "out", tmp_path / "recipe.yaml"
    chosen.write_text(recipe(tmp_path, export=["vllm"]).to_yaml())
    command = [sys.executable, "-c", "from lrserve.cli import main; main()", "compress-and-export", "--recipe", str(chosen)]
    environment = {**os.environ, "PYTHONPATH": python_path(tmp_path / "torchvision")}
    done = subprocess.run([*command, "-o", str(out)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = json.loads((out / "lrserve" / "metrics.json").read_text())
    assert "match the manifest" in verify(out)
    assert set(metrics["agreement"]) == {"transformers", "vllm"}
    assert metrics["sizes"]["linear_parameters"]["ratio"] >= 0.2
    assert "pipeline_tag: image-text-to-text" in (out / "README.md").read_text()
    assert (out / "preprocessor_config.json").read_bytes() == (tmp_path / "model" / "preprocessor_config.json").read_bytes()
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "model", out))
    others = {name for name in before if not name.startswith("language_model.")}
    assert others == {name for name in after if not name.startswith("language_model.")}
    assert all(torch.equal(before[name].bfloat16(), after[name]) for name in others)
    loaded = Source(name="artifact", path=out).load(torch.float32)
    with torch.inference_mode():
        first, second = (loaded(**with_image(ARCHITECTURE, seed)).logits for seed in (0, 1))
    assert torch.isfinite(first).all()
    assert (first - second)[:, -1].abs().max() > 1e-2
