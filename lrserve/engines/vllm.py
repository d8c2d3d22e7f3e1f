"""Real vLLM engines, each in a process of its own, driven from here.

One engine per process, because vLLM keeps global state; and processes rather than one server, because a dense model and
its candidates are measured in turns: all of them are loaded, one runs at a time, and a slow minute of the machine hits
each of them alike.

The worker is engines/vllm_worker.py; engines/protocol.py is what the two sides say to each other.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from lrserve.engines.protocol import EngineProcess
from lrserve.engines.sampling import Sampling, Step
from lrserve.errors import EngineError
from lrserve.plugins.versions import engine_version, require_vllm

WORKER_COMMAND: Final = (sys.executable, "-m", "lrserve.engines.vllm_worker")


class Engine(EngineProcess):
    """A vLLM engine in a subprocess, as a context manager.

    Args:
        model: an lrserve artifact or any dense checkpoint that vLLM loads; a folder, or a hub id.
        dtype: `bfloat16`, `float16` or `float32`; weights, activations and KV cache.
        max_model_len: longest sequence in tokens, prompt and output together.
        max_num_seqs: most sequences in one batch.
        max_num_batched_tokens: most tokens in one step, the chunk of a prefill; None is vLLM's default.
        enforce_eager: True starts faster; False lets vLLM compile the model (and capture CUDA graphs on a GPU).
        seed: of vLLM's sampler; greedy decoding does not depend on it.
        threads: OpenMP threads; None leaves the choice to vLLM, which takes every core of its NUMA node.
        kv_cache_gib: size of the KV cache in GiB, on the CPU, where VLLM_CPU_KVCACHE_SPACE is not set.
        gpu_memory_utilization: share of the GPU's memory, on a GPU; None is vLLM's default.
        tensor_parallel_size: processes that share every layer.
        load_format: `dummy` gives random weights of the right shape; None reads the checkpoint.
        log: file that takes everything that the engine prints; None is a temporary file, deleted on a clean end.
        start_timeout, request_timeout: seconds.
        report: told, in a sentence, what the engine is doing while it starts.

    Raises:
        EngineError: vLLM is missing, untested, or failed; the message ends with the last lines of its log.
        ArtifactError: the engine found the artifact incomplete or inconsistent.
        InputError: a request of more at once than max_num_seqs, or longer than max_model_len.
    """

    engine = "vLLM"
    layer_dtype = "bfloat16"

    def __init__(
        self,
        model: str | Path,
        *,
        dtype: str = "bfloat16",
        max_model_len: int = 1024,
        max_num_seqs: int = 32,
        max_num_batched_tokens: int | None = None,
        enforce_eager: bool = True,
        seed: int = 0,
        threads: int | None = None,
        kv_cache_gib: float = 1.0,
        gpu_memory_utilization: float | None = None,
        tensor_parallel_size: int = 1,
        load_format: str | None = None,
        log: Path | None = None,
        start_timeout: float = 900.0,
        request_timeout: float = 3600.0,
        report: Callable[[str], None] | None = None,
    ) -> None:
        settings: dict[str, Any] = {
            "model": str(model),
            "dtype": dtype,
            "max_model_len": max_model_len,
            "max_num_seqs": max_num_seqs,
            "max_num_batched_tokens": max_num_batched_tokens,
            "enforce_eager": enforce_eager,
            "seed": seed,
            "tensor_parallel_size": tensor_parallel_size,
            "load_format": load_format,
            "gpu_memory_utilization": gpu_memory_utilization,
            "kv_cache_bytes": int(kv_cache_gib * 2**30),
        }
        super().__init__(
            model,
            settings,
            worker_environment(str(model), threads),
            log=log,
            start_timeout=start_timeout,
            request_timeout=request_timeout,
            report=report,
        )

    def start(self) -> None:
        """Start the process and wait until the model is loaded."""
        require_vllm()
        self._start(WORKER_COMMAND, engine_version())

    def generate(self, prompt: Sequence[int], sampling: Sampling) -> Generator[Step]:
        """Yield an answer step by step."""
        self._request("begin", tokens=list(map(int, prompt)), sampling=asdict(sampling))
        try:
            finish = None
            while finish is None:
                reply = self._request("step")
                finish = reply["finish"]
                yield Step(tuple(reply["tokens"]), finish)
        finally:
            with contextlib.suppress(EngineError):  # the process may have ended, as the error on its way says
                self._request("end")


def worker_environment(model: str, threads: int | None) -> dict[str, str]:
    """Environment of the worker: this process's own, plus what an offline, single-process engine wants."""
    environment = dict(os.environ)
    environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # engine and worker in one process, so its CPU time is the engine's
    environment["VLLM_NO_USAGE_STATS"] = "1"
    environment["TOKENIZERS_PARALLELISM"] = "false"
    if Path(model).is_dir():
        environment["HF_HUB_OFFLINE"] = "1"
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    return environment
