"""What identifies a stage of the work folder, besides what it is told: the settings that its code holds."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lrserve.storage.work import WorkFolder, settings_of

CODE = '''
"""A module."""
import functools
from dataclasses import dataclass
from typing import Final, TypeVar
from tiny_imported import OTHER, imported

_DAMPING = 1e-2
BETAS: Final = (0.9, 0.95)
TABLE: Final = {"front": (1 / 2, 1), "limit": {"deep": None}}
NAMED, SWITCHED, NOTHING = "adam", True, None
T = TypeVar("T")
OBJECTS = {"object": object()}
NUMBERED = {1: 2}
lower = 3

def plain(x, steps=50, *, rate: float = 3e-4, of=lambda: None, required): ...

@functools.wraps(plain)
def wrapped(*args, **kwargs): ...

@dataclass(frozen=True)
class Settings:
    rank_step: int = 32
    def method(self, floor=1e-6): ...
    @classmethod
    def made(cls, share=0.5): ...
    @staticmethod
    def still(margin=(1, 2)): ...
'''


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, ModuleType]:
    imported = ModuleType("tiny_imported")
    exec("OTHER = 7\ndef imported(unseen=8): ...", imported.__dict__)
    monkeypatch.setitem(sys.modules, "tiny_imported", imported)
    module = ModuleType("lrserve.room.tiny")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(CODE, module.__dict__)
    return module, imported


def test_constants_and_defaults_are_settings(modules: Any) -> None:
    defaults = {"steps": 50, "rate": 3e-4}
    assert settings_of(modules[0]) == {
        "room.tiny": {
            "BETAS": (0.9, 0.95),
            "NAMED": "adam",
            "NOTHING": None,
            "OTHER": 7,  # a constant is used here, wherever it comes from; a function's defaults belong to its own module
            "SWITCHED": True,
            "Settings.__init__.rank_step": 32,
            "Settings.made.share": 0.5,
            "Settings.method.floor": 1e-6,
            "Settings.still.margin": (1, 2),
            "TABLE": {"front": (0.5, 1), "limit": {"deep": None}},
            "_DAMPING": 1e-2,
            **{f"plain.{name}": value for name, value in defaults.items()},
        }
    }


CHANGES = {
    "constant": (lambda m: setattr(m, "_DAMPING", 0.02), "code.room.tiny._DAMPING (0.01 -> 0.02)"),
    "entry": (lambda m: m.TABLE.update(front=(1,)), "code.room.tiny.TABLE.front ([0.5, 1] -> [1])"),
    "positional": (lambda m: setattr(m.plain, "__defaults__", (60,)), "code.room.tiny.plain.steps (50 -> 60)"),
    "keyword": (lambda m: m.plain.__kwdefaults__.update(rate=1e-3), "code.room.tiny.plain.rate (0.0003 -> 0.001)"),
    "new": (lambda m: setattr(m, "ADDED", 1), "code.room.tiny.ADDED (None -> 1)"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_setting_of_its_code_makes_a_stage_anew_and_is_named(change: str, modules: Any, tmp_path: Path) -> None:
    module, other = modules
    said: list[str] = []
    work = WorkFolder(tmp_path, said.append, {"spectra": (module,), "study": (other,)})
    before = {name: work.stage(name, {"seed": 0}) for name in ("spectra", "study", "unlisted")}
    for folder in before.values():
        os.utime(folder / "inputs.json", (1, 1))
    assert {name: work.stage(name, {"seed": 0}) for name in before} == before
    make, named = CHANGES[change]
    make(module)
    assert work.stage("study", {"seed": 0}) == before["study"]
    assert said == []
    for name in ("spectra", "unlisted"):
        assert work.stage(name, {"seed": 0}) != before[name]
    assert said == [f"{name}: made anew, since the last run here differs in {named}" for name in ("spectra", "unlisted")]
