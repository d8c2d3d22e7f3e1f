"""What measurements on every engine have in common: random prompts, and how single layers are timed. Imports no engine.

What is timed is what a served model does: each call finds its weights in memory rather than in a cache, because in a
model the other layers' weights pass through in between. So layers are called in turns, once per round, and small sets
of layers are timed on several copies of their weights.

On a GPU the engine replays its steps as CUDA graphs, so layers are timed as graphs too: the host, which would take longer to
start a small kernel than the kernel runs, has no part in it.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, TypeVar

from lrserve.compression.groups import factor_entries
from lrserve.compression.level import SCHEMES, Precision

_COLD_BYTES: Final = 256 * 2**20
"""Weights that one round should walk over: more than the caches of usual machines hold."""
_BATCH_BYTES: Final = 2 * 2**30
"""Weights kept in memory at a time."""
_MAX_COPIES: Final = 16
_MAX_CAPTURED: Final = 64
"""Copies of a layer in one graph."""
_REPLAYS: Final = 10
"""Of one graph, by `triton.testing.do_bench_cudagraph`."""
_SECONDS_PER_CELL: Final = 0.05
_MIN_ROUNDS: Final = 3
_MAX_ROUNDS: Final = 100

Entry = dict[str, Any]
"""A `Shape` as an object: `n`, `m`, `rank` (None for dense) and, of factors, `structure` and `ordered`.

It may have `weights`, what the weights are rounded to, and `residual`, the rank of B A beside them; None and 0 are as absent. So it
is with `experts` and `active`.
"""
Row = list[float] | None
"""Microseconds of one layer by number of tokens; None of a layer that the engine cannot multiply by on this machine."""
X = TypeVar("X")


class UnsupportedLayerError(Exception):
    """What `build` raises for an entry for which the engine has no kernel on this machine: its row is None."""


def random_prompts(vocabulary: int, prompt_tokens: int, concurrency: int, seed: int) -> list[list[int]]:
    """Draw `concurrency` prompts of `prompt_tokens` token ids, the same ones from the same seed."""
    generator = random.Random(seed)
    return [[generator.randrange(vocabulary) for _ in range(prompt_tokens)] for _ in range(concurrency)]


def time_layers(
    entries: Sequence[Entry],
    tokens: Sequence[int],
    itemsize: int,
    build: Callable[[Entry], Callable[[X], object]],
    rows: Callable[[int, int], X],
    seconds: float | None,
) -> list[Row]:
    """Return the microseconds of entry i at tokens[j] rows of input: the lower quartile, or the mean over so many `seconds`.

    Other processes only ever make a call slower, so the lower quartile is the layer's own time; the mean is what whole runs have
    to be held against, since others slow those down as well. `build` makes a layer with random weights, of `itemsize` bytes each
    where they are not rounded, which returns when it has multiplied; `rows(count, n)` makes its input.

    The row of an entry for which `build` raises `UnsupportedLayerError` is None.
    """
    table: list[Row] = []
    for batch in _batches(entries, itemsize):
        table += _time_batch(batch, tokens, itemsize, build, rows, seconds)
    return table


def replay_layers(
    entries: Sequence[Entry],
    tokens: Sequence[int],
    itemsize: int,
    build: Callable[[Entry], Callable[[X], object]],
    rows: Callable[[int, int], X],
    seconds: float | None,
) -> list[Row]:
    """Do what `time_layers` does on a CUDA device, by replays of a graph in which copies of a layer follow each other.

    Their median is the layer's time, or the mean over so many `seconds`. The kernels of a layer must allow being captured.
    """
    table: list[Row] = []
    for entry in entries:
        copies = max(1, min(_MAX_CAPTURED, round(_COLD_BYTES / weight_bytes(entry, itemsize))))
        try:
            layers = [build(entry) for _ in range(copies)]
        except UnsupportedLayerError:
            table.append(None)
            continue
        table.append([1e6 * _replayed(layers, rows(count, entry["n"]), seconds) for count in tokens])
    return table


def _replayed(layers: Sequence[Callable[[X], object]], x: X, seconds: float | None) -> float:
    """Return the seconds of one of several alike layers, which are captured one after the other."""
    from triton.testing import do_bench_cudagraph

    def run() -> None:
        for layer in layers:
            layer(x)

    length = 1e3 * (seconds or _SECONDS_PER_CELL) / _REPLAYS
    milliseconds: float = do_bench_cudagraph(run, rep=length, return_mode="median" if seconds is None else "mean")
    return 1e-3 * milliseconds / len(layers)


def input_elements(entries: Sequence[Entry], tokens: Sequence[int]) -> int:
    """Count the values of the largest input. All layers share one memory: an input of its own for each would be gigabytes."""
    return max(tokens) * max(int(entry["n"]) for entry in entries)


def elements(entry: Entry) -> int:
    """Count the weights that a layer multiplies by."""
    n, m, rank = entry["n"], entry["m"], entry["rank"]
    if entry.get("experts"):
        return int(3 * entry["experts"] * n * m)
    return int(n * m if rank is None else factor_entries(m, n, rank, entry["structure"]))


def weight_bytes(entry: Entry, itemsize: int) -> int:
    """Count the bytes of the weights that a layer reads: rounded ones by their bits, and the residual's in full."""
    weights: Precision | None = entry.get("weights")
    bits = SCHEMES[weights].bits if weights else 8 * itemsize
    residual = int(entry.get("residual") or 0) * int(entry["n"] + entry["m"])
    return elements(entry) * bits // 8 + residual * itemsize


def _batches(entries: Sequence[Entry], itemsize: int) -> Iterator[list[Entry]]:
    batch: list[Entry] = []
    size = 0
    for entry in entries:
        cost = weight_bytes(entry, itemsize)
        if batch and size + cost > _BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(entry)
        size += cost
    if batch:
        yield batch


def _time_batch(
    entries: Sequence[Entry],
    tokens: Sequence[int],
    itemsize: int,
    build: Callable[[Entry], Callable[[X], object]],
    rows: Callable[[int, int], X],
    seconds: float | None,
) -> list[Row]:
    size = sum(weight_bytes(entry, itemsize) for entry in entries)
    copies = max(1, min(_MAX_COPIES, round(_COLD_BYTES / size)))
    layers: list[list[Callable[[X], object]]] = []
    table: list[Row] = []
    for entry in entries:
        try:
            layers.append([build(entry) for _ in range(copies)])
            table.append([])
        except UnsupportedLayerError:
            table.append(None)
    timed = [row for row in table if row is not None]
    widths = [entry["n"] for entry, row in zip(entries, table, strict=True) if row is not None]
    for count in tokens:
        inputs = [rows(count, n) for n in widths]
        for of_entry, x in zip(layers, inputs, strict=True):
            for layer in of_entry:
                layer(x)  # the first call of a shape builds the kernel
        samples: list[list[float]] = [[] for _ in layers]
        order = list(zip(layers, inputs, samples, strict=True))
        shuffle = random.Random(0).shuffle
        rounds, deadline = 0, time.perf_counter() + (seconds or _SECONDS_PER_CELL) * len(layers)
        most = _MAX_ROUNDS if seconds is None else sys.maxsize
        while rounds < _MIN_ROUNDS or (rounds < most and time.perf_counter() < deadline):
            shuffle(order)  # what follows a certain layer must not stick to it
            for of_entry, x, sample in order:
                sample.append(_seconds(of_entry[rounds % copies], x))
            rounds += 1
        for row, sample in zip(timed, samples, strict=True):
            row.append(1e6 * (statistics.quantiles(sample, n=4)[0] if seconds is None else statistics.mean(sample)))
    return table


def _seconds(layer: Callable[[X], object], x: X) -> float:
    began = time.perf_counter()
    layer(x)
    return time.perf_counter() - began
