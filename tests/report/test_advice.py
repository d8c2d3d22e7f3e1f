"""The last lines of a run: what was gained and lost, and whether it is worth it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lrserve.report.advice import advice


def metrics(speedup: float, lowest: float, increase: float, **changes: Any) -> dict[str, Any]:
    return {
        "throughput": {"speedup": speedup, "speedup_lowest": lowest, "speedup_highest": speedup + 0.05},
        "perplexity": {
            "report": {"increase": increase, "dense": 20.0, "compressed": 20.0 * (1 + increase)},
            "validation": {"dense": 20.0},
        },
        "measured_plans": [],
        "sizes": {"bytes": {"ratio": 0.158}},
        "improved": {"refine": {}},
        "plan": {"origin": "int8 everywhere", "usual": False},
        "exports": ["vllm", "onnx"],
        "target": "ratio 0.2",
        **changes,
    }


@pytest.mark.parametrize(
    ("speedup", "lowest", "increase", "verdict"),
    [
        (1.20, 1.15, 0.05, "worth trying"),
        (1.20, 1.15, 0.30, "the gain is not worth the loss"),
        (1.05, 0.98, 0.01, "do not show that it is faster"),
        (0.90, 0.85, 0.01, "do not show that it is faster"),
        (1.20, 1.15, -0.01, "worth trying"),
        (1.20, 1.15, float("inf"), "the gain is not worth the loss"),
    ],
)
def test_the_verdict_weighs_gain_against_loss(speedup: float, lowest: float, increase: float, verdict: str) -> None:
    text = advice(metrics(speedup, lowest, increase), Path("demo"))
    assert verdict in text
    assert f"{speedup:.2f}x as fast" in text
    assert "16% smaller" in text


def test_commands_are_those_of_what_was_exported() -> None:
    both = advice(metrics(1.2, 1.1, 0.05), Path("demo"))
    assert "lrserve serve demo" in both
    assert "lrserve bench demo" in both
    graph = advice(metrics(1.2, 1.1, 0.05, exports=["onnx"]), Path("demo"))
    assert "lrserve serve demo --engine onnxruntime" in graph
    assert "lrserve bench demo --engine onnxruntime" in graph
    other = advice(metrics(1.2, 1.1, 0.05, exports=["theirs"]), Path("demo"))
    assert "lrserve serve" not in other
    assert "--export vllm" in other


@pytest.mark.parametrize(
    ("increase", "target", "limit"),
    [
        (0.30, "ratio 0.2", "0.05"),
        (0.04, "ratio 0.2", "0.02"),
        (0.30, "max-ppl-increase 0.03", "0.015"),
        (0.30, "max-ppl-increase 0.5", "0.05"),
        (0.06, "min-speedup 1.01", "0.03"),
        (-0.01, "front", "0.05"),
        (float("inf"), "max-ppl-increase 0.03", "0.015"),
    ],
)
def test_less_is_less_than_what_was_asked_for_and_lost(increase: float, target: str, limit: str) -> None:
    steps = advice(metrics(1.02, 1.01, increase, target=target), Path("demo"))
    assert f"ask for less, such as --max-ppl-increase {limit}. " in steps


def test_what_was_done_is_not_advised_again() -> None:
    assert "--recover 10" in advice(metrics(1.2, 1.1, 0.3), Path("demo"))
    assert "--recover" not in advice(metrics(1.2, 1.1, 0.3, improved={"recover": {}}), Path("demo"))
    assert "--min-speedup" not in advice(metrics(1.2, 1.1, 0.05, target="min-speedup 1.15"), Path("demo"))
    assert "--max-ppl-increase" in advice(metrics(1.2, 1.1, 0.3), Path("demo"))


def test_a_slower_or_a_better_model_is_not_called_a_gain_or_a_loss() -> None:
    slower = advice(metrics(0.9, 0.85, -0.01), Path("demo"))
    assert "Gained" not in slower
    assert "Lost" not in slower
    assert "--recover" not in slower  # there is no loss to recover from
    assert "--max-ppl-increase" not in slower  # a plan that removes less is not faster
    assert "--min-speedup" in slower
    faster = advice(metrics(1.2, 1.15, 0.3), Path("demo"))
    assert "Gained: the same requests" in faster
    assert "Lost: the perplexity" in faster


def test_where_rounding_alone_is_best_it_says_so() -> None:
    usual = {"origin": "int8 everywhere", "usual": True}
    assert "The best answer to this target is int8 everywhere" in advice(metrics(1.2, 1.15, 0.02, plan=usual), Path("demo"))
    assert "best answer" not in advice(metrics(1.2, 1.15, 0.02), Path("demo"))


def test_a_faster_plan_that_loses_hardly_more_is_named() -> None:
    def plan(origin: str, perplexity: float, speedup: float, chosen: bool = False) -> dict[str, Any]:
        spread = {"speedup": speedup, "speedup_lowest": speedup - 0.04, "speedup_highest": speedup + 0.04}
        return {"origin": origin, "validation_perplexity": perplexity, "chosen": chosen, **spread}

    chosen, int8 = plan("trial 8", 20.0, 1.16, chosen=True), plan("int8 everywhere", 20.1, 1.28)
    small = {"measured_plans": [int8, chosen], "target": "min-speedup 1.15"}
    text = advice(metrics(1.16, 1.1, 0.003, **small), Path("demo"))
    assert "--min-speedup 1.25: int8 everywhere was measured at 1.28x with +0.5% of validation perplexity" in text
    assert "--recover" not in text  # there is next to nothing to take back
    worse = [plan("int4 everywhere", 22.0, 1.5), plan("trial 5", 20.0, 1.2), chosen]
    assert "was measured at" not in advice(metrics(1.16, 1.1, 0.003, **{**small, "measured_plans": worse}), Path("demo"))
