"""What a run costs by stage: seconds, and the memory of lrserve's own process, engines apart.

    python bench/cost.py                                the model and texts of README's table
    python bench/cost.py --recipe shape/recipe.yaml     another one, such as bench/shape.py writes

    seconds      from the line of the stage before to its own
    memory       MB that the process holds at the highest moment: what the machine has to have
    resident     MB of its pages in memory, those of mapped files too: weights and spectra on disk, which the kernel takes back
                 where memory is short

Both are read twenty times a second. Run it with nothing else on the machine. The last line is JSON.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from inputs import readme_recipe
from lrserve.report.card import table
from publishing import add_results_option, conclude

_PERIOD: Final = 0.05
_STAGES: Final = 6  # lines of stages begin with `2/6 `


def resident(process: int) -> tuple[int, int]:
    """Return bytes of a process: held, and resident with those of mapped files."""
    fields = {}
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.startswith(("VmRSS", "RssFile")):
            fields[name] = 1024 * int(value.split()[0])
    return fields.get("VmRSS", 0) - fields.get("RssFile", 0), fields.get("VmRSS", 0)


class Peaks:
    """Watches a process; `take` returns the highest figures since it was last called."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process, self._lock, self._highest = process, threading.Lock(), (0, 0)
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while self._process.poll() is None:
            try:
                found = resident(self._process.pid)
            except OSError:  # it has just ended
                return
            with self._lock:
                self._highest = max(self._highest[0], found[0]), max(self._highest[1], found[1])
            time.sleep(_PERIOD)

    def take(self) -> tuple[int, int]:
        """Return bytes held and resident, and begin anew."""
        with self._lock:
            found, self._highest = self._highest, (0, 0)
        return found


def run(recipe: Path, folder: Path, flags: Sequence[str]) -> list[dict[str, Any]]:
    """Run `lrserve compress-and-export` with a recipe; returns a row for each line of a stage."""
    lrserve = Path(sys.executable).with_name("lrserve")
    command = [lrserve, "compress-and-export", "--recipe", recipe, "-o", folder / "out", *flags]
    rows: list[dict[str, Any]] = []
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        peaks, began = Peaks(process), time.monotonic()
        for line in process.stdout:
            print(line, end="", flush=True)
            if line[1:3] != f"/{_STAGES}":
                continue
            now, (held, both) = time.monotonic(), peaks.take()
            rows.append({"stage": line.partition(":")[0].strip(), "seconds": now - began, "memory": held, "resident": both})
            began = now
    if process.returncode:
        raise SystemExit(f"the run ended with {process.returncode}")
    return rows


def merged(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each stage's name: its seconds added up, and its highest memory."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        own = found.setdefault(row["stage"], {"stage": row["stage"], "seconds": 0.0, "memory": 0, "resident": 0})
        own["seconds"] += row["seconds"]
        own["memory"], own["resident"] = max(own["memory"], row["memory"]), max(own["resident"], row["resident"])
    return list(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, help="[default: that of README's table]")
    parser.add_argument(
        "--folder", type=Path, help="of the artifact and the work folder, which stay there [default: a temporary one]"
    )
    parser.add_argument("flags", nargs="*", help="further flags of compress-and-export, after --")
    add_results_option(parser)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lrserve-") as temporary:
        flags = arguments.flags if arguments.recipe or arguments.flags else ["--min-speedup", "1.15"]
        rows = merged(run(arguments.recipe or readme_recipe(), arguments.folder or Path(temporary), flags))
    lines = [[r["stage"], f"{r['seconds']:.0f}", f"{r['memory'] / 1e6:.0f}", f"{r['resident'] / 1e6:.0f}"] for r in rows]
    total = [
        "all",
        f"{sum(r['seconds'] for r in rows):.0f}",
        *(f"{max(r[key] for r in rows) / 1e6:.0f}" for key in ("memory", "resident")),
    ]
    conclude(arguments.results, table(["stage", "seconds", "memory, MB", "resident, MB"], [*lines, total]) + "\n", rows)


if __name__ == "__main__":
    main()
