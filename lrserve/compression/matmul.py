"""Products of bfloat16 values on processors that cannot multiply them.

oneDNN, by which torch multiplies on the CPU, emulates them there, at a quarter of float32's speed (docs/performance.md). A bfloat16
value is a float32 value, so what is multiplied in float32 and rounded at the end is as exact.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


class _Linear(torch.autograd.Function):
    """y = W x + b; what the backward pass needs is kept in bfloat16."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, W: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, W)
        return nn.functional.linear(x.float(), W.float(), None if b is None else b.float()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, W = ctx.saved_tensors
        dy = gradients[0].float()
        rows = dy.reshape(-1, dy.shape[-1])
        needs_x, needs_W, needs_b = ctx.needs_input_grad
        return (
            (dy @ W.float()).to(x.dtype) if needs_x else None,
            (rows.T @ x.reshape(-1, x.shape[-1]).float()).to(W.dtype) if needs_W else None,
            rows.sum(0).to(x.dtype) if needs_b else None,
        )


def _linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    y: torch.Tensor = _Linear.apply(input, weight, bias)  # type: ignore[no-untyped-call]
    return y


def _attention(*args: Any, **kwargs: Any) -> torch.Tensor:
    wide = {name: _wide(value) for name, value in kwargs.items()}
    return nn.functional.scaled_dot_product_attention(*map(_wide, args), **wide).to(torch.bfloat16)


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.dtype is torch.bfloat16 else value


_PRODUCTS: dict[Any, Any] = {nn.functional.linear: _linear, nn.functional.scaled_dot_product_attention: _attention}
"""What a model spends its time in."""


class _InFloat32(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _PRODUCTS:
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
            factors = {(value.dtype, value.device.type) for value in tensors if value.is_floating_point()}
            if factors == {(torch.bfloat16, "cpu")}:
                return _PRODUCTS[func](*args, **kwargs)
        return func(*args, **kwargs)


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
