"""How large a model is, dense and compressed: the one place that counts it for metrics.json, the model card and `lrserve inspect`.

What is stored follows from two things: the dense model's architecture, and what config.json says about each compressed group
(`GroupSpec`). A plan becomes the same by `spec.specs_of`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lrserve.compression.groups import Group, Mixture, as_listed, family_of, find_mixtures, find_units
from lrserve.compression.spec import GroupSpec, tensors_of


def linear_parameters(groups: Sequence[Group], specs: Mapping[str, GroupSpec]) -> int:
    """Count the parameters of the decoder's linears as they are stored, biases included; groups without a spec are dense.

    A weight counts as one in whatever precision it is stored. The factors of residuals count, scales do not.
    """
    return sum(
        group.parameters(spec.kept, spec.structure) + _residual_entries(group, spec)
        if (spec := specs.get(group.name))
        else group.dense_parameters
        for group in groups
    )


def _residual_entries(group: Group, spec: GroupSpec) -> int:
    outputs = group.rows_per_neuron * spec.rank if spec.structure == "narrow_out" else group.m
    return spec.residual * (outputs + (spec.rank if spec.structure == "narrow_in" else group.n))


def stored_bytes(group: Group, spec: GroupSpec, dtype_bytes: int) -> int:
    """Count the bytes of a listed group's tensors: weights, biases, scales, orders."""
    if spec.structure == "experts":
        return group.parameters(spec.kept, spec.structure) * dtype_bytes
    tensors = tensors_of(group, spec).values()
    own = sum(math.prod(shape) * (dtype.itemsize if dtype else dtype_bytes) for shape, dtype in tensors)
    plain = spec.structure in ("dense", "narrow_out")  # whose biases are not always there
    return own + (group.bias_entries(spec.rank, spec.structure) * dtype_bytes if plain else 0)


def experts(skeleton: Any, specs: Mapping[str, GroupSpec]) -> dict[str, Any] | None:
    """Count a model's mixtures of experts as they are stored; None if it has none.

    Returns:
        The `layers` that have one, its `experts` and how many of them are `active` for a token; lowest and highest number that are
        `kept` in a layer, and of their `neurons`; and all their `parameters`.
    """
    mixtures = find_mixtures(skeleton)
    if not mixtures:
        return None
    kept = [(spec.experts, spec.rank) if (spec := specs.get(own.name)) else (own.experts, own.n) for own in mixtures]
    counts, widths = zip(*kept, strict=True)
    return {
        "layers": len(mixtures),
        "experts": mixtures[0].experts,
        "active": mixtures[0].active,
        "kept": [min(counts), max(counts)],
        "neurons": [min(widths), max(widths)],
        "parameters": linear_parameters(mixtures, specs),
    }


def _active(group: Group, spec: GroupSpec | None) -> int:
    """Count the parameters of a group that a token is multiplied by: of a mixture those of the experts that are chosen for it."""
    stored = linear_parameters([group], {group.name: spec} if spec else {})
    return stored * group.active // (spec.experts if spec else group.experts) if isinstance(group, Mixture) else stored


def image_parameters(skeleton: Any) -> int:
    """Count the parameters of a multimodal model that are not its LLM's: of what reads images, and is not compressed."""
    family = family_of(skeleton.config)
    if not family.multimodal:
        return 0
    parts = skeleton.get_submodule(family.layers.rpartition(".")[0]), skeleton.get_output_embeddings()
    of_llm = {id(parameter) for part in parts for parameter in part.parameters()}
    return sum(parameter.numel() for parameter in skeleton.parameters() if id(parameter) not in of_llm)


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def sizes(skeleton: Any, specs: Mapping[str, GroupSpec], dtype_bytes: int) -> dict[str, dict[str, Any]]:
    """Return `dense`, `compressed` and `ratio`, the share that is removed, of four counts.

    linear_parameters: of the decoder's factorizable linears and experts, biases included.
    model_parameters: of the whole model; tied weights count once.
    bytes: of the tensors on disk: the parameters in what they are stored in, their scales, and the orders of identity blocks.
    flops_per_token: 2 for each weight that a token is multiplied by, in the linears, its experts, the routers and the output
        layer. Biases are added, not multiplied by. Left out: attention scores, which grow with the context, and norms.

    Args:
        skeleton: the dense model; may live on the meta device.
        specs: what is compressed, by group name; empty for a dense model.
        dtype_bytes: bytes of a stored value that is not rounded.
    """
    groups = as_listed(find_units(skeleton), specs)
    linears = linear_parameters(groups, {}), linear_parameters(groups, specs)
    biases = (
        sum(group.biases for group in groups),
        sum(group.bias_entries(spec.kept, spec.structure) if (spec := specs.get(group.name)) else group.biases for group in groups),
    )
    rest = _parameters(skeleton) - linears[0]
    others = skeleton.get_output_embeddings().weight.numel()
    others += sum(skeleton.get_submodule(group.router).weight.numel() for group in groups if isinstance(group, Mixture))
    active = sum(_active(group, None) for group in groups), sum(_active(group, specs.get(group.name)) for group in groups)
    counts = {
        "linear_parameters": linears,
        "model_parameters": tuple(rest + own for own in linears),
        "bytes": (
            (rest + linears[0]) * dtype_bytes,
            rest * dtype_bytes
            + sum(
                stored_bytes(group, spec, dtype_bytes) if (spec := specs.get(group.name)) else group.dense_parameters * dtype_bytes
                for group in groups
            ),
        ),
        "flops_per_token": tuple(2 * (own - added + others) for own, added in zip(active, biases, strict=True)),
    }
    return {name: {"dense": d, "compressed": c, "ratio": 1 - c / d} for name, (d, c) in counts.items()}
