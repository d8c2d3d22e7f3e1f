"""What an engine that generates text is asked for, and what it gives step by step."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    max_tokens: most tokens of the answer, the end token included.
    temperature: 0 takes the most probable token.
    top_p: share of the probability that tokens are drawn from, above 0 and at most 1.
    seed: of the draws; None draws anew each time.
    ignore_eos: no end token ends the answer, which then has exactly `max_tokens`.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    ignore_eos: bool = False


@dataclass(frozen=True)
class Step:
    """Tokens that one step brought, none while a prompt is read, and why the answer has ended, if it has.

    With `stop` the last token is an end token, which is no part of the text.
    """

    tokens: Sequence[int] = ()
    finish: Finish | None = None


class Generates(Protocol):
    """A running engine, one answer at a time."""

    def generate(self, prompt: Sequence[int], sampling: Sampling) -> Generator[Step]:
        """Yield an answer step by step, the last with its `finish`; closing the generator ends it early."""
