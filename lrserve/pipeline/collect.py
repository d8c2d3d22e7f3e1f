"""Stage 2: the statistics of the calibration text, collected by one process or merged from those of shards.

Covariances are sums over the pools, gradient moments over the batches that run backwards. `lrserve calibrate --shard I/N` collects
one of N parts of both in a folder of its own below the work folder; a run that finds such folders in its work folder merges them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lrserve.compression.calibrate import calibrate, merge_statistics, statistics_path
from lrserve.compression.gradients import GradientStore, collect_gradients, merge_gradients, windows_done
from lrserve.compression.matmul import float32_matmuls
from lrserve.errors import InputError, listed
from lrserve.inputs.finite import require_finite
from lrserve.pipeline.estimate import estimate, time_forward
from lrserve.pipeline.holding import holding
from lrserve.pipeline.job import Job, open_job, tensor_sha256
from lrserve.pipeline.rounding import gradient_windows
from lrserve.pipeline.shard import Shard
from lrserve.pipeline.stages import MODULES
from lrserve.recipe import Recipe
from lrserve.report.console import Say, progress_bar, reused, timed
from lrserve.storage.sound import damage
from lrserve.storage.space import Place, require_space, resolved
from lrserve.storage.store import disk_errors_named
from lrserve.storage.temporary import remove_leftovers, temporary_leftovers
from lrserve.storage.work import WorkFolder, work_folder


def calibrate_shard(recipe: Recipe, shard: Shard, work: Path, *, say: Say = print) -> None:
    """Collect the covariances and gradients of one shard of a recipe's calibration; an interrupted one goes on where it stopped.

    Args:
        recipe: that of the run which will merge the shards.
        shard: which one.
        work: that run's work folder, or one from which the shard's folder is copied there. Shards do not wait for each other.
        say: takes each line of result.

    Raises:
        LrserveError: of any kind.
    """
    root = resolved("--work", work) / shard.folder
    remove_leftovers([(root, "**/*.partial-*"), temporary_leftovers()], say)
    job = replace(open_job(recipe, say), say=timed(say))
    settings = job.recipe.calibration
    pools = -(-len(job.windows["calibration"]) // settings.pool_sequences)
    if shard.count > pools:
        raise InputError(
            f"--shard {shard}: there are {pools} pools of calibration.pool_sequences {settings.pool_sequences} sequences; give at "
            f"most {pools} shards"
        )
    needed = sum(cost.disk for cost in estimate(job, time_forward(job)) if cost.stage.startswith("2")) // shard.count
    require_space([Place("the work folder (--work)", root, needed)])
    with work_folder(root, say, MODULES) as folder, disk_errors_named(root), float32_matmuls():
        model = job.source.load(job.dtype)
        require_finite(model, job.source.path)
        calibrate_blocks(job, model, folder, shard)
        backpropagate(job, model, folder, shard)
    job.say(f"shard {shard} is whole in {root}: compress-and-export merges all {shard.count} if they lie in its --work")


def require_shards(job: Job, folder: WorkFolder) -> None:
    """See that the shards in a work folder are whole, if it holds any and is without the statistics that they are for.

    Raises:
        InputError: some are missing, or were made from other inputs.
    """
    _covariances_to_merge(job, folder)
    _gradients_to_merge(job, folder)


def calibrate_blocks(job: Job, model: Any, folder: WorkFolder, shard: Shard | None = None) -> Path:
    """Collect the covariances, of a shard or of all, merge those of shards, or reuse them; returns their folder."""
    settings, inputs, windows = job.recipe.calibration, job.calibration_inputs(), job.windows["calibration"]
    parts = []
    if shard is None:
        parts = _covariances_to_merge(job, folder)
    else:
        inputs, windows = shard.inputs(inputs), windows[shard.part(len(windows), settings.pool_sequences)]
    stage = folder.stage("calibration", inputs)
    with progress_bar(job.layers, "2/6 calibrate") as progress:
        if parts:
            before = merge_statistics(parts, job.observed, stage, progress=progress)
        else:
            before = calibrate(
                model,
                job.observed,
                windows,
                stage,
                pool_sequences=settings.pool_sequences,
                batch_tokens=settings.batch_tokens,
                partial=shard is not None,
                progress=progress,
            )
    how = f"{_merged(parts)}{reused(before, job.layers)}"
    job.say(f"2/6 calibrate: covariances of {job.layers} blocks from {windows.numel()} tokens{how}")
    return stage


def backpropagate(job: Job, model: Any, folder: WorkFolder, shard: Shard | None = None) -> GradientStore | None:
    """Collect the gradient moments, of a shard or of all, merge those of shards, or reuse them.

    Returns None where no group kind asks for them, or the shard has no part of them.
    """
    if not job.recipe.factorization.fisher:
        return None
    inputs, windows, first, parts = _gradient_inputs(job), gradient_windows(job), 0, []
    if shard is None:
        parts = _gradients_to_merge(job, folder)
    else:
        part = _gradient_part(job, shard)
        inputs, windows, first = shard.inputs(inputs), windows[part], part.start
    if not len(windows):
        return None
    stage = folder.stage("gradients", inputs)
    if parts:
        merge_gradients(parts, stage)
    with progress_bar(len(windows), "2/6 gradients") as progress:
        before = collect_gradients(
            model,
            job.groups,
            windows,
            stage,
            batch_tokens=inputs["batch_tokens"],
            seed=job.recipe.seed,
            first=first,
            recompute=not holding(job).activations,
            filed=job.filed,
            progress=progress,
        )
    how = _merged(parts) or reused(before, len(windows))
    job.say(f"2/6 gradients: moments of {len(job.groups)} groups from {windows.numel()} tokens{how}")
    return GradientStore(stage)


def _merged(parts: Sequence[Path]) -> str:
    return f", merged from {len(parts)} shards" if parts else ""


def _gradient_inputs(job: Job) -> dict[str, Any]:
    windows = tensor_sha256(gradient_windows(job))
    return {**job.model_inputs(), "windows": windows, "seed": job.recipe.seed, "batch_tokens": job.gradient_batch_tokens}


def _gradient_part(job: Job, shard: Shard) -> slice:
    windows = gradient_windows(job)
    return shard.part(len(windows), max(1, _gradient_inputs(job)["batch_tokens"] // windows.shape[1]))


def _covariances_to_merge(job: Job, folder: WorkFolder) -> list[Path]:
    def blocks(stage: Path) -> int:
        paths = [statistics_path(stage, index) for index in range(job.layers)]
        return sum(path.is_file() and damage(path) is None for path in paths)

    return _to_merge(folder, "calibration", job.calibration_inputs(), lambda shard: job.layers, blocks)


def _gradients_to_merge(job: Job, folder: WorkFolder) -> list[Path]:
    if not job.recipe.factorization.fisher:
        return []

    def windows(stage: Path) -> int:
        return 0 if any(map(damage, stage.glob("*.safetensors"))) else windows_done(stage)

    def due(shard: Shard) -> int:
        return len(gradient_windows(job)[_gradient_part(job, shard)])

    return _to_merge(folder, "gradients", _gradient_inputs(job), due, windows)


def _to_merge(
    folder: WorkFolder, name: str, inputs: Mapping[str, Any], due: Callable[[Shard], int], found: Callable[[Path], int]
) -> list[Path]:
    """Return the shards' folders of a stage, in order; none if the stage is whole, or the work folder holds no shards.

    Args:
        inputs: those of the stage.
        due: how many blocks or windows a shard has; none where it has no part.
        found: how many of them are whole in a folder.

    Raises:
        InputError: some are missing, or were made from other inputs.
    """
    if found(folder.place(name, inputs)) >= due(Shard(1, 1)):
        return []
    counts = {shard.count for path in folder.root.iterdir() if (shard := Shard.of_folder(path.name))}
    lacking = []
    for count in sorted(counts):
        shards = [shard for shard in (Shard(index, count) for index in range(1, count + 1)) if due(shard)]
        places = {s: folder.root / s.folder / folder.place(name, s.inputs(inputs)).name for s in shards}
        missing = [shard for shard, place in places.items() if found(place) < due(shard)]
        if not missing:
            return list(places.values())
        lacking.append(missing)
    if not lacking:
        return []
    missing = min(lacking, key=len)
    raise InputError(
        f"{folder.root} holds shards, but not all {name} of this run's inputs: {listed(missing, ', ')} "
        f"{'are' if len(missing) > 1 else 'is'} missing; run 'lrserve calibrate --shard {missing[0]}' with the same inputs, copy "
        "the folder of the shard from where it was made, or remove the shard-* folders, to collect everything here"
    )
