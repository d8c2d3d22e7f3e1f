"""The dense model's transcripts of the proof's prompts, as served and in transformers, kept in the work folder.

The search has the dense model's engine running; the proof comes later and reads what was kept.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from lrserve.engines.protocol import EngineProcess
from lrserve.engines.runtimes import Runtime
from lrserve.engines.transcripts import Transcript, transcribe_checkpoint
from lrserve.pipeline.job import Job, tensor_sha256
from lrserve.storage.store import write_json
from lrserve.storage.work import WorkFolder


def keep_served(job: Job, runtime: Runtime, engine: EngineProcess, folder: WorkFolder) -> list[Transcript]:
    """Run the prompts through a running engine of the dense model and keep its transcripts, or return those kept before."""
    path = _stage(job, runtime, folder) / "engine.json"
    if not path.is_file():
        _write(path, engine.transcribe(job.windows["prompts"].tolist(), job.recipe.report.new_tokens))
    return _read(path)


def kept_served(job: Job, runtime: Runtime, folder: WorkFolder) -> list[Transcript] | None:
    """Return what `keep_served` kept, None if it did not run with these inputs."""
    path = _stage(job, runtime, folder) / "engine.json"
    return _read(path) if path.is_file() else None


def dense_reference(job: Job, runtime: Runtime, folder: WorkFolder) -> list[Transcript]:
    """Run the prompts through the dense model in transformers, in the dtype that the engine is held against, once."""
    path = _stage(job, runtime, folder) / "transformers.json"
    if not path.is_file():
        prompts, new_tokens = job.windows["prompts"].tolist(), job.recipe.report.new_tokens
        _write(path, transcribe_checkpoint(job.source.path, getattr(torch, runtime.reference_dtype), prompts, new_tokens))
    return _read(path)


def _stage(job: Job, runtime: Runtime, folder: WorkFolder) -> Path:
    identity = {
        **job.model_inputs(),
        "engine": runtime.version,
        "transformers": importlib.metadata.version("transformers"),
        "served_dtype": runtime.dtype,
        "compiled": runtime.compiled,
        "prompts": tensor_sha256(job.windows["prompts"]),
        "new_tokens": job.recipe.report.new_tokens,
    }
    return folder.stage(f"transcripts-{runtime.name}", identity)


def _write(path: Path, transcripts: Sequence[Transcript]) -> None:
    write_json(path, [asdict(transcript) for transcript in transcripts])


def _read(path: Path) -> list[Transcript]:
    return [Transcript.from_json(found) for found in json.loads(path.read_text(encoding="utf-8"))]
