"""Checkpoints of stock vLLM are the dense model, rounded to nearest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import dense_model, write_dense

from lrserve.compression.groups import find_groups
from lrserve.compression.packing import unpack_int4
from lrserve.inputs.source import Source
from readme import weight_bytes
from stock import write_stock


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM"])
@pytest.mark.parametrize("shard", ["1GB", "40KB"])
def test_int8_weights_are_the_nearest(architecture: str, shard: str, tmp_path: Path) -> None:
    model = dense_model(architecture)
    with torch.no_grad():
        model.get_submodule("model.layers.0.self_attn.q_proj").weight[3] = 0.0
    model.save_pretrained(tmp_path / "dense", max_shard_size=shard)
    write_dense(model, tmp_path / "tokenizer")
    linears = {member for group in find_groups(model) for member in group.members}
    folder = write_stock(Source("dense", tmp_path / "dense"), linears, "int8", tmp_path / "int8", torch.float32)
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
    with pytest.raises(ValueError, match=r"lacks 1 weights, first model\.layers\.9"):
        write_stock(Source("dense", tmp_path / "dense"), {"model.layers.9.mlp.down_proj"}, "int8", tmp_path / "int8", torch.float32)


def test_int4_weights_are_packed_with_their_scales(tmp_path: Path) -> None:
    model = dense_model("LlamaForCausalLM")
    write_dense(model, tmp_path / "dense")
    linears = {member for group in find_groups(model) for member in group.members}
    folder = write_stock(Source("dense", tmp_path / "dense"), linears, "int4_g32", tmp_path / "int4", torch.float32)
    tensors = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    for linear in linears:
        weight = model.get_submodule(linear).weight.detach()
        scales = tensors[f"{linear}.weight_scale"]
        values = unpack_int4(tensors[f"{linear}.weight_packed"]).view(*scales.shape, -1)
        error = (values * scales[:, :, None]).flatten(1) - weight
        assert tensors[f"{linear}.weight_shape"].tolist() == list(weight.shape)
        assert (error.abs() <= scales.repeat_interleave(32, 1) * 0.5001).all()
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["config_groups"]["group_0"]["weights"] == {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "dynamic": False,
        "strategy": "group",
        "group_size": 32,
    }
