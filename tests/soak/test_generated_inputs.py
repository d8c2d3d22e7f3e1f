"""2,000 generated configs, indexes, tokenizer configs, recipes and manifests: each is accepted, or refused in one line.

Each goes to the cheapest command that reads it. Engines are not tried (tests/pipeline/test_supported.py does that).
"""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from faults.generated import PLAIN, as_json, as_yaml, files
from faults.refusing import answer
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import dense_model, factorized_model, write_artifact, write_dense, write_text

from lrserve.pipeline import run
from lrserve.recipe import Recipe
from lrserve.storage.store import write_manifest

pytestmark = pytest.mark.soak

CASES = 250  # for each of the eight kinds of files
ONNX = ("--target", "onnx", "--export", "onnx", "--dry-run")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("generated")
    model = dense_model("LlamaForCausalLM", layers=1)
    write_dense(model, place / "model")
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(model.state_dict(), "model.safetensors")}
    (place / "model" / "model.safetensors.index.json").write_bytes(as_json(index))
    write_text(place / "text.jsonl", 200)
    settings: dict[str, Any] = {
        "model": str(place / "model"),
        "text": {"calibration": str(place / "text.jsonl")},
        "calibration": {"sequences": 2, "length": 32},
        "search": {"probe_tokens": 64, "validation_tokens": 64, "validation_pool": 64, "validation_length": 32},
        "workloads": {"chat": {"prompt_tokens": 4, "output_tokens": 4, "concurrency": 1}},
        "engine": {"runtime": "onnx"},
        "report": {"tokens": 64, "length": 32, "prompts": 1, "prompt_tokens": 8},
        "export": ["onnx"],
    }
    made = Recipe.model_validate(settings).model_dump(mode="json")
    (place / "recipe.yaml").write_bytes(as_yaml(made))
    artifact = write_artifact(factorized_model("LlamaForCausalLM"), place / "artifact")
    write_manifest(artifact, {"lrserve": "0"}, {})
    return place


def commands(place: Path, file: str) -> list[tuple[str | Path, ...]]:
    """Return the commands that read a file of `place`."""
    if file.startswith("artifact"):
        return [("verify", place / "artifact"), ("inspect", place / "artifact")]
    if file == "recipe.yaml":
        return [("compress-and-export", "--recipe", place / file, "-o", place / "out", "--dry-run")]
    dry_run = ("compress-and-export", place / "model", "--calibration", place / "text.jsonl", "-o", place / "out", *ONNX)
    return [("inspect", place / "model"), dry_run]


@pytest.mark.parametrize(
    "file",
    [
        "model/config.json",
        "model/generation_config.json",
        "model/model.safetensors.index.json",
        "model/tokenizer_config.json",
        "model/tokenizer.json",
        "recipe.yaml",
        "artifact/manifest.json",
        "artifact/config.json",
    ],
)
def test_every_generated_file_is_accepted_or_refused_in_one_line(
    file: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, soak_row: Callable[..., None]
) -> None:
    monkeypatch.setattr(run, "require_engines", lambda *_: None)
    monkeypatch.setenv("LRSERVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    here = Path(shutil.copytree(place, tmp_path / "in"))
    if file == "recipe.yaml":  # names its model and text by their paths
        (here / file).write_text((here / file).read_text().replace(str(place), str(here)))
    how: dict[str, Any] = {"write": as_yaml, "load": yaml.safe_load} if file.endswith(".yaml") else {}
    answers: Counter[str] = Counter()

    @settings(max_examples=CASES, **PLAIN)
    @given(content=files(here / file, **how), command=st.sampled_from(commands(here, file)))
    def every(content: bytes, command: tuple[str | Path, ...]) -> None:
        (here / file).write_bytes(content)
        if file == "artifact/config.json":  # so that it is read, and not only found to be another file
            write_manifest(here / "artifact", {"lrserve": "0"}, {})
        answers["accepted" if answer(*command) is None else "refused"] += 1

    assert [answer(*command) for command in commands(here, file)] == [None] * len(commands(here, file))
    began = time.monotonic()
    every()
    soak_row(f"generated {file}", sum(answers.values()), 0, time.monotonic() - began, f"{answers['refused']} refused")
    assert answers["refused"] > 0
    assert sum(answers.values()) >= CASES / 2  # hypothesis leaves out what it has drawn before
