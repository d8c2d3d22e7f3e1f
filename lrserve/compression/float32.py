"""A model that computes in float32 for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from lrserve.compression.groups import family_of


@contextmanager
def in_float32(model: Any, *, at_once: bool = True) -> Iterator[None]:
    """Let a causal LM compute in float32; afterwards it holds what it held before, in its own dtype.

    Memory: its floating point tensors in float32, beside its own. With `at_once` false the tensors of a decoder block are in
    float32 only while that block computes, which takes time in every forward pass.
    """
    blocks = [] if at_once else list(model.get_submodule(family_of(model.config).layers))
    in_blocks = {module for block in blocks for module in block.modules()}
    with ExitStack() as stack:
        for block in blocks:
            _widen_in_turn(block, stack)
        stack.callback(_widen(module for module in model.modules() if module not in in_blocks))
        yield


def _widen_in_turn(block: nn.Module, stack: ExitStack) -> None:
    """Let a block be in float32 while it computes."""
    narrow: list[Callable[[], None]] = []

    def before(*_: Any) -> None:
        narrow.append(_widen(block.modules()))

    def after(*_: Any) -> None:
        narrow.pop()()

    stack.callback(block.register_forward_pre_hook(before).remove)
    stack.callback(block.register_forward_hook(after, always_call=True).remove)


def _widen(modules: Iterable[nn.Module]) -> Callable[[], None]:
    """Make the floating point tensors that modules hold themselves float32; returns what undoes that."""
    modules = list(modules)
    parameters = [(own, own.data) for module in modules for own in module._parameters.values() if own is not None]
    buffers = [(module, dict(module._buffers)) for module in modules]

    def wide(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.float() if tensor.is_floating_point() else tensor

    for module in modules:
        module._apply(wide, recurse=False)

    def undo() -> None:
        for parameter, data in parameters:
            parameter.data = data
        for module, own in buffers:
            module._buffers.update(own)

    return undo
