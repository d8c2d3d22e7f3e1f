"""The modules whose code computes what each stage of the work folder holds.

Their constants and defaults are part of the stage's inputs (`storage.work.settings_of`), so a changed damping or learning rate
makes the stage anew. A stage that is computed from another stage's folder has that folder's name among its inputs, and does
not list the other's modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any, Final

from exporters import companions, onnx, onnx_companions, onnx_families, onnx_graph, onnx_linear, onnx_profiles
from exporters import vllm as vllm_exporter
from lrserve.allocation import goal, losses, plan, quality, space, speed, study
from lrserve.compression import (
    assemble,
    calibrate,
    covariance,
    factorize,
    gradients,
    logits,
    matmul,
    narrow,
    propagate,
    quantize,
    recover,
    refine,
    repair,
    residual,
    rounding,
    sequential,
    smoothing,
    spectra,
    structure,
    training,
)
from lrserve.engines import onnx_provider, protocol, timing, transcripts, workloads
from lrserve.inputs import stream, text
from lrserve.pipeline import agreement, improve, measure, probe, search
from lrserve.pipeline.job import Job
from lrserve.storage.store import fingerprint
from lrserve.storage.work import settings_of

_FORWARD = (matmul, logits, quality)
_CUT = (spectra, factorize, structure, assemble, rounding, quantize, residual, smoothing)
_WALK = (sequential, calibrate, training, structure, matmul)
_GRAPH = (onnx, onnx_families, onnx_graph, onnx_linear, onnx_profiles)

MODULES: Final[Mapping[str, tuple[ModuleType, ...]]] = {
    "calibration": (calibrate, covariance, matmul),
    "gradients": (gradients, covariance, logits, matmul),
    "weighted": (calibrate, covariance, matmul),
    "spectra": (spectra, factorize, narrow),
    "probe": (probe, plan, *_CUT, *_FORWARD),
    "validation": (plan, losses, *_CUT, *_FORWARD),
    "dense": (*_GRAPH, companions, onnx_companions),
    "latency": (measure, speed, protocol, workloads, timing, onnx_linear, onnx_provider),
    "study": (study, space, goal, losses, plan, speed, *_CUT, *_FORWARD),
    "measure": (measure, protocol, workloads, *_CUT, vllm_exporter, onnx_provider, *_GRAPH),
    "transcripts-vllm": (protocol, transcripts, matmul),
    "transcripts-onnxruntime": (protocol, transcripts, matmul, *_GRAPH),
    "propagate": (propagate, factorize, narrow, covariance, *_WALK),
    "refine": (refine, *_WALK),
    "repair": (repair, refine, sequential, calibrate, matmul, *_CUT),
    "recovery-text": (stream, text),
    "recover": (recover, logits, training, structure, matmul),
    "distil": (recover, repair, logits, matmul, *_CUT),
}
"""By the stage's name; a stage that is not listed depends on all of them."""


def provenance(job: Job) -> dict[str, Any]:
    """Identify everything that decides the result: recipe, model and texts, and the settings of all stages' code; JSON."""
    deciding = {search, improve, agreement}  # no stage holds what these come to
    modules = deciding | {module for own in MODULES.values() for module in own}
    return {**job.provenance(), "code": fingerprint(settings_of(*sorted(modules, key=lambda module: module.__name__)))}
