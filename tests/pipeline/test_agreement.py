"""Agreement of transcripts: what passes, what fails, and that NaN never passes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrserve.engines.transcripts import Transcript
from lrserve.errors import AgreementError
from lrserve.pipeline.agreement import FACTOR, FLOOR, Differences, Pair, agree, agree_as_served, differences

REFERENCE = Transcript(logprobs=(-1.0, -2.0, -3.0), tokens=(5, 6, 7), margins=(1.0, 0.001, 1.0))


def compare(logprobs: tuple[float, ...] = REFERENCE.logprobs, tokens: tuple[int, ...] = REFERENCE.tokens) -> dict[str, float]:
    return agree("engine", [REFERENCE], [Transcript(logprobs=logprobs, tokens=tokens)], tolerance=0.01)


def moved(*nats: float, tokens: tuple[int, ...] = REFERENCE.tokens, margins: tuple[float, ...] = REFERENCE.margins) -> Pair:
    """An engine that differs from the reference by so much in each log probability."""
    logprobs = tuple(a + b for a, b in zip(REFERENCE.logprobs, nats, strict=True))
    return Pair([replace(REFERENCE, margins=margins)], [Transcript(logprobs=logprobs, tokens=tokens)])


def test_what_is_within_the_tolerance_agrees() -> None:
    assert compare((-1.0, -2.005, -3.0)) == {
        "max_logprob_difference": pytest.approx(0.005),
        "tolerance": 0.01,
        "greedy_equal": 3,
        "greedy_tokens": 3,
    }
    # a near tie may go either way, and what follows it is another text
    assert compare(tokens=(5, 9, 9))["greedy_equal"] == 1


@pytest.mark.parametrize("logprobs", [(-1.0, -2.02, -3.0), (math.nan, -2.0, -3.0), (-1.0, -2.0, math.nan), (-1.0, math.inf, -3.0)])
def test_a_difference_or_a_nan_anywhere_fails(logprobs: tuple[float, ...]) -> None:
    with pytest.raises(AgreementError, match="differs from the model in memory"):
        compare(logprobs)


def test_another_token_without_a_tie_fails() -> None:
    with pytest.raises(AgreementError, match="continues prompt 0 with token 8 at step 0, the model in memory with 5"):
        compare(tokens=(8, 6, 7))


def test_differences_are_of_all_prompts_and_stop_counting_at_the_first_other_token() -> None:
    first, second = moved(0.1, -0.2, 0.0, tokens=(5, 9, 7)), moved(0.0, 0.0, 0.3)
    both = Pair([*first.reference, *second.reference], [*first.engine, *second.engine])
    assert differences(both) == Differences(mean=pytest.approx(0.1), largest=pytest.approx(0.3), greedy_equal=4, greedy_tokens=6)


def test_as_served_the_dense_model_is_the_measure() -> None:
    found = agree_as_served("engine", moved(0.1, -0.2, 0.0, tokens=(5, 9, 7)), moved(0.2, 0.2, -0.2))
    figures: dict[str, Any] = {"greedy_tokens": 3}
    assert found == {
        "factor": FACTOR,
        "floor": FLOOR,
        "dense": {"mean": pytest.approx(0.1), "largest": pytest.approx(0.2), "greedy_equal": 1, **figures},
        "compressed": {"mean": pytest.approx(0.2), "largest": pytest.approx(0.2), "greedy_equal": 3, **figures},
    }


def test_as_served_no_difference_agrees_and_float32s_is_below_the_floor() -> None:
    assert agree_as_served("engine", moved(0, 0, 0), moved(0, 0, 0))["compressed"]["largest"] == 0
    assert agree_as_served("engine", moved(1e-7, 0, 0), moved(3e-4, 0, 0))["compressed"]["largest"] > 100 * FACTOR * 1e-7


@pytest.mark.parametrize(
    ("dense", "compressed", "message"),
    [
        pytest.param((0.1, 0.1, 0.4), (0.9, 0.9, 0.9), "mean", id="far on average"),
        pytest.param((0.1, 0.1, 0.1), (0.31, 0.31, 0.31), "mean", id="on average"),
        pytest.param((0.1, 0.1, 0.1), (0.0, 0.0, 0.902), "largest", id="one log probability"),
        pytest.param((0.0, 0.0, 0.0), (0.0, 0.0, 0.01), "mean", id="beyond the floor"),
        pytest.param((0.0, 0.0, 0.0), (0.0, 0.0, 2 * FLOOR), "largest", id="one beyond the floor"),
        pytest.param((0.1, 0.1, 0.1), (0.1, math.nan, 0.1), "nan nats", id="a NaN"),
        pytest.param((0.1, 0.1, 0.1), (math.nan, 0.1, 0.1), "nan nats", id="a NaN at the start"),
        pytest.param((0.1, 0.1, 0.1), (0.1, -math.inf, 0.1), "inf nats", id="an infinite one"),
    ],
)
def test_as_served_a_difference_beyond_the_dense_models_fails(
    dense: tuple[float, ...], compressed: tuple[float, ...], message: str
) -> None:
    with pytest.raises(AgreementError, match=rf"engine in bfloat16 differs from transformers by .*{message}"):
        agree_as_served("engine in bfloat16", moved(*dense), moved(*compressed))


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_as_served_a_dense_model_that_is_not_finite_measures_nothing(broken: float) -> None:
    with pytest.raises(AgreementError, match=r"the dense model's log probabilities are not finite.*choose another engine\.dtype"):
        agree_as_served("engine", moved(0.0, broken, 0.0), moved(0.0, 0.0, 0.0))


TIE = 2 * (FACTOR * 0.1 + FLOOR)


@pytest.mark.parametrize(("margin", "passes"), [(0.99 * TIE, True), (1.01 * TIE, False), (math.nan, False)])
def test_as_served_another_token_needs_a_near_tie(margin: float, passes: bool) -> None:
    dense, compressed = moved(0.1, 0.1, 0.1), moved(0.1, 0.1, 0.1, tokens=(5, 9, 9), margins=(1.0, margin, 1.0))
    if passes:
        assert agree_as_served("engine", dense, compressed)["compressed"]["greedy_equal"] == 1
    else:
        with pytest.raises(AgreementError, match="continues prompt 0 with token 9 at step 1, transformers with 6"):
            agree_as_served("engine", dense, compressed)


NATS = st.floats(-1.0, 1.0)


@given(st.tuples(NATS, NATS, NATS), st.tuples(NATS, NATS, NATS))
def test_as_served_passes_exactly_what_both_bounds_allow(dense: tuple[float, ...], compressed: tuple[float, ...]) -> None:
    measure, own = differences(moved(*dense)), differences(moved(*compressed))
    within = own.mean <= FACTOR * measure.mean + FLOOR and own.largest <= FACTOR**2 * measure.largest + FLOOR
    try:
        agree_as_served("engine", moved(*dense), moved(*compressed))
    except AgreementError:
        assert not within
    else:
        assert within


def test_as_served_a_model_that_rounds_inputs_may_differ_by_what_that_changes() -> None:
    dense, compressed = moved(0.01, 0.01, 0.01), moved(0.1, -0.1, 0.1)
    with pytest.raises(AgreementError, match="the bound is 3 x 0.01 of the dense model"):
        agree_as_served("engine", dense, compressed)
    found = agree_as_served("engine", dense, compressed, rounded=moved(0.05, 0.05, -0.05))
    assert found["rounded"]["mean"] == pytest.approx(0.05)
    with pytest.raises(AgreementError, match="the bound is 3 x 0.03 of the dense model or of rounding inputs"):
        agree_as_served("engine", dense, compressed, rounded=moved(0.03, 0.03, -0.03))
    with pytest.raises(AgreementError):
        agree_as_served("engine", dense, compressed, rounded=moved(math.nan, 0.05, 0.05))
