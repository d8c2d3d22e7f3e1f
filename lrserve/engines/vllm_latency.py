"""Times of single linear layers, dense, factorized or rounded, with the kernels that serve them (engines/timing.py)."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, Final

import torch
from torch import nn
from vllm.config import set_current_vllm_config
from vllm.platforms import current_platform
from vllm.utils.torch_utils import set_default_torch_dtype

from lrserve.compression.level import SCHEMES, Precision
from lrserve.engines.timing import Entry, Row, UnsupportedLayerError, input_elements, replay_layers, time_layers
from lrserve.plugins.vllm.kernels import Factor, Residual, first_factor

Layer = Callable[[torch.Tensor], torch.Tensor]
TIMERS: Final = {"cpu": time_layers, "cuda": replay_layers}
"""By vLLM's type of device."""


@torch.inference_mode()
def latency_table(
    entries: Sequence[Entry], tokens: Sequence[int], dtype: torch.dtype, seconds: float | None, vllm_config: Any
) -> list[Row]:
    """Return the microseconds of entry i at tokens[j] rows of input (`time_layers`, on a GPU `replay_layers`).

    A layer is timed whole, however many GPUs the engine divides it among. Kernels for rounded weights are chosen under
    `vllm_config`, the engine's.
    """
    device = current_platform.device_type
    values = torch.randn(input_elements(entries, tokens), dtype=dtype, device=device)

    def rows(count: int, n: int) -> torch.Tensor:
        return values[: count * n].view(count, n)

    def build(entry: Entry) -> Layer:
        if not entry.get("weights") and not entry.get("experts"):
            return _build(entry, dtype)
        try:
            layer = _experts(entry, dtype, max(tokens), vllm_config) if entry.get("experts") else _build(entry, dtype)
            layer(rows(1, entry["n"]))
        except Exception as error:  # of whatever kind vLLM's choice of a kernel, and that kernel, raise
            print(f"{entry}: {type(error).__name__}: {error}", file=sys.stderr)
            raise UnsupportedLayerError(str(error)) from error
        return layer

    with set_current_vllm_config(vllm_config), set_default_torch_dtype(dtype):  # as while a model is loaded
        return TIMERS[device](entries, tokens, dtype.itemsize, build, rows, seconds)


def _build(entry: Entry, dtype: torch.dtype) -> Layer:
    n, m, rank = entry["n"], entry["m"], entry["rank"]
    weights: Precision | None = entry.get("weights")
    if rank is None:
        multiply = _packed(Factor(n, m, bias=False, dtype=dtype, weights=weights), weights).multiply
        return _repaired(multiply, entry, dtype) if entry.get("residual") else multiply
    first = _packed(first_factor(entry["structure"], n, rank, ordered=entry["ordered"], dtype=dtype, weights=weights), weights)
    second = _packed(Factor(rank, m, bias=True, dtype=dtype, weights=weights), weights)

    def factorized(x: torch.Tensor) -> torch.Tensor:
        return second.multiply(first.multiply(x))

    return factorized


def _experts(entry: Entry, dtype: torch.dtype, rows: int, vllm_config: Any) -> Layer:
    """Build a mixture of experts to which a router with random logits sends as many rows each, and that router."""
    from vllm.model_executor.layers.fused_moe.layer import FusedMoEFactory

    apart = copy.copy(vllm_config)  # in which vLLM keeps track of this layer, and not in the engine's own
    apart.compilation_config = copy.copy(vllm_config.compilation_config)
    apart.compilation_config.static_forward_context, apart.compilation_config.static_all_moe_layers = {}, []
    count, device = entry["experts"], current_platform.device_type
    with set_current_vllm_config(apart):
        runner = FusedMoEFactory(
            num_experts=count,
            top_k=entry["active"],
            hidden_size=entry["n"],
            intermediate_size=entry["m"],
            params_dtype=dtype,
            prefix="timed",
        )
        experts = runner.routed_experts.to(device)
        _filled(experts, entry["n"] ** -0.5)
        method = experts.quant_method
        method.process_weights_after_loading(experts)
    logits = torch.randn(rows, count, dtype=dtype, device=device)

    def mixture(x: torch.Tensor) -> torch.Tensor:
        weights, chosen = runner.router.select_experts(
            hidden_states=x, router_logits=logits[: len(x)], topk_indices_dtype=method.topk_indices_dtype
        )
        y: Any = method.apply(experts, x, weights, chosen, None, None)
        return y  # type: ignore[no-any-return]

    return mixture


def _repaired(multiply: Layer, entry: Entry, dtype: torch.dtype) -> Layer:
    """Put a residual beside a rounded layer."""
    residual = Residual(SimpleNamespace(), entry["n"], entry["m"], entry["residual"], dtype=dtype)
    for factor in (residual.A, residual.B):
        _filled(factor.to(current_platform.device_type), 1e-4)
    residual.pack()

    def repaired(x: torch.Tensor) -> torch.Tensor:
        return residual.add(x, multiply(x))

    return repaired


def _packed(factor: Factor, weights: Precision | None) -> Factor:
    factor = factor.to(current_platform.device_type)
    n = next(iter(factor.loaded.values())).shape[1]
    _filled(factor, n**-0.5 / (SCHEMES[weights].largest if weights else 1.0))
    factor.pack()
    return factor


def _filled(module: nn.Module, scale: float) -> None:
    """Give weights random values, and scales those of weights that were rounded."""
    for name, parameter in module.named_parameters():
        if name == "order":
            parameter.data.copy_(torch.randperm(len(parameter)))  # a real order is no walk through memory either
        elif name == "weight_scale":
            parameter.data.fill_(scale)
        elif parameter.dtype == torch.float8_e4m3fn:
            parameter.data.copy_(torch.randn(parameter.shape))
        elif parameter.is_floating_point():
            parameter.data.normal_(std=scale)
        elif parameter.dtype == torch.int8:
            parameter.data.random_(-127, 128)
        else:
            parameter.data.random_(-(2**31), 2**31)
