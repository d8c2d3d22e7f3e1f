"""Good input files, changed at random in the ways that tools and people damage them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st

PLAIN: dict[str, Any] = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "phases": [Phase.generate],
    "suppress_health_check": list(HealthCheck),
}
"""Settings of hypothesis: the same cases in every run, each run once."""

NUMBERS = [0, -1, 1, 2, 3, 5, 7, 64, 4096, 2**31, 2**63, 2**64, 10**30, 0.5, -0.0, 1e-300, 1e308, float("nan"), float("inf")]
TEXTS = [
    "",
    " ",
    "x",
    "null",
    "1",
    "auto",
    "silu",
    "float16",
    "x" * 5000,
    "\0",
    "\ud83d",
    "🜨",
    "\u202e",
    "a\nb",
    "../x",
    "/dev/zero",
]
JUNK = st.sampled_from(
    [None, True, False, *NUMBERS, *TEXTS, [], {}, [[]], [None] * 50, {"a": []}, {"": {"": 1}}, [1, "x", None]]
).map(
    copy.deepcopy  # they are changed further
)


def _places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the way to every entry of nested lists and dictionaries."""
    entries = value.items() if isinstance(value, dict) else enumerate(value[:50]) if isinstance(value, list) else ()
    for key, entry in entries:
        yield (*at, key)
        yield from _places(entry, (*at, key))


def _nested(value: Any, depth: int) -> Any:
    for level in range(depth):
        value = [value] if level % 2 else {"a": value}
    return value


@st.composite
def changed(draw: Any, good: Any) -> Any:
    """A copy of nested lists and dictionaries with one to three entries deleted, replaced, nested, renamed or added."""
    content = json.loads(json.dumps(good))
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(content))
        if not places:
            break
        *way, key = draw(st.sampled_from(places))
        parent = content
        for step in way:
            parent = parent[step]
        how = draw(st.sampled_from(["delete", "retype", "retype", "retype", "nest", "list", "rename", "add"]))
        if how == "delete":
            del parent[key]
        elif how == "nest":
            parent[key] = _nested(parent[key], draw(st.sampled_from([1, 2, 30, 300])))
        elif how == "list":
            parent[key] = [parent[key]] * draw(st.sampled_from([1, 2, 500]))
        elif how == "rename" and isinstance(parent, dict):
            parent[draw(st.sampled_from([text for text in TEXTS if text != "\ud83d"]))] = parent.pop(key)
        elif how == "add" and isinstance(parent, dict):
            parent["added"] = draw(JUNK)
        else:
            parent[key] = draw(JUNK)
    return content


@st.composite
def damaged(draw: Any, good: bytes) -> bytes:
    """The bytes of a good file, cut, or with some of them replaced, doubled or inserted."""
    content = bytearray(good)
    at = draw(st.integers(0, len(content) - 1))
    how = draw(st.sampled_from(["cut", "flip", "insert", "double", "empty", "mark"]))
    if how == "cut":
        del content[at:]
    elif how == "flip":
        content[at] ^= draw(st.integers(1, 255))
    elif how == "insert":
        content[at:at] = draw(st.sampled_from([b"\0", b"\xff", b"[" * 3000, b"{", b'"', b",", b"\xef\xbb\xbf", b"9" * 5000]))
    elif how == "double":
        content = content * 2
    elif how == "empty":
        content.clear()
    else:
        content[:0] = b"\xef\xbb\xbf"
    return bytes(content)


def as_json(content: Any) -> bytes:
    """Write JSON, with lone surrogates as escapes."""
    return json.dumps(content).encode()


def as_yaml(content: Any) -> bytes:
    """Write YAML in the form of JSON where its own writer refuses the content."""
    try:
        return yaml.safe_dump(content).encode()
    except (yaml.YAMLError, UnicodeError, RecursionError):
        return json.dumps(content).encode()


def files(good: Path, write: Callable[[Any], bytes] = as_json, load: Callable[[str], Any] = json.loads) -> st.SearchStrategy[bytes]:
    """Contents for a file, made from a good one: three of four differ in their values, one in its bytes."""
    content = load(good.read_text(encoding="utf-8"))
    by_value = changed(content).map(write)
    return st.one_of(by_value, by_value, by_value, damaged(good.read_bytes()))
