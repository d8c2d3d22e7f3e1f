"""The output layer of a causal LM, applied to chosen rows: the vocabulary is wide, so few tokens' logits fit in memory at once."""

from __future__ import annotations

from typing import Any, Final

import torch

LOGIT_ROWS: Final = 256
"""Tokens whose logits are in memory at once."""


def logits_of(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Return the float32 logits (..., vocabulary) of last hidden states (..., hidden width)."""
    logits: torch.Tensor = model.lm_head(hidden).float()
    config = model.config.get_text_config()
    if (divisor := getattr(config, "logits_scaling", None)) is not None:  # Granite
        logits = logits / divisor
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap
