"""Keep a run's table in bench/results/: NAME.json holds the figures and NAME.md the table.

Both files give the command, the commit, the date, the machine and the versions of what ran.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from lrserve.engines.workloads import MixComparison
from lrserve.plugins.versions import engine_version, onnx_version
from lrserve.report.card import speedup_cell, table
from lrserve.report.machine import day, describe, made
from lrserve.storage.store import atomic_path, write_json

ROOT: Final = Path(__file__).resolve().parent.parent
RESULTS: Final = ROOT / "bench" / "results"


def add_results_option(parser: argparse.ArgumentParser) -> None:
    """Give a script `--results NAME`."""
    parser.add_argument("--results", type=_name, metavar="NAME", help="write bench/results/NAME.json and NAME.md as well")


def _name(value: str) -> str:
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", value):
        raise argparse.ArgumentTypeError(f"{value!r} is no file name; use small letters, digits, dots and hyphens")
    commit()  # a run may last for hours, in which others commit
    return value


def command_line() -> str:
    """Return the command that started this script."""
    return shlex.join(["python", f"bench/{Path(sys.argv[0]).name}", *sys.argv[1:]])


@functools.cache
def commit() -> str:
    """Return the commit of this checkout at the first call; `-dirty` where code differs from it or is not in it."""
    head = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--", "lrserve", "exporters", "bench", "pyproject.toml", ":(exclude)bench/results")
    return f"{head}-dirty" if changed else head


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def versions() -> dict[str, str]:
    """Return the versions of lrserve and of what it ran on."""
    named = {name: metadata.version(name) for name in ("lrserve", "torch", "transformers")}
    engines = (text.partition(" ")[::2] for text in (engine_version(), onnx_version()))
    return named | dict(engines)


def conclude(name: str | None, markdown: str, data: Any) -> None:
    """Print a script's table and, for programs, its figures as one line of JSON; `publish` both where --results names them."""
    print(markdown)
    if name:
        publish(name, command_line(), markdown, data)
    print(json.dumps(data))


def conclude_beside(name: str | None, engine: str, first: str, others: Mapping[str, MixComparison]) -> None:
    """`conclude` with a table of engines that were measured in turns with a first one, a line each by their labels."""
    results = {label: mix.to_json() for label, mix in others.items()}
    lines = [[label, *map(speedup_cell, [*mix["workloads"].values(), mix])] for label, mix in results.items()]
    workloads = next(iter(others.values())).workloads
    seconds = ", ".join(f"{load} {statistics.median(run.seconds for run in pair.dense):.2f} s" for load, pair in workloads.items())
    markdown = f"{engine}, throughput over {first} ({seconds})\n\n{table(['', *workloads, 'all workloads'], lines)}\n"
    conclude(name, markdown, results)


def publish(name: str, command: str, markdown: str, data: Any, *, folder: Path | None = None) -> None:
    """Write NAME.json and NAME.md into bench/results/, or into another folder.

    Args:
        name: of the two files.
        command: what ran.
        markdown: the table, with what a reader has to know of it.
        data: the figures behind the table; JSON.
        folder: None is bench/results/.
    """
    found: Mapping[str, Any] = {
        "name": name,
        "command": command,
        "commit": commit(),
        **made(),
        "versions": versions(),
        "data": data,
    }
    folder = folder or RESULTS
    folder.mkdir(exist_ok=True)
    write_json(folder / f"{name}.json", found)
    with atomic_path(folder / f"{name}.md") as partial:
        partial.write_text(f"# {name}\n\n{caption(found)}\n\n{markdown.strip()}\n", encoding="utf-8")


def caption(found: Mapping[str, Any]) -> str:
    """Render what ran, where and when as a list."""
    lines = [
        f"Command: `{found['command']}`",
        f"Commit {found['commit'][:7]}{'-dirty' * found['commit'].endswith('-dirty')}, {day(found)}",
        f"Machine: {describe(found['machine'])}",
        f"Versions: {', '.join(' '.join(pair) for pair in found['versions'].items())}",
    ]
    return "\n".join(f"- {line}" for line in lines)
