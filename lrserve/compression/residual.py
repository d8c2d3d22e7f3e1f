from __future__ import annotations

from dataclasses import dataclass

import torch

from lrserve.compression.factorize import Side
from lrserve.compression.quantize import Residual, Rounded


@dataclass(frozen=True)
class ResidualSpectrum:
    B: torch.Tensor
    A: torch.Tensor
    values: torch.Tensor
    total: float

    def errors(self) -> torch.Tensor:
        return torch.cat([torch.zeros(1, dtype=torch.float64) + self.total, self.total - self.values.cumsum(0)]).clamp_min(0)

    def cut(self, rank: int) -> Residual:
        B, A = self.B[:, :rank], self.A[:rank]
        b, a = B.abs().amax(0) / 127, A.abs().amax(1) / 127
        return Residual((A / a[:, None]).round().to(torch.int8), (B / b).round().to(torch.int8), (a * b).float())


def residual_spectrum(
    W: torch.Tensor, rounded: Rounded, H: torch.Tensor, gradient: tuple[Side, torch.Tensor] | None
) -> ResidualSpectrum:
    E = W.double() - rounded.dense().double()
    n = len(H)
    e, V = torch.linalg.eigh(H.double() + 1e-6 * H.diagonal().mean() * torch.eye(n, dtype=torch.float64))
    root = e.clamp_min(1e-12).sqrt()
    U, s, Vh = torch.linalg.svd(E @ (V * root), full_matrices=False)
    return ResidualSpectrum(U * s, Vh @ (V / root).T, s.square(), float(s.square().sum()))
