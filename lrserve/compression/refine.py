"""Refinement of what a plan makes of the blocks, one by one, against the dense outputs and behind the blocks refined before.

All that is trained of a block is trained together, through its attention and its activation function, by Adam (arXiv 1412.6980):
    loss = mean over tokens of |h - h^|^2 / |h|^2
with h and h^ (hidden,) the block's outputs in the dense and in the compressed model. Each token counts by its own power, or the few
with massive activations would be all that is learnt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from lrserve.compression.calibrate import run_block
from lrserve.compression.factorize import FactorSource
from lrserve.compression.sequential import Block, Step, Streams
from lrserve.compression.training import TrainableGroup
from lrserve.errors import NotFiniteError

_WARM_UP = 0.1  # share of the steps: Adam's first ones are of full size whatever the gradient
_FLOOR = 1e-6  # smallest power of a token that is divided by, over the batch's mean


def adam(source: FactorSource, *, steps: int = 50, learning_rate: float = 3e-4, seed: int = 0) -> Step:
    """Return the step of a `walk` that trains a block's factors.

    Args:
        source: the factors to start from.
        steps, learning_rate, seed: as of `train`.

    Raises, when it is taken:
        NotFiniteError: a loss that is not finite.
    """

    def step(block: Block) -> dict[str, TrainableGroup]:
        trainable = block.install(source, block.ranks)
        parameters = [parameter for group in trainable.values() for parameter in group.parameters()]

        def run(x: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
            return run_block(block.compressed, x, kwargs)

        train(block, run, parameters, steps=steps, learning_rate=learning_rate, seed=seed)
        return trainable

    return step


def train(
    block: Streams,
    run: Callable[[torch.Tensor, dict[str, Any]], torch.Tensor],
    parameters: Sequence[torch.Tensor],
    *,
    steps: int,
    learning_rate: float,
    seed: int,
) -> None:
    """Train parameters of a compressed block by Adam; the learning rate warms up and decays as a cosine.

    Args:
        block: what flows through.
        run: the compressed block: its outputs (windows, length, hidden), given its inputs and keyword arguments.
        parameters: of it, float32.
        steps: optimizer steps, at least one, each on one batch of the walk.
        learning_rate: its largest value.
        seed: of the order of the windows, which is another one in each block.

    Raises:
        NotFiniteError: a loss that is not finite.
    """
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: _rate(done, steps))
    batches = _batches(len(block.dense_inputs), block.batch, seed * 1_000_003 + block.index)
    for done in range(steps):
        loss = _loss(block, run, next(batches))
        if not torch.isfinite(loss):
            cause = "lower the learning rate" if done else "its factors or its inputs are not; keep its groups dense"
            raise NotFiniteError(f"the loss of decoder block {block.index} is not finite after {done} steps; {cause}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def _rate(done: int, steps: int) -> float:
    return min(1.0, (done + 1) / max(1, round(_WARM_UP * steps))) * (1 + math.cos(math.pi * done / steps)) / 2


def _batches(sequences: int, batch: int, seed: int) -> Iterator[torch.Tensor]:
    """Yield batches of one size for ever: every window once in a random order, short of the last incomplete batch, and again."""
    generator = torch.Generator().manual_seed(seed)
    size = min(batch, sequences)
    while True:
        order = torch.randperm(sequences, generator=generator)
        yield from torch.split(order[: sequences // size * size], size)


@torch.enable_grad()
def _loss(block: Streams, run: Callable[[torch.Tensor, dict[str, Any]], torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
    target = block.dense_outputs[rows].to(block.device).float()
    error = run(block.compressed_inputs[rows].to(block.device), block.kwargs(len(rows))).float() - target
    power = target.square().sum(-1)
    return (error.square().sum(-1) / power.clamp_min(_FLOOR * float(power.mean()))).mean()
