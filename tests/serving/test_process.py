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


def mapped_again(code: str, environment: Mapping[str, str]) -> int:
    """Count the page faults of eight allocations of 64 MiB, after two others, in a process of its own."""
    command = [sys.executable, "-c", code]
    return int(subprocess.run(command, env=dict(environment), capture_output=True, text=True, check=True, timeout=60).stdout)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    for name in [name for name in os.environ if name == "GLIBC_TUNABLES" or name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)
    return dict(os.environ)


def test_what_is_freed_is_not_mapped_again(plain: dict[str, str]) -> None:
    assert mapped_again(PAGES, memory_environment(plain)) < mapped_again(PAGES, plain) / 20


@pytest.mark.parametrize(
    "mine", [{"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0"}, {"GLIBC_TUNABLES": ""}, {"MALLOC_ARENA_MAX": "2"}]
)
def test_the_users_settings_of_malloc_stay(plain: dict[str, str], mine: dict[str, str]) -> None:
    assert memory_environment({**plain, **mine}) == {**plain, **mine}


@pytest.mark.parametrize("found", [("", ""), ("glibc", "2.34"), ("musl", "1.2")])
def test_other_c_libraries_get_no_settings(monkeypatch: pytest.MonkeyPatch, found: tuple[str, str]) -> None:
    monkeypatch.setattr("platform.libc_ver", lambda: found)
    assert memory_environment({"A": "b"}) == {"A": "b"}
