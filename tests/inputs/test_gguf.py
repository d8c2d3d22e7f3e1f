"""GGUF files become the models that they describe: every weight, the config, and how texts begin and end."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from tiny import dense_model
from tiny_gguf import ARCHITECTURES, gguf_metadata, gguf_tensors, storable_model, write_gguf, write_parts
from transformers import GenerationConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from exporters.companions import copy_companions
from lrserve.errors import InputError
from lrserve.inputs.gguf import convert_gguf
from lrserve.inputs.source import Source, cache_place, open_source
from lrserve.inputs.text import read_documents, token_windows

TEXT = "the 3rd word"


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LRSERVE_CACHE", str(tmp_path / "cache"))


def opened(path: Path) -> Source:
    return open_source(str(path))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_file_becomes_its_model(tmp_path: Path, architecture: str) -> None:
    model = storable_model(architecture)
    source = opened(write_gguf(tmp_path / "tiny.GGUF", model))
    found = source.load(torch.bfloat16)
    assert found.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor.to(torch.bfloat16)), name
    config, wanted = source.config().to_dict(), model.config.to_dict()
    wanted = {key: pytest.approx(value) if isinstance(value, float) else value for key, value in wanted.items()}
    wanted["dtype"] = "bfloat16"
    del wanted["_name_or_path"]
    assert {key: config[key] for key in wanted} == wanted


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_file_computes_what_its_model_does(tmp_path: Path, architecture: str) -> None:
    model = storable_model(architecture)
    ids = torch.arange(3, 40)[None]
    logits = opened(write_gguf(tmp_path / "tiny.gguf", model)).load(torch.float32)(ids).logits
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).float()
    torch.testing.assert_close(logits, model(ids).logits, rtol=1e-4, atol=1e-4)


def test_quantized_weights_are_dequantized(tmp_path: Path) -> None:
    model = dense_model("LlamaForCausalLM")
    found = opened(write_gguf(tmp_path / "tiny.gguf", model, kind=GGMLQuantizationType.Q8_0)).load(torch.float32)
    for name, tensor in model.state_dict().items():
        difference = (found.state_dict()[name] - tensor).abs().max()
        assert difference <= 0.02 * tensor.abs().max(), name


def test_all_parts_of_a_split_file_are_read(tmp_path: Path) -> None:
    model = dense_model("LlamaForCausalLM")
    tensors = list(gguf_tensors(model).items())
    paths = [tmp_path / f"tiny-Q8_0-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    write_parts(paths, [{}, dict(tensors[:7]), dict(tensors[7:])], gguf_metadata(model))
    for path in (paths[0], paths[2]):
        source = opened(path)
        assert source.title == "tiny"
        assert source.path.name.startswith("tiny-Q8_0-")
        found = source.load(torch.bfloat16).state_dict()
        assert all(torch.equal(found[name], tensor.to(torch.bfloat16)) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("keys", "bos", "eos"),
    [
        ({"add_bos_token": True}, True, False),
        ({"add_bos_token": False}, False, False),
        ({"add_bos_token": None}, False, False),
        ({"add_bos_token": None, "pre": "llama-bpe"}, True, False),
        ({"add_bos_token": False, "pre": "llama-bpe"}, False, False),
        ({"add_bos_token": True, "add_eos_token": True}, True, True),
        ({"add_eos_token": True}, False, True),
    ],
)
def test_texts_begin_and_end_as_the_file_says(tmp_path: Path, keys: dict[str, Any], bos: bool, eos: bool) -> None:
    metadata = {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    tokenizer = opened(write_gguf(tmp_path / "tiny.gguf", metadata=metadata)).tokenizer()
    ids = tokenizer(TEXT)["input_ids"]
    assert (ids[0] == 1, ids[-1] == 2) == (bos, eos)
    assert ids[bos : len(ids) - eos] == tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert ids[bos] == 255  # "th", the one merge
    assert tokenizer.decode(ids, skip_special_tokens=True) == TEXT
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False) == "hello"


def test_bos_is_in_every_window_and_travels_with_the_artifact(tmp_path: Path) -> None:
    source = opened(write_gguf(tmp_path / "tiny.gguf", metadata={"tokenizer.ggml.add_bos_token": True}))
    (tmp_path / "text.txt").write_text(f"{TEXT}\n\n" * 40)
    windows = token_windows(source.tokenizer(), read_documents(str(tmp_path / "text.txt")), 16)
    assert (windows[:, 0] == 1).all()
    assert (windows[:, 1:] != 1).all()
    artifact = tmp_path / "artifact"
    artifact.mkdir()
    shutil.copy(source.path / "config.json", artifact)
    copy_companions(source.path, artifact)
    assert Source(name="artifact", path=artifact).tokenizer()(TEXT)["input_ids"] == source.tokenizer()(TEXT)["input_ids"]


@pytest.mark.parametrize(("prefix", "first"), [(None, "▁"), (True, "▁"), (False, "t")])
def test_a_sentencepiece_tokenizer(tmp_path: Path, prefix: bool | None, first: str) -> None:
    pieces = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(253 - 10)], "▁", *"therdwo3", "th"]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": None,
        "tokenizer.ggml.merges": None,
        "tokenizer.ggml.padding_token_id": None,
        "tokenizer.ggml.add_bos_token": None,
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": [float(-index) for index in range(len(pieces))],
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 243, *[1] * 10],
        "tokenizer.ggml.add_space_prefix": prefix,
    }
    tokenizer = opened(write_gguf(tmp_path / "tiny.gguf", metadata=metadata)).tokenizer()
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(TEXT)["input_ids"])
    assert tokens[0] == "<s>"
    assert tokens[1][0] == first
    assert tokenizer.decode(tokenizer(TEXT)["input_ids"], skip_special_tokens=True) == TEXT


def test_a_word_that_is_a_token_needs_no_merges_in_llama_3(tmp_path: Path) -> None:
    tokens = gguf_metadata(dense_model("LlamaForCausalLM"))["tokenizer.ggml.tokens"]
    tokens[254] = "word"
    for split, whole in (("gpt-2", False), ("llama-bpe", True)):
        metadata = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.pre": split}
        tokenizer = opened(write_gguf(tmp_path / f"{split}.gguf", metadata=metadata)).tokenizer()
        assert (tokenizer("word", add_special_tokens=False)["input_ids"] == [254]) == whole


def llama3_divisors(factor: float = 8.0, theta: float = 10_000.0) -> np.ndarray[Any, Any]:
    """As llama.cpp's converter makes them, in its words."""
    divisors = []
    for frequency in 1.0 / theta ** (np.arange(0, 32, 2) / 32):
        wavelength = 2 * math.pi / frequency
        if wavelength < 8192 / 4:
            divisors.append(1.0)
        elif wavelength > 8192 / 1:
            divisors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, dtype=np.float32)


@pytest.mark.parametrize(
    ("keys", "divisors", "wanted"),
    [
        ({}, None, {"rope_type": "default"}),
        ({"type": "none"}, None, {"rope_type": "default"}),
        ({"type": "none", "factor": 4.0}, None, {"rope_type": "default"}),
        ({"type": "linear", "factor": 8.0}, None, {"rope_type": "linear", "factor": 8.0}),
        ({"factor": 8.0}, None, {"rope_type": "linear", "factor": 8.0}),
        (
            {"type": "yarn", "factor": 4.0, "original_context_length": 64},
            None,
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 1 + 0.1 * math.log(4)},
        ),
        (
            {"type": "yarn", "factor": 4.0, "original_context_length": 64, "attn_factor": 0.5, "yarn_beta_fast": 16.0},
            None,
            {"rope_type": "yarn", "beta_fast": 16.0, "attention_factor": 0.5 + 0.05 * math.log(4)},
        ),
        ({}, np.ones(16, dtype=np.float32), {"rope_type": "default"}),
        ({}, llama3_divisors(), {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}),
        ({}, llama3_divisors(32.0), {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}),
    ],
)
def test_rotary_scaling_is_carried_over(
    tmp_path: Path, keys: dict[str, Any], divisors: np.ndarray[Any, Any] | None, wanted: dict[str, Any]
) -> None:
    metadata = {f"llama.rope.scaling.{key}": value for key, value in keys.items()}
    tensors = {} if divisors is None else {"rope_freqs.weight": divisors}
    config = opened(write_gguf(tmp_path / "tiny.gguf", metadata=metadata, tensors=tensors)).config()
    found = config.rope_parameters
    assert {key: found[key] for key in wanted} == pytest.approx(wanted)
    assert found["rope_theta"] == 10_000
    if found["rope_type"] == "llama3":
        frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        np.testing.assert_allclose(frequencies.numpy(), 1 / (10_000 ** (np.arange(0, 32, 2) / 32)) / divisors, rtol=1e-5)


@pytest.mark.parametrize("longer", [4.0, 0.5])
def test_the_scaling_of_phi_3_is_carried_over(tmp_path: Path, longer: float) -> None:
    model = storable_model("Phi3ForCausalLM")
    original = int(256 / longer)
    factor = math.sqrt(1 + math.log(longer) / math.log(original)) if longer > 1 else 1.0
    keys = {"original_context_length": original, "attn_factor": factor}
    long, short = np.linspace(1, 8, 8, dtype=np.float32), np.linspace(1, 2, 8, dtype=np.float32)
    metadata = {f"phi3.rope.scaling.{key}": value for key, value in keys.items()}
    tensors = {"rope_factors_long.weight": long, "rope_factors_short.weight": short}
    config = opened(write_gguf(tmp_path / "tiny.gguf", model, metadata=metadata, tensors=tensors)).config()
    frequencies = 10_000.0 ** -(np.arange(0, 16, 2) / 16)
    for length, divisors in ((8, short), (original + 1, long)):
        found, scale = ROPE_INIT_FUNCTIONS["longrope"](config, torch.device("cpu"), seq_len=length)
        np.testing.assert_allclose(found.numpy(), frequencies / divisors, rtol=1e-5)
        assert scale == pytest.approx(factor)


@pytest.mark.parametrize(
    ("architecture", "metadata", "tensors", "message"),
    [
        ("Olmo2ForCausalLM", {"olmo2.attention.sliding_window": 64}, (), r"olmo2.attention.sliding_window \(64\) would be lost"),
        ("GraniteForCausalLM", {"granite.rope.scaling.finetuned": False}, (), "rope.scaling.finetuned is False"),
        ("GraniteForCausalLM", {"granite.logit_scale": None}, (), "lacks granite.logit_scale"),
        ("Phi3ForCausalLM", {"phi3.rope.scaling.factor": 2.0}, (), "phi3.rope.scaling.type is 'linear'"),
        ("Phi3ForCausalLM", {}, ("long",), "lacks the tensor rope_factors_short.weight"),
        ("Phi3ForCausalLM", {"phi3.rope.scaling.attn_factor": 1.5}, ("long", "short"), r"attn_factor is 1.5, .* the usual 1.0000"),
        ("Starcoder2ForCausalLM", {}, ("long", "short"), "rope_factors_long.weight"),
    ],
)
def test_what_cannot_be_carried_over_is_refused_by_name(
    tmp_path: Path, architecture: str, metadata: dict[str, Any], tensors: tuple[str, ...], message: str
) -> None:
    factors = {f"rope_factors_{name}.weight": np.ones(8, dtype=np.float32) for name in tensors}
    path = write_gguf(tmp_path / "tiny.gguf", storable_model(architecture), metadata=metadata, tensors=factors)
    with pytest.raises(InputError, match=message):
        opened(path)


def test_what_granite_does_not_multiply_by(tmp_path: Path) -> None:
    keys = {"granite.residual_scale": None, "granite.embedding_scale": 0.0, "granite.attention.scale": None}
    config = opened(write_gguf(tmp_path / "tiny.gguf", storable_model("GraniteForCausalLM"), metadata=keys)).config()
    found = config.residual_multiplier, config.embedding_multiplier, config.attention_multiplier, config.logits_scaling
    assert found == pytest.approx((1.0, 1.0, 32**-0.5, 2.0))


def test_special_tokens_of_phi_3_swallow_the_space_behind_them(tmp_path: Path) -> None:
    for name, swallowed in (("tiny", False), ("Phi 3 Mini", False), ("Phi-3 Mini", True)):
        path = write_gguf(tmp_path / f"{name}.gguf", storable_model("Phi3ForCausalLM"), metadata={"general.name": name})
        tokenizer = opened(path).tokenizer()
        end = tokenizer.eos_token
        assert (tokenizer(f"{end} the")["input_ids"] == tokenizer(f"{end}the")["input_ids"]) == swallowed


def test_both_ends_of_a_text_and_of_a_turn_end_generation(tmp_path: Path) -> None:
    source = opened(write_gguf(tmp_path / "tiny.gguf", metadata={"tokenizer.ggml.eot_token_id": 7}))
    assert GenerationConfig.from_pretrained(source.path).eos_token_id == [2, 7]
    assert source.tokenizer().eos_token_id == 2


def test_biases_of_llama_are_converted(tmp_path: Path) -> None:
    model = dense_model("LlamaForCausalLM")
    model.config.attention_bias = True
    biased = type(model)(model.config)
    for parameter in biased.parameters():
        torch.nn.init.normal_(parameter)
    found = opened(write_gguf(tmp_path / "tiny.gguf", biased)).load(torch.bfloat16).state_dict()
    assert all(torch.equal(found[name], tensor.to(torch.bfloat16)) for name, tensor in biased.state_dict().items())


@pytest.mark.parametrize("licence", ["apache-2.0", None])
def test_the_licence_that_a_file_states(tmp_path: Path, licence: str | None) -> None:
    source = opened(write_gguf(tmp_path / "tiny.gguf", metadata={"general.license": licence}))
    assert source.card() == ({"license": licence} if licence else {})


def test_files_beside_it_change_nothing(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True, "bos_token": "<eos>"}))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"extra": 999}))
    assert opened(path).tokenizer()(TEXT)["input_ids"][0] == 255


def test_a_conversion_is_made_once(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    folder = convert_gguf(path, cache_place)
    weights = folder / "model.safetensors"
    made = weights.stat()
    assert convert_gguf(path, cache_place) == folder
    assert weights.stat() == made


@pytest.mark.parametrize("damage", ["older", "stamp of another", "cut", "gone", "beside"])
def test_a_conversion_that_is_not_whole_is_made_again(tmp_path: Path, damage: str) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    folder = convert_gguf(path, cache_place)
    weights, stamp = folder / "model.safetensors", folder / ".conversion"
    content = weights.read_bytes()
    if damage == "older":
        stamp.unlink()
    elif damage == "stamp of another":
        stamp.write_text(stamp.read_text().replace('"version": 3', '"version": 1'))
    elif damage == "cut":
        weights.write_bytes(content[:-10])
    elif damage == "gone":
        (folder / "tokenizer.json").unlink()
    else:
        shutil.copy(weights, folder / "second.safetensors")
    made = weights.stat().st_ino
    assert convert_gguf(path, cache_place) == folder
    assert weights.stat().st_ino != made
    assert weights.read_bytes() == content
    assert not (folder / "second.safetensors").exists()
    assert {"tokenizer.json", ".conversion"} <= {file.name for file in folder.iterdir()}


def test_a_refused_file_leaves_nothing_in_the_cache(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", metadata={"tokenizer.ggml.pre": "of-another-planet"})
    with pytest.raises(InputError, match="of-another-planet"):
        opened(path)
    assert not list((tmp_path / "cache").rglob("*.*"))
