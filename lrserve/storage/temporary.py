"""What a run makes and removes again: names that say which process a thing belongs to, and the removal of what dead ones left.

A name ends in its owner, `PID-WHERESTART`, and perhaps in random characters: the process's number, 4 hexadecimal digits that stand
for the machine or container, and 8 for the time when the process started. A number that another process has by now is told from
its first holder by that time.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import glob
import hashlib
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from lrserve.errors import ArtifactError, listed

_OWNER: Final = re.compile(r"-(?P<pid>\d+)-(?P<where>[0-9a-f]{4})(?P<start>[0-9a-f]{8})(-\w{8})?(\.log)?$", re.ASCII)
_UNKNOWN: Final = "0" * 8  # start time of a process where there is no /proc
_RENAME_EXCHANGE: Final = 2
_AT_FDCWD: Final = -100
_NO_EXCHANGE: Final = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)  # of the system, a file system, a sandbox


def owner() -> str:
    """Return what names of this process's temporary things end in."""
    return f"{os.getpid()}-{_where()}{_start(os.getpid()) or _UNKNOWN}"


@functools.cache
def _where() -> str:
    """Identify where process numbers mean the same: a machine, or a container in it."""
    try:
        namespace = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        namespace = 0
    return hashlib.sha256(f"{socket.gethostname()} {namespace}".encode()).hexdigest()[:4]


def _start(pid: int) -> str | None:
    """Return a hash of the time when a process started, None if it does not live."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
    except (OSError, ValueError):
        return None
    return None if state in "ZX" else hashlib.sha256(f"{boot} {fields[18]}".encode()).hexdigest()[:8]


def neighbour(path: Path, kind: str) -> Path:
    """Return the name of a temporary thing of this process's beside `path`; there is one of each kind."""
    return path.with_name(f"{path.name}.{kind}-{owner()}")


@contextmanager
def _place_named(parent: Path | None) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where = f"in {parent}" if parent else "for temporary files"
        step = "choose another place" if parent else "set TMPDIR to another folder"
        raise ArtifactError(f"nothing can be made {where}: {error.strerror or error}; make room or {step}") from error


def staging_folder(out: Path) -> Path:
    """Make a private folder beside `out`, and the folder that both are in.

    Raises:
        ArtifactError: it cannot be made.
    """
    with _place_named(out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f".{out.name}.staging-{owner()}-", dir=out.parent))


def temporary_folder(parent: Path | None = None) -> tempfile.TemporaryDirectory[str]:
    """Make a private folder that goes when the context ends: below `parent`, or where the system keeps temporary files.

    Raises:
        ArtifactError: it cannot be made.
    """
    with _place_named(parent):
        return tempfile.TemporaryDirectory(prefix=f"lrserve-{owner()}-", dir=parent, ignore_cleanup_errors=True)


def temporary_log() -> Path:
    """Make an empty file, which the caller deletes, where the system keeps temporary files.

    Raises:
        ArtifactError: it cannot be made.
    """
    with _place_named(None):
        handle, name = tempfile.mkstemp(prefix=f"lrserve-engine-{owner()}-", suffix=".log")
    os.close(handle)
    return Path(name)


def temporary_leftovers() -> tuple[Path, str]:
    """Return where and by which names `remove_leftovers` finds what `temporary_folder` and `temporary_log` made.

    Raises:
        ArtifactError: there is no folder for temporary files.
    """
    with _place_named(None):
        return Path(tempfile.gettempdir()), "lrserve-*"


def exchange(one: Path, other: Path) -> bool:
    """Let two folders of one file system change places at once; returns False where that cannot be had.

    Raises:
        OSError: it can, and failed.
    """
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:  # not Linux, or an old C library
        return False
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))


def restore_replaced(out: Path, say: Callable[[str], None]) -> None:
    """Put an artifact back that a run moved aside and, killed before its next step, did not replace; says so."""
    if out.exists():
        return
    for path in out.parent.glob(f".{glob.escape(out.name)}.replaced-*"):
        if _is_dead(path):
            path.rename(out)
            say(f"{out} is back: a run that was killed had moved it aside")
            return


def remove_leftovers(places: Iterable[tuple[Path, str]], say: Callable[[str], None]) -> None:
    """Remove what dead processes left, by folder and pattern; says so in one line.

    What belongs to living processes stays, and so does what carries no owner's name. Of another machine or container nobody knows
    what lives there: that is said, and stays.
    """
    removed: list[Path] = []
    stay: list[Path] = []
    unknown: list[Path] = []
    for folder, pattern in places:
        for path in sorted(folder.glob(pattern)):
            dead = _is_dead(path)
            if dead is None:
                unknown.append(path)
            elif dead:
                _remove(path)
                (stay if path.exists() else removed).append(path)
    if removed:
        say(f"removed what runs that were interrupted left: {listed(removed, ', ')}")
    if stay:
        say(f"what runs that were interrupted left could not be removed: {listed(stay, ', ')}")
    if unknown:
        say(f"{listed(unknown, ', ')} belong to a run on another machine or in another container; remove them if it has ended")


def _is_dead(path: Path) -> bool | None:
    """Whether the owner that a path names is dead: None if that cannot be known, False also if the path names none."""
    found = _OWNER.search(path.name)
    if found is None or found["start"] == _UNKNOWN:
        return False
    if found["where"] != _where():
        return None
    return _start(int(found["pid"])) != found["start"]


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        try:
            path.unlink(missing_ok=True)
        except OSError:  # another user's
            return
