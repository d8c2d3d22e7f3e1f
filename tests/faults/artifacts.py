"""A whole tiny artifact, and what can happen to one: files flipped, cut, deleted, swapped, added to."""

from __future__ import annotations

import collections
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

import torch
from faults.refusing import refusal
from safetensors.torch import load_file, save_file
from tiny import dense_model, install, randomise_factors, tiny_tokenizer, write_dense

from exporters.onnx import OnnxExporter
from exporters.vllm import VllmExporter
from lrserve.allocation.plan import Plan
from lrserve.compression.groups import Structure, allocated, find_groups
from lrserve.compression.spec import quantization_config, specs_of
from lrserve.recipe import Recipe
from lrserve.storage.store import MANIFEST, write_manifest

LONGEST = 30.0
"""Seconds that `verify` may take to refuse a tiny artifact."""

Damage = Callable[[Path, Random], str]
"""Does something to an artifact's folder, and says what."""


def whole_artifact(place: Path, structure: Structure) -> Path:
    """Write an artifact with all its parts below a folder, as the pipeline does, and the dense model beside it."""
    model = dense_model("LlamaForCausalLM")
    dense = write_dense(model, place / "dense")
    units = allocated(find_groups(model), structure)
    plan = Plan.of_ranks({unit.name: 16 if index % 3 else None for index, unit in enumerate(units)}, structure)
    specs = specs_of(plan.changed(units), structure)
    install(model, specs)
    randomise_factors(model)
    model.config.quantization_config = quantization_config(specs)
    out = place / "out"
    (out / "lrserve").mkdir(parents=True)
    for exporter in (VllmExporter(), OnnxExporter()):
        exporter.export(model, dense, out, torch.float32)
    tiny_tokenizer().save_pretrained(out)
    plan.write(out / "lrserve" / "plan.json")
    recipe = Recipe.load(None, {"model": str(dense), "text.calibration": "text.jsonl"})
    (out / "lrserve" / "recipe.yaml").write_text(recipe.to_yaml())
    (out / "lrserve" / "metrics.json").write_text(json.dumps({"target": "ratio 0.2"}))
    (out / "README.md").write_text("# A tiny model\n")
    make_manifest(out)
    return out


def make_manifest(folder: Path) -> None:
    """Let the manifest agree with what is there."""
    (folder / MANIFEST).unlink(missing_ok=True)
    write_manifest(folder, {"lrserve": "0"}, {"seed": 0})


def change_json(path: Path, change: Callable[[Any], object]) -> None:
    """Let a function change the content of a JSON file."""
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))


def change_tensors(folder: Path, changes: Mapping[str, torch.Tensor | None]) -> None:
    """Change, add or (None) remove tensors of a checkpoint."""
    tensors = {**load_file(folder / "model.safetensors"), **changes}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flip(folder: Path, random: Random) -> str:
    """Change one byte of a file."""
    path = random.choice(files_of(folder))
    content = bytearray(path.read_bytes())
    place = random.randrange(len(content))
    content[place] ^= random.randrange(1, 256)
    path.write_bytes(content)
    return f"byte {place} of {path.relative_to(folder)}"


def cut(folder: Path, random: Random) -> str:
    """Cut a file short."""
    path = random.choice(files_of(folder))
    length = random.randrange(path.stat().st_size)
    os.truncate(path, length)
    return f"{path.relative_to(folder)} after {length} bytes"


def delete(folder: Path, random: Random) -> str:
    """Remove a file."""
    path = random.choice(files_of(folder))
    path.unlink()
    return str(path.relative_to(folder))


def swap(folder: Path, random: Random) -> str:
    """Let two files of other content change their names."""
    one = random.choice(files_of(folder))
    other = random.choice([path for path in files_of(folder) if path.read_bytes() != one.read_bytes()])
    aside = folder / "aside"
    one.rename(aside)
    other.rename(one)
    aside.rename(other)
    return f"{one.relative_to(folder)} and {other.relative_to(folder)}"


def add(folder: Path, random: Random) -> str:
    """Add a file that loaders may read, or a thing that is no file, in a place of its own or in that of a file."""
    path = random.choice(files_of(folder))
    names = ["zz.safetensors", "adapter_config.json", "adapter_model.safetensors", "pytorch_model.bin", "params.json", "model.pt"]
    new = path.with_name(random.choice(names))
    match kind := random.choice(["copy", "empty", "pipe", "link", "folder", "pipe in place", "link in place", "folder in place"]):
        case "copy":
            shutil.copy(path, new)
        case "empty":
            new.touch()
        case "pipe":
            os.mkfifo(new)
        case "link":
            new.symlink_to(path)
        case "folder":
            new.mkdir()
        case "pipe in place":
            path.unlink()
            os.mkfifo(path)
        case "link in place":
            path.rename(folder.parent / "elsewhere")
            path.symlink_to(folder.parent / "elsewhere")
        case "folder in place":
            path.unlink()
            path.mkdir()
    return f"{kind}: {path.relative_to(folder)} or {new.relative_to(folder)}"


DAMAGES: Mapping[str, Damage] = {"flipped": flip, "cut": cut, "deleted": delete, "swapped": swap, "added to": add}


class TooSlowError(Exception):
    """What was run has not ended in its time."""


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise TooSlowError in a block that takes longer, whatever it waits for."""

    def late(signal_number: int, frame: FrameType | None) -> None:
        raise TooSlowError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def corrupt(artifact: Path, place: Path, cases: int, seed: int) -> tuple[dict[str, tuple[int, float]], list[str]]:
    """Damage copies of an artifact in all ways by turns, and let `lrserve verify` refuse each of them.

    Returns:
        By the kind of damage the number of cases and the seconds of the slowest; and a line for each case that was not refused by
        one line in time.
    """
    random = Random(seed)
    counts, slowest, wrong = collections.Counter[str](), collections.Counter[str](), list[str]()
    for case in range(cases):
        kind, damage = list(DAMAGES.items())[case % len(DAMAGES)]
        folder = place / "copy"
        shutil.copytree(artifact, folder)
        what = damage(folder, random)
        began = time.monotonic()
        try:
            with within(LONGEST):
                refusal("verify", folder)
        except (Exception, AssertionError) as error:
            wrong.append(f"case {case}, {kind}: {what}: {type(error).__name__}: {error}")
        counts[kind] += 1
        slowest[kind] = max(slowest[kind], time.monotonic() - began)
        shutil.rmtree(folder)
        (place / "elsewhere").unlink(missing_ok=True)
    return {kind: (counts[kind], slowest[kind]) for kind in DAMAGES}, wrong
