"""The Exporter protocol, and the transcripts by which renderings of one model are held against each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch


@dataclass(frozen=True)
class Transcript:
    """What one engine computes, in float32, for one prompt of T token ids.

    `logprobs` (T - 1): natural-log probability that the engine gives to each prompt token after the first;
    `tokens` (S): its greedy continuation; `margins` (S): gap between the two best log probabilities at each step of it
    (empty where the engine does not tell).
    """

    logprobs: tuple[float, ...]
    tokens: tuple[int, ...]
    margins: tuple[float, ...] = ()


class Exporter(Protocol):
    """One rendering of the compressed model. Register a class of this shape under the entry point group `lrserve.exporters`."""

    name: str
    tolerance: float
    """Largest difference of a prompt log probability to the model in memory, in nats, that is still agreement."""

    def preflight(self, skeleton: Any) -> None:
        """Check, before any work, that the export and its proof can be done.

        Args:
            skeleton: the dense model on the meta device.

        Raises:
            EngineError: something that they need is not installed.
            UnsupportedModelError: the model cannot be rendered faithfully.
        """

    def export(self, model: Any, source: Path, out: Path, dtype: torch.dtype) -> None:
        """Write the rendering of `model` into `out`.

        Args:
            model: a float32 transformers causal LM whose factorized linears are `LowRankLinear`; its parameters hold values of
                `dtype`, so storing them in it loses nothing.
            source: the dense model's folder, for the tokenizer and the generation config.
            out: exists and is private to this run; nothing outside it may be written.
            dtype: in which a rendering with a choice stores its weights.
        """

    def transcribe(self, out: Path, prompts: Sequence[Sequence[int]], new_tokens: int) -> dict[str, list[Transcript]]:
        """Load the rendering from `out` in float32 and run the prompts; keys name the engines that ran them."""
