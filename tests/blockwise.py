"""What the tests of the block-by-block improvements share: a compressed tiny model, and whole-model references for it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tiny import VOCABULARY

from lrserve.compression.calibrate import calibrate, read_statistics
from lrserve.compression.factorize import Factors, FactorSource, factorize
from lrserve.compression.groups import Group, family_of, find_groups
from lrserve.compression.spectra import stacked_weight
from lrserve.compression.training import TrainedFactors, install_trainable

Ranks = Sequence[tuple[Group, int]]


def windows(count: int = 24, length: int = 12) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(0))


def strong_plan(model: Any) -> list[tuple[Group, int]]:
    """Every group but one at a rank that loses much."""
    return [(group, 12 + 2 * group.layer) for group in find_groups(model) if (group.layer, group.kind) != (1, "o")]


def plain_factors(model: Any, ranks: Ranks, tokens: torch.Tensor, folder: Path) -> TrainedFactors:
    """Each group factorized for the dense model's features, whatever the others do."""
    groups = [group for group, _ in ranks]
    calibrate(model, groups, tokens, folder, pool_sequences=len(tokens), batch_tokens=96)
    factors = {}
    for group, rank in ranks:
        W, beta = stacked_weight(model, group)
        statistics = read_statistics(folder, group)
        factors[group.name] = factorize(W, statistics.C, statistics.mu, beta).cut(rank)
    return TrainedFactors(factors)


def compressed_copy(model: Any, ranks: Ranks, source: FactorSource) -> Any:
    compressed = copy.deepcopy(model)
    install_trainable(compressed, ranks, source)
    return compressed


@torch.no_grad()
def inputs_of(model: Any, groups: Sequence[Group], tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Every group's inputs in a whole model, dense or compressed, float64 (tokens, n)."""
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        model.get_submodule(group.members[0]).register_forward_pre_hook(
            lambda _, inputs, name=group.name: seen.__setitem__(name, inputs[0].flatten(0, 1).double())
        )
        for group in groups
    ]
    model(input_ids=tokens)
    for hook in hooks:
        hook.remove()
    return seen


def outputs(x: torch.Tensor, W: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
    y = x @ W.double().T
    return y if b is None else y + b.double()


@torch.no_grad()
def error(model: Any, ranks: Ranks, source: FactorSource, tokens: torch.Tensor) -> float:
    """Mean over tokens of the relative squared error of what leaves the last block."""
    streams = []
    for candidate in (model, compressed_copy(model, ranks, source)):
        last = candidate.get_submodule(family_of(candidate.config).layers)[-1]
        hook = last.register_forward_hook(
            lambda _, inputs, output: streams.append((output[0] if isinstance(output, tuple) else output).double().flatten(0, -2))
        )
        candidate(input_ids=tokens)
        hook.remove()
    dense, compressed = streams
    return float(((dense - compressed).square().sum(-1) / dense.square().sum(-1)).mean())


def same(one: TrainedFactors, other: TrainedFactors) -> bool:
    """Whether two plans' factors are equal, bit for bit."""
    left, right = one.tensors(), other.tensors()
    return left.keys() == right.keys() and all(torch.equal(tensor, right[name]) for name, tensor in left.items())


def finite(factors: TrainedFactors, ranks: Ranks) -> bool:
    def check(f: Factors) -> bool:
        return all(bool(torch.isfinite(tensor.bfloat16()).all()) for tensor in (f.A, f.B, f.b))

    return all(check(factors.cut(group.name, rank)) for group, rank in ranks)


def in_files_of(folder: Path) -> list[str]:
    """List what this process maps of files in a folder, none of which has a name any more."""
    assert not list(folder.iterdir())
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if f"{folder}/" in line]
