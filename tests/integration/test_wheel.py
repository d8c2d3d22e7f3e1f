"""The wheel, installed outside the checkout: its content, its command, a small job with both exports, and a load in vLLM."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tiny import dense_model, write_dense, write_text

pytestmark = pytest.mark.engine

CHECKOUT = Path(__file__).resolve().parents[2]
SETTINGS: dict[str, Any] = {
    "target": {"ratio": 0.2},
    "calibration": {"sequences": 8, "length": 32, "pool_sequences": 4, "batch_tokens": 64},
    "factorization": {"weights": [], "fisher_tokens": 128, "propagate": False, "refine": "none"},
    "search": {
        "rank_step": 8,
        "depth_groups": 1,
        "probe_tokens": 64,
        "validation_tokens": 128,
        "validation_pool": 256,
        "validation_length": 32,
        "measured_plans": 1,
    },
    "workloads": {"chat": {"prompt_tokens": 8, "output_tokens": 4, "concurrency": 2}},
    "engine": {"dtype": "float32", "enforce_eager": True, "repeats": 1},
    "report": {"tokens": 64, "length": 32, "prompts": 1, "prompt_tokens": 12, "new_tokens": 4},
}
WHERE = """
import importlib.metadata as metadata, json
import exporters.onnx, lrserve.cli
points = [p for group in ("lrserve.exporters", "vllm.general_plugins") for p in metadata.entry_points(group=group)]
files = {p.name: p.load().__module__ for p in points if p.dist.name == "lrserve"}
print(json.dumps([lrserve.__file__, exporters.__file__, str(metadata.distribution("lrserve").locate_file("")), files]))
"""
LOAD = """
import os, sys
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
from vllm import LLM, SamplingParams
llm = LLM(sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=64, max_num_seqs=2, kv_cache_memory_bytes=2**26)
[answer] = llm.generate("some words", SamplingParams(max_tokens=4, ignore_eos=True))
print(len(answer.outputs[0].token_ids), sys.modules["lrserve.plugins.vllm.layers"].__file__)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("wheel")


@pytest.fixture(scope="module")
def wheel(place: Path) -> Path:
    """Build from a copy of the sources: setuptools leaves a build folder beside what it builds."""
    sources = place / "sources"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in ("lrserve", "exporters", "tests", "bench"):
        shutil.copytree(CHECKOUT / folder, sources / folder, ignore=ignored)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(CHECKOUT / file, sources / file)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", str(place), str(sources)], check=True, cwd=place)
    [built] = place.glob("lrserve-*.whl")
    return built


@pytest.fixture(scope="module")
def fresh(place: Path, wheel: Path) -> Path:
    """Install the wheel into an environment of its own, which finds what lrserve depends on where this one has it.

    Entries of a .pth file come behind the environment's own packages, and .pth files in them are not read: the wheel comes first,
    and an editable install of this checkout does not count.
    """
    environment = place / "environment"
    venv.create(environment, symlinks=True)
    packages = environment / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    pip = [sys.executable, "-m", "pip", "--python", str(environment / "bin" / "python")]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel)], check=True, cwd=place)
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return environment


def run(environment: Path, command: Sequence[str], place: Path) -> str:
    """Run a program of the environment, from a folder that is not the checkout, and return what it printed."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    program = str(environment / "bin" / command[0])
    done = subprocess.run([program, *command[1:]], cwd=place, env=kept, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_holds_both_packages_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as files:
        names = files.namelist()
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"lrserve", "exporters"}
    assert {"lrserve/py.typed", "exporters/py.typed", "lrserve/cli.py", "exporters/onnx.py"} <= set(names)
    sources = {str(p.relative_to(CHECKOUT)) for top in ("lrserve", "exporters") for p in (CHECKOUT / top).rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == sources


def test_the_command_and_the_entry_points_are_the_wheels(fresh: Path, place: Path) -> None:
    package, exporters, distribution, points = json.loads(run(fresh, ["python", "-c", WHERE], place).splitlines()[-1])
    for path in (package, exporters, distribution):
        assert Path(path).is_relative_to(fresh)
    assert points == {"vllm": "exporters.vllm", "onnx": "exporters.onnx", "lrserve": "lrserve.plugins.vllm.register"}
    assert "compress-and-export" in run(fresh, ["lrserve", "--help"], place)


def test_a_small_job_ends_and_vllm_loads_the_result(fresh: Path, place: Path) -> None:
    write_dense(dense_model("LlamaForCausalLM"), place / "model")
    write_text(place / "text.jsonl", 200)
    settings = {"model": "model", "text": {"calibration": "text.jsonl"}, **SETTINGS}
    (place / "recipe.yaml").write_text(json.dumps(settings))  # JSON is YAML
    run(fresh, ["lrserve", "compress-and-export", "--recipe", "recipe.yaml", "--trials", "3", "-o", "out"], place)
    assert (place / "out" / "onnx" / "model.onnx").is_file()
    tokens, layers = run(fresh, ["python", "-c", LOAD, "out"], place).splitlines()[-1].split()
    assert tokens == "4"
    assert Path(layers).is_relative_to(fresh)
