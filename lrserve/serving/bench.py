"""lrserve bench: an artifact against its dense model, both behind a server of one kind, under the same load and in turns."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from exporters.onnx import FOLDER, OnnxExporter
from lrserve.allocation.speed import PREFILL_CHUNK
from lrserve.compression.groups import family_of
from lrserve.engines.gpu import both_fit, device_memory, require_devices
from lrserve.engines.onnx_provider import settled
from lrserve.engines.workloads import Mix
from lrserve.errors import ArtifactError, InputError
from lrserve.inputs.source import open_source
from lrserve.plugins.versions import engine_version, genai_version, on_cpu, require_compress
from lrserve.recipe import EngineSettings, Recipe, Workload, shares
from lrserve.report.bench import bench_table, write_bench
from lrserve.report.console import Say, progress_bar
from lrserve.report.machine import made
from lrserve.serving.flags import read_flags, settings_of_file, without
from lrserve.serving.generation import EngineName
from lrserve.serving.kv_cache import LEAST, cache_argument, is_said, model_cache
from lrserve.serving.online import GraphServer, Server, compare_online
from lrserve.serving.reports import make_report_folder
from lrserve.serving.server import device_arguments
from lrserve.storage.store import check_files, read_manifest, write_json
from lrserve.storage.temporary import remove_leftovers, temporary_folder, temporary_leftovers

_SLACK_TOKENS = 8  # of a sequence, for what a tokenizer puts around a prompt
_OURS = ("api-key", "host", "port", "served-model-name")  # flags of vLLM that are about clients: bench has its own
_ELSEWHERE = ("grpc", "headless", "ssl-certfile", "ssl-keyfile", "uds")  # flags with which its client reaches no server


def bench(
    out: Path,
    *,
    engine: EngineName = "vllm",
    dense: str | None = None,
    workload: Mapping[str, int | None] | None = None,
    overrides: Mapping[str, Any] | None = None,
    report: Path | None = None,
    vllm_arguments: Sequence[str] = (),
    say: Say = print,
) -> dict[str, Any]:
    """Measure an artifact and its dense model in turns behind a server, and print the table.

    Args:
        out: the artifact.
        engine: of both servers. Of ONNX Runtime, the dense model's graph is written to a temporary folder, unless `dense` has one.
        dense: the dense model; the one that the artifact was made from when None.
        workload: settings of one workload to measure instead of the recipe's; what is `None` is that of the recipe's first.
        overrides: dotted settings of the recipe to change; `None` values are passed over.
        report: folder for bench.json, bench.md and bench.png; made if need be.
        vllm_arguments: further arguments for both servers, where they are vLLM's; names, keys and addresses are left out.
        say: takes the table.

    Returns:
        The figures: under `workloads`, `OnlineComparison.to_json` by name; when and where they were `made`, the names of the
        `models`, the engine and its settings.

    Raises:
        LrserveError: not an artifact, no dense model, or a failing server.
    """
    read_manifest(out)
    on_graphs = engine == "onnxruntime"
    check_files(out, FOLDER if on_graphs else "")
    if not on_graphs and not (out / "config.json").is_file():
        raise ArtifactError(f"{out} has no vLLM checkpoint; export it with --export vllm")
    if on_graphs and vllm_arguments:
        raise InputError("bench: what follows -- goes to vLLM; leave it out, or --engine onnxruntime")
    vllm_arguments = engine_arguments(vllm_arguments)
    if on_graphs and "engine.enforce_eager" in (overrides or {}):
        raise InputError("bench: --compiled and --eager are for vLLM; leave them out, or --engine onnxruntime")
    if report is not None:
        require_compress("bench --report")
        make_report_folder(report, out)
    remove_leftovers([temporary_leftovers()], say)
    recipe = Recipe.load(out / "lrserve" / "recipe.yaml", dict(overrides or {}))
    if given := {name: value for name, value in (workload or {}).items() if value is not None}:
        custom = {**next(iter(recipe.workloads.values())).model_dump(), **given}
        recipe = Recipe.load(out / "lrserve" / "recipe.yaml", {**(overrides or {}), "workloads": {"custom": custom}})
    workloads, rounds, settings = recipe.workloads, recipe.engine.repeats, recipe.engine
    together = True
    with ExitStack() as stack:
        progress = stack.enter_context(progress_bar(2 * (rounds + 1) * len(workloads), "bench"))
        servers: tuple[Server, Server]
        if on_graphs:
            settings = settled(settings.model_copy(update={"runtime": "onnx"}))
            settings = settings.model_copy(update={"dtype": settings.onnx_dtype})
            title, dense_folder = dense_graph(dense or recipe.model, settings, stack)
            servers = GraphServer(dense_folder, graph_arguments(workloads)), GraphServer(out, graph_arguments(workloads))
        else:
            settings = settings.model_copy(update={"runtime": "vllm"})
            require_devices(settings.tensor_parallel_size)
            source = open_source(dense or recipe.model, accept=family_of)
            together = servers_fit(source.path, settings, vllm_arguments)
            ours = server_arguments(workloads, settings, sharing=2 if together else 1)
            title, arguments = source.title, [*_unsaid(ours, vllm_arguments), *vllm_arguments]
            arguments = [*cache_arguments(source.path, workloads, arguments), *arguments]
            servers = Server(source.path, arguments), Server(out, arguments)
        results = compare_online(*servers, workloads, rounds, together=together, seed=recipe.seed, progress=progress)
    mix = Mix(results, shares(workloads))
    made_from = json.loads((out / "lrserve" / "metrics.json").read_text(encoding="utf-8"))
    figures = {
        "made": made(),
        "models": {"dense": title, "compressed": f"{out.resolve().name} ({made_from['target']})"},
        "engine": genai_version() if on_graphs else engine_version(),
        "settings": settings.model_dump(mode="json"),
        "vllm_arguments": list(vllm_arguments),
        "mix": mix.speedup_json(),
        "promised": None if given or settings.runtime != recipe.engine.runtime else _promised(made_from),
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


def dense_graph(model: str, settings: EngineSettings, stack: ExitStack) -> tuple[str, Path]:
    """Return the name of a dense model, and a folder with its ONNX graph.

    The folder is the model's own if it has a graph, else a temporary one, which goes with the stack; `settings` say which graph.
    """
    own = Path(model).expanduser()
    if (own / FOLDER / "genai_config.json").is_file():
        return own.resolve().name, own
    source = open_source(model, accept=family_of)
    folder = Path(stack.enter_context(temporary_folder()))
    exporter, loaded = OnnxExporter().configured(settings), source.load(None)
    exporter.preflight(loaded)
    exporter.export(loaded, source.path, folder, torch.float32)
    return source.title, folder


def graph_arguments(workloads: Mapping[str, Workload]) -> list[str]:
    """Return the arguments of onnx_server.py for every workload."""
    waiting = max(workload.concurrency for workload in workloads.values())
    return [f"--max-model-len={_longest(workloads)}", f"--max-queue={waiting}"]


def _longest(workloads: Mapping[str, Workload]) -> int:
    return max(workload.prompt_tokens + workload.output_tokens for workload in workloads.values()) + _SLACK_TOKENS


def engine_arguments(vllm_arguments: Sequence[str]) -> list[str]:
    """Return vLLM's arguments without those about clients; one of these may be a key, and figures are for everybody."""
    given = read_flags(vllm_arguments).given
    if wrong := [name for name in _ELSEWHERE if name in given]:
        raise InputError(f"bench: leave out vLLM's --{wrong[0]}; both servers listen on a port of this machine, for bench's client")
    return without(vllm_arguments, *_OURS)


def _unsaid(ours: Sequence[str], vllm_arguments: Sequence[str]) -> list[str]:
    """Return our arguments without those that a file of the user's has; vLLM would take ours instead."""
    said = settings_of_file(vllm_arguments)
    return [own for own in ours if own.partition("=")[0].removeprefix("--").removeprefix("no-") not in said]


def cache_arguments(folder: Path, workloads: Mapping[str, Workload], arguments: Sequence[str]) -> list[str]:
    """Return vLLM's argument for the size of the cache on the CPU, for every request of a workload at once.

    There is none where the user has decided, by an argument or by the environment.
    """
    flags = read_flags(arguments)
    if not on_cpu() or is_said(flags, os.environ):
        return []
    cache, most = model_cache(folder, flags), max(workload.concurrency for workload in workloads.values())
    return [cache_argument(max(LEAST, most * cache.needed if cache else 0))]


def servers_fit(dense: Path, settings: EngineSettings, vllm_arguments: Sequence[str]) -> bool:
    """Say whether both servers can be up at once: on a CPU, by a share of the GPU that the user gives, or by the dense weights."""
    memory = device_memory()
    if memory is None or on_cpu() or "gpu-memory-utilization" in read_flags(vllm_arguments).given:
        return True
    weights = sum(path.stat().st_size for path in dense.glob("*.safetensors"))
    return both_fit(weights, memory, settings.gpu_memory_share, settings.tensor_parallel_size)


def server_arguments(workloads: Mapping[str, Workload], settings: EngineSettings, sharing: int = 2) -> list[str]:
    """Return vLLM's arguments for servers large enough for every workload, which never reuse a prefix.

    `sharing` is how many of them share the GPUs' memory.
    """
    arguments = [
        "--no-enable-prefix-caching",
        "--language-model-only",  # of a multimodal model: every request here is text
        "--generation-config=vllm",  # greedy, whatever penalties the model's own generation_config.json has
        f"--dtype={settings.dtype}",
        f"--max-model-len={_longest(workloads)}",
        f"--max-num-seqs={max(workload.concurrency for workload in workloads.values())}",
        f"--max-num-batched-tokens={PREFILL_CHUNK}",
    ]
    if settings.enforce_eager:
        arguments.append("--enforce-eager")
    return [*arguments, *device_arguments(settings, sharing)]
