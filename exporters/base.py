"""The Exporter protocol: what writes one rendering of a compressed model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from lrserve.recipe import EngineSettings


class Exporter(Protocol):
    """One rendering of the compressed model. Register a class of this shape under the entry point group `lrserve.exporters`."""

    name: str
    tolerance: float
    """Largest difference of a prompt log probability to the model in memory, in float32 and in nats, that is still agreement."""
    rounds: bool
    """Whether it renders rounded weights. Without this attribute, or if it is false, it is given the model with these weights
    as the floating point numbers that they stand for, and is held against that."""
    rounds_embedding: bool
    """Likewise for a rounded embedding and output layer."""

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
            model: a transformers causal LM in `dtype` whose factorized linears are `LowRankLinear`; in float32 where rounded
                weights became what they stand for.
            source: the dense model's folder, for the tokenizer and the generation config.
            out: exists and is private to this run; nothing outside it may be written.
            dtype: in which a rendering with a choice stores its weights.
        """


@runtime_checkable
class Configured(Protocol):
    """An exporter with settings in the recipe's section `engine`; without this method it is used as its class makes it."""

    def configured(self, settings: EngineSettings) -> Exporter:
        """Return the exporter with these settings."""


@runtime_checkable
class SelfProving(Protocol):
    """An exporter of another package, whose engine lrserve does not know: it runs the rendering for the proof itself.

    The proof is in float32 only; exporters of other packages without this method are refused.
    """

    def transcribe(self, out: Path, prompts: Sequence[Sequence[int]], new_tokens: int) -> Mapping[str, Sequence[Any]]:
        """Load the rendering from `out` in float32 and run the prompts.

        Returns:
            By the name of an engine, one object for each prompt with the fields of `lrserve.engines.transcripts.Transcript`.
        """
