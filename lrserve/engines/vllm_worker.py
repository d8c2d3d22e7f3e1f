"""The process around one vLLM engine: `python -m lrserve.engines.vllm_worker` (vllm.py starts it, protocol.py is its language)."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lrserve.engines.protocol import serve
from lrserve.engines.timing import random_prompts
from lrserve.errors import EngineError, InputError

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "tekken.json")
_ANSWER = "answer"  # one at a time


def build_engine(settings: dict[str, Any]) -> Any:
    """Load the model into a `vllm.LLM`; a checkpoint without tokenizer files is served by token ids alone.

    Of a multimodal model the LLM alone is loaded: every request here is text.
    """
    from vllm import LLM
    from vllm.platforms import current_platform

    options = {name: value for name, value in settings.items() if value is not None}
    kv_cache_bytes = options.pop("kv_cache_bytes", None)
    if current_platform.is_cpu() and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
        options["kv_cache_memory_bytes"] = kv_cache_bytes
    folder = Path(settings["model"])
    if folder.is_dir() and not any((folder / name).exists() for name in _TOKENIZER_FILES):
        options["skip_tokenizer_init"] = True
    return LLM(**options, language_model_only=True, enable_prefix_caching=False, disable_log_stats=True)


def throughput(llm: Any, prompt_tokens: int, output_tokens: int, concurrency: int, seed: int) -> dict[str, Any]:
    """Generate for random prompts, all submitted at once; seconds are wall-clock, and CPU time of this process."""
    config = llm.llm_engine.vllm_config
    if concurrency > (limit := config.scheduler_config.max_num_seqs):
        raise InputError(f"concurrency {concurrency} is more than the engine's max_num_seqs, {limit}")
    if prompt_tokens + output_tokens > (limit := config.model_config.max_model_len):
        raise InputError(f"{prompt_tokens} + {output_tokens} tokens are more than the engine's max_model_len, {limit}")
    from vllm import SamplingParams

    vocabulary = config.model_config.get_vocab_size()
    drawn = random_prompts(vocabulary, prompt_tokens, concurrency, seed)
    prompts = [{"prompt_token_ids": prompt} for prompt in drawn]
    sampling = SamplingParams(temperature=0.0, max_tokens=output_tokens, ignore_eos=True, detokenize=False)
    began, cpu_began = time.perf_counter(), time.process_time()
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
    generated = sum(len(output.outputs[0].token_ids) for output in outputs)
    if generated != concurrency * output_tokens:
        raise EngineError(f"vLLM generated {generated} tokens instead of {concurrency * output_tokens}")
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "output_tokens": generated}


def transcribe(llm: Any, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
    """Read prompt log probabilities and a greedy continuation with its margins out of vLLM."""
    from vllm import SamplingParams

    # No min_tokens: it would forbid the end-of-sequence token instead of generating past it.
    sampling = SamplingParams(
        temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False, logprobs=2, prompt_logprobs=1
    )
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
    return {"transcripts": [_transcript(prompt, output) for prompt, output in zip(prompts, outputs, strict=True)]}


def _transcript(prompt: list[int], output: Any) -> dict[str, Any]:
    completion = output.outputs[0]
    margins = []
    for step in completion.logprobs:
        best, second = sorted((candidate.logprob for candidate in step.values()), reverse=True)[:2]
        margins.append(best - second)
    return {
        "logprobs": [step[token].logprob for token, step in zip(prompt[1:], output.prompt_logprobs[1:], strict=True)],
        "tokens": list(completion.token_ids),
        "margins": margins,
    }


def begin(llm: Any, tokens: list[int], sampling: dict[str, Any]) -> dict[str, Any]:
    """Begin one answer, with arguments of `vllm.SamplingParams`."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    settings = SamplingParams(**sampling, detokenize=False, output_kind=RequestOutputKind.DELTA)
    llm.llm_engine.add_request(_ANSWER, {"prompt_token_ids": tokens}, settings)
    return {}


def step(llm: Any) -> dict[str, Any]:
    """Let the engine make one step, which may bring no token."""
    tokens: list[int] = []
    finish = None
    for output in llm.llm_engine.step():
        completion = output.outputs[0]
        tokens += completion.token_ids
        finish = completion.finish_reason if output.finished else None
    return {"tokens": tokens, "finish": finish}


def end(llm: Any) -> dict[str, Any]:
    """Forget the answer, finished or not."""
    llm.llm_engine.abort_request([_ANSWER])
    return {}


def latency_table(llm: Any, entries: list[dict[str, Any]], tokens: list[int], dtype: str, seconds: float | None) -> dict[str, Any]:
    """Time single layers (engines/vllm_latency.py)."""
    import torch

    from lrserve.engines.vllm_latency import latency_table as measure

    return {"microseconds": measure(entries, tokens, getattr(torch, dtype), seconds, llm.llm_engine.vllm_config)}


REQUESTS: dict[str, Callable[..., dict[str, Any]]] = {
    "throughput": throughput,
    "transcribe": transcribe,
    "latency_table": latency_table,
    "begin": begin,
    "step": step,
    "end": end,
}


def main() -> None:
    """Serve requests until standard input ends."""
    serve(build_engine, REQUESTS)


if __name__ == "__main__":
    main()
