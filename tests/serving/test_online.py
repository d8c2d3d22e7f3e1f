from __future__ import annotations

import http.client
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from lrserve.engines.workloads import Mix, spread
from lrserve.errors import EngineError, InputError
from lrserve.recipe import PROFILES, EngineSettings, Workload
from lrserve.serving import online
from lrserve.serving.bench import _unsaid, cache_arguments, engine_arguments, server_arguments, servers_fit
from lrserve.serving.flags import read_flags
from lrserve.serving.online import Client, Load, OnlineComparison, Server, compare_online, load

WORKLOAD = Workload(prompt_tokens=4, output_tokens=3, concurrency=2)
DENSE = [Load(10.0, (0.1, 0.3), (0.01, 0.01)), Load(12.0, (0.2, 0.2), (0.02, 0.01)), Load(8.0, (0.2, 0.9), (0.01, 0.01))]


def faster(factor: float) -> list[Load]:
    return [Load(run.output_tokens_per_second * factor, run.first_token, run.per_token) for run in DENSE]


def test_medians_are_over_rounds_and_percentiles_over_requests() -> None:
    found = OnlineComparison(WORKLOAD, DENSE, faster(1.5)).to_json()
    assert found["dense"]["tokens_per_second"] == {"median": 10.0, "lowest": 8.0, "highest": 12.0}
    assert found["dense"]["time_to_first_token_ms"] == {"median": pytest.approx(200), "p99": pytest.approx(870)}
    assert found["compressed"]["time_per_output_token_ms"]["median"] == pytest.approx(10)
    assert found["speedup"] == found["speedup_lowest"] == pytest.approx(1.5)
    assert (found["verdict"], found["rounds"]) == ("faster", 3)


def test_the_spread_is_the_medians_interval() -> None:
    assert spread([3.0, 1.0, 2.0]) == (1.0, 3.0)
    assert spread([float(i) for i in range(1, 6)]) == (1.0, 5.0)  # 94 % of medians
    assert spread([float(i) for i in range(1, 9)]) == (2.0, 7.0)  # 93 %
    assert spread([float(i) for i in range(1, 21)]) == (6.0, 15.0)  # 96 %; 7 to 14 would be 88 %
    assert spread([2.0]) == (2.0, 2.0)


def test_the_mix_weighs_by_the_dense_models_time() -> None:
    mix = Mix(
        {"a": OnlineComparison(WORKLOAD, DENSE, faster(2)), "b": OnlineComparison(WORKLOAD, DENSE, DENSE)}, {"a": 0.75, "b": 0.25}
    )
    assert mix.speedups == pytest.approx([1 / (0.75 / 2 + 0.25)] * 3)


def test_only_rounds_that_agree_decide() -> None:
    assert OnlineComparison(WORKLOAD, DENSE, faster(0.9)).verdict == "slower"
    assert OnlineComparison(WORKLOAD, DENSE, [*faster(2)[:2], DENSE[2]]).verdict == "undecided"


class Up(Server):
    """A server of which only is known whether it is up."""

    now = most = 0

    def __enter__(self) -> Server:
        Up.now += 1
        Up.most = max(Up.most, Up.now)
        return self

    def __exit__(self, *_: object) -> None:
        Up.now -= 1


@pytest.fixture(autouse=True)
def nothing_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Up, "now", 0)
    monkeypatch.setattr(Up, "most", 0)


def test_servers_that_do_not_fit_together_run_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int, int]] = []

    def fake(server: Server, client: Client, workload: Workload, *, seed: int) -> Load:
        calls.append((server.model.name, workload.prompt_tokens, seed))
        return Load(20.0 if server.model.name == "small" else 10.0, (0.1,), (0.1,))

    monkeypatch.setattr(online, "load", fake)
    workloads = {"a": WORKLOAD, "b": Workload(prompt_tokens=9, output_tokens=3, concurrency=2)}
    found = compare_online(Up(Path("dense")), Up(Path("small")), workloads, 2, together=False, seed=7)
    assert calls == [(name, tokens, seed) for name in ("small", "dense") for tokens in (4, 9) for seed in (7, 8, 9)]
    assert (Up.most, Up.now) == (1, 0)
    assert [comparison.speedup for comparison in found.values()] == [2.0, 2.0]


@pytest.mark.parametrize(
    ("memory", "flags", "fit"),
    [(None, [], True), (2**33, [], True), (2**32, [], False), (2**32, ["--gpu-memory-utilization=0.4"], True)],
)
def test_both_servers_are_up_where_they_fit_or_the_user_divides_the_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: int | None, flags: list[str], fit: bool
) -> None:
    monkeypatch.setattr("lrserve.serving.bench.on_cpu", lambda: False)
    monkeypatch.setattr("lrserve.serving.bench.device_memory", lambda: memory)
    (tmp_path / "model.safetensors").write_bytes(b"x" * 1000)
    assert servers_fit(tmp_path, EngineSettings(), flags) is fit


def test_servers_take_turns_and_no_prompts_come_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int, int]] = []

    def fake(server: Server, client: Client, workload: Workload, *, seed: int) -> Load:
        calls.append((server.model.name, workload.concurrency, seed))
        return Load(float(len(calls)), (0.1,), (0.1,))

    monkeypatch.setattr(online, "load", fake)
    done: list[int] = []
    dense, compressed = Up(Path("dense")), Up(Path("small"))
    found = compare_online(dense, compressed, {"a": WORKLOAD}, 2, seed=7, progress=done.append)
    names = [("small", 2, 7), ("dense", 2, 7), ("dense", 2, 8), ("small", 2, 8), ("small", 2, 9), ("dense", 2, 9)]
    assert calls == names
    assert Up.most == 2
    assert done == [1, 2, 3, 4, 5, 6]
    assert [run.output_tokens_per_second for run in found["a"].dense] == [3.0, 6.0]
    assert [run.output_tokens_per_second for run in found["a"].compressed] == [4.0, 5.0]


def test_servers_are_large_enough_for_every_workload(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lrserve.serving.server.on_cpu", lambda: True)
    arguments = server_arguments(PROFILES, EngineSettings(enforce_eager=True))
    assert {"--max-model-len=1064", "--max-num-seqs=8", "--enforce-eager", "--no-enable-prefix-caching"} <= set(arguments)
    assert not any("gpu" in argument for argument in arguments)
    assert not any("tensor-parallel" in argument for argument in arguments)
    monkeypatch.setattr("lrserve.serving.server.on_cpu", lambda: False)
    assert "--gpu-memory-utilization=0.45" in server_arguments(PROFILES, EngineSettings())
    settings = EngineSettings(gpu_memory_share=0.7, tensor_parallel_size=2)
    alone = server_arguments(PROFILES, settings, sharing=1)
    assert {"--gpu-memory-utilization=0.7", "--tensor-parallel-size=2"} <= set(alone)


def startable(monkeypatch: pytest.MonkeyPatch, command: Callable[[Path, Sequence[str]], list[str]]) -> None:
    """Start another program than vLLM, and with any folder."""
    monkeypatch.setattr(online, "check_engine", lambda: None)
    monkeypatch.setattr(online, "check_model", lambda model: None)
    monkeypatch.setattr(online, "server_command", command)


@pytest.mark.parametrize(
    ("code", "timeout", "message"),
    [
        ("print('no such weights'); raise SystemExit(3)", 60.0, r"ended with code 3 while it started\n.*\n.*no such weights"),
        ("import time; print('loading', flush=True); time.sleep(60)", 1.0, r"no answer within 1 s\n.*\n.*loading"),
    ],
)
def test_a_server_that_does_not_start_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, timeout: float, message: str
) -> None:
    startable(monkeypatch, lambda *_: [sys.executable, "-c", code])
    server: Any = Server(tmp_path, log=tmp_path / "log", start_timeout=timeout)
    with pytest.raises(EngineError, match=message), server:
        pass


ANSWERS = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    asked = 0
    def do_GET(self):
        Handler.asked += 1
        self.send_response(503 if Handler.asked == 1 else 200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def test_a_server_is_there_once_it_is_healthy_and_gone_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nobody listens there
    startable(monkeypatch, lambda model, arguments: [sys.executable, "-c", ANSWERS, arguments[-1]])
    with Server(tmp_path, ["--port", "1"]) as server:
        address = server.url.removeprefix("http://")
        connection = http.client.HTTPConnection(address, timeout=5)
        connection.request("GET", "/health")
        assert connection.getresponse().status == 200
    with pytest.raises(ConnectionRefusedError):
        http.client.HTTPConnection(address, timeout=5).request("GET", "/health")


def test_settings_of_the_users_own_server_do_not_lock_the_client_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    monkeypatch.setenv("LRSERVE_API_KEY", "secret")
    given: list[str] = []

    def command(model: Path, arguments: Sequence[str]) -> list[str]:
        given.extend(arguments)
        return [sys.executable, "-c", "import os; assert 'secret' not in os.environ.values(); " + ANSWERS, arguments[-1]]

    startable(monkeypatch, command)
    with Server(tmp_path, ["--served-model-name", "foo", "--host", "0.0.0.0", "--port", "1"]):
        pass
    last = {option: given[len(given) - given[::-1].index(option)] for option in ("--served-model-name", "--host")}
    assert last == {"--served-model-name": str(tmp_path), "--host": "127.0.0.1"}


@pytest.mark.parametrize("keys", [["--api-key", "a", "b"], ["--config", "keyed.yaml"]])
def test_a_key_of_vllms_does_not_lock_the_client_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "keyed.yaml").write_text("api-key: a\nhost: 0.0.0.0\n")
    command = Server(tmp_path).command([*keys, "--host", "127.0.0.1"])
    assert read_flags(command).keys({}) == []
    assert read_flags(command).host == "127.0.0.1"
    assert "--api-key=" not in Server(tmp_path).command([])


def test_a_file_of_the_users_wins_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vllm.yaml").write_text("max-model-len: 4096\nenable_prefix_caching: true\n")
    ours = ["--max-model-len=64", "--no-enable-prefix-caching", "--generation-config=vllm"]
    assert _unsaid(ours, ["--config", "vllm.yaml"]) == ["--generation-config=vllm"]
    assert _unsaid(ours, []) == ours


def test_what_is_about_clients_is_left_out_of_figures() -> None:
    given = ["--served-model-name", "foo", "--block-size=32", "--api_key", "secret", "--host=0.0.0.0", "--port", "1", "-O0"]
    assert engine_arguments(given) == ["--block-size=32", "-O0"]
    for wrong in (["--uds", "a"], ["--ssl-keyfile=a"], ["--headless"]):
        with pytest.raises(InputError, match=f"leave out vLLM's {wrong[0].partition('=')[0]}"):
            engine_arguments(wrong)


def test_the_cache_is_large_enough_for_every_workload_unless_the_user_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lrserve.serving.bench.on_cpu", lambda: True)
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    config = {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096}
    (tmp_path / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 8192}))
    arguments = server_arguments(PROFILES, EngineSettings())
    most = max(workload.concurrency for workload in PROFILES.values())
    needed = most * 10 * 128 * 2 * 32 * 8 * 128 * 2  # 1,064 tokens in blocks of 128, and one besides
    assert cache_arguments(tmp_path, PROFILES, arguments) == [f"--kv-cache-memory-bytes={needed}"]
    assert cache_arguments(tmp_path, PROFILES, [*arguments, "--gpu-memory-utilization=0.5"]) == []
    (tmp_path / "config.json").write_text("{}")
    assert cache_arguments(tmp_path, PROFILES, arguments) == [f"--kv-cache-memory-bytes={2**30}"]
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "2")
    assert cache_arguments(tmp_path, PROFILES, arguments) == []


def test_both_sides_are_measured_greedily_whatever_their_generation_config_says() -> None:
    assert "--generation-config=vllm" in server_arguments(PROFILES, EngineSettings())


def test_a_run_that_lost_requests_is_no_result(tmp_path: Path) -> None:
    server = Server(tmp_path, log=tmp_path / "log")
    whole = {
        "completed": 4,
        "errors": ["", "", "", ""],
        "output_lens": [3, 3, 3, 3],
        "output_throughput": 5.0,
        "ttfts": [0.1, 0.2, 0.3, 0.4],
        "latencies": [0.3, 0.4, 0.5, 0.6],
    }
    found = load(server, lambda arguments: whole, WORKLOAD, seed=0)
    assert found.per_token == pytest.approx([0.1] * 4)
    for broken, message in (
        ({"completed": 3, "errors": ["", "connection reset", "", ""]}, "3 of 4 requests came back.*connection reset"),
        ({"output_lens": [3, 3, 3, 2]}, r"of \[2, 3\] tokens instead of 3"),
    ):
        with pytest.raises(EngineError, match=message):
            load(server, lambda arguments, broken=broken: whole | broken, WORKLOAD, seed=0)  # type: ignore[misc]

    def fails(arguments: Sequence[str]) -> dict[str, Any]:
        raise RuntimeError("ValueError: no tokenizer")

    with pytest.raises(EngineError, match="vllm bench serve failed: ValueError: no tokenizer"):
        load(server, fails, WORKLOAD, seed=0)
