"""Stage 6, the proof: engines agree with the model in memory and as served, and the perplexity on the report text."""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from exporters.base import Exporter, SelfProving
from lrserve.allocation.plan import Plan
from lrserve.allocation.quality import perplexity
from lrserve.compression.embedding import dequantize_embedding
from lrserve.compression.float32 import in_float32
from lrserve.compression.lowrank import dequantized, has_rounded_inputs, is_rounded
from lrserve.compression.rounding import Rounding
from lrserve.engines.runtimes import Runtime, loader_of
from lrserve.engines.transcripts import Transcript, transcribe_checkpoint, transcribe_model
from lrserve.errors import AgreementError
from lrserve.inputs.source import Source
from lrserve.pipeline.agreement import Pair, agree, agree_as_served
from lrserve.pipeline.baseline import dense_reference, keep_served, kept_served
from lrserve.pipeline.holding import Holding, holding
from lrserve.pipeline.improve import Improved
from lrserve.pipeline.job import Job
from lrserve.pipeline.measure import dense_checkpoint
from lrserve.report.console import progress_bar
from lrserve.storage.work import WorkFolder

_FLOAT32: Final = {"dtype": "float32", "enforce_eager": True, "onnx_provider": "cpu", "onnx_dtype": "float32"}
"""Settings of an engine whose arithmetic rounds least."""


@dataclass(frozen=True)
class Proof:
    """What metrics.json holds of the proof (docs/format.md).

    `agreement` is by engine. `samples` are the report's prompts and their greedy continuations by the dense and the compressed
    model, as text: by the recipe's engine as served if its rendering was exported, else by another; none where no engine is
    lrserve's own.
    """

    agreement: dict[str, Any]
    samples: list[dict[str, str]]


class Rendered:
    """The compressed model in the dtype in which it is stored, as exporters are given it."""

    def __init__(self, model: Any, exporters: Sequence[Exporter]) -> None:
        kinds = sorted({_renders(exporter) for exporter in exporters})
        self._models = dict.fromkeys(kinds, model)
        if not is_rounded(model):
            return
        for embedding, weights in kinds:
            if embedding and weights:
                continue
            own = model if len(kinds) == 1 else copy.deepcopy(model)
            own = own if embedding else dequantize_embedding(own)
            self._models[embedding, weights] = own if weights else dequantized(own.float())

    def by(self, exporter: Exporter) -> Any:
        """Return the model that an exporter renders: with rounded weights, or without where it has no way to say them."""
        return self._models[_renders(exporter)]


def _renders(exporter: Exporter) -> tuple[bool, bool]:
    """Say whether an exporter renders a rounded embedding, and other rounded weights."""
    rounds = getattr(exporter, "rounds", False)
    return rounds and getattr(exporter, "rounds_embedding", False), rounds


def prove_agreement(job: Job, rendered: Rendered, exporters: Sequence[Exporter], staging: Path, folder: WorkFolder) -> Proof:
    """Run the prompts through every exported rendering and hold them against transformers.

    1. in float32, unless there is no room for an engine in float32, against the model in memory; a graph in a dtype that rounds
       is shown to be a float32 graph with rounded numbers, and that one is run
    2. as the recipe's settings serve it, against transformers in the same dtype (of graphs, in float32), held to what the dense
       model shows there or, where inputs are rounded, to what that changes in transformers

    Args:
        job: the opened inputs.
        rendered: the compressed model.
        exporters: what wrote the renderings; one of another package does the first part only.
        staging: the folder with the renderings.
        folder: the work folder, where the dense model's transcripts are kept.

    Raises:
        AgreementError: as `agree` and `agree_as_served`.
        EngineError: an engine failed.
        InputError: as `loader_of`.
    """
    prompts, new_tokens = job.windows["prompts"].tolist(), job.recipe.report.new_tokens
    agreement: dict[str, dict[str, Any]] = {}
    proven: dict[str, tuple[Pair, Pair]] = {}
    held = holding(job)
    with progress_bar(len(exporters), "6/6 agreement") as progress:
        references: dict[int, list[Transcript]] = {}
        for index, exporter in enumerate(exporters):
            model = rendered.by(exporter)
            if id(model) not in references:
                with in_float32(model, at_once=held.reference):
                    references[id(model)] = transcribe_model(model, prompts, new_tokens)
            reference = references[id(model)]
            if isinstance(exporter, SelfProving):
                for engine, transcripts in exporter.transcribe(staging, prompts, new_tokens).items():
                    agreement[engine] = agree(engine, reference, transcripts, exporter.tolerance)
            else:
                found, proven[exporter.name] = _prove_rendering(job, held, exporter, model, reference, staging, folder)
                agreement |= found
            progress(index + 1)
    job.say(f"6/6 agreement: {'; '.join(_one_line(name, found) for name, found in agreement.items())}")
    shown = proven.get(job.recipe.engine.runtime) or next(iter(proven.values()), None)
    return Proof(agreement, _samples(job, *shown) if shown else [])


def _prove_rendering(
    job: Job,
    held: Holding,
    exporter: Exporter,
    model: Any,
    reference: Sequence[Transcript],
    staging: Path,
    folder: WorkFolder,
) -> tuple[dict[str, dict[str, Any]], tuple[Pair, Pair]]:
    """Prove a rendering of one of lrserve's exporters; returns its figures by engine, and the dense and compressed transcripts."""
    report = job.recipe.report
    prompts, new_tokens = job.windows["prompts"].tolist(), report.new_tokens
    agreement: dict[str, dict[str, Any]] = {}
    settings = job.recipe.engine
    plain, served = loader_of(exporter, settings.model_copy(update=_FLOAT32)), loader_of(exporter, settings)
    if plain.loads_sources:  # a checkpoint, which transformers loads too
        loaded = _loaded(job, staging, at_once=held.reference)
        agreement["transformers"] = agree("transformers", reference, loaded, exporter.tolerance)
    compressed, rounded = None, None
    with _in_float32(job, plain, served, model, staging, folder) as place:
        if held.engine_in_float32 or plain.dtype == served.dtype:
            with plain.open(place, {"": report.workload}) as engine:
                compressed = Pair(reference, engine.transcribe(prompts, new_tokens))
            agreement[plain.name] = agree(plain.name, reference, compressed.engine, exporter.tolerance)
    if served.rounding_inputs is not None and is_rounded(model):
        with in_float32(model, at_once=held.reference), served.rounding_inputs(model):
            loaded = transcribe_model(model, prompts, new_tokens)
        with served.open(staging, job.recipe.requests) as engine:
            compressed = Pair(loaded, engine.transcribe(prompts, new_tokens))
        rounded = Pair(reference, loaded)
    elif served.check_twin is not None:
        with served.open(staging, job.recipe.requests) as engine:
            compressed = Pair(reference, engine.transcribe(prompts, new_tokens))
    elif (served.dtype, served.compiled) != (plain.dtype, plain.compiled):
        loaded = transcribe_checkpoint(staging, getattr(torch, served.dtype), prompts, new_tokens)
        with served.open(staging, job.recipe.requests) as engine:
            compressed = Pair(loaded, engine.transcribe(prompts, new_tokens))
        rounded = Pair(reference, loaded) if has_rounded_inputs(model) else None
    assert compressed is not None  # an engine that did not run in float32 serves in another dtype
    dense = _dense(job, served, folder)
    agreement.setdefault(served.name, {})["as_served"] = {
        "dtype": served.dtype,
        "compiled": served.compiled,
        **agree_as_served(f"{served.name} in {served.dtype}", dense, compressed, rounded),
    }
    return agreement, (dense, compressed)


def _loaded(job: Job, staging: Path, *, at_once: bool) -> list[Transcript]:
    """Run the prompts through an exported checkpoint as transformers loads it, in float32."""
    prompts, new_tokens = job.windows["prompts"].tolist(), job.recipe.report.new_tokens
    if at_once:
        return transcribe_checkpoint(staging, torch.float32, prompts, new_tokens)
    model = Source(name="export", path=staging).load(job.dtype)
    with in_float32(model, at_once=False):
        return transcribe_model(model, prompts, new_tokens)


@contextmanager
def _in_float32(job: Job, plain: Runtime, served: Runtime, model: Any, staging: Path, folder: WorkFolder) -> Iterator[Path]:
    """Yield the folder of a rendering that can be run in float32.

    It is the rendering itself, or its twin, which is written for this and deleted after it. That the rendering is this twin, but
    for rounding, is shown first.
    """
    if served.check_twin is None:
        yield staging
        return
    twin = folder.root / "twin"
    shutil.rmtree(twin, ignore_errors=True)  # of a run that was killed
    twin.mkdir()
    try:
        plain.exporter.export(model, job.source.path, twin, job.dtype)
        served.check_twin(staging, twin)
        yield twin
    finally:
        shutil.rmtree(twin)


def _dense(job: Job, runtime: Runtime, folder: WorkFolder) -> Pair:
    """Return the dense model's transcripts; starts its engine where the search has not kept them."""
    served = kept_served(job, runtime, folder)
    if served is None:
        with runtime.open(dense_checkpoint(job, runtime, folder), job.recipe.requests) as engine:
            served = keep_served(job, runtime, engine, folder)
    return Pair(dense_reference(job, runtime, folder), served)


def _one_line(engine: str, found: Mapping[str, Any]) -> str:
    parts = [f"{found['max_logprob_difference']:.1e} nats in float32"] if "max_logprob_difference" in found else []
    if "as_served" in found:
        served = found["as_served"]
        means = [f"{served[side]['mean']:.2g}" for side in ("compressed", "dense")]
        parts.append(f"{means[0]} nats on average in {served['dtype']} as served (dense {means[1]})")
    return f"{engine} {', '.join(parts)}"


def _samples(job: Job, dense: Pair, compressed: Pair) -> list[dict[str, str]]:
    decode = job.source.tokenizer().decode
    return [
        {"prompt": decode(prompt), "dense": decode(list(before.tokens)), "compressed": decode(list(after.tokens))}
        for prompt, before, after in zip(job.windows["prompts"].tolist(), dense.engine, compressed.engine, strict=True)
    ]


def report_perplexity(job: Job, plan: Plan, improved: Improved, rounding: Rounding, staging: Path) -> dict[str, Any]:
    """Perplexity on the report text: the dense model, and the exported checkpoint as transformers loads it.

    Raises:
        AgreementError: one of them is not finite.
    """
    windows = job.windows["report"]
    with progress_bar(2 * len(windows), "6/6 perplexity") as progress:
        dense = perplexity(job.source.load(job.dtype), windows, progress)
        if (staging / "config.json").is_file():
            model = Source(name="export", path=staging).load(job.dtype)
        else:  # no checkpoint was asked for
            model = job.compressed_model(plan, improved.factors, rounding, improved.repairs)
        compressed = perplexity(model, windows, lambda done: progress(len(windows) + done))
    for name, found in (("dense", dense), ("compressed", compressed)):
        if not math.isfinite(found):
            raise AgreementError(
                f"the perplexity of the {name} model on the report text is not finite in {job.recipe.engine.dtype}; nothing was "
                "published, choose another engine.dtype"
            )
    increase = compressed / dense - 1
    job.say(f"6/6 perplexity on the report text: dense {dense:.2f}, compressed {compressed:.2f} ({increase:+.1%})")
    return {
        "dense": dense,
        "compressed": compressed,
        "increase": increase,
        "tokens": windows.numel(),
        "length": windows.shape[1],
    }
