"""Products in bfloat16 on CPUs with AVX-512 and without AMX, by a kernel of lrserve's own. Imports no vLLM.

vLLM multiplies with oneDNN there, which on matrices of a megabyte and few tokens reaches half of the machine's bandwidth; and a
compressed model's matrices are smaller than a dense one's. linear.cpp is nearer to it, and as fast as oneDNN in prefill; where the
processor has no products of bfloat16, it is several times as fast (docs/performance.md). It is compiled when first wanted, with
the compiler that torch.compile wants as well, and kept in the cache; without one, products stay vLLM's.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from lrserve.serving import native

_SOURCE: Final = Path(__file__).with_suffix(".cpp")
_FLAGS: Final = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mfma")
_PAIRS_FLAG: Final = "-mavx512bf16"
_C_FUNCTION: Final = (
    "AOTITorchError aoti_torch_cpu_packed_linear("
    "AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle* bias, int64_t m, AtenTensorHandle* y)"
)
_LANES: Final = 16  # rows of W that are multiplied at once
_BLOCK: Final = 3 * _LANES


def supported() -> bool:
    """Say whether this machine is one that the kernel is for."""
    # With AMX, which has several times the operations a second, vLLM's kernels take that.
    return torch.cpu._is_avx512_supported() and not torch.cpu._is_amx_tile_supported()


def takes(weight: torch.Tensor) -> bool:
    """Say whether this machine and a weight (m, n) have the kernel."""
    fits = weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and weight.ndim == 2 and weight.shape[1] % 2 == 0
    return fits and weight.numel() > 0 and supported() and available()


def pack(weight: torch.Tensor) -> torch.Tensor:
    """Bring W (m, n) into the kernel's layout (linear.cpp): (m rounded up to a multiple of 16, n), of which the last rows are 0."""
    m, n = weight.shape
    rows = nn.functional.pad(weight, (0, 0, 0, -m % _LANES))
    blocks = [block.view(-1, n // 2, 2).transpose(0, 1).reshape(-1, n) for block in torch.split(rows, _BLOCK)]
    return torch.cat(blocks)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, m: int) -> torch.Tensor:
    """Multiply x (..., n) by a packed weight and add the bias (m,) -> (..., m)."""
    y: torch.Tensor = torch.ops.lrserve.packed_linear(x, weight, bias, m)
    return y


def version() -> str:
    """Identify the kernel, its source and what of the processor it uses: times of another one are not this one's."""
    return native.version(_SOURCE, _flags())


def _flags() -> list[str]:
    return [*_FLAGS, *([_PAIRS_FLAG] if torch.cpu._is_avx512_bf16_supported() else [])]


@functools.cache
def available() -> bool:
    """Load the kernel, compiling it the first time; say whether that went well."""
    if not native.load(_SOURCE, _flags(), "vLLM's multiplies instead"):
        return False
    torch.library.register_fake("lrserve::packed_linear", lambda x, weight, bias, m: x.new_empty(*x.shape[:-1], m))
    _call_directly()
    return True


class _Shims(dict[Any, list[str]]):
    """C declarations by operation; unlike operations it can be part of the keys of torch.compile's caches."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Shims:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return str, (str(self),)


def _call_directly() -> None:
    """Let graphs that torch.compile writes in C++ (`cpp_wrapper`) call the kernel as a C function, without torch's dispatcher."""
    from torch._inductor import config

    shims = {torch.ops.lrserve.packed_linear.default: [_C_FUNCTION]}
    config.aot_inductor.custom_ops_to_c_shims = _Shims(config.aot_inductor.custom_ops_to_c_shims | shims)


def dispatch(theirs: Any, layer: Any, remove_weight: bool) -> None:
    """Do what vLLM's `dispatch_cpu_unquantized_gemm` (`theirs`) does: set `layer.cpu_linear`, a function of x, weight and bias.

    `remove_weight`: nobody else reads the layer's weight, so it is replaced by its packed form.
    """
    if not takes(layer.weight):
        theirs(layer, remove_weight)
        return
    m, packed = len(layer.weight), pack(layer.weight.data)
    if remove_weight:
        layer.weight = nn.Parameter(packed, requires_grad=False)
        layer.cpu_linear = lambda x, weight, bias: linear(x, weight, bias, m)
    else:
        layer.cpu_linear = lambda x, weight, bias: linear(x, packed, bias, m)
