"""Stage 4, the search: time single layers on the engine, probe the units, run the study, measure its front end to end."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lrserve.allocation import losses
from lrserve.allocation.goal import Evaluated, Goal, MeasuredSpeed, choose, pareto_front
from lrserve.allocation.plan import BudgetFit, Offers, Plan
from lrserve.allocation.quality import Judgement, Validation, negative_log_likelihood, representative
from lrserve.allocation.shared import Shared, first_published
from lrserve.allocation.space import SearchSpace
from lrserve.allocation.speed import SpeedModel
from lrserve.allocation.study import Evaluate, copy_study, run_study, study_of, time_spent
from lrserve.compression.assemble import MergedLevels
from lrserve.compression.embedding import rounded_values
from lrserve.compression.gradients import GradientStore
from lrserve.compression.groups import Group
from lrserve.compression.level import DENSE, SCHEMES, Level, Precision
from lrserve.compression.rounding import Rounding
from lrserve.compression.spectra import SpectrumStore
from lrserve.engines.runtimes import runtime_of
from lrserve.errors import CalibrationError, InputError, NotFiniteError
from lrserve.pipeline.holding import holding
from lrserve.pipeline.job import Job, first_tokens, tensor_sha256
from lrserve.pipeline.measure import DenseEngine, Measured, dense_checkpoint, measure_front, measure_layers, speed_model
from lrserve.pipeline.probe import probed_losses
from lrserve.pipeline.rounding import weigh_tokens
from lrserve.report.console import progress_bar, reused
from lrserve.storage.store import write_json
from lrserve.storage.work import WorkFolder

_STUDY_VERSION = 4  # raised when the same suggestions make other plans, or trials keep other figures
_REFERENCE_RATIO = 0.2  # of the uniform plan whose losses tell validation windows apart, where the target has no ratio


@dataclass(frozen=True)
class Tuned:
    """The outcome: the chosen plan, everything that was measured on the engine, every trial, and the study in a SQLite file.

    `embedding_loss`: what rounding the embedding and the output layer alone loses, in nats; 0 where they are not rounded.
    `left_dense`: the units of which the search offered no level, since what it had to know was not finite; by name, what that was.
    """

    chosen: Measured
    measured: list[Measured]
    trials: list[Evaluated]
    goal: Goal
    speed: SpeedModel
    validation: Validation
    study_path: Path
    embedding_loss: float
    left_dense: Mapping[str, str] = field(default_factory=dict)

    @property
    def standard_error(self) -> float:
        """Of the chosen plan's log(perplexity / dense perplexity) on the validation text, in nats."""
        return self.validation.standard_error(self.chosen.candidate.nll)


def tune(
    job: Job,
    model: Any,
    store: SpectrumStore,
    rounding: Rounding,
    gradients: GradientStore | None,
    folder: WorkFolder,
    storage: str | None = None,
) -> Tuned:
    """Choose a plan for the recipe's target.

    Args:
        job: the opened inputs.
        model: the dense model in the job's dtype; its weights are rewritten by the trials.
        store: its spectra.
        rounding: rounds its weights.
        gradients: weigh tokens where weights are rounded to 4 bits.
        folder: the work folder; what an earlier run finished is reused.
        storage: URL of a database in which workers with the same inputs share the study.

    Raises:
        InfeasibleTargetError: no plan meets the target.
        InputError: the database cannot be used, or `search.choose` is no finished trial.
        EngineError: the engine failed.
        CalibrationError: the dense model's loss on the validation text is not finite.
    """
    runtime = runtime_of(job.recipe.engine)
    settings, target, embedding_loss = job.recipe.search, job.recipe.target, 0.0
    checkpoint = dense_checkpoint(job, runtime, folder)
    log = folder.root / "dense-engine.log"
    together = holding(job).engines
    device = next(model.parameters()).device
    with DenseEngine(runtime, checkpoint, job.recipe.requests, log, together=together) as dense, ExitStack() as stack:
        merged = MergedLevels(model, job.units, store, rounding, folder.root, job.filed)
        merged.to("cpu")  # an engine takes the GPU
        table, latency = measure_layers(job, runtime, dense, folder)
        dense.make_room()
        merged.to(device)
        windows, validated = choose_windows(job, merged, store, folder)
        stage, place = _study_place(job, folder, {"validation": validated, "spectra": store.folder.name}, latency, storage)
        if isinstance(place, Shared):
            table = first_published(place, latency, table)
            windows = first_published(place, validated, windows)
        validation = validation_on(job, windows)
        goal = Goal(target, settings.speed_weight, validation.dense_perplexity)
        table_speed = speed_model(job, table).keeping_dense(store.not_finite())
        rounding_metric(job, merged, rounding, gradients, table_speed, folder)
        if precision := table_speed.offers.embedding:
            stack.enter_context(rounded_values(model, precision, job.dtype))  # as in all plans
            embedding_loss = _say_embedding(job, merged, validation, precision)
        measure = partial(measure_front, job, store, folder, runtime, dense, goal, table_speed, rounding)
        usual = _usual(job, table_speed.offers, merged, validation, table_speed)
        merged.to("cpu")
        measured = measure(usual)
        dense.make_room()
        merged.to(device)
        speed = table_speed.corrected([(m.candidate.plan, m.comparison.relative_times) for m in measured])
        speed, level_losses = known_losses(job, merged, store, speed, folder)
        left_dense = _say_left_dense(job, store, speed)
        space = SearchSpace(job.units, target, settings, level_losses, speed, speed.offers, job.dtype.itemsize)
        trials = _search(job, merged, space, goal, speed, validation, place)
        picked = _picked(trials, settings.choose)
        merged.to("cpu")
        measured = measure([picked] if picked else [], measured, [] if picked else trials)
    best = picked or choose([measured_speed(m, goal) for m in measured], goal)
    chosen = next(m for m in measured if m.candidate is best)
    share = best.plan.byte_share(job.units, job.dtype.itemsize)
    job.say(f"4/6 chosen: {best.origin}, {share:.0%} of the linears' bytes, {chosen.comparison.speedup:.2f}x of dense")
    path = stage / "study.sqlite3"
    if isinstance(place, Shared):
        path.unlink(missing_ok=True)
        copy_study(place, path)
    return Tuned(chosen, measured, trials, goal, speed, validation, path, embedding_loss, left_dense)


def rounding_metric(
    job: Job,
    merged: MergedLevels,
    rounding: Rounding,
    gradients: GradientStore | None,
    runnable: SpeedModel,
    folder: WorkFolder,
) -> None:
    """Let rounding to 4 bits be measured by moments in which tokens weigh by their gradients, if the engine can run it."""
    if gradients is not None and any(SCHEMES[precision].bits < 8 for precision in runnable.offers.precisions):
        merged.apply({})
        try:
            rounding.measure_by(weigh_tokens(job, merged.model, gradients, folder))
        except NotFiniteError as error:
            job.say(f"4/6 weigh: all tokens weigh alike, since {error}")


def known_losses(
    job: Job, merged: MergedLevels, store: SpectrumStore, runnable: SpeedModel, folder: WorkFolder
) -> tuple[SpeedModel, dict[str, losses.Losses]]:
    """Find out which levels are worth offering, and what each of them loses by the name of the allocator that minimises it.

    Args:
        runnable: the speed model of what the engine can run; what never pays is not offered, unless bytes count.
    """
    speed = runnable if job.recipe.target.max_bytes else runnable.without_what_never_pays()
    _say_offers(job, runnable.offers, speed.offers)
    sick, found = probed_losses(job, merged, store, speed.offers, folder)
    return speed.keeping_dense(sick), found


def _say_left_dense(job: Job, store: SpectrumStore, speed: SpeedModel) -> dict[str, str]:
    """Say which units stay dense in every plan, since a number is not finite; returns which number, by their names."""
    known = {**dict.fromkeys(speed.untimed, "latency"), **dict.fromkeys(store.not_finite(), "spectrum")}
    found = {unit.name: known.get(unit.name, "probe") for unit in job.units if unit.name in speed.offers.dense}
    if found:
        job.say(f"4/6 left dense, since a number is not finite: {', '.join(f'{name} ({why})' for name, why in found.items())}")
    return found


def _say_embedding(job: Job, merged: MergedLevels, validation: Validation, precision: Precision) -> float:
    """Judge the model of which only the embedding and the output layer are rounded; returns what it loses, in nats."""
    merged.apply({})
    loss = math.log(validation(merged.model).perplexity / validation.dense_perplexity)
    job.say(f"4/6 embedding and output layer: {precision} in all plans, {loss:+.4f} nats")
    return loss


def _say_offers(job: Job, runnable: Offers, offered: Offers) -> None:
    """Say which precisions the search may use, and why not the others."""
    if not job.precisions:
        return
    cannot = [p for p in job.precisions if p not in runnable.precisions]
    slower = [p for p in runnable.precisions if p not in offered.precisions]
    notes = [f"the engine cannot run {', '.join(cannot)} here"] * bool(cannot)
    notes += [f"{', '.join(slower)} is never faster"] * bool(slower)
    job.say(
        f"4/6 levels: weights of {', '.join([runtime_of(job.recipe.engine).dtype, *offered.precisions])}" + "; ".join(["", *notes])
    )


def _usual(job: Job, offers: Offers, merged: MergedLevels, validation: Validation, speed: SpeedModel) -> list[Evaluated]:
    """Judge what users would serve instead: the dense model in 8 and in 4 bits, everywhere."""
    evaluate = judge(merged, validation)
    found = []
    for bits in (8, 4):
        precision = next((p for p in offers.precisions if SCHEMES[p].bits == bits), None)
        if precision is None:
            continue
        plan = everywhere(job.units, precision, offers)
        judgement = evaluate(plan, [])
        fits = _fits(job, plan)
        origin = f"{precision} everywhere"
        if not math.isfinite(judgement.perplexity):
            job.say(f"4/6 {origin}: the validation perplexity is not finite, so this plan is left out")
            continue
        throughput = speed.tokens_per_second(plan)
        found.append(Evaluated(plan, judgement.perplexity, throughput, origin, None, judgement.nll, fits=fits, usual=True))
    return found


def everywhere(units: Sequence[Group], precision: Precision, offers: Offers) -> Plan:
    """Return the plan that rounds every unit that can be rounded, and removes nothing."""
    level = Level(weights=precision)
    return Plan({unit.name: level if level in offers.levels(unit) else DENSE for unit in units}, offers.structure, offers.embedding)


def _fits(job: Job, plan: Plan) -> bool:
    """Whether a plan is as small as the target asks for."""
    target = job.recipe.target
    if target.max_bytes:
        return plan.byte_share(job.units, job.dtype.itemsize) <= target.max_bytes
    return not target.ratio or plan.ratio(job.units) >= target.ratio


def _picked(trials: Sequence[Evaluated], number: int | None) -> Evaluated | None:
    """Return the trial that the recipe chooses, if it does.

    Raises:
        InputError: there is none of this number, it was stopped early, or its perplexity is not finite.
    """
    if number is None:
        return None
    found = next((trial for trial in trials if trial.trial == number and trial.complete and trial.finite), None)
    if found is None:
        raise InputError(
            f"search.choose: the study has no trial {number} that was judged on all of the text, with a finite perplexity; its "
            "report lists them"
        )
    return found


def measured_speed(measured: Measured, goal: Goal) -> MeasuredSpeed:
    """Return what `choose` compares; under a target that fixes a size the speedup of the fastest rounds, which ranks plans best."""
    comparison = measured.comparison
    speedup = comparison.undisturbed_speedup if goal.target.sized else comparison.speedup
    return MeasuredSpeed(measured.candidate, speedup, comparison.spread[0])


def choose_windows(job: Job, merged: MergedLevels, store: SpectrumStore, folder: WorkFolder) -> tuple[dict[str, Any], str]:
    """Choose the windows that trials are judged on: for `validation_on`, and the name of the stage that holds the choice.

    Those stand for the pool by what the dense model and one compressed one make of them: the mean difference in loss between the
    two is close to that over the pool. Where that of the compressed one is not finite, the dense model's losses alone decide.

    Raises:
        CalibrationError: the dense model's loss is not finite.
    """
    settings, pool = job.recipe.search, _validation_pool(job)
    amount = max(1, settings.validation_tokens // settings.validation_length)
    step, width_step = job.steps
    offers = Offers(step, job.recipe.structure, dense=store.not_finite(), width_step=width_step)
    fit = BudgetFit(job.units, offers)
    budget = max((1 - (job.recipe.target.ratio or _REFERENCE_RATIO)) * fit.dense_cost, fit.smallest_cost)
    reference = losses.uniform(fit, budget)
    identity = {"spectra": store.folder.name, "pool": tensor_sha256(pool), "windows": amount, "reference": reference.to_json()}
    stage = folder.stage("validation", identity)
    path = stage / "windows.json"
    before = path.is_file()
    if not before:
        with progress_bar(2 * len(pool), "4/6 validation") as progress:
            merged.apply({})
            dense = negative_log_likelihood(merged.model, pool, progress)
            if not dense.isfinite().all():
                raise CalibrationError(
                    f"the dense model's loss on the validation text is not finite in {job.recipe.engine.dtype}; set engine.dtype "
                    "to bfloat16 or float32"
                )
            chosen = list(range(len(pool)))
            if amount < len(pool):
                merged.apply(reference.levels)
                compressed = negative_log_likelihood(merged.model, pool, lambda done: progress(len(pool) + done))
                differences = compressed - dense
                chosen = representative((differences if differences.isfinite().all() else dense).tolist(), amount)
        write_json(path, {"windows": chosen, "dense": dense[chosen].tolist()})
    data = json.loads(path.read_text(encoding="utf-8"))
    tokens = len(data["windows"]) * pool.shape[1]
    job.say(f"4/6 validation: {tokens} tokens stand for {pool.numel()}{reused(int(before), 1)}")
    return data, stage.name


def validation_on(job: Job, windows: Mapping[str, Any]) -> Validation:
    """Return what judges plans on the windows that `choose_windows` chose."""
    return Validation(_validation_pool(job)[windows["windows"]], windows["dense"])


def _validation_pool(job: Job) -> torch.Tensor:
    return first_tokens(job.windows["validation"], job.recipe.search.validation_pool)


def _study_place(
    job: Job, folder: WorkFolder, stages: Mapping[str, str], latency: str, storage: str | None
) -> tuple[Path, Path | Shared]:
    """Return the study's stage, and where the study is: in a file there, or in the shared database.

    Args:
        stages: the names of those that hold what the quality of plans depends on.
        latency: that of the stage that holds the latency table.
    """
    inputs = {
        **stages,
        "version": _STUDY_VERSION,
        # the number of trials is no part of the identity: more of them go on from where fewer ended
        "search": job.recipe.search.model_dump(mode="json", exclude={"trials", "measured_plans", "choose"}),
        "target": job.recipe.target.model_dump(mode="json"),
        "seed": job.recipe.seed,
    }
    stage = folder.stage("study", {**inputs, "latency": latency})
    if storage is None:
        return stage, stage / "study.sqlite3"
    return stage, Shared(storage, folder.place("study", inputs).name, latency.removeprefix("latency-"))


def judge(merged: MergedLevels, validation: Validation) -> Evaluate:
    """Return what puts a plan into the model and judges it; only units whose level changed are rewritten."""

    def evaluate(plan: Plan, rivals: Sequence[Sequence[float]]) -> Judgement:
        began = time.perf_counter()
        try:
            merged.apply(plan.levels)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # a decomposition does not converge
            return Judgement(math.inf, (math.nan,) * len(validation.windows))
        applied = time.perf_counter()
        found = validation(merged.model, rivals)
        return replace(found, seconds={"weights": applied - began, "forward": time.perf_counter() - applied})

    return evaluate


def _search(
    job: Job,
    merged: MergedLevels,
    space: SearchSpace,
    goal: Goal,
    speed: SpeedModel,
    validation: Validation,
    place: Path | Shared,
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
    own = [trial for trial in trials if trial.trial is not None]
    early = sum(not trial.complete for trial in trials)
    endless = sum(not trial.finite for trial in trials)
    total = max(sum(time_spent(study_of(place)).values()), 1e-9)
    notes = [f"{len(own)} trials{reused(resumed[0], len(own))}", f"{60 * len(own) / total:.0f} a minute", f"{early} stopped early"]
    notes += [f"{endless} not finite"] * bool(endless)
    notes += [f"{len(trials) - len(own)} plans judged on other machines"] * (len(trials) > len(own))
    job.say(f"4/6 search: {', '.join(notes)}; validation perplexity: dense {goal.dense_perplexity:.2f}, predicted front: {shown}")
    return trials
