"""What inspect and verify say about artifacts of both structures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import factorized_model, write_artifact

from lrserve.errors import ArtifactError
from lrserve.pipeline.inspect import inspect, verify
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
