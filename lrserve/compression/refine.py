"""Refinement of a plan's factors, block by block, against the dense model's outputs and behind the blocks refined before.

Notation, besides that of sequential.py (x, x^, mu, mu^, G, H)
    z (t, r)       A x^, with the rows of A orthonormal; x^_J where a group reads fewer inputs
    y (t, m)       W x + beta, the outputs that the dense model has there
    S (r, r)       covariance of z = A H A^T;  Y (m, r) covariance of y with z = W G A^T

`closed_form` keeps A and solves for B and b, group by group (the layer-wise closed-form update of the early versions of
SVD-LLM, arXiv 2403.07378; later ones fine-tune instead):
    B' = (Y + d B) (S + d I)^-1,   b' = beta + W mu - B' A mu^,   d = damping times the mean of S's diagonal
It is the least-squares answer under any output weighting, for each output has its own row of B'. The ridge pulls towards the
present B and not towards zero: E|y - B' z - b'|^2 + d |B' - B|^2 is minimal, so the error on these tokens never grows, and where z
does not vary B stays.

`adam` trains all factors of a block together, through its attention and its activation function, by Adam (arXiv 1412.6980):
    loss = mean over tokens of |h - h^|^2 / |h|^2
with h and h^ (hidden,) the block's outputs in the dense and in the compressed model. Each token counts by its own power, or the few
with massive activations would be all that is learnt.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from lrserve.compression.calibrate import run_block
from lrserve.compression.factorize import Factors, FactorSource
from lrserve.compression.groups import Group
from lrserve.compression.sequential import Block, PairedCovariance, Step, group_by_group
from lrserve.compression.training import TrainableGroup, orthonormal
from lrserve.errors import CalibrationError

_WARM_UP = 0.1  # share of the steps: Adam's first ones are of full size whatever the gradient
_FLOOR = 1e-6  # smallest power of a token that is divided by, over the batch's mean


def refit(factors: Factors, W: torch.Tensor, beta: torch.Tensor, pairs: PairedCovariance, damping: float) -> Factors:
    """Return factors with the same A, B' and b', float64.

    Args:
        factors: A (r, n) with orthonormal rows, or fewer inputs (`order`); B (m, r).
        W: (m, n).
        beta: (m,).
        pairs: statistics of x and x^.
        damping: positive, in units of the mean variance of z.

    Raises:
        ValueError: a damping that is not positive.
    """
    if not damping > 0:
        raise ValueError(f"damping {damping} must be positive")
    A, B = factors.A.double(), factors.B.double()

    def coordinates(x: torch.Tensor) -> torch.Tensor:
        """Return z (r, ...) of x (n, ...)."""
        return A @ x if factors.order is None else x[factors.order.long()]

    S = coordinates(coordinates(pairs.H).T)
    d = damping * S.trace() / len(S)
    if d > 0:
        ridge = d * torch.eye(len(S), dtype=torch.float64)
        B = torch.linalg.solve(S + ridge, coordinates((W @ pairs.G).T) + d * B.T).T  # S is symmetric
    return Factors(A=A, order=factors.order, B=B, b=beta + W @ pairs.mu - B @ coordinates(pairs.mu_hat))


def closed_form(source: FactorSource, *, damping: float = 1e-4) -> Step:
    """Return the step of a `walk` that solves for B and b of every group; A stays what it spans.

    Args:
        source: the factors to start from.
        damping: positive, in units of the mean variance of z.

    Raises, when it is taken:
        ValueError: a damping that is not positive.
    """

    def solve(group: Group, rank: int, W: torch.Tensor, beta: torch.Tensor, pairs: PairedCovariance) -> Factors:
        return refit(orthonormal(group, source.cut(group.name, rank)), W, beta, pairs, damping)

    return group_by_group(solve)


def adam(source: FactorSource, *, steps: int = 50, learning_rate: float = 3e-4, seed: int = 0) -> Step:
    """Return the step of a `walk` that trains a block's factors; the learning rate warms up and decays as a cosine.

    Args:
        source: the factors to start from.
        steps: optimizer steps in each block, at least one, each on one batch of the walk.
        learning_rate: its largest value.
        seed: of the order of the windows, which is another one in each block.

    Raises, when it is taken:
        CalibrationError: a loss that is not finite.
    """

    def step(block: Block) -> dict[str, TrainableGroup]:
        trainable = block.install(source, block.ranks)
        parameters = [parameter for group in trainable.values() for parameter in group.parameters()]
        optimizer = torch.optim.Adam(parameters, lr=learning_rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: _rate(done, steps))
        batches = _batches(len(block.dense_inputs), block.batch, seed * 1_000_003 + block.index)
        for _ in range(steps):
            loss = _loss(block, next(batches))
            if not torch.isfinite(loss):
                raise CalibrationError(f"the loss of decoder block {block.index} is not finite; lower the learning rate")
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
        return trainable

    return step


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
def _loss(block: Block, rows: torch.Tensor) -> torch.Tensor:
    device = next(block.model.parameters()).device
    target = block.dense_outputs[rows].to(device).float()
    inputs = block.compressed_inputs[rows].to(device)
    error = run_block(block.compressed, inputs, block.kwargs(len(rows))).float() - target
    power = target.square().sum(-1)
    return (error.square().sum(-1) / power.clamp_min(_FLOOR * float(power.mean()))).mean()
