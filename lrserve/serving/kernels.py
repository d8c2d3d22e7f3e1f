"""The products of a layer in the serving engine: the kernel that serves it there, weights packed or quantized. Imports vLLM.

The compressed layers multiply with these, and so does the table of single-layer latencies, so the table measures what is served.

Quantized products are W8A8: each row of W has a scale of its own, found from its largest entry when the weight is loaded, and each
token's activations are scaled when they come. That is what `compressed-tensors` calls channel-wise weights and dynamic per-token
activations; the kernels are the same, but for int8 on CPUs with AVX-512 and without AMX. There vLLM scales the activations and
multiplies in two calls. Its build also has SGLang's kernel, which does both in one and which vLLM takes where there is AMX; a
decode step of small layers is as long as its calls, so lrserve takes it wherever it runs (docs/performance.md).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.kernels.linear import init_fp8_linear_kernel, init_int8_linear_kernel
from vllm.model_executor.layers import utils
from vllm.model_executor.layers.quantization.utils.quant_utils import kFp8DynamicTokenSym, kFp8StaticChannelSym
from vllm.platforms import current_platform

from lrserve.compression.groups import Stored

Precision = Literal["int8", "fp8"]
"""What the weights and activations of a quantized product are rounded to."""


class _Int8InOneCall:
    """SGLang's W8A8 product in vLLM's build: x is scaled by tokens and multiplied by an int8 W (m, n) in one operation."""

    @staticmethod
    def takes(weight: torch.Tensor) -> bool:
        """Say whether this machine, build and shape have the kernel; its blocks are 32 rows by 32 columns of W."""
        m, n = weight.shape
        return (
            current_platform.is_cpu()
            and weight.dtype == torch.bfloat16
            and torch.cpu._is_vnni_supported()
            and torch.cpu._is_avx512_bf16_supported()  # the one of vLLM's builds that it was tried in
            and hasattr(torch.ops._C, "int8_scaled_mm_with_quant")
            and m % 32 == 0
            and n % 32 == 0
        )

    def __init__(self, layer: Any, rounded: torch.Tensor, scale: torch.Tensor) -> None:
        """Keep an int8 W (m, n) on the module, packed, as its `weight`, scale (m, 1) as `weight_scale`, the bias as `bias_fp32`."""
        bias = None if layer.bias is None else nn.Parameter(layer.bias.float(), requires_grad=False)
        layer.register_parameter("bias_fp32", bias)
        layer.weight = nn.Parameter(torch.ops._C.convert_weight_packed(rounded), requires_grad=False)
        layer.weight_scale = nn.Parameter(scale.flatten(), requires_grad=False)

    def apply_weights(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Multiply x (..., n) -> (..., m); `bias` is the module's own, or None."""
        rows, m = x.reshape(-1, x.shape[-1]), len(layer.weight_scale)
        if not len(rows):  # the kernel would divide by it
            return x.new_empty(*x.shape[:-1], m)
        own = None if bias is None else layer.bias_fp32
        y: torch.Tensor = torch.ops._C.int8_scaled_mm_with_quant(rows, layer.weight, layer.weight_scale, own, x.dtype, True)
        return y.view(*x.shape[:-1], m)


def quantized_kernel(layer: nn.Module, precision: Precision) -> Any:
    """Quantize a module's loaded `weight` (m, n) in place and return the kernel that multiplies by it.

    That is vLLM's, or `_Int8InOneCall`, which has its method. It keeps what it needs on the module, whose `bias` stays.

    Raises:
        ValueError: vLLM has no such kernel for this platform.
    """
    weight = layer.weight.data
    assert isinstance(weight, torch.Tensor)
    largest = weight.abs().amax(dim=1, keepdim=True).float().clamp_min(torch.finfo(torch.float16).tiny)
    kernel: Any
    if precision == "int8":
        scale = largest / torch.iinfo(torch.int8).max
        rounded = (weight / scale).round().to(torch.int8)
        if _Int8InOneCall.takes(weight):
            return _Int8InOneCall(layer, rounded, scale)
        kernel = init_int8_linear_kernel(
            is_channelwise=True, is_static_input_scheme=False, input_symmetric=True, module_name="lrserve"
        )
    else:
        kernel = init_fp8_linear_kernel(
            activation_quant_key=kFp8DynamicTokenSym,
            weight_quant_key=kFp8StaticChannelSym,
            weight_shape=(weight.shape[0], weight.shape[1]),
            input_dtype=weight.dtype,
            out_dtype=weight.dtype,
            module_name="lrserve",
        )
        dtype = current_platform.fp8_dtype()
        scale = largest / torch.finfo(dtype).max
        rounded = (weight / scale).to(dtype).t()
    module: Any = layer
    module.logical_widths = [weight.shape[0]]
    module.weight = nn.Parameter(rounded, requires_grad=False)
    module.weight_scale = nn.Parameter(scale, requires_grad=False)
    module.input_scale = module.input_zero_point = module.azp_adj = None
    kernel.process_weights_after_loading(layer)
    return kernel


class Factor(nn.Module):
    """y = W x + b with W (m, n): parameters `weight` and, if wanted, `bias` (m,).

    A plain module and not one of vLLM's linear classes, so that LoRA leaves it alone. The parameters' names are those
    that vLLM's kernels look for.
    """

    bias: nn.Parameter | None

    def __init__(self, n: int, m: int, *, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(m, n, dtype=dtype), requires_grad=False)
        if bias:
            self.bias = nn.Parameter(torch.empty(m, dtype=dtype), requires_grad=False)
        else:
            self.register_parameter("bias", None)
        self._quantized: Any = None
        config = get_current_vllm_config_or_none()
        self._gemm = utils.dispatch_unquantized_gemm(config.kernel_config.linear_backend if config is not None else "auto")

    def pack(self, precision: Precision | None = None) -> None:
        """Quantize the loaded weight, or bring it into the layout that the CPU kernels want: without it they run at half the speed.

        Frees the weight as it was loaded. Unquantized, there is nothing to do on other platforms.
        """
        if precision is not None:
            self._quantized = quantized_kernel(self, precision)
        elif current_platform.is_cpu():
            utils.dispatch_cpu_unquantized_gemm(self, remove_weight=True)  # lrserve's, where plugin.py has put it

    def multiply(self, x: torch.Tensor, *, with_bias: bool = True) -> torch.Tensor:
        """Multiply x (..., n) -> (..., m), the bias in the multiplication's epilogue.

        Called by this name: at a few microseconds, `Module.__call__` would be a tenth of a small layer's multiplication.
        """
        bias = self.bias if with_bias else None
        if self._quantized is not None:
            product: torch.Tensor = self._quantized.apply_weights(self, x, bias)
            return product
        y: torch.Tensor = self._gemm(self, x, self.weight, bias)
        return y


class IdentityBlock(Factor):
    """z = x_J + T x_Jc, x (..., n), z (..., r): parameters `weight`, T (r, n - r), and `order` (n,), J's inputs and then Jc's.

    `order` is int64, which `gather` wants, and 0 to n - 1 from the start: vLLM's dummy weights leave integers as they are. It is
    None where the inputs arrive in order.
    """

    order: nn.Parameter | None

    def __init__(self, n: int, rank: int, *, ordered: bool, dtype: torch.dtype) -> None:
        super().__init__(n - rank, rank, bias=False, dtype=dtype)
        self.register_parameter("order", None if ordered else nn.Parameter(torch.arange(n), requires_grad=False))
        self._widths = [rank, n - rank]

    def multiply(self, x: torch.Tensor, *, with_bias: bool = True) -> torch.Tensor:
        """Reorder x (..., n) in one pass if need be, then interpolate -> (..., r); there is no bias."""
        if self.order is not None:
            # Not index_select: on the CPU it takes twice as long for 16-bit values as soon as there is more than one row.
            x = x.gather(-1, self.order.expand(x.shape))
        pivots, others = x.split_with_sizes(self._widths, -1)
        return super().multiply(others).add_(pivots)


def first_factor(stored: Stored, n: int, rank: int, *, ordered: bool, dtype: torch.dtype) -> Factor:
    """Build what makes z (..., r) of x (..., n), uninitialised; `ordered` says that x comes as an identity block wants it."""
    if stored == "identity_block":
        return IdentityBlock(n, rank, ordered=ordered, dtype=dtype)
    return Factor(n, rank, bias=False, dtype=dtype)
