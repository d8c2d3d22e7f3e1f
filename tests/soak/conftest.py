"""One table of all soak tests, at the end of `make soak`.

A test records what it tried by the fixture `soak_row`. Tests that record nothing share one row a file. Where LRSERVE_SOAK_RESULTS
names a file, such as bench/results/soak.json, the rows are kept there, and the table beside it as Markdown.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pytest

RESULTS = "LRSERVE_SOAK_RESULTS"
ALL = ("-m", "soak", "tests/soak")  # what `make soak` gives pytest


@dataclass(frozen=True)
class Row:
    """What was tried.

    kind: such as `SIGKILL at random moments`.
    cases: how many were tried.
    failed: how many of them went wrong.
    seconds: that all took.
    note: figures that a reader wants besides.
    """

    kind: str
    cases: int
    failed: int
    seconds: float
    note: str = ""


@dataclass
class Outcome:
    """What became of one test."""

    seconds: float = 0.0
    ran: bool = False
    failed: bool = False
    rows: list[Row] = field(default_factory=list)


class Table:
    """Collects rows from the reports of tests."""

    def __init__(self, command: str) -> None:
        self._command = command
        self._tests: dict[str, Outcome] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note a phase of a test; the last one has all rows."""
        test = self._tests.setdefault(report.nodeid, Outcome())
        test.seconds += report.duration
        test.ran |= report.when == "call"
        test.failed |= report.failed
        test.rows = [value for name, value in report.user_properties if name == RESULTS and isinstance(value, Row)]

    def rows(self) -> list[Row]:
        """Return a row for each that was recorded, for each test that failed beside its rows, and for each file of other tests."""
        rows, files = list[Row](), dict[str, list[Outcome]]()
        for name, test in self._tests.items():
            rows += test.rows
            if test.failed and test.rows and not any(row.failed for row in test.rows):
                rows.append(Row(name.rpartition("/")[2], 1, 1, test.seconds))
            elif not test.rows and (test.ran or test.failed):
                files.setdefault(name.partition("::")[0].rpartition("/")[2], []).append(test)
        for file, tests in files.items():
            rows.append(Row(file, len(tests), sum(test.failed for test in tests), sum(test.seconds for test in tests)))
        return rows

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Print the table, and keep it where the environment says."""
        if not (rows := self.rows()):
            return
        table = markdown(rows)
        terminalreporter.section("soak")
        terminalreporter.write_line(table)
        if RESULTS in os.environ:
            from publishing import publish

            path = Path(os.environ[RESULTS])
            publish(path.stem, self._command, table, [asdict(row) for row in rows], folder=path.parent)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Table(command_line(config.invocation_params.args)))
    if RESULTS in os.environ:
        from publishing import commit

        commit()  # of the code that runs now, for others may commit before the end


def command_line(arguments: Sequence[str]) -> str:
    """Return the command that runs the same tests: `make soak`, or pytest's, after the settings that it ran with."""
    settings = [f"{name}={os.environ[name]}" for name in sorted(os.environ) if name.startswith("LRSERVE_SOAK_") and name != RESULTS]
    command = "make soak" if tuple(arguments) == ALL else shlex.join(["python", "-m", "pytest", *arguments])
    return " ".join([*settings, command])


def markdown(rows: list[Row]) -> str:
    """Render the table."""
    lines = ["| tried | cases | failed | time | |", "|---|--:|--:|--:|---|"]
    lines += [f"| {row.kind} | {row.cases:,} | {row.failed:,} | {row.seconds:,.0f} s | {row.note} |" for row in rows]
    return "\n".join(lines)


@pytest.fixture
def soak_row(request: pytest.FixtureRequest) -> Iterator[Callable[..., None]]:
    """Record a row of the table, by the fields of `Row`; the test fails in its end if a case of a row has."""
    rows: list[Row] = []

    def record(kind: str, cases: int, failed: int, seconds: float, note: str = "") -> None:
        rows.append(Row(kind, cases, failed, seconds, note))
        request.node.user_properties.append((RESULTS, rows[-1]))

    yield record
    assert not (wrong := [row for row in rows if row.failed]), wrong
