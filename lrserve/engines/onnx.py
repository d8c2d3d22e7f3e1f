"""ONNX Runtime as an engine to measure on, in a process of its own like vLLM (engines/protocol.py)."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

from lrserve.engines.onnx_provider import Provider
from lrserve.engines.protocol import EngineProcess
from lrserve.plugins.versions import onnx_version, require_onnx

WORKER_COMMAND: Final = (sys.executable, "-m", "lrserve.engines.onnx_worker")


class OnnxEngine(EngineProcess):
    """ONNX Runtime over an exported graph, in a subprocess, as a context manager.

    Args:
        model: folder with `onnx/`, as `OnnxExporter` writes it.
        threads: of ONNX Runtime; None takes torch's number in the subprocess, which OMP_NUM_THREADS sets.
        exact: multiply by rounded weights in float32; without it inputs are rounded to 8 bits first, as a float32 graph says.
        provider: what computes; CUDA does not run float32 graphs.
        log: file that takes everything that the engine prints; None is a temporary file, deleted on a clean end.
        start_timeout, request_timeout: seconds.
        report: told, in a sentence, what the engine is doing while it starts.

    Raises:
        EngineError: a package or CUDA is missing, or ONNX Runtime failed; the message ends with the last lines of its log.
        ArtifactError: there is no exported graph in `model`.
        InputError: a request of sequences longer than the model's context, or of layers in another dtype than the graph's.
    """

    engine = "ONNX Runtime"
    layer_dtype = "float32"

    def __init__(
        self,
        model: Path,
        *,
        threads: int | None = None,
        exact: bool = False,
        provider: Provider = "cpu",
        log: Path | None = None,
        start_timeout: float = 900.0,
        request_timeout: float = 3600.0,
        report: Callable[[str], None] | None = None,
    ) -> None:
        super().__init__(
            model,
            {"model": str(model), "threads": threads, "exact": exact, "provider": provider},
            os.environ,
            log=log,
            start_timeout=start_timeout,
            request_timeout=request_timeout,
            report=report,
        )

    def start(self) -> None:
        """Start the process and wait until the graph is loaded."""
        require_onnx()
        self._start(WORKER_COMMAND, onnx_version())
