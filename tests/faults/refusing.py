"""Bad input as a user meets it: a command, run in this process, that must answer with one line and code 2."""

from __future__ import annotations

import contextlib
import io
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from lrserve.cli import main

LONGEST = 600  # characters of a line that a user still reads


@dataclass(frozen=True)
class Fault:
    """One row of a table: what is done to good input, and what the one line must contain.

    name: the row's, in the test's id.
    damage: what is done to a folder of good input.
    line: parts of the line, which name the file and the field, and the next step.
    """

    name: str
    damage: Callable[[Path], object]
    line: tuple[str, ...]

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Ran:
    """What a command gave: its exit code, and what it wrote to standard output and to standard error."""

    code: object
    out: str
    error: str


def ran(*arguments: str | Path) -> Ran:
    """Run `lrserve` with these arguments in this process."""
    out, error = io.StringIO(), io.StringIO()
    before = {kind: signal.getsignal(kind) for kind in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}
    code: object = 0
    with (
        mock.patch.object(sys, "argv", ["lrserve", *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(error),
    ):
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        finally:
            for kind, handler in before.items():
                signal.signal(kind, handler)
    return Ran(code, out.getvalue(), error.getvalue())


def answer(*arguments: str | Path) -> str | None:
    """Run `lrserve` with these arguments; returns the one line by which it refuses, None if it does not.

    Anything else fails: another code than 0 or 2, a traceback, more than one line, a line that is too long.
    """
    found = ran(*arguments)
    lines = found.error.strip().splitlines()
    shown = f"code {found.code}\n{found.out}\n{found.error}"
    assert found.code in (0, 2), shown
    assert "Traceback" not in found.error, shown
    if found.code == 0:
        return None
    assert lines, shown
    assert lines[-1].startswith("error: "), shown
    assert len([line for line in lines if line.startswith("error: ")]) == 1, shown
    assert len(lines[-1]) <= LONGEST, shown
    return lines[-1]


def refusal(*arguments: str | Path) -> str:
    """Run `lrserve` with arguments that it must refuse; returns the line in which it does."""
    line = answer(*arguments)
    assert line is not None, f"accepted: {arguments}"
    return line


def refused(fault: Fault, *arguments: str | Path) -> None:
    """See that a command refuses a fault's input, and names what the row names."""
    line = refusal(*arguments)
    for part in fault.line:
        assert part in line, f"{part!r} is not in {line!r}"
