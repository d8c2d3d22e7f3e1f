"""How large a model is, dense and compressed: the one place that counts it for metrics.json, the model card and `lrserve inspect`.

What is stored follows from two things: the dense model's architecture, and what config.json says about each compressed group
(`GroupSpec`). A plan becomes the same by `lowrank.specs_of`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lrserve.compression.groups import Group, as_listed, find_groups
from lrserve.compression.lowrank import GroupSpec

_ORDER_BYTES = 4  # int32


def linear_parameters(groups: Sequence[Group], specs: Mapping[str, GroupSpec]) -> int:
    """Count the parameters of the decoder's linears as they are stored, biases included; groups without a spec are dense."""
    return sum(
        group.parameters(spec.rank, spec.structure) if (spec := specs.get(group.name)) else group.dense_parameters
        for group in groups
    )


def sizes(skeleton: Any, specs: Mapping[str, GroupSpec], dtype_bytes: int) -> dict[str, dict[str, Any]]:
    """Return `dense`, `compressed` and `ratio`, the share that is removed, of four counts.

    linear_parameters: of the decoder's factorizable linears, biases included.
    model_parameters: of the whole model; tied weights count once.
    bytes: of the tensors on disk: the parameters, and the orders of identity blocks.
    flops_per_token: 2 for each weight that a token is multiplied by, in the linears and the output layer. Biases are added, not
        multiplied by. Left out: attention scores, which grow with the context, and norms.

    Args:
        skeleton: the dense model; may live on the meta device.
        specs: what is compressed, by group name; empty for a dense model.
        dtype_bytes: bytes of a stored value.
    """
    groups = as_listed(find_groups(skeleton), specs)
    linears = linear_parameters(groups, {}), linear_parameters(groups, specs)
    biases = (
        sum(group.biases for group in groups),
        sum(group.bias_entries(spec.rank, spec.structure) if (spec := specs.get(group.name)) else group.biases for group in groups),
    )
    orders = 0, sum(group.n for group in groups if (spec := specs.get(group.name)) and spec.gathers)
    rest = sum(parameter.numel() for parameter in skeleton.parameters()) - linears[0]
    head = skeleton.get_output_embeddings().weight.numel()
    counts = {
        "linear_parameters": linears,
        "model_parameters": tuple(rest + own for own in linears),
        "bytes": tuple((rest + own) * dtype_bytes + order * _ORDER_BYTES for own, order in zip(linears, orders, strict=True)),
        "flops_per_token": tuple(2 * (own - added + head) for own, added in zip(linears, biases, strict=True)),
    }
    return {name: {"dense": d, "compressed": c, "ratio": 1 - c / d} for name, (d, c) in counts.items()}
