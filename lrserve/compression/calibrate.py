"""The block-by-block pass that collects each fused group's input covariance, and the statistics of experts.

1. The embedding layer turns the calibration windows into hidden states, kept on disk as a memory map, in the model's dtype.
2. A rehearsal with every decoder block replaced by a recorder learns the keyword arguments (masks, rotary embeddings) that
   the model hands to each block: they depend on the window length only, not on the tokens.
3. Block by block: the hidden states go through block i in batches; a hook on the first member of each group sees the group's
   input and adds it to the group's accumulator, pool by pool. A hook on a mixture of experts sees what is routed to each. The
   block's outputs go to a second memory map.
4. The block's statistics are published as one safetensors file. Only then are the states before the block removed, so an
   interrupted pass resumes at the block where it stopped.

Memory: the model, one block's accumulators and one batch, whatever the depth. A block is also refused to run on statistics that
are not finite.

Pools are independent, and statistics are sums over them: several passes, each over some of the pools, give with `partial` the sums
of theirs, and `merge_statistics` the statistics of all.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from lrserve.compression.covariance import Covariance, CovarianceAccumulator, Triangle
from lrserve.compression.experts import ExpertAccumulator, ExpertStatistics
from lrserve.compression.groups import Group, Mixture, family_of
from lrserve.compression.transfer import Receiver, sent
from lrserve.errors import CalibrationError
from lrserve.storage.store import publish, write_tensors

_FIELDS = ("C", "mu", "pool_means", "pool_tokens")
_EXPERT_FIELDS = ("tokens", "saliency", "error", "moments")


class PassThrough(nn.Module):
    """Stands for a decoder block: passes the hidden states on and keeps the keyword arguments."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.kwargs: dict[str, Any] = {}
        # models look such attributes up on their blocks to choose masks
        for name in ("attention_type", "layer_type", "is_sliding"):
            if hasattr(block, name):
                setattr(self, name, getattr(block, name))

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Return the hidden states as they came."""
        self.kwargs = kwargs
        return hidden_states


class Intercepted(Exception):  # noqa: N818 - a signal, not an error
    """Carries hidden states out of a forward pass that need not go on."""

    def __init__(self, hidden_states: torch.Tensor) -> None:
        self.hidden_states = hidden_states


class _Interceptor(PassThrough):
    """Stands for the first block: hands the embedded tokens over and ends the forward pass."""

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        raise Intercepted(hidden_states)


class _Feed:
    """Hook that adds a linear's inputs to an accumulator, times the root of their weight if it has weights (sequences, length)."""

    def __init__(self, accumulator: CovarianceAccumulator, weights: torch.Tensor | None) -> None:
        self._accumulator, self._roots = accumulator, None if weights is None else weights.sqrt()
        self.rows = slice(0, 0)

    def __call__(self, _: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        x = inputs[0]
        self._accumulator.update(x if self._roots is None else x * self._roots[self.rows, :, None].to(x))


def memory_map(path: Path, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor that lives in a file, which is made if it is not there."""
    size = int(torch.Size(shape).numel())
    if not path.is_file():
        with path.open("wb") as file:  # a sparse file on a full disk would end the process with SIGBUS, not with an error
            os.posix_fallocate(file.fileno(), 0, size * dtype.itemsize)
    return torch.from_file(str(path), shared=True, size=size, dtype=dtype).view(*shape)


def states_path(folder: Path, block: int) -> Path:
    """Return where the hidden states before block i are kept until the block is done."""
    return folder / f"hidden-{block:05d}.bin"


def statistics_path(folder: Path, block: int) -> Path:
    """Return where block i's statistics are published."""
    return folder / f"block-{block:05d}.safetensors"


@contextmanager
def replaced(layers: nn.ModuleList, stand_ins: Sequence[nn.Module]) -> Iterator[None]:
    """Put other modules in the place of the first blocks for a while."""
    blocks = list(layers)
    try:
        for index, stand_in in enumerate(stand_ins):
            layers[index] = stand_in
        yield
    finally:
        for index, block in enumerate(blocks):
            layers[index] = block


class Rehearsal:
    """The keyword arguments that a model hands to each of its blocks, learnt once for each number of windows in a batch."""

    def __init__(self, model: Any, layers: nn.ModuleList, windows: torch.Tensor) -> None:
        self._model, self._layers, self._windows = model, layers, windows
        self._kwargs: dict[int, list[dict[str, Any]]] = {}

    def __call__(self, size: int, block: int) -> dict[str, Any]:
        """Return the arguments of one block for a batch of so many windows."""
        if size not in self._kwargs:
            recorders = [PassThrough(layer) for layer in self._layers]
            with replaced(self._layers, recorders):
                device = next(self._model.parameters()).device
                self._model.base_model(input_ids=self._windows[:size].to(device), use_cache=False)
            self._kwargs[size] = [{**recorder.kwargs, "use_cache": False, "past_key_values": None} for recorder in recorders]
        return self._kwargs[size][block]


def embed(model: Any, layers: nn.ModuleList, windows: torch.Tensor) -> torch.Tensor:
    """Return the hidden states before the first block, for tokens (windows, length)."""
    try:
        with replaced(layers, [_Interceptor(layers[0])]):
            model.base_model(input_ids=windows, use_cache=False)
    except Intercepted as caught:
        return caught.hidden_states
    raise CalibrationError("the model's forward pass did not reach its first decoder block")


def run_block(block: Callable[..., Any], hidden_states: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
    """Run one decoder block: some give a tuple that begins with the hidden states."""
    y = block(hidden_states, **kwargs)
    states: torch.Tensor = y[0] if isinstance(y, tuple) else y
    return states


def resume_at(folder: Path, published: Sequence[Path], states_bytes: int) -> int:
    """Return the block to go on from, given each block's result file, and remove the hidden states of all others.

    A block's input states, of so many bytes, exist until its result is published; without them the pass starts over. With nothing
    left to do, the number of blocks is returned.
    """
    folder.mkdir(parents=True, exist_ok=True)
    todo = [index for index, path in enumerate(published) if not path.is_file()]
    start = todo[0] if todo else len(published)
    if todo and not _has_size(states_path(folder, start), states_bytes):
        start = 0
    for leftover in folder.glob("hidden*"):
        if not todo or leftover != states_path(folder, start) or not _has_size(leftover, states_bytes):
            leftover.unlink()
    return start


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


@torch.inference_mode()
def calibrate(
    model: Any,
    groups: Sequence[Group],
    windows: torch.Tensor,
    folder: Path,
    *,
    pool_sequences: int,
    batch_tokens: int,
    partial: bool = False,
    collect: bool = True,
    token_weights: Callable[[Group], torch.Tensor] | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> int:
    """Collect the statistics of every group's input into `folder`, one file per block, resuming where it was interrupted.

    Args:
        model: a dense causal LM of a known family.
        groups: its groups, and its mixtures of experts, in layer order (`find_units`).
        windows: calibration tokens, int64 (sequences, length).
        folder: private to this pass; what is found there must come from the same model and windows.
        pool_sequences: sequences in one pool.
        batch_tokens: tokens in one forward pass, rounded down to whole sequences within a pool.
        partial: publish what `merge_statistics` merges, in place of statistics.
        token_weights: weights (sequences, length) of each token in the statistics of a group; None weighs all alike.
        collect: False runs the same forward passes without collecting, for measuring what collecting costs.
        progress: called with the number of blocks that are done.

    Returns:
        The number of blocks that were reused from an earlier, interrupted pass.

    Raises:
        CalibrationError: activations that are not finite.
    """
    layers = model.get_submodule(family_of(model.config).layers)
    device = next(model.parameters()).device
    sequences, length = windows.shape
    batch = max(1, min(batch_tokens // length, pool_sequences))
    dtype = next(model.parameters()).dtype
    shape = (sequences, length, int(model.config.get_text_config().hidden_size))
    states_bytes = torch.Size(shape).numel() * dtype.itemsize
    start = resume_at(folder, [statistics_path(folder, index) for index in range(len(layers))], states_bytes)
    if start == len(layers):
        return start
    rehearsal = Rehearsal(model, layers, windows)

    def pooled_batches() -> Iterator[tuple[int, int, bool]]:
        for pool in range(0, sequences, pool_sequences):
            end = min(pool + pool_sequences, sequences)
            for first in range(pool, end, batch):
                last = min(first + batch, end)
                yield first, last, last == end

    unfinished = folder / "hidden.partial"
    if start == 0:
        states = memory_map(unfinished, shape, dtype)
        receiver = Receiver()
        for first, last, _ in pooled_batches():
            receiver.put(states[first:last], embed(model, layers, windows[first:last].to(device)))
        receiver.finish()
        publish(unfinished, states_path(folder, 0))
    progress(start)
    for index in range(start, len(layers)):
        block = layers[index]
        members = [group for group in groups if group.layer == index]
        accumulators = {group.name: _accumulator(group, device) for group in members}
        hooks, feeds = [], []
        if collect:
            for group in members:
                own = accumulators[group.name]
                if isinstance(own, ExpertAccumulator):
                    hooks.append(model.get_submodule(group.members[0]).register_forward_pre_hook(own.hook))
                    continue
                feeds.append(_Feed(own, token_weights and token_weights(group)))
                hooks.append(model.get_submodule(group.members[0]).register_forward_pre_hook(feeds[-1]))
        before = memory_map(states_path(folder, index), shape, dtype)
        after = memory_map(unfinished, shape, dtype)
        receiver, inputs = Receiver(), sent((before[first:last] for first, last, _ in pooled_batches()), device)
        try:
            for (first, last, pool_ends), x in zip(pooled_batches(), inputs, strict=True):
                for feed in feeds:
                    feed.rows = slice(first, last)
                receiver.put(after[first:last], run_block(block, x, rehearsal(last - first, index)))
                if pool_ends:
                    for accumulator in accumulators.values():
                        accumulator.close_pool()
            receiver.finish()
        finally:
            for handle in hooks:
                handle.remove()
        publish(unfinished, states_path(folder, index + 1))
        if collect:
            _write(statistics_path(folder, index), accumulators.items(), partial)
        states_path(folder, index).unlink()
        progress(index + 1)
    states_path(folder, len(layers)).unlink()
    return start


def _accumulator(group: Group, device: torch.device | str = "cpu") -> CovarianceAccumulator | ExpertAccumulator:
    return ExpertAccumulator(group, device) if isinstance(group, Mixture) else CovarianceAccumulator(group.n, device)


def _write(
    path: Path, accumulators: Iterable[tuple[str, CovarianceAccumulator | ExpertAccumulator]], partial: bool = False
) -> None:
    """Publish what is kept of accumulators by the names of their groups, one of them at a time."""
    tensors = {f"{name}.{field}": t for name, a in accumulators for field, t in _stored(a, partial).items()}
    write_tensors(path, tensors)


def _stored(accumulator: CovarianceAccumulator | ExpertAccumulator, partial: bool) -> dict[str, torch.Tensor]:
    """Return what is kept of an accumulator, on the CPU: its statistics in float32, of C the triangle; or its state, if partial."""
    found = accumulator.finish()  # which are finite
    if partial:
        return accumulator.state()
    fields = _FIELDS if isinstance(found, Covariance) else _EXPERT_FIELDS
    values = {field: getattr(found, field) for field in fields}
    stored = {field: (value.float() if value.is_floating_point() else value).cpu() for field, value in values.items()}
    if isinstance(found, Covariance):
        stored["C"] = Triangle.of(stored["C"]).values
    return stored


def merge_statistics(
    parts: Sequence[Path], groups: Sequence[Group], folder: Path, *, progress: Callable[[int], None] = lambda done: None
) -> int:
    """Merge what passes with `partial` over disjoint pools left, one file per block; blocks that are already there are kept.

    The statistics are those of one pass over all the pools, but for the order in which float64 numbers are added. Memory: two
    accumulators of one group.

    Args:
        parts: the folders of these passes, in the order of their pools.
        groups: those of the passes.
        folder: where the statistics go; private to these inputs.
        progress: called with the number of blocks that are done.

    Returns:
        The number of blocks that were there.
    """
    reused = 0
    for done, (layer, members) in enumerate(groupby(groups, key=lambda group: group.layer), 1):
        path = statistics_path(folder, layer)
        if path.is_file():
            reused += 1
        else:
            sources = [statistics_path(part, layer) for part in parts]
            _write(path, ((group.name, _merged(sources, group)) for group in members))
        progress(done)
    return reused


def _merged(paths: Sequence[Path], group: Group) -> CovarianceAccumulator | ExpertAccumulator:
    whole = _accumulator(group)
    for path in paths:
        with safe_open(path, framework="pt") as file:
            state = {field: file.get_tensor(f"{group.name}.{field}") for field in whole.state()}
        if isinstance(whole, ExpertAccumulator):
            whole.add(state)
        else:
            whole.merge(CovarianceAccumulator.from_state(state))
    return whole


def read_statistics(folder: Path, group: Group) -> Covariance:
    """Read one group's statistics back, float32.

    Raises:
        CalibrationError: the calibration that should have written them did not finish.
    """
    found = _read(folder, group, _FIELDS)
    return Covariance(**(found | {"C": Triangle(group.n, found["C"]).matrix()}))


def read_expert_statistics(folder: Path, mixture: Mixture) -> ExpertStatistics:
    """Read the statistics of one layer's experts back, float32.

    Raises:
        CalibrationError: as `read_statistics`.
    """
    return ExpertStatistics(**_read(folder, mixture, _EXPERT_FIELDS))


def _read(folder: Path, group: Group, fields: Sequence[str]) -> dict[str, torch.Tensor]:
    path = statistics_path(folder, group.layer)
    if not path.is_file():
        raise CalibrationError(f"{path} is missing: the calibration did not finish; run the same command again")
    with safe_open(path, framework="pt") as file:
        return {field: file.get_tensor(f"{group.name}.{field}") for field in fields}
