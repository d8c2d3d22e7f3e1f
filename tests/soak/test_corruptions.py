"""Every file of an artifact flipped, cut, deleted, swapped with another, added to: `lrserve verify` refuses all of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from faults.artifacts import LONGEST, corrupt
from integration.test_pipeline import SMALL
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
            **SMALL,
            "factorization": {"fisher_tokens": 128, "propagate": False, "refine": "none"},
            "search": {**SMALL["search"], "trials": 3},
            "engine": {**SMALL["engine"], "runtime": "onnx", "dtype": "float32", "repeats": 1},
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
