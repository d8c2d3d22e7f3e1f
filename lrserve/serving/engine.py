"""Real vLLM engines, each in a process of its own, driven from here.

One engine per process, because vLLM keeps global state; and processes rather than one server, because a dense model and
its candidates are measured in turns: all of them are loaded, one runs at a time, and a slow minute of the machine hits
each of them alike.

The two sides speak JSON lines (serving/worker.py). The worker ends when its standard input does, so it cannot outlive
this process however this process ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Final, TypeVar

import lrserve.errors
from exporters.base import Transcript
from lrserve.errors import EngineError, LrserveError
from lrserve.serving.process import end_session, log_tail, open_log
from lrserve.serving.versions import engine_version, require_vllm

if TYPE_CHECKING:
    from lrserve.allocation.speed import Shape

__all__ = ["Engine", "Throughput", "engine_version", "in_turns", "interleaved", "preflight"]

T = TypeVar("T")
Run = TypeVar("Run")

WORKER_COMMAND: Final = (sys.executable, "-m", "lrserve.serving.worker")
_STOP_SECONDS: Final = 20.0


@dataclass(frozen=True)
class Throughput:
    """One measured run: wall-clock seconds, CPU seconds of the engine's process, and the tokens generated in it."""

    seconds: float
    cpu_seconds: float
    output_tokens: int

    @property
    def output_tokens_per_second(self) -> float:
        """Generated tokens per wall-clock second, prefill included."""
        return self.output_tokens / self.seconds


def preflight() -> None:
    """Raise EngineError, with the pip command, if vLLM is missing or of an untested version."""
    require_vllm()


class Engine:
    """A vLLM engine in a subprocess, as a context manager.

    Args:
        model: an lrserve artifact or any dense checkpoint that vLLM loads; a folder, or a hub id.
        dtype: `bfloat16`, `float16` or `float32`; weights, activations and KV cache.
        max_model_len: longest sequence in tokens, prompt and output together.
        max_num_seqs: most sequences in one batch.
        enforce_eager: True starts faster; False lets vLLM compile the model (and capture CUDA graphs on a GPU).
        seed: of vLLM's sampler; greedy decoding does not depend on it.
        threads: OpenMP threads; None leaves the choice to vLLM, which takes every core of its NUMA node.
        kv_cache_gib: size of the KV cache in GiB, on the CPU, where VLLM_CPU_KVCACHE_SPACE is not set.
        gpu_memory_utilization: share of the GPU's memory, on a GPU; None is vLLM's default.
        tensor_parallel_size: processes that share every layer.
        quantization: `int8` or `fp8`, to which an lrserve artifact's linears, dense ones too, are rounded when they are loaded.
        load_format: `dummy` gives random weights of the right shape; None reads the checkpoint.
        log: file that takes everything that the engine prints; None is a temporary file, deleted on a clean end.
        start_timeout, request_timeout: seconds.
        report: told, in a sentence, what the engine is doing while it starts.

    Raises:
        EngineError: vLLM is missing, untested, or failed; the message ends with the last lines of its log.
        ArtifactError: the engine found the artifact incomplete or inconsistent.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        dtype: str = "bfloat16",
        max_model_len: int = 1024,
        max_num_seqs: int = 32,
        enforce_eager: bool = True,
        seed: int = 0,
        threads: int | None = None,
        kv_cache_gib: float = 1.0,
        gpu_memory_utilization: float | None = None,
        tensor_parallel_size: int = 1,
        quantization: str | None = None,
        load_format: str | None = None,
        log: Path | None = None,
        start_timeout: float = 900.0,
        request_timeout: float = 3600.0,
        report: Callable[[str], None] | None = None,
    ) -> None:
        self.model = str(model)
        self._settings: dict[str, Any] = {
            "model": self.model,
            "dtype": dtype,
            "max_model_len": max_model_len,
            "max_num_seqs": max_num_seqs,
            "enforce_eager": enforce_eager,
            "seed": seed,
            "tensor_parallel_size": tensor_parallel_size,
            "quantization_config": {"linear": f"{quantization}_per_channel_static"} if quantization else None,
            "load_format": load_format,
            "gpu_memory_utilization": gpu_memory_utilization,
            "kv_cache_bytes": int(kv_cache_gib * 2**30),
        }
        self._environment = worker_environment(self.model, threads)
        self._wanted_log = log
        self._start_timeout, self._request_timeout = start_timeout, request_timeout
        self._report = report or (lambda message: None)
        self._process: subprocess.Popen[str] | None = None
        self._log_path = Path()
        self._replies: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def __enter__(self) -> Engine:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close(keep_log=isinstance(error, EngineError))

    def start(self) -> None:
        """Start the process and wait until the model is loaded."""
        preflight()
        if self._process is not None:
            raise EngineError(f"the engine of {self.model} is already running")
        began = time.monotonic()
        self._report(f"starting {engine_version()} on {self.model}")
        log = open_log(self._wanted_log)
        self._log_path = Path(log.name)
        self._replies = queue.SimpleQueue()
        with log:
            self._process = subprocess.Popen(
                WORKER_COMMAND,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=self._environment,
                start_new_session=True,  # Ctrl-C reaches this process only, which then ends the worker
            )
        threading.Thread(target=_pump, args=(self._process.stdout, self._replies), daemon=True).start()
        try:
            self._send(self._settings)
            self._receive(self._start_timeout, "start")
        except BaseException:
            self.close(keep_log=True)
            raise
        self._report(f"{self.model}: ready after {time.monotonic() - began:.0f} s")

    def close(self, *, keep_log: bool = False) -> None:
        """End the process; safe to call twice."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(OSError):
            if process.stdin is not None:
                process.stdin.close()
        end_session(process, _STOP_SECONDS)
        if self._wanted_log is None and not keep_log:
            self._log_path.unlink(missing_ok=True)

    def throughput(self, prompt_tokens: int, output_tokens: int, concurrency: int, *, seed: int = 0) -> Throughput:
        """Generate `output_tokens` for each of `concurrency` random prompts of `prompt_tokens`, all submitted at once.

        Raises:
            InputError: more at once than the engine's max_num_seqs, or longer than its max_model_len.
        """
        reply = self._request(
            "throughput",
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            concurrency=concurrency,
            seed=seed,
        )
        return Throughput(seconds=reply["seconds"], cpu_seconds=reply["cpu_seconds"], output_tokens=reply["output_tokens"])

    def transcribe(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[Transcript]:
        """Return log probabilities of the prompts' tokens and a greedy continuation of exactly `new_tokens`."""
        reply = self._request("transcribe", prompts=[list(map(int, p)) for p in prompts], new_tokens=new_tokens)
        return [
            Transcript(logprobs=tuple(x["logprobs"]), tokens=tuple(x["tokens"]), margins=tuple(x["margins"]))
            for x in reply["transcripts"]
        ]

    def latency_table(self, shapes: Sequence[Shape], tokens: Sequence[int], *, dtype: str = "bfloat16") -> list[list[float]]:
        """Time single linear layers with the kernels that serve them, in this engine's process and threads.

        Returns microseconds [shape][token count].
        """
        reply = self._request(
            "latency_table",
            entries=[asdict(shape) for shape in shapes],
            tokens=list(map(int, tokens)),
            dtype=dtype,
        )
        table: list[list[float]] = reply["microseconds"]
        return table

    def _request(self, name: str, **arguments: Any) -> dict[str, Any]:
        self._send({"request": name, **arguments})
        return self._receive(self._request_timeout, name)

    def _send(self, message: dict[str, Any]) -> None:
        if self._process is None or self._process.stdin is None:
            raise EngineError(f"the engine of {self.model} is not running; use it inside its with block")
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except OSError:
            failure = self._failure("the engine's process has ended")
            self.close(keep_log=True)
            raise failure from None

    def _receive(self, timeout: float, doing: str) -> dict[str, Any]:
        try:
            line = self._replies.get(timeout=timeout)
        except queue.Empty:
            failure = self._failure(f"no answer to {doing!r} within {timeout:.0f} s")
            self.close(keep_log=True)  # its late answer would be taken for the next request's
            raise failure from None
        except BaseException:
            self.close()
            raise
        if line is None:
            failure = self._failure(f"the engine's process ended during {doing!r}")
            self.close(keep_log=True)
            raise failure
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise self._failure(reply["error"], reply.get("kind", ""))
        return reply

    def _failure(self, message: str, kind: str = "") -> LrserveError:
        known = getattr(lrserve.errors, kind, None)
        if isinstance(known, type) and issubclass(known, LrserveError) and known is not EngineError:
            return known(message)  # raised on purpose in the worker; the log would only repeat it
        return EngineError(f"vLLM on {self.model}: {message}\n{log_tail(self._log_path)}")


def worker_environment(model: str, threads: int | None) -> dict[str, str]:
    """Environment of the worker: this process's own, plus what an offline, single-process engine wants."""
    environment = dict(os.environ)
    environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # engine and worker in one process, whose CPU time is theirs
    environment["VLLM_NO_USAGE_STATS"] = "1"
    environment["TOKENIZERS_PARALLELISM"] = "false"
    if Path(model).is_dir():
        environment["HF_HUB_OFFLINE"] = "1"
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    return environment


def interleaved(
    engines: Mapping[str, Engine],
    prompt_tokens: int,
    output_tokens: int,
    concurrency: int,
    *,
    repeats: int = 3,
    seed: int = 0,
    progress: Callable[[str, int, Throughput], None] | None = None,
) -> dict[str, list[Throughput]]:
    """Measure several running engines in turns (`in_turns`), after one discarded run of each.

    `progress` is told (name, round, result). Returns the runs of each engine in the order of the rounds.
    """

    def measure(engine: Engine, seed: int) -> Throughput:
        return engine.throughput(prompt_tokens, output_tokens, concurrency, seed=seed)

    for engine in engines.values():
        measure(engine, seed)
    return in_turns(engines, measure, repeats, seed=seed, progress=progress)


def in_turns(
    measured: Mapping[str, T],
    measure: Callable[[T, int], Run],
    repeats: int,
    *,
    seed: int,
    progress: Callable[[str, int, Run], None] | None = None,
) -> dict[str, list[Run]]:
    """Measure several things in turns: A B C, B C A, C A B, ...; discarded runs come before, and are the caller's.

    Interleaving and rotation spread the machine's slow minutes, and the cost of following a certain one, over all of them.
    All get the same prompts, from the seed that `measure` is given; each round has its own, from `seed` + 1 on.
    `progress` is told (name, round, result).

    Returns the runs of each in the order of the rounds.
    """
    names = list(measured)
    results: dict[str, list[Run]] = {name: [] for name in names}
    for index in range(repeats):
        shift = index % max(len(names), 1)
        for name in names[shift:] + names[:shift]:
            result = measure(measured[name], seed + 1 + index)
            results[name].append(result)
            if progress is not None:
                progress(name, index, result)
    return results


def _pump(stream: IO[str] | None, replies: queue.SimpleQueue[str | None]) -> None:
    if stream is not None:
        for line in stream:
            replies.put(line)
    replies.put(None)
