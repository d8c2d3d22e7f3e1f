"""Processes that train together: each takes some sequences of a step, and what is a sum over sequences is added up over all."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import torch
import torch.distributed
from torch import nn


@dataclass(frozen=True)
class Team:
    """This process as the `index`-th, from 0, of `count`. More than one have initialised torch.distributed."""

    index: int = 0
    count: int = 1

    def part(self, items: int) -> range:
        """Return which of so many items this process takes: a run of them, that may be empty."""
        return range(items * self.index // self.count, items * (self.index + 1) // self.count)

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


ALONE: Final = Team()
"""A process that trains by itself."""
