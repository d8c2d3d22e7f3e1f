"""What the search asks of the engine: times of single layers, and whole plans beside the dense model."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any

from lrserve.allocation.goal import Evaluated, Goal, next_candidate
from lrserve.allocation.speed import Shape, SpeedModel, shapes_to_measure, token_counts
from lrserve.compression.rounding import Rounding
from lrserve.compression.spectra import SpectrumStore
from lrserve.engines.protocol import EngineProcess
from lrserve.engines.runtimes import Runtime
from lrserve.engines.workloads import MixComparison, compare, compare_apart, read_comparison
from lrserve.errors import EngineError
from lrserve.pipeline.baseline import keep_served
from lrserve.pipeline.job import Job
from lrserve.recipe import Workload
from lrserve.report.console import progress_bar, reused
from lrserve.report.machine import machine
from lrserve.storage.store import fingerprint, flush_folder, write_json
from lrserve.storage.work import WorkFolder

_TIMING_VARIABLES = ("OMP_NUM_THREADS", "GLIBC_TUNABLES", "LD_PRELOAD")
_DENSE_RUNS = 3  # of each workload, the first of which warms up


@dataclass(frozen=True)
class Measured:
    """A plan of the front, and its measured throughput beside dense.

    `predicted` are the speedups by the table of single layers, workload by workload, `predicted_speedup` that of the mix, and
    `corrected` that of the mix after what the engine had said of the plans before this one.
    """

    candidate: Evaluated
    predicted: Mapping[str, float]
    predicted_speedup: float
    corrected: float
    comparison: MixComparison


def timing_conditions() -> dict[str, Any]:
    """Identify what times depend on: the machine, the threads asked for, and the settings of malloc; JSON."""
    return machine() | {name: os.environ.get(name) for name in _TIMING_VARIABLES}


class DenseEngine:
    """The dense model's engine: starts when it is first wanted and stays until the front is measured; a context manager.

    `together`: whether it may be up beside a plan's engine.
    """

    def __init__(
        self, runtime: Runtime, model: Path, workloads: Mapping[str, Workload], log: Path, *, together: bool = True
    ) -> None:
        self.together = together
        self._runtime = runtime
        self._open = partial(runtime.open, model, workloads, sharing=2 if together else 1, log=log)
        self._engine: EngineProcess | None = None

    def __enter__(self) -> DenseEngine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._close()

    def running(self) -> EngineProcess:
        """Return the engine, started if need be."""
        if self._engine is None:
            engine = self._open()
            engine.start()
            self._engine = engine
        return self._engine

    def make_room(self) -> None:
        """End the engine where it holds a GPU that the trials are about to use, or where memory is short."""
        if self._runtime.on_gpu or not self.together:
            self._close()

    def compare(self, model: Path, workloads: Mapping[str, Workload], repeats: int, **options: Any) -> MixComparison:
        """Measure a plan's rendering beside the dense model, or after it where both do not fit; `options` are `compare`'s."""
        if not self.together:
            self._close()
            return compare_apart(self._open(), self._runtime.open(model, workloads), workloads, repeats, **options)
        with self._runtime.open(model, workloads, sharing=2) as engine:
            [comparison] = compare(self.running(), [engine], workloads, repeats, **options)
        return comparison

    def _close(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()


def dense_checkpoint(job: Job, runtime: Runtime, folder: WorkFolder) -> Path:
    """Return the folder from which the runtime loads the dense model; it is exported where the model's own does not do."""
    if runtime.loads_sources:
        return job.source.path
    stage = folder.stage("dense", {**job.model_inputs(), "engine": runtime.version})
    model, done = stage / "model", stage / "done.json"
    before = json.loads(done.read_text(encoding="utf-8")) if done.is_file() else None
    if before != _sizes(model):
        if before is not None:
            job.say(f"dense: {model} is incomplete; it is made anew")
        shutil.rmtree(model, ignore_errors=True)
        model.mkdir()
        runtime.exporter.export(job.source.load(None).cpu(), job.source.path, model, job.dtype)
        flush_folder(model)
        write_json(done, _sizes(model))
        job.say(f"dense model: exported for {runtime.version}")
    return model


def _sizes(folder: Path) -> dict[str, int]:
    """Return the bytes of a folder's files by their paths in it."""
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def measure_layers(job: Job, runtime: Runtime, dense: DenseEngine, folder: WorkFolder) -> tuple[dict[str, Any], str]:
    """Measure, in the dense model's engine, its runs and the latency of single layers at `measured_levels`.

    Returns:
        `dense_seconds` by workload, `tokens` (numbers of rows), and `rows`: shapes with `us`, microseconds for each number of rows,
        or null for a layer that the engine cannot run; JSON. And the name of the stage that holds it.

    Raises:
        EngineError: a run of the dense model took no finite time.
    """
    workloads = job.recipe.workloads
    shapes = shapes_to_measure(job.units, job.offers, job.output_layer)
    tokens = token_counts(workloads)
    identity = {
        **job.model_inputs(),
        "engine": runtime.version,
        "machine": timing_conditions(),
        "settings": job.recipe.engine.model_dump(mode="json", exclude={"repeats"}),
        "workloads": {name: workload.model_dump(mode="json", exclude={"share"}) for name, workload in workloads.items()},
        "steps": job.steps,
        "structure": job.recipe.structure,
        "shapes": fingerprint([asdict(shape) for shape in shapes]),
    }
    stage = folder.stage("latency", identity)
    path = stage / "latency.json"
    before = path.is_file()
    if not before:
        ran = count(1)
        with progress_bar(_DENSE_RUNS * len(workloads) + 2, "4/6 latency") as progress:
            engine = dense.running()
            progress(next(ran))
            seconds: dict[str, list[float]] = {name: [] for name in workloads}

            def run(number: int) -> None:
                for name, w in workloads.items():
                    found = engine.throughput(w.prompt_tokens, w.output_tokens, w.concurrency, seed=number)
                    seconds[name] += [found.seconds] if number else []
                    progress(next(ran))

            run(0)  # warms up
            run(1)
            table = engine.latency_table(shapes, tokens, dtype=runtime.dtype)
            progress(next(ran))
            for number in range(2, _DENSE_RUNS):  # on the other side of the table: the machine's speed drifts
                run(number)
            keep_served(job, runtime, engine, folder)
        rows = [{**asdict(shape), "us": us and [round(cell, 2) for cell in us]} for shape, us in zip(shapes, table, strict=True)]
        write_json(path, {"dense_seconds": {name: min(s) for name, s in seconds.items()}, "tokens": tokens, "rows": rows})
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    for name, found in data["dense_seconds"].items():
        if not 0 < found < math.inf:
            raise EngineError(f"{runtime.version} took {found} s for the workload {name}; remove {stage} and repeat the command")
    rates = ", ".join(
        f"{name} {w.concurrency * w.output_tokens / data['dense_seconds'][name]:.0f}" for name, w in workloads.items()
    )
    job.say(
        f"4/6 latency: {len(shapes)} layers at {', '.join(map(str, tokens))} tokens on {runtime.version}, "
        f"dense output tokens/s: {rates}{reused(int(before), 1)}"
    )
    return data, stage.name


def speed_model(job: Job, table: Mapping[str, Any]) -> SpeedModel:
    """Make the speed model from what `measure_layers` returned."""
    latencies = {
        Shape(**{name: value for name, value in row.items() if name != "us"}): (
            dict(zip(table["tokens"], row["us"], strict=True)) if row["us"] else None
        )
        for row in table["rows"]
    }
    recipe = job.recipe
    return SpeedModel(job.units, recipe.workloads, table["dense_seconds"], latencies, job.offers, job.output_layer)


def measure_front(
    job: Job,
    store: SpectrumStore,
    folder: WorkFolder,
    runtime: Runtime,
    dense: DenseEngine,
    goal: Goal,
    speed: SpeedModel,
    rounding: Rounding,
    first: Sequence[Evaluated],
    before: Sequence[Measured] = (),
    trials: Sequence[Evaluated] = (),
) -> list[Measured]:
    """Export the plans `first`, and the most promising ones of the front of `trials`, and measure each in turns with dense.

    What was measured corrects the predictions by which the next plan is picked. Returns it all, with what was measured `before`.
    """
    recipe = job.recipe
    workloads, settings = recipe.workloads, recipe.engine
    identity = {
        "spectra": store.folder.name,
        "engine": runtime.version,
        "machine": timing_conditions(),
        "settings": settings.model_dump(mode="json"),
        "workloads": {name: workload.model_dump(mode="json") for name, workload in workloads.items()},
        "seed": recipe.seed,
    }
    stage = folder.stage("measure", identity)
    checkpoint = folder.root / "candidate"
    measured, waiting = list(before), list(first)
    runs = count(1)
    plans = len(before) + len(first) + (recipe.search.measured_plans if trials else 0)
    with progress_bar((plans - len(before)) * len(workloads) * 2 * settings.repeats, "4/6 measure") as progress:
        while len(measured) < plans:
            now = speed.corrected([(m.candidate.plan, m.comparison.relative_times) for m in measured])
            known = [m.candidate for m in measured]
            candidate = waiting.pop(0) if waiting else next_candidate(trials, known, goal, now.speedup)
            if candidate is None:
                break
            path = stage / f"{fingerprint(candidate.plan.key())[:16]}.json"
            reuse = path.is_file()
            if not reuse:
                shutil.rmtree(checkpoint, ignore_errors=True)
                checkpoint.mkdir()
                compressed = job.compressed_model(candidate.plan, store, rounding).cpu()
                runtime.exporter.export(compressed, job.source.path, checkpoint, job.dtype)
                del compressed
                comparison = dense.compare(
                    checkpoint,
                    workloads,
                    settings.repeats,
                    version=runtime.version,
                    seed=recipe.seed,
                    progress=lambda: progress(next(runs)),
                )
                shutil.rmtree(checkpoint, ignore_errors=True)  # before the run counts as done: a resumed one does not look for it
                write_json(path, asdict(comparison))
            found = read_comparison(path)
            plan = candidate.plan
            measured.append(Measured(candidate, speed.speedups(plan), speed.speedup(plan), now.speedup(plan), found))
            parts = ", ".join(f"{name} {comparison.speedup:.2f}x" for name, comparison in found.workloads.items())
            job.say(
                f"4/6 measure: {candidate.origin}: validation perplexity {candidate.perplexity:.2f}, {found.speedup:.2f}x of dense "
                f"({found.spread[0]:.2f} to {found.spread[1]:.2f}), predicted {speed.speedup(plan):.2f}x, corrected "
                f"{now.speedup(plan):.2f}x; {parts}{reused(int(reuse), 1)}"
            )
    return measured
