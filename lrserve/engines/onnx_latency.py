"""Times of single linear layers, dense and factorized, on ONNX Runtime (engines/timing.py): the nodes that the exporter renders.

A fused group is timed as one layer, as on vLLM, though its members are MatMuls of their own in the exported graph.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from exporters.onnx_graph import build_layer, save_graph
from lrserve.compression.layers import LowRankLinear, first_factor
from lrserve.compression.spec import GroupSpec
from lrserve.engines.onnx_session import open_session
from lrserve.engines.timing import Entry, Row, UnsupportedLayerError, input_elements, time_layers


def latency_table(entries: Sequence[Entry], tokens: Sequence[int], threads: int | None, seconds: float | None) -> list[Row]:
    """Return the microseconds of entry i at tokens[j] rows of float32 input: the lower quartile, or the mean over `seconds`.

    The exporter does not render rounded weights: their rows are None.
    """
    from onnxruntime import OrtValue

    values = np.random.default_rng(0).standard_normal(input_elements(entries, tokens), np.float32)

    def build(entry: Entry) -> Callable[[Any], Any]:
        if entry.get("weights"):
            raise UnsupportedLayerError("the ONNX graph has no rounded weights")
        session = open_layer(random_layer(entry), entry["n"], threads)
        return lambda x: session.run_with_ort_values(["y"], {"x": x})  # y stays in the runtime

    def rows(count: int, n: int) -> Any:
        # Three axes, as in the model: ONNX Runtime fuses a MatMul and an Add of two.
        return OrtValue.ortvalue_from_numpy(values[: count * n].reshape(1, count, n))

    return time_layers(entries, tokens, torch.float32.itemsize, build, rows, seconds)


def random_layer(entry: Entry) -> nn.Module:
    """Build the layer that a `Shape` describes, float32, with random weights."""
    n, m, rank = entry["n"], entry["m"], entry["rank"]
    layer: nn.Module
    with torch.device("meta"):  # without the values that nn.Linear starts with
        if rank is None:
            layer = nn.Linear(n, m, bias=False)
        else:
            spec = GroupSpec(rank, ("layer",), entry["structure"], entry["ordered"])
            layer = LowRankLinear(m, rank, first_factor(spec, n))
    layer.to_empty(device="cpu")
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=n**-0.5)
    for order in layer.buffers():
        order.copy_(torch.randperm(n))
    return layer


def open_layer(layer: nn.Module, n: int, threads: int | None) -> Any:
    """Open a session over a layer's own graph, x (B, S, n) -> y (B, S, m), as over the model's, its weights in a file too."""
    _share_arena()
    with tempfile.TemporaryDirectory(prefix="lrserve-layer-") as folder:
        path = Path(folder) / "layer.onnx"
        save_graph(build_layer(layer, n), path)
        return open_session(path, threads, {"session.use_env_allocators": "1"})


@functools.cache
def _share_arena() -> None:
    """Give the sessions one arena for activations, as layers of one model have, instead of a large one each."""
    import onnxruntime as ort

    memory = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(memory, ort.OrtArenaCfg(0, -1, -1, -1))
