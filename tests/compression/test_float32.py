"""Models that are held in the dtype in which they are stored, and compute in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import FAMILIES_TESTED, RENDERED, Rounding, dense_model, rounded_model, write_dense

from exporters.onnx import FOLDER, LAST_FILE, MODEL_FILE, OnnxExporter
from exporters.vllm import VllmExporter
from lrserve.compression.assemble import round_parameters
from lrserve.compression.embedding import round_embedding
from lrserve.compression.float32 import in_float32
from lrserve.compression.groups import family_of
from lrserve.compression.layers import exact_names
from lrserve.inputs.source import Source

TOKENS = torch.arange(3, 35)[None]


@pytest.fixture(params=FAMILIES_TESTED)
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Source:
    """A dense model that is stored in bfloat16."""
    write_dense(dense_model(request.param).bfloat16(), tmp_path / "model")
    return Source(name="model", path=tmp_path / "model")


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=TOKENS).logits
    return found


@pytest.mark.parametrize("at_once", [True, False])
def test_it_computes_what_the_model_that_was_loaded_in_float32_does(source: Source, at_once: bool) -> None:
    model = source.load(None)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    before = logits(model)
    with in_float32(model, at_once=at_once):
        held = {parameter.dtype for parameter in model.get_submodule(family_of(model.config).layers).parameters()}
        assert held == {torch.float32 if at_once else torch.bfloat16}
        assert torch.equal(logits(model), logits(source.load(torch.float32)))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("at_once", [True, False])
def test_a_model_comes_back_when_what_it_computed_failed(at_once: bool) -> None:
    model = dense_model("LlamaForCausalLM").bfloat16()

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    handle = model.model.layers[1].mlp.register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError), in_float32(model, at_once=at_once):
        logits(model)
    handle.remove()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("weights", ["int8", "int4_g32"])
def test_rounded_weights_stand_for_the_same_numbers(weights: Any, at_once: bool) -> None:
    model = round_parameters(rounded_model("LlamaForCausalLM", Rounding(weights, "narrow", 4)), torch.bfloat16)
    expected, exact = logits(model), exact_names(model)
    for name, parameter in model.named_parameters():
        if name not in exact:
            parameter.data = parameter.data.bfloat16()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with in_float32(model, at_once=at_once):
        assert torch.equal(logits(model), expected)
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name]), name


def test_a_rounded_embedding_keeps_its_scale(tmp_path: Path) -> None:
    write_dense(dense_model("Gemma3ForCausalLM").bfloat16(), tmp_path / "model")
    source = Source(name="model", path=tmp_path / "model")
    wide, held = source.load(torch.float32), source.load(None)
    for model in (wide, held):
        for module in model.modules():  # one that bfloat16 has not
            if hasattr(module, "scalar_embed_scale"):
                module.embed_scale = torch.tensor(33.941127)
        round_embedding(model, "int8", torch.bfloat16)
    with in_float32(held):
        assert torch.equal(logits(held), logits(wide))


@pytest.mark.parametrize("source", RENDERED, indirect=True)
def test_both_give_the_same_graph_byte_for_byte(source: Source, tmp_path: Path) -> None:
    for name, dtype in (("held", None), ("wide", torch.float32)):
        OnnxExporter().export(source.load(dtype), source.path, tmp_path / name, torch.bfloat16)
    for file in (MODEL_FILE, f"{MODEL_FILE}_data", LAST_FILE):
        held, wide = (tmp_path / name / FOLDER / file for name in ("held", "wide"))
        assert held.read_bytes() == wide.read_bytes()


def test_both_give_the_same_checkpoint_byte_for_byte(source: Source, tmp_path: Path) -> None:
    for name, dtype in (("held", None), ("wide", torch.float32)):
        (tmp_path / name).mkdir()
        VllmExporter().export(source.load(dtype), source.path, tmp_path / name, torch.bfloat16)
    files = sorted(path.name for path in (tmp_path / "held").iterdir())
    assert "model.safetensors" in files
    assert files == sorted(path.name for path in (tmp_path / "wide").iterdir())
    for file in files:
        assert (tmp_path / "held" / file).read_bytes() == (tmp_path / "wide" / file).read_bytes(), file
