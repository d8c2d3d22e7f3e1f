"""ONNX Runtime as an engine, in a process of its own, on a tiny random model; and the graphs of single layers that it times."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from tiny import VOCABULARY, factorized_model

from exporters.onnx import LAST_FILE, MODEL_FILE, OnnxExporter
from lrserve.allocation.speed import Shape
from lrserve.engines import onnx_worker
from lrserve.engines.onnx import OnnxEngine
from lrserve.engines.onnx_latency import latency_table, open_layer, random_layer
from lrserve.engines.timing import UnsupportedLayerError, time_layers, weight_bytes
from lrserve.errors import ArtifactError, EngineError, InputError
from lrserve.plugins import versions

CONTEXT = 256
LAYERS = {
    "dense": Shape(96, 64, None),
    "low_rank": Shape(96, 64, 24),
    "identity_block": Shape(96, 64, 24, "identity_block"),
    "identity_block-ordered": Shape(96, 64, 24, "identity_block", ordered=True),
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    OnnxExporter().export(factorized_model("LlamaForCausalLM", structure="identity_block"), folder / "none", folder, torch.float32)
    return folder


@pytest.fixture(scope="module")
def engine(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OnnxEngine]:
    said: list[str] = []
    log = tmp_path_factory.mktemp("log") / "engine.log"
    with OnnxEngine(exported, threads=1, log=log, report=said.append) as engine:
        assert said[0].startswith(f"starting {versions.onnx_version()} on ")
        assert "ready" in said[1]
        assert engine._process is not None
        pid = engine._process.pid
        yield engine
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_every_sequence_gets_the_tokens_asked_for(engine: OnnxEngine) -> None:
    for prompt_tokens, output_tokens, concurrency in ((8, 5, 3), (1, 1, 1)):
        run = engine.throughput(prompt_tokens, output_tokens, concurrency)
        assert run.output_tokens == output_tokens * concurrency
        assert run.seconds > 0
        assert run.cpu_seconds > 0


def test_impossible_workloads_are_refused_and_the_engine_goes_on(engine: OnnxEngine) -> None:
    with pytest.raises(InputError, match=rf"^{CONTEXT - 4} \+ 5 tokens are more than the model's context, {CONTEXT}$"):
        engine.throughput(CONTEXT - 4, 5, 1)
    with pytest.raises(InputError, match=r"at least one"):
        engine.throughput(4, 0, 1)
    with pytest.raises(EngineError, match="^ONNX Runtime on .*unheard"):
        engine._request("unheard")
    with pytest.raises(InputError, match="a prompt needs at least one token"):
        engine.transcribe([[5], []], 1)
    assert engine.throughput(CONTEXT - 4, 4, 1).output_tokens == 4


def test_latencies_come_by_shape_and_token_count(engine: OnnxEngine) -> None:
    shapes = list(LAYERS.values())
    table = engine.latency_table(shapes, [1, 16, 512])
    assert [len(row) for row in table] == [3] * len(shapes)
    assert all(math.isfinite(microseconds) and microseconds > 0 for row in table for microseconds in row)


def test_latencies_are_of_float32(engine: OnnxEngine) -> None:
    with pytest.raises(InputError, match="float32, not in bfloat16"):
        engine.latency_table([LAYERS["dense"]], [1], dtype="bfloat16")


def test_missing_files_are_artifact_errors(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"^no ONNX graph at .*model_last\.onnx \(the folder is missing or empty\)"):
        OnnxEngine(tmp_path, log=tmp_path / "log").start()
    shutil.copytree(exported / "onnx", tmp_path / "onnx", ignore=shutil.ignore_patterns("genai_config.json"))
    with pytest.raises(ArtifactError, match=r"genai_config\.json is missing"):
        onnx_worker.build_engine({"model": str(tmp_path), "threads": 1, "exact": True, "provider": "cpu"})


def test_missing_package_is_named_before_anything_starts(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find_spec(name))
    engine = OnnxEngine(exported)
    with pytest.raises(EngineError, match=r"onnxruntime, not installed.*pip install 'lrserve\[onnx\]'"):
        engine.start()
    assert engine._process is None


class Recorder:
    """A decoder that notes what it is given, and whose best next token is always the largest."""

    vocabulary = 50

    def __init__(self) -> None:
        self.given: list[list[Any]] = []

    def prefill(self, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        return self.step(tokens)[:, None]

    def step(self, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        self.given.append(tokens.tolist())
        return np.broadcast_to(np.arange(50, dtype=np.float32), (len(tokens), 50))


def test_prompts_depend_on_the_seed_alone_and_the_best_tokens_are_fed_back() -> None:
    def run(seed: int) -> list[list[Any]]:
        decoder = Recorder()
        loaded: Any = SimpleNamespace(decoder={LAST_FILE: decoder}.__getitem__, context=100)
        assert onnx_worker.throughput(loaded, 7, 3, 2, seed)["output_tokens"] == 6
        return decoder.given

    first = run(1)
    assert first == run(1)
    assert first[0] != run(2)[0]
    assert [len(prompt) for prompt in first[0]] == [7, 7]
    assert all(0 <= token < 50 for prompt in first[0] for token in prompt)
    assert first[1:] == [[49, 49], [49, 49]]


def test_context_and_vocabulary_are_the_models(exported: Path) -> None:
    loaded = onnx_worker.build_engine({"model": str(exported), "threads": 1, "exact": True, "provider": "cpu"})
    assert (loaded.context, loaded.decoder(LAST_FILE).vocabulary) == (CONTEXT, VOCABULARY)
    assert [loaded.decoder(name) is loaded.decoder(name) for name in (MODEL_FILE, LAST_FILE)] == [True, True]
    assert list(loaded.opened) == [LAST_FILE]  # the weights are in memory once
    assert json.loads((exported / "onnx" / "config.json").read_text())["max_position_embeddings"] == CONTEXT


@torch.no_grad()
@pytest.mark.parametrize("name", LAYERS)
def test_the_graph_that_is_timed_computes_the_layer(name: str) -> None:
    from onnxruntime import OrtValue

    shape = LAYERS[name]
    layer = random_layer(asdict(shape))
    x = torch.randn(1, 5, shape.n)
    [y] = open_layer(layer, shape.n, 1).run_with_ort_values(["y"], {"x": OrtValue.ortvalue_from_numpy(x.numpy())})
    expected = layer(x)
    assert expected.shape == (1, 5, shape.m)
    assert float(expected.std()) > 0.1
    torch.testing.assert_close(torch.from_numpy(y.numpy()), expected, rtol=0, atol=1e-5)


def test_layers_are_timed_in_turns_with_weights_that_are_not_in_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("lrserve.engines.timing.time", SimpleNamespace(perf_counter=lambda: clock.now))
    calls: list[tuple[int, int, int]] = []
    copies = {1024: 0, 2048: 0}

    def build(entry: dict[str, Any]) -> Any:
        copy = copies[entry["n"]]
        copies[entry["n"]] += 1

        def layer(x: tuple[int, int]) -> None:
            count, n = x
            calls.append((n, copy, count))
            clock.now += 1e-6 * n * count

        return layer

    entries = [asdict(Shape(1024, 4096, None)), asdict(Shape(2048, 4096, None))]
    table = time_layers(entries, [1, 3], 4, build, lambda count, n: (count, n), None)
    np.testing.assert_allclose(table, [[1024, 3072], [2048, 6144]])
    assert copies == {1024: 5, 2048: 5}  # 256 MiB / (16 MiB + 32 MiB)
    assert calls[:10] == [(n, copy, 1) for n in copies for copy in range(5)]  # every copy once, to warm up
    rounds = [calls[10 + 2 * index : 12 + 2 * index] for index in range(6)]
    assert [{n for n, _, _ in both} for both in rounds] == [{1024, 2048}] * 6
    assert [[copy for _, copy, _ in both] for both in rounds] == [[index % 5] * 2 for index in range(6)]


def test_over_seconds_the_time_of_a_layer_is_the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("lrserve.engines.timing.time", SimpleNamespace(perf_counter=lambda: clock.now))
    calls = count()

    def layer(_: object) -> None:
        clock.now += 1e-3 if next(calls) % 5 else 6e-3  # others take the processor in every fifth call

    shape = [asdict(Shape(8192, 8192, None))]
    [[quartile]], [[mean]] = (time_layers(shape, [1], 2, lambda _: layer, lambda *_: None, seconds) for seconds in (None, 2.0))
    assert quartile == pytest.approx(1e3)
    assert mean == pytest.approx(2e3, rel=0.01)
    assert clock.now == pytest.approx(2.05, abs=0.05)  # for so long, however many calls that takes


def test_layers_that_the_engine_has_no_kernel_for_have_no_row() -> None:
    shapes = [{"n": 8, "m": 8, "rank": None, "weights": weights} for weights in (None, "int8", None, "int4_g32")]

    def build(entry: dict[str, Any]) -> Callable[[Any], Any]:
        if entry["weights"] == "int8":
            raise UnsupportedLayerError("no kernel")
        return lambda x: x

    table = time_layers(shapes, [1, 3], 2, build, lambda count, n: (count, n), None)
    assert [row if row is None else len(row) for row in table] == [2, None, 2, 2]
    assert time_layers(shapes[1:2], [1], 2, build, lambda *_: None, None) == [None]
    entry = {"n": 256, "m": 64, "rank": None, "weights": "int4_g32", "residual": 8}
    assert weight_bytes(entry, 2) == 256 * 64 // 2 + 8 * (256 + 64) * 2
    assert weight_bytes({**entry, "weights": None, "residual": 0}, 2) == 256 * 64 * 2


def test_rounded_layers_are_timed_where_there_is_a_product_for_them() -> None:
    shapes = [Shape(64, 96, None, weights="int4_g32", residual=8), Shape(64, 96, None, weights="fp8")]
    timed, missing = latency_table([asdict(shape) for shape in shapes], [1, 4], 1, None)
    assert timed is not None
    assert min(timed) > 0
    assert missing is None
