"""Every script of bench/ explains itself, and those that make tables can keep them."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

SCRIPTS = sorted(path for path in (Path(__file__).parents[2] / "bench").glob("*.py") if "\ndef main()" in path.read_text())
TABLES = {
    "calibration_cost",
    "cost",
    "front",
    "memory",
    "onnx_export",
    "onnx_graphs",
    "precision",
    "profiles",
    "quality",
    "readme",
    "search",
    "speed",
}


def help_of(script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_help_gives_the_command_and_the_options(
    script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = help_of(script, monkeypatch, capsys)
    assert f"    python bench/{script.name}" in shown
    assert ("--results NAME" in shown) == (script.stem in TABLES)


def test_every_table_has_its_script() -> None:
    assert {script.stem for script in SCRIPTS} == TABLES | {"gpu", "shape"}
