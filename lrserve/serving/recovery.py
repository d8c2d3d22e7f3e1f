"""What the compressed model keeps of the dense one's result on a task, and whether the items are enough to tell.

Recovery is the compressed metric over the dense metric, as llm-compressor's tests define it; where lower is better, dense over
compressed. Both models answer the same items, so the error of their difference is that of the differences item by item, which is
smaller than the errors of the two results would suggest.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Final

Z: Final = 1.96  # standard errors within which 95 % of chance differences lie


def compare(dense: Mapping[str, Any], compressed: Mapping[str, Any]) -> dict[str, Any]:
    """Compare two models on one task, each as `Harness.evaluate` gives it; what is returned is JSON.

    Returns:
        `items`, `shots`, `chance`, and `metrics`: by name, `dense` and `compressed` with `value` and `stderr`, `higher_is_better`,
        `recovery` (None where the divisor is 0), `difference` (positive is better) with its `stderr`, and `verdict`.
    """
    metrics = {}
    for name, before in dense["metrics"].items():
        after = compressed["metrics"].get(name)
        if after is None:
            continue
        higher = before["higher_is_better"]
        above, below = (after["value"], before["value"]) if higher else (before["value"], after["value"])
        difference = {"value": above - below, "stderr": difference_error(before, after)}
        metrics[name] = {
            "dense": {"value": before["value"], "stderr": before["stderr"]},
            "compressed": {"value": after["value"], "stderr": after["stderr"]},
            "higher_is_better": higher,
            "recovery": above / below if below else None,
            "difference": difference,
            "verdict": verdict(difference, before, dense["chance"]),
        }
    return {"items": dense["items"], "shots": dense["shots"], "chance": dense["chance"], "metrics": metrics}


def difference_error(dense: Mapping[str, Any], compressed: Mapping[str, Any]) -> float | None:
    """Return the standard error of the difference of two results: by items where both have them, else of independent results."""
    before, after = dense["samples"], compressed["samples"]
    if before and after and len(before) == len(after) > 1:
        return paired_error(before, after)
    if dense["stderr"] is None or compressed["stderr"] is None:
        return None
    return math.hypot(dense["stderr"], compressed["stderr"])


def paired_error(before: Sequence[float], after: Sequence[float]) -> float:
    """Return the standard error of the mean of after - before."""
    return statistics.stdev(b - a for a, b in zip(before, after, strict=True)) / math.sqrt(len(before))


def verdict(difference: Mapping[str, float | None], dense: Mapping[str, Any], chance: float | None) -> str:
    """Say what a difference is worth: `worse`, `better`, `within noise`, `error not known`, or that dense only guesses."""
    value, error = difference["value"], difference["stderr"]
    if value is None or error is None:
        return "error not known"
    if chance is not None and dense["stderr"] is not None and dense["value"] - Z * dense["stderr"] <= chance:
        return "dense at chance"
    if abs(value) <= Z * error:
        return "within noise"
    return "better" if value > 0 else "worse"
