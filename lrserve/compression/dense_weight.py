"""The dense weight of a compressed layer, as a tensor that is computed when it is read and cannot be written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map


class DenseWeight(torch.Tensor):
    """W (m, n) of a layer that stores factors: shape, dtype and device cost nothing, an operation on it multiplies the factors.

    PEFT reads a linear layer's `weight` for its device and dtype, DoRA for its values; merging an adapter writes it.

    Raises:
        TypeError: on every write, since it could not reach the factors.
    """

    _make: Callable[[], torch.Tensor]

    # As in PyTorch's guide to wrapper subclasses: results are plain tensors.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __new__(cls, shape: Sequence[int], like: torch.Tensor, make: Callable[[], torch.Tensor]) -> DenseWeight:
        """Describe what `make` returns: of this shape, and of `like`'s dtype and device."""
        weight: DenseWeight = torch.Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=like.dtype, device=like.device)
        weight._make = make
        return weight

    @property
    def data(self) -> torch.Tensor:
        """The same tensor: it has no gradient to leave out."""
        return self

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        raise _read_only()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"DenseWeight(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is torch.ops.aten.detach.default:
            return args[0]
        if func._schema.is_mutable:
            raise _read_only()
        args, kwargs = tree_map(lambda value: value._make() if isinstance(value, cls) else value, (args, kwargs or {}))
        return func(*args, **kwargs)


def _read_only() -> TypeError:
    return TypeError(
        "the weight of a compressed layer is the product of its factors and cannot be written: an adapter cannot be merged into "
        "it, nor start by changing it (PiSSA, OLoRA); load the adapter beside the artifact"
    )
