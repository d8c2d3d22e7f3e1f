"""Batches on their way to a GPU and back, without the host waiting for the one that is computed.

From pinned memory, which the GPU reads by itself, a copy is queued behind what the GPU is doing, so the host reads the next batch
from disk meanwhile. A result is read a batch late, when the next one is queued already.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch


def sent(batches: Iterable[torch.Tensor], device: torch.device) -> Iterator[torch.Tensor]:
    """Yield batches, which are on the CPU, on a device."""
    for batch in batches:
        yield batch.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else batch.to(device)


class Receiver:
    """Writes results of a device into tensors on the CPU; the last one is there after `finish`."""

    def __init__(self) -> None:
        self._waiting: tuple[torch.Tensor, torch.Tensor, torch.cuda.Event] | None = None

    def put(self, target: torch.Tensor, result: torch.Tensor) -> None:
        """Take a result, and write the one before it."""
        if result.device.type != "cuda":
            target.copy_(result)
            return
        copied = result.to("cpu", non_blocking=True)  # into pinned memory
        done = torch.cuda.Event()
        done.record()
        self.finish()
        self._waiting = target, copied, done

    def finish(self) -> None:
        """Write what was not written yet."""
        if self._waiting is not None:
            target, copied, done = self._waiting
            done.synchronize()
            target.copy_(copied)
            self._waiting = None
