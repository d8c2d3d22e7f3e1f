"""Spectra on disk: every group decomposed once, published block by block, read back through memory maps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from lrserve.compression.calibrate import read_statistics
from lrserve.compression.factorize import Factors, FactorSource, GradientOf, Spectrum, factorize
from lrserve.compression.groups import Group, Structure
from lrserve.compression.layers import exact_names
from lrserve.compression.lowrank import install_low_rank, keep_outputs, load_factors, load_feeding, reorder_outputs
from lrserve.compression.narrow import narrow
from lrserve.compression.spec import specs_of
from lrserve.compression.structure import structured
from lrserve.errors import CalibrationError
from lrserve.storage.store import write_tensors

_FIELDS = ("U", "V", "eigenvalues", "offset", "mean", "beta")


def stacked_weight(model: Any, group: Group) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return a group's stacked weight W (m, n) and bias beta (m,), or None where no member has one."""
    linears = [model.get_submodule(member) for member in group.members]
    weight = torch.cat([linear.weight for linear in linears])
    if all(linear.bias is None for linear in linears):
        return weight, None
    biases = [weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias for linear in linears]
    return weight, torch.cat(biases)


Decompose = Callable[[Group, torch.Tensor, torch.Tensor | None], Spectrum]
"""Factorizes one group's stacked weight (m, n) with its bias (m,) or None."""


def features(statistics: Path, gradient: GradientOf = lambda group: None) -> Decompose:
    """Return the feature factorization on collected statistics; neurons of MLPs that are allocated as one are removed instead.

    Args:
        statistics: folder that `calibrate` filled.
        gradient: a group's gradient moment (`GradientStore.read`), or None to weigh its outputs alike.
    """

    def decompose(group: Group, weight: torch.Tensor, bias: torch.Tensor | None) -> Spectrum:
        covariance = read_statistics(statistics, group)
        solve = narrow if group.fed_by else factorize
        return solve(weight, covariance.C, covariance.mu, bias, gradient(group))

    return decompose


@torch.no_grad()
def write_spectra(
    model: Any,
    groups: Sequence[Group],
    decompose: Decompose,
    folder: Path,
    *,
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Factorize every group at every rank, one file per block; blocks that are already there are kept.

    Args:
        model: the dense model.
        groups: its groups.
        decompose: how a weight is factorized.
        folder: where the spectra go, float32; private to these inputs.
        progress: called with the number of blocks that are done.

    Raises:
        CalibrationError: statistics are missing or not finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for done, (layer, members) in enumerate(groupby(groups, key=lambda group: group.layer), 1):
        path = _path(folder, layer)
        if not path.is_file():
            tensors = {}
            for group in members:
                weight, bias = stacked_weight(model, group)
                spectrum = decompose(group, weight.cpu(), None if bias is None else bias.cpu())
                for field in _FIELDS:
                    tensors[f"{group.name}.{field}"] = getattr(spectrum, field).float().contiguous()
            write_tensors(path, tensors)
        progress(done)


def _path(folder: Path, layer: int) -> Path:
    return folder / f"spectra-{layer:05d}.safetensors"


class SpectrumStore:
    """Reads spectra back. Tensors are views of the file's memory map: what is not touched is not read."""

    def __init__(self, folder: Path, groups: Sequence[Group]) -> None:
        self.folder = folder
        self.groups = {group.name: group for group in groups}
        self._errors: dict[str, torch.Tensor] | None = None

    def spectrum(self, name: str) -> Spectrum:
        """Return the spectrum of a group, float32.

        Raises:
            CalibrationError: the factorization that should have written it did not finish.
        """
        path = _path(self.folder, self.groups[name].layer)
        if not path.is_file():
            raise CalibrationError(f"{path} is missing: the factorization did not finish; run the same command again")
        with safe_open(path, framework="pt") as file:
            return Spectrum(**{field: file.get_tensor(f"{name}.{field}") for field in _FIELDS})

    def cut(self, name: str, rank: int) -> Factors:
        """Return a group's factors at one rank, float32."""
        return self.spectrum(name).cut(rank)

    def errors(self) -> dict[str, torch.Tensor]:
        """Return every group's expected squared error at ranks 0..k (`Spectrum.errors`)."""
        if self._errors is None:
            self._errors = {name: self.spectrum(name).errors() for name in self.groups}
        return self._errors


@torch.no_grad()
def compress_model(
    model: Any,
    ranks: Sequence[tuple[Group, int]],
    structure: Structure,
    source: FactorSource,
    dtype: torch.dtype,
) -> Any:
    """Put compressed layers in the place of a dense model's linears and return the model.

    Every parameter, dense ones included, is rounded to `dtype`, in which it will be stored; the model keeps its own, wider dtype.
    """
    specs, orders = specs_of(ranks, structure), []
    install_low_rank(model, specs)
    for group, rank in ranks:
        factors = structured(source.cut(group.name, rank), group.stored_as(structure))
        load_factors(model, group, factors, dtype)
        if specs[group.name].ordered and factors.order is not None:
            orders.append((group, factors.order))
        if group.fed_by and factors.order is not None:
            keep_outputs(model, group.fed_by, factors.order)
            if factors.feeding is not None:
                load_feeding(model, group.fed_by, factors.feeding, dtype)
    for group, order in orders:  # now that the factors of the layers before are in place
        reorder_outputs(model, group, order)
    return round_parameters(model, dtype)


@torch.no_grad()
def round_parameters(model: Any, dtype: torch.dtype) -> Any:
    """Round every parameter to `dtype`, but for float32 scales, and return the model, whose own, wider dtype stays."""
    exact = exact_names(model)
    for name, parameter in model.named_parameters():
        if name not in exact:
            parameter.copy_(parameter.to(dtype))
    return model


class MergedRanks:
    """A dense model whose weights are rewritten in place to B A + b, for evaluating many plans without rebuilding it.

    Only the groups whose rank changed are rewritten; the dense weights are kept aside. Differs from the factors that are
    exported by the rounding of B A to the model's dtype.
    """

    def __init__(self, model: Any, groups: Sequence[Group], store: SpectrumStore) -> None:
        self.model = model
        self._groups = {group.name: group for group in groups}
        self._store = store
        self._ranks: dict[str, int | None] = {group.name: None for group in groups}
        self._dense = {
            member: (linear.weight, linear.bias)
            for group in groups
            for member in group.members
            for linear in [model.get_submodule(member)]
        }

    def to(self, device: torch.device | str) -> None:
        """Make every group dense and move the model: off a GPU whose memory an engine is about to take, and back."""
        self.apply({})
        self.model.to(device)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @torch.no_grad()
    def apply(self, ranks: dict[str, int | None]) -> None:
        """Set the ranks of the named groups; groups that are not named become dense."""
        for name, group in self._groups.items():
            rank = ranks.get(name)
            if rank == self._ranks[name]:
                continue
            linears = [self.model.get_submodule(member) for member in group.members]
            if rank is None:
                for member, linear in zip(group.members, linears, strict=True):
                    linear.weight, linear.bias = self._dense[member]
            else:
                factors = self._store.cut(name, rank)
                device, dtype = linears[0].weight.device, linears[0].weight.dtype
                weight = (factors.B.to(device) @ factors.A.to(device)).to(dtype)
                bias = factors.b.to(device=device, dtype=dtype)
                rows = list(group.out_features)
                for linear, w, b in zip(linears, torch.split(weight, rows), torch.split(bias, rows), strict=True):
                    linear.weight = torch.nn.Parameter(w, requires_grad=False)
                    linear.bias = torch.nn.Parameter(b, requires_grad=False)
            self._ranks[name] = rank
