"""Processes that train together: each takes some sequences of a step, and what is a sum over sequences is added up over all."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import torch
import torch.distributed
from torch import nn

ENDINGS: Final = (signal.SIGINT, signal.SIGTERM)
"""The signals that end a process, and let it save what it has."""


@dataclass(frozen=True)
class Team:
    """This process as the `index`-th, from 0, of `count`. More than one have initialised torch.distributed.

    sharded: whether each keeps a part of the models' decoder blocks (sharding.py), and not the whole of them.
    """

    index: int = 0
    count: int = 1
    sharded: bool = False

    def part(self, items: int) -> range:
        """Return which of so many items this process takes: a run of them, that may be empty."""
        return range(items * self.index // self.count, items * (self.index + 1) // self.count)

    def passes(self, items: int, at_once: int) -> list[range]:
        """Cut this process's items into runs of at most so many; every process has as many runs, the last ones perhaps empty."""
        own, most = self.part(items), -(-items // self.count)
        starts = range(own.start, own.start + most, at_once)
        return [range(min(start, own.stop), min(start + at_once, own.stop)) for start in starts]

    def add_up(self, tensors: Iterable[torch.Tensor]) -> None:
        """Replace tensors, of equal shapes in all processes, by their sums over the processes."""
        if self.count > 1:
            for work in [torch.distributed.all_reduce(tensor, async_op=True) for tensor in tensors]:
                work.wait()

    def add_up_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace the gradients of parameters by their sums over the processes; no gradient is one of zeros."""
        if self.count > 1:
            learning = [parameter for parameter in parameters if parameter.requires_grad]
            for parameter in learning:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            self.add_up(parameter.grad for parameter in learning if parameter.grad is not None)

    def wait(self) -> None:
        """Wait until every process has come here."""
        if self.count > 1:
            torch.distributed.barrier()

    @contextmanager
    def signals_held(self) -> Iterator[list[int]]:
        """Hold the signals that end a process, since the others would wait for it in the middle of a step; yields those that came.

        One that came is raised in the end. A process by itself holds none.
        """
        came: list[int] = []
        if self.count == 1:
            yield came
            return
        before = {number: signal.signal(number, lambda number, _: came.append(number)) for number in ENDINGS}
        try:
            yield came
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


ALONE: Final = Team()
"""A process that trains by itself."""
