"""Quality of a model on token windows: perplexity, and divergence from the dense model."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import cross_entropy

_BATCH_TOKENS = 4096  # tokens in one forward pass
_LOGIT_ROWS = 1024  # tokens whose logits are in memory at once: the vocabulary is wide


def _hidden(model: Any, windows: torch.Tensor) -> torch.Tensor:
    device = next(model.parameters()).device
    states: torch.Tensor = model.base_model(input_ids=windows.to(device), use_cache=False).last_hidden_state
    return states


def _logits(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model.lm_head(hidden).float()
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


@torch.inference_mode()
def negative_log_likelihood(model: Any, windows: torch.Tensor, progress: Callable[[int], None] = lambda done: None) -> torch.Tensor:
    """Return each window's mean negative log likelihood in nats, float64 (windows,).

    Every token after a window's first is predicted from all tokens before it in the window.

    Args:
        model: a causal LM.
        windows: int64 (windows, length).
        progress: called with the number of finished windows.
    """
    batch = max(1, _BATCH_TOKENS // windows.shape[1])
    means = []
    for first in range(0, len(windows), batch):
        part = windows[first : first + batch]
        hidden = _hidden(model, part)[:, :-1].flatten(0, 1)
        targets = part[:, 1:].flatten().to(hidden.device)
        losses = torch.cat(
            [
                cross_entropy(_logits(model, h), t, reduction="none")
                for h, t in zip(torch.split(hidden, _LOGIT_ROWS), torch.split(targets, _LOGIT_ROWS), strict=True)
            ]
        )
        means.append(losses.double().view(len(part), -1).mean(1).cpu())
        progress(first + len(part))
    return torch.cat(means)


def perplexity(model: Any, windows: torch.Tensor, progress: Callable[[int], None] = lambda done: None) -> float:
    """Return exp of the mean negative log likelihood per predicted token."""
    mean = float(negative_log_likelihood(model, windows, progress).mean())
    return math.exp(mean) if mean < 700 else math.inf


class Divergence:
    """Mean per-token KL divergence, in nats, of a changed model from the dense one on a few windows.

    The dense model's log probabilities are kept in bfloat16: 2 bytes x tokens x vocabulary.
    """

    @torch.inference_mode()
    def __init__(self, model: Any, windows: torch.Tensor) -> None:
        self._windows = windows
        hidden = _hidden(model, windows).flatten(0, 1)
        self._dense = [_logits(model, h).log_softmax(-1).bfloat16() for h in torch.split(hidden, _LOGIT_ROWS // 4)]

    @torch.inference_mode()
    def __call__(self, model: Any) -> float:
        """Return KL(dense || model)."""
        hidden = _hidden(model, self._windows).flatten(0, 1)
        total = 0.0
        for dense, h in zip(self._dense, torch.split(hidden, _LOGIT_ROWS // 4), strict=True):
            reference = dense.float().log_softmax(-1)  # bfloat16 rounding is normalised away
            total += float((reference.exp() * (reference - _logits(model, h).log_softmax(-1))).sum())
        return total / self._windows.numel()
