"""The memory of this machine, or of the container that this process runs in."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_CONTAINERS: Final = (
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"),
)


@dataclass(frozen=True)
class Memory:
    """Of this machine, or of its container, in bytes."""

    total: int
    free: int


def free_memory() -> Memory | None:
    """Return the memory of this machine or of its container, counted as vLLM does; None where the system does not say."""
    try:
        lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
        found = {line[0].rstrip(":"): int(line[1]) * 1024 for line in lines}
        total, free = found["MemTotal"], found["MemAvailable"]
    except (OSError, ValueError, KeyError, IndexError):
        return None
    for group, most, used in _CONTAINERS:
        with suppress(OSError, ValueError):  # no limit, or not this kind of control groups
            limit = int((group / most).read_text())
            return Memory(min(total, limit), min(free, max(limit - int((group / used).read_text()), 0)))
    return Memory(total, free)
