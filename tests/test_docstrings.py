"""Docstrings and comments name files that exist, and functions, classes and settings that their modules have."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OTHERS = {"onnx", "transformers", "vllm"}  # packages that modules of lrserve share a name with


def sources() -> dict[Path, str]:
    folders = ("lrserve", "exporters", "bench", "docs", "tests")
    return {path: path.read_text(encoding="utf-8") for folder in folders for path in (ROOT / folder).rglob("*.py")}


def stale(text: str, modules: Mapping[str, str]) -> list[str]:
    """Names in a text that are not in `modules`: source by module, where those of one name stand together."""
    files = [f"{name}.py" for name in re.findall(r"\b(\w+)\.py\b", text) if name not in modules]
    members = []
    for module, name in re.findall(r"`([a-z_]+)\.(\w+)", text):
        if module in modules and module not in OTHERS and name != "py":
            known = modules[module] + modules["recipe"]  # `search.choose` is a setting
            members += [f"{module}.{name}"] * (not re.search(rf"\b(?:def|class) {name}\b|^ *{name}\b", known, re.M))
    return files + members


def test_what_docstrings_name_exists() -> None:
    texts = sources()
    modules: dict[str, str] = {}
    for path, text in texts.items():
        modules[path.stem] = modules.get(path.stem, "") + text
    checked = {path: text for path, text in texts.items() if path.is_relative_to(ROOT / "lrserve") or "exporters" in path.parts}
    assert len(checked) > 50
    assert {str(path): found for path, text in checked.items() if (found := stale(text, modules))} == {}


@pytest.mark.parametrize(("text", "found"), [("see plan.py", []), ("see gone.py", ["gone.py"]), ("`plan.gone`", ["plan.gone"])])
def test_a_stale_name_is_found(text: str, found: list[str]) -> None:
    modules = {"plan": "class Plan:", "recipe": "    choose: int", "search": ""}
    assert stale(f"{text}, `plan.Plan`, `search.choose`", modules) == found
