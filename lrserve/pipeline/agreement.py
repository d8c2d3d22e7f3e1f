"""How far an engine is from transformers, and how far it may be.

In float32 the reference is the model in memory, and the bound is the exporter's tolerance. As served, in a dtype that rounds, two
engines differ even on the dense model; so the bound there is what they differ by on the dense model, times `FACTOR`.

Where a model rounds inputs to 8 bits the last bit of a sum decides to which side an input falls, and two engines differ by as much
as rounding inputs changes. That is known without the engine: it is what transformers in that dtype differs by from itself in
float32, which rounds no inputs. The bound is then that of the larger of the two. What it cannot see is found in float32.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from lrserve.engines.transcripts import Transcript
from lrserve.errors import AgreementError

FACTOR: Final = 3.0
"""How many times the dense model's mean difference is still noise; the largest one may be its square.

SmolLM2-135M in bfloat16, vLLM (compiled and eager) against transformers, 48 prompts of 64 tokens, drawn four at a time: the
compressed model's mean is 0.7 to 2.2 times the dense model's. The largest of so few values scatters more, and is 0.2 to 5 times
the dense model's. Faults move the mean: two neighbouring layers in the wrong order by 6 to 9 times the dense model's, lost biases
of the factors of q, v, o or down_proj by 8 to 48 times. What moves it by less than the dtype's rounding is found in float32.
"""
FLOOR: Final = 1e-3
"""Nats that are added to the bound: in float32 engines differ by 1e-6 to 4e-4, and the ratio of two such figures says nothing."""

_ACTION: Final = "nothing was published, please report this"


@dataclass(frozen=True)
class Differences:
    """Of an engine's transcripts from the reference's, over all prompts.

    `mean` and `largest` are absolute differences of a prompt token's log probability, in nats; both are NaN if any is.
    `greedy_equal` counts the tokens before the first difference of each continuation, `greedy_tokens` all of them.
    """

    mean: float
    largest: float
    greedy_equal: int
    greedy_tokens: int


@dataclass(frozen=True)
class Pair:
    """Transcripts of the same prompts, in one dtype: transformers' and an engine's."""

    reference: Sequence[Transcript]
    engine: Sequence[Transcript]


def differences(pair: Pair) -> Differences:
    """Compare log probabilities and greedy tokens."""
    nats = [0.0]
    equal = 0
    for expected, found in zip(pair.reference, pair.engine, strict=True):
        nats += [abs(a - b) for a, b in zip(expected.logprobs, found.logprobs, strict=True)]
        equal += _equal_tokens(expected, found)
    return Differences(
        mean=statistics.fmean(nats[1:] or nats),
        largest=math.nan if any(map(math.isnan, nats)) else max(nats),
        greedy_equal=equal,
        greedy_tokens=sum(len(expected.tokens) for expected in pair.reference),
    )


def agree(engine: str, reference: Sequence[Transcript], transcripts: Sequence[Transcript], tolerance: float) -> dict[str, Any]:
    """Compare an engine's transcripts in float32 with those of the model in memory.

    Returns:
        `max_logprob_difference` in nats, `tolerance`, and `greedy_equal` of `greedy_tokens` tokens. Where the reference's two best
        tokens are within twice the tolerance, either is right, and the rest of that continuation is not compared.

    Raises:
        AgreementError: a difference beyond the tolerance.
    """
    pair = Pair(reference, transcripts)
    found = differences(pair)
    if not found.largest <= tolerance:  # written so that a NaN fails
        raise AgreementError(
            f"{engine} differs from the model in memory by {found.largest:.3g} nats in a prompt token's log probability (tolerance "
            f"{tolerance:g}); {_ACTION}"
        )
    _require_ties(engine, "the model in memory", pair, tolerance)
    return {
        "max_logprob_difference": found.largest,
        "tolerance": tolerance,
        "greedy_equal": found.greedy_equal,
        "greedy_tokens": found.greedy_tokens,
    }


def agree_as_served(engine: str, dense: Pair, compressed: Pair, rounded: Pair | None = None) -> dict[str, Any]:
    """Hold the compressed model's differences to those of the dense model, between the same two engines on the same prompts.

    The mean difference may be `FACTOR` times the dense model's, and the largest the square of that; and `FLOOR` more. Where greedy
    tokens first differ, the reference's two best tokens must be within twice `FACTOR` times the dense model's largest difference.

    Args:
        engine: names the engine, with its dtype, in messages.
        dense: the dense model's transcripts.
        compressed: the exported model's.
        rounded: of a model that rounds inputs, transformers' transcripts in float32 and in the dtype.

    Returns:
        `factor`, `floor`, and `Differences` as `dense`, `compressed` and, where it was given, `rounded`.

    Raises:
        AgreementError: a difference beyond its bound, or the dense model gives no bound, since its own differences are not finite.
    """
    expected, found = [differences(dense)], differences(compressed)
    expected += [] if rounded is None else [differences(rounded)]
    of = "the dense model" if rounded is None else "the dense model or of rounding inputs"
    for statistic, factor in (("mean", FACTOR), ("largest", FACTOR**2)):
        own, measure = getattr(found, statistic), max(getattr(known, statistic) for known in expected)
        if not math.isfinite(measure):
            raise AgreementError(
                f"{engine}: the dense model's log probabilities are not finite, so there is nothing to hold the compressed "
                "model's to; nothing was published, choose another engine.dtype"
            )
        if not own <= factor * measure + FLOOR:  # written so that a NaN fails
            raise AgreementError(
                f"{engine} differs from transformers by {own:.3g} nats ({statistic} difference of prompt tokens' log "
                f"probabilities); the bound is {factor:g} x {measure:.3g} of {of} + {FLOOR:g}; {_ACTION}"
            )
    _require_ties(engine, "transformers", compressed, FACTOR * max(known.largest for known in expected) + FLOOR)
    sides = dict(zip(("dense", "rounded"), map(asdict, expected), strict=False))
    return {"factor": FACTOR, "floor": FLOOR, **sides, "compressed": asdict(found)}


def _equal_tokens(expected: Transcript, found: Transcript) -> int:
    """Count the tokens before the first difference."""
    alike = [a == b for a, b in zip(expected.tokens, found.tokens, strict=True)]
    return alike.index(False) if False in alike else len(alike)


def _require_ties(engine: str, other: str, pair: Pair, tolerance: float) -> None:
    """Raise AgreementError unless the reference's two best tokens are within twice the tolerance at each first difference."""
    for number, (expected, found) in enumerate(zip(pair.reference, pair.engine, strict=True)):
        step = _equal_tokens(expected, found)
        if step < len(expected.tokens) and not expected.margins[step] <= 2 * tolerance:  # written so that a NaN fails
            raise AgreementError(
                f"{engine} continues prompt {number} with token {found.tokens[step]} at step {step}, {other} with "
                f"{expected.tokens[step]} by a margin of {expected.margins[step]:.3f} nats; {_ACTION}"
            )
