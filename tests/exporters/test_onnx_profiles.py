"""Both profiles of the ONNX graph on batches of unequal lengths, against transformers on every sequence alone."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_onnx_exporter import MODELS, WINDOW, make, prompts

from exporters.onnx import OnnxExporter
from exporters.onnx_profiles import Profile
from lrserve.engines.onnx_session import OnnxDecoder, open_session, transcribe
from lrserve.engines.runtimes import runtime_of
from lrserve.pipeline.run import load_exporters
from lrserve.recipe import EngineSettings

LENGTHS = (3 * WINDOW, 2 * WINDOW + 1, 5)  # of the prompts: longer than a window, and shorter
STEPS = WINDOW + 4  # so that padding leaves the window
TOLERANCE = 1e-3
FAMILIES = (
    "llama",
    "llama-yarn-rope",
    "mistral",
    "qwen2-sliding-tied",
    "qwen3-sliding",
    "gemma3",
    "smollm3-sliding",
    "phi3-partial-rope",
)
PADDED: list[tuple[Profile, str, int]] = [
    ("genai", "right", 0),
    ("portable", "right", 0),
    ("portable", "left", 0),
    ("portable", "left", 1),
]
"""Profile, side of the padding, and the number of the first position: transformers.js begins at 1 for Gemma 3."""


@dataclass
class Batch:
    """A batch as its callers feed it: a prompt padded to one width, then one token at a time."""

    session: Any
    first: int = 0
    past: dict[str, Any] = field(default_factory=dict)
    mask: Any = None

    def __post_init__(self) -> None:
        self.inputs = {value.name: value for value in self.session.get_inputs()}

    def prefill(self, rows: Sequence[Sequence[int]], side: str) -> Any:
        width = max(map(len, rows))
        missing = [width - len(row) for row in rows]
        pad = (lambda few: (few, 0)) if side == "left" else (lambda few: (0, few))
        ids = np.array([np.pad(row, pad(few)) for row, few in zip(rows, missing, strict=True)])
        self.mask = np.array([np.pad(np.ones(len(row), np.int64), pad(few)) for row, few in zip(rows, missing, strict=True)])
        for name, value in self.inputs.items():
            if name.startswith("past_key_values."):
                self.past[name] = np.zeros((len(rows), value.shape[1], 0, value.shape[3]), np.float32)
        logits = self._run(ids)
        return [row[few:] if side == "left" else row[: width - few] for row, few in zip(logits, missing, strict=True)]

    def step(self, tokens: Sequence[int]) -> Any:
        self.mask = np.concatenate([self.mask, np.ones((len(tokens), 1), np.int64)], axis=1)
        return self._run(np.array(tokens)[:, None])[:, 0]

    def _run(self, ids: Any) -> Any:
        feed = {"input_ids": ids.astype(np.int64), "attention_mask": self.mask, **self.past}
        if "position_ids" in self.inputs:
            positions = np.maximum(self.mask.cumsum(axis=1) - 1, 0) + self.first
            feed["position_ids"] = positions[:, -ids.shape[1] :]
        logits, *present = self.session.run(None, feed)
        self.past = dict(zip(self.past, present, strict=True))
        return logits


def exported(model: Any, profile: Profile, folder: Path) -> Path:
    OnnxExporter(profile).export(model, folder / "no-source", folder, torch.float32)
    return folder / "onnx" / "model.onnx"


@torch.no_grad()
def alone(model: Any, ids: Sequence[int]) -> Any:
    """Logits of one sequence, computed without a cache."""
    return model(torch.tensor([list(ids)])).logits[0].numpy()


@pytest.mark.parametrize(("profile", "side", "first"), PADDED)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_sequence_of_a_padded_batch_is_computed_as_if_alone(
    name: str, profile: Profile, side: str, first: int, tmp_path: Path
) -> None:
    model = make(name)
    rows = [row[:length] for row, length in zip(prompts(len(LENGTHS)), LENGTHS, strict=True)]
    following = prompts(len(LENGTHS), len(LENGTHS) * STEPS)
    expected = [alone(model, row + more[:STEPS]) for row, more in zip(rows, following, strict=True)]
    batch = Batch(open_session(exported(model, profile, tmp_path), threads=1), first)
    for found, wanted, length in zip(batch.prefill(rows, side), expected, LENGTHS, strict=True):
        np.testing.assert_allclose(found, wanted[:length], rtol=0, atol=TOLERANCE)
    for step in range(STEPS):
        logits = batch.step([more[step] for more in following])
        for found, wanted, length in zip(logits, expected, LENGTHS, strict=True):
            np.testing.assert_allclose(found, wanted[length + step], rtol=0, atol=TOLERANCE)


def test_a_graph_by_lengths_refuses_padding_on_the_left(tmp_path: Path) -> None:
    batch = Batch(open_session(exported(make("llama"), "genai", tmp_path), threads=1))
    rows = [row[:length] for row, length in zip(prompts(2), LENGTHS[:2], strict=True)]
    advice = "left padding: pad on the right, or export the portable profile"
    with pytest.raises(Exception, match=advice):
        batch.prefill(rows, "left")
    batch.prefill(rows, "right")
    batch.mask[1, 0] = 0
    with pytest.raises(Exception, match=advice):
        batch.step([5, 6])


@pytest.mark.parametrize("name", ["llama-tied", "gemma3"])
def test_lrserves_own_session_runs_both_profiles_alike(name: str, tmp_path: Path) -> None:
    model = make(name)
    profiles: tuple[Profile, ...] = ("genai", "portable")
    for profile in profiles:
        (tmp_path / profile).mkdir()
    folders = [exported(model, profile, tmp_path / profile).parent for profile in profiles]
    [by_lengths], [by_ids] = (
        transcribe(functools.cache(lambda name, folder=folder: OnnxDecoder(folder / name, threads=1)), prompts(1), 10)
        for folder in folders
    )
    np.testing.assert_allclose(by_ids.logprobs, by_lengths.logprobs, rtol=0, atol=TOLERANCE)
    assert by_ids.tokens == by_lengths.tokens


@pytest.mark.parametrize("profile", ["genai", "portable"])
def test_dimensions_have_the_names_that_loaders_know(profile: Profile, tmp_path: Path) -> None:
    import onnx

    graph = onnx.load(exported(make("llama"), profile, tmp_path), load_external_data=False).graph
    shapes = {
        value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    assert shapes["input_ids"] == ["batch_size", "sequence_length"]
    assert shapes["attention_mask"] == ["batch_size", "total_sequence_length"]
    assert shapes["past_key_values.0.key"] == ["batch_size", 2, "past_sequence_length", 16]
    assert shapes["present.0.key"] == ["batch_size", 2, "total_sequence_length", 16]
    assert shapes["logits"] == ["batch_size", "sequence_length", 128]
    assert shapes.get("position_ids") == (["batch_size", "sequence_length"] if profile == "portable" else None)
    inputs = json.loads((tmp_path / "onnx" / "genai_config.json").read_text())["model"]["decoder"]["inputs"]
    assert inputs.get("position_ids") == ("position_ids" if profile == "portable" else None)


def test_the_profile_of_the_recipe_is_exported_and_measured(tmp_path: Path) -> None:
    settings = EngineSettings(runtime="onnx", onnx_profile="portable")
    [exporter] = load_exporters(["onnx"], settings)
    runtime = runtime_of(settings)
    for number, own in enumerate((exporter, runtime.exporter)):
        out = tmp_path / str(number)
        out.mkdir()
        own.export(make("llama"), out / "no-source", out, torch.float32)
        assert "position_ids" in [value.name for value in open_session(out / "onnx" / "model.onnx").get_inputs()]
    # What was measured of the other graph is not reused.
    assert runtime.version != runtime_of(EngineSettings(runtime="onnx")).version


def test_families_are_known() -> None:
    assert set(FAMILIES) <= set(MODELS)
