"""Stage 5: improve the chosen plan's factors as the recipe asks, and keep them if the validation text agrees."""

from __future__ import annotations

from typing import Any

from lrserve.allocation.plan import Plan
from lrserve.compression.factorize import FactorSource, GradientOf
from lrserve.compression.propagate import propagation
from lrserve.compression.recover import recover
from lrserve.compression.refine import adam
from lrserve.compression.rounding import Rounding
from lrserve.compression.sequential import Step, walk
from lrserve.compression.spectra import SpectrumStore
from lrserve.compression.training import TrainedFactors
from lrserve.pipeline.job import Job, first_tokens, tensor_sha256
from lrserve.pipeline.search import Tuned
from lrserve.report.console import progress_bar, reused
from lrserve.storage.store import fingerprint
from lrserve.storage.work import WorkFolder

_PROPAGATED_RATIO = 0.3
"""Plans of factors alone that remove this share of the linears' parameters get propagated ones unless the recipe says otherwise."""


def improve_factors(
    job: Job, plan: Plan, store: SpectrumStore, gradient: GradientOf, folder: WorkFolder
) -> tuple[FactorSource, dict[str, Any]]:
    """Stage 5, first half: do what the recipe asks to the chosen plan's factors; their ranks stay.

    Returns:
        The factors, and what was done to them: the settings, and of a recovery its steps and divergences. Empty for nothing.
    """
    settings = job.recipe.factorization
    ranks = [(unit, level.rank) for unit, level in plan.changed(job.units) if level.rank is not None]
    factors: FactorSource = store
    done: dict[str, Any] = {}
    propagate = settings.propagate
    if propagate is None:
        propagate = plan.structure != "narrow" and plan.ratio(job.units) >= _PROPAGATED_RATIO and not settings.recover_minutes
    refine = settings.refinement
    if not ranks or not (propagate or refine != "none" or settings.recover_minutes):
        return factors, done
    calibration, seed = job.windows["calibration"], job.recipe.seed
    windows = first_tokens(calibration, settings.refine_tokens or calibration.numel() // 4)
    batch = job.recipe.calibration.batch_tokens
    identity: dict[str, Any] = {"factors": store.folder.name, "plan": fingerprint(plan.key()), "seed": seed}
    model = job.source.load(job.dtype)

    def walked(name: str, step: Step, **inputs: Any) -> TrainedFactors:
        stage = folder.stage(name, {**identity, "windows": tensor_sha256(windows), **inputs})
        identity["factors"] = stage.name
        with progress_bar(job.layers, f"5/6 {name}") as progress:
            return walk(model, ranks, windows, stage, step, batch_tokens=batch, progress=progress)

    if propagate:
        factors = walked("propagate", propagation(gradient))
        job.say(f"5/6 propagate: factors of {len(ranks)} groups for their compressed inputs")
        done["propagate"] = windows.numel()
    if refine != "none":
        steps = settings.refine_steps
        factors = walked("refine", adam(factors, steps=steps, seed=seed), steps=steps, batch_tokens=batch)
        job.say(f"5/6 refine: factors of {len(ranks)} groups, {steps} steps of Adam in each block")
        done["refine"] = {"method": refine, "tokens": windows.numel(), "steps": steps}
    if settings.recover_minutes:
        seconds, texts = 60 * settings.recover_minutes, job.recovery_windows()
        stage = folder.stage("recover", {**identity, "windows": tensor_sha256(texts), "seconds": seconds})
        student = job.source.load(job.dtype)
        with progress_bar(round(seconds), "5/6 recover") as progress:
            outcome = recover(model, student, ranks, factors, texts, stage, seconds=seconds, seed=seed, progress=progress)
        factors = outcome.factors
        job.say(
            f"5/6 recover: {outcome.steps} steps, KL divergence {outcome.first_divergence:.3f} to {outcome.last_divergence:.3f} "
            f"nats on calibration text{reused(int(outcome.reused), 1)}"
        )
        done["recover"] = {
            "minutes": settings.recover_minutes,
            "steps": outcome.steps,
            "divergence": [outcome.first_divergence, outcome.last_divergence],
        }
    return factors, done


def validate_improved(job: Job, tuned: Tuned, factors: FactorSource, rounding: Rounding) -> float | None:
    """Return the validation perplexity of improved factors; None where it is above that of the factors that were searched."""
    candidate = tuned.chosen.candidate
    searched = candidate.perplexity
    found = tuned.validation(job.served_model(candidate.plan, factors, rounding)).perplexity
    better = found <= searched
    kept = "" if better else "; worse, so the searched factors are kept"
    job.say(f"5/6 improved: validation perplexity {searched:.2f} to {found:.2f}{kept}")
    return found if better else None
