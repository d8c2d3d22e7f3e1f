"""The matrix multiplications of a compressed layer in vLLM, by the kernel that vLLM selects for a linear layer. Imports vLLM.

The compressed layers multiply with these, and so does the table of single-layer latencies, so the table measures what is served.

Quantized multiplications are W8A8: each row of W has a scale, found from its largest entry when the weight is loaded, and each
token's activations are scaled at run time. `compressed-tensors` calls that channel-wise weights and dynamic per-token activations,
and the kernels are the same.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn
from vllm.model_executor.kernels.linear import init_fp8_linear_kernel, init_int8_linear_kernel
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.utils.quant_utils import kFp8DynamicTokenSym, kFp8StaticChannelSym
from vllm.platforms import current_platform

from lrserve.compression.groups import Stored

Precision = Literal["int8", "fp8"]
"""What the weights and activations of a quantized multiplication are rounded to."""


def quantized_kernel(layer: nn.Module, precision: Precision) -> Any:
    """Quantize a module's loaded `weight` (m, n) in place and return the kernel that multiplies by it.

    The kernel keeps what it needs on the module, whose `bias` stays.

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
        self._unquantized = UnquantizedLinearMethod()  # vLLM's own choice of a kernel for this platform

    def pack(self, precision: Precision | None = None) -> None:
        """Quantize the loaded weight, or let vLLM bring it into the layout that its kernel wants; frees the loaded form."""
        if precision is not None:
            self._quantized = quantized_kernel(self, precision)
        else:
            self._unquantized.process_weights_after_loading(self)

    def multiply(self, x: torch.Tensor, *, with_bias: bool = True) -> torch.Tensor:
        """Multiply x (..., n) -> (..., m), the bias in the multiplication's epilogue.

        Called by this name: at a few microseconds, `Module.__call__` would be a tenth of a small layer's multiplication.
        """
        bias = self.bias if with_bias else None
        if self._quantized is not None:
            quantized: torch.Tensor = self._quantized.apply_weights(self, x, bias)
            return quantized
        y: torch.Tensor = self._unquantized.apply(self, x, bias)
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
