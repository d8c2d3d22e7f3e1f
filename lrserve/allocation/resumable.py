"""Optuna studies that a killed process leaves usable: what each search of ranks asks of optuna.

Suggestions come from a sampler that is made afresh for each trial, seeded by the run's seed and the trial's index among those that
did not fail. So a resumed study goes on as if it had not been interrupted.
"""

from __future__ import annotations

import os
import socket
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import optuna
from optuna.trial import TrialState

from lrserve.errors import InputError

_HEARTBEAT_SECONDS: Final = 60
_GRACE_SECONDS: Final = 240
_ATTEMPTS: Final = 3
_LIVE: Final = (TrialState.COMPLETE, TrialState.RUNNING, TrialState.WAITING)


def open_study(name: str, storage: Path | str, metrics: Mapping[str, str] | None = None) -> optuna.Study:
    """Make or load a study.

    Args:
        name: of the study.
        storage: a SQLite file that this process alone uses; trials that an earlier one died in are marked as failed. Or the URL of
            a database whose study several processes share; trials there fail when their worker's heartbeat stops for four minutes.
        metrics: names and directions of the objectives; one value to minimise when None.

    Raises:
        InputError: no database at the URL, or no driver for it.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    directions = list(metrics.values()) if metrics else ["minimize"]
    with quietly():
        backend = connect(storage) if isinstance(storage, str) else f"sqlite:///{storage}"
        study = optuna.create_study(study_name=name, storage=backend, directions=directions, load_if_exists=True)
        if metrics:
            study.set_metric_names(list(metrics))
    if not isinstance(storage, str):
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            study.tell(trial.number, state=TrialState.FAIL)
    return study


def connect(url: str) -> Any:
    """Open the storage of studies at a URL; makes its tables if need be.

    Raises:
        InputError: no database there, or no driver for it.
    """
    for attempt in range(_ATTEMPTS):
        try:
            with quietly():
                return optuna.storages.RDBStorage(url, heartbeat_interval=_HEARTBEAT_SECONDS, grace_period=_GRACE_SECONDS)
        except Exception as error:  # of sqlalchemy, of the driver, or an import of it
            failure = error
        if attempt + 1 < _ATTEMPTS:
            time.sleep(1)  # several workers that make a new database's tables at once trip over each other
    scheme = url.partition(":")[0]
    first = str(failure).strip().splitlines()[0] if str(failure).strip() else type(failure).__name__
    raise InputError(
        f"--storage: no study can be kept at the {scheme} URL: {first}; it takes "
        "postgresql+psycopg://USER:PASSWORD@HOST/DATABASE, mysql+pymysql://... or sqlite:///FILE, and the driver named there "
        "has to be installed"
    ) from failure


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

    `origin` is kept as the user attribute of a trial that is made from `parameters`.
    """
    study.sampler = sampler
    # a process that died between enqueueing and asking has left its trial waiting
    if parameters is not None and not study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
        study.enqueue_trial(dict(parameters), user_attrs={"origin": origin} if origin else None)
    study.optimize(objective, n_trials=1)


def live(study: optuna.Study) -> int:
    """Count the trials that did not fail; of a shared study, those whose worker is gone do so now."""
    with quietly():
        optuna.storages.fail_stale_trials(study)
    return len(study.get_trials(deepcopy=False, states=_LIVE))


def gp_sampler(seed: int, random_trials: int = 10) -> optuna.samplers.BaseSampler:
    """Return a Gaussian process sampler (Matern 5/2, log expected improvement) for values without noise."""
    with quietly():
        return optuna.samplers.GPSampler(seed=seed, n_startup_trials=random_trials, deterministic_objective=True)


@contextmanager
def quietly(category: type[Warning] = optuna.exceptions.ExperimentalWarning) -> Iterator[None]:
    """Hide what optuna says of experimental features, or another kind of warning: nothing that the user can do anything about."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", category)
        yield
