"""SIGKILL at random moments of full runs, with vLLM and with ONNX Runtime measuring: `make soak`.

After each kill the next run must leave byte for byte the weights, graphs and plan of an undisturbed run, whose measurements are
replayed (faults/killing.py), and nothing of the killed one but the work folder. Every second run overwrites an older artifact: the
old or the new one must be whole at its place right after the kill. No engine may outlive its run.

LRSERVE_SOAK_KILLS: number of kills. LRSERVE_SOAK_ENGINES: `onnx`, `vllm` or both with a comma, in turns. LRSERVE_SOAK_SEED: of the
moments. On two cores a kill costs about half a minute with ONNX Runtime, and three minutes with vLLM.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faults.killing import Place, kill
from integration.test_pipeline import SMALL
from tiny import dense_model, write_dense, write_text

from lrserve.storage.store import read_manifest, verify_files, write_manifest

pytestmark = pytest.mark.soak

KILLS = int(os.environ.get("LRSERVE_SOAK_KILLS", "200"))
ENGINES = os.environ.get("LRSERVE_SOAK_ENGINES", "onnx,vllm").split(",")
SEED = int(os.environ.get("LRSERVE_SOAK_SEED", "0"))
_OLDER = {"seed": "another"}


class Runs:
    """The runs of one engine: the undisturbed one, and those that are killed."""

    def __init__(self, root: Path, engine: str) -> None:
        root.mkdir()
        write_dense(dense_model("LlamaForCausalLM"), root / "model")
        write_text(root / "text.jsonl", 200)
        settings: dict[str, Any] = {
            "model": str(root / "model"),
            "target": {"ratio": 0.2},
            "text": {"calibration": str(root / "text.jsonl")},
            **SMALL,
            "factorization": {**SMALL["factorization"], "recover_minutes": 0},  # the clock decides what training comes to
            "search": {**SMALL["search"], "rank_step": 32},  # few layers to time
            "engine": {**SMALL["engine"], "runtime": engine},
            "export": ["onnx"] if engine == "onnx" else ["vllm", "onnx"],
        }
        self.engine, self.place = engine, Place(root, settings)
        began = time.monotonic()
        self.place.run("reference")
        self.seconds = time.monotonic() - began
        self.usual = set(self.place.strays())  # of vLLM
        self.stages: Counter[str] = Counter()
        self.missed = 0

    def kill_once(self, number: int, moment: float) -> list[str]:
        """Kill a run after a share of the undisturbed one's time, let the next one finish, and return what is wrong."""
        name, replaces = f"run-{number}", number % 2 == 1
        out = self.place.out(name)
        if replaces:
            shutil.copytree(self.place.out("reference"), out)
            write_manifest(out, read_manifest(out)["created_by"], _OLDER)
        stage = self._killed_in(name, moment * self.seconds)
        if stage is None:
            self.missed += 1
            self._forget(name)
            return self.kill_once(number, moment / 2)
        self.stages[stage] += 1
        faults = []
        if replaces and (not out.is_dir() or verify_files(out)):
            faults.append("neither the old nor the new artifact was there after the kill")
        try:
            self.place.wait_for_engines()
            lines = self.place.run(name, "reference")
            faults += [f"a traceback: {line}" for line in lines if "Traceback" in line]
            faults += [f"{path} differs" for path in self.place.unlike(name, "reference")]
            faults += [f"{path} is left" for path in self.place.strays() if path not in self.usual]
            faults += verify_files(out)
        except AssertionError as error:
            faults.append(str(error))
        self._forget(name)
        return [f"{self.engine}, kill {number} in {stage!r} at {moment * self.seconds:.1f} s: {fault}" for fault in faults]

    def _killed_in(self, name: str, seconds: float) -> str | None:
        """Start a run and kill it; returns the last stage that it ended, None if it had ended before."""
        process = self.place.start(name, "reference")
        try:
            text, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            text, _ = process.communicate()
            kill(process)
            ended = [line.partition(":")[0] for line in text.splitlines() if line[1:3] == "/6"]
            return ended[-1].partition(" (")[0] if ended else "start"
        assert process.returncode == 0, text
        return None

    def _forget(self, name: str) -> None:
        shutil.rmtree(self.place.out(name), ignore_errors=True)
        shutil.rmtree(self.place.work(name), ignore_errors=True)


@pytest.mark.timeout(0)
def test_whenever_a_run_is_killed_the_next_one_ends_as_if_it_had_not_been(tmp_path: Path, soak_row: Callable[..., None]) -> None:
    moments = random.Random(SEED)
    runs = {engine: Runs(tmp_path / engine, engine) for engine in ENGINES}
    kills: Counter[str] = Counter()
    faulty: Counter[str] = Counter()
    seconds = dict.fromkeys(ENGINES, 0.0)
    faults: list[str] = []
    for number in range(KILLS):
        engine, began = ENGINES[number % len(ENGINES)], time.monotonic()
        found = runs[engine].kill_once(number, moments.random())
        seconds[engine] += time.monotonic() - began
        kills[engine] += 1
        faulty[engine] += bool(found)
        faults += found
    for engine, run in runs.items():
        told = f"an undisturbed run takes {run.seconds:.0f} s; ended last: " + ", ".join(
            f"{stage} {count}" for stage, count in sorted(run.stages.items())
        )
        soak_row(f"kills, {engine} measures", kills[engine], faulty[engine], seconds[engine], told)
    assert sum(kills.values()) == KILLS
    assert not faults, "\n".join(faults)
