"""The Optuna study: opens it, runs or resumes the trials of a search space, and reads them back.

Every suggestion is drawn from a sampler that is made afresh for each trial, seeded by the run's seed and the trial's index among
those that did not fail. So a resumed study, or one whose process was killed, goes on as if it had not been interrupted. A trial is
judged on the validation windows in two halves, and stopped after the first one where a finished plan that is at least as fast is
better on the same windows by three standard errors (`quality.Validation`).

A perplexity that is not finite makes a trial infeasible. Its objectives are infinite, which samplers take for the worst finite
ones, and no other trial is held against it.
"""

from __future__ import annotations

import math
import os
import socket
import sys
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState

from lrserve.allocation.database import connect, in_file, quietly
from lrserve.allocation.goal import Evaluated, Goal
from lrserve.allocation.plan import Plan
from lrserve.allocation.quality import Judgement
from lrserve.allocation.shared import Shared
from lrserve.allocation.space import SearchSpace
from lrserve.allocation.speed import SpeedModel
from lrserve.recipe import Search

_LIVE: Final = (TrialState.COMPLETE, TrialState.RUNNING)
_FEWEST_TRIALS = 8  # for importances
_SHORT = 6  # characters of the name of a machine, for people
_BEST = 0.25  # quantile of the trials that are told from the others: a tenth, as is usual, would be two of 24

STUDY = "lrserve"
"""Name of the study in a file of its own."""

Evaluate = Callable[[Plan, Sequence[Sequence[float]]], Judgement]
"""Judges a plan on the validation text; may stop early where it is surely worse than one of those rivals' window losses."""


def run_study(
    space: SearchSpace,
    goal: Goal,
    speed: SpeedModel,
    evaluate: Evaluate,
    search: Search,
    storage: Path | Shared,
    *,
    seed: int,
    progress: Callable[[int, Evaluated | None], None] = lambda done, last: None,
) -> list[Evaluated]:
    """Run or resume the study until it has `search.trials` finished trials, and return them in order.

    A trial that an earlier process died in is marked as failed; the finished ones are kept. A plan that was judged before is not
    judged again. Of a shared search, what was judged on other kinds of machines follows (`judged_elsewhere`).

    Args:
        space, goal, speed: where plans come from, what is optimised, and how fast plans are predicted to be.
        evaluate: judges a plan.
        search: number of trials and sampler.
        storage: a SQLite file, private to these inputs; or where workers with these inputs share a search.
        seed: of the samplers.
        progress: called after each trial with the number of finished ones.
    """
    others: Callable[[], list[Evaluated]] = list
    if isinstance(storage, Path):
        study, salt = open_study(STUDY, storage, goal.metrics), 0
    else:
        backend = connect(storage.url)
        study, salt = open_study(storage.name, backend, goal.metrics), worker_salt()
        others = partial(judged_elsewhere, storage, backend, space, speed)
    first = space.first_trials()
    done, elsewhere = finished(study), others()
    progress(len(done), None)
    while len(done) < search.trials:
        index = live(study)
        sampler = _sampler(search.sampler, seed * 1_000_003 + salt + index, len(space.bases))
        begun = _origins(study)  # not the first of so many: two workers that begin at once would leave the second out
        origin = next((name for name in first if name not in begun), "")
        run_trial(study, sampler, first.get(origin), _objective(space, goal, speed, evaluate, [*elsewhere, *done]), origin)
        done, elsewhere = finished(study), others()
        progress(len(done), done[-1])
    return [*done[: search.trials], *elsewhere]


def judged_elsewhere(place: Shared, backend: Any, space: SearchSpace, speed: SpeedModel) -> list[Evaluated]:
    """Return what workers on other kinds of machines found of plans that can be used here.

    Their speeds are predicted anew, for this machine. Trials that were stopped early are left out: what was faster than them there
    may be slower here.

    Args:
        place: where they share the search.
        backend: the database there, opened (`connect`).
        space, speed: of this machine.
    """
    found = []
    for name in optuna.get_all_study_names(backend):
        if name == place.name or not name.startswith(place.studies):
            continue
        machine = name.removeprefix(place.studies)[:_SHORT]
        for trial in finished(optuna.load_study(study_name=name, storage=backend)):
            if trial.complete and trial.finite and space.holds(trial.plan):
                here, origin = speed.tokens_per_second(trial.plan), f"{trial.origin} on machine {machine}"
                found.append(replace(trial, tokens_per_second=here, origin=origin, trial=None))
    return found


def _objective(
    space: SearchSpace, goal: Goal, speed: SpeedModel, evaluate: Evaluate, done: Sequence[Evaluated]
) -> Callable[[optuna.Trial], float | Sequence[float]]:
    """Return what one trial does, after those that are `done`; its clock starts now, before the sampler's."""
    known = {trial.plan.key(): trial for trial in done}
    began = time.perf_counter()

    def objective(trial: optuna.Trial) -> float | Sequence[float]:
        plan = space.suggest(trial)
        suggested = time.perf_counter()
        throughput, speedup = speed.tokens_per_second(plan), speed.speedup(plan)
        if before := known.get(plan.key()):
            found = Judgement(before.perplexity, before.nll, before.complete)
        else:
            rivals = [t for t in done if t.complete and t.finite and (goal.target.min_speedup or t.tokens_per_second >= throughput)]
            found = evaluate(plan, [rival.nll for rival in rivals])
        attributes: dict[str, Any] = {
            "levels": plan.to_json(),
            "structure": plan.structure,
            "embedding": plan.embedding,
            "perplexity": found.perplexity,
            "nll": list(found.nll),
            "complete": found.complete,
            "tokens_per_second": throughput,
            "speedup": speedup,
            "seconds": {"sampler": suggested - began, **found.seconds},
        }
        for key, value in attributes.items():
            trial.set_user_attr(key, value)
        with quietly():
            for key, value in goal.constraints(found.perplexity, speedup).items():
                trial.set_constraint(key, value)
        if goal.target.front:
            return goal.loss(found.perplexity), throughput if math.isfinite(found.perplexity) else -math.inf
        return goal.objective(found.perplexity, speedup)

    return objective


def _sampler(kind: str, seed: int, first: int) -> optuna.samplers.BaseSampler:
    if kind == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    if kind == "tpe":
        with quietly():
            return optuna.samplers.TPESampler(seed=seed, multivariate=True, n_startup_trials=max(6, first))
    return gp_sampler(seed, first)


def finished(study: optuna.Study) -> list[Evaluated]:
    """Return the finished trials, in order."""
    return [
        Evaluated(
            plan=Plan.from_json(trial.user_attrs["levels"], trial.user_attrs["structure"], trial.user_attrs.get("embedding")),
            perplexity=trial.user_attrs["perplexity"],
            tokens_per_second=trial.user_attrs["tokens_per_second"],
            origin=trial.user_attrs.get("origin", f"trial {trial.number}"),
            trial=trial.number,
            nll=tuple(trial.user_attrs["nll"]),
            complete=trial.user_attrs["complete"],
        )
        for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    ]


def study_of(storage: Path | Shared) -> optuna.Study:
    """Load a study from where `run_study` keeps it."""
    name, place = (STUDY, in_file(storage)) if isinstance(storage, Path) else (storage.name, storage.url)
    return optuna.load_study(study_name=name, storage=place)


def copy_study(shared: Shared, path: Path) -> None:
    """Copy a shared study into a SQLite file of its own, named `STUDY`."""
    optuna.copy_study(from_study_name=shared.name, from_storage=shared.url, to_storage=in_file(path), to_study_name=STUDY)


def time_spent(study: optuna.Study) -> dict[str, float]:
    """Return the seconds that finished trials spent, by what on: `sampler`, `weights`, `forward`."""
    total: Counter[str] = Counter()
    for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        total.update(trial.user_attrs["seconds"])
    return dict(total)


def importances(study: optuna.Study, goal: Goal) -> dict[str, dict[str, float]]:
    """Return which parameters decide the perplexity and the predicted speed, by PED-ANOVA (arXiv 2304.10255); each sums to 1.

    Empty where there are too few trials to say, or all are alike.
    """
    targets: Mapping[str, Callable[[Any], float]] = {
        "perplexity": lambda trial: goal.loss(min(trial.user_attrs["perplexity"], sys.float_info.max)),
        "speed": lambda trial: -trial.user_attrs["speedup"],  # the lower, the better, for both
    }
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    result: dict[str, dict[str, float]] = {}
    for name, target in targets.items():
        values = {target(trial) for trial in trials}
        if len(trials) < _FEWEST_TRIALS or len(values) < 2:
            result[name] = {}
            continue
        with quietly(UserWarning):  # that low values are taken for good ones
            evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=_BEST)
            result[name] = dict(optuna.importance.get_param_importances(study, evaluator=evaluator, target=target))
    return result


def open_study(name: str, storage: Any, metrics: Mapping[str, str] | None = None) -> optuna.Study:
    """Make or load a study.

    Args:
        name: of the study.
        storage: a SQLite file that this process alone uses; trials that an earlier one died in are marked as failed. Or a database
            whose study several processes share, by its URL or opened (`connect`); trials there fail when their worker's heartbeat
            stops for four minutes.
        metrics: names and directions of the objectives; one value to minimise when None.

    Raises:
        InputError: no database at the URL, or no driver for it.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # it warns, with a trace, of every trial that Ctrl-C or an error ends
    private = isinstance(storage, Path)
    directions: list[Any] = list(metrics.values()) if metrics else ["minimize"]
    with quietly():
        backend = connect(storage) if isinstance(storage, str) else in_file(storage) if private else storage
        study = optuna.create_study(study_name=name, storage=backend, directions=directions, load_if_exists=True)
        if metrics:
            study.set_metric_names(list(metrics))
    if private:
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            study.tell(trial.number, state=TrialState.FAIL)
    return study


def worker_salt() -> int:
    """Return a number that tells this process from the others that share a study."""
    return zlib.crc32(f"{socket.gethostname()} {os.getpid()}".encode())


def run_trial(
    study: optuna.Study,
    sampler: optuna.samplers.BaseSampler,
    parameters: Mapping[str, Any] | None,
    objective: Callable[[optuna.Trial], float | Sequence[float]],
    origin: str = "",
) -> None:
    """Run one trial: of these parameters, or of the sampler's. If `objective` raises, the trial fails and the exception goes on.

    A trial that other workers took for dead, whose heartbeat did not reach the database for minutes, has failed; that is no error.

    `origin` is kept as the user attribute of a trial that is made from `parameters`.
    """
    if parameters is not None:  # not enqueued: workers that share the study could both be given a trial that waits
        with quietly():
            sampler = optuna.samplers.PartialFixedSampler(dict(parameters), sampler)
    study.sampler = sampler

    lost = False

    def named(trial: optuna.Trial) -> float | Sequence[float]:
        nonlocal lost
        try:
            if origin:
                trial.set_user_attr("origin", origin)
            return objective(trial)
        except UpdateFinishedTrialError:
            lost = True
            raise

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Clip non-finite values")  # which is what they are infinite for
        try:
            study.optimize(named, n_trials=1)
        except ValueError:  # of telling the end of a trial that has one
            if not lost:
                raise


def live(study: optuna.Study) -> int:
    """Count the trials that did not fail; of a shared study, those whose worker is gone do so now."""
    with quietly():
        optuna.storages.fail_stale_trials(study)
    return len(study.get_trials(deepcopy=False, states=_LIVE))


def _origins(study: optuna.Study) -> set[Any]:
    """Return the origins of the trials that did not fail."""
    return {trial.user_attrs.get("origin") for trial in study.get_trials(deepcopy=False, states=_LIVE)}


def gp_sampler(seed: int, random_trials: int = 10) -> optuna.samplers.BaseSampler:
    """Return a Gaussian process sampler (Matern 5/2, log expected improvement) for values without noise."""
    with quietly():
        return optuna.samplers.GPSampler(seed=seed, n_startup_trials=random_trials, deterministic_objective=True)
