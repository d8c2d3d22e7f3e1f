"""One of the processes of a recovery.

`python -m lrserve.pipeline.recovery_worker TASK INDEX` as together.py starts it, or what a launcher started (`follow`).
"""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from lrserve.allocation.plan import Plan
from lrserve.compression.matmul import float32_matmuls
from lrserve.compression.team import ENDINGS, Team
from lrserve.errors import LrserveError
from lrserve.pipeline.collect import backpropagate, calibrate_blocks
from lrserve.pipeline.improve import improve_factors
from lrserve.pipeline.job import open_job
from lrserve.pipeline.launched import Launch
from lrserve.pipeline.rounding import gradient_reader, rounding_of, weigh_tokens
from lrserve.pipeline.run import factorize_groups
from lrserve.pipeline.stages import MODULES
from lrserve.recipe import Recipe
from lrserve.report.console import Say
from lrserve.storage.work import WorkFolder


def recover_in(task: dict[str, Any], team: Team, say: Say = print) -> None:
    """Go to the recovery, through stages that are finished, and train there with the team."""
    job = open_job(Recipe.model_validate(task["recipe"]), say)
    job.say(f"5/6 recover: process {team.index + 1} of {team.count}, with {'parts' if team.sharded else 'copies'} of the models")
    folder = WorkFolder(Path(task["work"]), say, MODULES)
    model = job.source.load(job.dtype)
    with float32_matmuls():
        statistics = calibrate_blocks(job, model, folder)
        gradients = backpropagate(job, model, folder)
        store = factorize_groups(job, model, statistics, gradients, folder)
        rounding = rounding_of(job, statistics, gradients)
        if task["weighed"] and gradients is not None:
            rounding.measure_by(weigh_tokens(job, model, gradients, folder))
        del model
        improve_factors(job, Plan.from_json(*task["plan"]), store, gradient_reader(job, gradients), folder, rounding, team)


def follow(launch: Launch) -> None:
    """Train when the first process of a launch recovers, until it ends."""
    while (task := launch.receive()) is not None:
        for number in ENDINGS:
            signal.signal(number, _end)
        recover_in(task, launch.team(task["sharded"]), lambda line: None)


def _end(number: int, frame: object) -> None:
    """End the process so that what was learnt is saved, which a second signal is not to interrupt."""
    for each in ENDINGS:
        signal.signal(each, signal.SIG_IGN)
    sys.exit(128 + number)


def main(task: Path, index: int) -> None:
    """Join the others, by a file beside the task, and train."""
    for number in ENDINGS:
        signal.signal(number, _end)
    found = json.loads(task.read_text(encoding="utf-8"))
    if torch.cuda.is_available():
        torch.cuda.set_device(index % torch.cuda.device_count())
    meeting = task.with_name("meeting").absolute().as_uri()
    torch.distributed.init_process_group(init_method=meeting, rank=index, world_size=found["processes"])
    try:
        recover_in(found, Team(index, found["processes"], found["sharded"]))
    except LrserveError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:  # one of the processes was told to end, and all have saved
        sys.exit(128 + signal.SIGINT)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
