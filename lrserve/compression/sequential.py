"""The walk over the decoder blocks that improves what a plan makes of them where it will work: behind the blocks improved before.

Notation
    x, x^ (t, n)   a group's inputs for t tokens, in the dense and in the compressed model;  mu, mu^ (n,) their means
    H     (n, n)   covariance of x^
    G     (n, n)   covariance of x with x^: E[(x - mu) (x^ - mu^)^T]

1. The embedded calibration windows begin two streams of hidden states, the dense and the compressed model's, on disk as one memory
   map in the model's dtype.
2. The dense block takes the dense stream through: what the compressed block should give.
3. The compressed block is improved. `walk` improves factors: a copy of the block that shares its weights gets the factors of its
   groups from `step`, which sees both streams. A group's inputs are taken from forward passes that end there, so no activation of
   a group is kept. `repair` improves the block of a compressed model.
4. The compressed block takes the compressed stream through.
5. What was improved is published as one safetensors file. Only then are the streams before it removed, so an interrupted walk
   resumes at the block where it stopped, with the same result.

The walk ends behind the last block that the plan compresses. Memory: the model, one block's factors and moments, and one batch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from lrserve.compression.calibrate import Intercepted, Rehearsal, embed, memory_map, resume_at, run_block, states_path
from lrserve.compression.covariance import CovarianceAccumulator, exact_products
from lrserve.compression.factorize import Factors, FactorSource
from lrserve.compression.groups import Group, family_of
from lrserve.compression.spectra import stacked_weight
from lrserve.compression.training import TrainableGroup, TrainedFactors, install_trainable
from lrserve.compression.transfer import Receiver, sent
from lrserve.errors import CalibrationError, NotFiniteError
from lrserve.storage.store import publish, write_tensors


@dataclass(frozen=True)
class PairedCovariance:
    """Statistics of two inputs of the same tokens, all centred in one pool: G, H (n, n), mu, mu_hat (n,); float64."""

    G: torch.Tensor
    H: torch.Tensor
    mu: torch.Tensor
    mu_hat: torch.Tensor


class PairedAccumulator:
    """Collects `PairedCovariance` of n-wide inputs without keeping activations; sums are as wide as `CovarianceAccumulator`'s."""

    def __init__(self, n: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        wide = torch.float32 if dtype.itemsize <= 2 else torch.float64
        self._compressed = CovarianceAccumulator(n, device)
        self._products = torch.zeros(n, n, dtype=wide, device=device)
        self._sum = torch.zeros(1, n, dtype=wide, device=device)

    def update(self, x: torch.Tensor, x_hat: torch.Tensor) -> None:
        """Add the same tokens' inputs x and x^ (..., n)."""
        self._compressed.update(x_hat)
        with exact_products(x):
            dense = x.flatten(0, -2).to(self._sum.dtype)
            self._sum.addmm_(dense.new_ones(1, len(dense)), dense)
            self._products.addmm_(dense.T, x_hat.flatten(0, -2).to(self._sum.dtype))

    def finish(self) -> PairedCovariance:
        """Return the statistics.

        Raises:
            CalibrationError: no token was seen, or a statistic is not finite.
        """
        compressed = self._compressed.finish()
        total, tokens = self._sum[0].double(), compressed.tokens
        G = torch.addr(self._products.double(), total, compressed.mu, alpha=-1) / max(tokens - 1, 1)
        if not torch.isfinite(G).all():
            raise NotFiniteError("the dense model's activations are not finite; load it in bfloat16 or float32")
        return PairedCovariance(G=G, H=compressed.C, mu=total / tokens, mu_hat=compressed.mu)


@dataclass(frozen=True)
class Streams:
    """One decoder block on the walk, and what flows through it.

    `model`: the dense one, `layers` its blocks. `dense_inputs`, `compressed_inputs`, `dense_outputs` (sequences, length, hidden):
    memory maps on the CPU. `batch`: windows in one forward pass.
    """

    model: Any
    layers: nn.ModuleList
    index: int
    dense_inputs: torch.Tensor
    compressed_inputs: torch.Tensor
    dense_outputs: torch.Tensor
    batch: int
    rehearsal: Rehearsal

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        device: torch.device = next(self.model.parameters()).device
        return device

    def kwargs(self, windows: int) -> dict[str, Any]:
        """Return the keyword arguments that the block wants for a batch of so many windows."""
        return self.rehearsal(windows, self.index)


@dataclass(frozen=True)
class Block(Streams):
    """A decoder block whose factors are improved.

    `ranks`: its groups that the plan factorizes, in the plan's order. `compressed`: the copy; a group's linears in it are dense
    until `install`.
    """

    ranks: Sequence[tuple[Group, int]]
    compressed: nn.Module

    def weight(self, group: Group) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a group's dense W (m, n) and beta (m,), float64 on the model's device."""
        weight, bias = stacked_weight(self.model, group)
        return weight.double(), weight.new_zeros(group.m).double() if bias is None else bias.double()

    def pairs(self, group: Group) -> PairedCovariance:
        """Collect the statistics of a group's inputs, in the copy behind what was installed so far.

        Raises:
            CalibrationError: activations that are not finite.
        """
        name = group.members[0]
        dense, compressed = self.layers[self.index], self.compressed
        prefix = f"{family_of(self.model.config).layers}.{self.index}."
        linear, replacement = self.model.get_submodule(name), compressed.get_submodule(name.removeprefix(prefix))
        device = self.device
        accumulator = PairedAccumulator(group.n, self.dense_inputs.dtype, device)
        streams = self.dense_inputs, self.compressed_inputs
        for x, x_hat in zip(*(torch.split(stream, self.batch) for stream in streams), strict=True):
            kwargs = self.kwargs(len(x))
            accumulator.update(
                _input_of(linear, dense, x.to(device), kwargs),
                _input_of(replacement, compressed, x_hat.to(device), kwargs),
            )
        return accumulator.finish()

    def install(self, source: FactorSource, ranks: Sequence[tuple[Group, int]]) -> dict[str, TrainableGroup]:
        """Put factors in the place of the copy's dense linears and return them by group name; the model's weights are frozen."""
        with _standing_in(self.layers, self.index, self.compressed):
            return install_trainable(self.model, ranks, source)


Step = Callable[[Block], Mapping[str, TrainableGroup]]
"""Installs factors in the place of all groups of a block, improves them, and returns them by group name."""

Solve = Callable[[Group, int, torch.Tensor, torch.Tensor, PairedCovariance], Factors]
"""Finds a group's two factors of a rank, given W (m, n), beta (m,) and the statistics of its inputs."""


def group_by_group(solve: Solve) -> Step:
    """Return the step in which each group of a block is solved behind the compressed earlier groups of the same block."""

    def step(block: Block) -> dict[str, TrainableGroup]:
        installed: dict[str, TrainableGroup] = {}
        for group, rank in block.ranks:
            factors = solve(group, rank, *block.weight(group), block.pairs(group))
            installed |= block.install(TrainedFactors({group.name: factors}), [(group, rank)])
        return installed

    return step


def walk(
    model: Any,
    ranks: Sequence[tuple[Group, int]],
    windows: torch.Tensor,
    folder: Path,
    step: Step,
    *,
    batch_tokens: int,
    prepare: Callable[[int], object] = lambda index: None,
    progress: Callable[[int], None] = lambda done: None,
) -> TrainedFactors:
    """Improve each block's factors and return those of the whole plan.

    Args:
        model: the dense model; its parameters' `requires_grad` is switched off.
        ranks: the factorized groups with their ranks; within a block in the order in which the forward pass reaches them.
        windows, folder, batch_tokens, progress: as of `walk_blocks`.
        step: what happens to a block.
        prepare: puts into the block of that number of `model`, in whose place a copy stands, what else is compressed there.

    Raises:
        CalibrationError: activations or factors that are not finite.
    """

    def improve(streams: Streams) -> tuple[nn.Module, dict[str, torch.Tensor]]:
        own = [(group, rank) for group, rank in ranks if group.layer == streams.index]
        compressed = _copy(streams.layers[streams.index])
        with _standing_in(streams.layers, streams.index, compressed):
            prepare(streams.index)
        if not own:
            return compressed, {}
        block = Block(**vars(streams), ranks=own, compressed=compressed)
        factors = {name: trainable.factors() for name, trainable in step(block).items()}
        return block.compressed, TrainedFactors(factors).tensors()

    blocks = 1 + max((group.layer for group, _ in ranks), default=-1)
    return TrainedFactors.from_tensors(
        walk_blocks(model, blocks, windows, folder, improve, batch_tokens=batch_tokens, progress=progress)
    )


@torch.no_grad()
def walk_blocks(
    model: Any,
    blocks: int,
    windows: torch.Tensor,
    folder: Path,
    improve: Callable[[Streams], tuple[nn.Module, Mapping[str, torch.Tensor]]],
    *,
    batch_tokens: int,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, torch.Tensor]:
    """Take both streams through the first blocks, improve each, and return the tensors of all.

    Args:
        model: the dense model.
        blocks: how many, from the first on.
        windows: calibration tokens, int64 (sequences, length).
        folder: private to this walk; what is found there must come from the same arguments.
        improve: returns the improved compressed block, and what is to be kept of it by unique names.
        batch_tokens: tokens in one forward pass, rounded down to whole sequences.
        progress: called with the number of blocks that are done.

    Raises:
        NotFiniteError: activations or tensors that are not finite.
    """
    layers = model.get_submodule(family_of(model.config).layers)
    paths = [folder / f"factors-{index:05d}.safetensors" for index in range(blocks)]
    parameter = next(model.parameters())
    sequences, length = windows.shape
    batch = max(1, batch_tokens // length)
    shape = (2, sequences, length, int(model.config.get_text_config().hidden_size))
    start = resume_at(folder, paths, torch.Size(shape).numel() * parameter.dtype.itemsize)
    rehearsal = Rehearsal(model, layers, windows)
    partial = folder / "hidden.partial"
    if start == 0 and blocks:
        streams = memory_map(partial, shape, parameter.dtype)
        for first in range(0, sequences, batch):
            streams[:, first : first + batch] = embed(model, layers, windows[first : first + batch].to(parameter.device)).cpu()
        publish(partial, states_path(folder, 0))
    progress(start)
    for index in range(start, blocks):
        before = memory_map(states_path(folder, index), shape, parameter.dtype)
        after = memory_map(partial, shape, parameter.dtype)
        block = Streams(model, layers, index, before[0], before[1], after[0], batch, rehearsal)
        _take_through(layers[index], block, before[0], after[0])
        compressed, tensors = improve(block)
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise NotFiniteError(f"{name} is not finite; keep this group dense, or give more calibration text")
        _take_through(compressed, block, before[1], after[1])
        publish(partial, states_path(folder, index + 1))
        write_tensors(paths[index], tensors)
        states_path(folder, index).unlink()
        progress(index + 1)
    states_path(folder, blocks).unlink(missing_ok=True)
    return dict(chain.from_iterable(load_file(path).items() for path in paths))


def _take_through(module: nn.Module, block: Streams, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
    batches, targets, receiver = torch.split(inputs, block.batch), torch.split(outputs, block.batch), Receiver()
    finite = torch.ones((), dtype=torch.bool, device=block.device)
    for x, y in zip(sent(batches, block.device), targets, strict=True):
        states = run_block(module, x, block.kwargs(len(x)))
        finite &= torch.isfinite(states).all()
        receiver.put(y, states)
    receiver.finish()
    if not finite:
        raise NotFiniteError(
            f"the outputs of decoder block {block.index} are not finite: the model overflows in this dtype on this text; "
            "load it in bfloat16 or float32, and check the weights"
        )


def _input_of(module: nn.Module, block: nn.Module, hidden_states: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
    """Run a block as far as one of its modules and return what reaches it (..., n)."""

    def stop(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        raise Intercepted(inputs[0])

    handle = module.register_forward_pre_hook(stop)
    try:
        run_block(block, hidden_states, kwargs)
    except Intercepted as caught:
        return caught.hidden_states
    finally:
        handle.remove()
    raise CalibrationError(f"the block's forward pass did not reach its {type(module).__name__}")


def _copy(block: nn.Module) -> nn.Module:
    """Copy a block's modules, but not its parameters and buffers."""
    return copy.deepcopy(block, {id(tensor): tensor for tensor in chain(block.parameters(), block.buffers())})


@contextmanager
def _standing_in(layers: nn.ModuleList, index: int, block: nn.Module) -> Iterator[None]:
    own = layers[index]
    layers[index] = block
    try:
        yield
    finally:
        layers[index] = own
