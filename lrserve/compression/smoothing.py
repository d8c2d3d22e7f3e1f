"""Moving scales from a layer's inputs to its weights, so that inputs round to 8 bits with less error (SmoothQuant).

Notation
    x (n,), W (m, n)   a layer's input and weight;  y = W x = (W diag(s)) (x / s)
    s (n,)             scales, powers of two: dividing by them is exact in any binary floating point format

An engine rounds x with one scale a token, so all inputs get the error of the largest. s_j = a_j^alpha / w_j^(1 - alpha), a_j the
size of input j and w_j the largest entry of its column, makes sizes even (arXiv 2211.10438, section 4, equation 4). The model
gives x / s at no cost: what comes before the layer is linear in its own weights, a norm's, or the rows of `v` and `up`, and `fold`
divides those (`Family.scaled_by`). Query heads that share a value head share its scales.
"""

from __future__ import annotations

from typing import Any

import torch

from lrserve.compression.groups import Group, family_of
from lrserve.compression.layers import IdentityBlock, LowRankLinear

ALPHA = 0.7
_TINY = 1e-12


def smoothing(sizes: torch.Tensor, W: torch.Tensor, heads: tuple[int, int] | None = None, alpha: float = ALPHA) -> torch.Tensor:
    """Return scales s (n,), float32 powers of two whose geometric mean is about 1.

    Args:
        sizes: (n,), root mean squares of the inputs. Not their largest magnitudes: one token may have those of all channels.
        W: (m, n).
        heads: query heads and value heads where x is attention's output (`value_heads`); they share scales.
        alpha: how much of the differences moves to the weights: 0 none of the inputs' and all of the weights', 1 all.
    """
    inputs, columns = sizes.float().abs(), W.float().abs().amax(0)
    if heads is not None:
        inputs, columns = (_largest_of_heads(values, heads) for values in (inputs, columns))
    exponents = alpha * _log2(inputs) - (1 - alpha) * _log2(columns)
    return torch.exp2((exponents - exponents.mean()).round())


def smoothed_moment(moment: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """Return the second moment (n, n) of x / s given that of x.

    A gradient by outputs that were divided by s (those of `v` and `up`) grows instead: give 1 / s.
    """
    return moment / torch.outer(s, s).to(moment)


def value_heads(model: Any, group: Group) -> tuple[int, int] | None:
    """Return the query and value heads whose outputs a group reads, None if it does not read attention's."""
    config = model.config.get_text_config()
    return (config.num_attention_heads, config.num_key_value_heads) if group.kind == "o" else None


def foldable(model: Any, group: Group) -> bool:
    """Say whether something before a group can be divided by its scales exactly.

    Not the norms of Gemma, which multiply by 1 + w: that sum is not rounded as w is. Nor what an identity block reads: it
    multiplies only some of its inputs.
    """
    blocks = any(isinstance(getattr(model.get_submodule(member), "first", None), IdentityBlock) for member in group.members)
    return group.kind in family_of(model.config).scaled_by and not blocks


@torch.no_grad()
def fold(model: Any, group: Group, s: torch.Tensor) -> None:
    """Scale a model's weights, in place, so that a group reads x / s; its outputs stay the same.

    Args:
        model: a transformers causal LM; the group and what stands before it are dense or `LowRankLinear`, and not rounded.
        group: one that is `foldable`.
        s: (n,), powers of two; alike for query heads that share a value head.

    Raises:
        ValueError: the group is not foldable, or its scales are not those of shared heads.
    """
    family = family_of(model.config)
    if not foldable(model, group):
        raise ValueError(f"{group.name}: the norm before it cannot be scaled exactly")
    readers = {id(weight): weight for member in group.members for weight in [_reader(model.get_submodule(member))]}
    for weight in readers.values():  # members may share one
        weight.mul_(s.to(weight))
    if heads := value_heads(model, group):
        queries, values = heads
        shared = s.view(values, queries // values, -1)
        if not torch.equal(shared, shared[:, :1].expand_as(shared)):
            raise ValueError(f"{group.name}: query heads that share a value head have different scales")
        s = shared[:, 0].flatten()
    before = model.get_submodule(f"{family.layers}.{group.layer}.{family.scaled_by[group.kind]}")
    for parameter in (
        before.B if isinstance(before, LowRankLinear) else before
    ).parameters():  # a norm's weight and bias; a linear's rows and its bias
        scales = s.to(parameter)
        parameter[-len(s) :].div_(scales if parameter.ndim == 1 else scales[:, None])


def _reader(module: Any) -> torch.Tensor:
    """Return the weight (m, n) that reads a linear's inputs."""
    if isinstance(module, LowRankLinear):
        module = module.B if module.first is None else module.first
    weight: torch.Tensor = module.weight
    return weight


def _log2(values: torch.Tensor) -> torch.Tensor:
    """Logarithms; what is far below the mean counts as that: an input that is never used needs no scale of its own."""
    return values.clamp_min(max(float(values.mean()) * 1e-4, _TINY)).log2()


def _largest_of_heads(values: torch.Tensor, heads: tuple[int, int]) -> torch.Tensor:
    queries, shared = heads
    by_head = values.view(shared, queries // shared, -1)
    return by_head.amax(1, keepdim=True).expand_as(by_head).flatten()
