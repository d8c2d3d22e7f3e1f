"""Checkpoints that are written in several files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import dense_model, factorized_model, write_artifact

from exporters import vllm
from lrserve.inputs.checkpoint import INDEX, check_checkpoint
from lrserve.inputs.source import Source


@pytest.mark.parametrize("kind", ["dense", "compressed"])
def test_shards_hold_what_one_file_does(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = dense_model("Qwen2ForCausalLM") if kind == "dense" else factorized_model("LlamaForCausalLM", layers=3)
    whole = load_file(write_artifact(model, tmp_path / "whole") / "model.safetensors")
    monkeypatch.setattr(vllm, "_MAX_SHARD_SIZE", "60KB")
    folder = write_artifact(model, tmp_path / "shards")
    placed = json.loads((folder / INDEX).read_text())["weight_map"]
    found = {file: load_file(folder / file) for file in set(placed.values())}
    assert len(found) > 2
    assert sorted(placed) == sorted(whole)
    for name, tensor in whole.items():
        assert torch.equal(found[placed[name]][name], tensor)
    assert sum(map(len, found.values())) == len(whole)
    source = Source(name="shards", path=folder)
    if kind == "dense":
        check_checkpoint(folder, source.skeleton(), None)
    tokens = torch.arange(3, 20)[None]
    with torch.inference_mode():
        assert torch.equal(source.load(torch.float32)(tokens).logits, model(tokens).logits)
