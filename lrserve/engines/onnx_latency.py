"""Times of single linear layers, dense or compressed, on ONNX Runtime (engines/timing.py): the nodes that the exporter renders.

A fused group is timed as one layer, though gate and up, and q, k and v that are normed, are products of their own in the graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from exporters.onnx_linear import build_layer, save_graph
from lrserve.compression.groups import Stored
from lrserve.compression.level import SCHEMES
from lrserve.compression.lowrank import install_low_rank
from lrserve.compression.spec import GroupSpec
from lrserve.engines.onnx_session import open_session
from lrserve.engines.timing import Entry, Row, UnsupportedLayerError, input_elements, time_layers
from lrserve.storage.temporary import temporary_folder


def latency_table(entries: Sequence[Entry], tokens: Sequence[int], threads: int | None, seconds: float | None) -> list[Row]:
    """Return the microseconds of entry i at tokens[j] rows of float32 input: the lower quartile, or the mean over `seconds`.

    ONNX Runtime has no product by weights of 8-bit floating point numbers: their rows are None.
    """
    from onnxruntime import OrtValue

    values = np.random.default_rng(0).standard_normal(input_elements(entries, tokens), np.float32)

    def build(entry: Entry) -> Callable[[Any], Any]:
        weights = entry.get("weights")
        if weights and SCHEMES[weights].floating:
            raise UnsupportedLayerError(f"the ONNX graph multiplies by {weights} weights as float32 ones")
        session = open_layer(random_layer(entry), entry["n"], threads)
        return lambda x: session.run_with_ort_values(["y"], {"x": x})  # y stays in the runtime

    def rows(count: int, n: int) -> Any:
        # Three axes, as in the model: ONNX Runtime fuses a MatMul and an Add of two.
        return OrtValue.ortvalue_from_numpy(values[: count * n].reshape(1, count, n))

    return time_layers(entries, tokens, torch.float32.itemsize, build, rows, seconds)


def random_layer(entry: Entry) -> nn.Module:
    """Build the layer that a `Shape` describes, float32, with random weights."""
    n, rank, weights = entry["n"], entry["rank"], entry.get("weights")
    model = nn.Module()
    with torch.device("meta"):  # without the values that nn.Linear starts with
        model.layer = nn.Linear(n, entry["m"], bias=False)
        structure: Stored = "dense" if rank is None else entry["structure"]
        if rank is not None or weights:
            spec = GroupSpec(rank or 0, ("layer",), structure, entry["ordered"], weights, entry.get("residual", 0))
            install_low_rank(model, {"layer": spec})
    layer: nn.Module = model.layer.to_empty(device="cpu")
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=n**-0.5 / (SCHEMES[weights].largest if weights else 1.0))
    for name, tensor in layer.named_buffers():
        if name.endswith("order"):
            tensor.copy_(torch.randperm(n))
        elif tensor.dtype == torch.int8:
            tensor.random_(-127, 128)
        elif tensor.dtype == torch.int32:
            tensor.random_(-(2**31), 2**31)
    return layer


def open_layer(layer: nn.Module, n: int, threads: int | None) -> Any:
    """Open a session over a layer's own graph, x (B, S, n) -> y (B, S, m), as over the model's, its weights in a file too."""
    _share_arena()
    with temporary_folder() as folder:
        path = Path(folder) / "layer.onnx"
        save_graph(build_layer(layer, n), path)
        return open_session(path, threads, {"session.use_env_allocators": "1"})


@functools.cache
def _share_arena() -> None:
    """Give the sessions one arena for activations, as layers of one model have, instead of a large one each."""
    import onnxruntime as ort

    memory = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(memory, ort.OrtArenaCfg(0, -1, -1, -1))
