"""Stage 5: improve what the chosen plan makes of the model as the recipe asks, and keep that if the validation text agrees."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

from lrserve.allocation.plan import Plan
from lrserve.compression.assemble import PlanSource
from lrserve.compression.experts import keep_mixtures
from lrserve.compression.factorize import GradientOf
from lrserve.compression.groups import Mixture
from lrserve.compression.propagate import propagation
from lrserve.compression.recover import Distilled, Recovered, Schedule, is_finished, recover
from lrserve.compression.refine import adam
from lrserve.compression.repair import Repairs, recover_rounded, repair, worth_repairing
from lrserve.compression.rounding import Rounding
from lrserve.compression.sequential import Step, walk
from lrserve.compression.spectra import SpectrumStore
from lrserve.compression.team import ALONE, Team
from lrserve.compression.training import TrainedFactors
from lrserve.errors import NotFiniteError
from lrserve.pipeline.job import Job, first_tokens, tensor_sha256
from lrserve.pipeline.search import Tuned
from lrserve.pipeline.together import recover_together, recovery_task
from lrserve.pipeline.training_text import recovery_windows
from lrserve.report.console import Say, progress_bar, reused
from lrserve.storage.store import fingerprint
from lrserve.storage.work import WorkFolder

_PROPAGATED_RATIO = 0.3
"""Plans of factors alone that remove this share of the linears' parameters get propagated ones unless the recipe says otherwise."""


class Improved(NamedTuple):
    """What an improvement leaves.

    factors: of the units that have a rank, and the experts that mixtures keep.
    repairs: what to apply to the model that is rounded from them; None for nothing.
    done: the settings, and of a recovery its steps and divergences; empty if nothing was done.
    """

    factors: PlanSource
    repairs: Repairs | None
    done: dict[str, Any]


def improve_factors(
    job: Job,
    plan: Plan,
    store: SpectrumStore,
    gradient: GradientOf,
    folder: WorkFolder,
    rounding: Rounding | None = None,
    team: Team | None = None,
) -> Improved:
    """Stage 5, first half: do what the recipe asks to the chosen plan; its levels stay.

    1. propagate and refine the factors, block by block
    2. where the plan rounds weights to fewer than 8 bits: round, and repair the rounded model block by block
    3. recover: distil the dense model into the factors or, where the plan rounds weights, into the rounded model

    Experts stay as the plan leaves them. A step in which a number is not finite is left out. `team` is that of a process that
    recovers with others; None starts such processes, or calls those of a launcher, if the job has several.
    """
    settings = job.recipe.factorization
    everything = plan.changed(job.units)
    changed = [(unit, level) for unit, level in everything if not isinstance(unit, Mixture)]
    ranks = [(unit, level.rank) for unit, level in changed if level.rank is not None]
    rounds = rounding is not None and any(level.weights is not None for _, level in changed)
    factors: PlanSource = store
    repairs: Repairs | None = None
    done: dict[str, Any] = {}
    propagate = settings.propagate
    if propagate is None:
        propagate = plan.structure != "narrow" and plan.ratio(job.units) >= _PROPAGATED_RATIO and not settings.recovers
    refine, steps = settings.refinement != "none", settings.refine_steps
    if not (ranks or rounds) or not ((propagate and ranks) or refine or settings.recovers):
        return Improved(factors, repairs, done)
    calibration, seed = job.windows["calibration"], job.recipe.seed
    windows = first_tokens(calibration, settings.refine_tokens or calibration.numel() // 4)
    batch = job.recipe.calibration.batch_tokens
    identity: dict[str, Any] = {"factors": store.folder.name, "plan": fingerprint(plan.key()), "seed": seed}
    model = job.source.load(job.dtype)

    def prepare(block: int) -> None:
        keep_mixtures(model, [(unit, level) for unit, level in everything if unit.layer == block], store, job.filed)

    def load_student() -> Any:
        return keep_mixtures(job.source.load(job.dtype), everything, store)

    def walked(name: str, step: Step, **inputs: Any) -> TrainedFactors:
        stage = folder.stage(name, {**identity, "windows": tensor_sha256(windows), **inputs})
        with progress_bar(job.layers, f"5/6 {name}") as progress:
            found = walk(model, ranks, windows, stage, step, batch_tokens=batch, prepare=prepare, progress=progress)
        identity["factors"] = stage.name
        return found.beside(store)

    if propagate and ranks:
        with _if_finite("propagate", job.say):
            factors = walked("propagate", propagation(gradient))
            job.say(f"5/6 propagate: factors of {len(ranks)} groups for their compressed inputs")
            done["propagate"] = windows.numel()
    if refine and ranks:
        with _if_finite("refine", job.say):
            factors = walked("refine", adam(factors, steps=steps, seed=seed), steps=steps, batch_tokens=batch)
            job.say(f"5/6 refine: factors of {len(ranks)} groups, {steps} steps of Adam in each block")
            done["refine"] = {"method": settings.refinement, "tokens": windows.numel(), "steps": steps}
    repairs_blocks = refine and worth_repairing(changed)
    student = job.compressed_model(plan, factors, rounding) if rounds and (repairs_blocks or settings.recovers) else None
    if student is not None and repairs_blocks:
        inputs = {"windows": tensor_sha256(windows), "steps": steps, "batch_tokens": batch}
        stage = folder.stage("repair", {**identity, **inputs})
        how: dict[str, Any] = {"steps": steps, "seed": seed, "batch_tokens": batch}
        with _if_finite("repair", job.say):
            with progress_bar(job.layers, "5/6 repair") as progress:
                repairs = repair(model, student, changed, windows, stage, **how, progress=progress)
            identity["factors"] = stage.name
            job.say(f"5/6 repair: what rounding left of {len(changed)} groups, {steps} steps of Adam in each block")
            done["repair"] = {"tokens": windows.numel(), "steps": steps}
    if settings.recovers:
        (texts, content), schedule = recovery_windows(job, folder), _schedule(job)
        spending = {"tokens": schedule.tokens} if schedule.tokens else {"seconds": schedule.seconds}
        inputs = {**identity, "windows": content, **spending, "batch_tokens": schedule.batch_tokens}
        stage = folder.stage("recover", inputs) if student is None else folder.stage("distil", inputs)
        with _if_finite("recover", job.say):
            if team is None and job.recovery_processes > 1 and not is_finished(stage):
                weighed = rounding is not None and rounding.weighed
                if job.launch is not None:
                    job.launch.send(recovery_task(job, plan, folder, weighed))
                    team = job.launch.team(job.recovery_sharded)
                else:
                    model = student = None  # the processes have their own
                    recover_together(job, plan, folder, weighed=weighed)
                    if not is_finished(stage):
                        raise NotFiniteError("a number in the recovery is not finite (recovery.log in the work folder)")
            with _shown_by_the_first(team, round(schedule.budget)) as progress:
                how = {"schedule": schedule, "seed": seed, "team": team or ALONE, "progress": progress}
                outcome: Recovered | Distilled
                if stage.name.startswith("distil"):
                    repairs, outcome = recover_rounded(model, student, changed, texts, stage, **how)
                else:
                    outcome = recover(model, load_student, ranks, factors, texts, stage, **how)
                    factors = outcome.factors.beside(store)
            job.say(
                f"5/6 recover: {outcome.steps} steps of {outcome.tokens} tokens, {outcome.tokens / texts.numel():.2g} times the "
                f"text; KL divergence {outcome.first_divergence:.3f} to {outcome.last_divergence:.3f} nats on it"
                f"{reused(int(outcome.reused), 1)}"
            )
            done["recover"] = {
                **({"minutes": settings.recover_minutes} if settings.recover_minutes else {}),
                "tokens": outcome.tokens,
                "steps": outcome.steps,
                "divergence": [outcome.first_divergence, outcome.last_divergence],
            }
    return Improved(factors, repairs, done)


def _shown_by_the_first(team: Team | None, total: int) -> AbstractContextManager[Callable[[int], None]]:
    return nullcontext(lambda done: None) if team is not None and team.index else progress_bar(total, "5/6 recover")


def _schedule(job: Job) -> Schedule:
    settings = job.recipe.factorization
    return Schedule(
        seconds=60 * settings.recover_minutes,
        tokens=settings.recover_tokens,
        batch_tokens=settings.recover_batch_tokens,
        pass_tokens=job.recipe.calibration.batch_tokens,
        recompute=settings.recover_recompute,
    )


@contextmanager
def _if_finite(name: str, say: Say) -> Iterator[None]:
    """Leave out an improvement in which a number is not finite, and say so."""
    try:
        yield
    except NotFiniteError as error:
        say(f"5/6 {name}: given up, since {error}")


def validate_improved(job: Job, tuned: Tuned, improved: Improved, store: PlanSource, rounding: Rounding) -> tuple[Improved, float]:
    """Return what is kept of an improvement, and its validation perplexity, which is not above that of the search.

    Where all of it is worse than the search, the factors are tried without the repairs, and then given up.
    """
    candidate = tuned.chosen.candidate
    searched = candidate.perplexity
    tried = [improved] if improved.done else []
    before = {step: value for step, value in improved.done.items() if step in ("propagate", "refine")}
    if improved.repairs is not None and before:
        tried.append(Improved(improved.factors, None, before))
    for kept in tried:
        found = tuned.validation(job.compressed_model(candidate.plan, kept.factors, rounding, kept.repairs)).perplexity
        better = found <= searched
        worse = "" if better else "; worse, so it is given up"
        job.say(f"5/6 improved ({', '.join(kept.done)}): validation perplexity {searched:.2f} to {found:.2f}{worse}")
        if better:
            return kept, found
    return Improved(store, None, {}), searched
