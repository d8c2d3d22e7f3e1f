"""Times of single linear layers, dense and factorized, with the kernels that serve them (engines/timing.py). Imports vLLM."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from vllm.platforms import current_platform

from lrserve.engines.timing import Entry, input_elements, time_layers
from lrserve.plugins.vllm.kernels import Factor, first_factor

Layer = Callable[[torch.Tensor], torch.Tensor]


@torch.inference_mode()
def latency_table(entries: Sequence[Entry], tokens: Sequence[int], dtype: torch.dtype, seconds: float | None) -> list[list[float]]:
    """Return the microseconds of entry i at tokens[j] rows of input: the lower quartile, or the mean over so many `seconds`."""
    device = current_platform.device_type

    def build(entry: Entry) -> Layer:
        layer = _build(entry, dtype)
        return layer if device == "cpu" else _finished(layer)

    values = torch.randn(input_elements(entries, tokens), dtype=dtype, device=device)

    def rows(count: int, n: int) -> torch.Tensor:
        return values[: count * n].view(count, n)

    return time_layers(entries, tokens, dtype.itemsize, build, rows, seconds)


def _finished(layer: Layer) -> Layer:
    """Let a call take until the accelerator is done."""

    def finished(x: torch.Tensor) -> torch.Tensor:
        y = layer(x)
        torch.accelerator.synchronize()
        return y

    return finished


def _build(entry: Entry, dtype: torch.dtype) -> Layer:
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
