"""One of several parts of a calibration: its name, and which sequences it has."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from lrserve.errors import InputError, shown

_TEXT: Final = re.compile(r"(\d{1,6})/(\d{1,6})", re.ASCII)
_FOLDER: Final = re.compile(r"shard-(\d{1,6})-of-(\d{1,6})", re.ASCII)


@dataclass(frozen=True)
class Shard:
    """The `index`-th of `count` parts, from 1."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read `I/N`.

        Raises:
            InputError: it is something else.
        """
        found = _TEXT.fullmatch(text)
        shard = cls(*map(int, found.groups())) if found else cls(0, 0)
        if not 1 <= shard.index <= shard.count:
            raise InputError(f"--shard: must be I/N with I from 1 to N, such as 2/8; got {shown(text)}")
        return shard

    @classmethod
    def of_folder(cls, name: str) -> Shard | None:
        """Return the shard whose folder has this name; None if no shard's has."""
        found = _FOLDER.fullmatch(name)
        return cls(int(found[1]), int(found[2])) if found else None

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @property
    def folder(self) -> str:
        """Name of its folder below the work folder."""
        return f"shard-{self.index}-of-{self.count}"

    def inputs(self, whole: Mapping[str, Any]) -> dict[str, Any]:
        """Identify what it collects, given what identifies that of all shards."""
        return {**whole, "shard": str(self)}

    def part(self, items: int, step: int) -> slice:
        """Return its part of so many items, whole steps of them; the last step may be smaller. It may be empty."""
        steps = -(-items // step)
        first, last = (steps * index // self.count for index in (self.index - 1, self.index))
        return slice(first * step, min(last * step, items))
