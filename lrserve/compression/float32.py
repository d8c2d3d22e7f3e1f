"""A model that computes in float32 for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def in_float32(model: Any) -> Iterator[None]:
    """Let a model compute in float32; afterwards it holds what it held before, in its own dtype.

    Memory: its floating point tensors in float32, beside its own.
    """
    parameters = [(parameter, parameter.data) for parameter in model.parameters()]
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    model.float()
    try:
        yield
    finally:
        for parameter, data in parameters:
            parameter.data = data
        for module, own in buffers:
            module._buffers.update(own)
