"""Putting compressed layers in the place of dense linears, and values into them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from lrserve.compression.experts import resize_experts
from lrserve.compression.factorize import Factors
from lrserve.compression.groups import ORDERED, Group, family_of, is_dense
from lrserve.compression.layers import (
    Factor,
    FirstFactor,
    IdentityBlock,
    LowRankLinear,
    Matrix,
    ResidualFactor,
    RoundedLinear,
    SharedResidual,
    first_factor,
)
from lrserve.compression.level import SCHEMES
from lrserve.compression.quantize import Residual, Rounded
from lrserve.compression.spec import GroupSpec, check_groups, leaves
from lrserve.errors import ArtifactError, CalibrationError


def install_low_rank(model: nn.Module, specs: Mapping[str, GroupSpec], prefix: str = "") -> None:
    """Replace the dense linears of every listed group by layers with uninitialised factors, rounded weights and residuals.

    Mixtures of experts get as many experts, of as many neurons, as they are listed with, uninitialised.
    Linears that lose outputs are left as they are: uninitialised on the meta device, else for `keep_outputs` and `load_rounded`.

    `prefix` is cut off the group names first: a base model loaded from a causal LM's checkpoint has no `model.` level.

    Raises:
        ArtifactError: a listed group whose linears the model does not have, or whose weights cannot be rounded in those groups.
    """
    for name, spec in specs.items():
        if spec.structure == "experts":
            _resize(model, name, spec, prefix)
            continue
        parent_name, _, leaf = name.removeprefix(prefix).rpartition(".")
        linears: list[nn.Linear] = []
        try:
            parent = model.get_submodule(parent_name)
            for member in spec.members:
                linear = parent.get_submodule(member)
                if not is_dense(linear):
                    raise ArtifactError(f"{name}: {member} is a {type(linear).__name__}, not a dense linear layer")
                linears.append(linear)
        except AttributeError as error:
            raise ArtifactError(f"{name}: config.json names a layer that the model does not have ({error})") from None
        weight, n = linears[0].weight, linears[0].in_features
        check_groups(name, spec, n)
        if spec.structure == "identity_block" and spec.rank >= n:
            raise ArtifactError(f"{name}: an identity block of rank {spec.rank} leaves nothing of {n} inputs")
        A: Factor | IdentityBlock | FirstFactor | None = None
        if spec.structure in ("low_rank", "identity_block"):
            first = first_factor(spec, n, weight.dtype, weight.device)
            A = first if spec.members == (leaf,) else FirstFactor(first)
        if isinstance(A, FirstFactor):
            parent.add_module(leaf, A)
        for member, linear in zip(spec.members, linears, strict=True):
            narrow_out = spec.structure == "narrow_out"
            if narrow_out and spec.rows > linear.out_features:
                raise ArtifactError(f"{name}: {spec.rank} of {linear.out_features} neurons cannot be kept")
            if narrow_out and not weight.is_meta:
                continue
            layer: nn.Module
            if spec.structure not in ("dense", "narrow_out"):
                layer = LowRankLinear(linear.out_features, spec.rank, A, weight.dtype, weight.device, spec.weights)
            elif spec.weights is not None:
                layer = RoundedLinear.of(linear, spec.weights, spec.rows if narrow_out else None)
            else:
                biased = linear.bias is not None
                layer = nn.Linear(n, spec.rows, biased, dtype=weight.dtype, device=weight.device)
            setattr(parent, member, layer)
        if spec.residual and (spec.structure != "narrow_out" or weight.is_meta):
            _add_residual(parent, leaf, spec.members, spec.residual)


def _resize(model: Any, name: str, spec: GroupSpec, prefix: str) -> None:
    """Let a mixture have as many experts, and neurons in each, as its spec says."""
    names, own = family_of(model.config).experts, name.removeprefix(prefix)
    try:
        if names is None or not own.endswith(f".{names.fused}"):
            raise AttributeError("no mixture of experts has this name")
        layer = model.get_submodule(own.removesuffix(f".{names.fused}"))
        resize_experts(layer, names, model.config, spec.experts, spec.rank)
    except AttributeError as error:
        raise ArtifactError(f"{name}: config.json names a layer that the model does not have ({error})") from None
    except ValueError as error:
        raise ArtifactError(f"{name}: {error}. Export the artifact again") from None


def _add_residual(parent: nn.Module, leaf: str, members: Sequence[str], rank: int) -> None:
    """Add an uninitialised residual to the layers of the group `leaf`."""
    layers: list[RoundedLinear | LowRankLinear] = []
    for member in members:
        layer = parent.get_submodule(member)
        if not isinstance(layer, (RoundedLinear, LowRankLinear)) or layer.weights is None:
            raise TypeError(f"{member} is a {type(layer).__name__}; a residual stands beside a rounded weight")
        layers.append(layer)
    A = ResidualFactor(layers[0].in_features, rank, scaled=True, device=next(layers[0].parameters()).device)
    shared: ResidualFactor | SharedResidual = A
    if tuple(members) != (leaf,):
        shared = SharedResidual(A)
        setattr(parent, leaf, shared)
    for layer in layers:
        layer.add_residual(shared, layer.out_features)


@torch.no_grad()
def load_factors(model: nn.Module, group: Group, factors: Factors, dtype: torch.dtype | None = None) -> None:
    """Copy one group's factors into the layers that `install_low_rank` made; of rounded ones the biases and the order only.

    Args:
        model: where `install_low_rank` ran.
        group: names and row counts.
        factors: of the structure that the layers were made for (`structured`). Where the layers want their inputs ordered, the
            outputs that these come from are for the caller to reorder (`reorder_outputs`).
        dtype: round the factors to this dtype first, for a model that computes in a wider one.

    Raises:
        CalibrationError: a factor that is not finite in the dtype it is stored in.
    """
    rows = list(group.out_features)
    for member, B, b in zip(group.members, torch.split(factors.B, rows), torch.split(factors.b, rows), strict=True):
        layer = model.get_submodule(member)
        if not isinstance(layer, LowRankLinear):
            raise TypeError(f"{member} is a {type(layer).__name__}, not a LowRankLinear")
        parameters: list[tuple[torch.Tensor, torch.Tensor]] = [(layer.bias, b)]
        for matrix, value in ((layer.B, B), (layer.first, factors.A)):
            if matrix is not None and matrix.weights is None:
                parameters.append((matrix.weight, value))
        for parameter, value in parameters:
            _copy_rounded(member, parameter, value, dtype)
        if isinstance(layer.first, IdentityBlock):
            if factors.order is None:
                raise TypeError(f"{member} is an identity block, the factors are not")
            if layer.first.order is not None:
                layer.first.order.copy_(factors.order)


def _copy_rounded(member: str, parameter: torch.Tensor, value: torch.Tensor, dtype: torch.dtype | None) -> None:
    rounded = value.to(dtype or parameter.dtype)
    if not torch.isfinite(rounded).all():
        raise CalibrationError(f"{member}: a factor is not finite in {rounded.dtype}; keep this group dense")
    parameter.copy_(rounded)


@torch.no_grad()
def load_rounded(model: Any, group: Group, matrix: Literal["weight", "A", "B"], rounded: Rounded) -> None:
    """Put a rounded weight into the layers of one group, in the place of what they held, rounded or not.

    Args:
        model: after `install_low_rank` and `load_factors` or `keep_outputs`, where the group is not dense.
        group: names and row counts.
        matrix: `A` (r, n), or T (r, n - r) of an identity block; `B` (m, r), of all members stacked, of fewer neurons too; `weight`
            (m, n), stacked, of linears that are dense or lost outputs: they become `RoundedLinear` layers with their old biases.
        rounded: of that shape.
    """
    layers = [model.get_submodule(member) for member in group.members]
    if matrix == "A":
        layers[0].first.put(rounded)
        return
    rows = [layer.out_features for layer in layers]
    for member, layer, values, scales in zip(
        group.members, layers, rounded.values.split(rows), rounded.scales.split(rows), strict=True
    ):
        part = Rounded(rounded.precision, values, scales)
        if matrix == "B":
            layer.B.put(part)
            continue
        if is_dense(layer):
            layer = RoundedLinear.of(layer, rounded.precision)
            model.set_submodule(member, layer)
        layer.put(part)


@torch.no_grad()
def load_residual(model: Any, group: Group, residual: Residual) -> None:
    """Put a residual, A (r, n) and B (m, r) of all members stacked, beside the rounded weight of one group (`load_rounded`)."""
    parent, _, leaf = group.name.rpartition(".")
    layers = [model.get_submodule(member) for member in group.members]
    if any(getattr(layer, "residual", None) != residual.rank for layer in layers):
        _add_residual(model.get_submodule(parent), leaf, leaves(group.members), residual.rank)
    start = 0
    for layer in layers:
        layer.put_residual(residual, slice(start, start + layer.out_features))
        start += layer.out_features


@torch.no_grad()
def load_feeding(model: Any, group: Group, feeding: torch.Tensor, dtype: torch.dtype) -> None:
    """Copy trained rows (members k, d) into the linears of a group of which `keep_outputs` left k outputs, rounded to `dtype`.

    Raises:
        CalibrationError: a row that is not finite in that dtype.
    """
    for member, rows in zip(group.members, feeding.chunk(len(group.members)), strict=True):
        _copy_rounded(member, model.get_submodule(member).weight, rows, dtype)


@torch.no_grad()
def keep_outputs(model: Any, group: Group, kept: torch.Tensor) -> None:
    """Let a group of dense linears give only the neurons `kept` (k,), in that order."""
    for member in group.members:
        linear = model.get_submodule(member)
        if not is_dense(linear):
            raise TypeError(f"{member} is a {type(linear).__name__}; outputs are removed before weights are rounded")
        rows = rows_of_neurons(kept.to(linear.weight.device), linear.out_features, group.stacked)
        smaller = nn.Linear(linear.in_features, len(rows), linear.bias is not None, device="meta", dtype=linear.weight.dtype)
        for name, parameter in linear.named_parameters():
            setattr(smaller, name, nn.Parameter(parameter[rows], requires_grad=parameter.requires_grad))
        model.set_submodule(member, smaller)


@torch.no_grad()
def reorder_outputs(model: Any, group: Group, order: torch.Tensor) -> None:
    """Let the inputs of a group of a kind in `ORDERED` arrive in `order` (n,): the rows of what they come from change places.

    Exact, and costs nothing when the model runs. Adapters that were trained on the rows in their old places no longer fit.
    """
    family = family_of(model.config)
    feeding = family.groups[ORDERED[group.kind]]
    for member in feeding.members:
        layer = model.get_submodule(f"{family.layers}.{group.layer}.{member}")
        rows = layer.B if isinstance(layer, LowRankLinear) else layer
        tensors = rows.row_tensors() if isinstance(rows, Matrix) else [parameter.data for parameter in rows.parameters()]
        if getattr(layer, "residual", 0):
            tensors.append(layer.residual_B.weight)
        for tensor in tensors:
            tensor.copy_(tensor[rows_of_neurons(order.to(tensor.device), len(tensor), feeding.stacked)])


def rows_of_neurons(neurons: torch.Tensor, rows: int, stacked: int) -> torch.Tensor:
    """Return the rows of some neurons (k,) in each of `stacked` linears that lie one after the other in so many rows."""
    starts = torch.arange(0, rows, rows // stacked, device=neurons.device)
    return (starts[:, None] + neurons.long()).flatten()


def is_rounded(model: nn.Module) -> bool:
    """Whether some of a model's weights are rounded."""
    return any(isinstance(module, (RoundedLinear, LowRankLinear)) and module.weights is not None for module in model.modules())


def has_rounded_inputs(model: nn.Module) -> bool:
    """Whether some of a model's layers round their inputs in 16 bits."""
    weights = (module.weights for module in model.modules() if isinstance(module, Matrix))
    return any(precision is not None and SCHEMES[precision].rounds_inputs for precision in weights)


@torch.no_grad()
def dequantized(model: Any) -> Any:
    """Let a model compute in floating point numbers: rounded weights become what they stand for, residuals are merged into them.

    Inputs are no longer rounded. The model itself is changed, and returned.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, RoundedLinear):
            linear = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
            linear.weight, linear.bias = nn.Parameter(_with_residual(module, module.dense()), requires_grad=False), module.bias
            model.set_submodule(name, linear)
        elif isinstance(module, LowRankLinear) and module.weights is not None:
            first = module.first
            module.B.put_dense(_with_residual(module, module.B.dense()) if first is None else module.B.dense())
            if first is not None and first.weights is not None:
                first.put_dense(first.dense())
            module.drop_residual()
    for name, module in list(model.named_modules()):
        if isinstance(module, SharedResidual):
            parent, _, leaf = name.rpartition(".")
            delattr(model.get_submodule(parent), leaf)
    return model


def _with_residual(module: RoundedLinear | LowRankLinear, weight: torch.Tensor) -> torch.Tensor:
    first = module.residual_first
    return weight if first is None else weight + module.residual_B.weight.float() @ (first.weight.float() * first.weight_scale)
