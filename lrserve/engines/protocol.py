"""Both sides of an engine in a process of its own: `EngineProcess` here, `serve` in the worker.

Protocol, one JSON object a line. The first line in holds the engine's settings, and the answer to it, `{}`, comes once
the model is loaded. Each further line is `{"request": name, ...arguments}` and is answered by an object, or by
`{"error": message, "kind": exception class}`. When standard input ends, so does the worker, at once and whatever it
is doing, so it cannot outlive its parent however that ends. Engines and their libraries print to standard output, so
answers go to a private duplicate of it, and descriptor 1 becomes the log.
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
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, ClassVar, Final

import lrserve.errors
from lrserve.engines.gpu import release_memory
from lrserve.engines.process import Scratch, end_session, failure, open_log
from lrserve.engines.timing import Row
from lrserve.engines.transcripts import Transcript
from lrserve.errors import EngineError, LrserveError

if TYPE_CHECKING:
    from typing import Self

    from lrserve.allocation.speed import Shape

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


class EngineProcess(ABC):
    """An engine in a subprocess, as a context manager: what the search measures on.

    Args:
        model: names it in messages.
        settings: the worker's first line.
        environment: the worker's.
        log: file that takes everything that the engine prints; None is a temporary file, deleted on a clean end.
        start_timeout, request_timeout: seconds.
        report: told, in a sentence, what the engine is doing while it starts.
    """

    engine: ClassVar[str]
    """Its name in messages."""
    layer_dtype: ClassVar[str]
    """Of the single layers that `latency_table` times, unless it is told."""

    def __init__(
        self,
        model: str | Path,
        settings: dict[str, Any],
        environment: Mapping[str, str],
        *,
        log: Path | None,
        start_timeout: float,
        request_timeout: float,
        report: Callable[[str], None] | None,
    ) -> None:
        self.model = str(model)
        self._settings, self._environment = settings, environment
        self._wanted_log = log
        self._start_timeout, self._request_timeout = start_timeout, request_timeout
        self._report = report or (lambda message: None)
        self._process: subprocess.Popen[str] | None = None
        self._scratch: Scratch | None = None
        self._log_path, self._log_start = Path(), 0
        self._replies: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close(keep_log=isinstance(error, EngineError))

    @abstractmethod
    def start(self) -> None:
        """Start the process and wait until the model is loaded."""

    def _start(self, command: Sequence[str], version: str) -> None:
        if self._process is not None:
            raise EngineError(f"the engine of {self.model} is already running")
        began = time.monotonic()
        self._report(f"starting {version} on {self.model}")
        release_memory()
        log = open_log(self._wanted_log)
        self._log_path, self._log_start = Path(log.name), log.tell()
        self._replies = queue.SimpleQueue()
        self._scratch = Scratch()
        with log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=self._scratch.environment(self._environment),
                start_new_session=True,  # Ctrl-C reaches this process only, which then ends the worker
            )
        threading.Thread(target=_pump, args=(self._process.stdout, self._replies), daemon=True).start()
        try:
            self._send(self._settings)
            self._receive(self._start_timeout, "start")
        except BaseException as error:
            self.close(keep_log=isinstance(error, EngineError))
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
        if self._scratch is not None:
            self._scratch.remove()
        if self._wanted_log is None and not keep_log:
            self._log_path.unlink(missing_ok=True)

    def throughput(self, prompt_tokens: int, output_tokens: int, concurrency: int, *, seed: int = 0) -> Throughput:
        """Generate `output_tokens` for each of `concurrency` random prompts of `prompt_tokens`, all submitted at once.

        Raises:
            InputError: more, or longer ones, than the engine has room for.
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
        return [Transcript.from_json(transcript) for transcript in reply["transcripts"]]

    def latency_table(
        self, shapes: Sequence[Shape], tokens: Sequence[int], *, dtype: str | None = None, seconds: float | None = None
    ) -> list[Row]:
        """Time single linear layers with the kernels that serve them, in this engine's process and threads.

        Returns microseconds [shape][token count]: lower quartiles, or means over so many `seconds` each. The row of a shape for
        which the engine has no kernel on this machine is None.
        """
        reply = self._request(
            "latency_table",
            entries=[asdict(shape) for shape in shapes],
            tokens=list(map(int, tokens)),
            dtype=dtype or self.layer_dtype,
            seconds=seconds,
        )
        table: list[Row] = reply["microseconds"]
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
        return failure(f"{self.engine} on {self.model}", message, self._log_path, self._log_start)


def _pump(stream: IO[str] | None, replies: queue.SimpleQueue[str | None]) -> None:
    if stream is not None:
        for line in stream:
            replies.put(line)
    replies.put(None)


def serve(build: Callable[[dict[str, Any]], Any], requests: Mapping[str, Callable[..., dict[str, Any]]]) -> None:
    """Be a worker: load what `build` makes of the settings, and call requests[name](it, **arguments) until standard input ends."""
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read_lines, args=(lines,), daemon=True).start()

    def reply(message: dict[str, Any]) -> None:
        channel.write(json.dumps(message) + "\n")

    try:
        loaded = build(json.loads(lines.get()))
    except BaseException as error:
        reply(_told(error))
        channel.flush()
        os._exit(1)
    reply({})
    while True:
        arguments = json.loads(lines.get())
        try:
            answer = requests[arguments.pop("request")](loaded, **arguments)
        except Exception as error:
            answer = _told(error)
        reply(answer)


def _told(error: BaseException) -> dict[str, Any]:
    """Make an answer of an exception, whose trace goes to the log."""
    traceback.print_exception(error)
    # vLLM wraps what a layer raises while loading; the error raised on purpose is the one worth telling.
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, LrserveError):
        cause = cause.__cause__ or cause.__context__
    told = cause or error
    return {"error": str(told) or type(told).__name__, "kind": type(told).__name__}


def _read_lines(lines: queue.SimpleQueue[str]) -> None:
    for line in sys.stdin:
        lines.put(line)
    os._exit(0)  # the parent is gone or wants us gone; an engine's own shutdown has nothing to save
