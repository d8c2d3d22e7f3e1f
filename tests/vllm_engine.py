"""A vLLM engine for tests, whose worker knows more requests than lrserve's."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import forked_worker

from lrserve.engines import vllm_worker as worker
from lrserve.engines.transcripts import Transcript
from lrserve.engines.vllm import Engine
from lrserve.plugins.versions import engine_version

BLOCK = 32
"""Tokens in a block of the KV cache, what prefix caching counts in."""
BATCH = 48
"""Most tokens in one step: prefill of a longer prompt is cut into chunks."""


class FeatureEngine(Engine):
    """An engine whose worker is this module, forked where `workers` listens.

    `extra` are arguments of `vllm.LLM` that `Engine` does not have; the other options are `Engine`'s.
    """

    def __init__(self, folder: Path, workers: str, *, extra: dict[str, Any], **options: Any) -> None:
        super().__init__(folder, **options)
        self._settings |= {"extra": extra}
        self._workers = workers

    def start(self) -> None:
        self._start(forked_worker.command(self._workers, __name__), engine_version())

    def greedy(
        self, prompts: Sequence[list[int]], new_tokens: int, adapter: Path | None = None
    ) -> tuple[list[Transcript], list[int]]:
        """Greedy continuations without the prompts' log probabilities, for which vLLM passes by the prefix cache and which crash
        its CPU build under LoRA; and how many tokens of each prompt were cached.
        """
        path = str(adapter) if adapter else None
        reply = self._request("greedy", prompts=list(prompts), new_tokens=new_tokens, adapter=path)
        return [Transcript((), tuple(x["tokens"]), tuple(x["margins"])) for x in reply["transcripts"]], reply["cached"]

    def run_eager(self) -> list[list[bool]]:
        """Call the model uncompiled from now on; return, for each rank, whether what was compiled so far is."""
        compiled: list[list[bool]] = self._request("run_eager")["was_compiled"]
        return compiled

    def drafted_and_accepted(self) -> tuple[int, int]:
        """Tokens that a draft proposed, and those that the model would have said itself."""
        counts = self._request("drafts")
        return counts["draft_tokens"], counts["accepted_tokens"]

    def shut_down(self) -> None:
        """Let the ranks give back their shared memory, which would outlive processes that are killed."""
        self._request("shut_down")


Serving = Callable[..., AbstractContextManager[FeatureEngine]]
"""The fixture `serving` (conftest.py)."""


# The worker


def _build(settings: dict[str, Any]) -> Any:
    import vllm

    extra, engine = settings.pop("extra"), vllm.LLM
    vllm.LLM = lambda **options: engine(**(options | extra))  # type: ignore[assignment, misc]
    return _build_engine(settings)


def _greedy(llm: Any, prompts: list[list[int]], new_tokens: int, adapter: str | None) -> dict[str, Any]:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    sampling = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False, logprobs=2)
    lora = LoRARequest("adapter", 1, adapter) if adapter else None
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False, lora_request=lora)
    cached = [output.num_cached_tokens for output in outputs]
    for output in outputs:
        output.prompt_logprobs = []
    return {"transcripts": [worker._transcript([], output) for output in outputs], "cached": cached}


def _run_eager(llm: Any) -> dict[str, Any]:
    def switch(rank: Any) -> list[bool]:
        compiled = [module for module in rank.get_model().modules() if hasattr(module, "do_not_compile")]
        for module in compiled:
            module.do_not_compile = True  # its forward is then called as it stands
        return [module.compiled for module in compiled]

    return {"was_compiled": llm.collective_rpc(switch)}


def _drafts(llm: Any) -> dict[str, Any]:
    prefix = "vllm:spec_decode_num_"
    return {metric.name.removeprefix(prefix): metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}


def _shut_down(llm: Any) -> dict[str, Any]:
    names = set(llm.collective_rpc(lambda rank: os.environ["VLLM_DIST_IDENT"]))
    llm.llm_engine.engine_core.shutdown()
    for name in names:
        for segment in Path("/dev/shm").glob(name + "-*"):  # vLLM's CPU ranks leave theirs there
            segment.unlink()
    return {}


_build_engine = worker.build_engine


def main() -> None:
    """Serve requests until standard input ends."""
    worker.build_engine = _build
    worker.REQUESTS.update({"greedy": _greedy, "run_eager": _run_eager, "drafts": _drafts, "shut_down": _shut_down})
    worker.main()
