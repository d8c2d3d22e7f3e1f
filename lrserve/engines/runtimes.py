"""The engines that can measure plans, serve them and prove what is served: vLLM, and ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from exporters.base import Exporter
from exporters.onnx import OnnxExporter
from exporters.onnx_linear import rounding_inputs
from exporters.vllm import VllmExporter
from lrserve.engines.onnx import OnnxEngine
from lrserve.engines.protocol import EngineProcess
from lrserve.engines.workloads import open_engine
from lrserve.errors import InputError
from lrserve.plugins.versions import engine_version, onnx_version
from lrserve.recipe import EngineSettings, Workload


class Open(Protocol):
    """Builds (does not start) an engine large enough for every workload; `sharing` is how many engines share one GPU."""

    def __call__(
        self, model: Path, workloads: Mapping[str, Workload], *, sharing: int = 1, log: Path | None = None
    ) -> EngineProcess:
        """Return the engine of a model."""


@dataclass(frozen=True)
class Runtime:
    """An engine that loads what one of lrserve's exporters writes.

    name: its key in metrics.json, `vllm` or `onnxruntime`.
    version: its name and version.
    dtype: of its arithmetic.
    compiled: whether torch.compile is used.
    exporter: what writes models for it.
    loads_sources: whether it takes the dense model's folder as it is, and not only what `exporter` writes.
    open: builds the engine of a model.
    rounding_inputs: where it rounds the inputs of rounded weights though its dtype does not: lets a model in transformers do so.
    """

    name: str
    version: str
    dtype: str
    compiled: bool
    exporter: Exporter
    loads_sources: bool
    open: Open
    rounding_inputs: Callable[[Any], AbstractContextManager[None]] | None = None


def runtime_of(settings: EngineSettings) -> Runtime:
    """Return the engine that measures and serves with these settings."""
    if settings.runtime == "onnx":
        version = onnx_version() + (f", {profile} graph" if (profile := settings.onnx_profile) != "genai" else "")
        exact = settings.dtype == "float32"
        opens_onnx, rounding = partial(_open_onnx, exact=exact), None if exact else rounding_inputs
        return Runtime("onnxruntime", version, "float32", False, OnnxExporter(profile), False, opens_onnx, rounding)
    opens = partial(open_engine, settings=settings)
    compiled = not settings.enforce_eager
    return Runtime("vllm", engine_version(), settings.dtype, compiled, VllmExporter(), loads_sources=True, open=opens)


def loader_of(exporter: Exporter, settings: EngineSettings) -> Runtime:
    """Return the engine that loads what one of lrserve's exporters writes, with these settings.

    Raises:
        InputError: an exporter of another package.
    """
    for name in ("vllm", "onnx"):
        found = runtime_of(settings.model_copy(update={"runtime": name}))
        if isinstance(exporter, type(found.exporter)):
            return found
    raise InputError(
        f"exporter {exporter.name!r} is of another package and has no method transcribe, so nothing would prove what it writes; "
        "add the method (exporters/base.py, SelfProving) or leave the exporter out"
    )


def _open_onnx(
    model: Path, workloads: Mapping[str, Workload], *, exact: bool, sharing: int = 1, log: Path | None = None
) -> EngineProcess:
    return OnnxEngine(model, exact=exact, log=log)  # the graph takes any batch
