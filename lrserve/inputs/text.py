"""Text by use: documents from files or datasets, cut into disjoint parts and into windows of token ids."""

from __future__ import annotations

import hashlib
import os
import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch

from lrserve.errors import InputError, one_line, shown
from lrserve.inputs.formats import SUFFIXES, Table, read_file
from lrserve.inputs.origin import DatasetName, dataset_name, hub_dataset, on_disk
from lrserve.inputs.records import each_text, texts_of

_DATASET_DOCUMENTS = 20_000
# Shares of one text that serves all three uses: calibration needs by far the most.
_SPLIT = (0.8, 0.9)
_FEWEST_WHOLE = 0.5  # of a part's share: where whole documents give less, one is cut
_LONGEST_NAME = 300  # characters of an origin in a message
_BLANK = re.compile(r"^[^\S\n]+$", re.MULTILINE)
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Documents:
    """An ordered list of documents, what the user called their origin, and what reading them left to say."""

    name: str
    texts: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def fingerprint(self) -> str:
        """Return sha256 of the content, as hex."""
        digest = hashlib.sha256()
        for text in self.texts:
            digest.update(text.encode())
            digest.update(b"\0")
        return digest.hexdigest()


def read_documents(origin: str, tokenizer: Any = None) -> Documents:
    """Read a file, a dataset in a folder, or one on the Hub.

    A file is `PATH` or `PATH:COLUMN`: .jsonl, .ndjson, .json, .csv, .tsv or .parquet with a column `text`, or `messages` or
    `conversations` for the chat template of `tokenizer`; or any other text in UTF-8. Blank lines end a document there, and where
    they do not make two, each line is a document. All may be packed by gzip.

    A dataset is `NAME:CONFIG:SPLIT:COLUMN`, of which all but the name, `owner/name` or a folder, may be left out or empty. The
    split is `train` if none is named; it is streamed, up to 20,000 documents.

    Raises:
        InputError: nothing there, not text, or no text in it.
    """
    found, column = _opened(origin, _DATASET_DOCUMENTS)
    if isinstance(found, str):
        texts, empty = _documents(found), 0
    else:
        texts, empty = texts_of(found, column, origin, tokenizer)
    texts, replaced = _without_surrogates([text for text in texts if text.strip()])
    if not texts:
        raise InputError(f"{origin} holds no text; give a file or dataset with some")
    notes = [f"warning: {empty:,} records of {origin} have no text (null): left out"] * bool(empty)
    notes += [f"warning: {replaced:,} lone surrogates in {origin} became U+FFFD: they are no characters"] * bool(replaced)
    return Documents(origin, tuple(texts), tuple(notes))


def document_stream(origin: str, tokenizer: Any = None) -> Iterator[str]:
    """Yield the documents of an origin (`read_documents`) one by one; a dataset is streamed to its end.

    Raises:
        InputError: nothing there, or not text.
    """
    found, column = _opened(origin, None)
    texts = iter(_documents(found)) if isinstance(found, str) else each_text(found, column, origin, tokenizer)
    for text in texts:
        if text is not None and text.strip():
            yield from _without_surrogates([text])[0]


def _opened(origin: str, most: int | None) -> tuple[str | Table, str | None]:
    """Return prose, or records and the column that the origin names; at most so many documents of a dataset."""
    found = on_disk(origin)
    if found is not None and os.path.isfile(found[0]):
        return read_file(Path(found[0])), found[1] or None
    if found is not None and os.path.isdir(found[0]):
        dataset = dataset_name(*found)
    else:
        place = Path(origin.partition(":")[0])
        is_path = found is not None or place.suffix.lower() in SUFFIXES or origin.startswith((".", "/", "~"))
        dataset = None if is_path else hub_dataset(origin)
    if dataset is None:
        shown = os.path.expanduser(origin) if len(origin) <= _LONGEST_NAME else f"{origin[:_LONGEST_NAME]}..."
        raise InputError(f"no text file at {shown}; check the path, or name a Hub dataset as owner/name:CONFIG:SPLIT:COLUMN")
    return _read_dataset(dataset, origin, most), dataset.column


def _documents(text: str) -> list[str]:
    """Cut prose into documents at blank lines, which may hold spaces; where those do not make two, into lines."""
    parts = _BLANK.sub("", text).split("\n\n")
    return parts if sum(1 for part in parts if part.strip()) > 1 else text.split("\n")


def _without_surrogates(texts: list[str]) -> tuple[list[str], int]:
    """Return texts in which every surrogate has its pair, and how many had none: no text in UTF-8 can hold those."""
    total = 0
    for index, text in enumerate(texts):
        if _SURROGATE.search(text):
            paired = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")
            texts[index], count = _SURROGATE.subn("\ufffd", paired)
            total += count
    return texts, total


def _read_dataset(dataset: DatasetName, origin: str, most: int | None) -> Table:
    try:
        from datasets import load_dataset
    except ImportError:
        raise InputError(
            f"no text file at {origin!r}; if it is a dataset, install the reader: pip install 'lrserve[datasets]'"
        ) from None

    def unreadable(error: Exception) -> InputError:
        # the datasets library raises whatever its file formats and HTTP client raise
        return InputError(f"neither a text file nor a readable dataset: {origin!r} ({one_line(error)})")

    try:
        rows = iter(load_dataset(dataset.place, dataset.config, split=dataset.split or "train", streaming=True))
        first = list(islice(rows, 1))
    except Exception as error:
        raise unreadable(error) from None

    def values(column: str) -> Iterator[tuple[str, Any]]:
        try:
            for number, row in enumerate(islice(chain(first, rows), most), 1):
                yield f"row {number}", row[column]
        except InputError:
            raise
        except Exception as error:
            raise unreadable(error) from None

    return Table(tuple(first[0]) if first else (), values)


@dataclass(frozen=True)
class Texts:
    """Documents for calibration, for the search's validation, and for the final report; no document serves two uses.

    `notes` are lines for the user: what reading and cutting the texts came to.
    """

    calibration: Documents
    validation: Documents
    report: Documents
    notes: tuple[str, ...] = ()


def load_texts(
    calibration: str | Sequence[tuple[str, float | None]] | None, validation: str | None, report: str | None, tokenizer: Any = None
) -> Texts:
    """Read the texts; what is not given is cut from the end of the calibration text.

    Args:
        calibration: an origin (`read_documents`), or several, each with its share of the characters. With None for all shares,
            all of the text is taken.
        validation, report: origins.
        tokenizer: the model's, for its chat template.

    Raises:
        InputError: no calibration text, too little text to cut, or a document that serves two uses.
    """
    if not calibration:
        raise InputError("no calibration text; give --calibration a text file or a Hub dataset")
    if isinstance(calibration, str):
        everything = read_documents(calibration, tokenizer)
    else:
        everything = mixed([(read_documents(origin, tokenizer), share) for origin, share in calibration])
    notes = list(everything.notes)
    rest = list(everything.texts)
    parts: dict[str, Documents] = {}
    for use, given, share in (("report", report, _SPLIT[1]), ("validation", validation, _SPLIT[0])):
        if given is not None:
            parts[use] = read_documents(given, tokenizer)
            notes += parts[use].notes
            continue
        rest, tail, whole = _cut(rest, share if use == "report" else share / (_SPLIT[1] if report is None else 1))
        if not any(map(str.strip, rest)) or not any(map(str.strip, tail)):
            raise InputError(
                f"{everything.name} has too few documents, and too little text, to cut a {use} part from; "
                f"give a {use} text of its own"
            )
        if not whole:
            notes.append(
                f"warning: {everything.name} has so few documents that one is cut: its {use} part continues what calibration sees. "
                f"Give a {use} text of its own for a figure on unseen documents"
            )
        parts[use] = Documents(name=f"{everything.name} ({use} part)", texts=tuple(tail))
    texts = Texts(Documents(everything.name, tuple(rest)), parts["validation"], parts["report"], tuple(notes))
    return _disjoint(texts, validation, report)


def mixed(sources: Sequence[tuple[Documents, float | None]]) -> Documents:
    """Interleave documents so that every stretch holds each source's share of the characters.

    Args:
        sources: documents, and their share of the result; the longest such result is returned, the last document of a source cut
            where need be. With None for all shares, all documents are in it.
    """
    sizes = [sum(map(len, documents.texts)) for documents, _ in sources]
    shares = [size if share is None else share for size, (_, share) in zip(sizes, sources, strict=True)]
    scale = min(size / share for size, share in zip(sizes, shares, strict=True))
    placed: list[tuple[float, int, str]] = []
    taken = []
    for number, ((documents, _), share) in enumerate(zip(sources, shares, strict=True)):
        begin, most = 0, round(scale * share)
        for text in documents.texts:
            if begin >= most:
                break
            placed.append((begin / share, number, text[: most - begin]))
            begin += len(text)
        taken.append(min(begin, most))
    placed.sort(key=lambda entry: entry[:2])
    notes = [note for documents, _ in sources for note in documents.notes]
    if taken != sizes:
        parts = (
            f"{own:,} of {size:,} of {documents.name}" for own, size, (documents, _) in zip(taken, sizes, sources, strict=True)
        )
        notes.append(f"calibration text, characters: {'; '.join(parts)}")
    return Documents(" and ".join(documents.name for documents, _ in sources), tuple(text for *_, text in placed), tuple(notes))


def _cut(texts: Sequence[str], share: float) -> tuple[list[str], list[str], bool]:
    """Cut off the leading documents that hold `share` of the characters, and say whether that cut none of them.

    Where whole documents are far from that share, the one in which it ends is cut at a space.
    """
    limit = share * sum(map(len, texts))
    total = 0
    index = 0
    while total + len(texts[index]) <= limit:
        total += len(texts[index])
        index += 1
    text = texts[index]
    if total >= _FEWEST_WHOLE * limit:
        return list(texts[:index]), list(texts[index:]), True
    at = int(limit) - total
    at = max(text.rfind(" ", at // 2, at), text.rfind("\n", at // 2, at)) + 1 or at
    return [*texts[:index], text[:at]], [text[at:], *texts[index + 1 :]], False


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
    return Texts(texts.calibration, parts[0], parts[1], texts.notes)


def token_windows(
    tokenizer: Any,
    documents: Documents,
    length: int,
    count: int | None = None,
    seed: int | None = None,
    up_to: int | None = None,
    rows: int | None = None,
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
        rows: of the model's embedding, in which every token of the text must have one; None does not ask.

    Raises:
        InputError: not one window, or a token that the embedding lacks.
    """
    ids = array("q")  # 8 bytes a token, where a list takes several times that
    for text in documents.texts:
        ids.extend(tokenizer(text + "\n\n", add_special_tokens=False)["input_ids"])
    bos = begin_of_sequence(tokenizer)
    body = length - len(bos)
    available = len(ids) // body if body > 0 else 0
    if available == 0:
        raise InputError(
            f"{documents.name} has {len(ids)} tokens, less than one window of {length}: give more text, or set a smaller length "
            "in the recipe (calibration.length, search.validation_length, report.length, report.prompt_tokens)"
        )
    tokens = torch.frombuffer(ids, dtype=torch.int64)
    if rows is not None:
        require_rows(documents.name, tokenizer, max([*bos, int(tokens.max())]), rows)
    windows = tokens[: available * body].clone().view(available, body)
    if bos:
        windows = torch.cat([torch.tensor([bos]).expand(available, 1), windows], dim=1)
    if count is None:
        return windows
    count = min(available, max(count, up_to or 0))
    if seed is None:
        return windows[torch.linspace(0, available - 1, count).round().long()]
    return windows[torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:count]]


def require_rows(name: str, tokenizer: Any, largest: int, rows: int) -> None:
    """Check that an embedding of so many rows has one for the largest token of a text.

    Raises:
        InputError: it has none.
    """
    if largest >= rows:
        raise InputError(
            f"{name}: the tokenizer makes token {largest} ({shown(tokenizer.convert_ids_to_tokens(largest))}) of it, and "
            f"the model's embedding has {rows} tokens; give the tokenizer that belongs to the model"
        )


def shortage(documents: Documents, windows: torch.Tensor, asked: int, setting: str, effect: str) -> str | None:
    """Return a warning if a text gave fewer than `asked` windows, those that `setting` asks for; `effect` is what that means."""
    count, length = windows.shape
    if count >= asked:
        return None
    return (
        f"warning: {documents.name} has {count * length:,} of the {asked * length:,} tokens that {setting} asks for; "
        f"all of them are used. {effect}: give more text for a better result"
    )


def begin_of_sequence(tokenizer: Any) -> list[int]:
    """Return the BOS token with which the model's sequences begin; none where they begin with no such token."""
    ids = tokenizer("a")["input_ids"]
    return [ids[0]] if tokenizer.bos_token_id is not None and ids and ids[0] == tokenizer.bos_token_id else []
