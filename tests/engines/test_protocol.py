"""Engine and worker talking to each other with the model left out: a worker process whose `vllm.LLM` is a stand-in."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lrserve.allocation.speed import Shape
from lrserve.engines import vllm as engine_module
from lrserve.engines import vllm_worker as worker
from lrserve.engines.protocol import Throughput
from lrserve.engines.vllm import Engine, worker_environment
from lrserve.engines.workloads import in_turns
from lrserve.errors import ArtifactError, EngineError, InputError

FAKE = """
import os, sys, tempfile, time
from lrserve.errors import ArtifactError
from lrserve.engines import vllm_worker as worker

def build(settings):
    print("loading", settings["model"])
    print("temporary", tempfile.mkstemp()[1], os.environ["TORCHINDUCTOR_CACHE_DIR"])
    if settings["model"] == "wrapped":
        try:
            raise ArtifactError("layer 3 lacks its B")
        except ArtifactError as error:
            raise RuntimeError("engine core failed") from error
    if settings["model"] == "fails":
        raise RuntimeError("no memory")
    if settings["model"] == "dies":
        os._exit(7)
    if settings["model"] == "hangs":
        time.sleep(60)
    return os.getpid()

def throughput(llm, prompt_tokens, output_tokens, concurrency, seed):
    print("noise on standard output")
    os.system("echo noise of a child")
    if seed == 99:
        time.sleep(60)
    return {"seconds": 2.0, "cpu_seconds": float(llm), "output_tokens": output_tokens * concurrency}

def latency_table(llm, entries, tokens, dtype, seconds):
    return {"microseconds": [[e["n"] * t + len(e["structure"]) * (e["rank"] or 0) for t in tokens] for e in entries]}

def transcribe(llm, prompts, new_tokens):
    os._exit(3)

worker.build_engine = build
worker.REQUESTS.update(throughput=throughput, latency_table=latency_table, transcribe=transcribe)
worker.main()
"""


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "WORKER_COMMAND", (sys.executable, "-c", FAKE))
    monkeypatch.setattr(engine_module, "require_vllm", lambda: None)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return state != "Z"


def ends(pid: int, seconds: float = 15) -> bool:
    deadline = time.monotonic() + seconds
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not is_running(pid)


def test_requests_are_answered_and_prints_go_to_the_log(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "engine.log"
    said: list[str] = []
    with Engine("m", log=log, report=said.append) as engine:
        result = engine.throughput(8, 4, 3)
        assert (result.seconds, result.output_tokens, result.output_tokens_per_second) == (2.0, 12, 6.0)
        shapes = [Shape(3, 4, None), Shape(3, 4, 10, "low_rank"), Shape(3, 4, 10, "identity_block")]
        assert engine.latency_table(shapes, [1, 2]) == [[3, 6], [83, 86], [143, 146]]
        pid = int(result.cpu_seconds)
        assert is_running(pid)
    assert not is_running(pid)
    assert all(noise in log.read_text() for noise in ("loading m", "noise on standard output", "noise of a child"))
    assert said[0].startswith("starting vllm")
    assert "ready" in said[-1]


def test_temporary_files_of_an_engine_go_with_it_and_compiled_kernels_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    log = tmp_path / "engine.log"
    with Engine("m", log=log):
        [(temporary, kernels)] = [line.split()[1:] for line in log.read_text().splitlines() if line.startswith("temporary")]
        assert Path(temporary).is_file()
    assert not Path(temporary).parent.exists()
    assert Path(kernels).parent == Path(tempfile.gettempdir())


def test_temporary_log_is_deleted_on_a_clean_end_and_kept_after_a_failure() -> None:
    with Engine("m") as engine:
        path = engine._log_path
        assert path.exists()
    assert not path.exists()
    with pytest.raises(EngineError) as caught, Engine("fails"):
        pass
    kept = Path(str(caught.value).split("last lines of ")[1].split(":\n")[0])
    assert "RuntimeError: no memory" in kept.read_text()
    kept.unlink()


def test_errors_of_ours_keep_their_class_through_vllms_wrapping(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="^layer 3 lacks its B$"), Engine("wrapped", log=tmp_path / "log"):
        pass


def test_other_errors_come_with_the_log(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"(?s)fails: no memory.*last lines of .*no memory"):
        Engine("fails", log=tmp_path / "log").start()


def test_death_while_starting_is_reported(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"(?s)ended during 'start'.*loading dies"):
        Engine("dies", log=tmp_path / "log").start()


def test_death_during_a_request_is_reported(tmp_path: Path) -> None:
    with Engine("m", log=tmp_path / "log") as engine:
        with pytest.raises(EngineError, match="ended during 'transcribe'"):
            engine.transcribe([[1]], 1)
        with pytest.raises(EngineError, match="ended|not running"):
            engine.throughput(1, 1, 1)


def test_start_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    engine = Engine("hangs", log=tmp_path / "log", start_timeout=3)
    with pytest.raises(EngineError, match="no answer to 'start' within 3 s"):
        engine.start()
    assert engine._process is None


def test_request_that_takes_too_long_ends_the_engine(tmp_path: Path) -> None:
    with Engine("m", log=tmp_path / "log", request_timeout=1.5) as engine:
        pid = int(engine.throughput(1, 1, 1).cpu_seconds)
        with pytest.raises(EngineError, match="no answer to 'throughput' within"):
            engine.throughput(1, 1, 1, seed=99)
        assert ends(pid)
        with pytest.raises(EngineError, match="not running"):
            engine.throughput(1, 1, 1)


def test_unknown_request_is_an_error_and_the_engine_lives_on(tmp_path: Path) -> None:
    with Engine("m", log=tmp_path / "log") as engine:
        with pytest.raises(EngineError, match="nonsense"):
            engine._request("nonsense")
        assert engine.throughput(1, 1, 1).output_tokens == 1


def test_engine_starts_again_after_its_end(tmp_path: Path) -> None:
    engine = Engine("m", log=tmp_path / "log")
    for _ in range(2):
        with engine:
            assert engine.throughput(1, 1, 1).output_tokens == 1
    engine.close()


@pytest.mark.parametrize("model", ["m", "hangs"])
def test_worker_does_not_outlive_a_killed_parent(model: str, tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from lrserve.engines import vllm as engine\n"
        f"engine.WORKER_COMMAND = (sys.executable, '-c', {FAKE!r})\n"
        "engine.require_vllm = lambda: None\n"
        f"e = engine.Engine({model!r})\n"
        "import threading; threading.Thread(target=e.start, daemon=True).start()\n"
        "import time\n"
        "while e._process is None: time.sleep(0.01)\n"
        "print(e._process.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    time.sleep(1)  # until the worker reads its standard input
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert ends(pid)


class Recorder:
    """An engine that notes who is asked."""

    def __init__(self, name: str, calls: list[tuple[str, int]]) -> None:
        self.name, self.calls = name, calls

    def throughput(self, prompt_tokens: int, output_tokens: int, concurrency: int, *, seed: int) -> Throughput:
        self.calls.append((self.name, seed))
        return Throughput(seconds=len(self.calls), cpu_seconds=0.0, output_tokens=1)


def test_turns_rotate() -> None:
    calls: list[tuple[str, int]] = []
    engines: Any = {name: Recorder(name, calls) for name in "abc"}
    told: list[tuple[str, int]] = []

    def measure(engine: Any, seed: int) -> Throughput:
        found: Throughput = engine.throughput(8, 4, 2, seed=seed)
        return found

    results = in_turns(engines, measure, 3, seed=10, progress=lambda name, index, _: told.append((name, index)))
    order = [name for name, _ in calls]
    assert order == [*"abc", *"bca", *"cab"]
    assert [seed for _, seed in calls] == [11] * 3 + [12] * 3 + [13] * 3
    assert [result.seconds for result in results["a"]] == [1, 6, 8]
    assert told == [(name, index) for index, names in enumerate(("abc", "bca", "cab")) for name in names]


def test_local_models_are_loaded_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    local, remote = worker_environment(str(tmp_path), 1), worker_environment("owner/name", None)
    assert (local["HF_HUB_OFFLINE"], local["OMP_NUM_THREADS"]) == ("1", "1")
    assert "HF_HUB_OFFLINE" not in remote
    assert "OMP_NUM_THREADS" not in remote
    assert local["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"


def test_dense_and_compressed_models_run_on_vllm_as_it_starts_itself() -> None:
    """The engines that measure add nothing that decides how fast a step is."""
    added = worker_environment("owner/name", None).items() - os.environ.items()
    harmless = {"VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_NO_USAGE_STATS", "TOKENIZERS_PARALLELISM"}
    assert {name for name, _ in added} <= harmless
    assert "compilation_config" not in Engine("m")._settings


def test_transcript_is_read_out_of_vllms_output() -> None:
    def step(**candidates: float) -> dict[int, SimpleNamespace]:
        return {int(token[1:]): SimpleNamespace(logprob=value) for token, value in candidates.items()}

    output = SimpleNamespace(
        prompt_logprobs=[None, step(t4=-1.0, t9=-0.5), step(t5=-0.25)],
        outputs=[SimpleNamespace(token_ids=(7, 8), logprobs=[step(t7=-0.1, t3=-2.1), step(t2=-1.5, t8=-0.5)])],
    )
    found = worker._transcript([3, 4, 5], output)
    assert found == {"logprobs": [-1.0, -0.25], "tokens": [7, 8], "margins": [2.0, 1.0]}


def test_impossible_workloads_are_refused_before_they_run() -> None:
    config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=4), model_config=SimpleNamespace(max_model_len=32))
    llm = SimpleNamespace(llm_engine=SimpleNamespace(vllm_config=config))
    with pytest.raises(InputError, match="concurrency 5"):
        worker.throughput(llm, 8, 4, 5, 0)
    with pytest.raises(InputError, match=r"30 \+ 4 tokens"):
        worker.throughput(llm, 30, 4, 1, 0)
