"""Whether a loaded model's weights are numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lrserve.errors import InputError


@torch.no_grad()
def require_finite(model: Any, folder: Path) -> None:
    """See that no weight is infinite or no number, in the dtype that the model was loaded in; reads each once.

    Raises:
        InputError: one is; the message has the first tensor's name.
    """
    bad = [name for name, weight in model.named_parameters() if not _is_finite(weight)]
    if not bad:
        return
    weight = model.get_parameter(bad[0])
    count = int((~torch.isfinite(weight)).sum())
    narrow = " or, if they are finite there, set engine.dtype to bfloat16" if weight.dtype is torch.float16 else ""
    raise InputError(
        f"{folder}: {len(bad)} tensors hold values that are not finite in {str(weight.dtype).removeprefix('torch.')}, first "
        f"{bad[0]} ({count:,} of {weight.numel():,}); check the download{narrow}"
    )


def _is_finite(weight: torch.Tensor) -> bool:
    """Look at the ends, which a NaN would be: unlike `isfinite`, this needs no memory."""
    return weight.numel() == 0 or bool(torch.isfinite(torch.stack(torch.aminmax(weight))).all())
