"""What artifacts do to the perplexity, beside their dense model in bfloat16, int8 and int4.

    python bench/quantized.py demo
    python bench/quantized.py demo other --tokens 16384        artifacts of one dense model

Each row is a vLLM engine that computes in bfloat16. The perplexity is by its own log probabilities, on the report text of the first
artifact's recipe. The bytes are those that one decode step reads. bench/readme.py has int8 by stock vLLM, and speeds.

    int8   8-bit weights, rounded to nearest with a scale for each row, and 8-bit activations
    int4   weights rounded to nearest in groups of 32 with a scale each, activations in bfloat16

The last line is JSON.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from exporters.vllm import VllmExporter
from lrserve.allocation.plan import RankPlan
from lrserve.compression.level import Precision
from lrserve.compression.lowrank import load_rounded
from lrserve.compression.quantize import round_to_nearest
from lrserve.compression.spectra import stacked_weight
from lrserve.engines.vllm import Engine
from lrserve.pipeline.job import Job, first_tokens, open_job
from lrserve.plugins.versions import engine_version
from lrserve.recipe import Recipe
from lrserve.report.card import table
from lrserve.report.console import progress_bar
from publishing import add_results_option, conclude
from readme import one_dense_model, perplexity
from speed import Contender

WEIGHTS: dict[str, Precision] = {"int8": "int8", "int4": "int4_g32"}


def rounded(model: Any, job: Job, precision: Precision) -> Any:
    """Round every linear of the decoder in place."""
    for group in job.groups:
        W, _ = stacked_weight(model, group)
        load_rounded(model, group, "weight", round_to_nearest(W, precision, job.dtype))
    return model


def measured(folder: Path, windows: torch.Tensor) -> float:
    """Perplexity of windows (sequences, length) in a vLLM engine of its own."""
    with Engine(folder, max_model_len=windows.shape[1] + 1, max_num_seqs=1, kv_cache_gib=0.5) as engine:
        return perplexity(engine, windows)


@contextmanager
def dense_checkpoint(job: Job, precision: str) -> Iterator[Path]:
    """Write the dense model in one of the precisions."""
    model = job.source.load(job.dtype)
    with tempfile.TemporaryDirectory(prefix="lrserve-") as folder:
        if precision in WEIGHTS:
            model = rounded(model, job, WEIGHTS[precision])
        VllmExporter().export(model, job.source.path, Path(folder), job.dtype)
        del model
        yield Path(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path, nargs="+", help="folders that compress-and-export made of one dense model")
    parser.add_argument("--tokens", type=int, default=16384, help="of report text [default: 16384]")
    add_results_option(parser)
    arguments = parser.parse_args()
    if not one_dense_model(arguments.artifact):
        parser.error("the artifacts come from different dense models")
    job = open_job(Recipe.load(arguments.artifact[0] / "lrserve" / "recipe.yaml", {}), print)
    windows = first_tokens(job.windows["report"], arguments.tokens)
    nothing = RankPlan(dict.fromkeys((group.name for group in job.groups), None), "low_rank")
    rows: list[tuple[str, RankPlan, str, Path | None]] = [("dense", nothing, p, None) for p in ("bfloat16", "int8", "int4")]
    for artifact in arguments.artifact:
        plan = RankPlan.read(artifact / "lrserve" / "plan.json")
        rows.append((artifact.name, plan, "bfloat16", artifact))
    results = []
    with progress_bar(len(rows), "engines") as progress:
        for index, (name, plan, precision, folder) in enumerate(rows):
            megabytes = Contender(job.source.config(), job.groups, plan, precision).read_bytes / 1e6
            if folder is None:
                with dense_checkpoint(job, precision) as written:
                    found = measured(written, windows)
            else:
                found = measured(folder, windows)
            results.append({"name": name, "precision": precision, "megabytes": megabytes, "perplexity": found})
            progress(index + 1)
    cells = [[f"{row['name']} {row['precision']}", f"{row['megabytes']:.0f}", f"{row['perplexity']:.2f}"] for row in results]
    header = ["", "MB read", "perplexity"]
    markdown = f"{engine_version()}, {windows.numel()} tokens of report text\n\n{table(header, cells)}\n"
    conclude(arguments.results, markdown, results)


if __name__ == "__main__":
    main()
