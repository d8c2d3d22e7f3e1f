"""What a user calls a text: a file or folder with what stands behind its colon, or a dataset on the Hub. Opens nothing."""

from __future__ import annotations

import os
from typing import NamedTuple


class DatasetName(NamedTuple):
    """A dataset, `NAME:CONFIG:SPLIT:COLUMN`: its name on the Hub or its folder, and what to read of it; None is the default."""

    place: str
    config: str | None
    split: str | None
    column: str | None


def on_disk(origin: str) -> tuple[str, str] | None:
    """Return the longest part of an origin, up to a colon, at which something is on disk, and what follows that colon.

    So `data.parquet:content` is the column `content` of a file, unless a file has the whole as its name. None where there is
    nothing on disk.
    """
    place, rest = os.path.expanduser(origin), ""  # unlike pathlib's, neither this nor what follows raises for strange names
    while not os.path.exists(place):
        place, colon, tail = place.rpartition(":")
        if not colon:
            return None
        rest = f"{tail}:{rest}" if rest else tail
    return place, rest


def dataset_name(place: str, rest: str) -> DatasetName | None:
    """Split what follows a dataset's name at the colons; None for more parts than a dataset has."""
    parts = [part or None for part in rest.split(":")]
    if len(parts) > 3:
        return None
    return DatasetName(place, *parts, *[None] * (3 - len(parts)))


def hub_dataset(origin: str) -> DatasetName | None:
    """Return the dataset on the Hub that an origin names; None where no dataset can have such a name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    place, _, rest = origin.partition(":")
    try:
        validate_repo_id(place)
    except HFValidationError:
        return None
    return dataset_name(place, rest)
