from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping

import pytest

from lrserve.serving.process import memory_environment

PAGES = """
import resource
for count in range(10):
    if count == 2:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytearray(64 * 2**20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
OWN = "from lrserve.serving.process import keep_memory; keep_memory()\n"


def mapped_again(code: str, environment: Mapping[str, str]) -> int:
    """Count the page faults of eight allocations of 64 MiB, after two others, in a process of its own."""
    command = [sys.executable, "-c", code]
    return int(subprocess.run(command, env=dict(environment), capture_output=True, text=True, check=True, timeout=60).stdout)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    return dict(os.environ)


def test_what_is_freed_is_not_mapped_again(plain: dict[str, str]) -> None:
    default = mapped_again(PAGES, plain)
    assert mapped_again(PAGES, memory_environment(plain)) < default / 20
    assert mapped_again(OWN + PAGES, plain) < default / 20


def test_the_users_settings_of_malloc_stay(plain: dict[str, str]) -> None:
    mine = {**plain, "GLIBC_TUNABLES": "glibc.malloc.arena_max=2"}
    assert memory_environment(mine) == mine
    assert mapped_again(OWN + PAGES, mine) > 1000
