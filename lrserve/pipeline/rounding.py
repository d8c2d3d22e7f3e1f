"""What rounds the weights: from the statistics of calibration and, to 4 bits, from moments in which tokens weigh by gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lrserve.compression.calibrate import calibrate, read_statistics
from lrserve.compression.factorize import GradientOf
from lrserve.compression.gradients import GradientStore
from lrserve.compression.rounding import MomentOf, Rounding
from lrserve.pipeline.job import Job, first_tokens
from lrserve.report.console import progress_bar, reused
from lrserve.storage.work import WorkFolder


def gradient_windows(job: Job) -> torch.Tensor:
    """Return the calibration windows that run through the backward passes."""
    return first_tokens(job.windows["calibration"], job.recipe.factorization.fisher_tokens)


def gradient_reader(job: Job, gradients: GradientStore | None) -> GradientOf:
    """Return what gives a group's gradient moment, or None where its kind is not weighted."""
    kinds = job.recipe.factorization.fisher
    return lambda group: gradients.read(group) if gradients is not None and group.kind in kinds else None


def rounding_of(job: Job, statistics: Path, gradients: GradientStore | None) -> Rounding:
    """Return what rounds the model's weights, on a GPU where there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    outputs = (lambda group: None) if gradients is None else gradients.outputs
    return Rounding(_moments(statistics), outputs, job.dtype, device)


def weigh_tokens(job: Job, model: Any, gradients: GradientStore, folder: WorkFolder) -> MomentOf:
    """Stage 4: collect the moments by which rounding to 4 bits is measured, or reuse them.

    Args:
        model: the dense model.
        gradients: whose power at a token is that token's weight, so that those which the loss does not feel weigh little.
    """
    windows = gradient_windows(job)
    stage = folder.stage("weighted", {"gradients": gradients.folder.name})
    with progress_bar(job.layers, "4/6 weigh") as progress:
        before = calibrate(
            model,
            job.groups,
            windows,
            stage,
            pool_sequences=len(windows),
            batch_tokens=job.recipe.calibration.batch_tokens,
            token_weights=gradients.token_weights,
            progress=progress,
        )
    job.say(f"4/6 weigh: {windows.numel()} tokens by their gradients{reused(before, job.layers)}")
    return _moments(stage)


def _moments(statistics: Path) -> MomentOf:
    return lambda group: read_statistics(statistics, group).second_moment()
