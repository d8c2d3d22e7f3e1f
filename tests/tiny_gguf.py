"""Tiny GGUF files, as llama.cpp's converter writes them: the tiny models of `tiny.py` in float32 and a byte-level tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFValueType, GGUFWriter, get_tensor_name_map, quantize
from tiny import VOCABULARY, dense_model, tiny_tokenizer

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Gemma3ForCausalLM": "gemma3",
    "SmolLM3ForCausalLM": "smollm3",
    "GraniteForCausalLM": "granite",
    "Olmo2ForCausalLM": "olmo2",
    "Phi3ForCausalLM": "phi3",
    "Starcoder2ForCausalLM": "starcoder2",
}
_NOT_STATED: dict[str, dict[str, Any]] = {
    "Gemma3ForCausalLM": {"query_pre_attn_scalar": 32},
    "SmolLM3ForCausalLM": {"no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0]},
    "Starcoder2ForCausalLM": {"sliding_window": None},
}
"""What llama.cpp takes for granted, since files do not say it."""
_ROTATED_IN_PAIRS = ("llama", "smollm3", "granite")
_TYPES = {bool: GGUFValueType.BOOL, int: GGUFValueType.UINT32, float: GGUFValueType.FLOAT32, str: GGUFValueType.STRING}


def storable_model(architecture: str) -> Any:
    """A tiny model that a file says everything of."""
    if architecture not in _NOT_STATED:
        return dense_model(architecture)
    taken = _NOT_STATED[architecture]
    found = dense_model(architecture, layers=len(taken.get("no_rope_layers", (1, 1))))
    for name, value in taken.items():
        setattr(found.config, name, value)
    model = type(found)(found.config).eval()
    model.load_state_dict(found.state_dict())
    return model


def write_gguf(
    path: Path,
    model: Any = None,
    *,
    metadata: Mapping[str, Any] | None = None,
    without: Iterable[str] = (),
    tensors: Mapping[str, np.ndarray[Any, Any]] | None = None,
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
) -> Path:
    """Write a model to a GGUF file.

    Args:
        path: the file.
        model: of one of the `ARCHITECTURES`; a tiny Llama when None.
        metadata: keys that are added or changed; those that are None are left out.
        without: tensors that are left out, by GGUF's names.
        tensors: tensors that are added or changed, by GGUF's names.
        kind: what matrices are quantized to.
    """
    model = model or dense_model("LlamaForCausalLM")
    stored = {name: value for name, value in (gguf_tensors(model) | dict(tensors or {})).items() if name not in set(without)}
    write_parts([path], [stored], {**gguf_metadata(model), **(metadata or {})}, kind=kind)
    return path


def write_parts(
    paths: list[Path],
    tensors: list[dict[str, np.ndarray[Any, Any]]],
    metadata: Mapping[str, Any],
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
) -> None:
    """Write one file for each set of tensors; the first has the metadata, and each its place among several."""
    for number, (path, own) in enumerate(zip(paths, tensors, strict=True)):
        keys = dict(metadata) if number == 0 else {}
        if len(paths) > 1:
            keys |= {"split.no": number, "split.count": len(paths), "split.tensors.count": sum(map(len, tensors))}
        writer = GGUFWriter(path, str(metadata["general.architecture"]))
        for key, value in keys.items():
            if key == "general.architecture" or value is None:
                continue
            if isinstance(value, list):
                writer.add_array(key, value)
            else:
                writer.add_key_value(key, value, _TYPES[type(value)])
        for name, value in own.items():
            if kind != GGMLQuantizationType.F32 and value.ndim == 2:
                writer.add_tensor(name, quantize(value, kind), raw_dtype=kind)
            else:
                writer.add_tensor(name, value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def gguf_metadata(model: Any) -> dict[str, Any]:
    """The keys of a model and of the tiny tokenizer; it has one merge, of t and h."""
    config, own = model.config, ARCHITECTURES[type(model).__name__]
    vocabulary = sorted(tiny_tokenizer().get_vocab().items(), key=lambda entry: entry[1])
    tokens = [*[token for token, _ in vocabulary[: VOCABULARY - 1]], "th"]
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    keys = {
        f"{own}.context_length": config.max_position_embeddings,
        f"{own}.block_count": config.num_hidden_layers,
        f"{own}.embedding_length": config.hidden_size,
        f"{own}.feed_forward_length": config.intermediate_size,
        f"{own}.attention.head_count": config.num_attention_heads,
        f"{own}.attention.head_count_kv": config.num_key_value_heads,
        f"{own}.attention.key_length": getattr(config, "head_dim", None),
        f"{own}.rope.freq_base": rope["rope_theta"],
        "general.name": "tiny",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, 3] + [1] * (len(tokens) - 3),
        "tokenizer.ggml.merges": ["t h"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{% for message in messages %}{{ message['content'] }}{% endfor %}",
    }
    if own == "starcoder2":
        keys["starcoder2.attention.layer_norm_epsilon"] = config.norm_epsilon
    else:
        keys[f"{own}.attention.layer_norm_rms_epsilon"] = config.rms_norm_eps
    if own in _ROTATED_IN_PAIRS:
        keys |= {f"{own}.vocab_size": config.vocab_size, f"{own}.rope.dimension_count": _head_dim(config)}
    if own == "granite":
        keys |= {
            "granite.embedding_scale": config.embedding_multiplier,
            "granite.residual_scale": config.residual_multiplier,
            "granite.attention.scale": config.attention_multiplier,
            "granite.logit_scale": config.logits_scaling,
        }
    if own == "phi3":
        keys |= {
            "phi3.rope.dimension_count": int(config.rope_parameters["partial_rotary_factor"] * _head_dim(config)),
            "phi3.rope.scaling.original_context_length": config.original_max_position_embeddings,
            "phi3.attention.sliding_window": config.sliding_window,
        }
    if own == "gemma3":
        keys |= {"gemma3.attention.sliding_window": config.sliding_window, "gemma3.attention.sliding_window_pattern": 1}
    return {"general.architecture": own, **keys}


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", config.hidden_size // config.num_attention_heads))


def gguf_tensors(model: Any) -> dict[str, np.ndarray[Any, Any]]:
    """A model's tensors in llama.cpp's names and order of heads, and with Gemma's norms one higher."""
    own = ARCHITECTURES[type(model).__name__]
    names = get_tensor_name_map({name: key for key, name in MODEL_ARCH_NAMES.items()}[own], model.config.num_hidden_layers)
    found = {}
    for name, tensor in model.state_dict().items():
        if name in model.all_tied_weights_keys:
            continue
        stem, _, kind = name.rpartition(".")
        value = tensor.float().numpy()
        if own in _ROTATED_IN_PAIRS and (".q_proj" in name or ".k_proj" in name):
            pairs = value.reshape(-1, 2, _head_dim(model.config) // 2, *value.shape[1:])
            value = pairs.swapaxes(1, 2).reshape(value.shape)
        elif own == "gemma3" and name.endswith("norm.weight"):
            value = value + 1
        found[f"{names.get_name(stem)}.{kind}"] = np.ascontiguousarray(value)
    return found
