"""Processes that end with the one that started them, however that one ends.

multiprocessing ends the children of a process that ends in order. One that is killed leaves them: vLLM's engine with the model,
and the workers of a pool.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import threading
from typing import Final

ENDS_WITH_PARENT: Final = "LRSERVE_ENDS_WITH_PARENT"
"""Where this is set, vLLM's processes do; `lrserve serve` and `bench` set it for their servers."""


@functools.cache
def end_with_parent() -> None:
    """End this process at once when its parent has ended, if multiprocessing has started it; safe to call again."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, name="ends-with-parent", daemon=True).start()
