"""Processes end with the one that started them, however that ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lrserve.engines.process import tied

POOL = """
import multiprocessing, os, sys, time
from concurrent.futures import ProcessPoolExecutor
from lrserve.plugins.lifetime import end_with_parent

def main(method):
    pool = ProcessPoolExecutor(1, multiprocessing.get_context(method), initializer=end_with_parent)
    print(pool.submit(os.getpid).result(), flush=True)
    time.sleep(600)
"""
TIED = """
import subprocess, sys, time
from lrserve.engines.process import tied
child = subprocess.Popen(tied([sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(600)"]))
time.sleep(600)
"""


def ended(pid: int) -> bool:
    """Whether a process has ended; who nobody waits for stays as a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.parametrize("code", ["import pool; pool.main('spawn')", "import pool; pool.main('fork')", TIED])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_child_of_a_killed_process_ends(tmp_path: Path, code: str, number: signal.Signals) -> None:
    (tmp_path / "pool.py").write_text(POOL)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert not ended(child)
        parent.send_signal(number)
    deadline = time.monotonic() + 20
    while not ended(child):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_tied_program_gets_its_arguments_and_gives_its_code() -> None:
    code = "import sys; print(sys.argv[1:]); sys.exit(7)"
    done = subprocess.run(tied([sys.executable, "-c", code, "a b", "--c"]), capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("['a b', '--c']\n", 7)


def test_nothing_starts_for_a_parent_that_has_ended() -> None:
    command = tied([sys.executable, "-c", "print(1)"])
    command[command.index(str(os.getpid()))] = "1"
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("", "")
