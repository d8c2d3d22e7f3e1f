"""The work folder: finished stages are reused, changed inputs are noticed, two runs never share it."""

from __future__ import annotations

import fcntl
import inspect
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from lrserve.errors import ArtifactError
from lrserve.storage.sound import damage
from lrserve.storage.store import fingerprint, flush, write_json

_INPUTS = "inputs.json"
_CONSTANT = re.compile(r"_?[A-Z][A-Z0-9_]*")


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


def settings_of(*modules: ModuleType) -> dict[str, dict[str, Any]]:
    """Return the numbers, strings and other plain values that modules hold as their settings; JSON.

    By module, without the package's name: its constants by their names (`_DAMPING`), and the defaults of its functions and methods
    by function and parameter (`adam.learning_rate`). A plain value is None, a bool, a number, a string, or a sequence or mapping
    of such.
    """
    return {module.__name__.partition(".")[2]: _settings(module) for module in modules}


def _settings(module: ModuleType) -> dict[str, Any]:
    found = {name: value for name, value in vars(module).items() if _CONSTANT.fullmatch(name)}
    own = [value for value in vars(module).values() if getattr(value, "__module__", None) == module.__name__]
    members = [member for value in own if inspect.isclass(value) for member in vars(value).values()]
    for function in (*own, *members):
        function = getattr(function, "__func__", function)  # of a static or class method
        if inspect.isfunction(function):
            for parameter in inspect.signature(function).parameters.values():
                if parameter.default is not parameter.empty:
                    found[f"{function.__qualname__}.{parameter.name}"] = parameter.default
    return {name: found[name] for name in sorted(found) if _is_plain(found[name])}


def _is_plain(value: object) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(entry) for key, entry in value.items())
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


class WorkFolder:
    """Holds one folder per stage and set of inputs.

    Args:
        root: the work folder.
        say: receives a line when a stage is made anew.
        modules: by a stage's name, those that compute what it holds; a stage without an entry depends on all of them.
    """

    def __init__(self, root: Path, say: Callable[[str], None], modules: Mapping[str, Sequence[ModuleType]] = {}) -> None:
        self.root = root
        self._modules = modules
        self._say = say

    def stage(self, name: str, inputs: Mapping[str, Any]) -> Path:
        """Return the folder of a stage that depends on exactly these inputs and on the settings of its modules.

        Says so when an earlier run's differ.
        """
        inputs = self._all_inputs(name, inputs)
        folder = self._place(name, inputs)
        if folder.is_dir():
            self._remove_damaged(name, folder)
        elif changed := self._differences(name, inputs):
            self._say(f"{name}: made anew, since the last run here differs in {', '.join(changed)}")
        if not (folder / _INPUTS).is_file():
            folder.mkdir(parents=True, exist_ok=True)
            flush(self.root)
            write_json(folder / _INPUTS, inputs)
        return folder

    def place(self, name: str, inputs: Mapping[str, Any]) -> Path:
        """Return where the folder of such a stage is, if it was made; its name identifies the inputs and the modules' settings."""
        return self._place(name, self._all_inputs(name, inputs))

    def _place(self, name: str, all_inputs: Mapping[str, Any]) -> Path:
        return self.root / f"{name}-{fingerprint(all_inputs)[:12]}"

    def _all_inputs(self, name: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        modules = self._modules.get(name) or {module for own in self._modules.values() for module in own}
        found: dict[str, Any] = json.loads(json.dumps({**inputs, "code": settings_of(*modules)}))
        return found

    def _differences(self, name: str, inputs: Mapping[str, Any]) -> list[str]:
        """Name the inputs of a stage in which the latest one of the same name differs."""
        for path in sorted(self.root.glob(f"{name}-*/{_INPUTS}"), key=lambda path: path.stat().st_mtime, reverse=True):
            if damage(path) is None:
                return differences(json.loads(path.read_text(encoding="utf-8")), inputs)
        return []

    def _remove_damaged(self, name: str, folder: Path) -> None:
        """Remove what does not count as made, so that it is made anew; says so."""
        for path in sorted(folder.iterdir()):
            if found := damage(path):
                self._say(f"{name}: {path} {found}; it is made anew")
                shutil.rmtree(path) if path.is_dir() else path.unlink()
                for journal in folder.glob(f"{path.name}-*"):  # which SQLite would play into the next database
                    journal.unlink()


@contextmanager
def work_folder(root: Path, say: Callable[[str], None], modules: Mapping[str, Sequence[ModuleType]] = {}) -> Iterator[WorkFolder]:
    """Open and lock a work folder (`WorkFolder`).

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
        except BlockingIOError:
            raise ArtifactError(f"another lrserve run is using {root}; wait for it or choose another --work") from None
        except OSError as error:  # the study's database could not be used there either
            raise ArtifactError(
                f"the file system of the work folder {root} has no locks ({error.strerror}), which keep two runs apart; "
                "choose a --work on a local disk"
            ) from None
        yield WorkFolder(root, say, modules)
