"""Damage that a file in the work folder can be told by, without what wrote it: cut short, emptied, overwritten by zeros."""

from __future__ import annotations

import json
import sqlite3
import zipfile
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Final

from safetensors import SafetensorError, safe_open


def damage(path: Path) -> str | None:
    """Say what is wrong with a file, as the end of a sentence that begins with its path; None for nothing that is known.

    Raises:
        OSError: it cannot be read.
    """
    check = _CHECKS.get(path.suffix)
    if check is None:
        return None
    if not path.is_file():
        return "is no file"
    return check(path) if path.stat().st_size else "is empty"


def _json(path: Path) -> str | None:
    try:
        json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return "is damaged: no JSON"
    return None


def _safetensors(path: Path) -> str | None:
    try:
        with safe_open(path, framework="np"):  # compares the header with the file's length
            return None
    except SafetensorError:
        return "is cut short or damaged"


def _sqlite(path: Path) -> str | None:
    try:
        with closing(sqlite3.connect(path, timeout=0)) as database:
            ((answer, *_), *_) = database.execute("PRAGMA quick_check(1)")
    except sqlite3.OperationalError:  # in use by another program: `study` waits for it
        return None
    except sqlite3.DatabaseError as error:
        return f"is damaged: {error}"
    return None if answer == "ok" else f"is damaged: {' '.join(answer.split())}"


def _zip(path: Path) -> str | None:
    return None if zipfile.is_zipfile(path) else "is cut short or damaged"


_CHECKS: Final[Mapping[str, Callable[[Path], str | None]]] = {
    ".json": _json,
    ".safetensors": _safetensors,
    ".sqlite3": _sqlite,
    ".pt": _zip,
}
