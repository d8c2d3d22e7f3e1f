"""The databases that keep studies: opened with patience, and their errors in one line."""

from __future__ import annotations

import sqlite3
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import optuna
from optuna.exceptions import StorageInternalError
from sqlalchemy import make_url
from sqlalchemy.exc import SQLAlchemyError

from lrserve.errors import ArtifactError, InputError

_HEARTBEAT_SECONDS: Final = 60
_GRACE_SECONDS: Final = 240
_ATTEMPTS: Final = 3
_PATIENCE_SECONDS: Final = 60  # with a program that holds the database
_LONGEST_REASON: Final = 200
_DATABASE_ERRORS: Final = (SQLAlchemyError, sqlite3.Error, StorageInternalError)
_NEXT_STEPS: Final[Mapping[str, str]] = {
    "locked": f"another program has held it for {_PATIENCE_SECONDS} s: end that",
    "full": "make room",
    "disk I/O": "make room, or check the disk",
    "readonly": "make it writable",
    "malformed": "it will be made anew",
    "not a database": "it will be made anew",
}


@contextmanager
def quietly(category: type[Warning] = optuna.exceptions.ExperimentalWarning) -> Iterator[None]:
    """Hide what optuna says of experimental features, or another kind of warning: nothing that the user can do anything about."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", category)
        yield


def in_file(path: Path) -> Any:
    """Open the storage in a SQLite file, whatever characters are in its path; waits while another program holds it."""
    with quietly():
        return optuna.storages.RDBStorage(
            "sqlite:///", {"creator": lambda: sqlite3.connect(path, timeout=_PATIENCE_SECONDS, check_same_thread=False)}
        )


class _Shared(optuna.storages.RDBStorage):
    """A shared database; a heartbeat that does not reach it is followed by the next one, where optuna's would be the last."""

    def record_heartbeat(self, trial_id: int) -> None:
        """Note that a trial's worker lives."""
        with suppress(*_DATABASE_ERRORS):
            super().record_heartbeat(trial_id)


@contextmanager
def study_errors_named(place: str) -> Iterator[None]:
    """Turn errors of the study's database into one line about the `place` where it is kept.

    Raises:
        ArtifactError: it is locked, full, damaged, or out of reach.
    """
    try:
        yield
    except _DATABASE_ERRORS as error:
        cause = getattr(error, "orig", None) or error.__cause__ or error  # what the driver said, without the statement
        reason = " ".join(str(getattr(cause, "orig", None) or cause).split())[:_LONGEST_REASON]
        step = next((step for words, step in _NEXT_STEPS.items() if words in reason), "see that it works")
        raise ArtifactError(f"the study's database in {place} failed: {reason}; {step}; the same command then goes on") from error


def without_password(url: str) -> str:
    """Return the URL of a database as it may be shown."""
    return make_url(url).render_as_string()


def connect(url: str) -> Any:
    """Open the storage of studies at a URL; makes its tables if need be.

    Raises:
        InputError: no database there, or no driver for it.
    """
    for attempt in range(_ATTEMPTS):
        try:
            with quietly():
                return _Shared(
                    url,
                    {"connect_args": {"timeout": _PATIENCE_SECONDS}} if url.startswith("sqlite") else None,
                    heartbeat_interval=_HEARTBEAT_SECONDS,
                    grace_period=_GRACE_SECONDS,
                )
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
