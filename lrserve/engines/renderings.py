"""The engines that load what lrserve's exporters write."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from lrserve.engines.onnx import OnnxEngine
from lrserve.engines.transcripts import Transcript, transcribe_model
from lrserve.engines.vllm import Engine


def transcribe_rendering(
    name: str,
    folder: Path,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    *,
    dtype: str = "float32",
    enforce_eager: bool = True,
) -> dict[str, list[Transcript]]:
    """Run the prompts through the engines that load a rendering of one of lrserve's exporters, one engine after the other.

    Args:
        name: of the exporter, `vllm` or `onnx`.
        folder: what it wrote; for `vllm` also any dense checkpoint.
        prompts: token ids.
        new_tokens: length of each greedy continuation.
        dtype: of the arithmetic of vLLM and transformers; the graph has its own.
        enforce_eager: vLLM without torch.compile.

    Returns:
        By the name of the engine, one transcript for each prompt.
    """
    if name == "onnx":
        with OnnxEngine(folder) as graph:
            return {"onnxruntime": graph.transcribe(prompts, new_tokens)}
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), local_files_only=True)
    transcripts = {"transformers": transcribe_model(model, prompts, new_tokens)}
    del model
    longest = max((len(prompt) for prompt in prompts), default=1) + new_tokens
    sequences = max(1, min(len(prompts), 32))
    with Engine(folder, dtype=dtype, max_model_len=longest, max_num_seqs=sequences, enforce_eager=enforce_eager) as engine:
        transcripts["vllm"] = engine.transcribe(prompts, new_tokens)
    return transcripts
