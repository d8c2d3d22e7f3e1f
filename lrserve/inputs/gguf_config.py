"""The config that a GGUF file's metadata describes, for the architectures whose every key and tensor is understood here.

A key of the architecture that nothing here reads would be lost, so it is refused by name, unless it says 0 or nothing. Keys:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; what a key that is not there means is what llama.cpp takes it to mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final, NoReturn

import numpy as np

from lrserve.errors import InputError, reading, shown
from lrserve.inputs.gguf_file import GgufFile

_MODEL_TYPES: Final = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma3": "gemma3_text",
    "smollm3": "smollm3",
    "granite": "granite",
    "olmo2": "olmo2",
    "phi3": "phi3",
    "starcoder2": "starcoder2",
}
"""Architectures of GGUF, and of transformers. Mistral's models have llama's in GGUF."""
_OWN_HEAD_DIM: Final = ("llama", "qwen3", "gemma3")
"""Those whose heads may be wider or narrower than the hidden states divided by their number."""
_IRRELEVANT: Final = ("tensor_data_layout", "rope.scaling.finetuned")
ROPE_FACTORS: Final = "rope_freqs.weight"
"""By what each rotary frequency is divided; llama.cpp's form of the scaling that transformers calls llama3."""
LONG_FACTORS: Final = ("rope_factors_long.weight", "rope_factors_short.weight")
"""The same for long and for short texts: Phi-3's scaling, which transformers calls longrope."""
_ADVICE: Final = "give the model in Hugging Face layout"
_REQUIRED: Final[Any] = object()


def config_of(file: GgufFile) -> Any:
    """Build the transformers config of a GGUF file.

    Raises:
        InputError: an architecture, a key or a value that cannot be carried over, or that is missing.
    """
    from transformers import AutoConfig

    architecture = file.metadata.get("general.architecture")
    if (kind := file.metadata.get("general.type", "model")) != "model":
        raise InputError(f"{file.path} holds no model but {shown(kind)} (general.type); give the file of the model")
    if not isinstance(architecture, str) or architecture not in _MODEL_TYPES:
        raise InputError(
            f"{file.path}: general.architecture is {shown(architecture)}; of GGUF files, lrserve converts those of "
            f"{', '.join(_MODEL_TYPES)}; {_ADVICE}"
        )
    keys = _Keys(file, architecture)
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise InputError(f"{file.path} lacks the tensor token_embd.weight; download it again")
    hidden, heads = keys.whole("embedding_length"), keys.whole("attention.head_count")
    rotated = keys.whole("rope.dimension_count", hidden // heads)
    head_dim = keys.whole("attention.key_length", hidden // heads if architecture == "phi3" else rotated)
    keys.must("attention.value_length", head_dim)
    if architecture != "phi3":
        keys.must("rope.dimension_count", head_dim)
    keys.must("vocab_size", embedding.shape[0])
    keys.must("attention.causal", True)
    layers = keys.whole("block_count")
    if layers != (found := _layers(file)):
        raise InputError(
            f"{file.path}: {architecture}.block_count is {layers}, its tensors are of {found} layers; download it again"
        )
    context = keys.whole("context_length")
    rope = _rope(keys, rotated, context)
    fields: dict[str, Any] = {"rope_parameters": rope}
    if architecture in _OWN_HEAD_DIM:
        fields["head_dim"] = head_dim
    else:
        keys.must("attention.key_length", hidden // heads)
    if architecture in ("llama", "smollm3", "granite"):
        fields["attention_bias"] = "blk.0.attn_output.bias" in file.tensors
        fields["mlp_bias"] = "blk.0.ffn_down.bias" in file.tensors
    if architecture == "gemma3":
        fields |= _gemma3(keys, head_dim, rope)
    elif architecture == "smollm3":
        fields["no_rope_layer_interval"] = 4  # which llama.cpp takes for granted
    elif architecture == "granite":
        fields |= _granite(keys, head_dim)
    elif architecture == "phi3":
        fields |= _phi3(keys, rope, context, rotated / head_dim)
    if architecture == "starcoder2":
        fields["norm_epsilon"] = keys.real("attention.layer_norm_epsilon")
        fields["use_bias"] = "blk.0.attn_q.bias" in file.tensors
        fields["sliding_window"] = _window(keys)
    else:
        fields["rms_norm_eps"] = keys.real("attention.layer_norm_rms_epsilon")
    fields |= {
        "vocab_size": embedding.shape[0],
        "max_position_embeddings": context,
        "hidden_size": hidden,
        "intermediate_size": keys.whole("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys.whole("attention.head_count_kv", heads),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        **_special_ids(file),
    }
    keys.refuse_others()
    with reading(file.path, _ADVICE):
        return AutoConfig.for_model(_MODEL_TYPES[architecture], **fields)


class _Keys:
    """The keys of a file's architecture; it notes which were read."""

    def __init__(self, file: GgufFile, architecture: str) -> None:
        self.file, self.architecture, self._prefix = file, architecture, f"{architecture}."
        self._read = {self._prefix + key for key in _IRRELEVANT}

    def get(self, key: str, default: Any = _REQUIRED) -> Any:
        self._read.add(self._prefix + key)
        value = self.file.metadata.get(self._prefix + key, default)
        if value is _REQUIRED:
            raise InputError(f"{self.file.path} lacks {self._prefix}{key}; download it again, or {_ADVICE}")
        return value

    def whole(self, key: str, default: Any = _REQUIRED) -> int:
        value = self.get(key, default)
        if type(value) is not int or value < 1:
            self.refuse(key, value, "not a positive whole number")
        return int(value)

    def real(self, key: str, default: Any = _REQUIRED) -> float:
        value = self.get(key, default)
        if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:
            self.refuse(key, value, "not a positive number")
        return float(value)

    def must(self, key: str, wanted: Any) -> None:
        if (value := self.get(key, wanted)) != wanted:
            self.refuse(key, value, f"where lrserve can convert only {shown(wanted)}")

    def refuse(self, key: str, value: Any, reason: str) -> NoReturn:
        raise InputError(f"{self.file.path}: {self._prefix}{key} is {shown(value)}, {reason}; {_ADVICE}")

    def refuse_others(self) -> None:
        for key, value in self.file.metadata.items():
            if key.startswith(self._prefix) and key not in self._read and value not in (0, "", []):
                raise InputError(f"{self.file.path}: {key} ({shown(value)}) would be lost in the conversion; {_ADVICE}")


def _layers(file: GgufFile) -> int:
    numbers = (name.split(".")[1] for name in file.tensors if name.startswith("blk."))
    return 1 + max((int(number) for number in numbers if number.isdecimal()), default=-1)


def _special_ids(file: GgufFile) -> dict[str, Any]:
    """Ids of special tokens. Where a model has two ends, of a text and of a turn, both end what it generates."""
    tokens, ids = file.metadata.get("tokenizer.ggml.tokens"), {}
    count = len(tokens) if isinstance(tokens, list) else 0
    for name in ("bos", "eos", "padding", "unknown", "eot"):
        key = f"tokenizer.ggml.{name}_token_id"
        value = ids[name] = file.metadata.get(key)
        if value is not None and (type(value) is not int or not 0 <= value < count):
            raise InputError(f"{file.path}: {key} is {shown(value)}, the vocabulary has {count} tokens; download it again")
    ends = list(dict.fromkeys(ids[name] for name in ("eos", "eot") if ids[name] is not None))
    return {
        "bos_token_id": ids["bos"],
        "eos_token_id": ends if len(ends) > 1 else ids["eos"],
        "pad_token_id": ids["padding"],
    }


def _gemma3(keys: _Keys, head_dim: int, rope: Mapping[str, Any]) -> dict[str, Any]:
    layers, period = keys.whole("block_count"), keys.whole("attention.sliding_window_pattern", 6)
    local = {"rope_type": "default", "rope_theta": keys.real("rope.freq_base_swa", 10_000.0)}
    return {
        "rope_parameters": {"full_attention": dict(rope), "sliding_attention": local},
        "sliding_window": keys.whole("attention.sliding_window"),
        "layer_types": ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(layers)],
        # llama.cpp knows the 27B model by its layers; the file says nothing of its other scale
        "query_pre_attn_scalar": head_dim if layers != 62 else keys.whole("embedding_length") // keys.whole("attention.head_count"),
    }


def _granite(keys: _Keys, head_dim: int) -> dict[str, Any]:
    """What Granite multiplies by; no key, or 0, leaves it out."""
    keys.must("rope.scaling.finetuned", True)  # without it llama.cpp rotates nothing

    def scale(key: str, left_out: float) -> float:
        return keys.real(key, left_out) if keys.get(key, 0) != 0 else left_out

    return {
        "embedding_multiplier": scale("embedding_scale", 1.0),
        "residual_multiplier": scale("residual_scale", 1.0),
        "attention_multiplier": scale("attention.scale", head_dim**-0.5),
        "logits_scaling": keys.real("logit_scale"),
    }


def _phi3(keys: _Keys, rope: Mapping[str, Any], context: int, rotated_share: float) -> dict[str, Any]:
    if rope["rope_type"] not in ("default", "longrope"):
        keys.refuse("rope.scaling.type", rope["rope_type"], "which transformers does not have for Phi-3")
    return {
        "rope_parameters": {**rope, "partial_rotary_factor": rotated_share},
        "original_max_position_embeddings": keys.whole("rope.scaling.original_context_length", context),
        "sliding_window": _window(keys),
    }


def _window(keys: _Keys) -> int | None:
    """Return how many tokens attention sees; None, which is 0 in GGUF, is all of them."""
    return keys.whole("attention.sliding_window") if keys.get("attention.sliding_window", 0) != 0 else None


def _rope(keys: _Keys, rotated: int, context: int) -> dict[str, Any]:
    """Return the `rope_parameters` of transformers, for so many rotated entries of a head."""
    base = {"rope_theta": keys.real("rope.freq_base", 10_000.0)}
    kind = keys.get("rope.scaling.type", "linear")
    factor = keys.real("rope.scaling.factor", keys.get("rope.scale_linear", 1.0))
    scale = keys.real("rope.scaling.attn_factor", keys.get("rope.scaling.yarn_attn_factor", 1.0))
    original = keys.whole("rope.scaling.original_context_length", context)
    divisors = keys.file.tensors.get(ROPE_FACTORS)
    if kind == "none":
        factor = 1.0
    if keys.architecture == "phi3" and any(name in keys.file.tensors for name in LONG_FACTORS):
        return base | _longrope(keys, kind, scale, context / original) | {"original_max_position_embeddings": original}
    if divisors is not None and np.any(divisors.values() != 1):
        if kind == "yarn" or factor != 1:
            keys.refuse("rope.scaling.type", kind, f"beside the tensor {ROPE_FACTORS}")
        found = _llama3(keys, divisors.values().reshape(-1), rotated)
    elif kind in ("none", "linear"):
        found = {"rope_type": "default"} if factor == 1 else {"rope_type": "linear", "factor": factor}
    elif kind == "yarn":
        if (extrapolated := keys.get("rope.scaling.yarn_ext_factor", 1.0)) not in (1, -1):  # -1: as the type says
            keys.refuse("rope.scaling.yarn_ext_factor", extrapolated, "where lrserve can convert only 1")
        return base | {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original,
            "beta_fast": keys.real("rope.scaling.yarn_beta_fast", 32.0),
            "beta_slow": keys.real("rope.scaling.yarn_beta_slow", 1.0),
            "attention_factor": scale * (1 + 0.1 * math.log(factor)),
        }
    else:
        keys.refuse("rope.scaling.type", kind, "where lrserve can convert only none, linear and yarn")
    if scale != 1:
        keys.refuse("rope.scaling.attn_factor", scale, "which only yarn has")
    return base | found


def _longrope(keys: _Keys, kind: Any, scale: float, longer: float) -> dict[str, Any]:
    """Return both divisors of each frequency; transformers and vLLM compute the scale from how much longer texts may become."""
    if kind not in ("linear", "longrope"):  # linear stands for no key
        keys.refuse("rope.scaling.type", kind, f"beside the tensor {LONG_FACTORS[0]}")
    if missing := [name for name in LONG_FACTORS if name not in keys.file.tensors]:
        raise InputError(f"{keys.file.path} lacks the tensor {missing[0]}; download it again")
    original = keys.whole("rope.scaling.original_context_length")
    usual = math.sqrt(1 + math.log(longer) / math.log(original)) if longer > 1 else 1.0
    if not math.isclose(scale, usual, rel_tol=1e-3):
        keys.refuse("rope.scaling.attn_factor", scale, f"where lrserve can convert only the usual {usual:.4f}")
    long, short = ([float(value) for value in keys.file.tensors[name].values().reshape(-1)] for name in LONG_FACTORS)
    return {"rope_type": "longrope", "long_factor": long, "short_factor": short}


def _llama3(keys: _Keys, divisors: np.ndarray[Any, Any], rotated: int) -> dict[str, Any]:
    """Find the scaling that gives these divisors: Llama's bounds of the wavelengths, and the largest divisor as the factor."""
    original = keys.whole("rope.scaling.original_context_length", 8192)
    low, high, factor = 1.0, 4.0, float(divisors.max())
    wavelengths = 2 * math.pi * keys.real("rope.freq_base", 10_000.0) ** (np.arange(0, rotated, 2) / rotated)
    smooth = np.clip((original / wavelengths - low) / (high - low), 0, 1)
    if divisors.shape != wavelengths.shape or not np.allclose(divisors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-3):
        raise InputError(f"{keys.file.path}: {ROPE_FACTORS} is not the scaling of Llama 3, the only one that is known; {_ADVICE}")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
