"""What ONNX Runtime is asked for on CUDA: here it only says that it has a GPU, and computes on the CPU."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from half import runnable
from tiny import VOCABULARY, factorized_model

from exporters.onnx import LAST_FILE, MODEL_FILE, OnnxExporter
from lrserve.allocation.speed import Shape
from lrserve.engines import genai_worker, onnx_worker
from lrserve.engines.onnx import OnnxEngine
from lrserve.engines.onnx_latency import latency_table
from lrserve.engines.onnx_provider import settled, why_no_cuda
from lrserve.engines.onnx_session import OnnxDecoder, open_session, transcribe
from lrserve.engines.runtimes import runtime_of
from lrserve.errors import EngineError, InputError
from lrserve.pipeline.run import load_exporters
from lrserve.recipe import Dtype, EngineSettings

CUDA = [("CUDAExecutionProvider", {"device_id": "0", "arena_extend_strategy": "kSameAsRequested"}), "CPUExecutionProvider"]
LAYERS, KEY_HEADS, WIDTH = 2, 2, 32
CACHES = LAYERS * 2
ELSE = r"Or set engine\.onnx_provider: cpu$"
LIBRARIES = rf"no CUDA .*and cuDNN 9 that it can load\. See .* and run: pip install 'onnxruntime-gpu\[cuda,cudnn\]'\. {ELSE}"


@dataclass
class Gpu:
    """What was asked of the runtime, and where its values are.

    built: whether the installed runtime has the provider. works: whether sessions get it.
    """

    built: bool = True
    works: bool = True
    asked: list[Any] = field(default_factory=list)
    """Providers, by session."""
    runs: list[tuple[dict[str, str], dict[str, str]]] = field(default_factory=list)
    """Devices of inputs and of outputs, by run with IO binding."""
    empty: list[tuple[list[int], int, str]] = field(default_factory=list)
    """Shape, element type and device of values that were made without numbers."""
    bound: list[tuple[str, int]] = field(default_factory=list)
    """Name and element type of inputs, as they were bound."""
    on_gpu: list[Any] = field(default_factory=list)


class Binding:
    def __init__(self, gpu: Gpu, own: Any) -> None:
        self.gpu, self.own = gpu, own
        self.inputs: dict[str, str] = {}
        self.outputs: dict[str, str] = {}

    def bind_ortvalue_input(self, name: str, value: Any) -> None:
        self.inputs[name] = "cuda" if any(value is held for held in self.gpu.on_gpu) else "cpu"
        self.gpu.bound.append((name, value.element_type()))
        self.own.bind_ortvalue_input(name, value)

    def bind_output(self, name: str, device: str, number: int) -> None:
        assert number == 0
        self.outputs[name] = device
        self.own.bind_output(name, "cpu", 0)

    def get_outputs(self) -> list[Any]:
        values = list(self.own.get_outputs())
        self.gpu.on_gpu += [value for value, device in zip(values, self.outputs.values(), strict=True) if device == "cuda"]
        return values

    def synchronize_outputs(self) -> None:
        self.own.synchronize_outputs()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    found = Gpu()
    real, make = onnxruntime.InferenceSession, onnxruntime.OrtValue.ortvalue_from_shape_and_type

    class Session:
        def __init__(self, graph: Any, options: Any, providers: list[Any]) -> None:
            found.asked.append(providers)
            own = str(runnable(Path(graph))) if isinstance(graph, str) else graph
            self._own = real(own, options, providers=["CPUExecutionProvider"])

        def __getattr__(self, name: str) -> Any:
            assert not name.startswith("run"), f"{name} copies outputs to the host"
            return getattr(self._own, name)

        def get_providers(self) -> list[str]:
            return ["CUDAExecutionProvider", "CPUExecutionProvider"] if found.works else ["CPUExecutionProvider"]

        def io_binding(self) -> Binding:
            return Binding(found, self._own.io_binding())

        def run_with_iobinding(self, binding: Binding) -> None:
            found.runs.append((dict(binding.inputs), dict(binding.outputs)))
            self._own.run_with_iobinding(binding.own)

    def empty(shape: list[int], element: int, device: str, number: int) -> Any:
        found.empty.append((shape, element, device))
        found.on_gpu.append(value := make(shape, element, "cpu", number))
        return value

    def providers() -> list[str]:
        return ["CUDAExecutionProvider", "CPUExecutionProvider"] if found.built else ["CPUExecutionProvider"]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(onnxruntime, "get_available_providers", providers)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: print("Failed to load libcudnn.so.9"))
    monkeypatch.setattr(onnxruntime.OrtValue, "ortvalue_from_shape_and_type", empty)
    why_no_cuda.cache_clear()
    yield found
    why_no_cuda.cache_clear()


@pytest.fixture(scope="module", params=["float16", "bfloat16"])
def graph(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Dtype, Path]:
    dtype: Dtype = request.param
    folder = tmp_path_factory.mktemp(dtype)
    OnnxExporter("genai", dtype).export(factorized_model("LlamaForCausalLM"), folder / "none", folder, torch.float32)
    if dtype == "bfloat16":
        for path in (folder / "onnx" / MODEL_FILE, folder / "onnx" / LAST_FILE):
            runnable(path).replace(path)
    return dtype, folder


def test_caches_stay_on_the_gpu_and_only_logits_that_are_wanted_leave_it(graph: tuple[Dtype, Path], gpu: Gpu) -> None:
    dtype, folder = graph
    loaded = onnx_worker.build_engine({"model": str(folder), "threads": 1, "exact": True, "provider": "cuda"})
    decoder = loaded.decoder(LAST_FILE)
    assert (decoder.dtype, decoder.bound, decoder.vocabulary) == (dtype, True, VOCABULARY)
    assert onnx_worker.throughput(loaded, 6, 3, 2, 0)["output_tokens"] == 6
    assert gpu.asked == [CUDA]
    assert gpu.empty == [([2, KEY_HEADS, 0, WIDTH], {"float16": 10, "bfloat16": 16}[dtype], "cuda")] * CACHES
    assert len(gpu.runs) == 3
    for inputs, outputs in gpu.runs:
        assert Counter(inputs.values()) == {"cuda": CACHES, "cpu": 2}
        assert {name for name, device in inputs.items() if device == "cpu"} == {"input_ids", "attention_mask"}
        assert {device for name, device in outputs.items() if name.startswith("present.")} == {"cuda"}
        assert next(iter(outputs.items())) == ("logits", "cpu")


def test_what_is_bound_computes_what_is_not(graph: tuple[Dtype, Path], gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    path = graph[1] / "onnx" / "model.onnx"
    prompts = np.random.default_rng(0).integers(3, VOCABULARY, (3, 9))
    decoder = OnnxDecoder(path, 1, provider="cuda")
    bound = [decoder.prefill(prompts), decoder.step(prompts[:, 0]), decoder.step(prompts[:, 1])]
    bound = [np.array(logits) for logits in bound]
    transcripts = transcribe(lambda name: decoder, prompts.tolist(), 5)
    monkeypatch.undo()
    decoder = OnnxDecoder(path, 1)
    assert not decoder.bound
    plain = [decoder.prefill(prompts), decoder.step(prompts[:, 0]), decoder.step(prompts[:, 1])]
    for found, expected in zip(bound, plain, strict=True):
        np.testing.assert_array_equal(found, expected)
    assert transcribe(lambda name: decoder, prompts.tolist(), 5) == transcripts


@pytest.mark.parametrize(("dtype", "element"), [("float16", 10), ("bfloat16", 16), ("float32", 1)])
def test_layers_are_timed_in_the_graphs_format_with_inputs_and_outputs_on_the_gpu(dtype: Dtype, element: int, gpu: Gpu) -> None:
    shapes = [Shape(64, 96, None, weights="int4_g32", residual=8), Shape(64, 96, None, weights="fp8")]
    timed, missing = latency_table([asdict(shape) for shape in shapes], [1, 4], 1, None, dtype=dtype, provider="cuda")
    assert timed is not None
    assert min(timed) > 0
    assert missing is None
    copies = len(gpu.asked)
    assert gpu.asked == [CUDA] * copies
    assert gpu.bound == [("x", element)] * (2 * copies)  # once for each number of rows, not at every call
    assert len(gpu.runs) > 3 * copies
    assert {device for _, outputs in gpu.runs for device in outputs.values()} == {"cuda"}


def test_the_times_of_layers_are_refused_in_another_format_than_the_graphs() -> None:
    loaded: Any = SimpleNamespace(decoder=lambda name: SimpleNamespace(dtype="float16"), threads=1, provider="cuda")
    with pytest.raises(InputError, match="the ONNX graph computes in float16, not in float32; ask for layers in float16"):
        onnx_worker.latency_table(loaded, [], [1], "float32", None)


ON_CUDA = {"onnx_provider": "cuda"}
CHOICES: list[tuple[dict[str, Any], bool, tuple[str, str] | str]] = [
    ({}, True, ("cuda", "bfloat16")),
    ({}, False, ("cpu", "float32")),
    ({"dtype": "float16"}, True, ("cuda", "float16")),
    ({"dtype": "float32"}, True, ("cpu", "float32")),
    ({"onnx_dtype": "float16"}, True, ("cuda", "float16")),
    ({"onnx_dtype": "float16"}, False, ("cpu", "float16")),
    ({"onnx_dtype": "float32"}, True, ("cpu", "float32")),
    ({"onnx_profile": "portable"}, True, ("cpu", "float32")),
    ({"onnx_provider": "cpu"}, True, ("cpu", "float32")),
    ({"onnx_provider": "cpu", "onnx_dtype": "float16"}, True, ("cpu", "float16")),
    (ON_CUDA, True, ("cuda", "bfloat16")),
    ({**ON_CUDA, "dtype": "float32", "onnx_dtype": "float16"}, True, ("cuda", "float16")),
    (ON_CUDA, False, rf"does not compute on CUDA here: a session finds no GPU, or {LIBRARIES}"),
    ({**ON_CUDA, "dtype": "float32"}, True, r"does not run float32 graphs; set engine\.onnx_dtype to bfloat16 or float16"),
    ({**ON_CUDA, "onnx_profile": "portable"}, True, r"does not run graphs of the profile portable; .*engine\.onnx_profile genai"),
    ({"onnx_dtype": "bfloat16"}, False, r"engine\.onnx_dtype bfloat16: .*CUDA only.*set float16, or export on a machine with"),
    ({"onnx_dtype": "bfloat16", "onnx_provider": "cpu"}, True, r"engine\.onnx_dtype bfloat16: .*CUDA only"),
]


@pytest.mark.parametrize(("settings", "has_gpu", "expected"), CHOICES)
def test_the_provider_and_the_format_that_settings_come_to(
    settings: dict[str, Any], has_gpu: bool, expected: tuple[str, str] | str, gpu: Gpu
) -> None:
    gpu.works = has_gpu
    chosen = EngineSettings(runtime="onnx", **settings)
    if isinstance(expected, tuple):
        found = settled(chosen)
        assert (found.onnx_provider, found.onnx_dtype) == expected
        assert settled(found) == found
        return
    for refused in (settled, runtime_of, lambda own: load_exporters(["onnx"], own)):
        with pytest.raises((EngineError, InputError), match=expected) as error:
            refused(chosen)  # type: ignore[operator]
        assert "\n" not in str(error.value)
    load_exporters(["vllm"], chosen)  # which is no matter of graphs


def test_a_session_shows_whether_there_is_cuda(gpu: Gpu, capfd: pytest.CaptureFixture[str]) -> None:
    assert why_no_cuda() is None
    assert gpu.asked == [CUDA]
    why_no_cuda.cache_clear()
    gpu.works = False
    assert "a session finds no GPU" in str(why_no_cuda())
    why_no_cuda.cache_clear()
    gpu.built = False
    assert re.fullmatch(r"the installed onnxruntime is a build without it\. Run: pip uninstall .*", str(why_no_cuda()))
    assert gpu.asked == [CUDA, CUDA]
    assert capfd.readouterr() == ("", "")


def test_without_the_package_there_is_no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    why_no_cuda.cache_clear()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(EngineError, match=rf"onnxruntime is not installed\. Run: pip install 'lrserve\[onnx-gpu\]'\. {ELSE}"):
        settled(EngineSettings(runtime="onnx", **ON_CUDA))
    why_no_cuda.cache_clear()


def test_a_session_that_goes_on_without_cuda_is_an_error(graph: tuple[Dtype, Path], gpu: Gpu) -> None:
    gpu.works = False
    with pytest.raises(EngineError, match=LIBRARIES) as error:
        open_session(graph[1] / "onnx" / "model.onnx", provider="cuda")
    assert "\n" not in str(error.value)


def test_the_runtime_of_a_recipe_measures_exports_and_proves_on_cuda(gpu: Gpu, tmp_path: Path) -> None:
    runtime = runtime_of(EngineSettings(runtime="onnx", **ON_CUDA))
    assert runtime.version.endswith(", bfloat16 graph, on CUDA")
    assert (runtime.name, runtime.dtype, runtime.reference_dtype) == ("onnxruntime", "bfloat16", "float32")
    assert runtime.check_twin is not None
    assert runtime.rounding_inputs is None
    engine = runtime.open(tmp_path, {})
    assert isinstance(engine, OnnxEngine)
    assert engine._settings == {"model": str(tmp_path), "threads": None, "exact": True, "provider": "cuda"}
    runtime.exporter.export(factorized_model("LlamaForCausalLM"), tmp_path / "none", tmp_path, torch.float32)
    config = json.loads((tmp_path / "onnx" / "genai_config.json").read_text())
    assert config["model"]["decoder"]["session_options"]["provider_options"] == [{"cuda": {"enable_cuda_graph": "0"}}]


class FakeGenai:
    """onnxruntime-genai, which notes what is done to a folder's configuration."""

    def __init__(self, *, cuda: bool) -> None:
        self.cuda, self.done = cuda, list[str]()

    def is_cuda_available(self) -> bool:
        return self.cuda

    def Config(self, folder: str) -> Any:
        return SimpleNamespace(clear_providers=lambda: self.done.append("cleared"), overlay=self.done.append)

    def Model(self, config: Any) -> str:
        return "loaded"


@pytest.mark.parametrize(
    ("dtype", "cuda", "done"), [("float32", False, ["cleared"]), ("float32", True, ["cleared"]), ("float16", True, [])]
)
def test_genai_loads_a_graph_on_the_provider_that_it_is_for(
    dtype: Dtype, cuda: bool, done: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    OnnxExporter("genai", dtype).export(factorized_model("LlamaForCausalLM"), tmp_path / "none", tmp_path, torch.float32)
    genai = FakeGenai(cuda=cuda)
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", genai)  # type: ignore[arg-type]
    loaded = genai_worker.build_engine({"model": str(tmp_path / "onnx"), "threads": None})
    assert (loaded.model, loaded.end_tokens, genai.done) == ("loaded", frozenset([2]), done)


def test_genai_without_cuda_refuses_a_graph_for_it(tmp_path: Path) -> None:
    OnnxExporter("genai", "float16").export(factorized_model("LlamaForCausalLM"), tmp_path / "none", tmp_path, torch.float32)
    with pytest.raises(EngineError, match=r"a graph for CUDA.*build without it.*pip install 'lrserve\[onnx-gpu\]'") as error:
        genai_worker.build_engine({"model": str(tmp_path / "onnx"), "threads": None})
    assert "\n" not in str(error.value)


def test_the_names_of_types_are_onnx_s() -> None:
    from onnx import TensorProto

    from lrserve.engines.onnx_session import TYPES

    for dtype, (name, element) in TYPES.items():
        own = "FLOAT" if dtype == "float32" else dtype.upper()
        assert element == getattr(TensorProto, own)
        value = onnxruntime.OrtValue.ortvalue_from_shape_and_type([1], element)
        assert value.data_type() == name
