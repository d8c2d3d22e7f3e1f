"""Processes of tests, forked from one that has imported what they need: fresh interpreters would take seconds each.

They have the environment of the test that started the first of them.
"""

from __future__ import annotations

import multiprocessing
from typing import Final

FORKING: Final = multiprocessing.get_context("forkserver")
FORKING.set_forkserver_preload(["transformers", "optuna", "tiny", "lrserve.allocation.study", "lrserve.compression.recover"])
