"""Weights in files without a name: the system takes their memory back where it is short, and their disk when they are let go."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import torch
from torch import nn

from lrserve.storage.temporary import owner

_SMALL: Final = 1 << 16  # bytes: a tensor below is not worth a file


class Filed:
    """Moves tensors of the CPU into files of a folder; without a folder they stay where they are."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the same values in a file that has no name any more.

        Raises:
            OSError: the disk has no room.
        """
        size = tensor.nbytes
        if self._folder is None or tensor.device.type != "cpu" or size < _SMALL:
            return tensor
        descriptor, path = tempfile.mkstemp(prefix="lrserve-", suffix=f"-{owner()}", dir=self._folder)
        try:
            os.posix_fallocate(descriptor, 0, size)  # a sparse file on a full disk would end the process with SIGBUS
            filed = torch.from_file(path, shared=True, size=size, dtype=torch.uint8).view(tensor.dtype).view(tensor.shape)
        finally:
            os.close(descriptor)
            os.unlink(path)
        return filed.copy_(tensor)

    @torch.no_grad()
    def modules(self, modules: Iterable[nn.Module]) -> None:
        """Move the parameters and buffers of modules."""
        owners = nn.ModuleList(modules)
        for tensor in (*owners.parameters(), *owners.buffers()):
            tensor.data = self(tensor.data)


IN_MEMORY: Final = Filed()
"""Leaves tensors where they are."""
