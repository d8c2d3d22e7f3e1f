"""Recovery in several processes of this machine, one for each GPU, without a launcher: starts them, watches them, and ends them.

Each goes the pipeline's way through the finished stages of the work folder to the recovery (recovery_worker.py), where they train
together (compression/team.py). What they find is in the recovery's stage then.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from lrserve.allocation.plan import Plan
from lrserve.engines.gpu import release_memory
from lrserve.engines.process import failure, tied
from lrserve.pipeline.job import Job
from lrserve.storage.store import write_json
from lrserve.storage.temporary import temporary_folder
from lrserve.storage.work import WorkFolder

_WORKER: Final = "lrserve.pipeline.recovery_worker"
_PATIENCE_SECONDS: Final = 60.0  # with processes that save what they have learnt
_LOOK_SECONDS: Final = 0.2


def recover_together(job: Job, plan: Plan, folder: WorkFolder, *, weighed: bool) -> None:
    """Run the recovery of a plan in several processes, to its end.

    The first one's progress comes on standard error; what else they say is in recovery.log in the work folder.

    Args:
        job: the opened inputs.
        plan: the chosen plan.
        folder: the work folder, with every stage before the recovery.
        weighed: whether rounding is measured by weighed moments (`Rounding.weighed`).

    Raises:
        EngineError: one of them failed; the message ends with the log's last lines.
    """
    task = recovery_task(job, plan, folder, weighed)
    processes, path = job.recovery_processes, folder.root / "recovery.log"
    release_memory()
    with temporary_folder() as place, path.open("wb") as log:
        write_json(Path(place) / "task.json", task)
        workers: list[subprocess.Popen[bytes]] = []
        try:
            for index in range(processes):
                command = tied([sys.executable, "-m", _WORKER, str(Path(place) / "task.json"), str(index)])
                stderr = log if index else None
                workers.append(subprocess.Popen(command, stdout=log, stderr=stderr, env=_environment(os.environ)))
            failed = _first_failure(workers)
        finally:
            _end(workers)
    if failed is not None:
        message = f"process {failed} of {processes} ended with code {workers[failed].returncode}"
        raise failure("recovery", f"{message}; the same command goes on from the last save, at most two minutes back", path)


def recovery_task(job: Job, plan: Plan, folder: WorkFolder, weighed: bool) -> dict[str, Any]:
    """Return what a process has to know to recover a plan with others, JSON; arguments as of `recover_together`."""
    return {
        "recipe": job.recipe.model_dump(mode="json"),
        "work": str(folder.root.absolute()),
        "plan": [plan.to_json(), plan.structure, plan.embedding],
        "weighed": weighed,
        "processes": job.recovery_processes,
        "sharded": job.recovery_sharded,
    }


def _environment(inherited: Mapping[str, str]) -> dict[str, str]:
    """Let processes talk over the loopback device, and not wait for each other's threads."""
    return {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", **inherited}


def _first_failure(workers: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """Wait until all have ended well, or one has failed, for which the others would wait; returns which."""
    while True:
        codes = [worker.poll() for worker in workers]
        failed = [index for index, code in enumerate(codes) if code]
        if failed:
            return failed[0]
        if all(code == 0 for code in codes):
            return None
        time.sleep(_LOOK_SECONDS)


def _end(workers: Sequence[subprocess.Popen[Any]]) -> None:
    """End what still runs: after a signal to this process the first one saves what was learnt."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    for worker in workers:
        if worker.poll() is None:
            worker.terminate()
    for worker in workers:
        try:
            worker.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()
