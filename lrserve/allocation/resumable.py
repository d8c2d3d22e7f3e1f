"""Optuna studies in a SQLite file that a killed process leaves usable: what each search of ranks asks of optuna.

Suggestions come from a sampler that is made afresh for each trial, seeded by the run's seed and the number of finished trials. So a
resumed study goes on as if it had not been interrupted.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna


def open_study(name: str, path: Path) -> optuna.Study:
    """Make or load a study that minimises one value; trials that an earlier process died in are marked as failed."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(study_name=name, storage=f"sqlite:///{path}", direction="minimize", load_if_exists=True)
    for trial in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
    return study


def ask(study: optuna.Study, sampler: optuna.samplers.BaseSampler, parameters: Mapping[str, Any] | None) -> optuna.Trial:
    """Begin a trial: of these parameters, or of the sampler's."""
    study.sampler = sampler
    # a process that died between enqueueing and asking has left its trial waiting
    if parameters is not None and not study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.WAITING,)):
        study.enqueue_trial(dict(parameters))
    return study.ask()


def gp_sampler(seed: int, random_trials: int = 10) -> optuna.samplers.BaseSampler:
    """Return a Gaussian process sampler (Matern 5/2, log expected improvement) for values without noise."""
    with warnings.catch_warnings():  # that it is experimental is nothing that the user can do anything about
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.GPSampler(seed=seed, n_startup_trials=random_trials, deterministic_objective=True)
