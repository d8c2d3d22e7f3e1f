"""What calibration costs: the same forward passes with and without collecting covariances, in turns.

    python bench/calibration_cost.py --sequences 64

Collecting multiplies n^2 times per token for each distinct input of a block (qkv, o, gate_up, down). For a small model that is as
much as the block's own linears: 3.3 M beside 3.5 M for SmolLM2-135M. The clock shows less, because a covariance is symmetric and is
multiplied in bfloat16 (lrserve/compression/matmul.py). The ratio is the median of the rounds, of wall-clock time.

Run it with nothing else on the machine. The last line is JSON.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from inputs import bench_recipe
from lrserve.compression.calibrate import calibrate
from lrserve.pipeline.job import open_job
from lrserve.recipe import Recipe
from lrserve.report.card import table
from publishing import add_results_option, conclude


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, help="[default: the demo's]")
    parser.add_argument("--sequences", type=int, default=32, help="of the recipe's calibration text [default: 32]")
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds [default: 3]")
    add_results_option(parser)
    arguments = parser.parse_args()
    job = open_job(Recipe.load(arguments.recipe or bench_recipe(), {}), print)
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
    cells = [f"{plain:.1f}", f"{collecting:.1f}", f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"]
    markdown = (
        f"{windows.numel()} tokens on {torch.get_num_threads()} threads, {arguments.rounds} rounds in turns\n\n"
        f"{table(['forward, s', 'forward and covariances, s', 'ratio'], [cells])}\n"
    )
    figures = {"tokens": windows.numel(), "forward_seconds": seconds[False], "collecting_seconds": seconds[True], "ratios": ratios}
    conclude(arguments.results, markdown, figures)


if __name__ == "__main__":
    main()
