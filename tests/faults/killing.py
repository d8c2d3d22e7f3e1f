"""Full runs of a tiny model in processes of their own, which can be killed, and what must be true of the run after.

`python killing.py WORK REFERENCE ARGUMENTS` runs `lrserve ARGUMENTS`. Times of layers and throughputs of plans are measured by the
engines as ever; what is then written down in the work folder are the figures that the run with the work folder REFERENCE wrote.
So two runs decide alike, and their results can be compared byte by byte.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import lrserve

PATIENCE = 60  # seconds that engines may outlive the run that is killed
_MARK = "LRSERVE_KILLED_RUN"
_CODE = Path(lrserve.__file__).parents[1]
_COMPARED = ("*.safetensors", "onnx/*.onnx*", "config.json", "lrserve/plan.json")
_OF_LIBRARIES = ("torchinductor_", ".ses")  # compiled kernels, for the next process; the session of ONNX Runtime's telemetry


@dataclass(frozen=True)
class Place:
    """A folder with a model, a text and a recipe, and with all that the runs in it write.

    `root`/tmp holds their temporary files, `root`/home their caches; they run in `root`/cwd.
    """

    root: Path
    recipe: dict[str, Any]

    def __post_init__(self) -> None:
        for name in ("tmp", "home", "outs", "cwd"):
            (self.root / name).mkdir(exist_ok=True)
        (self.root / "recipe.yaml").write_text(yaml.safe_dump(self.recipe), encoding="utf-8")

    def out(self, name: str) -> Path:
        return self.root / "outs" / name

    def work(self, name: str) -> Path:
        return self.root / f"{name}.work"

    def start(self, name: str, reference: str | None = None) -> subprocess.Popen[str]:
        """Start a run; its lines come on standard output."""
        root, home = self.root, self.root / "home"
        own = {"TMPDIR": root / "tmp", "HOME": home, "LRSERVE_CACHE": home / "lrserve", "PYTHONPATH": _CODE, _MARK: root}
        environment = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", **os.environ, **{key: str(value) for key, value in own.items()}}
        replayed = "-" if reference is None else str(self.work(reference))
        arguments = ["--recipe", root / "recipe.yaml", "-o", self.out(name), "--work", self.work(name), "--overwrite"]
        command = [sys.executable, __file__, self.work(name), replayed, "compress-and-export", *arguments]
        return subprocess.Popen(
            list(map(str, command)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            cwd=root / "cwd",
        )

    def run(self, name: str, reference: str | None = None) -> list[str]:
        """Run to the end, which must be good; returns the lines."""
        process = self.start(name, reference)
        text, _ = process.communicate()
        assert process.returncode == 0, text
        return text.splitlines()

    def kill_at_line(self, name: str, beginning: str, reference: str) -> None:
        """Start a run and kill it when it says a line that begins so."""
        process = self.start(name, reference)
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith(beginning):
                break
        kill(process)
        assert process.returncode == -signal.SIGKILL, "".join(lines)
        self.wait_for_engines()

    def wait_for_engines(self) -> None:
        """Wait until no process of a run here is alive; they have to end by themselves."""
        deadline = time.monotonic() + PATIENCE
        while left := list(self._processes()):
            assert time.monotonic() < deadline, f"processes {left} outlive their run"
            time.sleep(0.2)

    def _processes(self) -> Iterator[int]:
        mark = f"{_MARK}={self.root}".encode()
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                if mark in path.read_bytes().split(b"\0"):
                    yield int(path.parent.name)
            except OSError:  # it has ended, or is another user's
                continue

    def strays(self) -> list[str]:
        """Name what lies about that is no artifact, work folder or cache, and not of a library."""
        temporary = [path for path in (self.root / "tmp").iterdir() if not path.name.startswith(_OF_LIBRARIES)]
        unexpected = list((self.root / "cwd").iterdir())
        hidden = [path for path in (self.root / "outs").iterdir() if path.name.startswith(".")]
        partial = list(self.root.rglob("*.partial-*"))
        return sorted(str(path.relative_to(self.root)) for path in {*temporary, *unexpected, *hidden, *partial})

    def unlike(self, name: str, reference: str) -> list[str]:
        """Name the files of weights, graphs and plan in which two artifacts differ."""
        ours, theirs = (contents(self.out(each)) for each in (name, reference))
        assert theirs
        return sorted(path for path in {*ours, *theirs} if ours.get(path) != theirs.get(path))


def contents(out: Path) -> dict[str, bytes]:
    """Return weights, graphs and plan of an artifact by their paths in it."""
    return {str(path.relative_to(out)): path.read_bytes() for pattern in _COMPARED for path in out.glob(pattern)}


def kill(process: subprocess.Popen[str]) -> None:
    """Kill a process, but none that it started, and wait for it."""
    process.kill()
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _replay(work: Path, reference: Path) -> None:
    from lrserve.pipeline import measure

    write = measure.write_json

    def write_or_replay(path: Path, data: Any) -> None:
        recorded = reference / path.relative_to(work)
        write(path, json.loads(recorded.read_text(encoding="utf-8")) if recorded.is_file() else data)

    measure.write_json = write_or_replay  # type: ignore[attr-defined]


if __name__ == "__main__":
    from lrserve.cli import main

    work, reference, *arguments = sys.argv[1:]
    if reference != "-":
        _replay(Path(work), Path(reference))
    sys.argv = ["lrserve", *arguments]
    main()
