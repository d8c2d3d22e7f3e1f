"""The process around onnxruntime-genai: `python -m lrserve.engines.genai_worker`, started by engines/genai.py.

What the two say to each other is in engines/protocol.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from lrserve.engines.protocol import serve
from lrserve.errors import EngineError


@dataclass
class Loaded:
    """A model, its end tokens, and the answer that is being generated."""

    model: Any
    end_tokens: frozenset[int]
    generator: Any = None


def build_engine(settings: dict[str, Any]) -> Loaded:
    """Load the graph on the provider that its genai_config.json names, the CPU where it names none.

    Raises:
        EngineError: that is CUDA, and this build of onnxruntime-genai has none.
    """
    import onnxruntime_genai

    folder = Path(settings["model"])
    model = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]
    config = onnxruntime_genai.Config(str(folder))
    if not any("cuda" in options for options in model["decoder"]["session_options"]["provider_options"]):
        config.clear_providers()
    elif not onnxruntime_genai.is_cuda_available():
        raise EngineError(
            f"{folder} has a graph for CUDA, and this onnxruntime-genai is a build without it. Run: pip uninstall onnxruntime "
            "onnxruntime-genai; pip install 'lrserve[onnx-gpu]'. Or export with engine.onnx_dtype: float32"
        )
    if settings["threads"] is not None:
        session = {"intra_op_num_threads": settings["threads"]}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
    end = model["eos_token_id"]
    return Loaded(onnxruntime_genai.Model(config), frozenset([end] if isinstance(end, int) else end))


def begin(loaded: Loaded, **options: Any) -> dict[str, Any]:
    """Make room for an answer with these search options."""
    import onnxruntime_genai

    loaded.generator = None  # frees the last answer's KV cache first
    params = onnxruntime_genai.GeneratorParams(loaded.model)
    params.set_search_options(**options)
    loaded.generator = onnxruntime_genai.Generator(loaded.model, params)
    return {}


def read(loaded: Loaded, tokens: list[int]) -> dict[str, Any]:
    """Read further tokens of the prompt."""
    _running(loaded).append_tokens(np.array(tokens, np.int32))
    return {}


def step(loaded: Loaded) -> dict[str, Any]:
    """Generate the next token."""
    generator = _running(loaded)
    generator.generate_next_token()
    token = int(generator.get_next_tokens()[0])
    finish = None
    if generator.is_done():
        finish = "stop" if token in loaded.end_tokens else "length"
    return {"token": token, "finish": finish}


def end(loaded: Loaded) -> dict[str, Any]:
    """Forget the answer, and free its KV cache."""
    loaded.generator = None
    return {}


def _running(loaded: Loaded) -> Any:
    if loaded.generator is None:
        raise EngineError("no answer has begun")
    return loaded.generator


REQUESTS: Final[dict[str, Callable[..., dict[str, Any]]]] = {"begin": begin, "read": read, "step": step, "end": end}


if __name__ == "__main__":
    serve(build_engine, REQUESTS)
