"""Lines and progress on standard error: a bar on a terminal, a few plain lines in a file or a pipe."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, TextIO

from tqdm import tqdm

Say = Callable[[str], None]
"""Shows one line of result."""

_QUIET_SECONDS: Final = 10.0  # a stage that is shorter than this prints its result only
_SILENT_SECONDS: Final = 300.0  # a log without a line for this long looks like a program that hangs


@contextmanager
def progress_bar(total: int, label: str, stream: TextIO | None = None) -> Iterator[Callable[[int], None]]:
    """Show the progress of a stage on `stream`, standard error by default; yields a function that is told how much is done.

    Where the stream is no terminal, a line without control characters is printed when a quarter, half and three quarters are done,
    not before 10 seconds after the last line, and every 5 minutes.
    """
    stream = sys.stderr if stream is None else stream
    if not stream.isatty():
        yield _plain_lines(total, label, stream)
        return
    with tqdm(total=total, desc=label, file=stream, leave=False, dynamic_ncols=True) as bar:

        def update(done: int) -> None:
            bar.update(done - bar.n)

        yield update


def _plain_lines(total: int, label: str, stream: TextIO) -> Callable[[int], None]:
    began = last = time.monotonic()
    quarter = 0

    def update(done: int) -> None:
        nonlocal last, quarter
        now, reached = time.monotonic(), 4 * done // max(total, 1)
        waited = _QUIET_SECONDS if reached > quarter else _SILENT_SECONDS
        if done < total and now - last >= waited:
            last, quarter = now, reached
            print(f"{label}: {done} of {total} ({done / total:.0%}) after {duration(now - began)}", file=stream, flush=True)

    return update


def reused(count: int, total: int) -> str:
    """Say how much of a stage was there already."""
    return f" ({'all' if count >= total else count} reused)" if count else ""


def timed(say: Say) -> Say:
    """Return what shows lines with the time since the line before: stages speak when they end."""
    last = time.monotonic()

    def with_time(line: str) -> None:
        nonlocal last
        before, last = last, time.monotonic()
        say(f"{line} [{duration(last - before)}]")

    return with_time


def duration(seconds: float) -> str:
    """Format seconds for people: `48 s`, `3 min 20 s`, `2 h 05 min`."""
    rounded = round(seconds)
    if rounded < 60:
        return f"{rounded} s"
    if rounded < 3600:
        return f"{rounded // 60} min {rounded % 60:02d} s"
    return f"{rounded // 3600} h {rounded % 3600 // 60:02d} min"
