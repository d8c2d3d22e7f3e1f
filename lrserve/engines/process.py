"""What the processes of engines share: a temporary folder, a log that outlives a failure, and an end that leaves nothing."""

from __future__ import annotations

import contextlib
import getpass
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Final

from lrserve.engines.gpu import shortage
from lrserve.errors import EngineError
from lrserve.storage.temporary import temporary_folder, temporary_log

_LOG_LINES: Final = 25

# The kernel's signal at the parent's end stays set over execv; a parent that has ended before is somebody else now.
_TIE: Final = (
    "import ctypes, os, signal, sys; ctypes.CDLL(None).prctl(1, signal.SIGKILL); "  # 1 is PR_SET_PDEATHSIG
    "os.getppid() == int(sys.argv[1]) and os.execv(sys.argv[2], sys.argv[2:])"
)


def tied(command: Sequence[str]) -> list[str]:
    """Return a command that becomes another one, which the kernel kills when the thread that started it ends, however that ends.

    The children of that program have to look to themselves.
    """
    return [sys.executable, "-ISc", _TIE, str(os.getpid()), *command]


class Scratch:
    """A folder for the temporary files of processes: vLLM leaves a socket or two in TMPDIR each time it runs.

    Compiled kernels stay where torch would have put them, so that the next process finds them.
    """

    def __init__(self) -> None:
        self._folder = temporary_folder()

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
    """Open the log to append to; a temporary file, which the caller deletes, where none is wanted.

    Its `name` is the path, and `tell` says where what is appended begins.
    """
    if wanted is None:
        wanted = temporary_log()
    wanted.parent.mkdir(parents=True, exist_ok=True)
    return wanted.open("ab")


def failure(what: str, message: str, log: Path, start: int = 0) -> EngineError:
    """Return the error of an engine that failed, with the last lines of its log.

    Where the GPU's memory was full, it is one line that ends with the setting to change.

    Args:
        what: names engine and model.
        message: what is known without the log.
        log: of the engine.
        start: byte at which the log of this engine begins.
    """
    try:
        with log.open("rb") as file:
            file.seek(start)
            text = file.read().decode(errors="replace")
    except OSError:
        return EngineError(f"{what}: {message}\n(its log is gone)")
    if short := shortage(message) or shortage(text):
        return EngineError(f"{what}: {short}. Log: {log}")
    lines = "\n".join("  " + line for line in text.splitlines()[-_LOG_LINES:])
    return EngineError(f"{what}: {message}\nlast lines of {log}:\n{lines}")


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
