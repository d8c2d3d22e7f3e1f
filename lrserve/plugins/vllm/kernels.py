"""The matrix multiplications of a compressed layer in vLLM, by the kernel that vLLM selects for a linear layer. Imports vLLM.

The compressed layers multiply with these, and so does the table of single-layer latencies, so the table measures what is served.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from lrserve.compression.groups import Stored
from lrserve.compression.level import Precision
from lrserve.plugins.vllm.schemes import create_weights, scheme_for


class Factor(nn.Module):
    """y = W x + b with W (m, n): parameter `weight`, or a scheme's where W is rounded, and, if wanted, `bias` (m,).

    A plain module and not one of vLLM's linear classes, so that LoRA leaves it alone. The parameters' names are those that vLLM's
    kernels look for, and those of docs/format.md.
    """

    bias: nn.Parameter | None

    def __init__(
        self, n: int, m: int, *, bias: bool, dtype: torch.dtype, weights: Precision | None = None, prefix: str = "a layer"
    ) -> None:
        super().__init__()
        self.register_parameter("bias", nn.Parameter(torch.empty(m, dtype=dtype), requires_grad=False) if bias else None)
        self._scheme: Any = None
        self._unquantized = UnquantizedLinearMethod()  # vLLM's own choice of a kernel for this platform
        if weights is None:
            self.weight = nn.Parameter(torch.empty(m, n, dtype=dtype), requires_grad=False)
            return
        self._scheme = scheme_for(self, weights, prefix, dtype)
        sizes = {"input_size": n, "input_size_per_partition": n, "output_size": m, "output_partition_sizes": [m]}
        create_weights(self._scheme, self, weights, prefix, {**sizes, "params_dtype": dtype, "weight_loader": None})

    @property
    def loaded(self) -> dict[str, nn.Parameter]:
        """What a checkpoint's tensors go into, by name, but for the bias."""
        return {name: parameter for name, parameter in self.named_parameters(recurse=False) if name not in ("bias", "order")}

    def pack(self) -> None:
        """Let vLLM bring the loaded weight into the layout that its kernel wants; frees the loaded form."""
        if self._scheme is not None:
            self._scheme.process_weights_after_loading(self)
        else:
            self._unquantized.process_weights_after_loading(self)

    def multiply(self, x: torch.Tensor, *, with_bias: bool = True) -> torch.Tensor:
        """Multiply x (..., n) -> (..., m), the bias in the multiplication's epilogue.

        Called by this name: at a few microseconds, `Module.__call__` would be a tenth of a small layer's multiplication.
        """
        bias = self.bias if with_bias else None
        y: torch.Tensor
        if self._scheme is not None:
            y = self._scheme.apply_weights(self, x, bias)
        else:
            y = self._unquantized.apply(self, x, bias)
        return y


class IdentityBlock(Factor):
    """z = x_J + T x_Jc, x (..., n), z (..., r): T (r, n - r) as a factor's weight, and `order` (n,), J's inputs and then Jc's.

    `order` is int64, which `gather` wants, and 0 to n - 1 from the start: vLLM's dummy weights leave integers as they are. It is
    None where the inputs arrive in order.
    """

    order: nn.Parameter | None

    def __init__(
        self,
        n: int,
        rank: int,
        *,
        ordered: bool,
        dtype: torch.dtype,
        weights: Precision | None = None,
        prefix: str = "a layer",
    ) -> None:
        super().__init__(n - rank, rank, bias=False, dtype=dtype, weights=weights, prefix=prefix)
        self.register_parameter("order", None if ordered else nn.Parameter(torch.arange(n), requires_grad=False))
        self._widths = [rank, n - rank]

    def multiply(self, x: torch.Tensor, *, with_bias: bool = True) -> torch.Tensor:
        """Reorder x (..., n) in one pass if need be, then interpolate -> (..., r); there is no bias."""
        if self.order is not None:
            # Not index_select: on the CPU it takes twice as long for 16-bit values as soon as there is more than one row.
            x = x.gather(-1, self.order.expand(x.shape))
        pivots, others = x.split_with_sizes(self._widths, -1)
        if self._scheme is not None:
            others = others.contiguous()  # not every kernel for rounded weights takes a part of a wider tensor
        return super().multiply(others).add_(pivots)


def first_factor(
    stored: Stored,
    n: int,
    rank: int,
    *,
    ordered: bool,
    dtype: torch.dtype,
    weights: Precision | None = None,
    prefix: str = "a layer",
) -> Factor:
    """Build what makes z (..., r) of x (..., n), uninitialised; `ordered` says that x comes as an identity block wants it."""
    if stored == "identity_block":
        return IdentityBlock(n, rank, ordered=ordered, dtype=dtype, weights=weights, prefix=prefix)
    return Factor(n, rank, bias=False, dtype=dtype, weights=weights, prefix=prefix)


class ResidualFactor(Factor):
    """One factor of a residual: int8 as it is loaded, with a scale for each row of A, and then in the dtype that is served."""

    def __init__(self, n: int, m: int, *, scaled: bool, dtype: torch.dtype) -> None:
        super().__init__(0, 0, bias=False, dtype=dtype)
        self._dtype = dtype
        self.weight = nn.Parameter(torch.zeros(m, n, dtype=torch.int8), requires_grad=False)
        self.weight_scale = nn.Parameter(torch.ones(m, 1), requires_grad=False) if scaled else None

    def pack(self) -> None:
        """Dequantize, and bring the weight into the layout of vLLM's kernel."""
        weight = self.weight.data
        if self.weight_scale is not None:
            weight = weight * self.weight_scale.data
            del self.weight_scale
        self.weight = nn.Parameter(weight.to(self._dtype), requires_grad=False)
        super().pack()


class Residual:
    """y + B A x beside a rounded weight, with A (r, n) and B (m, r), which the layer has as `residual_A` and `residual_B`."""

    def __init__(self, layer: Any, n: int, m: int, rank: int, *, dtype: torch.dtype) -> None:
        self.A = layer.residual_A = ResidualFactor(n, rank, scaled=True, dtype=dtype)
        self.B = layer.residual_B = ResidualFactor(rank, m, scaled=False, dtype=dtype)

    def pack(self) -> None:
        """Bring both factors into the layout that vLLM's kernel wants."""
        self.A.pack()
        self.B.pack()

    def add(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Add B A x to y (..., m), in place.

        Two packed multiplications and `add_`: on the CPU `addmm_` into y is slower for few rows, and faster from hundreds on.
        """
        return y.add_(self.B.multiply(self.A.multiply(x)))
