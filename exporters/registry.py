"""Exporters by name: the entry points of the group `lrserve.exporters`, found without importing them."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from importlib import metadata

from lrserve.errors import InputError, shown


def exporter_points(names: Sequence[str]) -> list[metadata.EntryPoint]:
    """Return the entry points of exporters, each once.

    Raises:
        InputError: an unknown name.
    """
    points = {point.name: point for point in metadata.entry_points(group="lrserve.exporters")}
    for name in names:
        if name not in points:
            close = get_close_matches(name, points, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise InputError(f"no exporter named {shown(name)}; --export takes {', '.join(sorted(points))}{hint}")
    return [points[name] for name in dict.fromkeys(names)]
