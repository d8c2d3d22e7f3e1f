"""Times of single linear layers, dense and factorized, with the kernels that serve them. Imports vLLM.

What is timed is what a served model does: each call finds its weights in memory rather than in a cache, because in a
model the other layers' weights pass through in between. So layers are called in turns, once per round, and small sets
of layers are timed on several copies of their weights.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import torch
from vllm.platforms import current_platform

from lrserve.compression.groups import factor_entries
from lrserve.serving.kernels import Factor, first_factor

_COLD_BYTES: Final = 256 * 2**20
"""Weights that one round should walk over: more than the caches of usual machines hold."""
_BATCH_BYTES: Final = 2 * 2**30
"""Weights kept in memory at a time."""
_MAX_COPIES: Final = 16
_SECONDS_PER_CELL: Final = 0.05
_MIN_ROUNDS: Final = 3
_MAX_ROUNDS: Final = 100

Layer = Callable[[torch.Tensor], torch.Tensor]


def latency_table(entries: Sequence[dict[str, Any]], tokens: Sequence[int], dtype: torch.dtype) -> list[list[float]]:
    """Return the lower-quartile microseconds of entry i at tokens[j] rows of input.

    An entry is a `Shape` as an object: `n`, `m`, `rank` (None for dense) and, of factors, `structure` and `ordered`.
    """
    table: list[list[float]] = []
    for batch in _batches(entries, dtype.itemsize):
        table += _time_batch(batch, tokens, dtype)
    return table


def _batches(entries: Sequence[dict[str, Any]], itemsize: int) -> Iterator[list[dict[str, Any]]]:
    batch: list[dict[str, Any]] = []
    size = 0
    for entry in entries:
        cost = _elements(entry) * itemsize
        if batch and size + cost > _BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(entry)
        size += cost
    if batch:
        yield batch


@torch.inference_mode()
def _time_batch(entries: Sequence[dict[str, Any]], tokens: Sequence[int], dtype: torch.dtype) -> list[list[float]]:
    size = sum(_elements(entry) for entry in entries) * dtype.itemsize
    copies = max(1, min(_MAX_COPIES, round(_COLD_BYTES / size)))
    layers = [[_build(entry, dtype) for _ in range(copies)] for entry in entries]
    table: list[list[float]] = [[] for _ in entries]
    for count in tokens:
        inputs = [torch.randn(count, entry["n"], dtype=dtype, device=current_platform.device_type) for entry in entries]
        for of_entry, x in zip(layers, inputs, strict=True):
            for layer in of_entry:
                layer(x)  # the first call of a shape builds the kernel
        samples: list[list[float]] = [[] for _ in entries]
        order = list(zip(layers, inputs, samples, strict=True))
        shuffle = random.Random(0).shuffle
        rounds, deadline = 0, time.perf_counter() + _SECONDS_PER_CELL * len(entries)
        while rounds < _MIN_ROUNDS or (rounds < _MAX_ROUNDS and time.perf_counter() < deadline):
            shuffle(order)  # what follows a certain layer must not stick to it
            for of_entry, x, sample in order:
                sample.append(_seconds(of_entry[rounds % copies], x))
            rounds += 1
        for row, sample in zip(table, samples, strict=True):
            # the lower quartile: other processes only ever make a call slower
            row.append(statistics.quantiles(sample, n=4)[0] * 1e6)
    return table


def _elements(entry: dict[str, Any]) -> int:
    n, m, rank = entry["n"], entry["m"], entry["rank"]
    return int(n * m if rank is None else factor_entries(m, n, rank, entry["structure"]))


def _build(entry: dict[str, Any], dtype: torch.dtype) -> Layer:
    n, m, rank = entry["n"], entry["m"], entry["rank"]
    if rank is None:
        return _packed(Factor(n, m, bias=False, dtype=dtype)).multiply
    first = _packed(first_factor(entry["structure"], n, rank, ordered=entry["ordered"], dtype=dtype))
    second = _packed(Factor(rank, m, bias=True, dtype=dtype))

    def factorized(x: torch.Tensor) -> torch.Tensor:
        return second.multiply(first.multiply(x))

    return factorized


def _packed(factor: Factor) -> Factor:
    factor = factor.to(current_platform.device_type)
    scale = factor.weight.shape[1] ** -0.5
    for parameter in factor.parameters():
        if parameter.is_floating_point():
            parameter.data.normal_(std=scale)
        else:
            parameter.data.copy_(torch.randperm(len(parameter)))  # a real order is no walk through memory either
    factor.pack()
    return factor


def _seconds(layer: Layer, x: torch.Tensor) -> float:
    began = time.perf_counter()
    layer(x)
    if x.device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - began
