"""The transformers quantizer: tiny random artifacts load to exactly the model they were written from."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import (
    FACTORED,
    FAMILIES_TESTED,
    VOCABULARY,
    WITH_EXPERTS,
    apart_specs,
    dense_model,
    factorized_model,
    groups_in,
    write_artifact,
)
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import lrserve
from exporters.vllm import VllmExporter, low_rank_groups
from lrserve.compression.groups import FAMILIES, Structure, find_groups
from lrserve.compression.layers import FirstFactor, IdentityBlock, LowRankLinear
from lrserve.compression.level import Level
from lrserve.compression.lowrank import install_low_rank
from lrserve.compression.spec import NEEDS_LRSERVE, WEIGHTS_ENTRY, specs_of
from lrserve.errors import ArtifactError
from lrserve.inputs.source import Source

INPUTS = torch.randint(3, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(0))


def logits_of(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=INPUTS).logits


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def rewrite(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return write_artifact(factorized_model("LlamaForCausalLM"), tmp_path / "model")


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("architecture", FAMILIES_TESTED)
def test_loaded_model_computes_what_the_written_one_did(architecture: str, apart: bool, tmp_path: Path) -> None:
    model = factorized_model(architecture, apart=apart)
    folder = write_artifact(model, tmp_path / "model")
    loaded = Source(name="model", path=folder).load(torch.float32)
    assert torch.equal(logits_of(loaded), logits_of(model))
    assert low_rank_groups(loaded) == low_rank_groups(model)
    specs = low_rank_groups(loaded)
    mixtures = [name for name, spec in specs.items() if spec.structure == "experts"]
    assert len(mixtures) == (architecture in WITH_EXPERTS)  # in the first layer
    specs = {name: spec for name, spec in specs.items() if name not in mixtures}
    structures = [spec.structure for spec in specs.values()]
    groups = groups_in(architecture)
    alone = apart_specs(1, architecture) if apart else {}
    if alone:
        down = [f"{FAMILIES[architecture].layers}.1.{groups['down'].fused}"] if "down" in groups else []
        assert list(specs)[len(groups) :] == [*alone, *down]
        assert specs.items() >= alone.items()
    else:  # all of the first layer, two of the second
        assert structures == ["identity_block"] * len(groups) + ["low_rank"] * len(groups.keys() & {"qkv", "down"})


@pytest.mark.parametrize("architecture", FAMILIES_TESTED)
def test_saving_a_loaded_model_writes_the_same_artifact(architecture: str, tmp_path: Path) -> None:
    folder = write_artifact(factorized_model(architecture), tmp_path / "model")
    again = tmp_path / "again"
    Source(name="model", path=folder).load(torch.float32).save_pretrained(again)
    written = json.loads((folder / "config.json").read_text())
    assert written.pop(WEIGHTS_ENTRY) == NEEDS_LRSERVE  # of artifacts alone: transformers never writes that entry
    assert json.loads((again / "config.json").read_text()) == written
    first, second = tensors_of(folder), tensors_of(again)
    assert first.keys() == second.keys()
    assert all(tensor.dtype == second[name].dtype and torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize("structure", FACTORED)
def test_tensors_are_those_of_the_format(structure: Structure, tmp_path: Path) -> None:
    folder = write_artifact(factorized_model("LlamaForCausalLM", structure=structure), tmp_path / "model")
    attention = "model.layers.0.self_attn."
    found = {name.removeprefix(attention): tensor for name, tensor in tensors_of(folder).items() if attention in name}
    block = structure == "identity_block"
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == {
        "qkv_proj.A.weight": (16, 48 if block else 64),
        **{f"{member}_proj.B.weight": (m, 16) for member, m in (("q", 128), ("k", 64), ("v", 64))},
        **{f"{member}_proj.B.bias": (m,) for member, m in (("q", 128), ("k", 64), ("v", 64))},
        "o_proj.A.weight": (24, 104 if block else 128),
        "o_proj.B.weight": (64, 24),
        "o_proj.B.bias": (64,),
        **({"qkv_proj.A.order": (64,), "o_proj.A.order": (128,)} if block else {}),
    }
    assert {tensor.dtype for name, tensor in found.items() if name.endswith("order")} == ({torch.int32} if block else set())


def test_base_model_loads_from_a_causal_lm_artifact(artifact: Path) -> None:
    causal = AutoModelForCausalLM.from_pretrained(artifact, dtype=torch.float32)
    base = AutoModel.from_pretrained(artifact, dtype=torch.float32)
    assert isinstance(base.layers[0].self_attn.q_proj, LowRankLinear)
    assert isinstance(base.layers[0].self_attn.qkv_proj, FirstFactor)
    with torch.inference_mode():
        assert torch.equal(base(input_ids=INPUTS).last_hidden_state, causal.model(input_ids=INPUTS).last_hidden_state)


def test_saved_base_model_loads_again(artifact: Path, tmp_path: Path) -> None:
    base = AutoModel.from_pretrained(artifact, dtype=torch.float32)
    base.save_pretrained(tmp_path / "base")
    again = AutoModel.from_pretrained(tmp_path / "base", dtype=torch.float32)
    with torch.inference_mode():
        assert torch.equal(again(input_ids=INPUTS).last_hidden_state, base(input_ids=INPUTS).last_hidden_state)


def test_base_model_is_no_causal_lm(artifact: Path, tmp_path: Path) -> None:
    AutoModel.from_pretrained(artifact).save_pretrained(tmp_path / "base")
    with pytest.raises(ArtifactError, match="missing from the checkpoint: lm_head.weight"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "base")


@pytest.mark.parametrize("loader", [AutoModelForCausalLM, AutoModel])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_argument_wins_over_the_checkpoint(artifact: Path, loader: Any, dtype: torch.dtype) -> None:
    model = loader.from_pretrained(artifact, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    orders = [module.order for module in model.modules() if isinstance(module, IdentityBlock) and module.order is not None]
    assert {order.dtype for order in orders} == {torch.int32}


def test_dtype_auto_is_the_artifact_dtype(tmp_path: Path) -> None:
    VllmExporter().export(factorized_model("Qwen2ForCausalLM"), tmp_path / "no-source", tmp_path, torch.bfloat16)
    assert {tensor.dtype for name, tensor in tensors_of(tmp_path).items() if not name.endswith(".order")} == {torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.qkv_proj.A.weight",
        "model.layers.0.self_attn.qkv_proj.A.order",
        "model.layers.0.self_attn.o_proj.A.order",
        "model.layers.0.self_attn.k_proj.B.weight",
        "model.layers.1.mlp.down_proj.B.bias",
    ],
)
@pytest.mark.parametrize("loader", [AutoModelForCausalLM, AutoModel])
def test_missing_factor_is_an_error_that_names_it(artifact: Path, loader: Any, name: str) -> None:
    tensors = tensors_of(artifact)
    del tensors[name]
    rewrite(artifact, tensors)
    with pytest.raises(ArtifactError, match=f"missing from the checkpoint: .*{name.removeprefix('model.')}"):
        loader.from_pretrained(artifact)


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.v_proj.B.weight", "model.layers.1.self_attn.o_proj.weight"])
def test_wrong_shape_is_an_error_that_names_the_tensor(artifact: Path, name: str) -> None:
    tensors = tensors_of(artifact)
    tensors[name] = tensors[name][:-1].clone()
    rewrite(artifact, tensors)
    with pytest.raises(ArtifactError, match=rf"{name} is \(\d+, \d+\) in the checkpoint"):
        AutoModelForCausalLM.from_pretrained(artifact)


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (torch.zeros(64, dtype=torch.int32), "is no permutation"),
        (torch.arange(1, 65, dtype=torch.int32), "is no permutation"),
        (torch.arange(-1, 63, dtype=torch.int32), "is no permutation"),
        (torch.arange(64), "is no permutation"),
        (torch.arange(63, dtype=torch.int32), r"is \(63,\) in the checkpoint; config\.json makes it \(64,\)"),
    ],
    ids=["repeated", "too-large", "negative", "int64", "short"],
)
@pytest.mark.parametrize("loader", [AutoModelForCausalLM, AutoModel])
def test_order_that_is_no_permutation_is_refused(artifact: Path, loader: Any, order: torch.Tensor, message: str) -> None:
    name = "model.layers.0.self_attn.qkv_proj.A.order"
    rewrite(artifact, {**tensors_of(artifact), name: order})
    with pytest.raises(ArtifactError, match=rf"{name.removeprefix('model.')} {message}"):
        loader.from_pretrained(artifact)


def test_identity_block_that_leaves_nothing_is_refused(artifact: Path) -> None:
    change_config(artifact, "model.layers.0.mlp.gate_up_proj", {"rank": 64})
    with pytest.raises(ArtifactError, match=r"gate_up_proj: an identity block of rank 64 leaves nothing of 64 inputs"):
        AutoModelForCausalLM.from_pretrained(artifact)


def test_rank_that_does_not_fit_the_factors_is_an_error(artifact: Path) -> None:
    change_config(artifact, "model.layers.0.mlp.gate_up_proj", {"rank": 5})
    with pytest.raises(ArtifactError, match=r"layers\.0\.mlp\.gate_\S+\.weight is .*makes it \(.*\b5\b"):
        AutoModelForCausalLM.from_pretrained(artifact)


def test_unknown_structure_is_refused(artifact: Path) -> None:
    change_config(artifact, "model.layers.0.mlp.gate_up_proj", {"structure": "butterfly"})
    with pytest.raises(ArtifactError, match="unknown structure 'butterfly'"):
        AutoModelForCausalLM.from_pretrained(artifact)


def test_group_that_the_model_does_not_have_is_refused(artifact: Path) -> None:
    config = json.loads((artifact / "config.json").read_text())
    groups = config["quantization_config"]["groups"]
    groups["model.layers.7.mlp.down_proj"] = {"structure": "low_rank", "rank": 8, "members": ["down_proj"]}
    (artifact / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match=r"model\.layers\.7\.mlp\.down_proj: config\.json names a layer"):
        AutoModelForCausalLM.from_pretrained(artifact)


def test_loaded_model_is_trainable(artifact: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(artifact, dtype=torch.float32)
    model(input_ids=INPUTS, labels=INPUTS).loss.backward()
    first = model.model.layers[0].self_attn.qkv_proj.A.weight
    assert first.grad is not None
    assert first.grad.abs().max() > 0


def test_tied_output_layer_is_stored_once(tmp_path: Path) -> None:
    model = factorized_model("Qwen2ForCausalLM")
    folder = write_artifact(model, tmp_path / "model")
    assert "lm_head.weight" not in tensors_of(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_factors_that_are_views_of_one_stacked_matrix_are_written_alone(tmp_path: Path) -> None:
    model = factorized_model("LlamaForCausalLM")
    attention = model.model.layers[0].self_attn
    stacked = torch.randn(4 * 32 + 2 * 2 * 32, attention.q_proj.rank)
    for member, rows in zip((attention.q_proj, attention.k_proj, attention.v_proj), stacked.split([128, 64, 64]), strict=True):
        member.B.weight.data = rows
    folder = write_artifact(model, tmp_path / "model")
    assert torch.equal(tensors_of(folder)["model.layers.0.self_attn.k_proj.B.weight"], stacked[128:192])


def test_dense_model_is_written_as_a_dense_checkpoint(tmp_path: Path) -> None:
    model = dense_model("Qwen3ForCausalLM")
    model.config.quantization_config = {"quant_method": "gguf"}  # as transformers leaves it after reading a GGUF file
    folder = write_artifact(model, tmp_path / "model")
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(folder)), logits_of(model))
    assert model.config.quantization_config == {"quant_method": "gguf"}


def test_half_factorized_group_is_not_exported(tmp_path: Path) -> None:
    model = factorized_model("LlamaForCausalLM")
    model.model.layers[0].self_attn.k_proj = torch.nn.Linear(64, 64, bias=False)
    with pytest.raises(ArtifactError, match=r"layers\.0\.self_attn\.qkv_proj: its linears"):
        write_artifact(model, tmp_path / "model")


def test_group_of_two_structures_is_not_exported(tmp_path: Path) -> None:
    model, other = factorized_model("LlamaForCausalLM"), dense_model("LlamaForCausalLM")
    group = find_groups(other)[0]
    install_low_rank(other, specs_of([(group, Level(model.model.layers[0].self_attn.k_proj.rank))], "low_rank"))
    model.model.layers[0].self_attn.k_proj = other.model.layers[0].self_attn.k_proj
    with pytest.raises(
        ArtifactError, match=r"qkv_proj: .*found self_attn.q_proj identity_block of rank 16, .*k_proj low_rank of rank 16"
    ):
        write_artifact(model, tmp_path / "model")


def test_factors_before_fewer_neurons_are_not_exported(tmp_path: Path) -> None:
    model, other = factorized_model("LlamaForCausalLM", layers=3), factorized_model("LlamaForCausalLM", apart=True)
    model.model.layers[2].mlp.gate_proj = other.model.layers[1].mlp.gate_proj
    with pytest.raises(ArtifactError, match=r"layers\.2\.mlp\.gate_up_proj: has factors, and mlp\.down_proj fewer neurons"):
        write_artifact(model, tmp_path / "model")


def test_tokenizer_files_are_copied_and_code_is_not(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    kept = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja", "vocab.json")
    for name in (*kept, "tokenization_custom.py", "tokenizer.py", "model.safetensors", "README.md"):
        (source / name).write_text(json.dumps({"of the source": name}))
    VllmExporter().export(factorized_model("LlamaForCausalLM"), source, out, torch.float32)
    assert {path.name for path in out.iterdir()} == {*kept, "config.json", "model.safetensors"}
    assert all(json.loads((out / name).read_text()) == {"of the source": name} for name in kept)


@pytest.mark.parametrize("first", ["lrserve", "transformers"])
def test_quantizer_is_registered_whichever_import_comes_first(first: str, artifact: Path) -> None:
    second = "transformers" if first == "lrserve" else "lrserve"
    code = (
        f"import {first}, {second}\n"
        f"from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(artifact)!r})\n"
        f"print(type(model.model.layers[0].self_attn.q_proj).__name__)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "LowRankLinear"


def test_public_names_are_imported_when_they_are_used() -> None:
    code = (
        "import sys, lrserve\n"
        "assert 'lrserve.plugins.transformers' not in sys.modules\n"
        "assert lrserve.LrserveError.__module__ == 'lrserve.errors'\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_api() -> None:
    names = ["LowRankLinear", "LrserveError", "Plan", "Recipe", "__version__", "compress_and_export"]
    assert sorted(lrserve.__all__) == names
    assert set(names) <= set(dir(lrserve))
    assert lrserve.LowRankLinear is LowRankLinear
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        lrserve.nonsense  # noqa: B018


def test_config_alone_round_trips(artifact: Path) -> None:
    stored = json.loads((artifact / "config.json").read_text())["quantization_config"]
    assert AutoConfig.from_pretrained(artifact).quantization_config == stored


def change_config(folder: Path, group: str, change: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["groups"][group].update(change)
    (folder / "config.json").write_text(json.dumps(config))
