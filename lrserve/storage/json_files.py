"""Reading JSON that a user or a program of another version wrote: bounded, and an object or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from lrserve.errors import InputError, LrserveError, reading

_MOST_BYTES: Final = 64 * 2**20  # of a file: the index of a model with a hundred thousand tensors has 10 MB


def read_object(path: Path, advice: str = "check the file", raised: type[LrserveError] = InputError) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Args:
        path: the file.
        advice: the next step, for the message.
        raised: class of the error.

    Raises:
        LrserveError: of class `raised`. The file cannot be read, is no regular file, is too large, or holds something else.
    """
    if not path.exists():
        raise raised(f"{path} is missing; {advice}")
    with reading(path, advice, raised):
        if not path.is_file():  # a pipe would be waited for
            raise raised(f"{path} is not a regular file; {advice}")
        if (size := path.stat().st_size) > _MOST_BYTES:
            raise raised(f"{path} has {size} bytes, far more than such a file needs; {advice}")
        found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise raised(f"{path} holds {_KINDS.get(type(found), 'a number')}, not a JSON object; {advice}")
    return found


_KINDS: Final = {list: "a list", str: "a string", bool: "true or false", type(None): "null"}
