"""Text by use: documents from files or datasets, cut into disjoint parts and into windows of token ids."""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lrserve.errors import InputError

_DATASET_DOCUMENTS = 20_000
# Shares of one text that serves all three uses: calibration needs by far the most.
_SPLIT = (0.8, 0.9)


@dataclass(frozen=True)
class Documents:
    """An ordered list of documents, and what the user called their origin."""

    name: str
    texts: tuple[str, ...]

    def fingerprint(self) -> str:
        """Return sha256 of the content, as hex."""
        digest = hashlib.sha256()
        for text in self.texts:
            digest.update(text.encode())
            digest.update(b"\0")
        return digest.hexdigest()


def read_documents(origin: str) -> Documents:
    """Read a .jsonl file (one object with a "text" per line), any other text file, or a Hub dataset by name.

    In a plain text file, blank lines end a document. A dataset is `owner/name` or `owner/name:config`; its "train" split
    is streamed, up to 20,000 documents.

    Raises:
        InputError: nothing there, not text, or no text in it.
    """
    place = os.path.expanduser(origin)  # unlike pathlib's, neither this nor what follows raises for strange names
    path = Path(place)
    if os.path.isfile(place):
        texts = _read_file(path)
    elif os.path.exists(place) or path.suffix in {".txt", ".jsonl", ".utf8"} or origin.startswith((".", "/", "~")):
        raise InputError(f"no text file at {path}; check the path, or name a Hub dataset")
    else:
        texts = _read_dataset(origin)
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise InputError(f"{origin} holds no text; give a file or dataset with some")
    return Documents(name=origin, texts=tuple(texts))


def _read_file(path: Path) -> list[str]:
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path} as UTF-8 text: {error}; check the file") from None
    if path.suffix != ".jsonl":
        return content.split("\n\n")
    texts = []
    for number, line in enumerate(content.split("\n"), 1):  # not splitlines, which also splits inside JSON strings
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError):
            text = None
        if not isinstance(text, str):
            raise InputError(f'{path} line {number} is not a JSON object with a "text" string; fix or remove the line')
        texts.append(text)
    return texts


def _read_dataset(name: str) -> list[str]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise InputError(
            f"no text file at {name!r}; if it is a Hub dataset, install the reader: pip install 'lrserve[datasets]'"
        ) from None
    repository, _, config = name.partition(":")
    try:
        stream = load_dataset(repository, config or None, split="train", streaming=True)
        return [str(row["text"]) for _, row in zip(range(_DATASET_DOCUMENTS), stream, strict=False)]
    except Exception as error:
        # the datasets library raises whatever its file formats and HTTP client raise
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"neither a text file nor a readable Hub dataset with a 'text' column: {name!r} ({type(error).__name__}: {reason})"
        ) from None


@dataclass(frozen=True)
class Texts:
    """Documents for calibration, for the search's validation, and for the final report; no document serves two uses."""

    calibration: Documents
    validation: Documents
    report: Documents


def load_texts(calibration: str | None, validation: str | None, report: str | None) -> Texts:
    """Read the texts; what is not given is cut from the end of the calibration text, by documents.

    Raises:
        InputError: no calibration text, too few documents to cut, or a document that serves two uses.
    """
    if calibration is None:
        raise InputError("no calibration text; give --calibration a text file or a Hub dataset")
    everything = read_documents(calibration)
    rest = list(everything.texts)
    parts: dict[str, Documents] = {}
    for use, given, share in (("report", report, _SPLIT[1]), ("validation", validation, _SPLIT[0])):
        if given is not None:
            parts[use] = read_documents(given)
            continue
        keep = _prefix_of(rest, share if use == "report" else share / (_SPLIT[1] if report is None else 1))
        if keep == 0 or keep == len(rest):
            raise InputError(f"{calibration} has too few documents to cut a {use} part from; give a {use} text of its own")
        parts[use] = Documents(name=f"{calibration} ({use} part)", texts=tuple(rest[keep:]))
        rest = rest[:keep]
    return _disjoint(Texts(Documents(everything.name, tuple(rest)), parts["validation"], parts["report"]), validation, report)


def _prefix_of(texts: Sequence[str], share: float) -> int:
    """Count the leading documents that hold `share` of the characters."""
    limit = share * sum(map(len, texts))
    total = 0
    for index, text in enumerate(texts):
        total += len(text)
        if total > limit:
            return index
    return len(texts)


def _disjoint(texts: Texts, validation: str | None, report: str | None) -> Texts:
    """Leave out of the parts that lrserve cut what stands in an earlier part; refuse that in a part that the user gave."""
    long = 200  # shorter documents, such as headings, may well repeat
    seen = {text for text in texts.calibration.texts if len(text) >= long}
    parts = []
    for use, part, given in (("validation", texts.validation, validation), ("report", texts.report, report)):
        repeated = [text for text in part.texts if text in seen]
        if repeated and given is not None:
            raise InputError(
                f"the {use} text {given} repeats a document of an earlier use ({' '.join(repeated[0].split())[:60]!r}...): "
                "what it measures would not be unseen; give disjoint texts"
            )
        parts.append(Documents(part.name, tuple(text for text in part.texts if text not in seen)))
        seen |= {text for text in part.texts if len(text) >= long}
    return Texts(texts.calibration, parts[0], parts[1])


def token_windows(
    tokenizer: Any,
    documents: Documents,
    length: int,
    count: int | None = None,
    seed: int | None = None,
    up_to: int | None = None,
) -> torch.Tensor:
    """Cut documents into windows of token ids, int64 (windows, length).

    Documents are joined by blank lines. A model that starts every sequence with a BOS token gets it in every window.

    Args:
        tokenizer: a transformers tokenizer.
        documents: the text.
        length: tokens per window, BOS included.
        count: most windows; all that there are when None. Text that has fewer gives those (`shortage` says so).
        seed: choose the windows at random; with None they are spread evenly over the text.
        up_to: take more than `count` windows, up to so many, where the text has them.

    Raises:
        InputError: not one window.
    """
    ids = array("q")  # 8 bytes a token, where a list takes several times that
    for text in documents.texts:
        ids.extend(tokenizer(text + "\n\n", add_special_tokens=False)["input_ids"])
    bos = _bos(tokenizer)
    body = length - len(bos)
    available = len(ids) // body if body > 0 else 0
    if available == 0:
        raise InputError(
            f"{documents.name} has {len(ids)} tokens, less than one window of {length}: give more text, or set a smaller length "
            "in the recipe (calibration.length, search.validation_length, report.length, report.prompt_tokens)"
        )
    windows = torch.frombuffer(ids, dtype=torch.int64)[: available * body].clone().view(available, body)
    if bos:
        windows = torch.cat([torch.tensor([bos]).expand(available, 1), windows], dim=1)
    if count is None:
        return windows
    count = min(available, max(count, up_to or 0))
    if seed is None:
        return windows[torch.linspace(0, available - 1, count).round().long()]
    return windows[torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:count]]


def shortage(documents: Documents, windows: torch.Tensor, asked: int, setting: str, effect: str) -> str | None:
    """Return a warning if a text gave fewer than `asked` windows, those that `setting` asks for; `effect` is what that means."""
    count, length = windows.shape
    if count >= asked:
        return None
    return (
        f"warning: {documents.name} has {count * length:,} of the {asked * length:,} tokens that {setting} asks for; "
        f"all of them are used. {effect}: give more text for a better result"
    )


def _bos(tokenizer: Any) -> list[int]:
    ids = tokenizer("a")["input_ids"]
    return [ids[0]] if tokenizer.bos_token_id is not None and ids and ids[0] == tokenizer.bos_token_id else []
