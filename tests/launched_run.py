"""A recovery as a launcher starts it: `torchrun tests/launched_run.py PLACE WORK RESULT` (tests/pipeline/test_launched.py)."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
from pipeline.test_improve import MIXED, Run
from pipeline.test_together import TOKENS

from lrserve.pipeline.launched import launched
from lrserve.pipeline.recovery_worker import follow
from lrserve.pipeline.stages import MODULES
from lrserve.storage.work import work_folder


def main(place: Path, work: Path, result: Path) -> None:
    """Recover in the first process, with the others; the result has what is kept of it."""
    with launched() as launch:
        assert launch is not None
        if launch.index:
            follow(launch)
            return
        assert "RANK" not in os.environ
        assert "MASTER_ADDR" not in os.environ
        with work_folder(work, print, MODULES) as folder:
            run = Run(place, folder, MIXED, recover_sharded=True, **TOKENS)
            run.job = replace(run.job, launch=launch)
            found = run.improved()
            again = run.improved()  # is finished, and asks nobody
            assert torch.equal(run.logits(found), run.logits(again))
        torch.save({"divergence": found.done["recover"]["divergence"], "logits": run.logits(found)}, result)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
