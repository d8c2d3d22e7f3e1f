"""The table at the end of `make soak`: what went wrong is in it, and in the exit status."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TESTS = {
    "test_kills.py": "def test_kills(soak_row): soak_row('kills', 200, 0, 61.4, 'no file left')",
    "test_flips.py": "def test_flips(soak_row): soak_row('flips', 500, {flips}, 2.0)",
    "test_quiet.py": "def test_a(): pass\ndef test_b(): assert not {quiet}\n",
    "test_late.py": "def test_late(soak_row):\n    soak_row('late', 3, 0, 1)\n    assert not {late}\n",
}

Soak = Callable[..., tuple[int, list[str]]]


@pytest.fixture
def soak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Soak:
    """Run small soak tests under the conftest; returns the exit status and the table's lines."""
    monkeypatch.setenv("LRSERVE_SOAK_RESULTS", str(tmp_path / "kept" / "soak.json"))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # two texts of one second and size would be taken for one
    plugins = [f"-pno:{name}" for name in ("cacheprovider", "faulthandler", "timeout", "xdist")]  # the outer run's stay as they are

    def run(*, flips: int = 0, quiet: int = 0, late: int = 0) -> tuple[int, list[str]]:
        (tmp_path / "conftest.py").write_text((ROOT / "tests/soak/conftest.py").read_text())
        for name, text in TESTS.items():
            (tmp_path / name).write_text(text.format(flips=flips, quiet=quiet, late=late))
        capsys.readouterr()
        options = ["-q", "-s", "--import-mode=importlib", "-c", os.devnull, f"--rootdir={tmp_path}"]
        code = pytest.main([*plugins, *options, str(tmp_path)])
        for name in [name for name, module in sys.modules.items() if str(tmp_path) in repr(module)]:
            del sys.modules[name]  # the next run has its own
        return code, [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]

    return run


def test_every_test_is_in_the_table(soak: Soak, tmp_path: Path) -> None:
    code, table = soak()
    assert code == 0
    assert {line[: line.rindex(" |", 0, -2)] for line in table[1:]} >= {"| flips | 500 | 0 | 2 s", "| late | 3 | 0 | 1 s"}
    assert "| kills | 200 | 0 | 61 s | no file left |" in table
    assert any(line.startswith("| test_quiet.py | 2 | 0 |") for line in table)
    kept = json.loads((tmp_path / "kept/soak.json").read_text())
    assert {"kind": "flips", "cases": 500, "failed": 0, "seconds": 2.0, "note": ""} in kept["data"]
    assert "\n".join(table) in (tmp_path / "kept/soak.md").read_text().replace("|---|--:|--:|--:|---|\n", "")


def test_no_failure_is_lost(soak: Soak) -> None:
    code, table = soak(flips=1, quiet=1, late=1)
    assert code == 1
    for line in ("| flips | 500 | 1 |", "| test_quiet.py | 2 | 1 |", "| late | 3 | 0 |", "| test_late.py::test_late | 1 | 1 |"):
        assert any(found.startswith(line) for found in table), table
    code, _ = soak(flips=1)
    assert code == 1
