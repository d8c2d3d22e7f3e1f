"""ONNX graphs of one model side by side: onnxruntime-genai's builder, and ours, dense and at plans, beside torch; one run.

    python bench/onnx_graphs.py                         the model and texts of README's table
    python bench/onnx_graphs.py --spinning              idle threads of ONNX Runtime wait actively
    python bench/onnx_graphs.py --model FOLDER          a dense model's folder instead
    python bench/onnx_graphs.py --workload decode --embedding int4_g32
                                                        plans for the speed of decode alone, and as few bits at both ends

Every graph is run by the same code, one ONNX Runtime session each with as many threads as torch has; all are loaded at once and
measured in turns. The plans of each speed are those of least expected loss, in closed form: no trials, no training. Rows with
`inputs as they are` are graphs of rounded weights by which ONNX Runtime multiplies in float32 (accuracy_level 0); lrserve's graphs
let it round the inputs to 8 bits as well (accuracy_level 4).

    decode 1, 8      tokens a second of 64 steps after prompts of 128 tokens, by the number of sequences
    prefill          tokens a second of one prompt of 512 tokens
    perplexity       of the report text, by the graph's own log probabilities
    MB               of the graph's files

Run it with nothing else on the machine. Needs onnxruntime-genai for the builder's rows. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import onnx
import torch

from exporters.onnx import FOLDER, MODEL_FILE
from front import export, plans_for
from inputs import readme_recipe
from lrserve.allocation.plan import Plan
from lrserve.compression.level import DENSE, Precision
from lrserve.compression.matmul import float32_matmuls
from lrserve.engines.onnx_session import OnnxDecoder
from lrserve.engines.timing import random_prompts
from lrserve.pipeline.job import Job, first_tokens, open_job
from lrserve.pipeline.search import everywhere
from lrserve.pipeline.stages import MODULES
from lrserve.plugins.versions import onnx_version
from lrserve.recipe import Recipe
from lrserve.report.card import table
from lrserve.report.console import progress_bar
from lrserve.storage.work import work_folder
from publishing import add_results_option, conclude

BUILT: Final[Mapping[str, str]] = {"builder, fp32": "fp32", "builder, int4": "int4"}
"""Rows of onnxruntime-genai's builder, and its precision."""
ROUNDED: Final[Sequence[Precision]] = ("int8", "int4_g32")
SPEEDS: Final = (1.5, 2.0, 2.5, 3.0)
PROMPT, STEPS, LONG_PROMPT = 128, 64, 512
BATCHES: Final = (1, 8)


class Decoder(Protocol):
    """What runs a graph, or a model of torch."""

    def prefill(self, tokens: Any) -> Any:
        """Start over: tokens (B, T) -> logits (B, T, V)."""

    def step(self, tokens: Any) -> Any:
        """Append one token to every sequence: tokens (B,) -> logits (B, V)."""


class Torch:
    """A model of transformers in float32."""

    def __init__(self, model: Any) -> None:
        self._model, self._cache = model.float().eval(), None

    def prefill(self, tokens: Any) -> Any:
        """Start over: tokens (B, T) -> logits (B, T, V)."""
        self._cache = None
        return self._run(torch.from_numpy(tokens))

    def step(self, tokens: Any) -> Any:
        """Append one token to every sequence: tokens (B,) -> logits (B, V)."""
        return self._run(torch.from_numpy(tokens)[:, None])[:, 0]

    @torch.inference_mode()
    def _run(self, tokens: torch.Tensor) -> Any:
        found = self._model(input_ids=tokens, past_key_values=self._cache, use_cache=True)
        self._cache = found.past_key_values
        return found.logits.numpy()


def everywhere_label(weights: Precision) -> str:
    """Name the row of one precision for all weights."""
    return f"lrserve, {weights} everywhere"


def build(source: Path, precision: str, folder: Path) -> Path:
    """Let onnxruntime-genai's builder write a model's graph; returns its path."""
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", source, "-o", folder, "-p", precision, "-e", "cpu"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"onnxruntime-genai's builder failed: {done.stderr.strip()[-2000:]}")
    path = folder / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    head_size = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]["decoder"]["head_size"]
    for value in (*model.graph.input, *model.graph.output):  # which are named, not numbered
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param == "kv_cache_dim":
                dimension.dim_value = head_size
    path.write_bytes(model.SerializeToString())
    return path


def graph_bytes(path: Path) -> int:
    """Bytes of a graph and its weights."""
    return sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))


def perplexity(decoder: Decoder, windows: torch.Tensor) -> float:
    """Perplexity of windows (sequences, length)."""
    nats: list[float] = []
    for window in windows.numpy():
        logits = torch.from_numpy(np.asarray(decoder.prefill(window[None]))[0])
        logprobs = logits[:-1].log_softmax(-1).gather(1, torch.from_numpy(window[1:])[:, None])
        nats += (-logprobs[:, 0]).tolist()
    return math.exp(statistics.fmean(nats))


def rates(decoder: Decoder, vocabulary: int, seed: int) -> dict[str, float]:
    """Measure one round: tokens a second by workload."""
    found = {}
    for batch in BATCHES:
        prompts = np.array(random_prompts(vocabulary, PROMPT, batch, seed), np.int64)
        token = decoder.prefill(prompts)[:, -1].argmax(-1)
        began = time.perf_counter()
        for _ in range(STEPS):
            token = decoder.step(token).argmax(-1)
        found[f"decode {batch}"] = batch * STEPS / (time.perf_counter() - began)
    prompt = np.array(random_prompts(vocabulary, LONG_PROMPT, 1, seed), np.int64)
    began = time.perf_counter()
    decoder.prefill(prompt)
    found["prefill"] = LONG_PROMPT / (time.perf_counter() - began)
    return found


def write_graphs(job: Job, speeds: Sequence[float], work: Path, folder: Path) -> dict[str, Path]:
    """Write every graph; returns their paths by row."""
    graphs = {label: build(job.source.path, precision, folder / precision) for label, precision in BUILT.items()}
    with work_folder(work, print, MODULES) as stages:
        made, source = plans_for(job, speeds, stages)
        plans = {"lrserve, dense": Plan(dict.fromkeys((unit.name for unit in job.units), DENSE), job.recipe.structure)}
        plans |= {everywhere_label(weights): everywhere(job.units, weights, job.offers) for weights in ROUNDED}
        plans |= {label: plan for label, (plan, _) in made.items()}
        for index, (label, plan) in enumerate(plans.items()):
            graphs[label] = export(job, plan, source, folder / f"{index}") / FOLDER / MODEL_FILE
    return graphs


def measure(job: Job, graphs: Mapping[str, Path], rounds: int, windows: torch.Tensor, spinning: bool) -> list[dict[str, Any]]:
    """Measure every row, torch's first."""
    model = job.source.load(torch.float32)
    vocabulary = int(model.config.vocab_size)
    decoders: dict[str, Decoder] = {"torch, eager": Torch(model)}
    decoders |= {label: OnnxDecoder(path, spinning=spinning) for label, path in graphs.items()}
    sizes = {label: graph_bytes(path) for label, path in graphs.items()}
    for label in map(everywhere_label, ROUNDED):
        exact = f"{label}, inputs as they are"
        decoders[exact], sizes[exact] = OnnxDecoder(graphs[label], spinning=spinning, exact=True), sizes[label]
    rows, done = [], count(1)
    with progress_bar(len(decoders) * (2 + rounds), "graphs") as progress:
        for label, decoder in decoders.items():
            rows.append({"model": label, "bytes": sizes.get(label), "perplexity": perplexity(decoder, windows), "rounds": []})
            progress(next(done))
        for number in range(rounds + 1):
            for row, decoder in zip(rows, decoders.values(), strict=True):
                found = rates(decoder, vocabulary, number)
                row["rounds"] += [found] if number else []  # the first one warms up
                progress(next(done))
    return rows


def render(rows: Sequence[Mapping[str, Any]], base: str) -> str:
    """One line a row, each rate over the base's in the same round: median (spread)."""
    against = next(row for row in rows if row["model"] == base)
    lines = []
    for row in rows:
        cells = []
        for name in against["rounds"][0]:
            ratios = [own[name] / other[name] for own, other in zip(row["rounds"], against["rounds"], strict=True)]
            cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})")
        size = "" if row["bytes"] is None else f"{row['bytes'] / 1e6:.0f}"
        lines.append([row["model"], size, f"{row['perplexity']:.2f}", *cells])
    return table(["graph", "MB", "perplexity", *against["rounds"][0]], lines)


@float32_matmuls()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a dense model's folder [default: that of README's table]")
    parser.add_argument("--speed", action="append", type=float, help=f"repeatable [default: {', '.join(map(str, SPEEDS))}]")
    parser.add_argument("--workload", action="append", help="of the recipe's, for whose speed plans are made [default: all]")
    parser.add_argument("--embedding", help="what embedding and output layer are rounded to [default: the recipe's, int8]")
    parser.add_argument("--tokens", type=int, default=4096, help="of report text [default: 4096]")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds [default: 5]")
    parser.add_argument("--spinning", action="store_true", help="let idle threads wait actively")
    parser.add_argument(
        "--work", type=Path, default=Path("onnx-graphs.work"), help="folder for what is finished [default: onnx-graphs.work]"
    )
    add_results_option(parser)
    arguments = parser.parse_args()
    speeds = sorted(arguments.speed or SPEEDS)
    overrides = {
        "model": arguments.model,
        "engine.runtime": "onnx",
        "target.min_speedup": speeds[0],
        "export": ["onnx"],
        "factorization.embedding": arguments.embedding,
    }
    recipe = Recipe.load(readme_recipe(), overrides)
    if arguments.workload:
        recipe = recipe.model_copy(update={"workloads": {name: recipe.workloads[name] for name in arguments.workload}})
    job = open_job(recipe, print)
    windows = first_tokens(job.windows["report"], arguments.tokens)
    with tempfile.TemporaryDirectory(prefix="lrserve-") as place:
        graphs = write_graphs(job, speeds, arguments.work, Path(place))
        rows = measure(job, graphs, arguments.rounds, windows, arguments.spinning)
    base = "builder, fp32"
    markdown = (
        f"{job.source.title}, {onnx_version()}, spinning {'on' if arguments.spinning else 'off'}, torch's "
        f"{torch.get_num_threads()} threads\n\n{render(rows, base)}\n\nRates over those of '{base}' in the same round: median "
        f"(spread) of {arguments.rounds} rounds. Perplexity of {windows.numel()} tokens.\n"
    )
    conclude(arguments.results, markdown, rows)


if __name__ == "__main__":
    main()
