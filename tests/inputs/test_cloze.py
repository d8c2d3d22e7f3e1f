"""The task made from text: the sentence that follows, among sentences of other documents."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from lrserve.errors import InputError
from lrserve.inputs.cloze import CLOZE, cloze_items, write_cloze
from lrserve.inputs.text import Documents


def document(name: str, sentences: int = 5) -> str:
    return " ".join(f"The {name} did the thing with number {number * 7} for all to see." for number in range(sentences))


TEXTS = [document(f"animal{index}") for index in range(12)]


def test_the_answer_follows_the_passage_and_the_others_are_of_other_documents() -> None:
    items = cloze_items(TEXTS, 20)
    assert len(items) == 20
    for item in items:
        (text,) = [text for text in TEXTS if item["context"] in text]
        assert len(item["choices"]) == len(set(item["choices"])) == 4
        assert f"{item['context']} {item['choices'][item['answer']]}" in text
        assert sum(choice in text for choice in item["choices"]) == 1
    assert len({item["context"].split()[1] for item in items[:12]}) == 12  # each document once before one comes again
    assert {item["answer"] for item in items} == {0, 1, 2, 3}


def test_equal_arguments_give_equal_items_and_another_seed_others() -> None:
    assert cloze_items(TEXTS, 10, seed=3) == cloze_items(TEXTS, 10, seed=3)
    assert cloze_items(TEXTS, 10, seed=3) != cloze_items(TEXTS, 10, seed=4)


def test_the_choices_are_about_equally_long() -> None:
    short, long = (
        "A sentence that is short, number {}.",
        "A sentence that is a good deal longer than those are, number {}.",
    )
    texts = [" ".join(pattern.format(10 * index + n) for n in range(6)) for index, pattern in enumerate([short, long] * 10)]
    for item in cloze_items(texts, 20):
        lengths = [len(choice) for choice in item["choices"]]
        assert max(lengths) - min(lengths) < 5


def test_headings_and_lists_are_no_choices() -> None:
    texts = [f"{text}\n\nA heading without an end that is long enough\n- an entry of a list, without an end too" for text in TEXTS]
    for item in cloze_items(texts, 40):
        assert all(choice.endswith(".") for choice in item["choices"])


def test_text_that_is_too_little_is_refused() -> None:
    for texts in ([], TEXTS[:1], ["No sentence is followed by another one here."] * 50):
        with pytest.raises(InputError, match="questions can be made from the text, 8 are needed"):
            cloze_items(texts, 100)
    assert len(cloze_items(TEXTS, 3)) == 3  # a --limit may ask for fewer
    assert len(cloze_items(TEXTS, 10**6)) <= 12 * 4


def test_the_task_file_names_its_items(tmp_path: Path) -> None:
    task = yaml.safe_load(write_cloze(Documents("text", tuple(TEXTS)), tmp_path, 9).read_text())
    assert task["task"] == CLOZE
    items = Path(task["dataset_kwargs"]["data_files"]["test"])
    assert items.is_absolute()
    assert [json.loads(line) for line in items.read_text().splitlines()] == cloze_items(TEXTS, 9)
