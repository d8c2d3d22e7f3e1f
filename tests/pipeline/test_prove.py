"""The proof of one rendering with a real engine, ONNX Runtime; what is kept of the dense model; and exporters of other packages."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import Rounding, dense_model, factorized_model, rounded_model, write_dense, write_text
from torch import nn

from exporters.base import Exporter
from exporters.onnx import OnnxExporter
from exporters.vllm import VllmExporter
from lrserve.compression.embedding import round_embedding
from lrserve.compression.lowrank import is_rounded
from lrserve.engines.onnx import OnnxEngine
from lrserve.engines.runtimes import Runtime, runtime_of
from lrserve.engines.transcripts import Transcript, transcribe_checkpoint, transcribe_model
from lrserve.errors import AgreementError, InputError
from lrserve.pipeline import prove
from lrserve.pipeline.agreement import Pair, differences
from lrserve.pipeline.baseline import dense_reference, keep_served, kept_served
from lrserve.pipeline.job import Job, open_job
from lrserve.pipeline.prove import Proof, Rendered, prove_agreement
from lrserve.pipeline.run import load_exporters
from lrserve.recipe import EngineSettings, Recipe
from lrserve.report.card import agreement
from lrserve.storage.work import WorkFolder, work_folder

NEW_TOKENS = 6
ENGINE = {"runtime": "onnx", "enforce_eager": True}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("proof")
    write_dense(dense_model("LlamaForCausalLM"), place / "model")
    write_text(place / "text.jsonl", 100)
    return place


def open_tiny(place: Path, **engine: Any) -> Job:
    settings = {
        "model": str(place / "model"),
        "target": {"ratio": 0.2},
        "text": {"calibration": str(place / "text.jsonl")},
        "calibration": {"sequences": 4, "length": 32},
        "search": {"validation_tokens": 64, "probe_tokens": 64, "validation_pool": 64, "validation_length": 32},
        "report": {"tokens": 64, "length": 32, "prompts": 2, "prompt_tokens": 12, "new_tokens": NEW_TOKENS},
        "engine": {**ENGINE, **engine},
    }
    return open_job(Recipe.model_validate(settings), say=lambda line: None)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[WorkFolder]:
    with work_folder(tmp_path / "work", lambda line: None) as folder:
        yield folder


class Counting:
    """Stands for a running engine of the dense model."""

    def __init__(self) -> None:
        self.calls = 0

    def transcribe(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[Transcript]:
        self.calls += 1
        return [Transcript((-1.5,) * (len(prompt) - 1), (3,) * new_tokens, (0.25,) * new_tokens) for prompt in prompts]


def test_the_dense_models_transcripts_are_kept_for_the_same_inputs(place: Path, folder: WorkFolder) -> None:
    job, engine = open_tiny(place), Counting()
    runtime = runtime_of(job.recipe.engine)
    assert kept_served(job, runtime, folder) is None
    first = keep_served(job, runtime, engine, folder)  # type: ignore[arg-type]
    assert first == Counting().transcribe(job.windows["prompts"].tolist(), NEW_TOKENS)
    assert kept_served(job, runtime, folder) == keep_served(job, runtime, engine, folder) == first  # type: ignore[arg-type]
    assert engine.calls == 1


@pytest.mark.parametrize("changed", [{"dtype": "float32"}, {"enforce_eager": False}, {"runtime": "onnx"}])
def test_another_engine_has_transcripts_of_its_own(place: Path, folder: WorkFolder, changed: dict[str, Any]) -> None:
    job = open_tiny(place, runtime="vllm")
    keep_served(job, runtime_of(job.recipe.engine), Counting(), folder)  # type: ignore[arg-type]
    other = open_tiny(place, **{"runtime": "vllm", **changed})
    assert kept_served(other, runtime_of(other.recipe.engine), folder) is None


def test_the_dense_reference_is_in_the_dtype_that_is_served(place: Path, folder: WorkFolder) -> None:
    for dtype in ("bfloat16", "float32"):
        job = open_tiny(place, runtime="vllm", dtype=dtype)
        found = dense_reference(job, runtime_of(job.recipe.engine), folder)
        model = job.source.load(getattr(torch, dtype))
        assert found == transcribe_model(model, job.windows["prompts"].tolist(), NEW_TOKENS)


def tampered(model: Any) -> Any:
    """One bias of the second layer's factors is lost."""
    bias = model.model.layers[1].self_attn.q_proj.B.bias
    with torch.no_grad():
        bias.zero_()
    return model


def prove_graph(job: Job, model: Any, written: Any, folder: WorkFolder, out: Path) -> Proof:
    exporter = OnnxExporter().configured(job.recipe.engine)
    out.mkdir()
    exporter.export(written, job.source.path, out, torch.float32)
    return prove_agreement(job, Rendered(model, [exporter]), [exporter], out, folder)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders of the engines that a test has started, in that order."""
    folders: list[str] = []
    start = OnnxEngine.start

    def counted(engine: OnnxEngine) -> None:
        folders.append(Path(engine.model).name.partition("-")[0])
        start(engine)

    monkeypatch.setattr(OnnxEngine, "start", counted)
    return folders


def test_a_graph_is_proven_and_the_dense_engine_started_once(
    place: Path, folder: WorkFolder, tmp_path: Path, started: list[str]
) -> None:
    said: list[str] = []
    job, model = replace(open_tiny(place), say=said.append), factorized_model("LlamaForCausalLM")
    proof = prove_graph(job, model, model, folder, tmp_path / "out")
    assert started == ["out", "model"]
    assert [line.partition(":")[0] for line in said] == ["dense model", "6/6 agreement"]
    found = proof.agreement["onnxruntime"]
    assert found["max_logprob_difference"] < 1e-4
    served = found["as_served"]
    assert (served["dtype"], served["compiled"]) == ("float32", False)
    for side in ("dense", "compressed"):
        assert 0 < served[side]["mean"] <= served[side]["largest"] < 1e-4
        assert served[side]["greedy_equal"] == served[side]["greedy_tokens"] == 2 * NEW_TOKENS
    assert [set(sample) for sample in proof.samples] == [{"prompt", "dense", "compressed"}] * 2
    tokenizer = job.source.tokenizer()
    assert [sample["prompt"] for sample in proof.samples] == tokenizer.batch_decode(job.windows["prompts"])
    continued = transcribe_model(model, job.windows["prompts"].tolist(), NEW_TOKENS)
    assert [sample["compressed"] for sample in proof.samples] == [tokenizer.decode(list(t.tokens)) for t in continued]
    assert all(sample["dense"] != sample["compressed"] for sample in proof.samples)

    assert prove_graph(job, model, model, folder, tmp_path / "again") == proof
    assert started == ["out", "model", "again"]

    card = agreement({"agreement": proof.agreement})
    assert "As served is float32, not compiled; in brackets the dense model." in card
    assert f"{served['compressed']['mean']:.1e} ({served['dense']['mean']:.1e})" in card


def test_a_graph_of_another_model_is_refused(place: Path, folder: WorkFolder, tmp_path: Path) -> None:
    job, model = open_tiny(place), factorized_model("LlamaForCausalLM")
    with pytest.raises(AgreementError, match=r"onnxruntime differs from the model in memory"):
        prove_graph(job, model, tampered(factorized_model("LlamaForCausalLM")), folder, tmp_path / "out")


HALF = {"onnx_dtype": "float16", "dtype": "float32"}


def test_a_graph_in_float16_is_proven_by_its_float32_twin_and_held_to_what_the_dense_model_shows(
    place: Path, folder: WorkFolder, tmp_path: Path, started: list[str]
) -> None:
    job, model = open_tiny(place, **HALF), factorized_model("LlamaForCausalLM")
    found = prove_graph(job, model, model, folder, tmp_path / "out").agreement["onnxruntime"]
    assert started == ["twin", "out", "model"]
    assert not (folder.root / "twin").exists()
    assert found["max_logprob_difference"] < 1e-4, "of the twin"
    served = found["as_served"]
    assert served["dtype"] == "float16"
    assert "rounded" not in served
    for side in ("dense", "compressed"):
        assert 1e-4 < served[side]["mean"] < served[side]["largest"] < 0.2, "float16's rounding"


def test_a_float16_graph_of_another_model_is_refused(place: Path, folder: WorkFolder, tmp_path: Path) -> None:
    job, model = open_tiny(place, **HALF), factorized_model("LlamaForCausalLM")
    with pytest.raises(AgreementError, match=r"qkv_proj\.B\.bias is not its float32 twin's, rounded to float16"):
        prove_graph(job, model, tampered(factorized_model("LlamaForCausalLM")), folder, tmp_path / "out")
    assert not (folder.root / "twin").exists()


class Loaded:
    """Stands for an engine: transformers, in a dtype."""

    def __init__(self, folder: Path, dtype: str) -> None:
        self.folder, self.dtype = folder, getattr(torch, dtype)

    def __enter__(self) -> Loaded:
        return self

    def __exit__(self, *_: object) -> None:
        """Leave nothing running."""

    def transcribe(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[Transcript]:
        return transcribe_checkpoint(self.folder, self.dtype, prompts, new_tokens)


@pytest.mark.parametrize("gib", [None, 0.5])
def test_without_room_for_float32_an_engine_is_proven_as_it_serves(
    gib: float | None, place: Path, folder: WorkFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []

    def loader(exporter: Exporter, settings: EngineSettings) -> Any:
        def start(model: Path, workloads: Any) -> Loaded:
            opened.append(settings.dtype)
            return Loaded(model, settings.dtype)

        return Runtime("vllm", "made up 1", settings.dtype, False, exporter, loads_sources=True, open=start)  # type: ignore[arg-type]

    monkeypatch.setattr(prove, "loader_of", loader)
    job = open_tiny(place, runtime="vllm")
    job = replace(job, recipe=job.recipe.model_copy(update={"memory": gib}))
    model = factorized_model("LlamaForCausalLM")
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    exporter, out = VllmExporter(), tmp_path / "out"
    out.mkdir()
    exporter.export(model, job.source.path, out, torch.bfloat16)
    proof = prove_agreement(job, Rendered(model, [exporter]), [exporter], out, folder)
    assert opened == ["float32"] * (gib is None) + ["bfloat16"] * 2
    assert proof.agreement["transformers"]["max_logprob_difference"] < 1e-5
    found = proof.agreement["vllm"]
    assert found["as_served"]["dtype"] == "bfloat16"
    assert ("max_logprob_difference" in found) is (gib is None)
    assert "vllm" in agreement({"agreement": proof.agreement})
    other = tampered(factorized_model("LlamaForCausalLM"))
    with pytest.raises(AgreementError, match="transformers differs from the model in memory"):
        prove_agreement(job, Rendered(other, [exporter]), [exporter], out, folder)


class Foreign:
    """An exporter of another package that writes nothing; its engine computes what a float32 model does."""

    name = "foreign"
    tolerance = 1e-4

    def preflight(self, skeleton: Any) -> None:
        """Need nothing."""

    def export(self, model: Any, source: Path, out: Path, dtype: torch.dtype) -> None:
        """Write nothing."""


class ForeignProving(Foreign):
    def transcribe(self, out: Path, prompts: Sequence[Sequence[int]], new_tokens: int) -> Mapping[str, Sequence[Any]]:
        return {"theirs": transcribe_model(dense_model("LlamaForCausalLM"), prompts, new_tokens)}


def test_exporters_are_given_what_they_can_render() -> None:
    model = rounded_model("Qwen2ForCausalLM", Rounding("int8"))
    round_embedding(model, "int8", torch.float32)
    prompts = torch.arange(3, 30)[None].tolist()
    expected = transcribe_model(model, prompts, 2)
    graph, checkpoint, plain = exporters = [OnnxExporter(), VllmExporter(), Foreign()]
    rendered = Rendered(model, exporters)
    assert rendered.by(graph) is model
    kept = {exporter: rendered.by(exporter) for exporter in (checkpoint, plain)}
    assert [type(found.get_input_embeddings()) for found in kept.values()] == [nn.Embedding, nn.Embedding]
    assert [is_rounded(found) for found in kept.values()] == [True, False]
    for found in kept.values():
        assert differences(Pair(expected, transcribe_model(found, prompts, 2))).largest < 1e-4
    assert Rendered(dense_model("LlamaForCausalLM"), exporters).by(plain) is not None


def test_an_exporter_that_proves_itself_is_compared_in_float32(place: Path, folder: WorkFolder, tmp_path: Path) -> None:
    job = open_tiny(place)
    exporters = [ForeignProving()]
    proof = prove_agreement(job, Rendered(dense_model("LlamaForCausalLM"), exporters), exporters, tmp_path, folder)
    equal = 2 * NEW_TOKENS
    figures = {"max_logprob_difference": 0.0, "tolerance": 1e-4, "greedy_equal": equal, "greedy_tokens": equal}
    assert proof == Proof({"theirs": figures}, [])
    assert "theirs" in agreement({"agreement": proof.agreement})
    with pytest.raises(AgreementError, match="theirs differs from the model in memory"):
        prove_agreement(job, Rendered(factorized_model("LlamaForCausalLM"), exporters), exporters, tmp_path, folder)


def test_an_exporter_that_nothing_proves_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Point:
        def __init__(self, exporter: type[Exporter]) -> None:
            self.name, self.exporter = exporter.name, exporter

        def load(self) -> type[Exporter]:
            return self.exporter

    class Own(OnnxExporter):
        name = "own"

    def entry_points(group: str) -> list[Point]:
        assert group == "lrserve.exporters"
        return [Point(exporter) for exporter in found]

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    found: list[type[Exporter]] = [ForeignProving, Own]
    assert [type(exporter) for exporter in load_exporters(["own", "foreign"], EngineSettings())] == [Own, ForeignProving]
    found = [Foreign]
    with pytest.raises(InputError, match="exporter 'foreign' is of another package and has no method transcribe") as refused:
        load_exporters(["foreign"], EngineSettings())
    assert "\n" not in str(refused.value)
    with pytest.raises(InputError, match="no exporter named 'else'"):
        load_exporters(["else"], EngineSettings())
    assert prove.loader_of(Own(), Recipe(model="any").engine).name == "onnxruntime"
