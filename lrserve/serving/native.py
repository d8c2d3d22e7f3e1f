"""Operations of lrserve's own in C++, compiled on the machine that runs them when they are first wanted, and kept in the cache."""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch

from lrserve.artifacts.store import file_sha256, fingerprint, whole
from lrserve.inputs.source import cache_folder

_FLAGS: Final = ("-std=c++20", "-O3", "-fopenmp", "-fPIC", "-shared")
ATTENTION: Final = Path(__file__).with_name("attention.cpp")
"""The operation that serving/attention.py puts in the place of vLLM's."""

_log = logging.getLogger(__name__)


def version(source: Path, flags: Sequence[str]) -> str:
    """Identify what is compiled."""
    return fingerprint([file_sha256(source), *_FLAGS, *flags])


def load(source: Path, flags: Sequence[str], otherwise: str) -> bool:
    """Register the operations of a C++ file, compiling it the first time; say whether that went well.

    Its C functions are there for what is loaded later, such as graphs that torch.compile writes in C++.

    The compiler is the one that torch.compile wants as well (`CXX` names it). If there is none, a warning says what happens
    `otherwise`.
    """
    try:
        ctypes.CDLL(str(library(source, flags)), mode=ctypes.RTLD_GLOBAL)
    except (OSError, subprocess.CalledProcessError) as error:
        detail = getattr(error, "stderr", None) or error
        _log.warning("lrserve's %s cannot be compiled or loaded, %s (which is slower): %s", source.name, otherwise, detail)
        return False
    return True


def library(source: Path, flags: Sequence[str]) -> Path:
    """Return the compiled file, from the cache if it is there."""
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    key = fingerprint([version(source, flags), torch.__version__, platform.machine(), compiler])
    target = cache_folder() / "kernels" / f"{source.stem}-{key[:16]}.so"
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        from torch.utils.cpp_extension import include_paths, library_paths

        includes = [f"-isystem{path}" for path in include_paths()]
        libraries = [*(f"-L{path}" for path in library_paths()), "-ltorch", "-ltorch_cpu", "-lc10"]
        abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
        with whole(target) as partial:
            command = [*compiler, *_FLAGS, *flags, abi, *includes, str(source), *libraries, "-o", str(partial)]
            subprocess.run(command, check=True, capture_output=True, text=True)
    return target
