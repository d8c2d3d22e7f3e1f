"""A multiple-choice task made from any text: which of four sentences follows a passage?

One choice is the sentence that follows in the document. The three others are sentences of other documents, of about the same
length. A model that reads the passage prefers the first; a model that does not picks one in four.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import yaml

from lrserve.errors import InputError
from lrserve.inputs.text import Documents

CLOZE: Final = "lrserve_cloze"
"""Name of the task."""
CLOZE_ITEMS: Final = 200

_CHOICES: Final = 4
_FEWEST: Final = 8  # items; with fewer the task says nothing
_CONTEXT: Final = (60, 300)  # characters before the sentence: at least, and about at most
_SENTENCE: Final = (30, 300)  # characters of a choice
_CANDIDATES: Final = 48  # sentences among which those of the most similar length are taken
_END: Final = re.compile(r"(?<=[.!?])\s+|(?<=[.!?][\"'”’)\]])\s+|(?<=[。！？])|\n+")
_WHOLE: Final = re.compile(r"[.!?。！？][\"'”’)\]]?$")


def cloze_items(texts: Sequence[str], count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Make up to `count` items from documents; equal arguments give equal items.

    The first items are of different documents, so that they are as independent as the text allows.

    Returns:
        Items as `context`, `choices` (four sentences) and `answer`, the index of the one that follows.

    Raises:
        InputError: fewer than 8 items can be made.
    """
    documents = [[" ".join(part.split()) for part in _END.split(text) if part.strip()] for text in texts]
    pool = [(index, part) for index, parts in enumerate(documents) for part in parts if _is_choice(part)]
    generator = random.Random(seed)
    items: list[dict[str, Any]] = []
    for index, context, following in _places(documents, generator):
        if len(items) == count:
            break
        candidates = generator.sample(pool, min(_CANDIDATES, len(pool)))
        others = list(dict.fromkeys(part for other, part in candidates if other != index and part != following))
        others = sorted(others, key=lambda part: abs(len(part) - len(following)))[: _CHOICES - 1]
        if len(others) < _CHOICES - 1:
            continue
        choices = [following, *others]
        generator.shuffle(choices)
        items.append({"context": context, "choices": choices, "answer": choices.index(following)})
    if len(items) < min(_FEWEST, count):
        raise InputError(
            f"{len(items)} questions can be made from the text, {_FEWEST} are needed: give a text with more documents of several "
            "sentences, or a task of your own"
        )
    return items


def _is_choice(sentence: str) -> bool:
    shortest, longest = _SENTENCE
    return shortest <= len(sentence) <= longest and _WHOLE.search(sentence) is not None


def _places(documents: Sequence[Sequence[str]], generator: random.Random) -> Iterator[tuple[int, str, str]]:
    """Yield (document, passage, the sentence after it): one of each document in random order, then a second of each, and so on."""
    least, most = _CONTEXT
    found: list[tuple[int, float, tuple[int, str, str]]] = []
    for index, parts in enumerate(documents):
        places = []
        for at in range(1, len(parts)):
            begin = at - 1
            while begin > 0 and sum(map(len, parts[begin - 1 : at])) <= most:
                begin -= 1
            context = " ".join(parts[begin:at])
            if least <= len(context) <= 2 * most and _is_choice(parts[at]):
                places.append((index, context, parts[at]))
        generator.shuffle(places)
        found += [(turn, generator.random(), place) for turn, place in enumerate(places)]
    for _, _, place in sorted(found, key=lambda entry: entry[:2]):
        yield place


def write_cloze(documents: Documents, folder: Path, count: int = CLOZE_ITEMS, *, seed: int = 0) -> Path:
    """Write the task of some documents for lm-evaluation-harness, and return its YAML file.

    Raises:
        InputError: too little text.
    """
    items = folder / f"{CLOZE}.jsonl"
    lines = (json.dumps(item, ensure_ascii=False) + "\n" for item in cloze_items(documents.texts, count, seed=seed))
    items.write_text("".join(lines), encoding="utf-8")
    task = {
        "task": CLOZE,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(items.resolve())}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "context",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1},
    }
    path = folder / f"{CLOZE}.yaml"
    path.write_text(yaml.safe_dump(task, sort_keys=False), encoding="utf-8")
    return path
