"""Where --report writes."""

from __future__ import annotations

from pathlib import Path

from lrserve.errors import InputError


def make_report_folder(report: Path, artifact: Path) -> None:
    """Make the folder of --report, before the work; it may be there already.

    Raises:
        InputError: it cannot be made, or lies in the artifact, whose loads refuse files that the manifest does not name.
    """
    place = report.resolve()
    if artifact.resolve() in (place, *place.parents):
        raise InputError(f"--report {report} lies in the artifact {artifact}, which has to stay as it was exported; choose another")
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"no folder {report} can be made for --report: {error.strerror}") from error
