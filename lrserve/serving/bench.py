"""lrserve bench: an artifact against its dense model, both behind vLLM's server, under the same load and in turns."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lrserve.allocation.speed import PREFILL_CHUNK
from lrserve.engines.workloads import GPU_MEMORY, Mix
from lrserve.errors import ArtifactError, InputError
from lrserve.inputs.source import open_source
from lrserve.plugins.versions import engine_version, on_cpu
from lrserve.recipe import EngineSettings, Recipe, Workload, shares
from lrserve.report.card import speedup_cell, table
from lrserve.report.console import Say, progress_bar
from lrserve.serving.online import Server, compare_online
from lrserve.storage.store import atomic_path, read_manifest, write_json

_SLACK_TOKENS = 8  # of a sequence, for what a tokenizer puts around a prompt


def bench(
    out: Path,
    *,
    dense: str | None = None,
    workload: Mapping[str, int | None] | None = None,
    overrides: Mapping[str, Any] | None = None,
    report: Path | None = None,
    vllm_arguments: Sequence[str] = (),
    say: Say = print,
) -> dict[str, Any]:
    """Measure an artifact and its dense model in turns behind vLLM's server, and print the table.

    Args:
        out: the artifact.
        dense: the dense model; the one that the artifact was made from when None.
        workload: settings of one workload to measure instead of the recipe's; what is `None` is that of the recipe's first.
        overrides: dotted settings of the recipe to change; `None` values are passed over.
        report: folder for bench.json, bench.md and bench.png; made if need be.
        vllm_arguments: further arguments for both servers.
        say: takes the table.

    Returns:
        The figures: under `workloads`, `OnlineComparison.to_json` by name; the engine and its settings.

    Raises:
        LrserveError: not an artifact, no dense model, or a failing server.
    """
    read_manifest(out)
    if not (out / "config.json").is_file():
        raise ArtifactError(f"{out} has no vLLM checkpoint; export it with --export vllm")
    if report is not None:
        try:
            report.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"no folder {report} can be made for --report: {error.strerror}") from error
    recipe = Recipe.load(out / "lrserve" / "recipe.yaml", dict(overrides or {}))
    source = open_source(dense or recipe.model)
    if given := {name: value for name, value in (workload or {}).items() if value is not None}:
        custom = {**next(iter(recipe.workloads.values())).model_dump(), **given}
        recipe = Recipe.load(out / "lrserve" / "recipe.yaml", {**(overrides or {}), "workloads": {"custom": custom}})
    workloads = recipe.workloads
    rounds, arguments = recipe.engine.repeats, [*server_arguments(workloads, recipe.engine), *vllm_arguments]
    with (
        progress_bar(2 * (rounds + 1) * len(workloads), "bench") as progress,
        Server(source.path, arguments) as dense_server,
        Server(out, arguments) as server,
    ):
        results = compare_online(dense_server, server, workloads, rounds, seed=recipe.seed, progress=progress)
    mix = Mix(results, shares(workloads))
    figures = {
        "engine": engine_version(),
        "settings": recipe.engine.model_dump(mode="json"),
        "vllm_arguments": list(vllm_arguments),
        "dense_model": source.name,
        "mix": mix.speedup_json(),
        "promised": None if given else _promised(out),
        "workloads": {name: result.to_json() for name, result in results.items()},
    }
    text = render(figures)
    say(text)
    if report is not None:
        write_json(report / "bench.json", figures)
        with atomic_path(report / "bench.md") as partial:
            partial.write_text(text + "\n", encoding="utf-8")
        plot(figures, report / "bench.png")
    return figures


def _promised(out: Path) -> float | None:
    """Return the mix's speedup that the search measured; None where another lrserve made the artifact."""
    metrics = json.loads((out / "lrserve" / "metrics.json").read_text(encoding="utf-8"))
    speedup: float | None = metrics["throughput"].get("speedup") if "workloads" in metrics["throughput"] else None
    return speedup


def server_arguments(workloads: Mapping[str, Workload], settings: EngineSettings) -> list[str]:
    """Return vLLM's arguments for servers large enough for every workload, which never reuse a prefix."""
    longest = max(workload.prompt_tokens + workload.output_tokens for workload in workloads.values())
    arguments = [
        "--no-enable-prefix-caching",
        "--generation-config=vllm",  # greedy, whatever penalties the model's own generation_config.json has
        f"--dtype={settings.dtype}",
        f"--max-model-len={longest + _SLACK_TOKENS}",
        f"--max-num-seqs={max(workload.concurrency for workload in workloads.values())}",
        f"--max-num-batched-tokens={PREFILL_CHUNK}",
    ]
    if settings.enforce_eager:
        arguments.append("--enforce-eager")
    if not on_cpu():
        arguments.append(f"--gpu-memory-utilization={GPU_MEMORY / 2}")
    return arguments


def render(figures: Mapping[str, Any]) -> str:
    """Return the figures of `bench` as a Markdown table and a line below it."""

    def latency(values: Mapping[str, float] | None) -> str:
        return "" if values is None else f"{values['median']:.1f}, {values['p99']:.1f}"

    rows = []
    for name, result in figures["workloads"].items():
        workload = result["workload"]
        title = f"{name}: {workload['concurrency']} x ({workload['prompt_tokens']} + {workload['output_tokens']})"
        for side in ("dense", "compressed"):
            found = result[side]
            rate = found["tokens_per_second"]
            rows.append(
                [
                    title if side == "dense" else "",
                    side,
                    f"{rate['median']:.1f} ({rate['lowest']:.1f} to {rate['highest']:.1f})",
                    latency(found["time_to_first_token_ms"]),
                    latency(found["time_per_output_token_ms"]),
                    speedup_cell(result) if side == "compressed" else "",
                    result["verdict"] if side == "compressed" else "",
                ]
            )
    header = ["workload", "", "output tokens/s", "first token, ms: median, p99", "per output token, ms: median, p99", "speedup", ""]
    rounds = max(result["rounds"] for result in figures["workloads"].values())
    settings, mix = figures["settings"], figures["mix"]
    promised = "" if figures["promised"] is None else f"; the search measured {figures['promised']:.2f}x, without a server"
    return (
        f"{table(header, rows)}\n\n"
        f"All of it: {speedup_cell(mix)}{promised}. "
        f"{figures['engine']}, {'eager' if settings['enforce_eager'] else 'compiled'}, {settings['dtype']}; "
        f"concurrency x (prompt + output tokens); {rounds} rounds in turns, each with prompts of its own, medians and spread; "
        "`undecided`: dense's speed lies within the spread"
    )


def plot(figures: Mapping[str, Any], path: Path) -> None:
    """Draw throughput with its spread, and median and p99 of both latencies, dense beside compressed, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    FigureCanvasAgg(figure)
    names = list(figures["workloads"])
    panels = {
        "output tokens/s: median and spread": ("tokens_per_second", "median", "lowest", "highest"),
        "time to first token, ms: median and p99": ("time_to_first_token_ms", "median", "median", "p99"),
        "time per output token, ms: median and p99": ("time_per_output_token_ms", "median", "median", "p99"),
    }
    for axes, (title, (key, middle, low, high)) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for offset, side in ((-0.2, "dense"), (0.2, "compressed")):
            found = [figures["workloads"][name][side][key] for name in names]
            shown = [(index + offset, values) for index, values in enumerate(found) if values is not None]
            heights = [values[middle] for _, values in shown]
            spread = [
                [values[middle] - values[low] for _, values in shown],
                [values[high] - values[middle] for _, values in shown],
            ]
            axes.bar([place for place, _ in shown], heights, 0.4, yerr=spread, capsize=3, label=side)
        axes.set_xticks(range(len(names)), names)
        axes.set_title(title, fontsize=10)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    with atomic_path(path) as partial:
        figure.savefig(partial, format="png", dpi=120)
