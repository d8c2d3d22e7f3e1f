"""Agreement of transcripts: what passes, what fails, and that NaN never passes."""

from __future__ import annotations

import math

import pytest

from lrserve.engines.transcripts import Transcript
from lrserve.errors import AgreementError
from lrserve.pipeline.prove import agree

REFERENCE = Transcript(logprobs=(-1.0, -2.0, -3.0), tokens=(5, 6, 7), margins=(1.0, 0.001, 1.0))


def compare(logprobs: tuple[float, ...] = REFERENCE.logprobs, tokens: tuple[int, ...] = REFERENCE.tokens) -> dict[str, float]:
    return agree("engine", [REFERENCE], [Transcript(logprobs=logprobs, tokens=tokens)], tolerance=0.01)


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
