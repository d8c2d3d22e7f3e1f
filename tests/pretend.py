"""A device that is not there: tensors say that they are on it, the CPU computes, and mixing it with the CPU is an error.

So a test sees on any machine whether code that is told to compute on a GPU creates and moves everything there, what it gives is
what the CPU gives, and how often the host waits for a number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE: Final = torch.device("meta")
"""Of the type that torch has on every machine; no tensor of this kind is without numbers here."""
_COPIES: Final = ("aten::_to_copy", "aten::copy_", "aten::to")
_READS: Final = ("aten::_local_scalar_dense", "aten::item", "aten::is_nonzero")


class _OnDevice(torch.Tensor):
    """Holds a tensor of the CPU, and says that it is on `DEVICE`."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls: type[_OnDevice], held: torch.Tensor) -> _OnDevice:
        made: _OnDevice = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.size(), strides=held.stride(), dtype=held.dtype, device=DEVICE, storage_offset=held.storage_offset()
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {}, [])


def _run(func: Any, args: Any, kwargs: dict[str, Any], reads: list[str]) -> Any:
    leaves = tree_leaves((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    here = [leaf for leaf in tensors if isinstance(leaf, _OnDevice)]
    name = func.name().partition(".")[0]
    if name not in _COPIES and here and any(not isinstance(leaf, _OnDevice) and leaf.ndim for leaf in tensors):
        raise RuntimeError(f"{name}: tensors on the CPU and on the device")
    asked = [leaf for leaf in leaves if isinstance(leaf, torch.device)]
    to = DEVICE in asked if asked else isinstance(tensors[0], _OnDevice) if name == "aten::copy_" else bool(here)
    if name in _READS and here:
        reads.append(name)
    found = func(*tree_map(_held, args), **tree_map(_held, kwargs))
    return tree_map(lambda leaf: _OnDevice(leaf) if to and isinstance(leaf, torch.Tensor) else leaf, found)


def _held(leaf: Any) -> Any:
    if isinstance(leaf, torch.device):
        return torch.device("cpu")
    return leaf.held if isinstance(leaf, _OnDevice) else leaf


class _Mode(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.reads: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {}, self.reads)


@contextmanager
def pretended() -> Iterator[list[str]]:
    """Let `DEVICE` be there; yields the reads of numbers by the host so far."""
    with _Mode() as mode:
        yield mode.reads


def put(module: nn.Module) -> None:
    """Put a module's parameters and buffers on the device; within `pretended`."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            part._parameters[name] = nn.Parameter(_OnDevice(parameter.data), requires_grad=False)
        for name, buffer in part.named_buffers(recurse=False):
            part._buffers[name] = _OnDevice(buffer)
