"""What the ONNX graph needs to be told of an architecture, and which options of its config the graph renders faithfully."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import torch

from exporters.onnx_linear import MICROSOFT
from lrserve.errors import UnsupportedModelError
from lrserve.recipe import Dtype


@dataclass(frozen=True)
class Norms:
    """Names of a decoder layer's norms, by where they stand; None where there is no norm."""

    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None


@dataclass(frozen=True)
class OnnxFamily:
    """What an architecture's graph needs to be told; everything else is read off the model's own modules.

    gemma: scaled embedding, RMSNorm by 1 + w, RoPE by layer type.
    multipliers: of the embedding, of what each layer adds, and of the logits, by the config.
    config_window: one window for all layers, by the config; else each layer's attention has its own.
    loader: the model type by which onnxruntime-genai knows a graph like this one; None: the model's own.
    """

    activation: str = "hidden_act"
    norms: Norms = Norms()
    gemma: bool = False
    multipliers: bool = False
    config_window: bool = False
    loader: str | None = None


_LLAMA_LIKE: Final = OnnxFamily()
FAMILIES: Final[Mapping[str, OnnxFamily]] = {
    "LlamaForCausalLM": _LLAMA_LIKE,
    "MistralForCausalLM": replace(_LLAMA_LIKE, config_window=True),
    "Qwen2ForCausalLM": _LLAMA_LIKE,
    "Qwen3ForCausalLM": _LLAMA_LIKE,
    "Gemma3ForCausalLM": OnnxFamily(
        activation="hidden_activation",
        norms=Norms(
            after_attention="post_attention_layernorm",
            before_mlp="pre_feedforward_layernorm",
            after_mlp="post_feedforward_layernorm",
        ),
        gemma=True,
    ),
    "SmolLM3ForCausalLM": _LLAMA_LIKE,
    "GraniteForCausalLM": replace(_LLAMA_LIKE, multipliers=True),
    "Olmo2ForCausalLM": OnnxFamily(
        norms=Norms(None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
        loader="decoder",
    ),
    "Phi3ForCausalLM": replace(_LLAMA_LIKE, config_window=True),
    "Starcoder2ForCausalLM": replace(_LLAMA_LIKE, config_window=True, loader="decoder"),
}

# config name -> (operator, domain, attributes). QuickGelu is x sigmoid(alpha x), so SiLU in one pass at alpha 1.
ACTIVATIONS: Final[Mapping[str, tuple[str, str, Mapping[str, Any]]]] = {
    "silu": ("QuickGelu", MICROSOFT, {"alpha": 1.0}),
    "swish": ("QuickGelu", MICROSOFT, {"alpha": 1.0}),
    "gelu": ("Gelu", "", {"approximate": "none"}),
    "gelu_pytorch_tanh": ("Gelu", "", {"approximate": "tanh"}),
}

# RoPE types whose frequencies do not change with the length of the sequence, so that one table of cosines is exact.
_STATIC_ROPE: Final = ("default", "linear", "llama3", "yarn")

_LAYER_TYPES: Final = ("full_attention", "sliding_attention")


def head_width(config: Any) -> int:
    """Width D of one attention head of a transformers config."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def loader_type(config: Any) -> str:
    """Return what onnxruntime-genai is told a model is, given its transformers config."""
    family = next((FAMILIES[name] for name in getattr(config, "architectures", None) or () if name in FAMILIES), None)
    return (family and family.loader) or str(config.model_type)


def check_renderable(model: Any, dtype: Dtype = "float32") -> None:
    """Refuse what `onnx_graph.build_graph` would render wrongly.

    Raises:
        UnsupportedModelError: naming every such option of the model's config.
    """
    name, config = type(model).__name__, model.config
    if config.get_text_config() is not config:
        raise UnsupportedModelError(
            f"the ONNX graph is of text alone, and {name} reads images too. Export this model for vLLM only (--export vllm), or "
            "compress its text-only form"
        )
    if name not in FAMILIES:
        raise UnsupportedModelError(
            f"the ONNX graph does not know {name}; it renders {', '.join(FAMILIES)}. Export this model for vLLM only"
        )
    family, problems = FAMILIES[name], []
    activation = getattr(config, family.activation, None)
    if activation not in ACTIVATIONS:
        problems.append(f"{family.activation} {activation!r} (known: {', '.join(ACTIVATIONS)})")
    for layer_type, rope in rope_parameters(model).items():
        if rope.get("rope_type") not in _STATIC_ROPE:
            where = f" of {layer_type}" if layer_type else ""
            problems.append(f"rope_type {rope.get('rope_type')!r}{where} (known: {', '.join(_STATIC_ROPE)})")
        turned = int(head_width(config) * (rope.get("partial_rotary_factor") or 1.0))
        if turned != head_width(config) and turned % 16:
            problems.append(f"RoPE of {turned} dimensions of a head (GroupQueryAttention wants a multiple of 16)")
    # One window for all layers pays no attention to layer types.
    types = set(() if family.config_window else getattr(config, "layer_types", None) or ())
    problems += [f"layer type {kind!r}" for kind in sorted(types.difference(_LAYER_TYPES))]
    if getattr(config, "attn_logit_softcapping", None) is not None:
        problems.append("attn_logit_softcapping, which transformers and vLLM treat differently")
    if getattr(config, "use_bidirectional_attention", False) or not getattr(config, "is_causal", True):
        problems.append("attention that is not causal")
    if family.gemma and dtype == "float16":
        problems.append("Gemma in float16, where its activations overflow (engine.onnx_dtype: bfloat16)")
    if head_width(config) % 16:
        problems.append(f"head_dim {head_width(config)} (GroupQueryAttention wants a multiple of 16)")
    if problems:
        raise UnsupportedModelError(
            f"{name}: the ONNX graph does not render {'; '.join(problems)}. Export this model for vLLM only"
        )


def rope_parameters(model: Any) -> dict[str, dict[str, Any]]:
    """Return RoPE parameters by layer type; by the empty string where all layers have the same."""
    rope = model.config.rope_parameters
    if not FAMILIES[type(model).__name__].gemma:
        return {"": rope}
    return {kind: rope[kind] for kind in _LAYER_TYPES if kind in model.config.layer_types}


def rotary_frequencies(model: Any, layer_type: str) -> tuple[torch.Tensor, float]:
    """Return inverse frequencies (d / 2,) in float32, d dimensions of a head being turned, and the factor on cosine and sine.

    Computed afresh, by the model's own functions: the buffers of a model that was cast as a whole (`model.bfloat16()`)
    are rounded, and stay so when it is cast back.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind = rope_parameters(model)[layer_type]["rope_type"]
    compute = model.model.rotary_emb.compute_default_rope_parameters if kind == "default" else ROPE_INIT_FUNCTIONS[kind]
    frequencies, factor = compute(model.config, **({"layer_type": layer_type} if layer_type else {}))
    return frequencies.float().cpu(), float(factor)


def window(model: Any, attention: Any) -> int:
    """Return the tokens, itself included, that a query of this layer sees; -1 for all of them."""
    of_all = FAMILIES[type(model).__name__].config_window
    found = getattr(model.config if of_all else attention, "sliding_window", None)
    return -1 if found is None else int(found)
