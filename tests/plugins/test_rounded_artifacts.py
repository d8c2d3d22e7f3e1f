"""Rounded tiny artifacts: exporter, transformers, verify and sizes."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import FAMILIES_TESTED, VOCABULARY, WITH_MLPS, Rounding, dense_model, rounded_model, write_artifact
from transformers import AutoModel, AutoModelForCausalLM

import lrserve  # noqa: F401 - registers the quantizer
from exporters.vllm import VllmExporter, low_rank_groups
from lrserve.compression.level import Precision
from lrserve.errors import ArtifactError
from lrserve.inputs.source import Source
from lrserve.pipeline.inspect import describe, inspect, verify
from lrserve.storage.store import write_manifest

INPUTS = torch.randint(3, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(0))
CASES = [
    *(Rounding(weights, structure) for weights in ("int8", "int4_g32", "fp8") for structure in ("low_rank", "identity_block")),
    *(Rounding(weights, structure, r) for weights in ("int8", "int4_g32", "fp8") for structure in (None, "narrow") for r in (0, 4)),
    Rounding("int4_g64", None, 4),
    Rounding("int4_g64", "narrow", 4, rank=64),
    Rounding("int4_g128", kinds=("o",)),
]


def logits_of(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=INPUTS).logits


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    model = rounded_model("LlamaForCausalLM", Rounding("int8", None, 4), Rounding("int4_g32", "narrow", 4))
    return write_artifact(model, tmp_path / "model")


def cases_of(architecture: str) -> list[Rounding]:
    """What the architecture has the layers for."""
    return [own for own in CASES if architecture in WITH_MLPS or not (own.structure == "narrow" and own.residual)]


@pytest.mark.parametrize(
    ("architecture", "roundings"),
    [
        *(("LlamaForCausalLM", [own]) for own in CASES),
        *((name, cases_of(name)) for name in FAMILIES_TESTED if name != "LlamaForCausalLM"),
    ],
    ids=lambda value: str(value[0]) if len(value) == 1 else "layer by layer" if isinstance(value, list) else value,
)
def test_loaded_model_computes_what_the_written_one_did(architecture: str, roundings: list[Rounding], tmp_path: Path) -> None:
    model = rounded_model(architecture, *roundings, layers=max(2, len(roundings)))
    folder = write_artifact(model, tmp_path / "model")
    loaded = Source(name="model", path=folder).load(torch.float32)
    assert torch.equal(logits_of(loaded), logits_of(model))
    specs = low_rank_groups(loaded)
    assert specs == low_rank_groups(model)
    assert {spec.weights for spec in specs.values()} == {own.weights for own in roundings}
    assert {spec.residual for spec in specs.values()} - {0} == {own.residual for own in roundings} - {0}
    loaded.save_pretrained(tmp_path / "again")
    first, second = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "again"))
    assert {name: tensor.dtype for name, tensor in first.items()} == {name: tensor.dtype for name, tensor in second.items()}
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items() if tensor.dtype != torch.float8_e4m3fn)
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["format_version"] == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rounding", CASES, ids=str)
def test_sizes_are_those_of_the_headers(rounding: Rounding, dtype: torch.dtype, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    model = rounded_model("Qwen2ForCausalLM", rounding, dtype=dtype)
    VllmExporter().export(model, tmp_path, tmp_path / "model", dtype)
    data = (tmp_path / "model" / "model.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    header.pop("__metadata__")
    found = describe(str(tmp_path / "model"))["sizes"]
    assert found["bytes"]["compressed"] == sum(tensor["data_offsets"][1] - tensor["data_offsets"][0] for tensor in header.values())
    scales = ("weight_scale", "weight_shape", ".order")
    weights = {name: tensor["shape"] for name, tensor in header.items() if not name.endswith(scales)}
    counted = sum(torch.Size(shape).numel() * (8 if name.endswith("packed") else 1) for name, shape in weights.items())
    assert found["model_parameters"]["compressed"] == counted


@pytest.mark.parametrize("loader", [AutoModelForCausalLM, AutoModel])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_argument_is_that_of_what_is_not_rounded(artifact: Path, loader: Any, dtype: torch.dtype) -> None:
    model = loader.from_pretrained(artifact, dtype=dtype)
    layers = getattr(model, "model", model).layers
    first, second = layers[0].self_attn, layers[1].self_attn
    assert first.q_proj.weight.dtype == torch.int8
    assert first.q_proj.weight_scale.dtype == first.qkv_proj.residual_A.weight_scale.dtype == torch.float32
    assert second.q_proj.B.weight_packed.dtype == torch.int32
    assert second.q_proj.B.weight_scale.dtype == dtype
    with torch.inference_mode():
        assert model(input_ids=INPUTS)[0].dtype == dtype
    exact = load_file(artifact / "model.safetensors")["model.layers.0.self_attn.q_proj.weight_scale"]
    assert torch.equal(first.q_proj.weight_scale, exact)


def change(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors | ({} if tensor is None else {name: tensor}), folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.k_proj.weight",
        "model.layers.0.self_attn.k_proj.weight_scale",
        "model.layers.0.self_attn.qkv_proj.residual_A.weight_scale",
        "model.layers.0.self_attn.o_proj.residual_B.weight",
        "model.layers.1.mlp.up_proj.weight_packed",
        "model.layers.1.mlp.down_proj.B.weight_shape",
        "model.layers.1.self_attn.qkv_proj.A.weight_scale",
    ],
)
def test_missing_tensor_is_an_error_that_names_it(artifact: Path, name: str) -> None:
    change(artifact, name, None)
    with pytest.raises(ArtifactError, match=f"missing from the checkpoint: {name}"):
        AutoModelForCausalLM.from_pretrained(artifact)
    write_manifest(artifact, {"lrserve": "0"}, {})
    with pytest.raises(ArtifactError, match=rf"missing from the checkpoint: {name}"):
        verify(artifact)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("model.layers.0.self_attn.k_proj.weight", torch.float32),
        ("model.layers.0.self_attn.k_proj.weight_scale", torch.bfloat16),
        ("model.layers.1.mlp.up_proj.weight_scale", torch.int8),
        ("model.layers.1.mlp.down_proj.residual_A.weight", torch.int32),
    ],
)
def test_wrong_dtype_is_an_error_that_names_the_tensor(artifact: Path, name: str, dtype: torch.dtype) -> None:
    change(artifact, name, load_file(artifact / "model.safetensors")[name].to(dtype))
    with pytest.raises(ArtifactError, match=f"{name} is {dtype} in the checkpoint; config.json makes it"):
        AutoModelForCausalLM.from_pretrained(artifact)
    write_manifest(artifact, {"lrserve": "0"}, {})
    with pytest.raises(ArtifactError, match=f"{name} is {dtype} in the checkpoint; config.json makes it"):
        verify(artifact)


def test_verify_and_inspect_know_what_is_rounded(artifact: Path) -> None:
    write_manifest(artifact, {"lrserve": "0"}, {})
    assert "of its 8 compressed groups have the right shapes and dtypes" in verify(artifact)
    kinds = describe(str(artifact))["groups"]
    assert kinds["down"]["weights"] == ["int4_g32", "int8"]
    assert (kinds["qkv"]["residuals"], kinds["down"]["residuals"]) == ([4], [4])
    assert kinds["gate_up"]["structures"] == ["dense", "narrow_out"]
    assert "int4_g32, int8" in inspect(str(artifact))
    tensors = load_file(artifact / "model.safetensors")
    beside = {"model.layers.1.mlp.up_proj.weight": torch.zeros(32, 64)}
    save_file(tensors | beside, artifact / "model.safetensors", metadata={"format": "pt"})
    write_manifest(artifact, {"lrserve": "0"}, {})
    with pytest.raises(ArtifactError, match=r"not in the model that config\.json describes: \S+up_proj\.weight"):
        verify(artifact)


@pytest.mark.parametrize("weights", ["int8", "int4_g32"])
def test_a_group_is_rounded_as_one(weights: Precision, tmp_path: Path) -> None:
    model = rounded_model("LlamaForCausalLM", Rounding(weights, None, 4))
    model.model.layers[0].self_attn.k_proj = dense_model("LlamaForCausalLM").model.layers[0].self_attn.k_proj
    with pytest.raises(ArtifactError, match=rf"q_proj {weights} with a residual of rank 4, self_attn.k_proj dense"):
        write_artifact(model, tmp_path / "model")


def test_factors_are_rounded_alike(tmp_path: Path) -> None:
    model = rounded_model("LlamaForCausalLM", Rounding("int8", "low_rank"))
    other = rounded_model("LlamaForCausalLM", Rounding("int4_g32", "low_rank"))
    model.model.layers[0].mlp.down_proj.B = other.model.layers[0].mlp.down_proj.B
    with pytest.raises(ArtifactError, match="A is in int8, B in int4_g32"):
        write_artifact(model, tmp_path / "model")


def test_rounded_models_are_trainable(artifact: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(artifact, dtype=torch.float32)
    model(input_ids=INPUTS, labels=INPUTS).loss.backward()
    scale = model.model.layers[0].self_attn.q_proj.weight_scale
    assert scale.grad is not None
    assert scale.grad.abs().max() > 0
