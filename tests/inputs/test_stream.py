"""Windows in a file: those that all of a text in memory gives, of datasets of any length, and never what is held out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import VOCABULARY, tiny_tokenizer, write_text

from lrserve.errors import InputError
from lrserve.inputs.stream import origin_fingerprint, read_windows, write_windows
from lrserve.inputs.text import read_documents, token_windows


def written(origin: Path | str, path: Path, **options: Any) -> torch.Tensor:
    how: dict[str, Any] = {"length": 32, "tokens": 10**9, "rows": VOCABULARY, "skip": frozenset(), **options}
    tokenizer = how.pop("tokenizer", None) or tiny_tokenizer()
    write_windows(str(origin), tokenizer, path, **how)
    return read_windows(path, how["length"])


@pytest.mark.parametrize("bos", [False, True])
def test_the_windows_are_those_of_the_text_in_memory(bos: bool, tmp_path: Path) -> None:
    origin, tokenizer = write_text(tmp_path / "text.jsonl", 600), tiny_tokenizer(bos=bos)
    expected = token_windows(tokenizer, read_documents(str(origin)), 32)
    found = written(origin, tmp_path / "all.bin", tokenizer=tokenizer)
    assert found.dtype == torch.int32
    assert torch.equal(found.long(), expected)
    some = written(origin, tmp_path / "some.bin", tokenizer=tokenizer, tokens=1000)
    assert torch.equal(some.long(), expected[:32])


def test_a_dataset_is_streamed_past_the_documents_that_fit_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lrserve.inputs.text._DATASET_DOCUMENTS", 5)
    folder = tmp_path / "dataset"
    folder.mkdir()
    write_text(folder / "train.jsonl", 600)
    assert len(read_documents(str(folder)).texts) == 5
    assert torch.equal(written(folder, tmp_path / "all.bin"), written(folder / "train.jsonl", tmp_path / "same.bin"))


def test_what_is_held_out_is_left_out(tmp_path: Path) -> None:
    texts = [f"{letter} " * 40 for letter in "abc"]
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in (*texts, None)))
    tokenizer = tiny_tokenizer()
    decoded = tokenizer.decode(written(path, tmp_path / "w.bin", skip=frozenset({texts[1]})).flatten().tolist())
    assert "a a" in decoded
    assert "c c" in decoded
    assert "b" not in decoded


@pytest.mark.parametrize(
    ("options", "message"),
    [({"length": 10**6}, "tokens, less than one window of 1000000"), ({"rows": 40}, "the model's embedding has 40 tokens")],
)
def test_what_cannot_be_used_is_named_and_nothing_is_left(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    origin = write_text(tmp_path / "text.jsonl", 20)
    with pytest.raises(InputError, match=message):
        written(origin, tmp_path / "w.bin", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["text.jsonl"]


def test_a_file_is_identified_by_its_content(tmp_path: Path) -> None:
    one, other = write_text(tmp_path / "one.jsonl", 20), write_text(tmp_path / "other.jsonl", 20)
    assert origin_fingerprint(f"{one}:text") == origin_fingerprint(str(other))
    write_text(other, 21)
    assert origin_fingerprint(str(one)) != origin_fingerprint(str(other))
    assert origin_fingerprint("owner/name:config") == "owner/name:config"
