"""The memory of the GPU that engines share with each other and with this process: what fits, and what is said when it is full."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch

from lrserve.errors import EngineError, InputError, one_line

_BESIDE_WEIGHTS: Final = 3 * 2**30
"""Bytes of an engine besides its weights: CUDA's context, activations, captured graphs, and a few sequences of keys and values."""
_SHOWN: Final = 300  # characters of a log's line

_SHORTAGES: Final = (
    (
        re.compile(r"Free memory on device .*less than .*"),
        "lower engine.gpu_memory_share, or end what else uses the GPU",
    ),
    (
        re.compile(r"No available memory for the cache blocks.*|.*larger than the available KV cache memory.*"),
        "raise engine.gpu_memory_share or engine.tensor_parallel_size (on a CPU VLLM_CPU_KVCACHE_SPACE), or let the workloads have "
        "shorter requests",
    ),
    (
        re.compile(r"CUDA out of memory.*|CUBLAS_STATUS_ALLOC_FAILED|CUDA failure 2: out of memory"),
        "lower engine.gpu_memory_share, which leaves more beside vLLM's weights and cache, raise engine.tensor_parallel_size, or "
        "end what else uses the GPU",
    ),
)
"""What vLLM 0.32, torch and ONNX Runtime 1.32 say when memory is short, and the setting to change."""


def device_memory() -> int | None:
    """Return the bytes of the first CUDA device's memory; None where there is no such device."""
    return int(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else None


def fit(weights: int, memory: int, share: float, devices: int = 1, engines: int = 1) -> bool:
    """Say whether engines have room on the GPU, beside each other.

    Args:
        weights: bytes of the weights of each.
        memory: bytes of one device.
        share: part of it that all of them take together.
        devices: among how many an engine divides its weights.
        engines: how many.
    """
    return weights / devices + _BESIDE_WEIGHTS <= share * memory / engines


def both_fit(weights: int, memory: int, share: float, devices: int = 1) -> bool:
    """Say whether the dense model's engine and a plan's, whose weights are no more, `fit` beside each other."""
    return fit(weights, memory, share, devices, 2)


def require_devices(count: int) -> None:
    """Check that there are as many GPUs as an engine is divided among; without a GPU they are processes.

    Raises:
        InputError: there are fewer.
    """
    if torch.cuda.is_available() and (found := torch.cuda.device_count()) < count:
        raise InputError(f"engine.tensor_parallel_size {count}: there {_are(found)} here; set it to {found} or less")


def _are(count: int) -> str:
    return f"are {count} GPUs" if count > 1 else "is one GPU"


def release_memory() -> None:
    """Give back the memory that torch and the C library keep in this process for later: an engine's own is about to ask for it."""
    gc.collect()  # models hang in cycles
    torch.cuda.empty_cache()  # does nothing where CUDA was not used
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # of glibc
        trim(0)


def shortage(text: str) -> str | None:
    """Find in a message or a log that memory was short; returns what it says, and the setting to change."""
    for pattern, advice in _SHORTAGES:
        if found := list(pattern.finditer(text)):
            return f"{found[-1][0].strip()[:_SHOWN]}; {advice}"
    return None


@contextmanager
def memory_errors_named(advice: str) -> Iterator[None]:
    """Turn this process's shortage of the GPU's memory into an error that ends with the next step.

    Raises:
        EngineError: torch found too little memory.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise EngineError(f"the GPU's memory is full: {one_line(error)}; {advice}") from error
