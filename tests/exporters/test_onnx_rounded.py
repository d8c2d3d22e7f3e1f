"""Rounded weights and residuals in the ONNX graph, against transformers, on tiny random models of every family."""

from __future__ import annotations

import copy
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import RENDERED, VOCABULARY, Rounding, dense_model, rounded_model

from exporters.onnx import OnnxExporter
from exporters.onnx_linear import rounding_inputs
from lrserve.compression.embedding import dequantize_embedding, round_embedding, rounded_values
from lrserve.compression.level import Precision
from lrserve.engines.onnx_session import OnnxDecoder, transcribe
from lrserve.engines.transcripts import Transcript, transcribe_model

ROUNDINGS = (
    (Rounding("int8"), Rounding("int8", "identity_block")),
    (Rounding("int4_g32", residual=8), Rounding("int8", "low_rank")),
    (Rounding("int4_g32", "narrow", residual=16), Rounding("int4_g64")),
    (Rounding("fp8"), Rounding("int4_g32", kinds=("o", "down"))),
)
TOLERANCE = 1e-3


def export(model: Any, folder: Path) -> Path:
    OnnxExporter().export(model, folder / "no-source", folder, torch.float32)
    return folder / "onnx" / "model.onnx"


def prompts() -> list[list[int]]:
    return torch.randint(3, VOCABULARY, (3, 40), generator=torch.Generator().manual_seed(1)).tolist()


def differences(expected: list[Transcript], found: list[Transcript]) -> list[float]:
    return [
        abs(a - b) for one, other in zip(expected, found, strict=True) for a, b in zip(one.logprobs, other.logprobs, strict=True)
    ]


@pytest.mark.parametrize("roundings", ROUNDINGS, ids=lambda roundings: "+".join(map(str, roundings)))
@pytest.mark.parametrize("architecture", RENDERED)
def test_rounded_weights_are_rendered_as_they_are(architecture: str, roundings: tuple[Rounding, ...], tmp_path: Path) -> None:
    model = rounded_model(architecture, *roundings)
    path = export(model, tmp_path)
    expected = transcribe_model(model, prompts(), 4)
    exact = OnnxDecoder(path, exact=True)
    assert max(differences(expected, transcribe(lambda name: exact, prompts(), 4))) < TOLERANCE

    # As it is served inputs are rounded too, in blocks: what that changes is known in transformers.
    with rounding_inputs(model):
        rounded = transcribe_model(model, prompts(), 0)
    served = transcribe(lambda name: OnnxDecoder(path), prompts(), 0)
    changed = statistics.fmean(differences(expected, rounded))
    assert statistics.fmean(differences(rounded, served)) < 2 * changed
    assert transcribe_model(model, prompts(), 4) == expected, "the hooks are gone"


@pytest.mark.parametrize("precision", ["int8", "int4_g32"])
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM", "Gemma3ForCausalLM"])  # untied, tied, scaled
def test_embedding_and_output_layer_are_rounded(architecture: str, precision: Precision, tmp_path: Path) -> None:
    import onnx

    model = dense_model(architecture)
    dense = transcribe_model(model, prompts(), 0)
    tied = model.config.tie_word_embeddings
    with rounded_values(model, precision, torch.float32):
        judged = transcribe_model(model, prompts(), 0)
    assert transcribe_model(model, prompts(), 0) == dense
    round_embedding(model, precision, torch.float32)
    path = export(model, tmp_path)
    expected = transcribe_model(model, prompts(), 4)
    assert max(differences(dense, expected)) > TOLERANCE
    assert max(differences(judged, expected)) < 1e-5
    exact = OnnxDecoder(path, exact=True)
    assert max(differences(expected, transcribe(lambda name: exact, prompts(), 4))) < TOLERANCE
    stored = {tensor.name for tensor in onnx.load(path, load_external_data=False).graph.initializer}
    assert ("lm_head.weight" in stored) == (not tied)

    plain = dequantize_embedding(copy.deepcopy(model))
    assert (plain.lm_head.weight is plain.model.embed_tokens.weight) == tied
    assert transcribe_model(plain, prompts(), 4)[0].tokens == expected[0].tokens
    assert max(differences(expected, transcribe_model(plain, prompts(), 4))) < 1e-5


def test_integers_are_stored_in_their_bits(tmp_path: Path) -> None:
    import onnx

    path = export(rounded_model("LlamaForCausalLM", Rounding("int4_g32"), Rounding("int8", residual=0)), tmp_path)
    graph = onnx.load(path, load_external_data=False).graph
    found = {tensor.name: (tuple(tensor.dims), tensor.data_type) for tensor in graph.initializer}
    assert found["model.layers.0.self_attn.qkv_proj.weight"] == ((256, 2, 16), onnx.TensorProto.UINT8)
    assert found["model.layers.0.self_attn.qkv_proj.weight_scale"] == ((256, 2), onnx.TensorProto.FLOAT)
    assert found["model.layers.1.mlp.up_proj.weight"] == ((96, 1, 64), onnx.TensorProto.UINT8)


def test_equal_queries_keys_and_values_are_one_product(tmp_path: Path) -> None:
    import onnx

    path = export(rounded_model("LlamaForCausalLM", Rounding("int4_g32", residual=8), Rounding("int8", "low_rank")), tmp_path)
    nodes = onnx.load(path, load_external_data=False).graph.node
    attention = [node for node in nodes if node.op_type == "GroupQueryAttention"]
    assert [[bool(name) for name in node.input[:3]] for node in attention] == 2 * [[True, False, False]]
    products = [node.name for node in nodes if node.op_type == "MatMulNBits" and "self_attn" in node.name]
    names = {0: ("qkv_proj", "qkv_proj.residual_A", "qkv_proj.residual_B", "o_proj", "o_proj.residual_A", "o_proj.residual_B")}
    names[1] = ("qkv_proj.A", "qkv_proj.B", "o_proj.A", "o_proj.B")
    assert products == [f"model.layers.{layer}.self_attn.{name}.MatMulNBits" for layer in names for name in names[layer]]
