"""How compressed-tensors stores rounded weights: values with a scale for neighbouring inputs, and 4-bit integers packed.

`pack-quantized` has eight 4-bit integers in one int32: the first in the lowest bits, plus 8.
"""

from __future__ import annotations

import torch


def _shifts(device: torch.device) -> torch.Tensor:
    return torch.arange(0, 32, 4, dtype=torch.int32, device=device)


def pack_int4(values: torch.Tensor) -> torch.Tensor:
    """Pack int8 values (m, n) from -8 to 7 -> int32 (m, n / 8)."""
    m, n = values.shape
    nibbles = (values.to(torch.int32) + 8).view(m, n // 8, 8)
    return (nibbles << _shifts(values.device)).sum(-1, dtype=torch.int32)  # without carries, and so modulo 2^32


def unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """Unpack int32 (m, n / 8) -> int8 (m, n)."""
    nibbles = (packed[:, :, None] >> _shifts(packed.device)) & 15
    return (nibbles - 8).to(torch.int8).flatten(1)


def dequantize(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Multiply values (m, n), integers or of the scales' dtype, by scales (m, n / g), each of g neighbours -> (m, n)."""
    return (values.view(*scales.shape, -1) * scales[:, :, None]).flatten(1)
