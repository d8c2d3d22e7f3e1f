"""What `lrserve eval` shows: the table, eval.md, and the section of the model card, of the figures that serving/eval.py has."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from lrserve.inputs.cloze import CLOZE
from lrserve.report.card import Rows, table
from lrserve.report.machine import day
from lrserve.storage.store import atomic_path

_HEADER: Final = ("task", "metric", "items", "dense", "compressed", "recovery", "")
_HEADING: Final = "## Tasks"
_SECTION: Final = re.compile(rf"^{_HEADING}\n.*?(?=^## |\Z)", re.M | re.S)
_BEFORE: Final = re.compile(r"^## Serve$", re.M)
_LEGEND: Final = """\
Recovery is the compressed metric in % of dense (dense in % of compressed where lower is better); ± is one standard error.
`within noise`: less than 1.96 standard errors of the difference, taken item by item where that is possible.
`dense at chance`: the dense model is not shown to do better than guessing, so recovery says nothing."""
_CLOZE_LEGEND: Final = f"""
`{CLOZE}`: which of four sentences follows a passage, made from text that no step has seen."""


def eval_table(figures: Mapping[str, Any]) -> str:
    """Return the figures of `eval` as a Markdown table, and below it what was compared, with what and when."""
    models = figures["models"]
    return f"{_table(figures['tasks'])}\n\n- dense: {models['dense']}; compressed: {models['compressed']}\n- {_conditions(figures)}"


def write_eval(figures: Mapping[str, Any], folder: Path) -> None:
    """Write eval.md into a folder that is there."""
    models = figures["models"]
    with atomic_path(folder / "eval.md") as partial:
        partial.write_text(f"# {models['compressed']} against {models['dense']}\n\n{eval_table(figures)}\n", encoding="utf-8")


def card_with_tasks(card: str, tasks: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a model card with the section of these tasks (`eval` of metrics.json), in the place of one that it has."""
    by_conditions: dict[str, list[str]] = {}
    for name, task in tasks.items():
        by_conditions.setdefault(_conditions(task), []).append(name)
    made = "\n".join(f"- {', '.join(names)}: against {_dense(tasks, names)}; {line}" for line, names in by_conditions.items())
    section = f"{_HEADING}\n\n{_table(tasks)}\n\n{made}\n\n"
    rest = _SECTION.sub("", card)
    found = _BEFORE.search(rest)
    place = found.start() if found else len(rest)
    return f"{rest[:place]}{section}{rest[place:]}" if found else f"{rest.rstrip()}\n\n{section.rstrip()}\n"


def _table(tasks: Mapping[str, Mapping[str, Any]]) -> str:
    return f"{table(_HEADER, _rows(tasks))}\n\n{_LEGEND}{_CLOZE_LEGEND if CLOZE in tasks else ''}"


def _dense(tasks: Mapping[str, Mapping[str, Any]], names: list[str]) -> str:
    return ", ".join(dict.fromkeys(str(tasks[name]["dense"]) for name in names))


def _rows(tasks: Mapping[str, Mapping[str, Any]]) -> Rows:
    rows = []
    for name, task in tasks.items():
        title = f"{name}, {task['shots']} shots" if task["shots"] else name
        for metric, found in task["metrics"].items():
            recovery = "" if found["recovery"] is None else f"{found['recovery']:.1%}"
            down = "" if found["higher_is_better"] else " (lower is better)"
            values = [_value(found[side]) for side in ("dense", "compressed")]
            rows.append([title, f"{metric}{down}", str(task["items"]), *values, recovery, found["verdict"]])
    return rows


def _value(found: Mapping[str, Any]) -> str:
    error = "" if found["stderr"] is None else f" ± {found['stderr']:.3f}"
    return f"{found['value']:.3f}{error}"


def _conditions(figures: Mapping[str, Any]) -> str:
    return f"{figures['engine']}, {figures['dtype']}; {day(figures['made'])}"
