"""OpenAI-compatible servers under load: `lrserve serve` in a process of its own, `vllm bench serve` as the client."""

from __future__ import annotations

import contextlib
import http.client
import multiprocessing
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import numpy as np

from exporters.onnx import FOLDER
from lrserve.engines.gpu import release_memory
from lrserve.engines.process import Scratch, end_session, failure, open_log, tied
from lrserve.engines.workloads import Paired, in_turns
from lrserve.errors import EngineError
from lrserve.plugins.lifetime import end_with_parent
from lrserve.plugins.versions import require_http
from lrserve.recipe import Workload
from lrserve.serving.flags import KEY_VARIABLE, OWN_KEY_VARIABLE, read_flags
from lrserve.serving.generation import checked_graph
from lrserve.serving.server import check_engine, check_model, server_command, server_environment

_HOST: Final = "127.0.0.1"
_STOP_SECONDS: Final = 30.0
_WAVES: Final = 2
_FEWEST_REQUESTS: Final = 4


class Server:
    """A vLLM server on a free port of this machine, as a context manager that returns once it answers.

    It asks for no key, since only this machine reaches it, and it ends with this process. A class of another server's overrides
    `engine`, `tokenizer`, `check` and `command`.

    Args:
        model: an artifact of lrserve or a dense checkpoint; a folder.
        arguments: of vLLM, as after `vllm serve MODEL`.
        log: file that takes everything that the server prints; None is a temporary file, deleted on a clean end.
        start_timeout: seconds.

    Raises:
        EngineError: vLLM is missing, untested, or failed to start; the message ends with the last lines of its log.
        InputError, ArtifactError: the folder cannot be served.
    """

    engine = "vLLM"

    def __init__(
        self, model: Path, arguments: Sequence[str] = (), *, log: Path | None = None, start_timeout: float = 900.0
    ) -> None:
        self.model, self.url = model, ""
        self._arguments, self._wanted_log, self._start_timeout = arguments, log, start_timeout
        self._process: subprocess.Popen[bytes] | None = None
        self._scratch: Scratch | None = None
        self._log_path, self._log_start = Path(), 0

    @property
    def tokenizer(self) -> Path:
        """The folder of the tokenizer."""
        return self.model

    def check(self) -> None:
        """Check engine and model; raises what the class says."""
        check_engine()
        check_model(self.model)

    def command(self, arguments: Sequence[str]) -> list[str]:
        """Return the command line."""
        no_key = ["--api-key="] if "api-key" in read_flags(arguments).given else []  # for a file may hold one
        return server_command(self.model, [*arguments, *no_key])

    def __enter__(self) -> Server:
        self.check()
        with socket.socket() as free:
            free.bind((_HOST, 0))
            port = free.getsockname()[1]
        self.url = f"http://{_HOST}:{port}"
        self._scratch = Scratch()
        inherited = {name: value for name, value in os.environ.items() if name not in (KEY_VARIABLE, OWN_KEY_VARIABLE)}
        environment = server_environment(self._scratch.environment({**inherited, "VLLM_NO_USAGE_STATS": "1"}))
        # last, so that they win: the client finds the model by its folder
        arguments = [*self._arguments, "--served-model-name", str(self.model), "--host", _HOST, "--port", str(port)]
        release_memory()
        with open_log(self._wanted_log) as log:
            self._log_path, self._log_start = Path(log.name), log.tell()
            self._process = subprocess.Popen(
                tied(self.command(arguments)),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C reaches this process only, which then ends the server
            )
        try:
            self._wait()
        except BaseException:
            self._close(keep_log=True)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._close(keep_log=isinstance(error, EngineError))

    def failure(self, message: str) -> EngineError:
        """Return the error that says what went wrong, with the end of the server's log."""
        return failure(f"{self.engine}'s server of {self.model}", message, self._log_path, self._log_start)

    def _wait(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + self._start_timeout
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise self.failure(f"it ended with code {self._process.returncode} while it started")
            with contextlib.suppress(OSError, http.client.HTTPException):  # not urllib, which would ask a proxy
                connection = http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=5)
                connection.request("GET", "/health")
                if connection.getresponse().status == http.HTTPStatus.OK:
                    return
            time.sleep(0.5)
        raise self.failure(f"no answer within {self._start_timeout:.0f} s")

    def _close(self, *, keep_log: bool) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            process.send_signal(signal.SIGTERM)
        end_session(process, _STOP_SECONDS)
        if self._scratch is not None:
            self._scratch.remove()
        if self._wanted_log is None and not keep_log:
            self._log_path.unlink(missing_ok=True)


class GraphServer(Server):
    """The server of an ONNX graph (onnx_server.py); `model` has the folder onnx."""

    engine = "onnxruntime-genai"

    @property
    def tokenizer(self) -> Path:
        """Beside the graph."""
        return self.model / FOLDER

    def check(self) -> None:
        """Check packages and graph."""
        require_http()
        checked_graph(self.model)

    def command(self, arguments: Sequence[str]) -> list[str]:
        """Return the command line."""
        return [sys.executable, "-m", "lrserve.serving.onnx_server", str(self.model), *arguments]


@dataclass(frozen=True)
class Load:
    """One run of `vllm bench serve`.

    output_tokens_per_second: of all requests together, wall-clock, prefill included.
    first_token: seconds from a request to its first token, one for each request.
    per_token: mean seconds between a request's further tokens, one for each request; empty where only one was asked for.
    """

    output_tokens_per_second: float
    first_token: Sequence[float]
    per_token: Sequence[float]


Client = Callable[[Sequence[str]], dict[str, Any]]
"""Runs `vllm bench serve` with arguments and returns what it reports."""


@contextlib.contextmanager
def bench_client() -> Iterator[Client]:
    """Yield vLLM's client, in a process of its own that imports vLLM once and prints nothing."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_alone) as pool:
        yield lambda arguments: pool.submit(_bench_serve, list(arguments)).result()


def _alone() -> None:
    """Print nothing, talk to this machine without a proxy, and end with the parent."""
    end_with_parent()
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = _HOST
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)


def _bench_serve(arguments: list[str]) -> dict[str, Any]:
    from vllm.benchmarks import serve
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    serve.add_cli_args(parser)
    try:
        result: dict[str, Any] = serve.main(parser.parse_args(arguments))
    except (Exception, SystemExit) as error:  # of whatever library: not every one survives the way to the other process
        raise RuntimeError(f"{type(error).__name__}: {error}") from None
    return result


def load(server: Server, client: Client, workload: Workload, *, seed: int) -> Load:
    """Send a server random prompts, `workload.concurrency` at a time, twice that many in all and at least four.

    Each request decodes exactly `workload.output_tokens`, greedily.

    Raises:
        EngineError: a request failed, or had another length than was asked for.
    """
    requests = max(_FEWEST_REQUESTS, _WAVES * workload.concurrency)
    options = {
        "backend": "vllm",
        "base-url": server.url,
        "model": server.model,
        "tokenizer": server.tokenizer,
        "dataset-name": "random",
        "random-input-len": workload.prompt_tokens,
        "random-output-len": workload.output_tokens,
        "num-prompts": requests,
        "max-concurrency": workload.concurrency,
        "temperature": 0,
        "seed": seed,
    }
    arguments = [f"--{name}={value}" for name, value in options.items()]
    try:
        result = client([*arguments, "--disable-tqdm", "--save-detailed"])
    except RuntimeError as error:  # its own, or of a process that has ended
        raise server.failure(f"vllm bench serve failed: {error}") from error
    failed = next((error for error in result["errors"] if error), "")
    lengths = set(result["output_lens"])
    if result["completed"] != requests or lengths != {workload.output_tokens}:
        raise server.failure(
            f"{result['completed']} of {requests} requests came back, of {sorted(lengths)} tokens instead of "
            f"{workload.output_tokens}; {failed or 'no error was given'}"
        )
    first, more = result["ttfts"], workload.output_tokens - 1
    per_token = [(total - start) / more for total, start in zip(result["latencies"], first, strict=True)] if more else []
    return Load(result["output_throughput"], tuple(first), tuple(per_token))


@dataclass(frozen=True)
class OnlineComparison(Paired):
    """Interleaved runs of one workload on both servers."""

    workload: Workload
    dense: Sequence[Load]
    compressed: Sequence[Load]

    @property
    def verdict(self) -> str:
        """`faster` or `slower` where the whole spread is, else `undecided`."""
        low, high = self.spread
        return "faster" if low > 1 else "slower" if high < 1 else "undecided"

    def to_json(self) -> dict[str, Any]:
        """Return medians and spreads over the rounds, and percentiles of the latencies, in milliseconds, over all requests."""
        return {
            "workload": self.workload.model_dump(mode="json"),
            "dense": _summary(self.dense),
            "compressed": _summary(self.compressed),
            **self.speedup_json(),
            "verdict": self.verdict,
        }


def _summary(runs: Sequence[Load]) -> dict[str, Any]:
    rates = [run.output_tokens_per_second for run in runs]

    def percentiles(seconds: list[float]) -> dict[str, float] | None:
        if not seconds:
            return None
        median, p99 = np.percentile(seconds, [50, 99]) * 1000
        return {"median": float(median), "p99": float(p99)}

    return {
        "tokens_per_second": {"median": statistics.median(rates), "lowest": min(rates), "highest": max(rates)},
        "time_to_first_token_ms": percentiles([seconds for run in runs for seconds in run.first_token]),
        "time_per_output_token_ms": percentiles([seconds for run in runs for seconds in run.per_token]),
    }


def compare_online(
    dense: Server,
    compressed: Server,
    workloads: Mapping[str, Workload],
    rounds: int,
    *,
    together: bool = True,
    seed: int = 0,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, OnlineComparison]:
    """Start two servers and measure them in turns, workload by workload, each beginning with one discarded run on either server.

    Both get the same prompts; each round has its own, so no prefix is ever seen twice. Who begins changes from round to round.
    Where they do not fit on the GPU `together`, all rounds of one come before those of the other. `progress` is told how many of
    the len(workloads) * (rounds + 1) * 2 runs are done.
    """
    runs: dict[str, dict[str, list[Load]]] = {name: {} for name in workloads}
    done = count(1)
    both = {"dense": dense, "compressed": compressed}
    with bench_client() as client:
        for up in [both] if together else [{name: both[name]} for name in reversed(both)]:
            with contextlib.ExitStack() as stack:
                servers = {name: stack.enter_context(server) for name, server in up.items()}
                for name, workload in workloads.items():

                    def measure(server: Server, seed: int, workload: Workload = workload) -> Load:
                        found = load(server, client, workload, seed=seed)
                        progress(next(done))
                        return found

                    for server in reversed(servers.values()):
                        measure(server, seed)
                    runs[name] |= in_turns(servers, measure, rounds, seed=seed)
    return {name: OnlineComparison(workloads[name], **found) for name, found in runs.items()}
