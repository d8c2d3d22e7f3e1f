"""What a file of weights is told by, without reading hundreds of gigabytes before a run's first line."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Final

from lrserve.storage.store import file_sha256

_WHOLE: Final = 2**26  # bytes of a file that is read whole
_SAMPLES: Final = 256  # of a larger one, evenly spaced; the first holds the head of a safetensors header, the last ends the file
_SAMPLE: Final = 2**16  # bytes
_BLOB: Final = re.compile("[0-9a-f]{64}")


def content_id(path: Path) -> str:
    """Identify a file's content: by its sha256 or, where it is large, by its size and a sample.

    The Hub's cache names large files by their sha256, which is taken from there. A large file that differs from another of its
    size in a few bytes may be told to be the same; weights that were trained, merged or converted differ everywhere.
    """
    blob = path.resolve()
    if path.is_symlink() and blob.parent.name == "blobs" and _BLOB.fullmatch(blob.name):
        return blob.name
    size = path.stat().st_size
    if size <= _WHOLE:
        return file_sha256(path)
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for index in range(_SAMPLES):
            file.seek(index * (size - _SAMPLE) // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE))
    return f"sampled-{digest.hexdigest()}"
