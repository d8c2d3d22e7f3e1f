"""onnxruntime-genai as an engine that answers, in a process of its own (engines/protocol.py).

Its calls hold Python's interpreter lock, and cannot be interrupted: a server in the same process would answer nobody while a token
is computed, and end only after it. The worker is engines/genai_worker.py. This side leads: it asks for each piece of the prompt and
for each token, so an answer ends early when nobody asks for more.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, Final

from lrserve.engines.protocol import EngineProcess
from lrserve.engines.sampling import Sampling, Step
from lrserve.errors import EngineError
from lrserve.plugins.versions import genai_version, require_genai

WORKER_COMMAND: Final = (sys.executable, "-m", "lrserve.engines.genai_worker")
PREFILL_CHUNK: Final = 256
"""Tokens of a prompt that are read at once: an answer can end in between, and logits need memory for so many tokens only."""

_SEEDS: Final = 2**31  # onnxruntime-genai's are 32-bit integers, and negative ones mean "any"


class GenaiEngine(EngineProcess):
    """onnxruntime-genai over an exported graph, in a subprocess, as a context manager; on the provider that the graph is for.

    Args:
        folder: `OUT/onnx`, as `OnnxExporter` writes it.
        threads: of ONNX Runtime; None takes OMP_NUM_THREADS, or without it one for each core.
        log: file that takes everything that the engine prints; None is a temporary file, deleted on a clean end.
        start_timeout, request_timeout: seconds.

    Raises:
        EngineError: onnxruntime-genai is missing, untested, without the CUDA that the graph is for, or failed; the message ends
            with the last lines of its log.
    """

    engine = "onnxruntime-genai"
    layer_dtype = "float32"

    def __init__(
        self,
        folder: Path,
        *,
        threads: int | None = None,
        log: Path | None = None,
        start_timeout: float = 900.0,
        request_timeout: float = 3600.0,
    ) -> None:
        super().__init__(
            folder,
            {"model": str(folder), "threads": threads or _threads(os.environ.get("OMP_NUM_THREADS", ""))},
            os.environ,
            log=log,
            start_timeout=start_timeout,
            request_timeout=request_timeout,
            report=None,
        )

    def start(self) -> None:
        """Start the process and wait until the graph is loaded."""
        require_genai()
        self._start(WORKER_COMMAND, genai_version())

    def close(self, *, keep_log: bool = False) -> None:
        """End the process at once: it has nothing to save, and may be in a long call."""
        if self._process is not None:
            self._process.kill()
        super().close(keep_log=keep_log)

    @property
    def running(self) -> bool:
        """Whether the process is there; a failing request leaves it, and its end does not."""
        return self._process is not None

    def generate(self, prompt: Sequence[int], sampling: Sampling) -> Generator[Step]:
        """Yield an answer token by token, and before it an empty step for each piece of the prompt that was read."""
        self._request("begin", **search_options(len(prompt), sampling))
        try:
            for start in range(0, len(prompt), PREFILL_CHUNK):
                self._request("read", tokens=list(map(int, prompt[start : start + PREFILL_CHUNK])))
                yield Step()
            finish = None
            while finish is None:
                reply = self._request("step")
                finish = reply["finish"]
                yield Step((reply["token"],), finish)
        finally:
            with contextlib.suppress(EngineError):  # the process may have ended, as the error on its way says
                self._request("end")


def search_options(prompt_tokens: int, sampling: Sampling) -> dict[str, Any]:
    """Return onnxruntime-genai's search options; it allocates the KV cache for `max_length`."""
    most = prompt_tokens + sampling.max_tokens
    options: dict[str, Any] = {"max_length": most, "min_length": most if sampling.ignore_eos else 0}
    if sampling.temperature == 0:
        return {**options, "do_sample": False}
    seed = -1 if sampling.seed is None else sampling.seed % _SEEDS
    # top_k 0: the whole vocabulary, where genai_config.json may say otherwise
    drawn = {"do_sample": True, "temperature": float(sampling.temperature), "top_p": float(sampling.top_p), "top_k": 0}
    return {**options, **drawn, "random_seed": seed}


def _threads(text: str) -> int | None:
    """Return the number in OMP_NUM_THREADS; of a list, one for each level, the first."""
    first = text.partition(",")[0].strip()
    return int(first) if first.isdecimal() and int(first) else None
