"""The products of a factorized layer in the serving engine: vLLM's own unquantized kernel for the platform, weights packed.

The low-rank layer multiplies with these, and so does the table of single-layer latencies, so the table measures what is
served. Imports vLLM.
"""

from __future__ import annotations

import torch
from torch import nn
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm, dispatch_unquantized_gemm
from vllm.platforms import current_platform

from lrserve.compression.groups import Structure


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
        config = get_current_vllm_config_or_none()
        self._gemm = dispatch_unquantized_gemm(config.kernel_config.linear_backend if config is not None else "auto")

    def pack(self) -> None:
        """Bring the loaded weight into the layout that the CPU kernels want; without it they run at half the speed.

        Nothing to do elsewhere. Frees the unpacked weight.
        """
        if current_platform.is_cpu():
            dispatch_cpu_unquantized_gemm(self, remove_weight=True)

    def multiply(self, x: torch.Tensor, *, with_bias: bool = True) -> torch.Tensor:
        """Multiply x (..., n) -> (..., m), the bias in the multiplication's epilogue.

        Called by this name: at a few microseconds, `Module.__call__` would be a tenth of a small layer's multiplication.
        """
        y: torch.Tensor = self._gemm(self, x, self.weight, self.bias if with_bias else None)
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


def first_factor(structure: Structure, n: int, rank: int, *, ordered: bool, dtype: torch.dtype) -> Factor:
    """Build what makes z (..., r) of x (..., n), uninitialised; `ordered` says that x comes as an identity block wants it."""
    if structure == "identity_block":
        return IdentityBlock(n, rank, ordered=ordered, dtype=dtype)
    return Factor(n, rank, bias=False, dtype=dtype)
