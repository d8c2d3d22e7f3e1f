"""A checkpoint is exactly what its config says, or it is refused by the headers of its files."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from faults.refusing import Fault, refused
from safetensors.torch import load_file, save_file
from tiny import dense_model, write_dense, write_text

from lrserve.compression.groups import family_of
from lrserve.errors import InputError, UnsupportedModelError
from lrserve.inputs.source import open_source

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
Q = "model.layers.0.self_attn.q_proj.weight"


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """Damage that changes the tensors of model.safetensors."""

    def damage(folder: Path) -> None:
        found = load_file(folder / WEIGHTS)
        change(found)
        save_file(found, folder / WEIGHTS, metadata={"format": "pt"})

    return damage


def config(**entries: Any) -> Callable[[Path], None]:
    """Damage that changes config.json; an entry that is None goes."""

    def damage(folder: Path) -> None:
        content = {**json.loads((folder / "config.json").read_text()), **entries}
        kept = {key: value for key, value in content.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(kept))

    return damage


def biased(found: dict[str, torch.Tensor]) -> None:
    for name in [name for name in found if "_proj" in name]:
        found[name.replace("weight", "bias")] = torch.zeros(len(found[name]))


def float8(found: dict[str, torch.Tensor]) -> None:
    for name in [name for name in found if "_proj" in name]:
        found[name] = found[name].to(torch.float8_e4m3fn)
        found[f"{name}_scale"] = torch.ones(len(found[name]), 1)


def gptq(found: dict[str, torch.Tensor]) -> None:
    for name in [name for name in found if "_proj" in name]:
        rows, columns = found.pop(name).shape
        stem = name.removesuffix("weight")
        found |= {f"{stem}qweight": torch.zeros(columns // 8, rows, dtype=torch.int32), f"{stem}scales": torch.ones(1, rows)}


def packed(found: dict[str, torch.Tensor]) -> None:
    for name in [name for name in found if "_proj" in name]:
        found[name] = torch.zeros(found[name].numel() // 2, 1, dtype=torch.uint8)
        found[f"{name}.absmax"] = torch.ones(4)


def scaled(found: dict[str, torch.Tensor]) -> None:
    found[f"{Q}_scale_inv"] = torch.ones(1, 1)


def unprefixed(found: dict[str, torch.Tensor]) -> None:
    for name in [name for name in found if name.startswith("model.")]:
        found[name.removeprefix("model.")] = found.pop(name)


def wrapped(found: dict[str, torch.Tensor]) -> None:
    for name in list(found):
        found[f"module.{name}"] = found.pop(name)


def with_adapter(found: dict[str, torch.Tensor]) -> None:
    found["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"] = torch.zeros(4, 64)


def shards(folder: Path, **changes: str | None) -> None:
    """Split the weights into two shards, and say in the index that they hold what they do, apart from `changes`."""
    found = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(found)
    parts = {FIRST: names[:10], SECOND: names[10:]}
    for file, own in parts.items():
        save_file({name: found[name] for name in own}, folder / file, metadata={"format": "pt"})
    index = {name: file for file, own in parts.items() for name in own}
    for name, file in changes.items():
        index.pop(name, None) if file is None else index.update({name: file})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))


def twice(folder: Path) -> None:
    shards(folder)
    again = load_file(folder / SECOND) | {Q: torch.zeros(128, 64)}
    save_file(again, folder / SECOND)


def without_index(folder: Path) -> None:
    shards(folder)
    (folder / INDEX).unlink()


def beside_shards(folder: Path) -> None:
    shutil.copy(folder / WEIGHTS, folder / "whole")
    shards(folder)
    (folder / "whole").rename(folder / WEIGHTS)


def beside(name: str) -> Callable[[Path], None]:
    return lambda folder: shutil.copy(folder / WEIGHTS, folder / name) and None


def adapter(folder: Path) -> None:
    save_file({"base_model.model.x.lora_A.weight": torch.zeros(4, 64)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/Base-7B", "peft_type": "LORA"}))


def adapter_alone(folder: Path) -> None:
    adapter(folder)
    (folder / WEIGHTS).unlink()
    (folder / "config.json").unlink()


def adapter_with_config(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(b"PK")
    (folder / "adapter_config.json").write_text("{")


def renamed(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / WEIGHTS).rename(folder / name) and None


def cut(size: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / WEIGHTS, size)


def header(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Damage that changes the header of model.safetensors and leaves the data."""

    def damage(folder: Path) -> None:
        content = (folder / WEIGHTS).read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        entries = json.loads(content[8 : 8 + length])
        change(entries)
        raw = json.dumps(entries).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(raw)) + raw + content[8 + length :])

    return damage


def overlapping(entries: dict[str, Any]) -> None:
    first, second = sorted((entry for entry in entries.values() if "shape" in entry), key=lambda own: own["data_offsets"])[:2]
    second["data_offsets"] = [offset - 4 for offset in second["data_offsets"]]
    assert first["data_offsets"][1] > second["data_offsets"][0]


def beyond(entries: dict[str, Any]) -> None:
    last = max((entry for entry in entries.values() if "shape" in entry), key=lambda own: own["data_offsets"])
    last["data_offsets"][1] += 2**40
    last["shape"] = [2**38 + last["shape"][0] * last["shape"][-1]]


def raw_header(raw: bytes, length: int | None = None) -> Callable[[Path], None]:
    return lambda folder: (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw) and None


UNFIT = "the weights do not fit config.json"
QUANTIZED = "give the dense model"
FAULTS = [
    # tensors and config
    Fault("biases", tensors(biased), (UNFIT, "have 14 tensors", "down_proj.bias", "attention_bias or mlp_bias")),
    Fault("fewer layers in the config", config(num_hidden_layers=1), (UNFIT, "have 9 tensors", "model.layers.1.")),
    Fault("more layers in the config", config(num_hidden_layers=3), (UNFIT, "lack 9 tensors", "model.layers.2.")),
    Fault("a tensor is missing", tensors(lambda found: found.pop(Q)), (UNFIT, "lack 1 tensor ", Q)),
    Fault("the embedding is missing", tensors(lambda found: found.pop("model.embed_tokens.weight")), (UNFIT, "embed_tokens")),
    Fault(
        "the output layer is missing", tensors(lambda found: found.pop("lm_head.weight")), ("lm_head.weight", "tie_word_embeddings")
    ),
    Fault("another output layer", config(tie_word_embeddings=True), ("lm_head.weight", "differ", "tie_word_embeddings to false")),
    Fault("a tensor too many", tensors(lambda found: found.update(extra=torch.ones(2))), (UNFIT, "have 1 tensor ", "'extra'")),
    Fault("norms of Qwen3", config(model_type="qwen3", architectures=["Qwen3ForCausalLM"]), (UNFIT, "q_norm")),
    Fault("no prefix", tensors(unprefixed), ("the names lack the prefix 'model.'",)),
    Fault("another prefix", tensors(wrapped), (UNFIT, "lack 21 tensors", "have 21 tensors", "module.")),
    Fault("an adapter in the weights", tensors(with_adapter), (UNFIT, "lora_A")),
    Fault("another shape", tensors(lambda found: found.update({Q: torch.ones(64, 64)})), (Q, "(64, 64)", "(128, 64)", WEIGHTS)),
    Fault("another vocabulary", config(vocab_size=300), ("embed_tokens", "(256, 64)", "(300, 64)")),
    Fault("a tensor of one dimension", tensors(lambda found: found.update({Q: torch.ones(128 * 64)})), (Q, "(8192,)")),
    Fault("a scalar", tensors(lambda found: found.update({Q: torch.tensor(1.0)})), (Q, "()")),
    # quantized
    Fault("float8", tensors(float8), (QUANTIZED, "F8_E4M3")),
    Fault(
        "float8 without scales", tensors(lambda found: found.update({Q: found[Q].to(torch.float8_e5m2)})), (QUANTIZED, Q, "F8_E5M2")
    ),
    Fault("int8", tensors(lambda found: found.update({Q: found[Q].to(torch.int8)})), (QUANTIZED, Q, "I8")),
    Fault("GPTQ", tensors(gptq), (QUANTIZED, "I32")),
    Fault("bitsandbytes", tensors(packed), (QUANTIZED, "U8")),
    Fault("only a scale", tensors(scaled), (QUANTIZED, "scale_inv")),
    Fault(
        "dense after all", config(quantization_config={"quant_method": "bitsandbytes"}), ("weights are dense", "remove that entry")
    ),
    Fault(
        "dense, no method",
        config(quantization_config={"load_in_4bit": True}),
        ("weights are dense", "config.json", "quantization_config"),
    ),
    # several sets of weights
    Fault("an adapter beside", adapter, ("adapter beside the model", "adapter_config.json", "merge it")),
    Fault("weights of an adapter beside", beside("adapter_model.safetensors"), ("adapter_model.safetensors", "move")),
    Fault("consolidated", beside("consolidated.safetensors"), ("besides the model's", "consolidated.safetensors", "move")),
    Fault("an optimizer", beside("optimizer.safetensors"), ("besides the model's", "optimizer.safetensors")),
    Fault("a second model", beside("zz.safetensors"), ("besides the model's", "zz.safetensors")),
    Fault("whole beside shards", beside_shards, ("besides the model's", WEIGHTS)),
    Fault("shards without index", without_index, (FIRST, INDEX, "download the index")),
    Fault("under another name", renamed("weights.safetensors"), ("weights.safetensors", f"call it {WEIGHTS}")),
    Fault("another file in config", config(transformers_weights="a/b.safetensors"), ("transformers_weights", "remove")),
    # index and shards
    Fault("a tensor that its shard lacks", lambda folder: shards(folder, ghost=FIRST), (FIRST, "'ghost'", INDEX)),
    Fault("a tensor in the other shard", lambda folder: shards(folder, **{Q: SECOND}), (FIRST, Q, SECOND)),
    Fault("a tensor that is not in the index", lambda folder: shards(folder, **{Q: None}), (Q, INDEX, "None")),
    Fault("a tensor in two shards", twice, (SECOND, Q, FIRST, "too")),
    Fault("a shard outside", lambda folder: shards(folder, **{Q: f"../{FIRST}"}), ("lacks 1 of 3 shards", "../")),
    # no safetensors
    Fault("an adapter alone", adapter_alone, ("adapter (LoRA) of 'org/Base-7B'", "merge_and_unload", "copy the tokenizer")),
    Fault("an adapter with a config", adapter_with_config, ("adapter (LoRA) of another model", "merge_and_unload")),
    Fault("pickled", renamed("pytorch_model.bin"), ("pytorch_model.bin", "convert", "save_pretrained", "CONVERTED")),
    Fault("pickled shards", renamed("pytorch_model-00001-of-00002.bin"), ("pytorch_model-00001", "save_pretrained")),
    Fault("Meta's own", renamed("consolidated.00.pth"), ("consolidated.00.pth", "Hugging Face layout")),
    Fault("TensorFlow's", renamed("tf_model.h5"), ("tf_model.h5", "Hugging Face layout")),
    # damaged files
    Fault("nothing", cut(0), (WEIGHTS, "download it again")),
    Fault("a cut length", cut(5), (WEIGHTS, "download it again")),
    Fault("a cut header", cut(500), (WEIGHTS, "download it again")),
    Fault("cut data", cut(100_000), (WEIGHTS, "download it again")),
    Fault("a length beyond the file", raw_header(b"{}", 2**60), (WEIGHTS, "download it again")),
    Fault("not JSON", raw_header(b"not JSON at all"), (WEIGHTS, "download it again")),
    Fault("not an object", raw_header(b"[1, 2, 3]"), (WEIGHTS, "download it again")),
    Fault("not UTF-8", raw_header(b'{"\xff\xfe": 1}'), (WEIGHTS, "download it again")),
    Fault("deep", raw_header(b'{"a":' * 100_000), (WEIGHTS, "download it again")),
    Fault("overlapping", header(overlapping), (WEIGHTS, "download it again")),
    Fault("offsets beyond the file", header(beyond), (WEIGHTS, "download it again")),
    Fault("an unknown dtype", header(lambda found: found[Q].update(dtype="F3")), (WEIGHTS, "download it again")),
    Fault("a negative shape", header(lambda found: found[Q].update(shape=[-128, -64])), (WEIGHTS, "download it again")),
    Fault(
        "a pointer", lambda folder: (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\n"), ("git lfs pull",)
    ),
    Fault("a page of the Hub", lambda folder: (folder / WEIGHTS).write_text("<!doctype html><html>" * 9), (WEIGHTS, "download it")),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dense(dense_model("LlamaForCausalLM"), tmp_path_factory.mktemp("good") / "model")


@pytest.fixture
def folder(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "model"))


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_faulty_checkpoint_is_refused(fault: Fault, folder: Path) -> None:
    open_source(str(folder))
    fault.damage(folder)
    refused(fault, "inspect", folder)


def test_compression_refuses_before_any_work(folder: Path, tmp_path: Path) -> None:
    tensors(biased)(folder)
    text = write_text(tmp_path / "text.jsonl", 20)
    refused(FAULTS[0], "compress-and-export", folder, "--calibration", text, "-o", tmp_path / "out", "--dry-run")
    refused(FAULTS[0], "compress-and-export", folder, "--calibration", text, "-o", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"model", "text.jsonl"}


def with_leftovers(found: dict[str, torch.Tensor]) -> None:
    found["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)
    found["model.rotary_emb.inv_freq"] = torch.ones(16)
    found["model.layers.1.attn.masked_bias"] = torch.tensor(-1e9)
    found["model.embeddings.position_ids"] = torch.arange(256)


def tied(found: dict[str, torch.Tensor]) -> None:
    found["lm_head.weight"] = found["model.embed_tokens.weight"].clone()


def training_states(folder: Path) -> None:
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "pytorch_model.bin"):
        (folder / name).write_bytes(b"PK")


def linked(folder: Path) -> None:
    """As the cache of the Hub has it."""
    (folder / WEIGHTS).rename(folder.parent / "blob")
    (folder / WEIGHTS).symlink_to("../blob")


@pytest.mark.parametrize(
    "change",
    [
        tensors(with_leftovers),
        lambda folder: (tensors(tied)(folder), config(tie_word_embeddings=True)(folder)),
        lambda folder: (tensors(lambda found: found.pop("lm_head.weight"))(folder), config(tie_word_embeddings=True)(folder)),
        tensors(lambda found: found.update({Q: found[Q].to(torch.float16), "model.norm.weight": torch.ones(64).double()})),
        shards,
        training_states,
        linked,
        config(quantization_config=None),
    ],
    ids=["leftovers", "tied twice", "tied", "several dtypes", "shards", "training states", "links", "untouched"],
)
def test_what_is_harmless_is_opened(change: Callable[[Path], object], folder: Path) -> None:
    change(folder)
    source = open_source(str(folder))
    loaded = source.load(torch.float32)
    assert torch.isfinite(loaded(torch.arange(3, 9)[None]).logits).all()


def test_a_model_of_another_family_is_refused_for_that(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    stablelm = AutoConfig.for_model(
        "stablelm", hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=64
    )
    other = tmp_path / "stablelm"
    AutoModelForCausalLM.from_config(stablelm).save_pretrained(other)
    with pytest.raises(UnsupportedModelError, match="unsupported architecture: StableLmForCausalLM"):
        open_source(str(other), accept=family_of)


@pytest.mark.parametrize("architecture", ["MixtralForCausalLM", "Qwen3MoeForCausalLM"])
def test_experts_are_compared_one_by_one(architecture: str, tmp_path: Path) -> None:
    """As the Hub has them, where transformers stacks them in one tensor."""
    model = dense_model(architecture)
    folder = write_dense(model, tmp_path / "model")
    own = load_file(folder / WEIGHTS)
    loaded = open_source(str(folder), accept=family_of).load(torch.float32)
    tokens = torch.arange(3, 9)[None]
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    name = next(name for name in own if ".experts.3." in name)
    save_file({key: tensor for key, tensor in own.items() if key != name}, folder / WEIGHTS, metadata={"format": "pt"})
    refused(Fault("", lambda _: None, ("lack 1 tensor", name)), "inspect", folder)


def test_headers_are_enough(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("torch.equal", never)
    open_source(str(folder))
    tensors(lambda found: found.update({Q: torch.ones(64, 64)}))(folder)
    with pytest.raises(InputError, match=r"\(64, 64\)"):
        open_source(str(folder))
