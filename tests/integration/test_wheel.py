"""The wheel, installed outside the checkout: its content, its command and its entry points."""

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

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
WHERE = """
import importlib.metadata as metadata, json
import exporters.onnx, lrserve.cli
points = [p for group in ("lrserve.exporters", "vllm.general_plugins") for p in metadata.entry_points(group=group)]
files = {p.name: p.load().__module__ for p in points if p.dist.name == "lrserve"}
print(json.dumps([lrserve.__file__, exporters.__file__, str(metadata.distribution("lrserve").locate_file("")), files]))
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
