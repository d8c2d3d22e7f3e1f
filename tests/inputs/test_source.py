"""Opening models: what is accepted, and what each refusal says."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from tiny import dense_model, factorized_model, write_artifact, write_dense

from lrserve.errors import InputError
from lrserve.inputs.source import Source, model_folder, open_source


def test_a_folder_opens_and_loads_in_the_asked_dtype(tmp_path: Path) -> None:
    source = open_source(str(write_dense(dense_model("LlamaForCausalLM"), tmp_path / "model")))
    assert source.config().architectures == ["LlamaForCausalLM"]
    model = source.load(torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert next(source.skeleton().parameters()).device.type == "meta"
    assert source.tokenizer()("a")["input_ids"]


@pytest.mark.parametrize(("dtype", "device"), [(torch.bfloat16, "cuda"), (torch.float16, "cuda"), (torch.float32, "cpu")])
def test_nothing_is_loaded_in_float32_on_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, device: str
) -> None:
    source = open_source(str(write_dense(dense_model("LlamaForCausalLM"), tmp_path / "model")))
    moved: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.nn.Module, "to", lambda model, device: moved.append(device))
    source.load(dtype)
    assert moved == [device]


def test_the_fingerprint_notices_changed_weights(tmp_path: Path) -> None:
    folder = write_dense(dense_model("LlamaForCausalLM"), tmp_path / "model")
    source = open_source(str(folder))
    before = source.fingerprint()
    assert source.fingerprint() == before
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    stamp = weights.stat()
    weights.write_bytes(bytes(content))
    os.utime(weights, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert source.fingerprint() != before


def test_truncated_weights_are_refused(tmp_path: Path) -> None:
    folder = write_dense(dense_model("LlamaForCausalLM"), tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match="cannot be read"):
        open_source(str(folder))
    with pytest.raises(InputError, match="cannot be loaded"):
        Source(name="model", path=folder).load(torch.float32)


def test_refusals_say_what_and_where(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no model at"):
        open_source(str(tmp_path / "nowhere"))
    (tmp_path / "file.bin").write_bytes(b"x")
    with pytest.raises(InputError, match=r"not a \.gguf"):
        open_source(str(tmp_path / "file.bin"))
    folder = tmp_path / "incomplete"
    folder.mkdir()
    (folder / "weights.dat").write_bytes(b"x")
    with pytest.raises(InputError, match=r"lacks config\.json and \*\.safetensors \(it holds weights\.dat\)"):
        open_source(str(folder))
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + b"\0" * 64)
    with pytest.raises(InputError, match="cannot be read as GGUF"):
        open_source(str(tmp_path / "bad.gguf"))


@pytest.mark.parametrize("name", ["x" * 5000, "~nobody-of-this-name/model", "a\0b", "SmolLM2.gguf"])
def test_names_of_no_model_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="no model at"):
        open_source(name)


def test_a_compressed_model_has_a_folder_too(tmp_path: Path) -> None:
    folder = write_artifact(factorized_model("LlamaForCausalLM"), tmp_path / "artifact")
    assert model_folder(str(folder)) == folder.resolve()
    with pytest.raises(InputError, match="already quantized or compressed"):
        open_source(str(folder))


def test_missing_shards_tensors_and_compressed_models_are_refused(tmp_path: Path) -> None:
    folder = write_dense(dense_model("LlamaForCausalLM"), tmp_path / "model")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(InputError, match="lacks 1 of 1 shards"):
        open_source(str(folder))
    index.unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(InputError, match=r"lack 9 tensors .*first 'model\.layers\.2"):
        open_source(str(folder))
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json"):
        open_source(str(folder))


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct"),
        ("model-IQ4_XS.gguf", "model"),
        ("llama-3.2-1b-BF16.GGUF", "llama-3.2-1b"),
        ("model-Q4_K_M-00001-of-00003.gguf", "model"),
        ("plain.gguf", "plain"),
    ],
)
def test_a_gguf_file_is_called_by_its_models_name(tmp_path: Path, name: str, title: str) -> None:
    (tmp_path / name).touch()
    assert Source(name=str(tmp_path / name), path=tmp_path).title == title


def test_a_model_is_called_by_its_hub_id_or_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "Some-Model"
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert Source(name="org/model-7B", path=folder).title == "org/model-7B"
    assert [Source(name=name, path=folder).title for name in (str(folder), f"{folder}/", ".")] == ["Some-Model"] * 3


@pytest.mark.parametrize(
    ("text", "card"),
    [
        ("---\nlicense: apache-2.0\n---\n# Model\n", {"license": "apache-2.0"}),
        ("# Model\n---\nlicense: no\n---\n", {}),
        ("---\nnever closed: [\n", {}),
        ("---\n- a list\n---\n", {}),
        (None, {}),
    ],
)
def test_the_cards_metadata(tmp_path: Path, text: str | None, card: dict[str, str]) -> None:
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    assert Source(name="model", path=tmp_path).card() == card
