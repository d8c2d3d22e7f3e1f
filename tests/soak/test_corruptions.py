"""Every file of an artifact flipped, cut, deleted, swapped with another, added to: `lrserve verify` refuses all of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from faults.artifacts import LONGEST, corrupt
from tiny import dense_model, write_dense, write_text

from lrserve.pipeline.inspect import verify
from lrserve.pipeline.run import compress_and_export
from lrserve.recipe import Recipe

pytestmark = pytest.mark.soak

CORRUPTIONS = 500
SEED = 28


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pipeline makes of a tiny model: a checkpoint and a graph, proved by their engines."""
    place = tmp_path_factory.mktemp("corruptions")
    recipe = Recipe.model_validate(
        {
            "model": str(write_dense(dense_model("LlamaForCausalLM"), place / "model")),
            "target": {"ratio": 0.2},
            "text": {"calibration": str(write_text(place / "text.jsonl", 200))},
            "calibration": {"sequences": 8, "length": 32, "pool_sequences": 4, "batch_tokens": 64},
            "factorization": {"fisher_tokens": 128, "propagate": False, "refine": "none"},
            "search": {
                "trials": 3,
                "rank_step": 8,
                "depth_groups": 2,
                "probe_tokens": 64,
                "validation_tokens": 256,
                "validation_pool": 512,
                "validation_length": 32,
                "measured_plans": 1,
            },
            "workloads": {"chat": {"prompt_tokens": 8, "output_tokens": 8, "concurrency": 1}},
            "engine": {"runtime": "onnx", "dtype": "float32", "enforce_eager": True, "repeats": 1},
            "report": {"tokens": 128, "length": 32, "prompts": 2, "prompt_tokens": 12, "new_tokens": 8},
        }
    )
    compress_and_export(recipe, place / "out")
    assert "match the manifest" in verify(place / "out")
    return place / "out"


def test_verify_refuses_every_corruption(artifact: Path, tmp_path: Path, soak_row: Callable[..., None]) -> None:
    began = time.monotonic()
    found, wrong = corrupt(artifact, tmp_path, CORRUPTIONS, SEED)
    kinds = ", ".join(f"{count} {kind}" for kind, (count, _) in found.items())
    slowest = max(seconds for _, seconds in found.values())
    note = f"{kinds}; slowest {slowest:.1f} s of {LONGEST:.0f}" + "".join(f"; {line[:200]}" for line in wrong[:3])
    soak_row("damaged artifacts, refused by verify", CORRUPTIONS, len(wrong), time.monotonic() - began, note)
