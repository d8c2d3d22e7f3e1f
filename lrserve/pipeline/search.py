"""Stage 4, the rank search: probe the groups, time single layers on the engine, run the study, measure its front end to end."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lrserve.allocation import losses
from lrserve.allocation.goal import Evaluated, Goal, MeasuredSpeed, choose, pareto_front
from lrserve.allocation.plan import BudgetFit, RankPlan
from lrserve.allocation.quality import Divergence, Judgement, Validation, negative_log_likelihood, representative
from lrserve.allocation.space import SearchSpace
from lrserve.allocation.speed import SpeedModel
from lrserve.allocation.study import Evaluate, copy_study, open_study, run_study, study_of, time_spent
from lrserve.compression.groups import Structure
from lrserve.compression.spectra import MergedRanks, SpectrumStore
from lrserve.engines.runtimes import runtime_of
from lrserve.errors import InputError
from lrserve.pipeline.job import Job, first_tokens, tensor_sha256
from lrserve.pipeline.measure import DenseEngine, Measured, dense_checkpoint, measure_front, measure_layers, published, speed_model
from lrserve.report.console import progress_bar, reused
from lrserve.storage.store import write_json
from lrserve.storage.work import WorkFolder

_STUDY_VERSION = 3  # raised when the same suggestions make other plans, or trials keep other figures
_PROBE_SHARE = 0.5  # share of its dense parameters that a group keeps while it is probed
_REFERENCE_RATIO = 0.2  # of the uniform plan whose losses tell validation windows apart, where the target has no ratio


@dataclass(frozen=True)
class Tuned:
    """The outcome: the chosen plan, everything that was measured on the engine, every trial, and the study in a SQLite file."""

    chosen: Measured
    measured: list[Measured]
    trials: list[Evaluated]
    goal: Goal
    speed: SpeedModel
    validation: Validation
    study_path: Path

    @property
    def standard_error(self) -> float:
        """Of the chosen plan's log(perplexity / dense perplexity) on the validation text, in nats."""
        return self.validation.standard_error(self.chosen.candidate.nll)


def tune(job: Job, model: Any, store: SpectrumStore, folder: WorkFolder, storage: str | None = None) -> Tuned:
    """Choose a rank plan for the recipe's target.

    Args:
        job: the opened inputs.
        model: the dense model in the job's dtype; its weights are rewritten by the trials.
        store: its spectra.
        folder: the work folder; what an earlier run finished is reused.
        storage: URL of a database in which workers with the same inputs share the study.

    Raises:
        InfeasibleTargetError: no plan meets the target.
        InputError: the database cannot be used, or `search.choose` is no finished trial.
        EngineError: the engine failed.
    """
    merged = MergedRanks(model, job.units, store)
    device = next(model.parameters()).device
    losses, probe = probed_losses(job, merged, store, folder)
    validation, validated = choose_windows(job, merged, store, folder)
    merged.to("cpu")  # an engine takes the GPU
    runtime = runtime_of(job.recipe.engine)
    settings, target = job.recipe.search, job.recipe.target
    goal = Goal(target, settings.speed_weight, validation.dense_perplexity)
    checkpoint = dense_checkpoint(job, runtime, folder)
    with DenseEngine(runtime, checkpoint, job.recipe.requests, folder.root / "dense-engine.log") as dense:
        table, latency = measure_layers(job, runtime, dense, folder)
        dense.leave_gpu()
        merged.to(device)
        inputs = {"probe": probe, "latency": latency, "validation": validated}
        stage, place = _study_place(job, folder, inputs, storage)
        if isinstance(place, tuple):
            table = published(open_study(place[1], place[0], goal.metrics), table)
        speed = speed_model(job, table)
        space = SearchSpace(job.units, target, settings, losses, speed, job.recipe.structure)
        trials = _search(job, merged, space, goal, speed, validation, place)
        merged.to("cpu")
        picked = _picked(trials, settings.choose)
        measured = measure_front(job, store, folder, runtime, dense, trials, goal, speed, picked)
    best = picked or choose([measured_speed(m, goal) for m in measured], goal)
    chosen = next(m for m in measured if m.candidate is best)
    job.say(f"4/6 chosen: {best.origin}, ratio {best.plan.ratio(job.units):.3f}, {chosen.comparison.speedup:.2f}x of dense")
    path = stage / "study.sqlite3"
    if isinstance(place, tuple):
        path.unlink(missing_ok=True)
        copy_study(place, path)
    return Tuned(chosen, measured, trials, goal, speed, validation, path)


def _picked(trials: Sequence[Evaluated], number: int | None) -> Evaluated | None:
    """Return the trial that the recipe chooses, if it does.

    Raises:
        InputError: there is none of this number, or it was stopped early.
    """
    if number is None:
        return None
    found = next((trial for trial in trials if trial.trial == number and trial.complete), None)
    if found is None:
        raise InputError(
            f"search.choose: the study has no trial {number} that was judged on all of the text; its report lists them"
        )
    return found


def measured_speed(measured: Measured, goal: Goal) -> MeasuredSpeed:
    """Return what `choose` compares; for a ratio the speedup of the fastest rounds, which ranks plans best."""
    comparison = measured.comparison
    speedup = comparison.undisturbed_speedup if goal.target.ratio else comparison.speedup
    return MeasuredSpeed(measured.candidate, speedup, comparison.spread[0])


def probed_losses(job: Job, merged: MergedRanks, store: SpectrumStore, folder: WorkFolder) -> tuple[dict[str, losses.Losses], str]:
    """Return `losses.estimates`, and the name of the stage that holds the probes."""
    probes, stage = probe_groups(job, merged, store, folder, job.recipe.structure)
    weighted = {group.name for group in job.units if group.kind in job.recipe.factorization.fisher}
    return losses.estimates(store.errors(), probes, weighted), stage


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


def choose_windows(job: Job, merged: MergedRanks, store: SpectrumStore, folder: WorkFolder) -> tuple[Validation, str]:
    """Choose the windows that trials are judged on, and the name of the stage that holds their numbers.

    Those stand for the pool by what the dense model and one compressed one make of them: the mean difference in loss between the
    two is close to that over the pool.
    """
    settings = job.recipe.search
    pool = first_tokens(job.windows["validation"], settings.validation_pool)
    amount = max(1, settings.validation_tokens // settings.validation_length)
    fit = BudgetFit(job.units, settings.rank_step, job.recipe.structure)
    budget = max((1 - (job.recipe.target.ratio or _REFERENCE_RATIO)) * fit.dense_cost, fit.smallest_cost)
    reference = losses.uniform(fit, budget)
    identity = {"spectra": store.folder.name, "pool": tensor_sha256(pool), "windows": amount, "reference": dict(reference.ranks)}
    stage = folder.stage("validation", identity)
    path = stage / "windows.json"
    before = path.is_file()
    if not before:
        with progress_bar(2 * len(pool), "4/6 validation") as progress:
            merged.apply({})
            dense = negative_log_likelihood(merged.model, pool, progress)
            chosen = list(range(len(pool)))
            if amount < len(pool):
                merged.apply(dict(reference.ranks))
                compressed = negative_log_likelihood(merged.model, pool, lambda done: progress(len(pool) + done))
                chosen = representative((compressed - dense).tolist(), amount)
        write_json(path, {"windows": chosen, "dense": dense[chosen].tolist()})
    data = json.loads(path.read_text(encoding="utf-8"))
    windows = pool[data["windows"]]
    job.say(f"4/6 validation: {windows.numel()} tokens stand for {pool.numel()}{reused(int(before), 1)}")
    return Validation(windows, data["dense"]), stage.name


def _study_place(
    job: Job, folder: WorkFolder, stages: Mapping[str, str], storage: str | None
) -> tuple[Path, Path | tuple[str, str]]:
    """Return the study's stage, and where the study is: in a file there, or under a name of its own in the shared database."""
    settings = job.recipe.search
    stage = folder.stage(
        "study",
        {
            **stages,
            "version": _STUDY_VERSION,
            # the number of trials is no part of the identity: more of them go on from where fewer ended
            "search": settings.model_dump(mode="json", exclude={"trials", "measured_plans", "choose"}),
            "target": job.recipe.target.model_dump(mode="json"),
            "seed": job.recipe.seed,
        },
    )
    return stage, stage / "study.sqlite3" if storage is None else (storage, f"lrserve-{stage.name}")


def judge(merged: MergedRanks, validation: Validation) -> Evaluate:
    """Return what puts a plan into the model and judges it; only groups whose rank changed are rewritten."""

    def evaluate(plan: RankPlan, rivals: Sequence[Sequence[float]]) -> Judgement:
        began = time.perf_counter()
        merged.apply(dict(plan.ranks))
        applied = time.perf_counter()
        found = validation(merged.model, rivals)
        return replace(found, seconds={"weights": applied - began, "forward": time.perf_counter() - applied})

    return evaluate


def _search(
    job: Job,
    merged: MergedRanks,
    space: SearchSpace,
    goal: Goal,
    speed: SpeedModel,
    validation: Validation,
    place: Path | tuple[str, str],
) -> list[Evaluated]:
    settings = job.recipe.search
    resumed: list[int] = []
    with progress_bar(settings.trials, "4/6 search") as progress:

        def report(done: int, last: Evaluated | None) -> None:
            if last is None:
                resumed.append(done)
            progress(done)

        trials = run_study(space, goal, speed, judge(merged, validation), settings, place, seed=job.recipe.seed, progress=report)
    front = pareto_front(trials, speed.speedup)
    shown = "; ".join(f"{e.origin} {e.perplexity:.2f} at {speed.speedup(e.plan):.2f}x" for e in front)
    early = sum(not trial.complete for trial in trials)
    total = max(sum(time_spent(study_of(place)).values()), 1e-9)
    job.say(
        f"4/6 search: {len(trials)} trials{reused(resumed[0], len(trials))}, {60 * len(trials) / total:.0f} a minute, {early} "
        f"stopped early; validation perplexity: dense {goal.dense_perplexity:.2f}, predicted front: {shown}"
    )
    return trials
