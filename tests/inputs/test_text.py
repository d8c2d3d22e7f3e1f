"""Documents, disjoint parts, windows."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from tiny import tiny_tokenizer

from lrserve.errors import InputError
from lrserve.inputs.text import load_texts, read_documents, shortage, token_windows


def write(path: Path, documents: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return str(path)


def documents(count: int, tag: str = "") -> list[str]:
    return [f"document {tag} {i} " + "words of some length " * 20 for i in range(count)]


def test_three_parts_of_one_text_are_disjoint_and_complete(tmp_path: Path) -> None:
    texts = load_texts(write(tmp_path / "a.jsonl", documents(50)), None, None)
    parts = [texts.calibration.texts, texts.validation.texts, texts.report.texts]
    assert [t for part in parts for t in part] == documents(50)
    assert [len(part) for part in parts] == [40, 5, 5]


def test_given_parts_are_kept_and_an_overlap_is_refused(tmp_path: Path) -> None:
    a, b, c = (write(tmp_path / f"{x}.jsonl", documents(6, x)) for x in "abc")
    assert load_texts(a, b, c).report.texts == tuple(documents(6, "c"))
    with pytest.raises(InputError, match="repeats a document of an earlier use"):
        load_texts(a, b, a)


def test_a_document_that_repeats_in_one_text_stands_in_one_part_only(tmp_path: Path) -> None:
    once, rest = documents(1, "again")[0], documents(48)
    texts = load_texts(write(tmp_path / "a.jsonl", [once, *rest, once]), None, None)
    assert [once in part.texts for part in (texts.calibration, texts.validation, texts.report)] == [True, False, False]


def test_plain_text_is_cut_at_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\nstill one\n\ntwo\n\n\n\nthree")
    assert [t.strip() for t in read_documents(str(path)).texts] == ["one\nstill one", "two", "three"]


def test_documents_of_plain_text_are_what_stands_between_blank_lines(tmp_path: Path) -> None:
    content = "one\nstill one\n\n\n two\n\n\n\nthree\n"
    path = tmp_path / "a.txt"
    path.write_text(content)
    found = read_documents(str(path))
    assert found.texts == tuple(text for text in content.split("\n\n") if text.strip())
    assert found.fingerprint() == hashlib.sha256("".join(f"{text}\0" for text in found.texts).encode()).hexdigest()


def test_bad_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no text file at"):
        read_documents(str(tmp_path / "missing.txt"))
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n\n ")
    with pytest.raises(InputError, match="holds no text"):
        read_documents(str(empty))
    separators = tmp_path / "separators.jsonl"
    separators.write_text('{"text": "one \u2028 document \x85 only"}\n', encoding="utf-8")
    assert len(read_documents(str(separators)).texts) == 1
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\n{"body": 1}\n')
    with pytest.raises(InputError, match="line 2 has no 'text', but 'body'"):
        read_documents(str(bad))
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="UTF-8"):
        read_documents(str(binary))
    with pytest.raises(InputError, match="--calibration"):
        load_texts(None, None, None)
    with pytest.raises(InputError, match="too few documents"):
        load_texts(write(tmp_path / "one.jsonl", ["only one"]), None, None)


def test_windows_are_cut_chosen_by_seed_and_counted(tmp_path: Path) -> None:
    texts = read_documents(write(tmp_path / "a.jsonl", documents(30)))
    tokenizer = tiny_tokenizer()
    everything = token_windows(tokenizer, texts, 16)
    ids = tokenizer(texts.texts[0] + "\n\n", add_special_tokens=False)["input_ids"]
    assert everything[0].tolist() == ids[:16]
    chosen = token_windows(tokenizer, texts, 16, 5, seed=1)
    assert chosen.shape == (5, 16)
    assert torch.equal(chosen, token_windows(tokenizer, texts, 16, 5, seed=1))
    assert not torch.equal(chosen, token_windows(tokenizer, texts, 16, 5, seed=2))
    assert torch.equal(token_windows(tokenizer, texts, 16, 2), everything[[0, -1]])


def test_a_model_that_starts_with_bos_gets_it_in_every_window(tmp_path: Path) -> None:
    texts = read_documents(write(tmp_path / "a.jsonl", documents(30)))
    windows = token_windows(tiny_tokenizer(bos=True), texts, 16)
    assert (windows[:, 0] == 1).all()
    assert (windows[:, 1:] != 1).all()


def test_fewer_windows_than_asked_are_all_used_with_a_warning(tmp_path: Path) -> None:
    texts = read_documents(write(tmp_path / "a.jsonl", documents(3)))
    tokenizer = tiny_tokenizer()
    everything = token_windows(tokenizer, texts, 16)
    available = len(everything)
    for choice in ({"seed": 1}, {}, {"up_to": 10**7}):
        found = token_windows(tokenizer, texts, 16, 10**6, **choice)
        assert sorted(found.tolist()) == sorted(everything.tolist())
    warning = shortage(texts, found, 10**6, "calibration.sequences", "The factors fit less well")
    assert warning == (
        f"warning: {texts.name} has {available * 16:,} of the 16,000,000 tokens that calibration.sequences asks for; "
        "all of them are used. The factors fit less well: give more text for a better result"
    )
    assert shortage(texts, found, available, "calibration.sequences", "") is None
    assert len(token_windows(tokenizer, texts, 16, available - 1, up_to=10**7)) == available


def test_one_window_is_the_least(tmp_path: Path) -> None:
    texts = read_documents(write(tmp_path / "a.jsonl", documents(1)))
    tokenizer = tiny_tokenizer()
    tokens = len(tokenizer(texts.texts[0] + "\n\n", add_special_tokens=False)["input_ids"])
    assert token_windows(tokenizer, texts, tokens, 8).shape == (1, tokens)
    with pytest.raises(InputError, match=rf"{tokens} tokens, less than one window of {tokens + 1}: .*calibration\.length"):
        token_windows(tokenizer, texts, tokens + 1, 8)
    with pytest.raises(InputError, match="less than one window of 1"):
        token_windows(tiny_tokenizer(bos=True), texts, 1)  # all of it would be BOS


@pytest.mark.parametrize("name", ["x" * 5000 + ".txt", "~nobody-of-this-name/text.txt", "a\0b.txt"])
def test_names_that_no_file_can_have_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="no text file at"):
        read_documents(name)
