"""What lies in an artifact's folder, by names, kinds and sizes: held against the manifest, with no file opened.

A pipe that is opened waits for ever, a device may do anything, and a link leads to a file that nobody has hashed. So every entry is
looked at first, and what is no regular file is a fault.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Final

from lrserve.errors import ArtifactError

HARMLESS: Final = frozenset(
    {
        ".cache",  # a folder: what `hf download --local-dir` notes
        ".git",  # a folder: a clone of a repository of the Hub
        ".gitattributes",
        ".gitignore",
        ".DS_Store",
        "Thumbs.db",
        "desktop.ini",
        "LICENSE",
        "LICENSE.md",
        "LICENSE.txt",
        "NOTICE",
        "NOTICE.md",
        "NOTICE.txt",
    }
)
"""Files and folders that may lie in an artifact although its manifest does not name them, at any depth.

Other tools or the publisher add them, and no program that loads models reads them. In such a folder all is harmless but weights.
"""
_WEIGHTS: Final = (".safetensors", ".bin", ".pt", ".pth", ".pkl", ".ckpt", ".onnx", ".onnx_data", ".gguf", ".h5", ".msgpack")

MOST_FILES: Final = 10_000
"""That a manifest may name."""
MOST_BYTES: Final = 2**42
"""That it may say a file has."""
_LONGEST: Final = 1_000  # characters of a name
_SHOWN: Final = 100
_LEFTOVER: Final = re.compile(r".+\.partial-\d+(-[0-9a-f]+)?")  # of `store.atomic_path`: being written, or its writer was killed
_KINDS: Final[Sequence[tuple[Callable[[int], bool], str]]] = (
    (stat.S_ISREG, "a file"),
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISLNK, "a link"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
)


def is_name(name: str) -> bool:
    """Say whether this names a file inside a folder: a relative POSIX path that does not leave it."""
    parts = name.split("/")
    return name.isprintable() and len(name) <= _LONGEST and "\\" not in name and not {"", ".", ".."} & set(parts)


def shown(name: str) -> str:
    """Return a name for a message: on one line and not too long, whatever characters it has."""
    text = name if name.isprintable() else ascii(name)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


def is_hub_snapshot(folder: Path) -> bool:
    """Say whether a folder belongs to the cache of the Hugging Face Hub.

    Its files are links into the folder `blobs` beside `snapshots`, and those that nobody has asked for are not there.
    """
    return folder.resolve().parent.name == "snapshots"


def kind_and_size(path: Path) -> tuple[str, int]:
    """Return what is at a path, as `a file`, and its bytes; a link from the Hub's cache into its own blobs counts as the blob.

    Raises:
        OSError: there is nothing, or it cannot be looked at.
    """
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode) and (blob := _hub_blob(path)) is not None:
        status = blob.lstat()
    return next((kind for test, kind in _KINDS if test(status.st_mode)), "a device"), status.st_size


def _hub_blob(link: Path) -> Path | None:
    place = link.parent.resolve()
    snapshot = next((folder for folder in (place, *place.parents) if folder.parent.name == "snapshots"), None)
    target = Path(os.path.normpath(place / os.readlink(link)))
    return target if snapshot is not None and target.parent == snapshot.parent.parent / "blobs" else None


def read_regular(path: Path, most: int) -> bytes:
    """Read a file of at most so many bytes.

    Raises:
        FileNotFoundError: there is nothing.
        ArtifactError: it is no regular file, larger, or cannot be read.
    """
    try:
        kind, size = kind_and_size(path)
        if kind != "a file":
            raise ArtifactError(f"{path} is {kind}, not a file; copy or export the artifact again")
        if size > most:
            raise ArtifactError(f"{path} has {size} bytes, far more than such a file needs; copy or export the artifact again")
        return path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}; check its permissions and the disk") from error


def folder_faults(folder: Path, sizes: Mapping[str, int | None], own: str, needed: Callable[[str], bool]) -> dict[str, str]:
    """Hold what lies in a folder against names and sizes.

    Args:
        folder: the artifact.
        sizes: bytes of each file that belongs there; None is any number.
        own: the name of the file that says so, which belongs there too.
        needed: says of a name whether its absence is a fault.

    Returns:
        A line for each fault, by the name that it is about.

    Raises:
        ArtifactError: a folder cannot be listed.
    """
    parents = {str(parent) for name in sizes for parent in PurePosixPath(name).parents}
    faults: dict[str, str] = {}
    found: set[str] = set()
    waiting = [PurePosixPath()]
    while waiting:
        at = waiting.pop()
        try:
            entries = [(str(at / entry), kind_and_size(folder / at / entry)) for entry in sorted(os.listdir(folder / at))]
        except OSError as error:
            raise ArtifactError(f"{folder / at} cannot be listed: {error.strerror}; check its permissions and the disk") from error
        for name, (kind, size) in entries:
            found.add(name)
            belongs = name in sizes or name == own or (kind == "a folder" and name in parents)
            harmless = _is_harmless(PurePosixPath(name))
            if kind == "a folder" and (name in parents or harmless):
                waiting.append(PurePosixPath(name))
            if kind not in ("a file", "a folder") or (name in sizes and kind != "a file"):
                faults[name] = f"{shown(name)} is {kind}, not a file"
            elif sizes.get(name) not in (None, size):
                faults[name] = f"{shown(name)} has {size} bytes, the manifest says {sizes[name]}"
            elif not belongs and not harmless:
                faults[name] = f"{shown(name)} is not in the manifest"
    return faults | {name: f"{shown(name)} is missing" for name in sizes if name not in found and needed(name)}


def _is_harmless(path: PurePosixPath) -> bool:
    named = not HARMLESS.isdisjoint(path.parts) or _LEFTOVER.fullmatch(path.name) is not None
    return named and not path.name.endswith(_WEIGHTS)
