"""The int8 row of README's table is the dense model, rounded; every row is measured alike."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import dense_model, write_dense

from lrserve.compression.groups import find_groups
from lrserve.engines.transcripts import Transcript
from lrserve.inputs.source import Source
from lrserve.recipe import PROFILES, Recipe
from readme import label_of, perplexity, render, weight_bytes, write_int8


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM"])
@pytest.mark.parametrize("shard", ["1GB", "40KB"])
def test_int8_weights_are_the_nearest(architecture: str, shard: str, tmp_path: Path) -> None:
    model = dense_model(architecture)
    with torch.no_grad():
        model.get_submodule("model.layers.0.self_attn.q_proj").weight[3] = 0.0
    model.save_pretrained(tmp_path / "dense", max_shard_size=shard)
    write_dense(model, tmp_path / "tokenizer")
    linears = {member for group in find_groups(model) for member in group.members}
    (tmp_path / "int8").mkdir()
    folder = write_int8(Source("dense", tmp_path / "dense"), linears, tmp_path / "int8")
    tensors = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (shard == "40KB")
    dense = {name: tensor for path in (tmp_path / "dense").glob("*.safetensors") for name, tensor in load_file(path).items()}
    for name, tensor in dense.items():
        if name.removesuffix(".weight") in linears:
            scale = tensors.pop(f"{name}_scale")
            assert tensors[name].dtype == torch.int8
            assert scale.shape == (tensor.shape[0], 1)
            assert ((tensors.pop(name) * scale - tensor).abs() <= scale * 0.5001).all()
        else:
            assert torch.equal(tensors.pop(name), tensor)
    assert not tensors
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert weight_bytes(folder, torch.float32) < weight_bytes(tmp_path / "dense", torch.float32)
    assert weight_bytes(tmp_path / "dense", torch.bfloat16) * 2 == weight_bytes(tmp_path / "dense", torch.float32)


def test_a_model_without_the_weights_is_refused(tmp_path: Path) -> None:
    write_dense(dense_model("LlamaForCausalLM"), tmp_path / "dense")
    (tmp_path / "int8").mkdir()
    with pytest.raises(ValueError, match=r"lacks 1 weights, first model\.layers\.9"):
        write_int8(Source("dense", tmp_path / "dense"), {"model.layers.9.mlp.down_proj"}, tmp_path / "int8")


def test_perplexity_is_of_all_tokens_that_have_a_context() -> None:
    class Uniform:
        def transcribe(self, prompts: Any, new_tokens: int) -> list[Transcript]:
            return [Transcript(logprobs=(math.log(0.5),) * (len(prompt) - 1), tokens=(0,), margins=(0.0,)) for prompt in prompts]

    engine: Any = Uniform()
    windows = torch.zeros(3, 5, dtype=torch.long)
    done: list[None] = []
    assert perplexity(engine, windows, lambda: done.append(None)) == pytest.approx(2.0)
    assert len(done) == 3


@pytest.mark.parametrize(
    ("target", "label"),
    [({"min_speedup": 1.25}, "lrserve at 1.25x"), ({"ratio": 0.3}, "lrserve, ratio 0.3"), ({}, "lrserve, front")],
)
def test_rows_are_named_by_their_target(target: dict[str, float], label: str, tmp_path: Path) -> None:
    (tmp_path / "lrserve").mkdir()
    (tmp_path / "lrserve" / "recipe.yaml").write_text(Recipe.model_validate({"model": "m", "target": target}).to_yaml())
    assert label_of(tmp_path) == label


def test_the_table_fits_into_readme() -> None:
    speed = {"speedup": 1.234, "speedup_lowest": 0.987, "speedup_highest": 1.501}
    rows = [
        {"model": "dense, bfloat16", "perplexity": 20.911, "bytes": 2.69e8},
        {
            "model": "lrserve at 1.25x",
            "perplexity": 1234.5,
            "bytes": 2.69e9,
            "speed": {**speed, "workloads": dict.fromkeys(PROFILES, speed)},
        },
    ]
    lines = render(rows, PROFILES).splitlines()
    assert max(map(len, lines)) <= 120
    assert lines[2].split("|")[4].strip() == "1"
    assert lines[3].count("1.23 (0.99-1.50)") == 4
