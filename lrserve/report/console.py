"""Lines and progress bars on the terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

Say = Callable[[str], None]
"""Shows one line of result."""


@contextmanager
def progress_bar(total: int, label: str) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on standard error; yields a function that is told how much is done."""
    with tqdm(total=total, desc=label, file=sys.stderr, leave=False, dynamic_ncols=True) as bar:

        def update(done: int) -> None:
            bar.update(done - bar.n)

        yield update


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
