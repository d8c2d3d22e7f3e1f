"""Transcripts, by which renderings of one model are held against each other, and transformers' own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lrserve.inputs.source import Source


@dataclass(frozen=True)
class Transcript:
    """What one engine computes for one prompt of T token ids.

    `logprobs` (T - 1): natural-log probability that the engine gives to each prompt token after the first;
    `tokens` (S): its greedy continuation; `margins` (S): gap between the two best log probabilities at each step of it
    (empty where the engine does not tell).
    """

    logprobs: tuple[float, ...]
    tokens: tuple[int, ...]
    margins: tuple[float, ...] = ()

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Transcript:
        """Read what `dataclasses.asdict` and JSON made of a transcript."""
        return cls(logprobs=tuple(data["logprobs"]), tokens=tuple(data["tokens"]), margins=tuple(data["margins"]))


def transcribe_checkpoint(folder: Path, dtype: torch.dtype, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[Transcript]:
    """Load a folder in transformers and run the prompts (`transcribe_model`).

    Args:
        folder: a dense checkpoint or an artifact.
        dtype: of weights and arithmetic.
        prompts: token ids.
        new_tokens: length of each greedy continuation.

    Raises:
        InputError: the folder cannot be loaded.
    """
    return transcribe_model(Source(name=str(folder), path=folder).load(dtype), prompts, new_tokens)


@torch.inference_mode()
def transcribe_model(model: Any, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[Transcript]:
    """Run each prompt alone: log probabilities of its tokens, then exactly `new_tokens` greedy ones, past any EOS.

    The model runs in its own dtype; logits are read in float32.
    """
    was_training = model.training
    model.eval()
    try:
        return [_transcribe_one(model, list(prompt), new_tokens) for prompt in prompts]
    finally:
        model.train(was_training)


def _transcribe_one(model: Any, prompt: list[int], new_tokens: int) -> Transcript:
    device = next(model.parameters()).device
    tokens: list[int] = []
    margins: list[float] = []
    inputs = torch.tensor([prompt], device=device)  # (1, T)
    output = model(input_ids=inputs, use_cache=True)
    logprobs = output.logits[0].float().log_softmax(dim=-1)  # (T, vocabulary)
    of_prompt = logprobs[:-1].gather(1, inputs[0, 1:, None])[:, 0]
    while len(tokens) < new_tokens:
        best = logprobs[-1].topk(2)
        tokens.append(int(best.indices[0]))
        margins.append(float(best.values[0] - best.values[1]))
        if len(tokens) < new_tokens:
            step = torch.tensor([[tokens[-1]]], device=device)
            output = model(input_ids=step, past_key_values=output.past_key_values, use_cache=True)
            logprobs = output.logits[0].float().log_softmax(dim=-1)  # (1, vocabulary)
    return Transcript(logprobs=tuple(of_prompt.tolist()), tokens=tuple(tokens), margins=tuple(margins))
