"""What the processes that engines run in have in common: memory that is kept, a log that outlives a failure, and an end that leaves
nothing behind.

A model on the CPU allocates and frees tens of megabytes with every operation. glibc's malloc maps each such piece from the kernel
and gives it back, so the kernel clears its pages again and again: an eighth to a fifth of a prefill (docs/performance.md).
`memory_environment` lets malloc keep what is freed.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import platform
import re
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Final

_LOG_LINES: Final = 25
_MALLOC: Final = {"hugetlb": 1, "mmap_threshold": 2**28, "trim_threshold": 2**31}  # bytes: of one piece, of the heap's free end
_GLIBC: Final = (2, 35)  # the first that knows `hugetlb`; earlier ones refuse such a threshold, and then map more than before


def memory_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment in which glibc's malloc keeps what a process frees, and asks for huge pages.

    Settings of malloc that are there already stay as they are, and other or older C libraries get none.
    """
    name, version = platform.libc_ver()
    known = name == "glibc" and tuple(map(int, version.split(".")[:2])) >= _GLIBC
    if not known or any(variable == "GLIBC_TUNABLES" or variable.startswith("MALLOC_") for variable in environment):
        return dict(environment)
    tunables = ":".join(f"glibc.malloc.{name}={value}" for name, value in _MALLOC.items())
    return {"GLIBC_TUNABLES": tunables, **environment}


class Scratch:
    """A folder for the temporary files of processes: vLLM leaves a socket or two in TMPDIR each time it runs.

    Compiled kernels stay where torch would have put them, so that the next process finds them.
    """

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="lrserve-", ignore_cleanup_errors=True)

    def environment(self, inherited: Mapping[str, str]) -> dict[str, str]:
        """Return an environment whose temporary files stand here."""
        try:
            user = re.sub(r'[\\/:*?"<>|]', "_", getpass.getuser())
        except (KeyError, OSError):  # a container's user may have no name
            user = f"uid_{os.getuid()}"
        kernels = Path(tempfile.gettempdir()) / f"torchinductor_{user}"
        return {"TORCHINDUCTOR_CACHE_DIR": str(kernels), **inherited, "TMPDIR": self._folder.name}

    def remove(self) -> None:
        """Delete the folder; safe to call twice."""
        self._folder.cleanup()


def open_log(wanted: Path | None) -> IO[bytes]:
    """Open the log to append to; a temporary file, which the caller deletes, where none is wanted. Its `name` is the path."""
    if wanted is None:
        handle, name = tempfile.mkstemp(prefix="lrserve-engine-", suffix=".log")
        os.close(handle)
        wanted = Path(name)
    wanted.parent.mkdir(parents=True, exist_ok=True)
    return wanted.open("ab")


def log_tail(path: Path) -> str:
    """Return the last lines of a log, under a line that names it."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "(its log is gone)"
    return f"last lines of {path}:\n" + "\n".join("  " + line for line in lines[-_LOG_LINES:])


def end_session(process: subprocess.Popen[Any], patience: float) -> None:
    """Wait for a process that leads a session of its own, at most `patience` seconds, then end whatever is left of the session.

    That reaches the process and its children only.
    """
    try:
        process.wait(timeout=patience)
    except subprocess.TimeoutExpired:
        pass
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
