"""Recovery in processes that a launcher started: they wait for the first one, and give what one process gives."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pipeline.test_improve import MIXED, Run, place
from pipeline.test_together import TOKENS

from lrserve.pipeline.launched import launched
from lrserve.storage.work import work_folder

__all__ = ["place"]  # a fixture

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
TESTS = Path(__file__).parents[1]


def environment() -> dict[str, str]:
    return {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}


def test_processes_of_a_launcher_give_the_model_of_one(place: Path, tmp_path: Path) -> None:
    result = tmp_path / "result.pt"
    command = [*TORCHRUN, str(TESTS / "launched_run.py"), str(place), str(tmp_path / "work"), str(result)]
    subprocess.run(command, env=environment(), check=True, timeout=240)
    found = torch.load(result)
    with work_folder(tmp_path / "one", lambda line: None) as folder:
        run = Run(place, folder, MIXED, **TOKENS)
        one = run.improved()
    assert found["divergence"] == pytest.approx(one.done["recover"]["divergence"], rel=1e-4)
    torch.testing.assert_close(found["logits"], run.logits(one), rtol=1e-3, atol=1e-3)


def test_the_launcher_ends_the_others_where_the_first_process_fails(tmp_path: Path) -> None:
    lrserve = Path(sys.executable).with_name("lrserve")
    model, text = tmp_path / "nowhere", tmp_path / "text.jsonl"
    command = [*TORCHRUN, "--no-python", lrserve, "compress-and-export", model, "--calibration", text, "-o", tmp_path / "out"]
    found = subprocess.run(command, env=environment(), check=False, capture_output=True, text=True, timeout=240)
    assert found.returncode != 0
    assert found.stderr.count(f"error: no model at '{model}'") == 1


def test_a_process_by_itself_has_no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with launched() as launch:
        assert launch is None
