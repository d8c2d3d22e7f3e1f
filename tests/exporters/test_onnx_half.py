"""Graphs in float16 and bfloat16, on the CPU, against transformers and against their float32 twins."""

from __future__ import annotations

import copy
import json
import statistics
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from half import runnable
from test_onnx_exporter import MODELS, gemma3, make, prompts, reference
from test_onnx_genai import NEW_TOKENS, PAD
from tiny import RENDERED, Rounding, rounded_model

from exporters import onnx_graph
from exporters.onnx import OnnxExporter, genai_config
from exporters.onnx_profiles import Profile
from exporters.onnx_twin import check_twin
from lrserve.compression.embedding import dequantize_embedding, round_embedding
from lrserve.compression.groups import Structure
from lrserve.compression.lowrank import dequantized
from lrserve.engines.onnx_session import OnnxDecoder, transcribe
from lrserve.engines.transcripts import Transcript, transcribe_model
from lrserve.errors import AgreementError, UnsupportedModelError
from lrserve.pipeline.agreement import FACTOR
from lrserve.recipe import Dtype

HALF: tuple[Dtype, Dtype] = ("float16", "bfloat16")
TIE = 0.05  # nats; float16 shifts the log probabilities of these models by less
ROUNDINGS = (
    (Rounding("int4_g32", residual=8), Rounding("int8", "low_rank")),
    (Rounding("int8"), Rounding("int4_g32", "narrow", residual=16)),
)


@pytest.fixture
def gemma_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models of the family do not overflow, so that its graph can be run in float16."""
    monkeypatch.setattr(onnx_graph, "check_renderable", lambda *_: None)


def export(model: Any, folder: Path, dtype: Dtype, profile: Profile = "genai") -> Path:
    out = folder / dtype
    OnnxExporter(profile, dtype).export(model, folder / "no-source", out, torch.float32)
    return out / "onnx" / "model.onnx"


def nats(found: list[Transcript], expected: list[Transcript]) -> float:
    """Mean difference of a log probability."""
    pairs = zip(found, expected, strict=True)
    return statistics.fmean(abs(a - b) for own, other in pairs for a, b in zip(own.logprobs, other.logprobs, strict=True))


def assert_rounds_as_torch(graph: Path, model: Any, dtype: Dtype) -> None:
    """A graph differs from the model in float32 as the model in the graph's format does in torch, which sums in another way."""
    expected = transcribe_model(model, prompts(), 3)
    decoder = OnnxDecoder(graph if dtype == "float16" else runnable(graph))
    assert decoder.dtype == dtype
    own = nats(transcribe(lambda name: decoder, prompts(), 3), expected)
    assert 0 < own < FACTOR * nats(transcribe_model(copy.deepcopy(model).to(getattr(torch, dtype)), prompts(), 3), expected)


@pytest.mark.usefixtures("gemma_too")
@pytest.mark.parametrize("structure", [None, "identity_block"])
@pytest.mark.parametrize("profile", ["genai", "portable"])
@pytest.mark.parametrize("name", MODELS)
def test_graphs_are_transformers_within_their_rounding(
    name: str, profile: Profile, structure: Structure | None, tmp_path: Path
) -> None:
    model = make(name, structure)
    graphs = {dtype: export(model, tmp_path, dtype, profile) for dtype in ("float32", *HALF)}
    for dtype in HALF:
        check_twin(graphs[dtype], graphs["float32"])
        assert_rounds_as_torch(graphs[dtype], model, dtype)


@pytest.mark.usefixtures("gemma_too")
@pytest.mark.parametrize("roundings", ROUNDINGS, ids=lambda roundings: "+".join(map(str, roundings)))
@pytest.mark.parametrize("architecture", RENDERED)
def test_rounded_weights_within_the_rounding_of_the_format(
    architecture: str, roundings: tuple[Rounding, ...], tmp_path: Path
) -> None:
    model = rounded_model(architecture, *roundings)
    round_embedding(model, "int8", torch.float32)
    graphs = {dtype: export(model, tmp_path, dtype) for dtype in ("float32", *HALF)}
    model = dequantized(dequantize_embedding(model))
    for dtype in HALF:
        check_twin(graphs[dtype], graphs["float32"])
        assert_rounds_as_torch(graphs[dtype], model, dtype)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", ["qwen2-sliding-tied", "gemma3-untied-softcap"])
@pytest.mark.usefixtures("gemma_too")
def test_numbers_are_of_the_types_that_cuda_has_kernels_for(name: str, dtype: Dtype, tmp_path: Path) -> None:
    import onnx

    model = onnx.load(export(make(name, "low_rank"), tmp_path, dtype))
    half, single = getattr(onnx.TensorProto, dtype.upper()), onnx.TensorProto.FLOAT
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)}
    assert {types[value] for value in types if "key" in value or value.endswith(".value")} == {half}
    assert types["logits"] == single
    floats = {tensor.name: tensor.data_type for tensor in graph.initializer if tensor.data_type in (half, single)}
    wide = {name for name, own in floats.items() if own == single}
    if name.startswith("gemma"):  # its norms and its residual stream are float32
        assert wide == {name for name in floats if "norm" in name} | {"final_logit_softcapping"}
    else:
        assert not wide
    attention = [node for node in graph.node if node.op_type == "GroupQueryAttention"]
    assert {floats[cache] for node in attention for cache in node.input[7:9]} == {half}
    last = next(node for node in graph.node if "logits" in node.output)
    assert last.op_type == ("Mul" if name.startswith("gemma") else "Cast")


def test_products_by_integers_have_scales_of_the_graphs_type_and_no_accuracy_level(tmp_path: Path) -> None:
    import onnx

    model = rounded_model("LlamaForCausalLM", Rounding("int4_g32", residual=8))
    round_embedding(model, "int8", torch.float32)
    levels, types = Counter[str](), {}
    for dtype in ("float32", *HALF):
        graph = onnx.load(export(model, tmp_path, dtype), load_external_data=False).graph
        stored = {tensor.name: tensor.data_type for tensor in graph.initializer}
        products = [node for node in graph.node if node.op_type in ("MatMulNBits", "GatherBlockQuantized")]
        levels[dtype] = sum(attribute.name == "accuracy_level" for node in products for attribute in node.attribute)
        types[dtype] = {onnx.TensorProto.DataType.Name(stored[node.input[2]]) for node in products}
    assert levels["float32"] > 0
    assert levels["float16"] == levels["bfloat16"] == 0
    assert types == {"float32": {"FLOAT"}, "float16": {"FLOAT16"}, "bfloat16": {"BFLOAT16"}}


def test_a_residuals_scales_are_float16s(tmp_path: Path) -> None:
    """They are a few millionths, of which float16 has hardly a digit; in the graph they are multiplied by a power of two."""
    import onnx
    from onnx.numpy_helper import to_array

    model = rounded_model("LlamaForCausalLM", Rounding("int4_g32", residual=8))
    scale = model.model.layers[0].self_attn.o_proj.residual_A.weight_scale.detach()
    scale.fill_(3e-7)
    graph = onnx.load(export(model, tmp_path, "float16")).graph
    stored = {tensor.name: to_array(tensor).astype(np.float64) for tensor in graph.initializer if "o_proj.residual" in tensor.name}
    first, second = (stored[f"model.layers.0.self_attn.o_proj.residual_{factor}.weight_scale"] for factor in "AB")
    np.testing.assert_allclose(first * second[0, 0], 3e-7, rtol=1e-3)


def test_gemma_is_refused_in_float16_by_name(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"Gemma in float16.*engine\.onnx_dtype: bfloat16") as refused:
        OnnxExporter("genai", "float16").preflight(gemma3())
    assert "\n" not in str(refused.value)
    OnnxExporter("genai", "bfloat16").preflight(gemma3())


@pytest.mark.parametrize(("dtype", "cache"), [("float32", None), ("float16", "float16"), ("bfloat16", "bfloat16")])
def test_loaders_are_told_the_format_and_the_provider(dtype: Dtype, cache: str | None, tmp_path: Path) -> None:
    model = make("llama")
    model.config.max_position_embeddings = 2**24  # longer than a cache may be
    genai = genai_config(model.config, {}, dtype=dtype)
    providers = [] if dtype == "float32" else [{"cuda": {"enable_cuda_graph": "0"}}]
    assert genai["model"]["decoder"]["session_options"]["provider_options"] == providers
    itemsize = 4 if dtype == "float32" else 2
    assert genai["search"]["max_length"] == 2**30 // (2 * itemsize * 3 * 2 * 16)  # keys and values, layers, heads, width
    config = json.loads((export(make("llama"), tmp_path, dtype).parent / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == dtype
    assert config["transformers.js_config"].get("kv_cache_dtype") == cache


def test_onnxruntime_genai_loads_float16(tmp_path: Path) -> None:
    """On the CPU, once it is told to leave the graph's provider out."""
    import onnxruntime_genai as genai

    model = make("llama-llama3-rope")
    row = [token for token in prompts(1)[0] if token != PAD]
    expected = reference(model, row, NEW_TOKENS)
    model.config.eos_token_id = next(token for token in range(3, 128) if token not in expected.tokens)
    config = genai.Config(str(export(model, tmp_path, "float16").parent))
    config.clear_providers()
    loaded = genai.Model(config)
    params = genai.GeneratorParams(loaded)
    params.set_search_options(max_length=len(row) + NEW_TOKENS, do_sample=False)
    generator = genai.Generator(loaded, params)
    generator.append_tokens(np.array([row], np.int32))
    tokens: list[int] = []
    while not generator.is_done():
        generator.generate_next_token()
        tokens.append(int(generator.get_next_tokens()[0]))
    decided = next((step for step, margin in enumerate(expected.margins) if margin < TIE), NEW_TOKENS)
    assert decided > 2
    assert tokens[:decided] == list(expected.tokens[:decided])


def _scaled_weight(graph: Any) -> None:
    weight = graph.initializers["model.layers.1.mlp.up_proj.weight"]
    weight.const_value = _tensor(weight, weight.const_value.numpy() * np.float16(1.01))


def _one_integer(graph: Any) -> None:
    weight = graph.initializers["model.layers.0.mlp.up_proj.weight"]
    values = weight.const_value.numpy().copy()
    values.reshape(-1)[7] ^= 1
    weight.const_value = _tensor(weight, values)


def _too_large(graph: Any) -> None:
    weight = graph.initializers["model.norm.weight"]
    values = weight.const_value.numpy().copy()
    values[3] = 1e30
    weight.const_value = _tensor(weight, values)


def _window(graph: Any) -> None:
    node = next(node for node in graph if node.op_type == "GroupQueryAttention")
    node.attributes.add(_ir().Attr("local_window_size", _ir().AttributeType.INT, 7))


def _lost_node(graph: Any) -> None:
    node = next(node for node in graph if node.name == "model.layers.0.mlp.act")
    node.outputs[0].replace_all_uses_with(node.inputs[0])
    graph.remove(node)


def _lost_tensor(graph: Any) -> None:
    graph.initializers.pop("rotary.cos")


def _ir() -> Any:
    import onnx_ir

    return onnx_ir


def _tensor(held: Any, values: Any) -> Any:
    return _ir().tensor(values, name=held.name)


FAULTS: dict[str, tuple[Callable[[Any], None], str, str]] = {
    "weight": (_scaled_weight, "graph", r"model\.layers\.1\.mlp\.up_proj\.weight is not its float32 twin's, rounded to float16"),
    "integer": (_one_integer, "graph", r"model\.layers\.0\.mlp\.up_proj\.weight is not its float32 twin's, rounded to uint8"),
    "overflow": (_too_large, "both", r"model\.norm\.weight has a number that is too large for float16.*engine\.onnx_dtype"),
    "attribute": (_window, "graph", r"has the node .*local_window_size': 7"),
    "node": (_lost_node, "graph", r"has the node .*where its float32 twin has .*mlp\.act"),
    "tensor": (_lost_tensor, "graph", r"do not both have rotary\.cos"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_graph_that_is_not_its_twin_is_found(fault: str, tmp_path: Path) -> None:
    change, where, message = FAULTS[fault]
    model = rounded_model("LlamaForCausalLM", Rounding("int8"), Rounding("int8", "narrow", kinds=("o",)))
    graph, twin = (export(model, tmp_path, dtype) for dtype in ("float16", "float32"))
    check_twin(graph, twin)
    for path in (graph, twin) if where == "both" else (graph,):
        loaded = _ir().load(path)
        with np.errstate(over="ignore"):
            change(loaded.graph)
        _ir().save(loaded, path)
    with pytest.raises(AgreementError, match=message) as refused:
        check_twin(graph, twin)
    assert "\n" not in str(refused.value)
