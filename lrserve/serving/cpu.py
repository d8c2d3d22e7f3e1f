"""How lrserve starts vLLM's CPU build: what costs a decode step or a prefill much and takes a setting to be rid of.

- malloc keeps what is freed (serving/process.py).
- Attention needs little Python (serving/attention.py), for dense models too, so that the comparison with dense is of
  the compression alone.
- Products in bfloat16 are lrserve's own kernel's (serving/linear.py), for dense models too.
- The compiled graph's own code is C++ instead of Python, by torch.compile's `cpp_wrapper`. It cannot pass on the objects in which
  vLLM hands its operations the names of layers, so those are strings.

docs/performance.md has what each is worth. What the environment already says about any of them stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from lrserve.serving.process import memory_environment

KERNELS: Final = "LRSERVE_CPU_KERNELS"
"""1: lrserve's attention and products for all that a process serves; 0: vLLM's; otherwise lrserve's where it serves an artifact."""

_LAYER_NAMES: Final = "VLLM_USE_LAYERNAME"

CPU_VARIABLES: Final = (KERNELS, _LAYER_NAMES, "GLIBC_TUNABLES", "LD_PRELOAD")
"""What an engine's times depend on."""


def cpu_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Add to an environment what vLLM's CPU build is to have."""
    return {KERNELS: "1", _LAYER_NAMES: "0", **memory_environment(environment)}


def compilation(environment: Mapping[str, str]) -> dict[str, Any]:
    """Return vLLM's `compilation_config` for a process with this environment."""
    return {"inductor_compile_config": {"cpp_wrapper": True}} if environment.get(_LAYER_NAMES) == "0" else {}
