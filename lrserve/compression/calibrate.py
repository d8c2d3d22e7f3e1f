"""The block-by-block pass that collects each fused group's input covariance.

1. The embedding layer turns the calibration windows into hidden states, kept on disk as a memory map, in the model's dtype.
2. A rehearsal with every decoder block replaced by a recorder learns the keyword arguments (masks, rotary embeddings) that
   the model hands to each block: they depend on the window length only, not on the tokens.
3. Block by block: the hidden states go through block i in batches; a hook on the first member of each group sees the group's
   input and adds it to the group's accumulator, pool by pool. The block's outputs go to a second memory map.
4. The block's statistics are published as one safetensors file. Only then are the states before the block removed, so an
   interrupted pass resumes at the block where it stopped.

Memory: the model, one block's accumulators and one batch, whatever the depth. A block is also refused to run on statistics that
are not finite.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from lrserve.compression.covariance import Covariance, CovarianceAccumulator
from lrserve.compression.groups import Group, family_of
from lrserve.errors import CalibrationError


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


class _FirstInput(Exception):  # noqa: N818 - a signal, not an error
    def __init__(self, hidden_states: torch.Tensor) -> None:
        self.hidden_states = hidden_states


class _Interceptor(PassThrough):
    """Stands for the first block: hands the embedded tokens over and ends the forward pass."""

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        raise _FirstInput(hidden_states)


def _feed(accumulator: CovarianceAccumulator) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
    def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        accumulator.update(inputs[0])

    return hook


def _memory_map(path: Path, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    size = int(torch.Size(shape).numel())
    if not path.is_file():
        with path.open("wb") as file:  # a sparse file on a full disk would end the process with SIGBUS, not with an error
            os.posix_fallocate(file.fileno(), 0, size * dtype.itemsize)
    return torch.from_file(str(path), shared=True, size=size, dtype=dtype).view(*shape)


def _states(folder: Path, block: int) -> Path:
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


def _rehearse(model: Any, layers: nn.ModuleList, windows: torch.Tensor) -> list[dict[str, Any]]:
    recorders = [PassThrough(block) for block in layers]
    with replaced(layers, recorders):
        model.base_model(input_ids=windows, use_cache=False)
    return [{**recorder.kwargs, "use_cache": False, "past_key_values": None} for recorder in recorders]


def _embed(model: Any, layers: nn.ModuleList, windows: torch.Tensor) -> torch.Tensor:
    try:
        with replaced(layers, [_Interceptor(layers[0])]):
            model.base_model(input_ids=windows, use_cache=False)
    except _FirstInput as caught:
        return caught.hidden_states
    raise CalibrationError("the model's forward pass did not reach its first decoder block")


@torch.inference_mode()
def calibrate(
    model: Any,
    groups: Sequence[Group],
    windows: torch.Tensor,
    folder: Path,
    *,
    pool_sequences: int,
    batch_tokens: int,
    collect: bool = True,
    progress: Callable[[int], None] = lambda done: None,
) -> int:
    """Collect the statistics of every group's input into `folder`, one file per block, resuming where it was interrupted.

    Args:
        model: a dense causal LM of a known family.
        groups: its groups, from `find_groups`.
        windows: calibration tokens, int64 (sequences, length).
        folder: private to this pass; what is found there must come from the same model and windows.
        pool_sequences: sequences in one pool.
        batch_tokens: tokens in one forward pass, rounded down to whole sequences within a pool.
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
    folder.mkdir(parents=True, exist_ok=True)
    todo = [i for i in range(len(layers)) if not statistics_path(folder, i).is_file()]
    # A block's input states exist until its statistics are published; without them the pass starts over.
    start = todo[0] if todo and _states(folder, todo[0]).is_file() else 0
    for leftover in folder.glob("hidden*"):
        if not todo or leftover != _states(folder, start):
            leftover.unlink()
    if not todo:
        return len(layers)
    dtype = next(model.parameters()).dtype
    shape = (sequences, length, int(model.config.hidden_size))
    rehearsed: dict[int, list[dict[str, Any]]] = {}

    def options(size: int, index: int) -> dict[str, Any]:
        if size not in rehearsed:
            rehearsed[size] = _rehearse(model, layers, windows[:size].to(device))
        return rehearsed[size][index]

    def pooled_batches() -> Iterator[tuple[int, int, bool]]:
        for pool in range(0, sequences, pool_sequences):
            end = min(pool + pool_sequences, sequences)
            for first in range(pool, end, batch):
                last = min(first + batch, end)
                yield first, last, last == end

    if start == 0:
        partial = folder / "hidden.partial"
        states = _memory_map(partial, shape, dtype)
        for first, last, _ in pooled_batches():
            states[first:last] = _embed(model, layers, windows[first:last].to(device)).cpu()
        os.replace(partial, _states(folder, 0))
    progress(start)
    for index in range(start, len(layers)):
        block = layers[index]
        members = [group for group in groups if group.layer == index]
        accumulators = {group.name: CovarianceAccumulator(group.n, device) for group in members}
        hooks = []
        if collect:
            for group in members:
                module = model.get_submodule(group.members[0])
                hooks.append(module.register_forward_pre_hook(_feed(accumulators[group.name])))
        before = _memory_map(_states(folder, index), shape, dtype)
        partial = folder / "hidden.partial"
        after = _memory_map(partial, shape, dtype)
        try:
            for first, last, pool_ends in pooled_batches():
                y = block(before[first:last].to(device), **options(last - first, index))
                after[first:last] = (y[0] if isinstance(y, tuple) else y).cpu()
                if pool_ends:
                    for accumulator in accumulators.values():
                        accumulator.close_pool()
        finally:
            for handle in hooks:
                handle.remove()
        os.replace(partial, _states(folder, index + 1))
        if collect:
            _publish(statistics_path(folder, index), {name: a.finish() for name, a in accumulators.items()})
        _states(folder, index).unlink()
        progress(index + 1)
    _states(folder, len(layers)).unlink()
    return start


def _publish(path: Path, statistics: dict[str, Covariance]) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for name, covariance in statistics.items():
        tensors[f"{name}.C"] = covariance.C.float().cpu()
        tensors[f"{name}.mu"] = covariance.mu.float().cpu()
    first = next(iter(statistics.values()))
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={"tokens": str(first.tokens), "pools": str(first.pools)})
    os.replace(partial, path)


def read_statistics(folder: Path, group: Group) -> Covariance:
    """Read one group's statistics back.

    Raises:
        CalibrationError: the calibration that should have written them did not finish.
    """
    path = statistics_path(folder, group.layer)
    if not path.is_file():
        raise CalibrationError(f"{path} is missing: the calibration did not finish; run the same command again")
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        return Covariance(
            C=file.get_tensor(f"{group.name}.C"),
            mu=file.get_tensor(f"{group.name}.mu"),
            tokens=int(metadata["tokens"]),
            pools=int(metadata["pools"]),
        )
