"""The work folder: finished stages are reused, changed inputs are noticed, two runs never share it."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lrserve.errors import ArtifactError
from lrserve.storage.store import fingerprint, write_json

_INPUTS = "inputs.json"


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Name the settings in which two nested mappings differ, with both values where these are short."""
    names = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            names += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            short = len(str(a)) < 40 and len(str(b)) < 40
            names.append(f"{prefix}{key} ({a} -> {b})" if short else f"{prefix}{key}")
    return names


class WorkFolder:
    """Holds one folder per stage and set of inputs."""

    def __init__(self, root: Path, say: Callable[[str], None]) -> None:
        self.root = root
        self._say = say

    def stage(self, name: str, inputs: Mapping[str, Any]) -> Path:
        """Return the folder of a stage that depends on exactly these inputs; says so when an earlier run's differ."""
        inputs = json.loads(json.dumps(inputs))
        folder = self.root / f"{name}-{fingerprint(inputs)[:12]}"
        if not (folder / _INPUTS).is_file():
            earlier = list(self.root.glob(f"{name}-*/{_INPUTS}"))
            if earlier:
                latest = max(earlier, key=lambda path: path.stat().st_mtime)
                changed = differences(json.loads(latest.read_text(encoding="utf-8")), inputs)
                self._say(f"{name}: made anew, since the last run here differs in {', '.join(changed)}")
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / _INPUTS, inputs)
        return folder


@contextmanager
def work_folder(root: Path, say: Callable[[str], None]) -> Iterator[WorkFolder]:
    """Open and lock a work folder.

    Raises:
        ArtifactError: it cannot be written, or another run is using it.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = (root / "lock").open("w")
    except OSError as error:
        raise ArtifactError(f"cannot write to the work folder {root}: {error.strerror}; choose another --work") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ArtifactError(f"another lrserve run is using {root}; wait for it or choose another --work") from None
        yield WorkFolder(root, say)
