"""config.json, tokenizer_config.json and genai_config.json of the ONNX folder, for loaders of other ages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_onnx_exporter import LLAMA3_ROPE, gemma3, llama
from tiny import tiny_tokenizer
from transformers import AutoConfig, AutoTokenizer

from exporters.onnx import genai_config
from exporters.onnx_companions import loader_config, loader_tokenizer_config

LLAMA3 = {name: value for name, value in LLAMA3_ROPE.items() if name != "rope_theta"}


@pytest.mark.parametrize(
    ("model", "older"),
    [
        (lambda: llama(rope_parameters={"rope_type": "default", "rope_theta": 5e5}), {"rope_theta": 5e5}),
        (lambda: llama(rope_parameters=LLAMA3_ROPE), {"rope_theta": 10_000.0, "rope_scaling": LLAMA3}),
        (
            gemma3,
            {"rope_theta": 10_000.0, "rope_local_base_freq": 100.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        ),
    ],
    ids=["llama", "llama3", "gemma3"],
)
def test_config_says_rope_and_dtype_by_older_and_newer_names(model: Any, older: dict[str, Any], tmp_path: Path) -> None:
    config = model().config
    newer = config.to_dict()
    found = loader_config({**newer, "quantization_config": {"bits": 4}}, config)
    assert {name: found[name] for name in older} == older
    assert ("rope_scaling" in found) == ("rope_scaling" in older)
    assert found["dtype"] == found["torch_dtype"] == "float32"
    assert "quantization_config" not in found
    (tmp_path / "config.json").write_text(json.dumps(found))
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == config.rope_parameters
    only_older = {name: value for name, value in found.items() if name not in ("rope_parameters", "dtype")}
    (tmp_path / "config.json").write_text(json.dumps(only_older))
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == config.rope_parameters


def test_what_the_dense_config_says_is_kept() -> None:
    config = llama().config
    found = loader_config({"model_type": "llama", "rope_theta": 7.0, "rope_scaling": None, "head_dim": 16}, config)
    assert (found["rope_theta"], found["rope_scaling"], found["head_dim"]) == (7.0, None, 16)


def test_tokenizer_config_has_the_template_and_older_names(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": "{{ 'ä' }}", "tool": "{{ 'b' }}"}
    tokenizer.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "tokenizer_config.json").read_text())
    saved["extra_special_tokens"] = ["<bos>"]
    found = loader_tokenizer_config(saved, tmp_path)
    assert found["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert found["additional_special_tokens"] == ["<bos>"]
    assert "extra_special_tokens" not in found
    assert found["chat_template"] == [{"name": "default", "template": "{{ 'ä' }}"}, {"name": "tool", "template": "{{ 'b' }}"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(found))
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.chat_template == tokenizer.chat_template
    assert loaded("ab")["input_ids"] == tokenizer("ab")["input_ids"]


def test_one_template_is_text_and_an_own_one_is_kept(tmp_path: Path) -> None:
    assert "chat_template" not in loader_tokenizer_config({}, tmp_path)
    (tmp_path / "chat_template.jinja").write_text("of the file")
    assert loader_tokenizer_config({}, tmp_path)["chat_template"] == "of the file"
    assert loader_tokenizer_config({"chat_template": "own"}, tmp_path)["chat_template"] == "own"
    assert loader_tokenizer_config({"tokenizer_class": "Qwen2Tokenizer"}, tmp_path)["tokenizer_class"] == "Qwen2Tokenizer"


def test_genai_allocates_a_cache_of_a_gibibyte_at_most() -> None:
    config = llama(max_position_embeddings=131_072, num_hidden_layers=3).config
    config.num_hidden_layers, config.num_key_value_heads, config.head_dim = 32, 8, 128  # of an 8B model
    found = genai_config(config, {})
    assert found["model"]["context_length"] == 131_072
    assert found["search"]["max_length"] == 4096
    config.max_position_embeddings = 2048
    assert genai_config(config, {})["search"]["max_length"] == 2048
