"""LoRA and full fine-tuning of a loaded artifact by the tools that users have: PEFT and transformers' Trainer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from tiny import VOCABULARY, dense_model, factorized_model, write_artifact
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import lrserve  # noqa: F401 - registers the quantizer
from lrserve.compression.dense_weight import DenseWeight
from lrserve.compression.layers import LowRankLinear

INPUTS = torch.randint(3, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """Every structure, shared and own first factors, ordered and gathering identity blocks."""
    return write_artifact(factorized_model("LlamaForCausalLM", layers=3, apart=True), tmp_path / "model")


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def logits_of(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(input_ids=INPUTS).logits


def adapted(model: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(r=4, task_type="CAUSAL_LM", **options))


def train(model: Any, steps: int = 20) -> list[float]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=INPUTS, labels=INPUTS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def linears_of(model: Any) -> set[str]:
    return {name for name, module in model.model.named_modules(prefix="model") if isinstance(module, torch.nn.Linear)}


def test_all_linear_names_what_it_names_in_the_dense_model(artifact: Path) -> None:
    assert linears_of(load(artifact)) == linears_of(dense_model("LlamaForCausalLM", layers=3))
    model = adapted(load(artifact), target_modules="all-linear")
    names = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert sorted(model.peft_config["default"].target_modules) == names


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
def test_lora_is_trained_saved_and_loaded(targets: Any, artifact: Path, tmp_path: Path) -> None:
    base = logits_of(load(artifact))
    model = adapted(load(artifact), target_modules=targets)
    assert torch.equal(logits_of(model), base)  # B starts at zero
    losses = train(model)
    assert losses[-1] < 0.9 * losses[0]
    expected = logits_of(model)
    model.save_pretrained(tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert stored["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"].shape == (4, 64)
    assert stored["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"].shape == (128, 4)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert torch.equal(logits_of(peft.PeftModel.from_pretrained(load(artifact), tmp_path / "adapter")), expected)
    with model.disable_adapter():
        assert torch.equal(logits_of(model), base)  # only the adapter was trained


def test_adapter_follows_the_factors_dtype(artifact: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(artifact, dtype=torch.bfloat16)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"]), autocast_adapter_dtype=False)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_dense_weight_is_what_the_layer_multiplies_by(artifact: Path) -> None:
    structures = set()
    for layer in load(artifact).modules():
        if isinstance(layer, LowRankLinear):
            with torch.inference_mode():
                columns = layer(torch.eye(layer.in_features)) - layer.bias  # (n, m)
            assert layer.weight.shape == (layer.out_features, layer.in_features)
            torch.testing.assert_close(layer.weight.T, columns, rtol=1e-4, atol=1e-5)
            structures.add((layer.structure, layer.ordered))
    assert structures == {("identity_block", False), ("identity_block", True), ("low_rank", False), ("narrow_in", False)}


def test_dense_weight_costs_nothing_until_it_is_read() -> None:
    def make() -> torch.Tensor:
        raise AssertionError("computed")

    weight = DenseWeight((3, 5), torch.empty(0, dtype=torch.float16, device="meta"), make)
    assert (tuple(weight.shape), weight.dtype, weight.device.type) == ((3, 5), torch.float16, "meta")
    assert "(3, 5)" in repr(weight)
    with pytest.raises(AssertionError, match="computed"):
        weight + 1


WRITES = {
    "data": lambda layer: setattr(layer.weight, "data", torch.zeros(128, 64)),
    "in_place": lambda layer: layer.weight.data.add_(1.0),
    "copy": lambda layer: layer.weight.copy_(torch.zeros(128, 64)),
    "init": lambda layer: torch.nn.init.normal_(layer.weight),
    "out": lambda layer: torch.add(torch.zeros(128, 64), 1.0, out=layer.weight),
}


@pytest.mark.parametrize("write", WRITES)
def test_dense_weight_is_not_written(write: str, artifact: Path) -> None:
    with pytest.raises(TypeError, match="product of its factors and cannot be written"):
        WRITES[write](load(artifact).model.layers[0].self_attn.q_proj)


@pytest.mark.parametrize("safe", [False, True])
def test_merging_an_adapter_is_refused_and_changes_nothing(safe: bool, artifact: Path) -> None:
    model = adapted(load(artifact), target_modules=["q_proj"], init_lora_weights=False)
    expected = logits_of(model)
    with pytest.raises(TypeError, match="load the adapter beside the artifact"):
        model.merge_adapter(safe_merge=safe)
    assert torch.equal(logits_of(model), expected)


def test_adapter_that_starts_by_changing_the_base_is_refused(artifact: Path) -> None:
    with pytest.raises(TypeError, match="PiSSA"):
        adapted(load(artifact), target_modules=["q_proj"], init_lora_weights="pissa")


def test_mlp_with_fewer_neurons_has_a_weight_to_merge_into(artifact: Path) -> None:
    model = adapted(load(artifact), target_modules=r".*\.2\.mlp\.(gate|up|down)_proj", init_lora_weights=False)
    expected = logits_of(model)
    torch.testing.assert_close(logits_of(model.merge_and_unload()), expected, rtol=1e-4, atol=1e-4)


def test_trainer_trains_the_factors_and_saves_an_artifact(artifact: Path, tmp_path: Path) -> None:
    model = load(artifact)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    arguments = TrainingArguments(
        tmp_path / "run", max_steps=5, learning_rate=1e-2, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True
    )
    trainer = Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in INPUTS])
    trainer.train()
    factors = [name for name in before if ".A." in name or ".B." in name]
    assert len(factors) > 20
    assert all(not torch.equal(before[name], model.get_parameter(name)) for name in factors)
    trainer.save_model(tmp_path / "tuned")
    assert torch.equal(logits_of(load(tmp_path / "tuned")), logits_of(model))


CASTS = {
    "float": (lambda model: model.float(), torch.float32),
    "half": (lambda model: model.half(), torch.float16),
    "bfloat16": (lambda model: model.bfloat16(), torch.bfloat16),
    "to": (lambda model: model.to(torch.float64), torch.float64),
}


@pytest.mark.parametrize("cast", CASTS)
def test_loaded_model_is_cast_like_a_dense_one(cast: str, artifact: Path) -> None:
    convert, dtype = CASTS[cast]
    model = convert(AutoModelForCausalLM.from_pretrained(artifact, dtype=torch.bfloat16))
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert {buffer.dtype for name, buffer in model.named_buffers() if name.endswith(".order")} == {torch.int32}
    assert torch.isfinite(logits_of(model)).all()
