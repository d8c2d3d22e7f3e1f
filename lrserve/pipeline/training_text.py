"""The text of a recovery: all of the calibration text, or a text of its own that is streamed into the work folder."""

from __future__ import annotations

import torch

from lrserve.compression.recover import LENGTH
from lrserve.inputs.stream import read_windows, write_windows
from lrserve.pipeline.job import Job, tensor_sha256
from lrserve.storage.work import WorkFolder


def recovery_windows(job: Job, folder: WorkFolder) -> tuple[torch.Tensor, str]:
    """Return the windows (windows, length) to recover on, and what identifies them.

    Of `text.recovery`, documents that the search's validation or the report sees are left out.

    Raises:
        InputError: `text.recovery` cannot be read, or holds less than one window.
    """
    origin = job.recipe.text.recovery
    if origin is None:
        windows = job.recovery_windows()
        return windows, tensor_sha256(windows)
    tokens = job.recipe.factorization.recover_tokens
    inputs = {**job.model_inputs(), "text": job.fingerprints["recovery"], "tokens": tokens, "length": LENGTH}
    stage = folder.stage("recovery-text", inputs)
    path = stage / "windows.bin"
    if not path.is_file():
        rows = int(job.source.config().vocab_size)
        skip = job.held_out
        write_windows(origin, job.source.tokenizer(), path, length=LENGTH, tokens=tokens, rows=rows, skip=skip)
    windows = read_windows(path, LENGTH)
    job.say(f"5/6 recover: {windows.numel()} tokens of {origin}")
    return windows, stage.name
