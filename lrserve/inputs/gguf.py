"""GGUF files, converted to folders of bfloat16 safetensors in the cache: completely, or refused.

The weights and the config are converted here, by the package gguf's types and names; transformers builds the tokenizer. What it
drops on the way is put back (whether texts begin with BOS, and end with EOS) or compared with the file.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import yaml
from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file

from lrserve.errors import InputError, reading, shown
from lrserve.inputs.checkpoint import counted
from lrserve.inputs.gguf_config import LONG_FACTORS, ROPE_FACTORS, config_of
from lrserve.inputs.gguf_file import GgufFile, part_stem, read_gguf
from lrserve.storage.space import Place, require_space
from lrserve.storage.store import file_sha256, staged
from lrserve.storage.temporary import temporary_folder

_VERSION: Final = 3
"""Of what a conversion holds. Another one in the cache is made again."""
_STAMP: Final = ".conversion"
_MAX_SHARD_SIZE: Final = "5GB"
_LEFTOVERS: Final = re.compile(r"blk\.\d+\.attn_rot_embd(\.weight)?")
"""Tensors of old files that no program reads: rotary frequencies."""
_ROTATED_IN_PAIRS: Final = ("llama", "smollm3", "granite")
"""Architectures whose queries and keys llama.cpp stores in another order."""
_LLAMA3_SPLITS: Final = ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "tekken")
"""Values of tokenizer.ggml.pre by which llama.cpp adds BOS unless told otherwise, and takes a word that is a token as it is."""
_GPT2_SPLITS: Final = ("default", "gpt-2", "gpt2", "smollm", "starcoder", "refact", "command-r")
"""Those whose texts are cut into words as GPT-2's are, apart from digits."""
_PHI3_KEEPS_SPACE: Final = ("<unk>", "<s>", "<|endoftext|>")
"""Special tokens of Phi-3 that do not swallow the space behind them; files do not say."""
_PROBE: Final = "It's 12 o'clock,\n  and  all is well."
_ADVICE: Final = "give the model in Hugging Face layout"


def convert_gguf(path: Path, cache: Callable[[int], Place]) -> Path:
    """Return the folder in the cache that holds a GGUF file's model, converting it the first time.

    Args:
        path: the file, or any part of a split one.
        cache: returns lrserve's cache as a place for so many bytes.

    Raises:
        InputError: the file is damaged or incomplete, or holds something that cannot be carried over.
        ArtifactError: the cache cannot be written, or ran full.
    """
    file = read_gguf(path)
    digests = [file_sha256(part) for part in file.parts]
    digest = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    target = cache(0).folder / "dequantized" / f"{part_stem(file.path)}-{digest[:16]}"
    if _is_whole(target):
        return target
    skeleton = _skeleton(file)
    names = _names(file, skeleton)
    tokenizer = _tokenizer(file, skeleton.config.vocab_size)
    require_space([cache(sum(2 * math.prod(file.tensors[name].shape) for name in names.values()))])
    with staged(target, replace=True) as staging:
        skeleton.config.save_pretrained(staging)
        skeleton.generation_config.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        _see_reloaded(file, tokenizer, staging)
        _write_weights(file, skeleton, names, staging)
        if licence := file.metadata.get("general.license"):
            (staging / "README.md").write_text(f"---\n{yaml.safe_dump({'license': licence})}---\n", encoding="utf-8")
        (staging / _STAMP).write_text(json.dumps(_stamp(staging)), encoding="utf-8")
    return target


def _stamp(folder: Path) -> dict[str, Any]:
    files = sorted(path for path in folder.iterdir() if path.name != _STAMP)
    return {"version": _VERSION, "bytes": {path.name: path.stat().st_size for path in files}}


def _is_whole(folder: Path) -> bool:
    """Say whether this version of lrserve made a conversion, and its files are those that it made."""
    try:
        return bool(json.loads((folder / _STAMP).read_text(encoding="utf-8")) == _stamp(folder))
    except (OSError, ValueError):
        return False


def _skeleton(file: GgufFile) -> Any:
    from transformers import AutoModelForCausalLM

    config = config_of(file)
    with reading(file.path, _ADVICE), torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    skeleton.config.architectures = [type(skeleton).__name__]
    return skeleton


def _names(file: GgufFile, skeleton: Any) -> dict[str, str]:
    """Return for each tensor of the model the one of the file.

    Raises:
        InputError: the file lacks one, has one that would be left over, or one of another shape.
    """
    architecture = file.metadata["general.architecture"]
    known = {name: own for own, name in MODEL_ARCH_NAMES.items()}
    of = get_tensor_name_map(known[architecture], skeleton.config.num_hidden_layers)
    names, wanted = {}, skeleton.state_dict()
    for name in wanted.keys() - skeleton.all_tied_weights_keys.keys():
        stem, _, kind = name.rpartition(".")
        names[name] = f"{of.get_name(stem)}.{kind}"
    if missing := sorted(set(names.values()) - file.tensors.keys()):
        raise InputError(f"{file.path} lacks {counted(missing)} of the model; download it again")
    scaling = {ROPE_FACTORS, *(LONG_FACTORS if "long_factor" in skeleton.config.rope_parameters else ())}
    left = sorted(name for name in file.tensors.keys() - set(names.values()) - scaling if not _LEFTOVERS.fullmatch(name))
    if left:
        raise InputError(
            f"{file.path} holds {counted(left)} that a model of the architecture {architecture} does not have; {_ADVICE}"
        )
    for name, own in names.items():
        if (found := file.tensors[own].shape) != tuple(wanted[name].shape):
            raise InputError(f"{file.path}: {own} has shape {found}, its metadata give {tuple(wanted[name].shape)}; {_ADVICE}")
    return names


def _write_weights(file: GgufFile, skeleton: Any, names: Mapping[str, str], folder: Path) -> None:
    empty = {name: tensor for name, tensor in skeleton.state_dict().items() if name in names}
    plan = split_torch_state_dict_into_shards(empty, max_shard_size=_MAX_SHARD_SIZE)
    for filename, members in plan.filename_to_tensors.items():
        tensors = {name: _tensor(file, names[name], skeleton.config) for name in members}
        save_file(tensors, folder / filename, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def _tensor(file: GgufFile, name: str, config: Any) -> torch.Tensor:
    stored, architecture = file.tensors[name], file.metadata["general.architecture"]
    try:
        values = stored.values()
    except NotImplementedError:
        raise InputError(f"{file.path}: the package gguf cannot dequantize {name} ({stored.type.name}); {_ADVICE}") from None
    if architecture in _ROTATED_IN_PAIRS and ".attn_q." in name:
        values = _halves(values, config.num_attention_heads)
    elif architecture in _ROTATED_IN_PAIRS and ".attn_k." in name:
        values = _halves(values, config.num_key_value_heads)
    elif architecture == "gemma3" and name.endswith("norm.weight"):
        values = values - 1
    return torch.from_numpy(np.array(values, order="C")).to(torch.bfloat16)


def _halves(values: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Sort the outputs of each head from llama.cpp's order, where those that are rotated together are neighbours, to halves."""
    return values.reshape(heads, -1, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def _tokenizer(file: GgufFile, rows: int) -> Any:
    """Build the tokenizer, with BOS and EOS where the file, or llama.cpp for such a file, adds them.

    Raises:
        InputError: a kind of tokenizer that cannot be rebuilt, or ids that the embedding does not have.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    model, split, tokens = (file.metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "pre", "tokens"))
    if model not in ("gpt2", "llama"):
        raise InputError(f"{file.path}: tokenizer.ggml.model is {shown(model)}; lrserve can convert gpt2 and llama; {_ADVICE}")
    if not isinstance(tokens, list) or len(tokens) > rows:
        raise InputError(f"{file.path}: the embedding has {rows} rows, but tokenizer.ggml.tokens is {shown(tokens)}; {_ADVICE}")
    template = file.metadata.get("tokenizer.chat_template")
    if not isinstance(template, str | None):
        raise InputError(f"{file.path}: tokenizer.chat_template is {shown(template)}, not text; download it again")
    adds = {"bos": _flag(file, "bos", model == "llama" or split in _LLAMA3_SPLITS), "eos": _flag(file, "eos", False)}
    with reading(file.path, _ADVICE), temporary_folder() as folder:
        (Path(folder) / "model.gguf").symlink_to(file.path.absolute())  # alone: files of a tokenizer beside it would be mixed in
        backend = PreTrainedTokenizerFast.from_pretrained(folder, gguf_file="model.gguf").backend_tokenizer
    content = json.loads(backend.to_str())
    # transformers adds special tokens that it expects of such a tokenizer; the model has no embedding for them
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < len(tokens)]
    if model == "gpt2":
        if split not in (None, *_GPT2_SPLITS) and content["pre_tokenizer"]["type"] == "ByteLevel":
            raise InputError(f"{file.path}: transformers does not know tokenizer.ggml.pre {shown(split)}; {_ADVICE}")
        content["model"]["ignore_merges"] = split in _LLAMA3_SPLITS
    elif file.metadata.get("tokenizer.ggml.add_space_prefix") is False:
        if (content["pre_tokenizer"] or {}).get("type") == "Metaspace":
            content["pre_tokenizer"]["prepend_scheme"] = "never"
            content["decoder"]["decoders"] = [own for own in content["decoder"]["decoders"] if own["type"] != "Strip"]
        elif file.metadata["general.architecture"] == "phi3":
            raise InputError(f"{file.path}: tokenizer.ggml.add_space_prefix is false, which lrserve cannot convert here; {_ADVICE}")
    if re.search("phi-?3", str(file.metadata.get("general.name", "")).lower()):  # as llama.cpp tells them
        for token in content["added_tokens"]:
            token["rstrip"] = token["content"] not in _PHI3_KEEPS_SPACE
    special = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: file.metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in special.items()}
    with reading(file.path, _ADVICE):
        tokenizer: Any = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(json.dumps(content)),
            add_bos_token=adds["bos"],
            add_eos_token=adds["eos"],
            **{name: None if own is None else tokens[own] for name, own in ids.items()},
        )
        tokenizer.chat_template = template
        plain, whole = (tokenizer(_PROBE, add_special_tokens=added)["input_ids"] for added in (False, True))
    first, last = ([ids[f"{token}_token"]] * adds[token] for token in ("bos", "eos"))
    if whole != [*first, *plain, *last] or max(tokenizer.get_vocab().values()) >= rows:
        raise InputError(f"{file.path}: transformers makes another tokenizer than tokenizer.ggml describes; {_ADVICE}")
    return tokenizer


def _flag(file: GgufFile, token: str, by_default: bool) -> bool:
    key = f"tokenizer.ggml.add_{token}_token"
    value = file.metadata.get(key, by_default)
    if type(value) is not bool:
        raise InputError(f"{file.path}: {key} is {shown(value)}, not true or false; download it again")
    if value and file.metadata.get(f"tokenizer.ggml.{token}_token_id") is None:
        raise InputError(f"{file.path}: texts get {token.upper()}, but there is no tokenizer.ggml.{token}_token_id; {_ADVICE}")
    return value


def _see_reloaded(file: GgufFile, tokenizer: Any, folder: Path) -> None:
    """See that the tokenizer is the same once it is written and read."""
    from transformers import AutoTokenizer

    with reading(file.path, _ADVICE):
        again = AutoTokenizer.from_pretrained(folder)
        same = again(_PROBE)["input_ids"] == tokenizer(_PROBE)["input_ids"] and again.chat_template == tokenizer.chat_template
    if not same:
        raise InputError(f"{file.path}: transformers reads another tokenizer than it wrote; {_ADVICE}")
