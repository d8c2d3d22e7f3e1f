"""The engines that can measure plans, and serve them: vLLM, and ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from exporters.base import Exporter
from exporters.onnx import OnnxExporter
from exporters.vllm import VllmExporter
from lrserve.engines.onnx import OnnxEngine, onnx_version
from lrserve.engines.protocol import EngineProcess
from lrserve.engines.vllm import engine_version
from lrserve.engines.workloads import open_engine
from lrserve.recipe import EngineSettings, Workload


class Open(Protocol):
    """Builds (does not start) an engine large enough for every workload; `sharing` is how many engines share one GPU."""

    def __call__(
        self, model: Path, workloads: Mapping[str, Workload], *, sharing: int = 1, log: Path | None = None
    ) -> EngineProcess:
        """Return the engine of a model."""


@dataclass(frozen=True)
class Runtime:
    """An engine that can measure plans.

    version: its name and version.
    dtype: of its arithmetic.
    exporter: what writes models for it.
    loads_sources: whether it takes the dense model's folder as it is, and not only what `exporter` writes.
    open: builds the engine of a model.
    """

    version: str
    dtype: str
    exporter: Exporter
    loads_sources: bool
    open: Open


def runtime_of(settings: EngineSettings) -> Runtime:
    """Return the recipe's engine."""
    if settings.runtime == "onnx":
        return Runtime(onnx_version(), "float32", OnnxExporter(), loads_sources=False, open=_open_onnx)
    opens = partial(open_engine, settings=settings)
    return Runtime(engine_version(), settings.dtype, VllmExporter(), loads_sources=True, open=opens)


def _open_onnx(model: Path, workloads: Mapping[str, Workload], *, sharing: int = 1, log: Path | None = None) -> EngineProcess:
    return OnnxEngine(model, log=log)  # the graph takes any batch
