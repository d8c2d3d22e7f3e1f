"""Writing folders so that they are either whole or not there: stage, flush to disk, publish by renaming.

What is published has the modes that an ordinary program's files have under the user's umask, whichever library wrote it: the
safetensors writer and `mkdtemp` make private files, and a copied file keeps the mode of its source.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from safetensors import SafetensorError

from lrserve.errors import ArtifactError, listed
from lrserve.storage.folder import MOST_BYTES, MOST_FILES, folder_faults, is_hub_snapshot, is_name, read_regular, shown
from lrserve.storage.temporary import exchange, neighbour, staging_folder

if TYPE_CHECKING:
    import torch

MANIFEST = "manifest.json"
MANIFEST_VERSION = 2
"""That this lrserve writes. It reads 1 too, which has no sha256 of its own."""
_DIGEST: Final = "sha256"
_SHA256: Final = re.compile("[0-9a-f]{64}")
_MOST_BYTES: Final = 16 * 2**20  # of a manifest
_FOR_PEOPLE: Final = ".md"  # ending of the model card, which no loader reads


def replace_folder(staging: Path, target: Path) -> None:
    """Move a finished folder to its place; a folder that is already there is replaced and then removed.

    The two change places at once, so that one of them is there whenever the process or the machine dies. Where the system cannot do
    that, there is a moment between two renames, after which `temporary.restore_replaced` puts the old one back.
    """
    flush_folder(staging)
    old = None
    if target.exists():
        if exchange(staging, target):
            old = staging
        else:
            old = neighbour(target.with_name(f".{target.name}"), "replaced")
            target.rename(old)
    try:
        if old != staging:
            staging.rename(target)
    except OSError:
        if old is not None:
            old.rename(target)
        raise
    flush(target.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)  # what is new is in place; a leftover is no failure


def flush_folder(folder: Path) -> None:
    """Give all of a folder the modes of ordinary files, and see that it is on the disk."""
    for path in [*folder.rglob("*"), folder]:
        if not path.is_symlink():
            _follow_umask(path)
            flush(path)


def publish(partial: Path, path: Path) -> None:
    """Rename a file into its place, where it is whole even if the machine dies."""
    flush(partial)
    os.replace(partial, path)
    flush(path.parent)


def _follow_umask(path: Path) -> None:
    """Give a file or a folder the mode with which `open` or `mkdir` would have made it."""
    umask = os.umask(0o077)  # reading it means setting it; another thread's file is private at worst
    os.umask(umask)
    inherited = path.stat().st_mode & stat.S_ISGID  # a folder shared by a group hands its group on
    with suppress(PermissionError):  # a file system without modes
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask | inherited)


def flush(path: Path) -> None:
    """See that a file or the names in a folder are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF) or not path.is_dir():  # a file system that does not flush folders
            raise
    finally:
        os.close(descriptor)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary neighbour to write to, and rename it into the place of `path` once it is written; remove it otherwise."""
    partial = neighbour(path, "partial")
    try:
        yield partial
        _follow_umask(partial)
        publish(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, data: Any) -> None:
    """Write JSON, whole or not at all."""
    with atomic_path(path) as partial:
        partial.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all."""
    from safetensors.torch import save_file

    with atomic_path(path) as partial:
        save_file(dict(tensors), partial, metadata=None if metadata is None else dict(metadata))


def fingerprint(data: Any) -> str:
    """Return sha256 of a JSON value, as hex."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


_NEXT_STEPS: Final[Mapping[int, str]] = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room or choose another place"),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "make it writable or choose another place"),
    **dict.fromkeys((errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT), "check the disk or choose another place"),
    errno.ENAMETOOLONG: "choose a shorter name",
}


@contextmanager
def disk_errors_named(what: Path) -> Iterator[None]:
    """Turn errors of a full, read-only or failing disk into one line about `what`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        told = re.search(r"\(os error (\d+)\)", reason)  # safetensors says the system's number in words
        code = error.errno if isinstance(error, OSError) else int(told[1]) if told else None
        if step := _NEXT_STEPS.get(code or 0):
            raise ArtifactError(f"writing below {what} failed: {reason}; {step}, then run again") from error
        if isinstance(error, OSError):
            raise
        raise ArtifactError(f"a tensor file below {what} is damaged: {reason}; run again, which makes it anew") from error


@contextmanager
def staged(out: Path, *, replace: bool) -> Iterator[Path]:
    """Give a private folder beside `out`; it becomes `out` when the block ends, and vanishes when the block raises.

    It lies on the same file system, so that publishing is one rename.

    Args:
        out: the folder to publish, absolute.
        replace: whether a folder that is there may be replaced; an empty one always is.

    Raises:
        ArtifactError: the place cannot be written, ran full, or something appeared at `out` meanwhile.
    """
    with disk_errors_named(out.parent):
        staging = staging_folder(out)
        try:
            yield staging
            if not replace and out.exists() and any(out.iterdir()):
                raise ArtifactError(f"{out} was made by something else meanwhile; choose another -o and run again")
            replace_folder(staging, out)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def write_manifest(folder: Path, versions: Mapping[str, str], inputs: Mapping[str, Any]) -> None:
    """Hash every file of a finished folder and write manifest.json, which completes it (docs/format.md)."""
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / MANIFEST
    }
    data = {"format_version": MANIFEST_VERSION, "created_by": dict(versions), "inputs": dict(inputs), "files": files}
    with atomic_path(folder / MANIFEST) as partial:
        partial.write_bytes(_rendered(data))


def _rendered(data: Mapping[str, Any]) -> bytes:
    """Return a manifest as it is stored: with its own sha256, so that a change of any of its bytes is noticed."""
    return (json.dumps({**data, _DIGEST: fingerprint(data)}, indent=1) + "\n").encode()


def replace_files(folder: Path, contents: Mapping[str, str]) -> None:
    """Replace text files of a finished folder, and their entries in the manifest; all are written before the first is put in place.

    Raises:
        ArtifactError: as `read_manifest`, or one of the files is not as the manifest has it.
        OSError: the folder cannot be written.
    """
    manifest = {**read_manifest(folder), "format_version": MANIFEST_VERSION}
    with ExitStack() as stack:  # the manifest, which is entered first, is put in place last
        partial_manifest = stack.enter_context(atomic_path(folder / MANIFEST))
        for name, content in contents.items():
            entry = manifest["files"].get(name)
            if entry is None or not (folder / name).is_file() or file_sha256(folder / name) != entry["sha256"]:
                raise ArtifactError(f"{name} is not the file that the manifest names")
            partial = stack.enter_context(atomic_path(folder / name))
            partial.write_text(content, encoding="utf-8")
            manifest["files"][name] = {"bytes": partial.stat().st_size, "sha256": file_sha256(partial)}
        partial_manifest.write_bytes(_rendered(manifest))


def file_sha256(path: Path) -> str:
    """Return sha256 of a file's content, as hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read manifest.json, and check that it is one: no name in it leaves the folder.

    Returns:
        `format_version`, `created_by`, `inputs` and `files`, as docs/format.md has them.

    Raises:
        ArtifactError: the folder or the manifest is not there, or is damaged, or of another version.
    """
    if not folder.is_dir():
        raise ArtifactError(f"no folder at {folder}; check the path")
    path = folder / MANIFEST
    try:
        content = read_regular(path, _MOST_BYTES)
        data = json.loads(content)
        signed = isinstance(data, dict) and _DIGEST in data
        whole = signed and _rendered({key: value for key, value in data.items() if key != _DIGEST}) == content
    except FileNotFoundError:
        raise ArtifactError(
            f"{folder} has no {MANIFEST}: it is not an lrserve artifact, or a copy of one is incomplete; "
            "make one with 'lrserve compress-and-export'"
        ) from None
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:100]
        raise ArtifactError(f"{path} is not JSON ({reason}); copy or export the artifact again") from None
    version = data.get("format_version") if isinstance(data, dict) else None
    if type(version) is not int or version not in (1, MANIFEST_VERSION):
        raise ArtifactError(f"{path} has an unknown format version; install the lrserve that wrote it, or export again")
    if not whole if version > 1 else signed:
        raise ArtifactError(f"{path} was changed after it was written; copy or export the artifact again")
    for key in ("created_by", "inputs", "files"):
        if not isinstance(data.get(key), dict):
            raise ArtifactError(f"{path}: {key} is no JSON object; copy or export the artifact again")
    if len(data["files"]) > MOST_FILES:
        raise ArtifactError(f"{path} names {len(data['files'])} files, at most {MOST_FILES} can be; export the artifact again")
    for name, entry in data["files"].items():
        if not is_name(name) or name == MANIFEST:
            raise ArtifactError(f"{path} names {shown(name)}, which is no file inside the folder; do not use this artifact")
        if not _is_entry(entry):
            raise ArtifactError(f"{path}: the entry of {shown(name)} has no size and sha256; copy or export the artifact again")
    return {key: value for key, value in data.items() if key != _DIGEST}


def _is_entry(entry: object) -> bool:
    """Say whether this is what a manifest has for a file."""
    if not isinstance(entry, dict):
        return False
    size, digest = entry.get("bytes"), entry.get("sha256")
    return type(size) is int and 0 <= size <= MOST_BYTES and isinstance(digest, str) and bool(_SHA256.fullmatch(digest))


def verify_files(folder: Path) -> list[str]:
    """Compare every file with the manifest and return one line per fault; an empty list means that all is well.

    What is in the folder and not in the manifest is a fault too, unless it is harmless (folder.py).

    Raises:
        ArtifactError: as `read_manifest`, or a folder cannot be listed.
    """
    files = read_manifest(folder)["files"]
    sizes: dict[str, int | None] = {name: entry["bytes"] for name, entry in files.items()}
    faults = folder_faults(folder, sizes, MANIFEST, needed=lambda name: True)
    for name, entry in files.items():
        if name in faults:
            continue
        try:
            if file_sha256(folder / name) != entry["sha256"]:
                faults[name] = f"{name} differs from the manifest's sha256"
        except OSError as error:
            faults[name] = f"{name} cannot be read: {error.strerror}"
    return list(faults.values())


def check_files(folder: Path, part: str = "") -> None:
    """Compare names, kinds and sizes of files with the manifest, before any of them is loaded; nothing is hashed.

    A folder without a manifest passes: a dense checkpoint, or what `save_pretrained` wrote.

    Args:
        folder: the artifact.
        part: the folder below that is about to be loaded, such as `onnx`; empty for the checkpoint. Its files must be there, but
            for the model card, which may also have been edited. Other parts may be left out of a copy, and so may be anything in
            the Hub's cache.

    Raises:
        ArtifactError: as `read_manifest`; or a file is missing, is of another size, is no file, or is not in the manifest.
    """
    if not os.path.lexists(folder / MANIFEST):
        return
    files = read_manifest(folder)["files"]
    sizes = {name: None if name.endswith(_FOR_PEOPLE) else entry["bytes"] for name, entry in files.items()}
    partial = is_hub_snapshot(folder)

    def needed(name: str) -> bool:
        return not partial and name.rpartition("/")[0] == part and not name.endswith(_FOR_PEOPLE)

    if faults := list(folder_faults(folder, sizes, MANIFEST, needed).values()):
        raise ArtifactError(f"{folder} is not what its {MANIFEST} says: {listed(faults)}; remove what was added, or copy it again")
