"""A run in several processes that a launcher starts, on one machine or several: `torchrun`, or `accelerate launch`, which calls it.

The first process does the run. The others wait until it recovers, train with it (recovery_worker.py), and end with it. All of them
see the work folder and the inputs at the same paths.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

import torch
import torch.distributed

from lrserve.compression.team import Team

_OF_LAUNCHERS: Final = re.compile(r"((LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|TORCHELASTIC_\w+)")
_PATIENCE: Final = timedelta(days=365)  # with the first process, which calibrates and searches meanwhile; one that dies is noticed


@dataclass(frozen=True)
class Launch:
    """This process as the `index`-th, from 0, of `count` that have met."""

    index: int
    count: int

    def team(self, sharded: bool) -> Team:
        """Return the processes as those that train together."""
        return Team(self.index, self.count, sharded)

    def send(self, task: dict[str, Any] | None) -> None:
        """Give the others, who `receive`, a task; None lets them end."""
        torch.distributed.broadcast_object_list([task], src=0, device=torch.device("cpu"))

    def receive(self) -> dict[str, Any] | None:
        """Wait for what the first process sends."""
        found: list[dict[str, Any] | None] = [None]
        torch.distributed.broadcast_object_list(found, src=0, device=torch.device("cpu"))
        return found[0]


@contextmanager
def launched() -> Iterator[Launch | None]:
    """Join the processes that a launcher started; yields None in a process by itself.

    The launcher's variables are taken out of the environment: engines, which this process starts, would follow them. When the first
    process has done its work, the others are let go. Where it fails, the launcher ends them.
    """
    count = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
    if count == 1:
        yield None
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    torch.distributed.init_process_group(timeout=_PATIENCE)
    launch = Launch(torch.distributed.get_rank(), count)
    for name in filter(_OF_LAUNCHERS.fullmatch, list(os.environ)):
        del os.environ[name]
    yield launch
    if launch.index == 0:
        launch.send(None)
    torch.distributed.destroy_process_group()
