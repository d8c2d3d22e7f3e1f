"""Lines and progress bars on the terminal."""

from __future__ import annotations

import sys
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
