"""Text for training, of which there is more than fits into memory: windows of token ids in a file."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Final

import torch

from lrserve.errors import InputError
from lrserve.inputs.origin import on_disk
from lrserve.inputs.text import begin_of_sequence, document_stream, require_rows
from lrserve.storage.store import atomic_path, file_sha256

_AT_ONCE: Final = 256  # documents in one call of the tokenizer


def origin_fingerprint(origin: str) -> str:
    """Identify a text: a file by its content, sha256 as hex, and a dataset by its name."""
    found = on_disk(origin)
    return file_sha256(Path(found[0])) if found is not None and Path(found[0]).is_file() else origin


def write_windows(origin: str, tokenizer: Any, path: Path, *, length: int, tokens: int, rows: int, skip: frozenset[str]) -> None:
    """Write the windows of a text to a file, whole or not at all: int32 (windows, length).

    Documents are joined by blank lines, and every window begins with the BOS token that the model's sequences begin with
    (`text.token_windows`). A dataset is streamed. Memory: some documents.

    Args:
        origin: the text (`text.read_documents`).
        tokenizer: the model's.
        path: the file.
        length: tokens per window.
        tokens: how many are wanted; the text may have fewer.
        rows: of the model's embedding, in which every token must have one.
        skip: documents to leave out.

    Raises:
        InputError: nothing there, not text, less than one window, or a token that the embedding lacks.
    """
    bos = begin_of_sequence(tokenizer)
    body, wanted, written = length - len(bos), -(-tokens // length), 0
    documents = (text for text in document_stream(origin, tokenizer) if text not in skip)
    ids = array("i")
    with atomic_path(path) as partial, partial.open("wb") as file:
        for found in _token_ids(documents, tokenizer):
            ids.extend(found)
            count = min(len(ids) // body, wanted - written)
            if count:
                windows = torch.frombuffer(ids, dtype=torch.int32, count=count * body).clone().view(count, body)
                require_rows(origin, tokenizer, max([*bos, int(windows.max())]), rows)
                file.write(torch.cat([torch.tensor(bos, dtype=torch.int32).expand(count, -1), windows], dim=1).numpy().tobytes())
                del ids[: count * body]
                written += count
            if written == wanted:
                break
        if not written:
            raise InputError(f"{origin} has {len(ids)} tokens, less than one window of {length}: give more text")


def _token_ids(documents: Iterable[str], tokenizer: Any) -> Iterator[list[int]]:
    stream = iter(documents)
    while some := list(islice(stream, _AT_ONCE)):
        yield from tokenizer([text + "\n\n" for text in some], add_special_tokens=False)["input_ids"]


def read_windows(path: Path, length: int) -> torch.Tensor:
    """Return what `write_windows` wrote, as a map of the file: int32 (windows, length)."""
    size = path.stat().st_size // torch.int32.itemsize
    return torch.from_file(str(path), shared=False, size=size, dtype=torch.int32).view(-1, length)
