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
from lrserve.plugins.versions import engine_version, on_cpu, require_compress
from lrserve.recipe import EngineSettings, Recipe, Workload, shares
from lrserve.report.bench import bench_table, write_bench
from lrserve.report.console import Say, progress_bar
from lrserve.report.machine import made
from lrserve.serving.online import Server, compare_online
from lrserve.storage.store import read_manifest, write_json

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
        The figures: under `workloads`, `OnlineComparison.to_json` by name; when and where they were `made`, the names of the
        `models`, the engine and its settings.

    Raises:
        LrserveError: not an artifact, no dense model, or a failing server.
    """
    read_manifest(out)
    if not (out / "config.json").is_file():
        raise ArtifactError(f"{out} has no vLLM checkpoint; export it with --export vllm")
    if report is not None:
        require_compress("bench --report")
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
    made_from = json.loads((out / "lrserve" / "metrics.json").read_text(encoding="utf-8"))
    figures = {
        "made": made(),
        "models": {"dense": source.title, "compressed": f"{out.resolve().name} ({made_from['target']})"},
        "engine": engine_version(),
        "settings": recipe.engine.model_dump(mode="json"),
        "vllm_arguments": list(vllm_arguments),
        "mix": mix.speedup_json(),
        "promised": None if given else _promised(made_from),
        "workloads": {name: result.to_json() for name, result in results.items()},
    }
    say(bench_table(figures))
    if report is not None:
        write_json(report / "bench.json", figures)
        write_bench(figures, report)
    return figures


def _promised(metrics: Mapping[str, Any]) -> float | None:
    """Return the mix's speedup that the search measured; None where another lrserve made the artifact."""
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
