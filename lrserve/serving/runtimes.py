"""The engines that can measure plans, and serve them: vLLM, and ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from exporters.base import Exporter
from exporters.onnx import OnnxExporter
from exporters.vllm import VllmExporter
from lrserve.recipe import EngineSettings, Workload
from lrserve.serving.engine import engine_version
from lrserve.serving.loadtest import open_engine
from lrserve.serving.onnx_engine import OnnxEngine, onnx_version
from lrserve.serving.protocol import EngineProcess


class Runtime(Protocol):
    """An engine: what it loads, and how it is started."""

    @property
    def dtype(self) -> str:
        """Of its arithmetic."""

    @property
    def loads_sources(self) -> bool:
        """Whether it takes the dense model's folder as it is, and not only what `exporter` writes."""

    @property
    def exporter(self) -> Exporter:
        """What writes models for it."""

    @property
    def version(self) -> str:
        """Name and version."""

    def open(self, model: Path, workloads: Mapping[str, Workload], *, sharing: int = 1, log: Path | None = None) -> EngineProcess:
        """Build (not start) an engine large enough for every workload; `sharing` is how many engines share one GPU."""


@dataclass(frozen=True)
class Vllm:
    """vLLM."""

    settings: EngineSettings
    loads_sources: bool = True

    @property
    def dtype(self) -> str:
        """The recipe's."""
        return str(self.settings.dtype)

    @property
    def exporter(self) -> Exporter:
        """A checkpoint."""
        return VllmExporter()

    @property
    def version(self) -> str:
        """As installed."""
        return engine_version()

    def open(self, model: Path, workloads: Mapping[str, Workload], *, sharing: int = 1, log: Path | None = None) -> EngineProcess:
        """See `Runtime`."""
        return open_engine(model, workloads, self.settings, sharing=sharing, log=log)


@dataclass(frozen=True)
class OnnxRuntime:
    """ONNX Runtime on the CPU."""

    dtype: str = "float32"
    loads_sources: bool = False

    @property
    def exporter(self) -> Exporter:
        """A graph."""
        return OnnxExporter()

    @property
    def version(self) -> str:
        """As installed."""
        return onnx_version()

    def open(self, model: Path, workloads: Mapping[str, Workload], *, sharing: int = 1, log: Path | None = None) -> EngineProcess:
        """See `Runtime`; the graph takes any batch."""
        return OnnxEngine(model, log=log)


def runtime_of(settings: EngineSettings) -> Runtime:
    """Return the recipe's engine."""
    return OnnxRuntime() if settings.runtime == "onnx" else Vllm(settings)
