"""What calibration costs: the same forward passes with and without collecting covariances, in turns.

Per token and block, collecting multiplies n^2 for each distinct input (qkv, o, gate_up, down), which for a small model is as many
multiplications as the block's own linears: 3.3 M beside 3.5 M for SmolLM2-135M. The symmetric half and bfloat16 products keep the
clock below that. The ratio is of wall-clock medians; run it with nothing else on the machine:

    python bench/cost.py

The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from lrserve.compression.calibrate import calibrate
from lrserve.inputs.demo import demo_recipe
from lrserve.pipeline.job import open_job
from lrserve.recipe import Recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", type=Path, help="[default: the demo's]")
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    job = open_job(Recipe.load(arguments.recipe or demo_recipe(), {}), print)
    settings = job.recipe.calibration
    model = job.source.load(job.dtype)
    windows = job.windows["calibration"][: arguments.sequences]
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for turn in range(arguments.rounds + 1):
        for collect in (False, True):
            with tempfile.TemporaryDirectory() as folder:
                began = time.perf_counter()
                calibrate(
                    model,
                    job.groups,
                    windows,
                    Path(folder),
                    pool_sequences=settings.pool_sequences,
                    batch_tokens=settings.batch_tokens,
                    collect=collect,
                )
                if turn:  # the first round warms up
                    seconds[collect].append(time.perf_counter() - began)
    plain, collecting = (statistics.median(seconds[collect]) for collect in (False, True))
    ratios = [b / a for a, b in zip(seconds[False], seconds[True], strict=True)]
    print(
        f"{windows.numel()} tokens on {torch.get_num_threads()} threads: forward {plain:.1f} s, collecting {collecting:.1f} s: "
        f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    )
    print(json.dumps({"forward_seconds": seconds[False], "collecting_seconds": seconds[True], "ratios": ratios}))


if __name__ == "__main__":
    main()
