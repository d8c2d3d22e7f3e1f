"""Checks before the work starts: every folder that a run writes can be written, and its disk has room for all of them."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lrserve.errors import ArtifactError, reading, shown


@dataclass(frozen=True)
class Place:
    """A folder that a run writes.

    what: its name in messages, with the option or the variable that chooses it.
    folder: absolute; it need not exist.
    needed: bytes that will be written below it.
    replaced: whether the folder itself is exchanged for a new one.
    """

    what: str
    folder: Path
    needed: int
    replaced: bool = False


def require_space(places: Sequence[Place]) -> None:
    """Check that every place can be made and written, and that each disk has the space of all places on it; leaves nothing behind.

    Raises:
        ArtifactError: one cannot, or a disk has not.
    """
    disks: dict[int, list[tuple[Place, Path]]] = {}
    for place in places:
        if place.replaced and os.path.ismount(place.folder):
            raise ArtifactError(f"{place.folder} is a mount point, which cannot be replaced as a whole; choose a folder inside it")
        there = place.folder
        try:
            while not there.exists():
                there = there.parent
            with tempfile.TemporaryDirectory(prefix=".lrserve-", dir=there):  # what os.access says is not true of every file system
                device = there.stat().st_dev
        except OSError as error:
            raise ArtifactError(
                f"{place.what}: cannot write to {shown(str(there), 200)}: {error.strerror}; choose another place"
            ) from None
        disks.setdefault(device, []).append((place, there))
    for found in disks.values():
        needed, free = sum(place.needed for place, _ in found), shutil.disk_usage(found[0][1]).free
        if free < needed:
            parts = ", ".join(f"{place.what} {place.needed / 1e9:.2f} GB in {place.folder}" for place, _ in found if place.needed)
            raise ArtifactError(
                f"the disk has {free / 1e9:.2f} GB free and the job needs about {needed / 1e9:.2f} GB: {parts}; "
                "free some space or choose another place"
            )


def resolved(option: str, path: Path) -> Path:
    """Return the absolute path that an option gave.

    Raises:
        ArtifactError: no file system has such a path.
    """
    with reading(f"{option} {shown(str(path))}", "choose another place", ArtifactError):
        path = path.expanduser().resolve()
        path.exists()
    return path


def bytes_below(folder: Path) -> int:
    """Count the bytes of the files below a folder, which need not exist."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):  # another program may remove one meanwhile
                total += os.stat(os.path.join(root, name), follow_symlinks=False).st_size
    return total
