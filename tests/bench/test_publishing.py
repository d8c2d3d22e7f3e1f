"""A result says what ran, where and when."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

import publishing


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with the folders of this one, and one commit."""
    for folder in ("lrserve", "exporters", "bench/results"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "file.py").write_text("1\n")
    (tmp_path / "pyproject.toml").write_text("\n")
    for command in (["init", "-q"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "one"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    monkeypatch.setattr(publishing, "ROOT", tmp_path)
    monkeypatch.setattr(publishing, "RESULTS", tmp_path / "bench" / "results")
    publishing.commit.cache_clear()
    yield tmp_path
    publishing.commit.cache_clear()


def head(checkout: Path) -> str:
    return subprocess.run(["git", "rev-parse", "HEAD"], cwd=checkout, check=True, capture_output=True, text=True).stdout.strip()


def test_both_files_hold_the_table_and_its_origin(checkout: Path) -> None:
    publishing.publish("speed-1b", "python bench/speed.py --model 1b", "| a |\n|---|\n| 1 |\n", {"rows": [1]})
    found = json.loads((checkout / "bench" / "results" / "speed-1b.json").read_text())
    shown = (checkout / "bench" / "results" / "speed-1b.md").read_text()
    assert found["data"] == {"rows": [1]}
    assert found["commit"] == head(checkout)
    assert set(found["versions"]) == {"lrserve", "torch", "transformers", "vllm", "onnxruntime"}
    assert set(found["machine"]) == {"processor", "instructions", "cores", "memory_gb", "gpu"}
    assert found["machine"]["cores"] > 0
    assert shown.startswith("# speed-1b\n\n- Command: `python bench/speed.py --model 1b`\n")
    assert shown.endswith("\n\n| a |\n|---|\n| 1 |\n")
    for origin in (found["commit"][:7], found["date"][:10], found["versions"]["torch"], found["machine"]["processor"]):
        assert origin in shown


@pytest.mark.parametrize("name", [None, "cost"])
def test_a_script_prints_its_figures_and_keeps_them_where_it_is_told(
    checkout: Path, capsys: pytest.CaptureFixture[str], name: str | None
) -> None:
    publishing.conclude(name, "| a |", {"rows": [1]})
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "| a |"
    assert json.loads(shown[-1]) == {"rows": [1]}
    assert {path.name for path in (checkout / "bench" / "results").glob("cost*")} == ({"cost.json", "cost.md"} if name else set())


@pytest.mark.parametrize("changed", ["lrserve/file.py", "lrserve/new.py", "exporters/file.py", "bench/new.py", "pyproject.toml"])
def test_changed_code_is_dirty(checkout: Path, changed: str) -> None:
    (checkout / changed).write_text("2\n")
    assert publishing.commit() == f"{head(checkout)}-dirty"


@pytest.mark.parametrize("changed", ["bench/results/file.py", "bench/results/new.md", "artifact.bin"])
def test_results_and_other_files_are_not(checkout: Path, changed: str) -> None:
    (checkout / changed).write_text("2\n")
    assert publishing.commit() == head(checkout)


def test_the_commit_is_that_of_the_start(checkout: Path) -> None:
    parser = argparse.ArgumentParser()
    publishing.add_results_option(parser)
    assert parser.parse_args(["--results", "speed-1b"]).results == "speed-1b"
    before = head(checkout)
    commit = ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "two"]
    subprocess.run(["git", *commit], cwd=checkout, check=True)
    assert before != head(checkout)
    assert publishing.commit() == before


@pytest.mark.parametrize("name", ["", "../speed", "a/b", ".hidden", "Speed", "a b"])
def test_names_that_are_no_files_are_refused(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    publishing.add_results_option(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["--results", name])
    assert "is no file name" in capsys.readouterr().err


def test_the_command_can_be_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/bench/speed.py", "--plan", "my plan.json"])
    assert publishing.command_line() == "python bench/speed.py --plan 'my plan.json'"
