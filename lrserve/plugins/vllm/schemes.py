"""How vLLM multiplies by rounded weights: its own schemes for compressed-tensors checkpoints. Imports vLLM.

A scheme makes a layer's parameters, brings them into the layout of the kernel that vLLM chooses for this platform, and multiplies.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import nn
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig

from lrserve.compression.level import Precision
from lrserve.compression.packing import dequantize, unpack_int4
from lrserve.compression.spec import compressed_tensors_config
from lrserve.errors import EngineError

_log = init_logger(__name__)
_NO_KERNEL: Final = (ValueError, NotImplementedError, RuntimeError, AssertionError)
"""What vLLM raises where it has no kernel for a platform, a shape or a dtype."""


@functools.cache
def _config(precision: Precision) -> CompressedTensorsConfig:
    return CompressedTensorsConfig.from_config(compressed_tensors_config(precision, ["re:.*"]))


def linear_method(precision: Precision) -> Any:
    """Return vLLM's method for a layer that has a scheme of this precision as `scheme`."""
    return _config(precision).get_linear_method()


def scheme_for(layer: nn.Module, precision: Precision, prefix: str, dtype: torch.dtype) -> Any:
    """Return a scheme of vLLM's own choice for one layer that computes in `dtype`.

    Raises:
        EngineError: this vLLM has none for this platform.
    """
    try:
        scheme = _config(precision).get_scheme(layer, prefix)
    except _NO_KERNEL as error:
        raise no_kernel(prefix, precision, error) from error
    return InFloat32(scheme) if dtype == torch.float32 else scheme


def create_weights(scheme: Any, layer: nn.Module, precision: Precision, prefix: str, sizes: Mapping[str, Any]) -> None:
    """Let a scheme hang its parameters into a layer.

    Raises:
        EngineError: vLLM has no kernel for these sizes.
    """
    try:
        scheme.create_weights(layer=layer, **sizes)
    except _NO_KERNEL as error:
        raise no_kernel(prefix, precision, error) from error


def no_kernel(prefix: str, precision: Precision, error: Exception) -> EngineError:
    """Return the error that names the layer which vLLM cannot multiply here, with vLLM's reason."""
    reason = " ".join(str(error).split())
    return EngineError(
        f"{prefix}: vLLM has no kernel for {precision} weights of this layer on this machine ({reason}). Serve the artifact "
        "with other hardware or another tensor_parallel_size, or compress with another precision"
    )


class InFloat32:
    """A scheme where vLLM computes in float32: multiplies by Q (m, n) in float32, and does not round inputs.

    The map without any rounding but that of the stored weights, against which others can be held: where inputs are rounded, the
    last bit of one decides to which side it falls, and a deep model makes of that what it makes of all rounding. vLLM's kernels
    for 4 bits do not compute in float32 at all. It takes 4 to 8 times the memory, so vLLM's log says that it is used.
    """

    def __init__(self, scheme: Any) -> None:
        self._scheme = scheme
        self._float = UnquantizedLinearMethod()

    def create_weights(self, layer: Any, params_dtype: torch.dtype, **sizes: Any) -> None:
        """Hang in the parameters of the 16-bit scheme, the scales in float32."""
        self._scheme.create_weights(layer=layer, params_dtype=torch.bfloat16, **sizes)
        layer.weight_scale.data = layer.weight_scale.data.to(params_dtype)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Dequantize."""
        _log.warning_once("lrserve: for float32, rounded weights are dequantized when they are loaded, and inputs are not rounded")
        scales = layer.weight_scale.data
        packed = hasattr(layer, "weight_packed")
        values = unpack_int4(layer.weight_packed.data) if packed else layer.weight.data.float()
        weight = dequantize(values, scales)
        for name in ("weight_packed", "weight_scale", "weight_shape") if packed else ("weight_scale", "weight"):
            delattr(layer, name)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        self._float.process_weights_after_loading(layer)

    def apply_weights(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Multiply x (..., n) -> (..., m)."""
        y: torch.Tensor = self._float.apply(layer, x, bias)
        return y
