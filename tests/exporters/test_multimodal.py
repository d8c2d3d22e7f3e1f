"""Models that read images too: the LLM inside is compressed, everything else stays what it was."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import MULTIMODAL, VOCABULARY, dense_model, factorized_model, with_image, write_dense, write_text

from exporters.onnx import OnnxExporter
from exporters.vllm import VllmExporter, low_rank_groups
from lrserve.compression.repair import outer_norms
from lrserve.errors import ArtifactError, EngineError, InputError, UnsupportedModelError
from lrserve.inputs.config_file import require_known_tokens
from lrserve.inputs.source import Source, open_source
from lrserve.pipeline.inspect import describe, inspect, verify
from lrserve.pipeline.run import compress_and_export
from lrserve.recipe import Recipe
from lrserve.serving.server import check_model
from lrserve.storage.store import write_manifest

PROCESSOR = {"image_processor_type": "Gemma3ImageProcessor", "size": {"height": 28, "width": 28}, "image_mean": [0.5, 0.5, 0.5]}
OF_LLM = {
    "Gemma3ForConditionalGeneration": "language_model.",
    "Mistral3ForConditionalGeneration": "language_model.",
    "Qwen2_5_VLForConditionalGeneration": ("model.", "lm_head."),
}
"""How the names of the LLM's tensors begin in a checkpoint."""


@torch.inference_mode()
def logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    found: torch.Tensor = model(**inputs).logits
    return found


@pytest.fixture(params=MULTIMODAL)
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def dense_folder(architecture: str, place: Path) -> Path:
    folder = write_dense(dense_model(architecture), place)
    for name in ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"):
        (folder / name).write_text(json.dumps(PROCESSOR))
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    return folder


def exported(architecture: str, place: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Path, Path]:
    """The compressed model, the folder of the dense one and the artifact's."""
    model, dense, out = factorized_model(architecture), dense_folder(architecture, place / "dense"), place / "out"
    out.mkdir()
    VllmExporter().export(model, dense, out, dtype)
    write_manifest(out, {"lrserve": "0"}, {})
    return model, dense, out


def test_what_is_not_the_llm_is_the_same_in_the_artifact(architecture: str, tmp_path: Path) -> None:
    _, dense, out = exported(architecture, tmp_path)
    before, after = (load_file(folder / "model.safetensors") for folder in (dense, out))
    others = {name for name in before if not name.startswith(OF_LLM[architecture])}
    assert others == {name for name in after if not name.startswith(OF_LLM[architecture])}
    assert len(others) > 20
    assert all(torch.equal(before[name], after[name]) for name in others)
    for name in ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (dense / name).read_bytes()
    configs = [json.loads((folder / "config.json").read_text()) for folder in (dense, out)]
    assert configs[0]["architectures"] == configs[1]["architectures"] == [architecture]
    assert configs[0]["vision_config"] == configs[1]["vision_config"]
    assert configs[0]["text_config"] == configs[1]["text_config"]


def test_an_image_gives_what_the_model_in_memory_gives(architecture: str, tmp_path: Path) -> None:
    model, dense, out = exported(architecture, tmp_path)
    loaded = Source(name="model", path=out).load(torch.float32)
    assert type(loaded).__name__ == architecture
    first, second = with_image(architecture, seed=0), with_image(architecture, seed=1)
    assert torch.equal(logits(loaded, first), logits(model, first))
    assert (logits(loaded, first) - logits(loaded, second))[:, -1].abs().max() > 1e-2  # it is seen
    how = {name: value for name, value in first.items() if name in ("pixel_values", "image_sizes", "image_grid_thw")}
    seen = [
        torch.cat(tuple(own.model.get_image_features(**how).pooler_output))
        for own in (loaded, Source(name="dense", path=dense).load(torch.float32))
    ]
    assert torch.equal(*seen)


def test_the_artifact_is_verified_and_counted(architecture: str, tmp_path: Path) -> None:
    model, _, out = exported(architecture, tmp_path, torch.bfloat16)
    assert {name.rpartition(".layers.")[0] for name in low_rank_groups(model)} == {"model.language_model"}
    assert "of its 6 compressed groups have the right shapes and dtypes" in verify(out)
    stored = load_file(out / "model.safetensors")
    assert {tensor.dtype for name, tensor in stored.items() if not name.endswith(".order")} == {torch.bfloat16}
    found = describe(str(out))
    beside = sum(tensor.numel() for name, tensor in stored.items() if not name.startswith(OF_LLM[architecture]))
    assert found["image_parameters"] == beside
    assert f"beside the LLM, to read images: {beside / 1e6:.1f} M parameters, which stay dense" in inspect(str(out))
    parameters = sum(tensor.numel() for name, tensor in stored.items() if not name.endswith(".order"))
    assert found["sizes"]["model_parameters"]["compressed"] == parameters
    (out / "preprocessor_config.json").write_text(json.dumps({**PROCESSOR, "auto_map": {"AutoImageProcessor": "code.Mine"}}))
    write_manifest(out, {"lrserve": "0"}, {})
    with pytest.raises(ArtifactError, match="preprocessor_config.json has an auto_map"):
        verify(out)


def test_recovery_trains_no_norm_of_the_tower(architecture: str) -> None:
    assert list(outer_norms(dense_model(architecture))) == ["model.language_model.norm"]


def test_a_processor_that_names_code_is_copied_without_it(tmp_path: Path) -> None:
    dense, out = dense_folder(MULTIMODAL[0], tmp_path / "dense"), tmp_path / "out"
    (dense / "preprocessor_config.json").write_text(json.dumps({**PROCESSOR, "auto_map": {"AutoImageProcessor": "code.Mine"}}))
    out.mkdir()
    VllmExporter().export(factorized_model(MULTIMODAL[0]), dense, out, torch.float32)
    assert json.loads((out / "preprocessor_config.json").read_text()) == PROCESSOR


def test_a_missing_tensor_of_the_tower_is_named(architecture: str, tmp_path: Path) -> None:
    _, dense, out = exported(architecture, tmp_path)
    name = next(name for name in load_file(out / "model.safetensors") if not name.startswith(OF_LLM[architecture]))
    for folder in (dense, out):
        tensors = load_file(folder / "model.safetensors")
        del tensors[name]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=f"lack 1 tensor \\(first '?{name}"):
        open_source(str(dense))
    (out / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match=f"missing from the checkpoint: {name}"):
        Source(name="model", path=out).load(torch.float32)


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [("num_hidden_layers", 10**9, "num_hidden_layers must be a whole number"), ("vocab_size", 0, "vocab_size must be a whole")],
)
def test_the_llms_entries_of_the_config_are_checked(
    entry: str, value: int, message: str, architecture: str, tmp_path: Path
) -> None:
    path = dense_folder(architecture, tmp_path / "dense") / "config.json"
    content = json.loads(path.read_text())
    content["text_config"][entry] = value
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=message):
        open_source(str(path.parent))


def test_a_flat_config_as_qwens_checkpoints_have_is_read(tmp_path: Path) -> None:
    folder = dense_folder("Qwen2_5_VLForConditionalGeneration", tmp_path / "dense")
    content = json.loads((folder / "config.json").read_text())
    inside = content.pop("text_config")
    inside.pop("model_type")
    (folder / "config.json").write_text(json.dumps({**inside, **content}))
    inputs, source = with_image("Qwen2_5_VLForConditionalGeneration", seed=0), open_source(str(folder))
    assert torch.equal(
        logits(source.load(torch.float32), inputs), logits(dense_model("Qwen2_5_VLForConditionalGeneration"), inputs)
    )
    (folder / "config.json").write_text(json.dumps({**inside, **content, "num_hidden_layers": 10**9}))
    with pytest.raises(InputError, match="num_hidden_layers must be a whole number"):
        open_source(str(folder))


def test_tokens_are_held_against_the_llms_embedding(architecture: str, tmp_path: Path) -> None:
    folder = dense_folder(architecture, tmp_path / "dense")
    require_known_tokens(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, VOCABULARY]}))
    with pytest.raises(InputError, match=r"eos_token_id must be among the 256 tokens of the embedding"):
        require_known_tokens(folder)


def test_onnx_is_refused_by_name(architecture: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"text alone, and {architecture} reads images too.*--export vllm"):
        OnnxExporter().preflight(dense_model(architecture))


def test_vllm_without_torchvision_is_refused_at_the_start(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = dense_folder(architecture, tmp_path / "dense")
    monkeypatch.setitem(sys.modules, "torchvision", None)
    for check in (lambda: VllmExporter().preflight(Source(name="model", path=folder).skeleton()), lambda: check_model(folder)):
        with pytest.raises(EngineError, match=f"vLLM loads {architecture} only where torchvision is installed.*pip install"):
            check()


def test_onnx_is_refused_before_any_work(tmp_path: Path) -> None:
    dense = dense_folder(MULTIMODAL[0], tmp_path / "model")
    write_text(tmp_path / "text.jsonl", 50)
    inputs = {"model": str(dense), "text": {"calibration": str(tmp_path / "text.jsonl")}, "engine": {"runtime": "onnx"}}
    with pytest.raises(UnsupportedModelError, match=f"{MULTIMODAL[0]} reads images too.*for vLLM only"):
        compress_and_export(Recipe.model_validate(inputs), tmp_path / "out", say=lambda line: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "text.jsonl"]
