"""Every error that lrserve raises on purpose. A message says what is wrong, where, and the next step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

_SHOWN: Final = 100  # characters of a value that was refused
_TOLD: Final = 300  # characters of a library's message


class LrserveError(Exception):
    """Base of every deliberate error. The command line prints it as one line and exits with code 2."""


class InputError(LrserveError):
    """The model, the text or an option cannot be used as given."""


class UnsupportedModelError(InputError):
    """The architecture is not one that lrserve knows how to factorize, export and serve."""


class InfeasibleTargetError(LrserveError):
    """No rank plan meets the requested ratio, speedup or perplexity limit."""


class CalibrationError(LrserveError):
    """The activations or their covariances are unusable (not finite, or no token was seen)."""


class NotFiniteError(CalibrationError):
    """A number is infinite or none at all. Where a part of the model alone depends on it, that part is left as it was."""


class ArtifactError(LrserveError):
    """An exported folder is damaged, incomplete, of another format version, or may not be written."""


class EngineError(LrserveError):
    """The serving engine is missing, of an untested version, or failed; the message ends with its log's last lines."""


class AgreementError(LrserveError):
    """An exported rendering computes something else than the model in memory; the export is not published."""


def shown(value: Any, most: int = _SHOWN) -> str:
    """Return a value for a message: `repr`, cut to `most` characters."""
    text = repr(value)
    return text if len(text) <= most else text[:most] + "..."


def one_line(error: BaseException) -> str:
    """Return a library's exception for a message: its class and its words, on one line of at most 300 characters."""
    words = " ".join(str(getattr(error, "strerror", None) or error).split())  # an OSError's own words repeat the path
    text = f"{type(error).__name__}: {words}" if words else type(error).__name__
    return text if len(text) <= _TOLD else text[: _TOLD - 3] + "..."


def listed(parts: Sequence[object], between: str = "; ", most: int = 3) -> str:
    """Return the first parts for a message, and how many there are besides."""
    more = f" and {len(parts) - most} more" if len(parts) > most else ""
    return between.join(map(str, parts[:most])) + more


@contextmanager
def reading(file: Path | str, advice: str, raised: type[LrserveError] = InputError) -> Iterator[None]:
    """Name a user's file in whatever a library raises while it reads it: the boundary between such files and lrserve.

    Only a call that reads or interprets the file belongs into the block: a fault of lrserve's own would be blamed on the file.

    Args:
        file: its path, or what the user called it.
        advice: the next step.
        raised: class of the error.

    Raises:
        LrserveError: of class `raised`; one that lrserve raised on purpose passes unchanged.
    """
    try:
        yield
    except (LrserveError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # tokenizers panic outside of Exception
        raise raised(f"{file} cannot be read: {one_line(error)}; {advice}") from error
