"""ONNX export: a folder `onnx/` that ONNX Runtime, onnxruntime-genai, optimum and transformers.js load as it is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch

from exporters.companions import copy_companions, without_code
from exporters.onnx_companions import loader_config, loader_tokenizer_config
from exporters.onnx_families import check_renderable, head_width, loader_type
from exporters.onnx_graph import build_graph
from exporters.onnx_linear import save_beside, save_graph
from exporters.onnx_profiles import Profile
from lrserve.plugins.versions import require_onnx
from lrserve.recipe import Dtype, EngineSettings

FOLDER: Final = "onnx"
MODEL_FILE: Final = "model.onnx"
LAST_FILE: Final = "model_last.onnx"
"""The same graph, and weights, with the logits of the last token only: what generates does not wait for those of a prompt."""
_CACHE_BYTES: Final = 2**30
"""KV cache of one sequence that onnxruntime-genai allocates unless its caller says max_length."""


class OnnxExporter:
    """Renders the compressed model as one ONNX graph with a KV cache, in a profile (onnx_profiles.py) and a number format.

    The tolerance, which is for float32: the graph's operators sum in another order than torch's. Over five families and real
    models that moves a prompt log probability by 1e-6 to 4e-4 nats in float32, and an error worth the name (a window off by one
    token, a lost bias) by far more than 0.002.
    """

    name: str = "onnx"
    tolerance: float = 2e-3
    rounds: bool = True
    rounds_embedding: bool = True

    def __init__(self, profile: Profile = "genai", dtype: Dtype = "float32") -> None:
        self._profile: Profile = profile
        self._dtype: Dtype = dtype

    def configured(self, settings: EngineSettings) -> OnnxExporter:
        """Return the exporter of a recipe's profile and of its number format, float32 where it names none."""
        return type(self)(settings.onnx_profile, settings.onnx_dtype or "float32")

    def preflight(self, skeleton: Any) -> None:
        """Check packages and model.

        Raises:
            EngineError: a package that writes or runs the graph is missing or of an untested version.
            UnsupportedModelError: the graph would not render this model faithfully.
        """
        require_onnx()
        check_renderable(skeleton, self._dtype)

    def export(self, model: Any, source: Path, out: Path, dtype: torch.dtype) -> None:
        """Write `out`/onnx: two graphs with the same weights, and the configs and tokenizer files that their loaders want.

        config.json is that of `source` where there is one, otherwise the model's (a GGUF file has none), completed for loaders that
        know other names (onnx_companions.py).

        Raises:
            EngineError: a package is missing or of an untested version.
            UnsupportedModelError: the graph would not render this model faithfully.
        """
        require_onnx()
        import onnx

        folder = out / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        save_graph(build_graph(model, self._profile, self._dtype), folder / MODEL_FILE)
        save_beside(build_graph(model, self._profile, self._dtype, last_logits=True), folder / LAST_FILE, folder / MODEL_FILE)
        for name in (MODEL_FILE, LAST_FILE):  # by path: a model in memory is limited to 2 GiB
            onnx.checker.check_model(str(folder / name), full_check=True)
        copy_companions(source, folder)
        found = _read_json(source / "config.json") or model.config.to_dict()
        _write_json(folder / "config.json", loader_config(without_code(found), model.config, self._dtype))
        if tokenizer := _read_json(folder / "tokenizer_config.json"):
            _write_json(folder / "tokenizer_config.json", loader_tokenizer_config(tokenizer, folder))
        generation = _read_json(source / "generation_config.json")
        _write_json(folder / "genai_config.json", genai_config(model.config, generation, self._profile, self._dtype))


def genai_config(
    config: Any, generation: Mapping[str, Any], profile: Profile = "genai", dtype: Dtype = "float32"
) -> dict[str, Any]:
    """Build the genai_config.json by which onnxruntime-genai loads the graph: on a GPU, but for float32.

    `generation` is the content of generation_config.json: chat models keep their full list of end tokens there. max_length is the
    context, or what _CACHE_BYTES hold of it: genai allocates a cache of that length at once. Its callers may ask for more.
    """
    special = {name: generation.get(name, getattr(config, name, None)) for name in ("bos_token_id", "eos_token_id")}
    pad = generation.get("pad_token_id", getattr(config, "pad_token_id", None))
    if pad is None:
        eos = special["eos_token_id"]
        pad = eos[0] if isinstance(eos, (list, tuple)) else eos
    special["pad_token_id"] = pad
    context = int(config.max_position_embeddings)
    itemsize = getattr(torch, dtype).itemsize
    token_bytes = 2 * itemsize * config.num_hidden_layers * config.num_key_value_heads * head_width(config)  # key and value
    # Left padding is found on the host, so no run can be captured as a CUDA graph.
    providers = [] if dtype == "float32" else [{"cuda": {"enable_cuda_graph": "0"}}]
    return {
        "model": {
            **{name: token for name, token in special.items() if token is not None},
            "context_length": context,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": providers},
                "filename": LAST_FILE,
                "head_size": head_width(config),
                "hidden_size": config.hidden_size,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    **({"position_ids": "position_ids"} if profile == "portable" else {}),
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
                "num_attention_heads": config.num_attention_heads,
                "num_hidden_layers": config.num_hidden_layers,
                "num_key_value_heads": config.num_key_value_heads,
            },
            "type": loader_type(config),
            "vocab_size": config.vocab_size,
        },
        "search": {
            "do_sample": False,
            "max_length": min(context, _CACHE_BYTES // token_bytes),
            "min_length": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": True,
            "repetition_penalty": 1.0,
            "temperature": 1.0,
            "top_k": 50,
            "top_p": 1.0,
            "early_stopping": True,
            "length_penalty": 1.0,
            "no_repeat_ngram_size": 0,
            "diversity_penalty": 0.0,
        },
    }


def _read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, an empty one if there is no such file."""
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.unlink(missing_ok=True)  # a copy of a read-only file is one
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
