"""The engines that can measure plans, serve them and prove what is served: vLLM, and ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from exporters.base import Exporter
from exporters.onnx import FOLDER, MODEL_FILE, OnnxExporter
from exporters.onnx_linear import rounding_inputs
from exporters.onnx_twin import check_twin
from exporters.vllm import VllmExporter
from lrserve.engines.gpu import require_devices
from lrserve.engines.onnx import OnnxEngine
from lrserve.engines.onnx_provider import Provider, settled
from lrserve.engines.protocol import EngineProcess
from lrserve.engines.workloads import open_engine
from lrserve.errors import InputError
from lrserve.plugins.versions import engine_version, on_cpu, onnx_version
from lrserve.recipe import EngineSettings, Workload


class Open(Protocol):
    """Builds (does not start) an engine large enough for every workload; `sharing` is how many engines share the GPUs' memory."""

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
    on_gpu: whether it computes on a GPU, whose memory this process and other engines want too.
    rounding_inputs: where it rounds the inputs of rounded weights though its dtype does not: lets a model in transformers do so.
    check_twin: where its exporter writes a dtype that rounds and transformers does not load: holds a rendering (a folder) against
        that of the same model in float32.
    """

    name: str
    version: str
    dtype: str
    compiled: bool
    exporter: Exporter
    loads_sources: bool
    open: Open
    on_gpu: bool = False
    rounding_inputs: Callable[[Any], AbstractContextManager[None]] | None = None
    check_twin: Callable[[Path, Path], None] | None = None

    @property
    def reference_dtype(self) -> str:
        """In which transformers computes what this engine is held against as served."""
        return self.dtype if self.check_twin is None else "float32"


def runtime_of(settings: EngineSettings) -> Runtime:
    """Return the engine that measures and serves with these settings.

    Raises:
        EngineError, InputError: as `onnx_provider.settled`, where that is ONNX Runtime; as `require_devices`, where it is vLLM.
    """
    if settings.runtime == "onnx":
        return _onnx_runtime(settled(settings))
    require_devices(settings.tensor_parallel_size)
    return Runtime(
        name="vllm",
        version=engine_version(),
        dtype=settings.dtype,
        compiled=not settings.enforce_eager,
        exporter=VllmExporter(),
        loads_sources=True,
        open=partial(open_engine, settings=settings),
        on_gpu=not on_cpu(),
    )


def _onnx_runtime(settings: EngineSettings) -> Runtime:
    """Return ONNX Runtime with `settled` settings."""
    half = settings.onnx_dtype != "float32"
    provider: Provider = "cuda" if settings.onnx_provider == "cuda" else "cpu"
    exact = settings.dtype == "float32" or half
    unusual = {
        f"{settings.onnx_profile} graph": settings.onnx_profile != "genai",
        f"{settings.onnx_dtype} graph": half,
        "on CUDA": provider == "cuda",
    }
    return Runtime(
        name="onnxruntime",
        version=", ".join([onnx_version(), *(name for name, true in unusual.items() if true)]),
        dtype=str(settings.onnx_dtype),
        compiled=False,
        exporter=OnnxExporter().configured(settings),
        loads_sources=False,
        open=partial(_open_onnx, exact=exact, provider=provider),
        on_gpu=provider == "cuda",
        rounding_inputs=None if exact else rounding_inputs,
        check_twin=_check_graph if half else None,
    )


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
    model: Path, workloads: Mapping[str, Workload], *, exact: bool, provider: Provider, sharing: int = 1, log: Path | None = None
) -> EngineProcess:
    return OnnxEngine(model, exact=exact, provider=provider, log=log)  # the graph takes any batch


def _check_graph(rendering: Path, twin: Path) -> None:
    check_twin(*(folder / FOLDER / MODEL_FILE for folder in (rendering, twin)))
