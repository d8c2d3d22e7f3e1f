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
from lrserve.engines.onnx_provider import Provider
from lrserve.engines.onnx_session import TYPES, open_session
from lrserve.engines.timing import Entry, Row, UnsupportedLayerError, input_elements, time_layers
from lrserve.recipe import Dtype
from lrserve.storage.temporary import temporary_folder


def latency_table(
    entries: Sequence[Entry],
    tokens: Sequence[int],
    threads: int | None,
    seconds: float | None,
    *,
    dtype: Dtype = "float32",
    provider: Provider = "cpu",
) -> list[Row]:
    """Return the microseconds of entry i at tokens[j] rows of input in `dtype`: the lower quartile, or the mean over `seconds`.

    Inputs and outputs are on the provider's device. ONNX Runtime has no product by weights of 8-bit floating point numbers: their
    rows are None.
    """
    from onnxruntime import OrtValue

    drawn = torch.from_numpy(np.random.default_rng(0).standard_normal(input_elements(entries, tokens), np.float32))
    # numpy has no bfloat16: the bits of the numbers.
    values = drawn.to(getattr(torch, dtype)).view(torch.int32 if dtype == "float32" else torch.int16).numpy()

    def build(entry: Entry) -> Callable[[Any], Any]:
        weights = entry.get("weights")
        if weights and SCHEMES[weights].floating:
            raise UnsupportedLayerError(f"the ONNX graph multiplies by {weights} weights as float32 ones")
        return OnDevice(open_layer(random_layer(entry), entry["n"], threads, dtype=dtype, provider=provider), provider)

    def rows(count: int, n: int) -> Any:
        # Three axes, as in the model: ONNX Runtime fuses a MatMul and an Add of two.
        return OrtValue.ortvalue_from_numpy_with_onnx_type(values[: count * n].reshape(1, count, n), TYPES[dtype][1])

    return time_layers(entries, tokens, getattr(torch, dtype).itemsize, build, rows, seconds)


class OnDevice:
    """A layer's session, x -> y. Its input is copied to the device when it first comes; y is left there."""

    def __init__(self, session: Any, device: Provider) -> None:
        self._session, self._device = session, device
        self._binding = session.io_binding()
        self._x: Any = None

    def __call__(self, x: Any) -> None:
        """Multiply, and wait until that is done."""
        if x is not self._x:
            self._x = x
            self._binding.bind_ortvalue_input("x", x)
        self._binding.bind_output("y", self._device, 0)  # afresh, or a result of another size would have to fit into the last one
        self._session.run_with_iobinding(self._binding)
        self._binding.synchronize_outputs()


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


def open_layer(layer: nn.Module, n: int, threads: int | None, *, dtype: Dtype = "float32", provider: Provider = "cpu") -> Any:
    """Open a session over a layer's own graph, x (B, S, n) -> y (B, S, m), as over the model's, its weights in a file too."""
    _share_arena()
    with temporary_folder() as folder:
        path = Path(folder) / "layer.onnx"
        save_graph(build_layer(layer, n, dtype), path)
        return open_session(path, threads, {"session.use_env_allocators": "1"}, provider=provider)


@functools.cache
def _share_arena() -> None:
    """Give the sessions one arena for activations, as layers of one model have, instead of a large one each."""
    import onnxruntime as ort

    memory = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(memory, ort.OrtArenaCfg(0, -1, -1, -1))
