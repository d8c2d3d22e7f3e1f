"""Backward passes that keep the states between decoder blocks only, and compute all others anew (Chen et al., arXiv 1604.06174)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lrserve.compression.groups import family_of


def recompute_blocks(model: Any) -> None:
    """Let a model's decoder blocks compute their activations a second time in backward passes."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for block in model.get_submodule(family_of(model.config).layers):
        block.training = True  # which transformers asks for; not the modules in it, so there is no dropout


@contextmanager
def recomputed(model: Any, wanted: bool) -> Iterator[None]:
    """Let blocks recompute for a while, if it is wanted."""
    if not wanted:
        yield
        return
    recompute_blocks(model)
    try:
        yield
    finally:
        model.gradient_checkpointing_disable()
        for block in model.get_submodule(family_of(model.config).layers):
            block.training = False
