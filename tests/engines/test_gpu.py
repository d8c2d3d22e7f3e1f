"""Engines on GPUs, as far as it shows without one: their settings, what fits beside what, and what is said when memory is short."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lrserve.allocation.speed import Shape
from lrserve.engines import process
from lrserve.engines.gpu import both_fit, device_memory, memory_errors_named, require_devices, shortage
from lrserve.engines.protocol import Throughput
from lrserve.engines.runtimes import runtime_of
from lrserve.engines.timing import UnsupportedLayerError, replay_layers
from lrserve.engines.vllm import Engine
from lrserve.engines.workloads import compare, compare_apart, open_engine
from lrserve.errors import EngineError, InputError
from lrserve.recipe import PROFILES, EngineSettings, Workload
from lrserve.serving.online import Server

GIB = 2**30


@pytest.mark.parametrize(
    ("weights", "memory", "share", "devices", "fit"),
    [
        (2 * GIB, 24 * GIB, 0.9, 1, True),  # 1B in 16 bits
        (16 * GIB, 24 * GIB, 0.9, 1, False),  # 8B: not even half of it
        (16 * GIB, 80 * GIB, 0.9, 1, True),
        (16 * GIB, 24 * GIB, 0.9, 4, True),
        (16 * GIB, 80 * GIB, 0.4, 1, False),
        (33 * GIB, 80 * GIB, 0.9, 1, True),  # exactly, with what an engine needs besides
        (33 * GIB + 1, 80 * GIB, 0.9, 1, False),
    ],
)
def test_two_engines_fit_where_each_has_half_of_the_share(weights: int, memory: int, share: float, devices: int, fit: bool) -> None:
    assert both_fit(weights, memory, share, devices) is fit


def test_an_engine_gets_its_part_of_the_share_and_every_gpu() -> None:
    settings = EngineSettings(gpu_memory_share=0.8, tensor_parallel_size=2)
    for sharing, part in ((1, 0.8), (2, 0.4)):
        asked = open_engine(Path("model"), PROFILES, settings, sharing=sharing)._settings
        assert (asked["gpu_memory_utilization"], asked["tensor_parallel_size"]) == (part, 2)


def gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(total_memory=80 * GIB))


def test_more_gpus_than_there_are_are_refused_before_vllm_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 2)
    require_devices(2)
    with pytest.raises(InputError, match=r"^engine\.tensor_parallel_size 4: there are 2 GPUs here; set it to 2 or less$"):
        runtime_of(EngineSettings(tensor_parallel_size=4))
    gpus(monkeypatch, 1)
    with pytest.raises(InputError, match="there is one GPU here; set it to 1"):
        require_devices(2)
    gpus(monkeypatch, 0)
    require_devices(4)  # processes on a CPU
    assert device_memory() is None


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (
            "ERROR [core.py:1] ValueError: Free memory on device cuda:0 (3.1/23.6 GiB) on startup is less than desired GPU memory "
            "utilization (0.9, 21.2 GiB). Decrease GPU memory utilization.\nRuntimeError: Engine core initialization failed",
            r"^Free memory on device cuda:0 .* is less than .*; lower engine\.gpu_memory_share, or end what else uses the GPU$",
        ),
        (
            "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization`",
            r"^No available memory .*; raise engine\.gpu_memory_share or engine\.tensor_parallel_size",
        ),
        (
            "(1024), (4.0 GiB KV cache is needed, which is larger than the available KV cache memory (0.5 GiB).",
            r"larger than the available KV cache memory .*; raise engine\.gpu_memory_share",
        ),
        (
            "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.6 GiB",
            r"^CUDA out of memory\. Tried to allocate 2\.00 GiB\..*; lower engine\.gpu_memory_share",
        ),
        (
            "RuntimeException: [ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : CUDA failure 2: out of memory ; GPU=0",
            r"^CUDA failure 2: out of memory; lower",
        ),
    ],
)
def test_a_shortage_of_memory_names_the_setting_to_change(text: str, found: str) -> None:
    said = shortage(text)
    assert said is not None
    assert "\n" not in said
    with pytest.raises(EngineError, match=found):
        raise EngineError(said)
    assert shortage("RuntimeError: no such kernel") is None


def test_a_log_that_tells_of_a_shortage_becomes_one_line(tmp_path: Path) -> None:
    log = tmp_path / "log"
    before = "CUDA out of memory. Tried to allocate 1 GiB\n"  # of an engine that wrote there before
    log.write_text(before + "loading\nRuntimeError: no such kernel\n")
    error = str(process.failure("vLLM on m", "it ended", log, len(before)))
    assert error == f"vLLM on m: it ended\nlast lines of {log}:\n  loading\n  RuntimeError: no such kernel"
    error = str(process.failure("vLLM on m", "it ended", log))
    assert error.startswith("vLLM on m: CUDA out of memory. Tried to allocate 1 GiB; lower engine.gpu_memory_share")
    assert error.endswith(f". Log: {log}")
    assert "\n" not in error


def test_a_shortage_in_this_process_names_the_setting_to_change() -> None:
    with (
        pytest.raises(EngineError, match=r"^the GPU's memory is full: .*Tried to allocate 2 GiB; lower calibration\.batch_tokens$"),
        memory_errors_named("lower calibration.batch_tokens"),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


def test_memory_is_released_before_an_engine_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def start(*_: object, **__: object) -> None:
        order.append("started")
        raise FileNotFoundError

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: order.append("released"))
    monkeypatch.setattr(subprocess, "Popen", start)
    monkeypatch.setattr("lrserve.engines.vllm.require_vllm", lambda: None)
    monkeypatch.setattr("lrserve.serving.online.check_engine", lambda: None)
    monkeypatch.setattr("lrserve.serving.online.check_model", lambda model: None)
    for engine in (Engine("m"), Server(Path("m"))):
        with pytest.raises(FileNotFoundError), engine:
            pass
    assert order == ["released", "started"] * 2


class Recorded:
    """An engine that notes when it is up, and what it runs."""

    def __init__(self, name: str, order: list[Any], seconds: float) -> None:
        self.name, self.order, self.seconds = name, order, seconds

    def __enter__(self) -> Recorded:
        self.order.append(f"{self.name} up")
        return self

    def __exit__(self, *_: object) -> None:
        self.order.append(f"{self.name} down")

    def throughput(self, prompt_tokens: int, output_tokens: int, concurrency: int, *, seed: int) -> Throughput:
        self.order.append((self.name, prompt_tokens, seed))
        return Throughput(seconds=self.seconds, cpu_seconds=0.0, output_tokens=1)


def test_engines_that_do_not_fit_together_run_one_after_the_other_on_the_same_prompts() -> None:
    loads = {"a": Workload(prompt_tokens=4), "b": Workload(prompt_tokens=8)}
    order: list[Any] = []
    dense, small = (Recorded(name, order, seconds) for name, seconds in (("dense", 3.0), ("small", 2.0)))
    ended: list[None] = []
    engines: Any = (dense, small)
    apart = compare_apart(*engines, loads, 2, version="v", seed=7, progress=lambda: ended.append(None))
    runs = [(name, tokens, seed) for name in ("small", "dense") for tokens in (4, 8) for seed in (7, 8, 9)]
    assert order == ["small up", *runs[:6], "small down", "dense up", *runs[6:], "dense down"]
    assert len(ended) == 8
    assert apart.speedup == pytest.approx(1.5)
    order.clear()
    [together] = compare(dense, [small], loads, 2, version="v", seed=7)  # type: ignore[arg-type, list-item]
    assert sorted(order) == sorted(runs)
    assert together == apart


@pytest.mark.parametrize(("seconds", "length", "mode"), [(None, 5.0, "median"), (2.0, 200.0, "mean")])
def test_layers_are_timed_by_replays_of_a_graph_of_their_copies(
    monkeypatch: pytest.MonkeyPatch, seconds: float | None, length: float, mode: str
) -> None:
    asked: list[Any] = []
    called: list[tuple[int, int, int]] = []
    built = {1024: 0, 8: 0}

    def bench(run: Callable[[], None], *, rep: float, return_mode: str) -> float:
        called.clear()
        run()
        asked.append((rep, return_mode))
        return 1e-3 * sum(n * rows for n, _, rows in called)  # milliseconds

    def build(entry: dict[str, Any]) -> Callable[[tuple[int, int]], None]:
        if entry["weights"] == "int8":
            raise UnsupportedLayerError("no kernel")
        copy, n = built[entry["n"]], entry["n"]
        built[n] += 1
        return lambda x: called.append((n, copy, x[0]))

    monkeypatch.setitem(sys.modules, "triton.testing", SimpleNamespace(do_bench_cudagraph=bench))
    entries = [asdict(Shape(1024, 4096, None)), asdict(Shape(8, 8, None, weights="int8")), asdict(Shape(8, 8, None))]
    table = replay_layers(entries, [1, 256], 2, build, lambda count, n: (count, n), seconds)
    assert table == [pytest.approx([1024, 1024 * 256]), None, pytest.approx([8, 8 * 256])]  # microseconds of one copy
    assert asked == [(pytest.approx(length), mode)] * 4
    assert built == {1024: 32, 8: 64}  # 256 MiB / 8 MiB; and so many at most
    assert called == [(8, copy, 256) for copy in range(64)]
