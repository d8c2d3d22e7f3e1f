"""Files and options that people bring, damaged: one line that names the file and the field, before stage 2."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml
from faults.generated import PLAIN, as_yaml, files
from faults.refusing import Fault, answer, refusal, refused
from hypothesis import given, settings
from tiny import dense_model, write_dense, write_text

from lrserve.cli import main


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
    Fault("kv heads that do not divide", edited("config.json", num_key_value_heads=3), ("config",)),
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
    Fault(
        "config.json is UTF-16", lambda f: (f / "model/config.json").write_bytes("{}".encode("utf-16")), ("config.json", "utf-8")
    ),
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


@pytest.mark.parametrize("kind", ["inspect", "compress"])
def test_the_good_model_is_accepted(kind: str, place: Path) -> None:
    command = dry_run(place) if kind == "compress" else ("inspect", place / "model")
    assert answer(*command) is None
    assert not (place / "out").exists()


def laughs(anchors: int) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]" for level in range(1, anchors)]
    return "\n".join(lines)


def merges(anchors: int) -> str:
    lines = ["a0: &a0 {x: 1, y: 2}"]
    lines += [f"a{level}: &a{level} {{<<: [{', '.join([f'*a{level - 1}'] * 10)}]}}" for level in range(1, anchors)]
    return "\n".join(lines)


RECIPES = [
    ("seed: 18446744073709551616", ("seed", "at most 2147483647", "got 18446744073709551616")),
    ("seed: 1e999", ("seed", "whole number", "1e999")),
    ("seed: .inf", ("seed", "finite", "inf")),
    ("seed: .nan", ("seed", "finite", "nan")),
    ("search: {speed_weight: .inf}", ("search.speed_weight", "finite")),
    ("search: {trials: 1000000000000}", ("search.trials", "at most 2147483647")),
    ("factorization: {residuals: [8, 99999999999]}", ("factorization.residuals", "at most 2147483647")),
    ("seed: " + "9" * 5000, ("recipe", "4300 digits")),
    ("seed: 2020-13-45", ("recipe", "month must be in 1..12")),
    ('engine: {dtype: "a\\0b"}', ("engine.dtype", "got 'a\\x00b'")),
    ('text: {calibration: "a\\0b"}', ("text.calibration", "NUL")),
    ('model: "~a\\0b"', ("model", "NUL")),
    ("a: " + "[" * 3000 + "]" * 3000, ("recipe", "nested more than 20 deep")),
    ("\n".join("  " * level + "a:" for level in range(1000)), ("recipe", "nested more than 20 deep")),
    (laughs(9), ("recipe", "more than 10000 values")),
    (merges(9), ("recipe", "more than 10000 values")),
    ("a: &a [*a]", ("recipe", "&a contains itself")),
    ("a: *b", ("recipe", "undefined alias")),
    ("# " + "x" * 2_000_000, ("recipe", "more than 1048576 bytes")),
    ("x" * 900 + ": 1", ("there is no setting", "xxx")),
    (r'"a\nb": 1', ("there is no setting", r"a\nb")),
    (r'search: {"a\u202eb": 1}', ("there is no setting", r"search.a\u202eb")),
    (r'workloads: {"a\nb": {"concurrency": 0}}', (r"workloads.a\nb.concurrency", "must be at least 1")),
    ("? [1, 2]\n: 3", ("recipe", "unhashable")),
    ("a: !!python/object:os.system []", ("recipe", "python/object")),
    ("a: [", ("recipe", "ParserError")),
    ("a: \x00", ("recipe", "ReaderError")),
    ("[1, 2]", ("recipe", "list")),
    ("search: {search: {search: {}}}", ("there is no setting search.search",)),
]


@pytest.mark.parametrize(("text", "line"), RECIPES, ids=[text[:30] for text, _ in RECIPES])
def test_a_recipe_is_bounded(text: str, line: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    model = [] if text.startswith("model") else ["m"]
    refused(Fault(text[:30], id, line), "compress-and-export", *model, "--recipe", tmp_path / "recipe.yaml", "-o", tmp_path / "out")


LONG, NUL = "x" * 400, "a\0b"
PLACES = [
    (("compress-and-export", LONG, "--calibration", "TEXT", "-o", "out"), "no model at"),
    (("compress-and-export", f"/{LONG}", "--calibration", "TEXT", "-o", "out"), "no model at"),
    (("compress-and-export", NUL, "--calibration", "TEXT", "-o", "out"), "NUL"),
    (("compress-and-export", "MODEL", "--calibration", f"/{LONG}", "-o", "out", *ONNX), "xxx"),
    (("compress-and-export", "MODEL", "--calibration", NUL, "-o", "out", *ONNX), "NUL"),
    (("compress-and-export", "MODEL", "--calibration", "TEXT", "-o", LONG, *ONNX), "-o"),
    (("compress-and-export", "MODEL", "--calibration", "TEXT", "-o", "out", "--work", LONG, *ONNX), "--work"),
    (("compress-and-export", "MODEL", "--recipe", LONG, "-o", "out"), "recipe"),
    (("compress-and-export", "MODEL", "--export", LONG, "-o", "out"), "no exporter"),
    (("inspect", LONG), "xxx"),
    (("inspect", f"/{LONG}"), "xxx"),
    (("inspect", NUL), "no model at"),
    (("verify", f"/{LONG}"), "xxx"),
    (("generate", f"/{LONG}", "Hello"), "xxx"),
    (("bench", f"/{LONG}"), "xxx"),
    (("eval", f"/{LONG}"), "xxx"),
]


@pytest.mark.parametrize(("command", "part"), PLACES, ids=[" ".join(command)[:60] for command, _ in PLACES])
def test_no_name_of_a_place_is_too_strange(
    command: tuple[str, ...], part: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = {"MODEL": str(place / "model"), "TEXT": str(place / "text.jsonl")}
    assert part in refusal(*[words.get(word, word) for word in command])


@pytest.mark.parametrize("cache", ["/proc/x", "/dev/null/x", "FILE/x", LONG])
def test_a_cache_that_cannot_be_written_is_named(cache: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LRSERVE_CACHE", cache.replace("FILE", str(place / "text.jsonl")))
    assert "the cache (LRSERVE_CACHE): cannot write to" in refusal(*dry_run(place))


def test_a_full_disk_is_noticed_before_the_work(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lrserve.storage.space.shutil.disk_usage", lambda folder: mock.Mock(free=1000))
    line = refusal(*dry_run(place))
    for part in ("0.00 GB free", "(-o)", "(--work)"):
        assert part in line


def test_a_text_beyond_the_embedding_names_token_and_id(place: Path) -> None:
    path = place / "model" / "tokenizer.json"
    content = json.loads(path.read_text())
    kept = {"special": False, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    content["added_tokens"].append({"id": 256, "content": "words", **kept})
    path.write_text(json.dumps(content))
    line = refusal(*dry_run(place))
    for part in ("text.jsonl", "token 256 ('words')", "256 tokens"):
        assert part in line


@pytest.mark.parametrize(
    ("recipe", "line"),
    [
        ("calibration: {length: 512}", ("calibration.length 512", "context of 256 tokens", "max_position_embeddings")),
        ("search: {validation_length: 257}", ("search.validation_length 257",)),
        ("report: {length: 300}", ("report.length 300",)),
        ("report: {prompt_tokens: 250, new_tokens: 32}", ("report.prompt_tokens 250 and report.new_tokens 32",)),
        ("report: {new_tokens: 255}", ("report.new_tokens 255",)),
        ("workloads: {chat: {prompt_tokens: 200, output_tokens: 57}}", ("workloads.chat.prompt_tokens 200",)),
        ("workloads: {a: {}, b: {output_tokens: 255}}", ("workloads.b.output_tokens 255",)),
    ],
)
def test_what_does_not_fit_into_the_context_is_refused_by_its_name(recipe: str, line: tuple[str, ...], place: Path) -> None:
    (place / "recipe.yaml").write_text(recipe)
    refused(Fault(recipe, id, line), *dry_run(place), "--recipe", place / "recipe.yaml")


def test_a_bug_shows_its_traceback_and_asks_for_a_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(model: str) -> str:
        raise ZeroDivisionError("of ours")

    monkeypatch.setattr("lrserve.pipeline.inspect.inspect", broken)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr("sys.argv", ["lrserve", "inspect", "model"])
    with pytest.raises(SystemExit) as end:
        main()
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 1
    assert lines[0].startswith("Traceback")
    assert "ZeroDivisionError: of ours" in lines
    assert "bug in lrserve: please open an issue" in lines[-1]


SMALL = {
    "calibration": {"sequences": 2, "length": 32},
    "search": {"probe_tokens": 64, "validation_tokens": 64, "validation_pool": 64, "validation_length": 32},
    "workloads": {"chat": {"prompt_tokens": 4, "output_tokens": 4, "concurrency": 1}},
    "report": {"tokens": 64, "length": 32, "prompts": 1, "prompt_tokens": 8},
}


@pytest.mark.parametrize(
    ("file", "cases"),
    [("config.json", 24), ("generation_config.json", 8), ("tokenizer_config.json", 8), ("tokenizer.json", 8), ("recipe.yaml", 12)],
)
def test_generated_files_are_accepted_or_refused_in_one_line(file: str, cases: int, place: Path) -> None:
    """A slice of tests/soak/test_generated_inputs.py."""
    recipe = place / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(SMALL))
    path = recipe if file == "recipe.yaml" else place / "model" / file
    how: dict[str, Any] = {"write": as_yaml, "load": yaml.safe_load} if path == recipe else {}
    command = ("inspect", place / "model") if file == "config.json" else (*dry_run(place), "--recipe", recipe)

    @settings(max_examples=cases, **PLAIN)
    @given(content=files(path, **how))
    def every(content: bytes) -> None:
        path.write_bytes(content)
        with mock.patch("lrserve.pipeline.run.require_engines"):
            answer(*command)

    every()
