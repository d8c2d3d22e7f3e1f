"""Products of bfloat16 values on processors that cannot multiply them.

oneDNN, by which torch multiplies on the CPU, emulates them there, at a quarter of float32's speed (docs/methods.md). A bfloat16
value is a float32 value, so what is multiplied in float32 and rounded at the end is as exact.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch.overrides import TorchFunctionMode

_PRODUCTS: Final = (torch.nn.functional.linear, torch.nn.functional.scaled_dot_product_attention)
"""What a model spends its time in."""


class _InFloat32(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _PRODUCTS or not _is_bfloat16_on_cpu(args[0]):
            return func(*args, **kwargs)
        product = func(*map(_wide, args), **{name: _wide(value) for name, value in kwargs.items()})
        return product.to(torch.bfloat16)


def _is_bfloat16_on_cpu(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype is torch.bfloat16 and value.device.type == "cpu"


def _wide(value: Any) -> Any:
    return value.float() if _is_bfloat16_on_cpu(value) else value


def emulated() -> bool:
    """Say whether this is an x86 processor without products of bfloat16."""
    known = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return platform.machine().lower() in ("x86_64", "amd64") and not known


@contextmanager
def fast_products() -> Iterator[None]:
    """Let models in bfloat16 on the CPU multiply in float32 within, in this thread, if this processor is faster so."""
    if not emulated():
        yield
        return
    with _InFloat32():
        yield
