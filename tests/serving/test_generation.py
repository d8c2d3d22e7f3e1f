"""Answers of the tiny graph against transformers, and tokens to text piece by piece."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Generator, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving.tiny_graph import chat_prompt, greedy, tokenizer, write_graph

from lrserve.engines.genai import PREFILL_CHUNK, GenaiEngine, search_options
from lrserve.engines.sampling import Sampling, Step
from lrserve.engines.vllm import Engine
from lrserve.errors import ArtifactError, EngineError, InputError
from lrserve.plugins import versions
from lrserve.serving import generation
from lrserve.serving.generation import StopStrings, Text, TextStream, answer, choose_engine, generate

TEXTS = st.text(st.sampled_from("ab\n é€😀"), max_size=40)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    return write_graph(tmp_path_factory.mktemp("graph"))


@pytest.fixture(scope="module")
def engine(tiny: tuple[Any, Path]) -> Iterator[GenaiEngine]:
    with GenaiEngine(tiny[1] / "onnx", threads=1) as engine:
        yield engine


def tokens_of(steps: Generator[Step]) -> list[int]:
    return [token for step in steps for token in step.tokens]


@pytest.mark.parametrize("length", [1, 20, PREFILL_CHUNK, PREFILL_CHUNK + 1, 2 * PREFILL_CHUNK + 50])
def test_greedy_answers_are_those_of_transformers(tiny: tuple[Any, Path], engine: GenaiEngine, length: int) -> None:
    prompt = ("some words, and more of them; " * 40)[: length - 1]  # and the BOS token
    ids = tokenizer()(prompt)["input_ids"]
    assert len(ids) == length
    made = tokens_of(engine.generate(ids, Sampling(max_tokens=12, ignore_eos=True)))
    assert len(made) == 12
    assert tokenizer().decode(made, skip_special_tokens=True) == greedy(tiny[0], prompt, 12)


def test_an_end_token_ends_the_answer_and_is_no_part_of_the_text(tiny: tuple[Any, Path], tmp_path: Path) -> None:
    model, out = tiny
    text = greedy(model, "a prompt", 12)
    ids = tokenizer()("a prompt")["input_ids"]
    with GenaiEngine(out / "onnx", threads=1) as engine:
        made = tokens_of(engine.generate(ids, Sampling(max_tokens=12, ignore_eos=True)))
    last = next(place for place in range(3, 12) if made[place] not in made[:place])
    shutil.copytree(out / "onnx", tmp_path / "onnx")
    config = json.loads((tmp_path / "onnx" / "genai_config.json").read_text())
    config["model"]["eos_token_id"] = [2, made[last]]
    (tmp_path / "onnx" / "genai_config.json").write_text(json.dumps(config))
    decode = Text(tmp_path / "onnx").decode
    with GenaiEngine(tmp_path / "onnx", threads=1) as engine:
        pieces = list(answer(engine, decode, ids, Sampling(max_tokens=12)))
        assert pieces[-1].finish == "stop"
        assert sum(piece.tokens for piece in pieces) == last + 1
        assert "".join(piece.text for piece in pieces) == decode(made[:last])
        assert text.startswith(decode(made[:last]).rstrip("\ufffd"))
        again = tokens_of(engine.generate(ids, Sampling(max_tokens=12, ignore_eos=True)))
        assert len(again) == 12
        assert made[last] not in again


def test_draws_are_those_of_the_seed(engine: GenaiEngine) -> None:
    def drawn(seed: int | None, top_p: float = 1.0) -> list[int]:
        return tokens_of(engine.generate([1, 70, 71], Sampling(20, temperature=1.5, top_p=top_p, seed=seed, ignore_eos=True)))

    assert drawn(7) == drawn(7)
    assert drawn(7) == drawn(7 + 2**31)
    assert len({tuple(drawn(seed)) for seed in (1, 2, -3, None, None)}) == 5
    assert drawn(1, top_p=1e-6) == tokens_of(engine.generate([1, 70, 71], Sampling(20, ignore_eos=True)))


def test_an_answer_may_be_left_and_the_next_one_is_right(tiny: tuple[Any, Path], engine: GenaiEngine) -> None:
    for left_after in (0, 1, 2, 5):
        steps = engine.generate(tokenizer()("another prompt " * 30)["input_ids"], Sampling(1000, ignore_eos=True))
        for _ in range(left_after):
            next(steps)
        steps.close()
        made = tokens_of(engine.generate(tokenizer()("a prompt")["input_ids"], Sampling(8, ignore_eos=True)))
        assert tokenizer().decode(made, skip_special_tokens=True) == greedy(tiny[0], "a prompt", 8)


def test_the_cache_is_as_long_as_prompt_and_answer() -> None:
    assert search_options(10, Sampling(5)) == {"max_length": 15, "min_length": 0, "do_sample": False}
    assert search_options(10, Sampling(5, ignore_eos=True))["min_length"] == 15


def test_a_request_that_fails_leaves_the_engine(tiny: tuple[Any, Path], engine: GenaiEngine) -> None:
    with pytest.raises(EngineError, match="max_length"):
        tokens_of(engine.generate([1, 2, 3], Sampling(100_000)))
    assert engine.running
    assert tokens_of(engine.generate([1, 70], Sampling(2, ignore_eos=True)))


@given(TEXTS, st.lists(st.integers(1, 5)))
def test_pieces_are_whole_characters_and_together_the_text(text: str, sizes: list[int]) -> None:
    stream = TextStream(lambda tokens: bytes(tokens).decode(errors="replace"))
    pieces, left = [], list(text.encode())
    for size in [*sizes, len(left)]:
        pieces.append(stream.add(left[:size]))
        left = left[size:]
    pieces.append(stream.rest())
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_decoder_that_drops_a_space_at_the_beginning_loses_none() -> None:
    words = ["▁a", "▁b", "c", "", "▁d"]
    stream = TextStream(lambda tokens: "".join(words[token] for token in tokens).replace("▁", " ").removeprefix(" "))
    assert [stream.add([token]) for token in range(5)] == ["a", " b", "c", "", " d"]


def test_bytes_that_are_no_text_come_in_the_end() -> None:
    stream = TextStream(lambda tokens: bytes(tokens).decode(errors="replace"))
    assert [stream.add(b"a"), stream.add(b"\xf0\x9f"), stream.rest(), stream.rest()] == ["a", "", "\ufffd", ""]


@given(TEXTS, st.text(st.sampled_from("ab\n"), min_size=1, max_size=4), st.lists(st.integers(1, 5)))
def test_nothing_of_a_stop_string_is_told(text: str, stop: str, sizes: list[int]) -> None:
    stops, told, left = StopStrings([stop]), "", text
    for size in [*sizes, len(left)]:
        piece, stopped = stops.add(left[:size])
        told, left = told + piece, left[size:]
        assert text.partition(stop)[0].startswith(told)
        if stopped:
            break
    else:
        told += stops.rest()
    assert told == text.partition(stop)[0]


@pytest.mark.parametrize(
    ("files", "installed", "wanted", "expected"),
    [
        (("onnx/genai_config.json", "config.json"), ("genai", "vllm"), None, "onnxruntime"),
        (("onnx/genai_config.json", "config.json"), ("genai", "vllm"), "vllm", "vllm"),
        (("onnx/genai_config.json", "config.json"), ("vllm",), None, "vllm"),
        (("onnx/genai_config.json",), ("vllm",), None, r"pip install 'lrserve\[onnx-serve\]'"),
        (("config.json",), ("genai",), None, r"pip install 'lrserve\[cpu\]'"),
        (("config.json",), ("genai", "vllm"), None, "vllm"),
        ((), ("genai", "vllm"), None, "neither onnx/genai_config.json nor config.json"),
    ],
)
def test_the_engine_is_what_is_there_and_installed(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    files: Sequence[str],
    installed: Sequence[str],
    wanted: generation.EngineName | None,
    expected: str,
) -> None:
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    monkeypatch.setattr(generation, "genai_installed", lambda: "genai" in installed)
    monkeypatch.setattr(generation, "installed_vllm", lambda: ("vllm", "0.32.0") if "vllm" in installed else None)
    if expected in ("onnxruntime", "vllm"):
        assert choose_engine(tmp_path, wanted) == expected
    else:
        with pytest.raises((ArtifactError, EngineError), match=expected):
            choose_engine(tmp_path, wanted)


@pytest.mark.parametrize("raw", [True, False])
def test_generate_prints_what_transformers_answers(tiny: tuple[Any, Path], capsys: pytest.CaptureFixture[str], raw: bool) -> None:
    model, out = tiny
    generate(out, "Hello there", max_tokens=40, raw=raw)
    printed = capsys.readouterr()
    prompt = "Hello there" if raw else chat_prompt("Hello there")
    expected = greedy(model, prompt, 40, bos=raw)
    count = len(tokenizer()(prompt, add_special_tokens=raw)["input_ids"])
    assert printed.out == expected + "\n"
    assert re.fullmatch(
        rf"40 tokens after {count} of the prompt on onnxruntime; prefill \d+\.\d\d s; decode \d+\.\d tokens/s; cut at 40 tokens\n",
        printed.err,
    )


@pytest.mark.parametrize(
    ("prompt", "kind", "message"),
    [
        ("x" * 9000, InputError, "the model's context 8192; give a shorter one"),
        ("no", InputError, "refuses the messages: not this"),
    ],
)
def test_prompts_that_cannot_be_answered_are_refused_before_the_engine_starts(
    tiny: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch, prompt: str, kind: type[Exception], message: str
) -> None:
    monkeypatch.setattr(GenaiEngine, "start", lambda self: pytest.fail("it starts"))
    with pytest.raises(kind, match=message):
        generate(tiny[1], prompt)


def test_a_missing_or_untested_package_is_named(tiny: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "_installed", lambda names: (names[0], "0.5.0"))
    with pytest.raises(EngineError, match=r"onnxruntime-genai 0\.5\.0 is installed.*pip install 'onnxruntime-genai>=0\.18"):
        generate(tiny[1], "a", engine="onnxruntime")
    monkeypatch.setattr(versions, "genai_installed", lambda: False)
    with pytest.raises(EngineError, match=r"pip install 'lrserve\[onnx-serve\]'"):
        generate(tiny[1], "a", engine="onnxruntime")


@pytest.mark.engine
@pytest.mark.usefixtures("forked_engines")
def test_vllm_answers_the_same(tiny: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = tiny
    prompt = chat_prompt("Hello there")
    ids = tokenizer()(prompt, add_special_tokens=False)["input_ids"]
    expected = greedy(model, prompt, 20, bos=False)
    with Engine(out.parent / "dense", dtype="float32", max_model_len=64, max_num_seqs=1) as engine:
        left = engine.generate(ids, Sampling(30, ignore_eos=True))
        assert next(left).finish is None
        left.close()
        made = tokens_of(engine.generate(ids, Sampling(20, ignore_eos=True)))
        assert tokenizer().decode(made, skip_special_tokens=True) == expected
        monkeypatch.setattr(generation, "_engine", lambda *_: nullcontext(engine))
        generate(out.parent / "dense", "Hello there", engine="vllm", max_tokens=20)
    printed = capsys.readouterr()
    assert printed.out == expected + "\n"
    assert re.fullmatch(
        r"20 tokens after 29 of the prompt on vllm; prefill .*; decode .* tokens/s; cut at 20 tokens\n", printed.err
    )
