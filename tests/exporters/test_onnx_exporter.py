"""The ONNX rendering against transformers in float32, on tiny random models of every family."""

from __future__ import annotations

import functools
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from tiny import FACTORED, apart_specs, install
from torch import nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
    Starcoder2Config,
    Starcoder2ForCausalLM,
)

from exporters.onnx import OnnxExporter
from exporters.onnx_profiles import Profile
from lrserve.compression.groups import STRUCTURES, Structure, allocated, find_groups
from lrserve.compression.layers import IdentityBlock
from lrserve.compression.level import Level
from lrserve.compression.spec import specs_of
from lrserve.engines import onnx_session
from lrserve.engines.onnx_session import OnnxDecoder
from lrserve.engines.transcripts import Transcript
from lrserve.errors import ArtifactError, EngineError, InputError, UnsupportedModelError

WINDOW = 8
PROMPT_LENGTH = 3 * WINDOW  # so that the window matters, in the prompt and after it
NEW_TOKENS = 10
TOLERANCE = 1e-3

SHAPE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
PARTIAL_ROPE = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}
LONGROPE = {"rope_type": "longrope", "rope_theta": 10_000.0, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 16}


def llama(**changes: Any) -> Any:
    return LlamaForCausalLM(LlamaConfig(**{**SHAPE, **changes}))


def mistral(**changes: Any) -> Any:
    return MistralForCausalLM(MistralConfig(**{**SHAPE, "sliding_window": WINDOW, **changes}))


def qwen2(**changes: Any) -> Any:
    return Qwen2ForCausalLM(Qwen2Config(**{**SHAPE, **changes}))


def qwen3(**changes: Any) -> Any:
    return Qwen3ForCausalLM(Qwen3Config(**{**SHAPE, "head_dim": 32, **changes}))


def gemma3(**changes: Any) -> Any:
    settings = {
        **SHAPE,
        "head_dim": 32,
        "query_pre_attn_scalar": 24,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0},
        },
    }
    return Gemma3ForCausalLM(Gemma3TextConfig(**{**settings, **changes}))


def smollm3(**changes: Any) -> Any:
    return SmolLM3ForCausalLM(SmolLM3Config(**{**SHAPE, "no_rope_layer_interval": 2, **changes}))


def granite(**changes: Any) -> Any:
    multipliers = {"embedding_multiplier": 3.0, "residual_multiplier": 0.7, "attention_multiplier": 0.1, "logits_scaling": 2.0}
    return GraniteForCausalLM(GraniteConfig(**{**SHAPE, **multipliers, **changes}))


def olmo2(**changes: Any) -> Any:
    return Olmo2ForCausalLM(Olmo2Config(**{**SHAPE, **changes}))


def phi3(**changes: Any) -> Any:
    return Phi3ForCausalLM(Phi3Config(**{**SHAPE, **changes}))


def starcoder2(**changes: Any) -> Any:
    return Starcoder2ForCausalLM(Starcoder2Config(**{**SHAPE, **changes}))


SLIDING = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "llama-tied": lambda: llama(tie_word_embeddings=True),
    "llama-llama3-rope": lambda: llama(rope_parameters=LLAMA3_ROPE),
    "llama-yarn-rope": lambda: llama(rope_parameters=YARN_ROPE),
    "llama-biases": lambda: llama(attention_bias=True, mlp_bias=True),
    "llama-gelu": lambda: llama(hidden_act="gelu"),
    "mistral": mistral,
    "mistral-no-window": lambda: mistral(sliding_window=None),
    "qwen2": qwen2,
    "qwen2-sliding-tied": lambda: qwen2(tie_word_embeddings=True, **SLIDING),
    "qwen3": qwen3,
    "qwen3-sliding": lambda: qwen3(**SLIDING),
    "gemma3": gemma3,
    "gemma3-untied-softcap": lambda: gemma3(tie_word_embeddings=False, final_logit_softcapping=5.0),
    "smollm3-sliding": lambda: smollm3(use_sliding_window=True, sliding_window=WINDOW),
    "granite": granite,
    "olmo2": olmo2,
    "starcoder2-sliding": lambda: starcoder2(sliding_window=WINDOW),
    "starcoder2-no-biases": lambda: starcoder2(use_bias=False, tie_word_embeddings=False),
    "phi3-sliding": lambda: phi3(sliding_window=WINDOW),
    "phi3-partial-rope": lambda: phi3(num_attention_heads=2, rope_parameters=PARTIAL_ROPE),
}


@torch.no_grad()
def randomize(model: Any, seed: int = 0) -> Any:
    """Give every parameter a value that matters: transformers starts biases and norms where they have no effect."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, IdentityBlock) and module.order is not None:
            module.order.copy_(torch.randperm(len(module.order), generator=generator))
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            parameter.copy_(parameter + 0.3 * noise)
        elif parameter.ndim == 1:
            parameter.copy_(0.3 * noise)
        else:
            parameter.copy_(1.5 * noise / parameter.shape[1] ** 0.5)
    return model.eval()


def make(name: str, structure: Structure | None = None, *, apart: bool = False) -> Any:
    model = MODELS[name]()
    model.config.architectures = [type(model).__name__]
    model.set_attn_implementation("eager")
    if structure is not None:
        # Two groups of three, so that every kind stands compressed in one layer and dense in another.
        groups = [group for index, group in enumerate(allocated(find_groups(model), structure)) if index % 3 != 1]
        install(model, specs_of(((group, Level(8 + 8 * (index % 2))) for index, group in enumerate(groups)), structure))
    if apart:
        install(model, apart_specs(layer=1))
    return randomize(model)


def prompts(count: int = 2, length: int = PROMPT_LENGTH) -> list[list[int]]:
    return torch.randint(3, 128, (count, length), generator=torch.Generator().manual_seed(1)).tolist()


@torch.no_grad()
def reference(model: Any, prompt: list[int], new_tokens: int = NEW_TOKENS) -> Transcript:
    """The slow way: no cache, everything afresh for every token."""
    ids, margins = list(prompt), []
    logprobs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)[:-1]
    chosen = logprobs.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    for _ in range(new_tokens):
        best = model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1).topk(2)
        ids.append(int(best.indices[0]))
        margins.append(float(best.values[0] - best.values[1]))
    return Transcript(tuple(chosen.tolist()), tuple(ids[len(prompt) :]), tuple(margins))


def assert_same(found: Transcript, expected: Transcript) -> None:
    assert len(found.logprobs) == len(expected.logprobs)
    assert len(found.tokens) == len(found.margins) == len(expected.tokens)
    np.testing.assert_allclose(found.logprobs, expected.logprobs, rtol=0, atol=TOLERANCE)
    # Greedy continuations may part for good at a near tie, and only there.
    ties = [step for step, margin in enumerate(expected.margins) if margin < TOLERANCE]
    decided = ties[0] if ties else len(expected.tokens)
    assert decided > 0
    assert found.tokens[:decided] == expected.tokens[:decided]
    np.testing.assert_allclose(found.margins[:decided], expected.margins[:decided], rtol=0, atol=2 * TOLERANCE)


def initializers(out: Path) -> dict[str, list[int]]:
    import onnx

    graph = onnx.load(out / "onnx" / "model.onnx", load_external_data=False).graph
    return {tensor.name: list(tensor.dims) for tensor in graph.initializer}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A dense model's folder with just the files that the exporter copies from."""
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": {"bits": 4}}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def transcribe(out: Path, prompts: list[list[int]], new_tokens: int) -> list[Transcript]:
    return onnx_session.transcribe(functools.cache(lambda name: OnnxDecoder(out / "onnx" / name)), prompts, new_tokens)


@pytest.mark.parametrize("structure", [None, *STRUCTURES])
@pytest.mark.parametrize("name", MODELS)
def test_transcript_equals_transformers(name: str, structure: Structure | None, source: Path, out: Path) -> None:
    model = make(name, structure)
    exporter = OnnxExporter()
    exporter.export(model, source, out, torch.float32)
    for transcript, prompt in zip(transcribe(out, prompts(), NEW_TOKENS), prompts(), strict=True):
        expected = reference(model, prompt)
        assert max(expected.logprobs) - min(expected.logprobs) > 1.0, "a degenerate model proves nothing"
        assert_same(transcript, expected)


@pytest.mark.parametrize("name", ["llama-biases", "gemma3"])
def test_linears_apart_from_their_group(name: str, source: Path, out: Path) -> None:
    model = make(name, apart=True)
    exporter = OnnxExporter()
    exporter.export(model, source, out, torch.float32)
    for transcript, prompt in zip(transcribe(out, prompts(), NEW_TOKENS), prompts(), strict=True):
        assert_same(transcript, reference(model, prompt))
    assert {"model.layers.1.self_attn.v_proj.A.order", "model.layers.1.mlp.gate_proj.A.weight"} <= set(initializers(out))


@pytest.mark.parametrize("name", ["llama-llama3-rope", "gemma3-untied-softcap"])
def test_bfloat16_model_is_rendered_as_its_exact_float32_twin(name: str, source: Path, out: Path) -> None:
    model = make(name, "identity_block").bfloat16()  # rounds the RoPE buffers too, which must not reach the graph
    twin = make(name, "identity_block")
    twin.load_state_dict({key: tensor.float() for key, tensor in model.state_dict().items()})
    if name.startswith("gemma3"):
        rounded = model.model.embed_tokens.embed_scale
        assert rounded.dtype == torch.bfloat16
        twin.model.embed_tokens.embed_scale.fill_(float(rounded))
    exporter = OnnxExporter()
    exporter.export(model, source, out, torch.float32)
    [found] = transcribe(out, prompts(1), NEW_TOKENS)
    assert_same(found, reference(twin, prompts(1)[0]))


def test_gemma3_embedding_scale_is_rounded_as_transformers_rounds_it(source: Path, out: Path) -> None:
    import onnx

    model = randomize(gemma3(hidden_size=48)).bfloat16()  # sqrt(48) = 6.928, 6.9375 in bfloat16
    OnnxExporter().export(model, source, out, torch.float32)
    graph = onnx.load(out / "onnx" / "model.onnx", load_external_data=False).graph
    [scale] = [onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer if tensor.name == "embed_scale"]
    assert float(scale) == 6.9375


@pytest.mark.parametrize("profile", get_args(Profile))
def test_the_graph_for_generation_has_the_last_logits_alone(profile: Profile, source: Path, out: Path) -> None:
    OnnxExporter(profile).export(make("gemma3"), source, out, torch.float32)
    whole, last = (OnnxDecoder(out / "onnx" / name, threads=1) for name in ("model.onnx", "model_last.onnx"))
    batch = np.array(prompts(3), np.int64)
    every, alone = whole.prefill(batch), last.prefill(batch)
    assert alone.shape == (3, 1, every.shape[-1])
    np.testing.assert_allclose(alone[:, -1], every[:, -1], rtol=0, atol=1e-5)
    np.testing.assert_allclose(last.step(batch[:, 0]), whole.step(batch[:, 0]), rtol=0, atol=1e-5)


def test_a_batch_decodes_like_its_sequences_alone(source: Path, out: Path) -> None:
    exporter = OnnxExporter()
    exporter.export(make("gemma3", "identity_block"), source, out, torch.float32)
    batch = np.array(prompts(3), np.int64)
    decoder = OnnxDecoder(out / "onnx" / "model.onnx", threads=1)
    together = [decoder.prefill(batch)[:, -1], decoder.step(batch[:, 0]), decoder.step(batch[:, 1])]
    for row, prompt in enumerate(batch):
        alone = [decoder.prefill(prompt[None])[:, -1], decoder.step(prompt[:1]), decoder.step(prompt[1:2])]
        for one, all_rows in zip(alone, together, strict=True):
            np.testing.assert_allclose(one[0], all_rows[row], rtol=0, atol=1e-4)


@pytest.mark.parametrize("structure", FACTORED)
def test_factors_stand_once_under_the_names_of_the_artifact(structure: Structure, source: Path, out: Path) -> None:
    model = make("qwen2-sliding-tied", structure)
    OnnxExporter().export(model, source, out, torch.float32)
    found = initializers(out)
    block = structure == "identity_block"
    separate = re.compile(r"self_attn\.[qkv]_proj\.")  # what attention takes as one
    stored = {*dict(model.named_parameters()), *(name for name in model.state_dict() if name.endswith(".A.order"))}
    names = {separate.sub("self_attn.qkv_proj.", name) for name in stored}
    assert names <= set(found)
    splits = {"split.8.56", "split.16.48", "split.8.88", "split.16.80"} if block else set()
    assert set(found) - names == {"zero", "one", "rotary.cos", "rotary.sin"} | splits
    first = {name: shape for name, shape in found.items() if name.startswith("model.layers.0.self_attn") and ".A." in name}
    name = "model.layers.0.self_attn.qkv_proj.A"
    # (n, r), as MatMul reads it
    assert first == ({f"{name}.order": [64], f"{name}.weight": [56, 8]} if block else {f"{name}.weight": [64, 8]})
    assert found["model.layers.0.self_attn.qkv_proj.B.weight"] == [8, 128]
    assert found["model.layers.0.self_attn.qkv_proj.B.bias"] == [128]
    assert "model.layers.0.self_attn.q_proj.weight" not in found
    assert "model.layers.0.mlp.down_proj.A.order" not in found  # its inputs come in order
    assert "lm_head.weight" not in found  # tied


@pytest.mark.parametrize("structure", FACTORED)
def test_product_by_a_shared_first_factor_is_computed_once(structure: Structure, source: Path, out: Path) -> None:
    import onnx

    OnnxExporter().export(make("llama", structure), source, out, torch.float32)
    nodes = onnx.load(out / "onnx" / "model.onnx", load_external_data=False).graph.node
    name = "model.layers.0.self_attn.qkv_proj.A"
    operators = ("Gather", "Split", "MatMul", "Add") if structure == "identity_block" else ("MatMul",)
    assert [node.name for node in nodes if node.name.startswith(f"{name}.")] == [f"{name}.{kind}" for kind in operators]
    assert [node.name for node in nodes if f"{name}.weight" in node.input] == [f"{name}.MatMul"]


def test_graph_has_the_interface_that_loaders_expect(source: Path, out: Path) -> None:
    import onnx

    OnnxExporter().export(make("llama"), source, out, torch.float32)
    model = onnx.load(out / "onnx" / "model.onnx", load_external_data=False)
    assert model.ir_version == 10
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": 23, "com.microsoft": 1}
    caches = [f"{index}.{part}" for index in range(3) for part in ("key", "value")]
    assert [x.name for x in model.graph.input] == [
        "input_ids",
        "attention_mask",
        *(f"past_key_values.{cache}" for cache in caches),
    ]
    assert [x.name for x in model.graph.output] == ["logits", *(f"present.{cache}" for cache in caches)]
    locations = {entry.value for t in model.graph.initializer for entry in t.external_data if entry.key == "location"}
    assert locations == {"model.onnx_data"}


def test_folder_holds_what_loaders_want(source: Path, out: Path) -> None:
    OnnxExporter().export(make("llama"), source, out, torch.float32)
    assert [path.name for path in out.iterdir()] == ["onnx"]
    assert sorted(path.name for path in (out / "onnx").iterdir()) == [
        "config.json",
        "genai_config.json",
        "generation_config.json",
        "model.onnx",
        "model.onnx_data",
        "model_last.onnx",
        "tokenizer.json",
    ]
    config = json.loads((out / "onnx" / "config.json").read_text())
    assert config["model_type"] == "llama"  # the source's, completed
    assert "quantization_config" not in config
    genai = json.loads((out / "onnx" / "genai_config.json").read_text())
    assert genai["model"]["type"] == "llama"
    assert genai["model"]["eos_token_id"] == [2, 7]  # generation_config.json goes before config.json
    assert genai["model"]["pad_token_id"] == 0
    assert genai["model"]["context_length"] == genai["search"]["max_length"] == 64
    assert genai["model"]["decoder"]["head_size"] == 16


def test_onnxruntime_genai_is_told_a_type_that_it_knows(source: Path, out: Path) -> None:
    OnnxExporter().export(make("olmo2"), source, out, torch.float32)
    assert json.loads((out / "onnx" / "genai_config.json").read_text())["model"]["type"] == "decoder"


def test_source_without_config_gets_the_models_own(tmp_path: Path, out: Path) -> None:
    model = make("qwen3")
    model.config.quantization_config = {"quant_method": "lrserve"}
    OnnxExporter().export(model, tmp_path / "gguf", out, torch.float32)
    config = json.loads((out / "onnx" / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert config["hidden_size"] == 64
    assert "quantization_config" not in config


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "activation": (lambda: llama(hidden_act="relu2"), "hidden_act 'relu2'"),
    "gemma-activation": (lambda: gemma3(hidden_activation="quick_gelu"), "hidden_activation 'quick_gelu'"),
    "dynamic-rope": (
        lambda: llama(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
        "rope_type 'dynamic'",
    ),
    "attention-softcap": (lambda: gemma3(attn_logit_softcapping=50.0), "attn_logit_softcapping"),
    "bidirectional": (lambda: gemma3(use_bidirectional_attention=True), "not causal"),
    "head-dim": (lambda: llama(head_dim=24), "head_dim 24"),
    "partial-rope": (lambda: phi3(rope_parameters=PARTIAL_ROPE), "RoPE of 8 dimensions"),
    "longrope": (lambda: phi3(original_max_position_embeddings=32, rope_parameters=LONGROPE), "rope_type 'longrope'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_by_name_what_it_would_render_wrongly(case: str, source: Path, out: Path) -> None:
    build, named = REFUSED[case]
    with pytest.raises(UnsupportedModelError, match=named):
        OnnxExporter().export(build(), source, out, torch.float32)
    assert not (out / "onnx" / "model.onnx").exists()


def test_refuses_an_unknown_architecture(source: Path, out: Path) -> None:
    class NewForCausalLM(LlamaForCausalLM):
        pass

    with pytest.raises(UnsupportedModelError, match="NewForCausalLM"):
        OnnxExporter().export(NewForCausalLM(LlamaConfig(**SHAPE)), source, out, torch.float32)


def test_refuses_a_linear_with_a_forward_of_its_own(source: Path, out: Path) -> None:
    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model = make("llama")
    model.model.layers[1].mlp.down_proj = Doubled(96, 64, bias=False)
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.1\.mlp\.down_proj.*Doubled"):
        OnnxExporter().export(model, source, out, torch.float32)


def test_refuses_parameters_that_no_node_reads(source: Path, out: Path) -> None:
    model = make("llama")
    model.model.layers[0].self_attn.sinks = nn.Parameter(torch.zeros(4))
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.0\.self_attn\.sinks"):
        OnnxExporter().export(model, source, out, torch.float32)


def test_preflight_passes_here() -> None:
    OnnxExporter().preflight(make("llama"))


def test_preflight_names_the_missing_package_and_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find_spec(name))
    with pytest.raises(EngineError, match=r"onnxruntime, not installed.*pip install 'lrserve\[onnx\]'"):
        OnnxExporter().preflight(make("llama"))


def test_importing_the_exporter_imports_no_engine() -> None:
    code = "import sys, exporters.onnx; print([x for x in ('onnx', 'onnx_ir', 'onnxruntime') if x in sys.modules])"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_transcribe_without_an_export_says_what_is_there(out: Path) -> None:
    (out / "onnx").mkdir()
    (out / "onnx" / "config.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"no ONNX graph at .*model\.onnx.*holds: config\.json"):
        transcribe(out, prompts(), 1)


def test_transcribe_reports_a_damaged_graph(out: Path) -> None:
    (out / "onnx").mkdir()
    (out / "onnx" / "model.onnx").write_bytes(b"not a graph")
    with pytest.raises(EngineError, match=r"cannot load .*model\.onnx"):
        transcribe(out, prompts(), 1)


def test_transcribe_limits(source: Path, out: Path) -> None:
    exporter = OnnxExporter()
    exporter.export(make("llama"), source, out, torch.float32)
    with pytest.raises(InputError, match="a prompt needs at least one token"):
        transcribe(out, [[5], []], 1)
    [single] = transcribe(out, [[5]], 0)
    assert single == Transcript(logprobs=(), tokens=(), margins=())
    with pytest.raises(EngineError, match=r"64 \+ 1 tokens"):  # max_position_embeddings
        transcribe(out, prompts(1, 64), 2)
