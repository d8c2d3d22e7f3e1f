"""Recovery in several processes of a run: they find the stages before it finished, and give what one process gives."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest
import torch
from pipeline.test_improve import MIXED, Run, folder, place

from lrserve.compression.level import Level
from lrserve.compression.training import TrainedFactors
from lrserve.errors import EngineError
from lrserve.pipeline import together
from lrserve.storage.work import WorkFolder, work_folder

__all__ = ["folder", "place"]  # fixtures

TOKENS = {"recover_tokens": 4096, "recover_batch_tokens": 512}


@pytest.mark.parametrize(("levels", "sharded"), [(MIXED, True), ({"down": Level(64), "qkv": Level(24)}, None)])
def test_two_processes_give_the_model_of_one(
    levels: dict[str, Level], sharded: bool | None, place: Path, folder: WorkFolder, tmp_path: Path
) -> None:
    pair = Run(place, folder, levels, recover_processes=2, recover_sharded=sharded, **TOKENS)
    found = pair.improved()
    assert found.done["recover"]["tokens"] == 4096
    said = (folder.root / "recovery.log").read_text()
    assert said.count("2/6 calibrate: covariances of 2 blocks from 512 tokens (all reused)") == 2
    assert said.count(f"of 2, with {'parts' if sharded else 'copies'} of the models") == 2
    with work_folder(tmp_path / "one", lambda line: None) as other:
        one = Run(place, other, levels, **TOKENS).improved()
    assert found.done["recover"]["divergence"] == pytest.approx(one.done["recover"]["divergence"], rel=1e-4)
    torch.testing.assert_close(pair.logits(found), pair.logits(one), rtol=1e-3, atol=1e-3)
    if isinstance(one.factors, TrainedFactors):
        assert isinstance(found.factors, TrainedFactors)
        for name, tensor in one.factors.tensors().items():
            torch.testing.assert_close(found.factors.tensors()[name], tensor, rtol=1e-4, atol=1e-5)


def test_a_process_that_fails_ends_the_others_and_is_named(
    place: Path, folder: WorkFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(together, "_WORKER", "lrserve.pipeline.nowhere")
    with pytest.raises(EngineError, match=r"recovery: process [01] of 2 ended with code 1; the same command goes on from"):
        Run(place, folder, {"down": Level(64)}, recover_processes=2, **TOKENS).improved()


def test_a_failure_is_noticed_while_others_run_and_ends_them() -> None:
    workers = [subprocess.Popen(["sleep", "60"]), subprocess.Popen(["sh", "-c", "exit 3"])]
    assert together._first_failure(workers) == 1
    together._end(workers)
    assert [worker.returncode for worker in workers] == [-signal.SIGTERM, 3]
    assert together._first_failure([subprocess.Popen(["true"])]) is None
