"""Reading YAML that a user wrote: bounded in size, in nesting and in what its aliases stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import yaml

from lrserve.errors import InputError, reading, shown

MOST_BYTES: Final = 2**20
_MOST_VALUES: Final = 10_000  # with every alias written out
_DEEPEST: Final = 20  # lists and mappings inside each other


def read_settings(path: Path, what: str, advice: str) -> dict[str, Any]:
    """Read a YAML file that holds settings by name; an empty one holds none.

    Args:
        path: the file; a pipe will do.
        what: names the file in messages.
        advice: the next step, for messages.

    Raises:
        InputError: the file cannot be read, is no YAML, holds something else, or exceeds a bound.
    """
    with reading(f"{what} {shown(str(path), 300)}", "check the path"), path.expanduser().open("rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise InputError(f"{what} {path} has more than {MOST_BYTES} bytes; {advice}")
    with reading(f"{what} {path}", advice):
        loaded = load_modest(content.decode("utf-8"), f"{what} {path}")
    if loaded is not None and not isinstance(loaded, dict):
        raise InputError(f"{what} {path} holds a {type(loaded).__name__}, not settings by name; {advice}")
    return loaded or {}


def load_modest(text: str, where: str) -> Any:
    """Load a YAML document whose values and nesting are first counted, without building them.

    Raises:
        InputError: it is nested too deep, or stands for too many values.
        yaml.YAMLError, ValueError: it is no YAML, or a value in it is none.
    """
    sizes: dict[str | None, int] = {}
    outer: list[tuple[str | None, int]] = []  # of each list and mapping that is open: its anchor, and the values before it
    values = 0
    for event in yaml.parse(text):
        if isinstance(event, yaml.CollectionStartEvent):
            outer.append((event.anchor, values))
            values += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = outer.pop()
            sizes[anchor] = values - before
        elif isinstance(event, yaml.AliasEvent):
            if any(anchor == event.anchor for anchor, _ in outer):
                raise InputError(f"{where}: the value at &{event.anchor} contains itself; write it out")
            values += sizes.get(event.anchor, 0)
        elif isinstance(event, yaml.ScalarEvent):
            sizes[event.anchor] = 1
            values += 1
        if values > _MOST_VALUES:
            raise InputError(f"{where} stands for more than {_MOST_VALUES} values; leave out what is no setting")
        if len(outer) > _DEEPEST:
            raise InputError(f"{where} is nested more than {_DEEPEST} deep; leave out what is no setting")
    return yaml.safe_load(text)
