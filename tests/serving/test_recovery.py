"""Recovery is llm-compressor's ratio, and a difference within its error is called that."""

from __future__ import annotations

import math
from typing import Any

import pytest

from lrserve.serving.recovery import compare, difference_error, paired_error


def result(values: list[float] | None = None, *, value: float = 0.5, stderr: float | None = None, higher: bool = True) -> Any:
    value = sum(values) / len(values) if values else value
    metric = {"value": value, "stderr": stderr, "higher_is_better": higher, "samples": values}
    return {"items": 100, "shots": 0, "chance": None, "metrics": {"acc": metric}}


def compared(dense: Any, compressed: Any) -> dict[str, Any]:
    found: dict[str, Any] = compare(dense, compressed)["metrics"]["acc"]
    return found


def test_recovery_is_compressed_over_dense_or_the_inverse_where_lower_is_better() -> None:
    assert compared(result(value=0.8), result(value=0.6))["recovery"] == pytest.approx(0.75)
    found = compared(result(value=10.0, higher=False), result(value=12.5, higher=False))
    assert found["recovery"] == pytest.approx(0.8)
    assert found["difference"]["value"] < 0  # worse
    assert compared(result(value=0.0), result(value=0.1))["recovery"] is None


def test_the_error_of_the_difference_is_by_items_where_both_have_them() -> None:
    before, after = [1.0, 1.0, 0.0, 1.0], [1.0, 0.0, 0.0, 1.0]
    assert paired_error(before, after) == pytest.approx(0.5 / math.sqrt(4))
    with_samples = {"samples": before, "stderr": 0.3}
    assert difference_error(with_samples, {"samples": after, "stderr": 0.4}) == pytest.approx(0.25)
    assert difference_error(with_samples, {"samples": None, "stderr": 0.4}) == pytest.approx(0.5)
    assert difference_error(with_samples, {"samples": None, "stderr": None}) is None


@pytest.mark.parametrize(
    ("flipped", "verdict"), [(0, "within noise"), (2, "within noise"), (20, "worse"), (-20, "better"), (-2, "within noise")]
)
def test_a_difference_within_its_error_is_noise(flipped: int, verdict: str) -> None:
    before = [1.0] * 50 + [0.0] * 50
    after = before.copy()
    for index in range(abs(flipped)):
        after[index if flipped > 0 else 99 - index] = 0.0 if flipped > 0 else 1.0
    assert compared(result(before), result(after))["verdict"] == verdict


def test_where_no_error_is_known_none_is_claimed() -> None:
    assert compared(result(value=0.8), result(value=0.1))["verdict"] == "error not known"


@pytest.mark.parametrize(("dense", "verdict"), [(0.3, "dense at chance"), (0.6, "worse")])
def test_a_dense_model_that_guesses_is_named(dense: float, verdict: str) -> None:
    before, after = result(value=dense, stderr=0.04), result(value=0.1, stderr=0.04)
    before["chance"] = 0.25
    assert compared(before, after)["verdict"] == verdict


def test_only_metrics_that_both_have_are_compared() -> None:
    assert compare(result(), {**result(), "metrics": {}})["metrics"] == {}
