"""Files and options that people bring, damaged in every way they come: one line that names the file and the field, before stage 2."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faults.refusing import Fault, refusal, refused
from tiny import dense_model, write_dense, write_text


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("good")
    write_dense(dense_model("LlamaForCausalLM"), place / "model")
    write_text(place / "text.jsonl", 200)
    return place


@pytest.fixture
def place(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LRSERVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return Path(shutil.copytree(good, tmp_path / "in"))


def dry_run(place: Path, *arguments: str) -> tuple[str | Path, ...]:
    return ("compress-and-export", place / "model", "--calibration", place / "text.jsonl", *ONNX, "-o", place / "out", *arguments)


ONNX = ("--target", "onnx", "--export", "onnx", "--dry-run")  # no vLLM engine starts


def edited(file: str, **entries: Any) -> Callable[[Path], object]:
    """Change entries of a JSON file of the model; Ellipsis removes one."""

    def damage(folder: Path) -> None:
        path = folder / "model" / file
        content = {**json.loads(path.read_text()), **entries}
        path.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))

    return damage


def written(file: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "model" / file).write_text(text)


def config(line: str, *more: str, **entries: Any) -> Fault:
    name = ", ".join(f"{key}={str(value)[:30]}" for key, value in entries.items())
    return Fault(name, edited("config.json", **entries), ("config.json", line, *more))


FAULTS = [
    config("rms_norm_eps", rms_norm_eps=1),
    config("max_position_embeddings", "4096.0", max_position_embeddings=4096.0),
    config("hidden_size", "None", hidden_size=None),
    config("hidden_size", "got 'x", hidden_size="x" * 5000),
    config("rope", rope_parameters="linear"),
    config("rope", rope_parameters=..., rope_scaling="linear"),
    config("rope", rope_parameters={"rope_type": "unheard-of", "rope_theta": 10000.0}),
    config("rope", rope_parameters={"rope_type": "yarn", "rope_theta": 10000.0}),
    config("dtype", "auto", dtype=..., torch_dtype="auto"),
    config("dtype", dtype="float3"),
    config("num_hidden_layers", "got 0", num_hidden_layers=0),
    config("num_hidden_layers", "got 1000000000", num_hidden_layers=10**9),
    config("num_hidden_layers", "got True", num_hidden_layers=True),
    config("vocab_size", "got -5", vocab_size=-5),
    config("vocab_size", vocab_size=10**400),
    config("nonlinear", hidden_act="nonlinear"),
    config("hidden_act", hidden_act=["silu"]),
    config("architectures", architectures="LlamaForCausalLM"),
    config("architectures", architectures=[7]),
    config("architectures", "MistralForCausalLM", architectures=["MistralForCausalLM"]),
    config("heads", num_attention_heads=3, head_dim=...),
    config("fit together", num_key_value_heads=3),
    config("attention_bias", attention_bias="yes"),
    config("model_type", model_type="unheard-of"),
    config("model_type", model_type=["llama"]),
    config("bos_token_id", "256 tokens", bos_token_id=256),
    config("eos_token_id", "-7", eos_token_id=[2, -7]),
    config("eos_token_id", "2.5", eos_token_id=2.5),
    config("pad_token_id", "999", pad_token_id=999),
    Fault("config.json is null", written("config.json", "null"), ("config.json", "null")),
    Fault("config.json is a list", written("config.json", "[1]"), ("config.json", "a list")),
    Fault("config.json is empty", written("config.json", ""), ("config.json", "JSONDecodeError")),
    Fault("config.json is cut", written("config.json", '{"model_type": "lla'), ("config.json", "JSONDecodeError")),
    Fault("config.json is UTF-16", lambda f: (f / "model/config.json").write_bytes("{}".encode("utf-16")), ("config.json", "utf-8")),
    Fault("config.json is nested", written("config.json", "[" * 100_000), ("config.json", "RecursionError")),
    Fault("config.json is huge", lambda f: os.truncate(f / "model/config.json", 10**9), ("config.json", "1000000000 bytes")),
    Fault("config.json has a long number", written("config.json", '{"a": ' + "9" * 5000 + "}"), ("config.json", "4300 digits")),
    Fault("config.json is a folder", lambda f: replaced(f / "model/config.json", Path.mkdir), ("config.json",)),
    Fault("config.json is a pipe", lambda f: replaced(f / "model/config.json", os.mkfifo), ("config.json",)),
    Fault("generation_config.json is a list", written("generation_config.json", "[]"), ("generation_config.json", "a list")),
    Fault(
        "generation_config.json names a token that is none",
        edited("generation_config.json", eos_token_id=[2, 5000]),
        ("generation_config.json", "eos_token_id", "5000", "256 tokens"),
    ),
    Fault(
        "generation_config.json has text for a number",
        edited("generation_config.json", max_new_tokens="many"),
        ("generation_config.json",),
    ),
    Fault("tokenizer.json of an unknown type", edited("tokenizer.json", model={"type": "Unheard"}), ("tokenizer", "model")),
    Fault("tokenizer.json is cut", written("tokenizer.json", '{"version": "1.0", "mod'), ("tokenizer", "JSONDecodeError")),
    Fault("tokenizer.json is empty", written("tokenizer.json", "{}"), ("tokenizer",)),
    Fault("tokenizer.json is null", written("tokenizer.json", "null"), ("tokenizer",)),
    Fault("no tokenizer", lambda f: [path.unlink() for path in (f / "model").glob("tokenizer*")], ("tokenizer", "copy")),
    Fault("tokenizer_config.json is a list", written("tokenizer_config.json", "[]"), ("tokenizer",)),
    Fault("tokenizer_config.json is null", written("tokenizer_config.json", "null"), ("tokenizer",)),
    Fault("tokenizer_class is a number", edited("tokenizer_config.json", tokenizer_class=5), ("tokenizer",)),
    Fault("the index has no weight_map", written("model.safetensors.index.json", "{}"), ("index.json", "weight_map", "None")),
    Fault("the index is a list", written("model.safetensors.index.json", "[]"), ("index.json", "a list")),
    Fault("weight_map is a list", written("model.safetensors.index.json", '{"weight_map": ["a"]}'), ("index.json", "weight_map")),
    Fault("weight_map names numbers", written("model.safetensors.index.json", '{"weight_map": {"a": 3}}'), ("weight_map",)),
]


def replaced(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_damaged_model_is_refused_at_the_start(fault: Fault, place: Path) -> None:
    fault.damage(place)
    refused(fault, *dry_run(place))
