"""Progress: a bar on a terminal, sparse plain lines elsewhere."""

from __future__ import annotations

import io
import subprocess
import sys
from itertools import pairwise
from types import SimpleNamespace

import pytest

from lrserve.report import console
from lrserve.report.console import progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def lines_of(clock: SimpleNamespace, total: int, seconds_each: float) -> list[str]:
    stream = io.StringIO()
    with progress_bar(total, "2/6 calibrate", stream) as progress:
        for done in range(1, total + 1):
            clock.now += seconds_each
            progress(done)
    assert all(character.isprintable() or character == "\n" for character in stream.getvalue())
    return stream.getvalue().splitlines()


def test_a_pipe_gets_a_line_per_quarter(clock: SimpleNamespace) -> None:
    assert lines_of(clock, 30, 2.0) == [
        "2/6 calibrate: 8 of 30 (27%) after 16 s",
        "2/6 calibrate: 15 of 30 (50%) after 30 s",
        "2/6 calibrate: 23 of 30 (77%) after 46 s",
    ]


def test_a_short_stage_prints_nothing(clock: SimpleNamespace) -> None:
    assert lines_of(clock, 1000, 0.009) == []


def test_a_long_stage_is_never_silent_for_long(clock: SimpleNamespace) -> None:
    lines = lines_of(clock, 4000, 1.0)
    assert lines[0] == "2/6 calibrate: 300 of 4000 (8%) after 5 min 00 s"
    done = [0, *(int(line.split()[2]) for line in lines), 4000]  # one a second
    assert max(after - before for before, after in pairwise(done)) <= 300
    assert len(lines) <= 4000 // 300 + 3  # quarters come on top


def test_work_that_was_done_before_counts_once(clock: SimpleNamespace) -> None:
    stream = io.StringIO()
    with progress_bar(8, "probe", stream) as progress:
        clock.now += 60
        for done in (5, 5, 8, 8):  # five of them came from an earlier run
            progress(done)
    assert stream.getvalue() == "probe: 5 of 8 (62%) after 1 min 00 s\n"


def test_nothing_to_do_is_no_error(clock: SimpleNamespace) -> None:
    with progress_bar(0, "probe", io.StringIO()) as progress:
        clock.now += 1000
        progress(0)


def test_a_terminal_gets_a_bar_that_is_removed() -> None:
    stream = Terminal()
    with progress_bar(4, "2/6 calibrate", stream) as progress:
        for done in range(1, 5):
            progress(done)
    assert "\r" in stream.getvalue()
    assert "2/6 calibrate" in stream.getvalue()
    assert stream.getvalue().endswith("\r")


def test_a_program_whose_output_is_piped_writes_no_control_characters() -> None:
    code = (
        "from lrserve.report import console; console._QUIET_SECONDS = 0.0\n"
        "with console.progress_bar(8, 'stage') as progress:\n"
        "    for done in range(1, 9): progress(done)\n"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert shown.stdout == b""
    assert [line.split(b" after")[0] for line in shown.stderr.splitlines()] == [
        b"stage: 2 of 8 (25%)",
        b"stage: 4 of 8 (50%)",
        b"stage: 6 of 8 (75%)",
    ]
    assert b"\r" not in shown.stderr
