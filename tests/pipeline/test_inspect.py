"""What inspect and verify say about artifacts of both structures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import dense_model, factorized_model, write_artifact, write_dense
from transformers import AutoConfig, AutoModelForCausalLM

from lrserve.errors import ArtifactError
from lrserve.pipeline.inspect import describe, inspect, verify
from lrserve.storage.store import write_manifest

QKV = "model.layers.0.self_attn.qkv_proj"


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    folder = write_artifact(factorized_model("LlamaForCausalLM"), tmp_path / "model")
    write_manifest(folder, {"lrserve": "0"}, {})
    return folder


def rewrite(folder: Path, **changes: torch.Tensor | None) -> None:
    """Change tensors and let the manifest agree with them."""
    tensors = {**load_file(folder / "model.safetensors"), **changes}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    write_manifest(folder, {"lrserve": "0"}, {})


def test_inspect_tells_structures_and_counts_what_is_stored(artifact: Path) -> None:
    text = inspect(str(artifact))
    rows = {row.split("|")[1].strip(): [cell.strip() for cell in row.split("|")[2:-1]] for row in text.splitlines() if "|" in row}
    assert rows["group"] == ["layers", "outputs x inputs", "compressed", "structure", "ranks", "weights", "residuals", "parameters"]
    assert rows["qkv"][2:5] == ["2", "identity_block, low_rank", "16 to 20"]
    assert rows["o"][2:5] == ["1", "identity_block", "24 to 24"]
    stored = sum(t.numel() for name, t in load_file(artifact / "model.safetensors").items() if not name.endswith(".A.order"))
    assert rows["model parameters"][1] == f"{stored:,}"


def test_verify_passes_both_structures(artifact: Path) -> None:
    assert "of its 6 compressed groups have the right shapes and dtypes" in verify(artifact)


def test_linears_apart_from_their_group_are_told_and_verified(tmp_path: Path) -> None:
    folder = write_artifact(factorized_model("LlamaForCausalLM", apart=True), tmp_path / "model")
    write_manifest(folder, {"lrserve": "0"}, {})
    text = inspect(str(folder))
    rows = {row.split("|")[1].strip(): [cell.strip() for cell in row.split("|")[2:-1]] for row in text.splitlines() if "|" in row}
    assert rows["qkv"][2:5] == ["1", "identity_block", "16 to 16"]
    assert [rows[kind][2:5] for kind in ("q", "k", "v", "up")] == [
        ["1", "low_rank", "24 to 24"],
        ["0", "-", "-"],
        ["1", "identity_block", "16 to 16"],
        ["0", "-", "-"],
    ]
    stored = sum(t.numel() for name, t in load_file(folder / "model.safetensors").items() if not name.endswith(".A.order"))
    assert rows["model parameters"][1] == f"{stored:,}"
    assert "of its 8 compressed groups have the right shapes and dtypes" in verify(folder)
    rewrite(folder, **{"model.layers.1.self_attn.v_proj.A.order": None})
    with pytest.raises(ArtifactError, match=r"missing from the checkpoint: \S+v_proj.A.order"):
        verify(folder)


def test_verify_names_a_half_of_an_mlp_that_has_other_neurons(tmp_path: Path) -> None:
    folder = write_artifact(factorized_model("LlamaForCausalLM", structure="narrow"), tmp_path / "model")
    write_manifest(folder, {"lrserve": "0"}, {})
    assert "of its 7 compressed groups have the right shapes and dtypes" in verify(folder)
    rewrite(folder, **{"model.layers.0.mlp.up_proj.weight": torch.zeros(39, 64)})
    with pytest.raises(ArtifactError, match=r"mlp.up_proj.weight is \(39, 64\) in the checkpoint; config.json makes it \(40, 64\)"):
        verify(folder)
    rewrite(folder, **{"model.layers.0.mlp.up_proj.weight": None})
    with pytest.raises(ArtifactError, match=r"missing from the checkpoint: \S+mlp.up_proj.weight"):
        verify(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{QKV}.A.order": torch.zeros(64, dtype=torch.int32)}, f"{QKV}.A.order is no permutation of the layer's inputs"),
        ({f"{QKV}.A.order": torch.arange(64)}, f"{QKV}.A.order is no permutation of the layer's inputs in int32"),
        (
            {f"{QKV}.A.order": torch.arange(63, dtype=torch.int32)},
            rf"{QKV}.A.order is \(63,\) in the checkpoint",
        ),
        ({f"{QKV}.A.order": None}, f"missing from the checkpoint: {QKV}.A.order"),
        (
            {f"{QKV}.A.weight": torch.zeros(16, 64)},
            rf"{QKV}.A.weight is \(16, 64\) in the checkpoint",
        ),
        (
            {"model.layers.1.mlp.down_proj.A.order": torch.arange(96, dtype=torch.int32)},
            r"not in the model that config.json describes: \S+down_proj.A.order",
        ),
    ],
)
def test_verify_names_what_is_wrong_with_an_order(artifact: Path, change: dict[str, torch.Tensor | None], message: str) -> None:
    rewrite(artifact, **change)
    with pytest.raises(ArtifactError, match=message):
        verify(artifact)


@pytest.mark.parametrize(("architecture", "inner"), [("MixtralForCausalLM", 96), ("Qwen3MoeForCausalLM", 32)])
def test_experts_are_counted(architecture: str, inner: int, tmp_path: Path) -> None:
    model = dense_model(architecture)
    found = describe(str(write_dense(model, tmp_path / "model")))
    assert list(found["groups"]) == ["qkv", "o", "experts"]
    width, expert = 64, 3 * 64 * inner
    counts = {"layers": 2, "experts": 4, "active": 2, "kept": [4, 4], "neurons": [inner, inner], "parameters": 2 * 4 * expert}
    assert found["experts"] == counts
    attention = sum(group["parameters"] for kind, group in found["groups"].items() if kind != "experts")
    active = 2 * (2 * expert + 4 * width)
    assert found["sizes"]["flops_per_token"]["dense"] == 2 * (attention + active + 256 * width)
    assert found["sizes"]["model_parameters"]["dense"] == sum(parameter.numel() for parameter in model.parameters())
    assert "in 2 layers, of 4 experts with 2 for a token: they keep 4 of" in inspect(str(tmp_path / "model"))

    folder = write_artifact(factorized_model(architecture, layers=3), tmp_path / "artifact")
    stored = describe(str(folder))
    kept = (3 * inner + 4 * inner + 4 * inner // 2) * 3 * width
    assert stored["experts"] == {**counts, "layers": 3, "kept": [3, 4], "neurons": [inner // 2, inner], "parameters": kept}
    weights = load_file(folder / "model.safetensors")
    assert stored["sizes"]["bytes"]["compressed"] == sum(tensor.nbytes for tensor in weights.values())
    attention = sum(group["parameters"] for kind, group in stored["groups"].items() if kind != "experts")
    added = sum(tensor.numel() for name, tensor in weights.items() if name.endswith(".bias"))
    active = 2 * (2 * expert + expert // 2) + 3 * 4 * width
    assert stored["sizes"]["flops_per_token"]["compressed"] == 2 * (attention - added + active + 256 * width)
    assert describe(str(write_artifact(factorized_model("LlamaForCausalLM"), tmp_path / "llama")))["experts"] is None


def unknown(folder: Path, kind: str, **entries: object) -> Path:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128, "max_position_embeddings": 64}
    config = AutoConfig.for_model(kind, **{**sizes, **entries})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def test_an_unknown_architecture_that_is_like_a_known_one(tmp_path: Path) -> None:
    folder = unknown(tmp_path / "model", "stablelm", intermediate_size=96, num_key_value_heads=2)
    found = describe(str(folder))
    assert not found["supported"]
    assert (found["decoder"], found["layers"], found["alike"]) == ("model.layers", 2, "LlamaForCausalLM")
    assert [(group["kind"], group["outputs"], group["inputs"]) for group in found["groups"]] == [
        ("qkv", 128, 64),
        ("o", 64, 64),
        ("gate_up", 192, 64),
        ("down", 64, 96),
    ]
    text = inspect(str(folder))
    assert (
        "an entry for StableLmForCausalLM in FAMILIES (lrserve/compression/groups.py): it may be that of LlamaForCausalLM" in text
    )
    assert "mlp.gate_proj, mlp.up_proj" in text


def test_an_unknown_architecture_with_names_of_its_own(tmp_path: Path) -> None:
    folder = unknown(tmp_path / "model", "opt", ffn_dim=96, word_embed_proj_dim=64)
    found = describe(str(folder))
    assert [group["members"] for group in found["groups"]] == [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["self_attn.out_proj"],
        ["fc1"],
        ["fc2"],
    ]
    assert found["alike"] is None
    text = inspect(str(folder))
    assert "with layers='model.decoder.layers'; it says which of self_attn.out_proj; fc1; fc2 is o, gate_up, down, if any" in text


def test_an_unknown_architecture_with_experts(tmp_path: Path) -> None:
    text = inspect(str(unknown(tmp_path / "model", "olmoe", intermediate_size=32, num_experts=4, num_experts_per_tok=2)))
    assert "no linear layers, and would stay as they are: mlp.gate.weight (4, 64), mlp.experts.gate_up_proj (4, 64, 64)" in text


def test_an_unknown_architecture_without_linear_layers(tmp_path: Path) -> None:
    text = inspect(str(unknown(tmp_path / "model", "gpt2")))
    assert "its decoder layers must be made of torch.nn.Linear; there is nothing here that lrserve could compress" in text
    assert "attn.c_attn.weight (64, 192)" in text


def test_inputs_are_not_guessed_where_a_layer_is_not_called(tmp_path: Path) -> None:
    found = describe(str(unknown(tmp_path / "model", "mamba")))
    assert found["shared_inputs_unknown"]
    assert [len(group["members"]) for group in found["groups"]] == [1, 1, 1, 1]
