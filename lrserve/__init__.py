"""Low-rank compression of language models, searched for the engine that serves them.

Importing this package imports neither torch nor transformers nor vllm. Its one side effect is to register, as soon as
transformers is used, the quantizer that lets `AutoModelForCausalLM.from_pretrained` read an lrserve artifact.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import wrapt

if TYPE_CHECKING:
    from lrserve.allocation.plan import Plan
    from lrserve.compression.layers import LowRankLinear
    from lrserve.errors import LrserveError
    from lrserve.pipeline.run import compress_and_export
    from lrserve.recipe import Recipe

__version__ = "0.1.0"

__all__ = ["LowRankLinear", "LrserveError", "Plan", "Recipe", "__version__", "compress_and_export"]

_HOMES = {
    "LowRankLinear": "lrserve.compression.layers",
    "LrserveError": "lrserve.errors",
    "Plan": "lrserve.allocation.plan",
    "Recipe": "lrserve.recipe",
    "compress_and_export": "lrserve.pipeline.run",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its module the first time it is used (PEP 562)."""
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _register_quantizer(_: object) -> None:
    importlib.import_module("lrserve.plugins.transformers")  # which registers it


# Called at once if transformers' quantizers are already imported, otherwise right after they are.
wrapt.register_post_import_hook(_register_quantizer, "transformers.quantizers.auto")
