"""README's table: a dense model, the same in int8 and int4 by stock vLLM, and artifacts of it, in one run.

    lrserve compress-and-export --recipe $(python bench/inputs.py) --min-speedup 1.1 -o first --work readme.work
    lrserve compress-and-export --recipe $(python bench/inputs.py) --min-speedup 1.25 -o second --work readme.work
    python bench/readme.py first second

Every row is a vLLM engine. All are up at once, or a few beside the dense one (--at-once), and compute in the recipe's dtype, as
stock `vllm serve` starts them. Model, texts, workloads and rounds are those of the first artifact's recipe.

    perplexity   of the report text, by the engine's own log probabilities; the same windows for every row
    MB           of weights, as stored in the dtype that is served
    speedups     output tokens a second over the dense engine, measured in turns on the same prompts: median of the rounds (spread);
                 for each workload and for the mix of all

bench/stock.py writes the checkpoints of stock vLLM, which are rounded to nearest.

Run it with nothing else on the machine. The last line is JSON.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from lrserve.compression.level import Precision
from lrserve.engines.protocol import EngineProcess
from lrserve.engines.workloads import compare, open_engine
from lrserve.pipeline.job import Job, first_tokens, open_job
from lrserve.plugins.versions import engine_version
from lrserve.recipe import Recipe, Workload
from lrserve.report.card import table
from lrserve.report.console import progress_bar
from lrserve.storage.store import read_manifest
from publishing import add_results_option, conclude
from stock import write_stock

STOCK: Mapping[str, Precision] = {"int8, stock vLLM": "int8", "int4, stock vLLM": "int4_g32"}
"""What users would serve instead, by its row."""


def weight_bytes(folder: Path, dtype: torch.dtype) -> int:
    """Bytes of a checkpoint's tensors, of which those in a wider dtype are served in `dtype`."""
    total = 0
    for shard in folder.glob("*.safetensors"):
        with safe_open(shard, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                tensor = tensors.get_tensor(name)
                total += tensor.numel() * min(tensor.itemsize, dtype.itemsize)
    return total


def perplexity(engine: EngineProcess, windows: torch.Tensor, done: Callable[[], None] = lambda: None) -> float:
    """Perplexity of windows (sequences, length) by the engine's log probabilities, one window at a time to save memory."""
    logprobs: list[float] = []
    for window in windows.tolist():
        [transcript] = engine.transcribe([window], 1)
        logprobs += transcript.logprobs
        done()
    return math.exp(-statistics.fmean(logprobs))


def room_for(job: Job, windows: torch.Tensor) -> dict[str, Workload]:
    """Return the workloads that an engine must have room for: the recipe's, and one window and a token."""
    return {**job.recipe.workloads, "perplexity": Workload(prompt_tokens=windows.shape[1], output_tokens=1, concurrency=1)}


def one_dense_model(artifacts: Sequence[Path]) -> bool:
    """Say whether the artifacts were made of the same dense model."""
    return len({read_manifest(artifact)["inputs"]["content"]["model"] for artifact in artifacts}) == 1


def label_of(artifact: Path) -> str:
    """Name an artifact by its target."""
    target = Recipe.load(artifact / "lrserve" / "recipe.yaml", {}).target
    return f"lrserve at {target.min_speedup:g}x" if target.min_speedup else f"lrserve, {target}"


def measure(
    job: Job, artifacts: Mapping[str, Path], windows: torch.Tensor, rounds: int, at_once: int | None = None
) -> list[dict[str, Any]]:
    """Measure every row; besides the dense engine at most `at_once` are up, and measured in turns with it."""
    recipe, version = job.recipe, engine_version()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lrserve-")))
        linears = {member for group in job.groups for member in group.members}
        checkpoints = {f"dense, {recipe.engine.dtype}": job.source.path}
        for label, precision in STOCK.items():
            checkpoints[label] = write_stock(job.source, linears, precision, folder / precision, job.dtype)
        checkpoints |= artifacts
        first, *labels = checkpoints
        most = at_once or len(labels)
        measured = len(labels) + math.ceil(len(labels) / most)  # the dense engine in each turn
        steps = len(checkpoints) * (1 + len(windows)) + measured * rounds * len(recipe.workloads)
        progress, done = stack.enter_context(progress_bar(steps, "engines")), count(1)

        def step() -> None:
            progress(next(done))

        def open_row(label: str) -> EngineProcess:
            engine = open_engine(checkpoints[label], room_for(job, windows), recipe.engine, sharing=1 + most)
            step()
            return engine

        def row(label: str, engine: EngineProcess) -> dict[str, Any]:
            found = perplexity(engine, windows, step)
            return {"model": label, "perplexity": found, "bytes": weight_bytes(checkpoints[label], job.dtype)}

        dense = stack.enter_context(open_row(first))
        rows = [row(first, dense)]
        for start in range(0, len(labels), most):
            with ExitStack() as turn:
                engines = {label: turn.enter_context(open_row(label)) for label in labels[start : start + most]}
                made = [row(label, engine) for label, engine in engines.items()]
                others = list(engines.values())
                comparisons = compare(dense, others, recipe.workloads, rounds, version=version, seed=recipe.seed, progress=step)
                rows += [one | {"speed": comparison.to_json()} for one, comparison in zip(made, comparisons, strict=True)]
    return rows


def render(rows: Sequence[Mapping[str, Any]], workloads: Mapping[str, Workload]) -> str:
    """Format the rows; README has room for 120 characters."""

    def cell(speed: Mapping[str, float]) -> str:
        return f"{speed['speedup']:.2f} ({speed['speedup_lowest']:.2f}-{speed['speedup_highest']:.2f})"

    lines = []
    for row in rows:
        speeds = [*(row["speed"]["workloads"][name] for name in workloads), row["speed"]] if "speed" in row else []
        cells = [cell(speed) for speed in speeds] or ["1"] * (1 + len(workloads))
        lines.append([row["model"], f"{row['perplexity']:.2f}", f"{row['bytes'] / 1e6:.0f}", *cells])
    return table(["model", "perplexity", "MB", *workloads, "all"], lines)


def add_at_once_option(parser: argparse.ArgumentParser) -> None:
    """Add the option --at-once."""
    parser.add_argument(
        "--at-once", type=int, metavar="NUMBER", help="engines beside the dense one, where memory is short [default: all]"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path, nargs="+", help="folders that compress-and-export made of one dense model")
    parser.add_argument("--tokens", type=int, help="of report text [default: the recipe's]")
    parser.add_argument("--rounds", type=int, help="counted rounds [default: the recipe's]")
    parser.add_argument("--eager", action="store_true", help="without torch.compile; `vllm serve` compiles")
    add_at_once_option(parser)
    add_results_option(parser)
    arguments = parser.parse_args()
    if not one_dense_model(arguments.artifact):
        parser.error("the artifacts come from different dense models")
    overrides = {
        "report.tokens": arguments.tokens,
        "engine.repeats": arguments.rounds,
        "engine.enforce_eager": arguments.eager,
        "engine.runtime": "vllm",
    }
    job = open_job(Recipe.load(arguments.artifact[0] / "lrserve" / "recipe.yaml", overrides), print)
    windows = first_tokens(job.windows["report"], job.recipe.report.tokens)
    artifacts = {label_of(artifact): artifact for artifact in arguments.artifact}
    if len(artifacts) < len(arguments.artifact):
        artifacts = {artifact.name: artifact for artifact in arguments.artifact}
    rounds, workloads = job.recipe.engine.repeats, job.recipe.workloads
    rows = measure(job, artifacts, windows, rounds, arguments.at_once)
    requests = "; ".join(
        f"{name}: {w.concurrency} at once, {w.prompt_tokens} tokens in and {w.output_tokens} out" for name, w in workloads.items()
    )
    mode = "eager" if arguments.eager else "compiled"
    markdown = (
        f"{job.source.title}, stock {engine_version()}, {mode}\n\n{render(rows, workloads)}\n\n"
        f"Perplexity of {windows.numel()} tokens of report text by each engine. Speedups over dense: median (spread) of {rounds} "
        f"rounds in turns. Requests: {requests}; all: the mix by the workloads' shares of time.\n"
    )
    conclude(arguments.results, markdown, rows)


if __name__ == "__main__":
    main()
