"""Stage 6, the proof: engines agree with the model in memory, and the perplexity on the report text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from exporters.base import Exporter, SelfProving
from lrserve.allocation.plan import RankPlan
from lrserve.allocation.quality import perplexity
from lrserve.compression.factorize import FactorSource
from lrserve.engines.renderings import transcribe_rendering
from lrserve.engines.transcripts import Transcript, transcribe_model
from lrserve.errors import AgreementError
from lrserve.inputs.source import Source
from lrserve.pipeline.job import Job
from lrserve.report.console import progress_bar


def prove_agreement(job: Job, model: Any, exporters: Sequence[Exporter], staging: Path) -> dict[str, Any]:
    """Run the prompts through every exported rendering, in float32, and hold them against the model in memory.

    Raises:
        AgreementError: as `agree`.
    """
    prompts = job.windows["prompts"].tolist()
    new_tokens = job.recipe.report.new_tokens
    results: dict[str, Any] = {}
    with progress_bar(len(exporters) + 1, "6/6 agreement") as progress:
        reference = transcribe_model(model, prompts, new_tokens)
        progress(1)
        for index, exporter in enumerate(exporters):
            if isinstance(exporter, SelfProving):
                found = exporter.transcribe(staging, prompts, new_tokens)
            else:
                found = transcribe_rendering(exporter.name, staging, prompts, new_tokens)
            for engine, transcripts in found.items():
                results[engine] = agree(engine, reference, transcripts, exporter.tolerance)
            progress(index + 2)
    job.say("6/6 agreement: " + ", ".join(f"{name} {a['max_logprob_difference']:.1e} nats" for name, a in results.items()))
    return results


def agree(engine: str, reference: Sequence[Transcript], transcripts: Sequence[Transcript], tolerance: float) -> dict[str, Any]:
    """Compare an engine's transcripts with the reference.

    Returns:
        `max_logprob_difference` in nats, `tolerance`, and `greedy_equal` of `greedy_tokens` tokens. Where the reference's two best
        tokens are within twice the tolerance, either is right, and the rest of that continuation is not compared.

    Raises:
        AgreementError: a difference beyond the tolerance.
    """
    differences = [0.0]
    equal = total = 0
    for number, (expected, found) in enumerate(zip(reference, transcripts, strict=True)):
        differences += [abs(a - b) for a, b in zip(expected.logprobs, found.logprobs, strict=True)]
        total += len(expected.tokens)
        for step, (right, token) in enumerate(zip(expected.tokens, found.tokens, strict=True)):
            if token != right:
                if not expected.margins[step] <= 2 * tolerance:  # written so that a NaN fails
                    raise AgreementError(
                        f"{engine} continues prompt {number} with token {token} at step {step}, the model in memory with {right} "
                        f"by a margin of {expected.margins[step]:.3f} nats; nothing was published, please report this"
                    )
                break
            equal += 1
    worst = math.nan if any(map(math.isnan, differences)) else max(differences)
    if not worst <= tolerance:
        raise AgreementError(
            f"{engine} differs from the model in memory by {worst:.3g} nats in a prompt token's log probability (tolerance "
            f"{tolerance:g}); nothing was published, please report this"
        )
    return {"max_logprob_difference": worst, "tolerance": tolerance, "greedy_equal": equal, "greedy_tokens": total}


def report_perplexity(job: Job, plan: RankPlan, factors: FactorSource, staging: Path) -> dict[str, Any]:
    """Perplexity on the report text: the dense model, and the exported checkpoint as transformers loads it."""
    windows = job.windows["report"]
    with progress_bar(2 * len(windows), "6/6 perplexity") as progress:
        dense = perplexity(job.source.load(job.dtype), windows, progress)
        if (staging / "config.json").is_file():
            model = Source(name="export", path=staging).load(job.dtype)
        else:  # no checkpoint was asked for
            model = job.served_model(plan, factors)
        compressed = perplexity(model, windows, lambda done: progress(len(windows) + done))
    increase = compressed / dense - 1
    job.say(f"6/6 perplexity on the report text: dense {dense:.2f}, compressed {compressed:.2f} ({increase:+.1%})")
    return {
        "dense": dense,
        "compressed": compressed,
        "increase": increase,
        "tokens": windows.numel(),
        "length": windows.shape[1],
    }
