"""Writing folders so that they are either whole or not there: stage, flush to disk, publish by renaming."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lrserve.errors import ArtifactError

MANIFEST = "manifest.json"
MANIFEST_VERSION = 1


def replace_folder(staging: Path, target: Path) -> None:
    """Move a finished folder to its place; a folder that is already there is replaced and then removed."""
    _flush(staging)
    old = None
    if target.exists():
        old = target.with_name(f".{target.name}.replaced-{os.getpid()}")
        target.rename(old)
    try:
        staging.rename(target)
    except OSError:
        if old is not None:
            old.rename(target)
        raise
    if old is not None:
        shutil.rmtree(old)


def _flush(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        if path.is_symlink():
            continue
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_json(path: Path, data: Any) -> None:
    """Write JSON to a temporary neighbour and rename it into place."""
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    partial.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def fingerprint(data: Any) -> str:
    """Return sha256 of a JSON value, as hex."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _open_staging(out: Path, needed_bytes: int) -> Path:
    """Make a private folder beside `out`, on the same file system, so that publishing is one rename."""
    staging = out.with_name(f".{out.name}.staging-{os.getpid()}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
        free = shutil.disk_usage(staging).free
    except OSError as error:
        raise ArtifactError(f"cannot write to {out.parent}: {error.strerror}; choose another -o or fix its permissions") from None
    if free < needed_bytes:
        staging.rmdir()
        raise ArtifactError(
            f"{out.parent} has {free / 1e9:.2f} GB free and the export needs about {needed_bytes / 1e9:.2f} GB; "
            "free some space or choose another -o"
        )
    return staging


def check_place(out: Path, needed_bytes: int) -> None:
    """Try, before the work starts, whether `out` can be written and has the space.

    Raises:
        ArtifactError: it cannot, or has not.
    """
    _open_staging(out, needed_bytes).rmdir()


@contextmanager
def staged(out: Path, needed_bytes: int) -> Iterator[Path]:
    """Give a private folder beside `out`; it becomes `out` when the block ends, and vanishes when the block raises.

    Args:
        out: the folder to publish, absolute; an artifact that is there is replaced.
        needed_bytes: estimated size.

    Raises:
        ArtifactError: the place cannot be written, is too small, or ran full.
    """
    staging = _open_staging(out, needed_bytes)
    try:
        yield staging
        replace_folder(staging, out)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        raise ArtifactError(f"writing {out} failed: {error.strerror}; make room or choose another -o, then run again") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_manifest(folder: Path, versions: Mapping[str, str], inputs: Mapping[str, Any]) -> None:
    """Hash every file of a finished folder and write manifest.json, which completes it (docs/format.md)."""
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    data = {"format_version": MANIFEST_VERSION, "created_by": dict(versions), "inputs": dict(inputs), "files": files}
    write_json(folder / MANIFEST, data)


def file_sha256(path: Path) -> str:
    """Return sha256 of a file's content, as hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read manifest.json.

    Raises:
        ArtifactError: the folder, the manifest or its version is not there.
    """
    if not folder.is_dir():
        raise ArtifactError(f"no folder at {folder}; check the path")
    path = folder / MANIFEST
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise ArtifactError(
            f"{folder} has no {MANIFEST}: it is not an lrserve artifact, or a copy of one is incomplete; "
            "make one with 'lrserve compress-and-export'"
        ) from None
    except ValueError as error:
        raise ArtifactError(f"{path} is not JSON ({error}); copy or export the artifact again") from None
    if not isinstance(data, dict) or data.get("format_version") != MANIFEST_VERSION:
        raise ArtifactError(f"{path} has an unknown format version; install the lrserve that wrote it, or export again")
    return data


def verify_files(folder: Path) -> list[str]:
    """Compare every file with the manifest and return one line per fault; an empty list means that all is well.

    Raises:
        ArtifactError: as `read_manifest`.
    """
    faults = []
    for name, entry in read_manifest(folder)["files"].items():
        path = folder / name
        if not path.is_file():
            faults.append(f"{name} is missing")
        elif path.stat().st_size != entry["bytes"]:
            faults.append(f"{name} has {path.stat().st_size} bytes, the manifest says {entry['bytes']}")
        elif file_sha256(path) != entry["sha256"]:
            faults.append(f"{name} differs from the manifest's sha256")
    return faults
