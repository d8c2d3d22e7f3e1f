"""When and on which machine figures were made: one description for metrics.json, report, model card, bench and bench/results."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Final

_INSTRUCTIONS: Final = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile")
_CGROUP_LIMITS: Final = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def made() -> dict[str, Any]:
    """Return `date`, now, in UTC to the second (ISO 8601), and `machine`."""
    return {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "machine": machine()}


def machine() -> dict[str, Any]:
    """Return what times depend on most, for people to read.

    `processor` (its name), `instructions` (those for matrix multiplications that it has), `cores` that this process may use,
    `memory_gb` (1e9 bytes), and `gpu` (name, or None).
    """
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS and Windows
        cores = os.cpu_count() or 1
    cpu = _cpuinfo()
    flags = cpu.get("flags", "").split()
    return {
        "processor": cpu.get("model name") or platform.processor() or platform.machine(),
        "instructions": [flag for flag in _INSTRUCTIONS if flag in flags],
        "cores": cores,
        "memory_gb": round(_memory_bytes() / 1e9),
        "gpu": _gpu(),
    }


def describe(machine: Mapping[str, Any]) -> str:
    """Render a `machine` for people: `AMD EPYC, avx512_bf16, 2 cores, 25 GB`."""
    cores = f"{machine['cores']} core{'s' if machine['cores'] != 1 else ''}"
    memory = [f"{machine['memory_gb']} GB"] if machine["memory_gb"] else []
    return ", ".join(
        [*([machine["gpu"]] if machine["gpu"] else []), machine["processor"], *machine["instructions"], cores, *memory]
    )


def day(made: Mapping[str, Any]) -> str:
    """Return the date of `made` without the time."""
    return str(made["date"]).partition("T")[0]


def _cpuinfo() -> dict[str, str]:
    """Return what Linux says of the first processor; empty elsewhere."""
    path = Path("/proc/cpuinfo")
    text = path.read_text(encoding="utf-8").partition("\n\n")[0] if path.is_file() else ""
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}


def _memory_bytes() -> int:
    """Return the memory that this process may use: the machine's, or its container's limit; 0 where the system does not say."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0
    limits = [text for path in map(Path, _CGROUP_LIMITS) if path.is_file() and (text := path.read_text().strip()).isdigit()]
    return min([memory, *map(int, limits)])


def _gpu() -> str | None:
    import torch

    if not torch.cuda.is_available():
        return None
    count = torch.cuda.device_count()
    return f"{count} x {torch.cuda.get_device_name()}" if count > 1 else str(torch.cuda.get_device_name())
