"""Spectra on disk: every group decomposed once, published block by block, read back through memory maps.

A spectrum is what the factors of any rank are cut from: `Spectrum` or, where neurons of an MLP are removed, `Neurons`, whose
covariance is not stored again but read from the statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from lrserve.compression.calibrate import read_expert_statistics, read_statistics
from lrserve.compression.experts import KeptExperts, rank_experts
from lrserve.compression.factorize import Factors, GradientOf, Spectrum, factorize, moved, tails
from lrserve.compression.groups import Group, Mixture
from lrserve.compression.level import Level
from lrserve.compression.narrow import Neurons, narrow
from lrserve.errors import CalibrationError, NotFiniteError
from lrserve.storage.store import write_tensors

_FIELDS = ("U", "V", "eigenvalues", "offset", "mean", "beta")
_FIELDS_OF_NEURONS = ("order", "eigenvalues", "WR", "scales", "offset", "mean", "beta")


def stacked_weight(model: Any, group: Group) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return a group's stacked weight W (m, n) and bias beta (m,), or None where no member has one."""
    linears = [model.get_submodule(member) for member in group.members]
    weight = torch.cat([linear.weight for linear in linears])
    if all(linear.bias is None for linear in linears):
        return weight, None
    biases = [weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias for linear in linears]
    return weight, torch.cat(biases)


Decompose = Callable[[Group, torch.Tensor, torch.Tensor | None], Spectrum | Neurons]
"""Factorizes one group's stacked weight (m, n) with its bias (m,) or None, on their device."""


def features(statistics: Path, gradient: GradientOf = lambda group: None) -> Decompose:
    """Return the feature factorization on collected statistics; neurons of MLPs that are allocated as one are removed instead.

    Args:
        statistics: folder that `calibrate` filled.
        gradient: a group's gradient moment (`GradientStore.read`), or None to weigh its outputs alike.
    """

    def decompose(group: Group, weight: torch.Tensor, bias: torch.Tensor | None) -> Spectrum | Neurons:
        covariance, device = read_statistics(statistics, group), weight.device
        solve = narrow if group.fed_by else factorize
        return solve(weight, covariance.C.to(device), covariance.mu.to(device), bias, moved(gradient(group), device))

    return decompose


@torch.no_grad()
def write_spectra(
    model: Any,
    groups: Sequence[Group],
    decompose: Decompose,
    folder: Path,
    *,
    statistics: Path | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Factorize every group at every rank, one file per block; blocks that are already there are kept.

    Of a mixture, the order of its experts and of their neurons, and the errors of removing them, are written.

    One group at a time is factorized on the model's device, or on the CPU where it does not fit there. A group whose decomposition
    fails or is not finite in float32 has eigenvalues of NaN and nothing else (`SpectrumStore.not_finite`).

    Args:
        model: the dense model.
        groups: its groups.
        decompose: how a weight is factorized.
        folder: where the spectra go, float32; private to these inputs.
        statistics: folder that `calibrate` filled; needed where `groups` has mixtures of experts.
        progress: called with the number of blocks that are done.

    Raises:
        CalibrationError: statistics are missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for done, (layer, members) in enumerate(groupby(groups, key=lambda group: group.layer), 1):
        path = _path(folder, layer)
        if not path.is_file():
            tensors: dict[str, torch.Tensor] = {}
            for group in members:
                if isinstance(group, Mixture):
                    assert statistics is not None
                    down = model.get_submodule(group.members[0]).down_proj
                    found = rank_experts(group, down, read_expert_statistics(statistics, group))
                    tensors |= {f"{group.name}.{field}": tensor for field, tensor in found.items()}
                    continue
                weight, bias = stacked_weight(model, group)
                tensors |= _stored(group, decompose, weight, bias)
            write_tensors(path, tensors)
        progress(done)


def _stored(group: Group, decompose: Decompose, weight: torch.Tensor, bias: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Return a group's spectrum as it is stored: in float32."""
    try:
        spectrum = _decomposed(group, decompose, weight, bias)
        fields = {field: getattr(spectrum, field).cpu().contiguous() for field in _fields(group)}
        found = {field: value.float() if value.is_floating_point() else value for field, value in fields.items()}
    except (NotFiniteError, torch.linalg.LinAlgError):  # type: ignore[attr-defined]  # which does not converge
        found = {}
    if not found or not all(torch.isfinite(tensor).all() for tensor in found.values()):
        found = {"eigenvalues": torch.full((group.full_rank,), torch.nan)}
    return {f"{group.name}.{field}": tensor for field, tensor in found.items()}


def _fields(group: Group) -> tuple[str, ...]:
    return _FIELDS_OF_NEURONS if group.fed_by else _FIELDS


def _decomposed(group: Group, decompose: Decompose, weight: torch.Tensor, bias: torch.Tensor | None) -> Spectrum | Neurons:
    """Decompose a group on its device, or on the CPU where a GPU has no room for it beside the model."""
    with suppress(torch.OutOfMemoryError):
        return decompose(group, weight, bias)
    return decompose(group, weight.cpu(), None if bias is None else bias.cpu())


def _path(folder: Path, layer: int) -> Path:
    return folder / f"spectra-{layer:05d}.safetensors"


class SpectrumStore:
    """Reads spectra back. Tensors are views of the file's memory map: what is not touched is not read.

    Args:
        folder: what `write_spectra` filled.
        groups: the groups that it factorized.
        statistics: folder of their statistics; needed to cut groups of which neurons are removed, and narrower experts.
        device: where such a group is solved.
    """

    def __init__(
        self, folder: Path, groups: Sequence[Group], statistics: Path | None = None, device: torch.device | str = "cpu"
    ) -> None:
        self.folder, self._statistics, self._device = folder, statistics, device
        self.groups = {group.name: group for group in groups}
        self._errors: dict[str, torch.Tensor] | None = None

    def spectrum(self, name: str) -> Spectrum | Neurons:
        """Return the spectrum of a group, float32.

        Raises:
            CalibrationError: the factorization that should have written it did not finish.
        """
        group = self.groups[name]
        tensors = self._read(group, _fields(group))
        if not group.fed_by:
            return Spectrum(**tensors)
        if self._statistics is None:
            raise ValueError(f"{name}: without statistics there is no covariance to solve from")
        C = read_statistics(self._statistics, group).C  # stays in its file: a cut reads what it needs
        return Neurons(**{field: tensor.to(self._device) for field, tensor in tensors.items()}, C=C)

    def cut(self, name: str, rank: int) -> Factors:
        """Return a group's factors at one rank, float32."""
        return self.spectrum(name).cut(rank)

    def kept(self, mixture: Mixture, level: Level) -> KeptExperts:
        """Return what a mixture keeps at a level."""
        count, width = mixture.sizes(level)
        experts = self._read(mixture, ("experts",))["experts"][:count].sort().values
        if width == mixture.n:
            return KeptExperts(experts)
        assert self._statistics is not None
        neurons = self._read(mixture, ("neurons",))["neurons"][experts, :width]
        return KeptExperts(experts, neurons, read_expert_statistics(self._statistics, mixture))

    def not_finite(self) -> frozenset[str]:
        """Return the names of the groups that have no finite spectrum, and so no factors."""
        return frozenset(name for name, errors in self.errors().items() if not torch.isfinite(errors).all())

    def errors(self) -> dict[str, torch.Tensor]:
        """Return every group's expected squared error at ranks 0..k (`Spectrum.errors`), of a mixture those of `rank_experts`."""
        if self._errors is None:
            self._errors = {}
            for name, group in self.groups.items():
                field = "errors" if isinstance(group, Mixture) else "eigenvalues"
                found = self._read(group, (field,))[field]
                self._errors[name] = found.double() if isinstance(group, Mixture) else tails(found)
        return self._errors

    def _read(self, group: Group, fields: Sequence[str]) -> dict[str, torch.Tensor]:
        path = _path(self.folder, group.layer)
        if not path.is_file():
            raise CalibrationError(f"{path} is missing: the factorization did not finish; run the same command again")
        with safe_open(path, framework="pt") as file:
            return {field: file.get_tensor(f"{group.name}.{field}") for field in fields}
