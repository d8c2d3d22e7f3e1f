"""The table at the end of `make soak`: what went wrong is in it, and in the exit status."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = {
    "test_kills.py": "def test_kills(soak_row): soak_row('kills', 200, 0, 61.4, 'no file left')",
    "test_flips.py": "def test_flips(soak_row): soak_row('flips', 500, {flips}, 2.0)",
    "test_quiet.py": "def test_a(): pass\ndef test_b(): assert not {quiet}\n",
    "test_late.py": "def test_late(soak_row):\n    soak_row('late', 3, 0, 1)\n    assert not {late}\n",
}


def soak(place: Path, *, flips: int = 0, quiet: int = 0, late: int = 0) -> tuple[int, list[str]]:
    """Run small soak tests under the conftest; returns the exit status and the table's lines."""
    (place / "conftest.py").write_text((ROOT / "tests/soak/conftest.py").read_text())
    for name, text in TESTS.items():
        (place / name).write_text(text.format(flips=flips, quiet=quiet, late=late))
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "-c", os.devnull, f"--rootdir={place}", str(place)]
    environment = {
        **os.environ,
        "LRSERVE_SOAK_RESULTS": str(place / "kept" / "soak.json"),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "bench")]),
    }
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, [line for line in done.stdout.splitlines() if line.startswith("| ")]


def test_every_test_is_in_the_table(tmp_path: Path) -> None:
    code, table = soak(tmp_path)
    assert code == 0
    assert {line[: line.rindex(" |", 0, -2)] for line in table[1:]} >= {"| flips | 500 | 0 | 2 s", "| late | 3 | 0 | 1 s"}
    assert "| kills | 200 | 0 | 61 s | no file left |" in table
    assert any(line.startswith("| test_quiet.py | 2 | 0 |") for line in table)
    kept = json.loads((tmp_path / "kept/soak.json").read_text())
    assert {"kind": "flips", "cases": 500, "failed": 0, "seconds": 2.0, "note": ""} in kept["data"]
    assert "\n".join(table) in (tmp_path / "kept/soak.md").read_text().replace("|---|--:|--:|--:|---|\n", "")


def test_no_failure_is_lost(tmp_path: Path) -> None:
    code, table = soak(tmp_path, flips=1, quiet=1, late=1)
    assert code == 1
    for line in ("| flips | 500 | 1 |", "| test_quiet.py | 2 | 1 |", "| late | 3 | 0 |", "| test_late.py::test_late | 1 | 1 |"):
        assert any(found.startswith(line) for found in table), table
    code, _ = soak(tmp_path, flips=1)
    assert code == 1
