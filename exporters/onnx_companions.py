"""config.json and tokenizer_config.json of an ONNX folder, as older transformers (under optimum) and transformers.js read them too.

The checkpoint's own files are what transformers 5 wrote, or what the dense model came with. The graph's loaders are other programs:
some know the older names only, and some do not look into chat_template.jinja. These two files hold both.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from lrserve.recipe import Dtype

_GENERIC: Final = "TokenizersBackend"
"""Transformers 5's name of the tokenizer that is all in tokenizer.json ..."""
_OLDER_GENERIC: Final = "PreTrainedTokenizerFast"
"""... and its name in all versions."""


def loader_config(found: Mapping[str, Any], config: Any, dtype: Dtype = "float32") -> dict[str, Any]:
    """Complete a config.json.

    Args:
        found: the dense model's config.json.
        config: the transformers config of the model in memory, which has RoPE in transformers 5's form.
        dtype: the graph's.

    Returns:
        `found` with RoPE by the older names where they are missing, the graph's dtype by both names, and what transformers.js
        wants to be told.
    """
    cache = {} if dtype == "float32" else {"kv_cache_dtype": dtype}
    rope = config.rope_parameters
    full = rope.get("full_attention", rope)
    older: dict[str, Any] = {"rope_theta": full["rope_theta"]}
    if full.get("rope_type", "default") != "default":
        older["rope_scaling"] = {name: value for name, value in full.items() if name != "rope_theta"}
    if "sliding_attention" in rope:
        older["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    return {
        **older,
        **{name: value for name, value in found.items() if name != "quantization_config"},  # how weights are stored is in the graph
        "dtype": dtype,
        "torch_dtype": dtype,
        # Of several files with weights it would look for that of 8-bit weights by default in a browser; and there are two files.
        # Its "fp32" is the file without a suffix, whatever is in it.
        "transformers.js_config": {"dtype": "fp32", "use_external_data_format": True, **cache},
    }


def loader_tokenizer_config(found: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Complete a tokenizer_config.json.

    Args:
        found: the dense model's tokenizer_config.json.
        folder: holds the other tokenizer files.

    Returns:
        `found` with the chat templates of `folder`, if it has none itself, and with the older names of its class and its special
        tokens.
    """
    config = dict(found)
    if config.get("tokenizer_class") == _GENERIC:
        config["tokenizer_class"] = _OLDER_GENERIC
    if isinstance(config.get("extra_special_tokens"), list):  # a dictionary, of something else, in older versions
        config.setdefault("additional_special_tokens", config.pop("extra_special_tokens"))
    templates = {"default": folder / "chat_template.jinja"}
    templates |= {path.stem: path for path in sorted(folder.glob("additional_chat_templates/*.jinja"))}
    texts = {name: path.read_text(encoding="utf-8") for name, path in templates.items() if path.is_file()}
    if texts and not config.get("chat_template"):
        several = [{"name": name, "template": text} for name, text in texts.items()]
        config["chat_template"] = several if set(texts) != {"default"} else texts["default"]
    return config
