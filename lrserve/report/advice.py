"""What a finished run means for its user, in plain words: gain, loss, whether it is worth it, and what to run next."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

_LITTLE = 0.02  # share of perplexity that is hardly a loss
_FASTER = 1.03  # times the chosen plan's speed
_WORTH = 1.0  # nats of loss that one nat of speed is worth: one percent of perplexity for one percent of throughput
_SERVED_BY: Final = {"vllm": "", "onnx": " --engine onnxruntime"}
"""What is exported for an engine that lrserve serves with, and the flag that chooses it."""


def advice(metrics: Mapping[str, Any], out: Path) -> str:
    """Return a few lines on what was gained, what was lost and what to try next, and the commands to serve and to measure.

    Args:
        metrics: what metrics.json holds.
        out: the artifact's folder.
    """
    speed, quality = metrics["throughput"], metrics["perplexity"]["report"]
    gain, low = speed["speedup"], speed["speedup_lowest"]
    loss = math.log1p(quality["increase"])
    size = metrics["sizes"]["bytes"]["ratio"]
    lines = [
        f"{'Gained' if low > 1 else 'Size and speed'}: the same requests run {gain:.2f}x as fast as with the dense model "
        f"({low:.2f}x to {speed['speedup_highest']:.2f}x), and the weights are {size:.0%} smaller.",
        f"{'Lost' if loss > 0 else 'Quality'}: the perplexity on held-out text goes from {quality['dense']:.2f} to "
        f"{quality['compressed']:.2f} ({quality['increase']:+.1%}).",
        *_usual(metrics),
        _verdict(gain, low, loss),
        *_next_steps(metrics, gain, low, quality["increase"]),
    ]
    engine = next((flag for name, flag in _SERVED_BY.items() if name in metrics["exports"]), None)
    if engine is not None:
        lines += [f"Serve it:    lrserve serve {out}{engine}", f"Measure it:  lrserve bench {out}{engine}"]
    else:
        lines.append(f"{out} holds {' and '.join(metrics['exports'])}; --export vllm adds a checkpoint to serve.")
    return "\n".join(lines)


def _usual(metrics: Mapping[str, Any]) -> list[str]:
    """Say so where rounding alone is the best answer."""
    plan = metrics["plan"]
    if not plan["usual"]:
        return []
    return [f"The best answer to this target is {plan['origin']}: nothing that could be removed or kept besides pays here."]


def _verdict(gain: float, low: float, loss: float) -> str:
    if low <= 1:
        return (
            "Verdict: not worth it for speed. The rounds do not show that it is faster than the dense model: serve the dense "
            "model (docs/guide.md)."
        )
    if loss > _WORTH * math.log(gain):
        return "Verdict: the gain is not worth the loss for most uses; ask for less (docs/guide.md)."
    return "Verdict: worth trying on your own task before you serve it; perplexity does not see everything."


def _faster(metrics: Mapping[str, Any], gain: float) -> str | None:
    """Name the fastest other plan that was measured, if it is faster than the chosen one for a loss that is hardly more."""
    dense = metrics["perplexity"]["validation"]["dense"]
    plans = metrics["measured_plans"]
    own = next((plan["validation_perplexity"] for plan in plans if plan["chosen"]), dense)
    near = [
        plan
        for plan in plans
        if not plan["chosen"]
        and plan["speedup_lowest"] > _FASTER * gain
        and plan["validation_perplexity"] / dense <= (1 + _LITTLE) * own / dense
    ]
    if not near:
        return None
    best = max(near, key=lambda plan: plan["speedup"])
    loss = best["validation_perplexity"] / dense - 1
    return (
        f"--min-speedup {math.floor(20 * best['speedup']) / 20:g}: {best['origin']} was measured at {best['speedup']:.2f}x "
        f"with {loss:+.1%} of validation perplexity"
    )


def _next_steps(metrics: Mapping[str, Any], gain: float, low: float, increase: float) -> list[str]:
    steps = []
    kind, _, asked = metrics["target"].partition(" ")
    if faster := _faster(metrics, gain):
        steps.append(faster)
    if increase > _LITTLE and "recover" not in metrics["improved"]:
        steps.append("add --recover 10, which trains this plan against the dense model for ten minutes: same speed, less loss")
    if low > 1 and (kind == "front" or math.log1p(increase) > _WORTH * math.log(gain)):
        halves = [value / 2 for value in (increase, float(asked) if kind == "max-ppl-increase" else 0.0) if value > 0]
        steps.append(f"ask for less, such as --max-ppl-increase {min([0.05, *halves]):.2g}")
    elif kind != "min-speedup":
        steps.append(f"name the speed that you need, such as --min-speedup {max(1.1, round(gain, 1)):g}; it says if no plan has it")
    return [f"Try next: {'; or '.join(steps)}. Finished stages are reused."] if steps else []
