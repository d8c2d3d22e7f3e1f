"""Stage 4, the rank search: probe the groups, time single layers on the engine, run the study, measure its front end to end."""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from exporters.vllm import VllmExporter
from lrserve.allocation import allocate
from lrserve.allocation import search as study
from lrserve.allocation.evolution import evolve
from lrserve.allocation.plan import BudgetFit, RankPlan
from lrserve.allocation.quality import Divergence, perplexity
from lrserve.allocation.speed import Shape, SpeedModel, shapes_to_measure, token_counts
from lrserve.artifacts.store import fingerprint, write_json
from lrserve.artifacts.work import WorkFolder
from lrserve.compression.groups import Structure
from lrserve.compression.spectra import MergedRanks, SpectrumStore
from lrserve.job import Job, first_tokens, progress_bar, reused, tensor_sha256
from lrserve.serving.engine import engine_version
from lrserve.serving.loadtest import Comparison, compare, open_engine, read_comparison

_STUDY_VERSION = 2  # raised when the same suggestions make other plans
_OFFSPRING = 4  # plans in one generation of the evolutionary allocator
_PROBE_SHARE = 0.5  # share of its dense parameters that a group keeps while it is probed


@dataclass(frozen=True)
class Measured:
    """A plan of the front: its perplexity and predicted speed from the search, and its measured throughput beside dense."""

    candidate: study.Evaluated
    predicted_speedup: float
    comparison: Comparison


@dataclass(frozen=True)
class Tuned:
    """The outcome: the chosen plan, everything that was measured on the engine, and where the study is."""

    chosen: Measured
    measured: list[Measured]
    trials: list[study.Evaluated]
    dense_perplexity: float
    study_path: Path


def tune(job: Job, model: Any, store: SpectrumStore, folder: WorkFolder) -> Tuned:
    """Choose a rank plan for the recipe's target.

    Args:
        job: the opened inputs.
        model: the dense model in the job's dtype; its weights are rewritten by the trials.
        store: its spectra.
        folder: the work folder; what an earlier run finished is reused.

    Raises:
        InfeasibleTargetError: no plan meets the target.
        EngineError: vLLM failed.
    """
    merged = MergedRanks(model, job.units, store)
    device = next(model.parameters()).device
    losses, probe = _losses(job, merged, store, folder)
    merged.to("cpu")  # an engine takes the GPU
    speed, latency = _latencies(job, folder)
    merged.to(device)
    dense_perplexity = _validate(job, merged, None)
    structure = job.recipe.structure
    space = study.SearchSpace(job.units, job.recipe.target, job.recipe.search, losses, speed, dense_perplexity, structure)
    trials, path = _search(job, merged, space, folder, {"probe": probe, "latency": latency})
    merged.to("cpu")
    measured = _measure(job, store, folder, trials, space)
    by_ratio = job.recipe.target.ratio is not None
    speedups = [m.comparison.undisturbed_speedup if by_ratio else m.comparison.speedup for m in measured]
    best = study.choose(list(zip([m.candidate for m in measured], speedups, strict=True)), job.recipe.target, space)
    chosen = next(m for m in measured if m.candidate is best)
    job.say(f"4/6 chosen: {best.origin}, ratio {best.plan.ratio(job.units):.3f}, {chosen.comparison.speedup:.2f}x of dense")
    return Tuned(chosen, measured, trials, dense_perplexity, path)


def _losses(job: Job, merged: MergedRanks, store: SpectrumStore, folder: WorkFolder) -> tuple[dict[str, allocate.Losses], str]:
    """Return `allocate.estimates`, and the name of the stage that holds the probes."""
    probes, stage = probe_groups(job, merged, store, folder, job.recipe.structure)
    weighted = {group.name for group in job.units if group.kind in job.recipe.factorization.fisher}
    return allocate.estimates(store.errors(), probes, weighted), stage


def _probe_windows(job: Job) -> torch.Tensor:
    return first_tokens(job.windows["validation"], job.recipe.search.probe_tokens)


def probe_groups(
    job: Job, merged: MergedRanks, store: SpectrumStore, folder: WorkFolder, structure: Structure
) -> tuple[dict[str, tuple[int | None, float]], str]:
    """Measure what each group alone does to the output when it keeps half of its parameters.

    Returns:
        By group name its rank then and the KL divergence in nats; and the name of the stage that holds them.
    """
    settings = job.recipe.search
    windows = _probe_windows(job)
    identity = {
        "spectra": store.folder.name,
        "windows": tensor_sha256(windows),
        "rank_step": settings.rank_step,
        "structure": structure,
        "share": _PROBE_SHARE,
    }
    stage = folder.stage("probe", identity)
    path = stage / "probes.json"
    found: dict[str, tuple[int | None, float]] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    before = len(found)
    if before < len(job.units):
        merged.apply({})
        divergence = Divergence(merged.model, windows)
        with progress_bar(len(job.units), "4/6 probe") as progress:
            for index, group in enumerate(job.units):
                if group.name not in found:
                    fit = BudgetFit([group], settings.rank_step, structure)
                    budget = max(_PROBE_SHARE * fit.dense_cost, fit.smallest_cost)
                    rank = fit.fit({group.name: 1.0}, budget).ranks[group.name]
                    merged.apply({group.name: rank})
                    found[group.name] = rank, divergence(merged.model, group.layer)
                    write_json(path, found)
                progress(index + 1)
    job.say(f"4/6 probe: divergence of {len(job.units)} groups one by one{reused(before, len(job.units))}")
    return found, stage.name


def _latencies(job: Job, folder: WorkFolder) -> tuple[SpeedModel, str]:
    """Measure the dense model's run and the latency of single layers, dense and at a dozen ranks, in one engine."""
    workload, settings = job.recipe.workload, job.recipe.engine
    structure = job.recipe.structure
    shapes = shapes_to_measure(job.units, job.recipe.search.rank_step, structure)
    tokens = token_counts(workload)
    stage = folder.stage(
        "latency",
        {
            **job.model_inputs(),
            "engine": engine_version(),
            "machine": [platform.machine(), platform.processor(), os.cpu_count(), os.environ.get("OMP_NUM_THREADS")],
            "settings": settings.model_dump(mode="json", exclude={"repeats"}),
            "workload": workload.model_dump(mode="json"),
            "rank_step": job.recipe.search.rank_step,
            "structure": structure,
        },
    )
    path = stage / "latency.json"
    before = path.is_file()
    if not before:
        with (
            progress_bar(3, "4/6 latency") as progress,
            open_engine(job.source.path, workload, settings, log=stage / "engine.log") as engine,
        ):
            progress(1)
            runs = [
                engine.throughput(workload.prompt_tokens, workload.output_tokens, workload.concurrency, seed=seed)
                for seed in range(3)
            ]
            progress(2)
            table = engine.latency_table(shapes, tokens, dtype=settings.dtype)
            progress(3)
        rows = [{**asdict(shape), "us": us} for shape, us in zip(shapes, table, strict=True)]
        # the first run warms up
        write_json(path, {"dense_seconds": min(run.seconds for run in runs[1:]), "tokens": tokens, "rows": rows})
    data = json.loads(path.read_text(encoding="utf-8"))
    latencies = {Shape(**row): (decode, prefill) for row in data["rows"] for decode, prefill in [row.pop("us")]}
    speed = SpeedModel(job.units, workload, data["dense_seconds"], latencies, job.recipe.search.rank_step, structure)
    rate = workload.concurrency * workload.output_tokens / speed.dense_seconds
    job.say(
        f"4/6 latency: {len(shapes)} layers at {tokens[0]} and {tokens[1]} tokens on {engine_version()}, "
        f"dense {rate:.0f} output tokens/s{reused(int(before), 1)}"
    )
    return speed, stage.name


def _validate(job: Job, merged: MergedRanks, plan: RankPlan | None) -> float:
    """Perplexity of a plan (None: dense) on the validation text."""
    merged.apply(dict(plan.ranks) if plan is not None else {})
    return perplexity(merged.model, first_tokens(job.windows["validation"], job.recipe.search.validation_tokens))


def _search(
    job: Job, merged: MergedRanks, space: study.SearchSpace, folder: WorkFolder, stages: Mapping[str, str]
) -> tuple[list[study.Evaluated], Path]:
    settings = job.recipe.search
    stage = folder.stage(
        "study",
        {
            **stages,
            "version": _STUDY_VERSION,
            "windows": tensor_sha256(job.windows["validation"]),
            # the number of trials is no part of the identity: more of them go on from where fewer ended
            "search": settings.model_dump(mode="json", exclude={"trials", "measured_plans", "generations"}),
            "target": job.recipe.target.model_dump(mode="json"),
            "seed": job.recipe.seed,
        },
    )
    resumed: list[int] = []
    with progress_bar(settings.trials, "4/6 search") as progress:

        def report(done: int, last: study.Evaluated | None) -> None:
            if last is None:
                resumed.append(done)
            progress(done)

        path = stage / "study.sqlite3"
        trials = study.run_study(
            space, lambda plan: _validate(job, merged, plan), settings, path, seed=job.recipe.seed, progress=report
        )
    best = min(trials, key=lambda e: e.perplexity)
    bases = ", ".join(f"{e.origin} {e.perplexity:.2f}" for e in trials if e.origin in space.bases)
    job.say(
        f"4/6 search: {len(trials)} trials{reused(resumed[0], len(trials))}; validation perplexity: "
        f"dense {space.dense_perplexity:.2f}, {bases}, best {best.perplexity:.2f} ({best.origin})"
    )
    if settings.generations:
        trials.append(_evolve(job, merged, space, stage, best))
        job.say(f"4/6 evolution: validation perplexity {trials[-1].perplexity:.2f} after {settings.generations} generations")
    return trials, path


def _evolve(job: Job, merged: MergedRanks, space: study.SearchSpace, stage: Path, start: study.Evaluated) -> study.Evaluated:
    """Switch levels of the study's best plan, judged by the divergence on the probe's tokens."""
    settings = job.recipe.search
    merged.apply({})
    divergence = Divergence(merged.model, _probe_windows(job))

    def evaluate(plan: RankPlan) -> float:
        merged.apply(dict(plan.ranks))
        return divergence(merged.model)

    with progress_bar(settings.generations, "4/6 evolve") as progress:
        plan = evolve(
            space.fit,
            start.plan,
            space.parameter_budget(),
            evaluate,
            stage / f"evolution-{settings.generations}-{fingerprint(start.plan.key())[:12]}.json",
            generations=settings.generations,
            offspring=_OFFSPRING,
            seed=job.recipe.seed,
            progress=lambda generation, best: progress(generation),
        )
    return study.Evaluated(plan, _validate(job, merged, plan), space.tokens_per_second(plan), "evolution", start.trial)


def _measure(
    job: Job, store: SpectrumStore, folder: WorkFolder, trials: list[study.Evaluated], space: study.SearchSpace
) -> list[Measured]:
    """Export the most promising plans of the front one by one and measure each in turns with the dense model."""
    recipe = job.recipe
    workload, settings = recipe.workload, recipe.engine
    stage = folder.stage(
        "measure",
        {
            "spectra": store.folder.name,
            "engine": engine_version(),
            "settings": settings.model_dump(mode="json"),
            "workload": workload.model_dump(mode="json"),
            "seed": recipe.seed,
        },
    )
    picked = study.candidates(trials, recipe.target, space, recipe.search.measured_plans)
    paths = [stage / f"{fingerprint(candidate.plan.key())[:16]}.json" for candidate in picked]
    missing = [index for index, path in enumerate(paths) if not path.is_file()]
    checkpoint = folder.root / "candidate"
    runs = 0
    with progress_bar(len(missing) * 2 * settings.repeats, "4/6 measure") as progress, ExitStack() as stack:

        def step() -> None:
            nonlocal runs
            runs += 1
            progress(runs)

        if missing:
            dense = stack.enter_context(open_engine(job.source.path, workload, settings, sharing=2))
        for index in missing:
            shutil.rmtree(checkpoint, ignore_errors=True)
            checkpoint.mkdir()
            model = job.compressed_model(picked[index].plan, store)
            VllmExporter().export(model, job.source.path, checkpoint, job.dtype)
            del model
            with open_engine(checkpoint, workload, settings, sharing=2) as engine:
                comparison = compare(dense, engine, workload, settings.repeats, seed=recipe.seed, progress=step)
            write_json(paths[index], asdict(comparison))
    shutil.rmtree(checkpoint, ignore_errors=True)
    measured = []
    for index, (candidate, path) in enumerate(zip(picked, paths, strict=True)):
        result = Measured(candidate, space.speedup(candidate.plan), read_comparison(path))
        measured.append(result)
        spread = f"{min(result.comparison.speedups):.2f} to {max(result.comparison.speedups):.2f}"
        job.say(
            f"4/6 measure: {candidate.origin}: validation perplexity {candidate.perplexity:.2f}, "
            f"{result.comparison.speedup:.2f}x of dense ({spread}), predicted {result.predicted_speedup:.2f}x"
            f"{reused(int(index not in missing), 1)}"
        )
    return measured
