"""A GGUF file is converted completely, or refused: nothing of it is dropped, made up or taken from an earlier conversion."""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faults.refusing import Fault, refusal, refused
from gguf import GGUFReader
from tiny import dense_model
from tiny_gguf import gguf_metadata, gguf_tensors, write_gguf, write_parts

from lrserve.errors import InputError
from lrserve.inputs.gguf_file import read_gguf
from lrserve.inputs.source import model_folder

Q = "blk.1.attn_q.weight"
CUT, DAMAGED = "cut short", "cannot be read as GGUF"
NAME = "tiny.gguf"


def written(name: str = NAME, **changes: Any) -> Callable[[Path], None]:
    """Damage that writes the file anew; see `write_gguf`."""

    def damage(folder: Path) -> None:
        (folder / NAME).unlink()
        write_gguf(folder / name, **changes)

    return damage


def keys(**changes: Any) -> Callable[[Path], None]:
    """Damage of keys of the architecture, with __ for a dot."""
    return written(metadata={f"llama.{key.replace('__', '.')}": value for key, value in changes.items()})


def words(**changes: Any) -> Callable[[Path], None]:
    """Damage of keys of the tokenizer."""
    return written(metadata={f"tokenizer.ggml.{key}": value for key, value in changes.items()})


def another(name: str, shape: tuple[int, ...]) -> Callable[[Path], None]:
    return written(tensors={name: np.ones(shape, dtype=np.float32)})


def cut(place: Callable[[Path], int]) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / NAME, place(folder / NAME))


def in_tensors(path: Path) -> int:
    return int(GGUFReader(path).data_offset) + 5000


def patched(at: int, raw: bytes) -> Callable[[Path], None]:
    """Damage of a few bytes; at -1, of the length of the first tensor's name."""

    def damage(folder: Path) -> None:
        content = bytearray((folder / NAME).read_bytes())
        place = at if at >= 0 else content.index(b"token_embd.weight") - 8
        content[place : place + len(raw)] = raw
        (folder / NAME).write_bytes(content)

    return damage


def entry(at: int, raw: bytes) -> Callable[[Path], None]:
    """Damage of the first tensor's entry: after its name come dimensions, sizes, type and offset."""

    def damage(folder: Path) -> None:
        content = bytearray((folder / NAME).read_bytes())
        place = content.index(b"token_embd.weight") + len("token_embd.weight") + at
        content[place : place + len(raw)] = raw
        (folder / NAME).write_bytes(content)

    return damage


def value(key: str, at: int, raw: bytes) -> Callable[[Path], None]:
    """Damage of a key's value: after the key come its type and itself."""

    def damage(folder: Path) -> None:
        content = bytearray((folder / NAME).read_bytes())
        place = content.index(key.encode()) + len(key) + at
        content[place : place + len(raw)] = raw
        (folder / NAME).write_bytes(content)

    return damage


def parts(folder: Path, change: Callable[[list[dict[str, Any]]], object] = lambda own: None) -> list[Path]:
    """Split the file in two, `tiny.gguf` no longer being there."""
    model = dense_model("LlamaForCausalLM")
    stored = list(gguf_tensors(model).items())
    sets = [dict(stored[:8]), dict(stored[8:])]
    change(sets)
    paths = [folder / f"tiny-0000{number}-of-00002.gguf" for number in (1, 2)]
    write_parts(paths, sets, gguf_metadata(model))
    (folder / NAME).unlink()
    return paths


def first_part_alone(folder: Path) -> None:
    parts(folder)[1].unlink()


def second_part_alone(folder: Path) -> None:
    parts(folder)[0].unlink()


def part_under_another_name(folder: Path) -> None:
    parts(folder)[0].rename(folder / "a.gguf")


def parts_of_two(folder: Path) -> None:
    first, second = parts(folder)
    second.write_bytes(first.read_bytes())


def part_cut(folder: Path) -> None:
    path = parts(folder)[1]
    os.truncate(path, path.stat().st_size - 100)


def part_lacks_tensors(folder: Path) -> None:
    parts(folder, lambda own: own[1].pop("output_norm.weight"))


def part_repeats(folder: Path) -> None:
    parts(folder, lambda own: own[1].update({"token_embd.weight": own[0]["token_embd.weight"]}))


def part_is_another_file(folder: Path) -> None:
    second = parts(folder)[1]
    write_gguf(second)


def part_promises_more(folder: Path) -> None:
    first = parts(folder)[0]
    content = bytearray(first.read_bytes())
    place = content.index(b"split.tensors.count") + len("split.tensors.count") + 4
    content[place : place + 4] = struct.pack("<I", 99)
    first.write_bytes(content)


HUGE = struct.pack("<Q", 2**60)
RUNS_OUT = "it ends inside its header"
FAULTS = [
    # tensors
    Fault("a tensor is missing", written(without=[Q]), ("lacks 1 tensor ", Q, "download")),
    Fault("a norm is missing", written(without=["output_norm.weight"]), ("lacks 1 tensor ", "output_norm.weight")),
    Fault("the embedding is missing", written(without=["token_embd.weight"]), ("lacks the tensor token_embd.weight",)),
    Fault("a layer is missing", keys(block_count=3), ("llama.block_count is 3", "2 layers")),
    Fault("a layer too many", keys(block_count=1), ("llama.block_count is 1", "2 layers")),
    Fault("absurd layers", keys(block_count=4_000_000_000), ("llama.block_count is 4000000000",)),
    Fault("some biases", another("blk.0.attn_q.bias", (128,)), ("holds 1 tensor ", "blk.0.attn_q.bias")),
    Fault("an unknown tensor", another("blk.0.attn_sinks.weight", (4,)), ("holds 1 tensor ", "attn_sinks")),
    Fault("experts", another("blk.0.ffn_gate_exps.weight", (2, 96, 64)), ("holds 1 tensor ", "ffn_gate_exps")),
    Fault("another shape", another(Q, (64, 64)), (Q, "(64, 64)", "(128, 64)")),
    # what the architecture's keys say
    Fault("no architecture of ours", written(metadata={"general.architecture": "mamba"}), ("general.architecture is 'mamba'",)),
    Fault("an adapter", written(metadata={"general.type": "adapter"}), ("no model but 'adapter'", "general.type")),
    Fault("no context", keys(context_length=None), ("lacks llama.context_length",)),
    Fault("no eps", keys(attention__layer_norm_rms_epsilon=None), ("lacks llama.attention.layer_norm_rms_epsilon",)),
    Fault("eps of nothing", keys(attention__layer_norm_rms_epsilon=float("nan")), ("layer_norm_rms_epsilon is nan",)),
    Fault("words for numbers", keys(context_length="much"), ("llama.context_length is 'much'", "not a positive whole number")),
    Fault("heads by layer", keys(attention__head_count_kv=[2, 4]), ("attention.head_count_kv is [2, 4]",)),
    Fault("no heads", keys(attention__head_count=0), ("attention.head_count is 0",)),
    Fault("half of a head rotated", keys(rope__dimension_count=16), ("rope.dimension_count is 16", "can convert only 32")),
    Fault("other values", keys(attention__value_length=16), ("attention.value_length is 16",)),
    Fault("another vocabulary", keys(vocab_size=300), ("llama.vocab_size is 300", "can convert only 256")),
    Fault("a window", keys(attention__sliding_window=64), ("llama.attention.sliding_window (64) would be lost",)),
    Fault("soft caps", keys(attn_logit_softcapping=50.0), ("llama.attn_logit_softcapping (50.0) would be lost",)),
    Fault("mixtral", keys(expert_count=8), ("llama.expert_count (8) would be lost",)),
    Fault("scaled logits", keys(logit_scale=0.5), ("llama.logit_scale (0.5) would be lost",)),
    Fault("both ways", keys(attention__causal=False), ("llama.attention.causal is False",)),
    # rotary scaling
    Fault("longrope", keys(rope__scaling__type="longrope"), ("rope.scaling.type is 'longrope'", "none, linear and yarn")),
    Fault("alpha", keys(rope__scaling__alpha=1000.0), ("rope.scaling.alpha (1000.0) would be lost",)),
    Fault("part of yarn", keys(rope__scaling__type="yarn", rope__scaling__yarn_ext_factor=0.5), ("yarn_ext_factor is 0.5",)),
    Fault("logarithm", keys(rope__scaling__type="yarn", rope__scaling__yarn_log_multiplier=0.1), ("yarn_log_multiplier", "lost")),
    Fault("scaled attention", keys(rope__scaling__attn_factor=2.0), ("rope.scaling.attn_factor is 2.0", "only yarn")),
    Fault("a factor below 0", keys(rope__scaling__type="linear", rope__scaling__factor=-2.0), ("rope.scaling.factor is -2.0",)),
    Fault(
        "divisors of their own",
        written(tensors={"rope_freqs.weight": np.linspace(1, 9, 16, dtype=np.float32)}),
        ("rope_freqs.weight is not the scaling of Llama 3",),
    ),
    Fault("short divisors", written(tensors={"rope_freqs.weight": np.full(8, 2, dtype=np.float32)}), ("rope_freqs.weight",)),
    Fault(
        "divisors and yarn",
        written(metadata={"llama.rope.scaling.type": "yarn"}, tensors={"rope_freqs.weight": np.full(16, 2, dtype=np.float32)}),
        ("rope.scaling.type is 'yarn'", "rope_freqs.weight"),
    ),
    Fault("factors of two lengths", another("rope_factors_long.weight", (16,)), ("holds 1 tensor ", "rope_factors_long.weight")),
    # the tokenizer
    Fault("no tokenizer", words(model=None), ("tokenizer.ggml.model is None",)),
    Fault("another tokenizer", words(model="bert"), ("tokenizer.ggml.model is 'bert'", "gpt2 and llama")),
    Fault("no words", words(tokens=None), ("download it again",)),
    Fault("more words than rows", words(tokens=[f"w{i}" for i in range(300)]), ("embedding has 256 rows",)),
    Fault("an unknown split", words(pre="of-another-planet"), ("tokenizer.ggml.pre 'of-another-planet'",)),
    Fault("no merges", words(merges=None), (NAME, "Hugging Face layout")),
    Fault("BOS without BOS", words(add_bos_token=True, bos_token_id=None), ("texts get BOS", "bos_token_id")),
    Fault("EOS without EOS", words(add_eos_token=True, eos_token_id=None), ("texts get EOS", "eos_token_id")),
    Fault("BOS beyond the words", words(bos_token_id=256), ("bos_token_id is 256", "256 tokens")),
    Fault("padding below 0", words(padding_token_id=2**32 - 1), ("padding_token_id is 4294967295",)),
    Fault("maybe BOS", words(add_bos_token=2), ("add_bos_token is 2", "not true or false")),
    Fault("a template of numbers", written(metadata={"tokenizer.chat_template": 3}), ("tokenizer.chat_template is 3",)),
    # parts
    Fault("the first part alone", first_part_alone, ("one of 2 parts", "1 are missing", "tiny-00002-of-00002.gguf")),
    Fault("the second part alone", second_part_alone, ("one of 2 parts", "tiny-00001-of-00002.gguf")),
    Fault("a part under another name", part_under_another_name, ("one of 2 parts", "NAME-00001-of-00002.gguf")),
    Fault("a part twice", parts_of_two, ("tiny-00002-of-00002.gguf is not part 2 of 2", "split.no 0")),
    Fault("a part is cut", part_cut, ("tiny-00002-of-00002.gguf", CUT)),
    Fault("a part lacks a tensor", part_lacks_tensors, ("lacks 1 tensor ", "output_norm.weight")),
    Fault("a part repeats a tensor", part_repeats, ("tiny-00002-of-00002.gguf repeats token_embd.weight",)),
    Fault("a part is another file", part_is_another_file, ("tiny-00002-of-00002.gguf is not part 2 of 2",)),
    Fault("a part has fewer than promised", part_promises_more, ("promises 99 tensors", "hold 21")),
    # cut and damaged
    Fault("empty", cut(lambda path: 0), (NAME, "download it again")),
    Fault("3 bytes", cut(lambda path: 3), (NAME, RUNS_OUT)),
    Fault("cut counts", cut(lambda path: 20), (DAMAGED, RUNS_OUT)),
    Fault("cut in the header", cut(lambda path: 1000), (DAMAGED, RUNS_OUT)),
    Fault("cut in the table", cut(lambda path: int(GGUFReader(path).data_offset) - 100), (DAMAGED, RUNS_OUT)),
    Fault("cut before the tensors", cut(lambda path: int(GGUFReader(path).data_offset)), (CUT, "token_embd.weight")),
    Fault("cut in the tensors", cut(in_tensors), (CUT, "token_embd.weight")),
    Fault("cut in the last tensor", cut(lambda path: path.stat().st_size - 1), (CUT, "download it again")),
    Fault("not GGUF", patched(0, b"GGML"), (DAMAGED, "does not begin with GGUF")),
    Fault("version 1", patched(4, struct.pack("<I", 1)), (DAMAGED, "version is 1")),
    Fault("big-endian", patched(4, struct.pack(">I", 3)), (DAMAGED, "big-endian")),
    Fault("absurd count of tensors", patched(8, HUGE), (DAMAGED, "download it again")),
    Fault("absurd count of keys", patched(16, HUGE), (DAMAGED, "download it again")),
    Fault("absurd length of a key", patched(24, HUGE), (DAMAGED, RUNS_OUT)),
    Fault("absurd length of a name", patched(-1, HUGE), (DAMAGED, RUNS_OUT)),
    Fault("an unknown kind of value", value("llama.context_length", 0, struct.pack("<I", 77)), (DAMAGED, "value of type 77")),
    Fault("an array of arrays", value("tokenizer.ggml.token_type", 4, struct.pack("<I", 9)), (DAMAGED, "value of type 9")),
    Fault("absurd count of words", value("tokenizer.ggml.tokens", 8, HUGE), (DAMAGED, RUNS_OUT)),
    Fault("absurd count of numbers", value("tokenizer.ggml.token_type", 8, HUGE), (DAMAGED, RUNS_OUT)),
    Fault("not UTF-8", value("tokenizer.ggml.model", 12, b"\xff\xfe\xfd"), (NAME, "download it again")),
    Fault("absurd dimensions", entry(0, struct.pack("<I", 2**31)), (DAMAGED, "dimensions")),
    Fault("no dimensions", entry(0, struct.pack("<I", 0)), (DAMAGED, "0 dimensions")),
    Fault("an absurd size", entry(4, HUGE), (CUT, "token_embd.weight")),
    Fault("a smaller size", entry(4, struct.pack("<Q", 32)), (DAMAGED, "said to lie at")),
    Fault("an empty size", entry(4, struct.pack("<Q", 0)), (DAMAGED, "token_embd.weight")),
    Fault("an unknown type", entry(20, struct.pack("<I", 99)), (DAMAGED, "type 99")),
    Fault("another type", entry(20, struct.pack("<I", 1)), (DAMAGED, "said to lie at")),
    Fault("integers", written(tensors={Q: np.ones((128, 64), dtype=np.int8)}), ("cannot dequantize", Q, "I8")),
    Fault("another offset", entry(24, struct.pack("<Q", 64)), (DAMAGED, "said to lie at 64")),
    Fault("twice the same key", value("llama.block_count", -len("llama.block_count"), b"general.namexxxxx"), (NAME,)),
    Fault("odd alignment", written(metadata={"general.alignment": 24}), (DAMAGED, "general.alignment is 24")),
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LRSERVE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "models").mkdir()
    write_gguf(tmp_path / "models" / NAME)
    return tmp_path / "models"


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_faulty_file_is_refused(fault: Fault, folder: Path) -> None:
    fault.damage(folder)
    refused(fault, "inspect", min(folder.iterdir()))
    assert not list((folder.parent / "cache").rglob("*.safetensors"))


def test_a_damaged_file_is_not_taken_from_the_cache(folder: Path) -> None:
    model_folder(str(folder / NAME))
    os.truncate(folder / NAME, (folder / NAME).stat().st_size - 1)
    assert CUT in refusal("inspect", folder / NAME)


def test_a_folder_of_files_names_the_first(folder: Path) -> None:
    (folder / NAME).rename(folder / "TINY.GGUF")
    assert f"give the file itself: {folder / 'TINY.GGUF'}" in refusal("inspect", folder)


@pytest.mark.parametrize("seed", range(40))
def test_flipped_bytes_of_the_header_raise_nothing_else(folder: Path, seed: int) -> None:
    """A number within its bounds cannot be told from the right one."""
    path, random = folder / NAME, np.random.default_rng(seed)
    content = bytearray(path.read_bytes())
    for place in random.integers(0, int(GGUFReader(path).data_offset), 3):
        content[place] = random.integers(256)
    path.write_bytes(content)
    with contextlib.suppress(InputError):
        assert len(read_gguf(path).tensors) == len(gguf_tensors(dense_model("LlamaForCausalLM")))
