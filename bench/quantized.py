"""What int8 does to the perplexity of artifacts, beside their dense model in bfloat16, int8 and int4.

    python bench/quantized.py demo
    python bench/quantized.py demo other --tokens 16384        artifacts of one dense model

Each row is a vLLM engine that computes in bfloat16. The perplexity is by its own log probabilities, on the report text of the first
artifact's recipe. The bytes are those that one decode step reads. bench/readme.py has int8 by stock vLLM, and speeds.

    int8   8-bit weights and activations by lrserve's layers, as with
           `vllm serve --quantization-config '{"linear": "int8_per_channel_static"}'`
    int4   the linears' weights rounded to nearest in groups of 32 with one scale each, multiplied in bfloat16: values that GPTQ's
           format can hold, without GPTQ's choice among them

The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from exporters.vllm import VllmExporter
from lrserve.allocation.plan import RankPlan
from lrserve.compression.spec import quantization_config
from lrserve.engines.vllm import Engine
from lrserve.pipeline.job import Job, first_tokens, open_job
from lrserve.plugins.versions import engine_version
from lrserve.recipe import Recipe
from lrserve.report.card import table
from lrserve.report.console import progress_bar
from publishing import add_results_option, conclude
from readme import one_dense_model, perplexity
from speed import Contender

GROUP = 32  # weights that share one scale in int4


@torch.no_grad()
def round_to_int4(model: Any, job: Job) -> Any:
    """Round every linear's weight (m, n) in place to 16 steps a group of `GROUP` inputs."""
    for group in job.groups:
        for member in group.members:
            weight = model.get_submodule(member).weight
            parts = weight.float().unflatten(1, (-1, GROUP))
            scale = (parts.abs().amax(-1, keepdim=True) / 7.5).half().float().clamp_min(1e-7)
            weight.copy_(((parts / scale).round().clamp(-8, 7) * scale).flatten(1))
    return model


def measured(folder: Path, windows: torch.Tensor, precision: str) -> float:
    """Perplexity of windows (sequences, length) in a vLLM engine of its own."""
    quantization = "int8" if precision == "int8" else None
    with Engine(folder, max_model_len=windows.shape[1] + 1, max_num_seqs=1, kv_cache_gib=0.5, quantization=quantization) as engine:
        return perplexity(engine, windows)


@contextmanager
def dense_checkpoint(job: Job, precision: str) -> Iterator[Path]:
    """Write the dense model in one of the precisions."""
    model = job.source.load(job.dtype)
    with tempfile.TemporaryDirectory(prefix="lrserve-") as folder:
        VllmExporter().export(round_to_int4(model, job) if precision == "int4" else model, job.source.path, Path(folder), job.dtype)
        if precision == "int8":  # lrserve's layers, none of them compressed
            path = Path(folder) / "config.json"
            config = json.loads(path.read_text(encoding="utf-8"))
            path.write_text(json.dumps(config | {"quantization_config": quantization_config({})}), encoding="utf-8")
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
        rows += [(artifact.name, plan, precision, artifact) for precision in ("bfloat16", "int8")]
    results = []
    with progress_bar(len(rows), "engines") as progress:
        for index, (name, plan, precision, folder) in enumerate(rows):
            megabytes = Contender(job.source.config(), job.groups, plan, precision).read_bytes / 1e6
            if folder is None:
                with dense_checkpoint(job, precision) as written:
                    found = measured(written, windows, precision)
            else:
                found = measured(folder, windows, precision)
            results.append({"name": name, "precision": precision, "megabytes": megabytes, "perplexity": found})
            progress(index + 1)
    cells = [[f"{row['name']} {row['precision']}", f"{row['megabytes']:.0f}", f"{row['perplexity']:.2f}"] for row in results]
    header = ["", "MB read", "perplexity"]
    markdown = f"{engine_version()}, {windows.numel()} tokens of report text\n\n{table(header, cells)}\n"
    conclude(arguments.results, markdown, results)


if __name__ == "__main__":
    main()
