"""A folder of safetensors, held against its config by names, shapes and dtypes before a weight is read.

transformers warns of tensors that are missing and makes them up, and drops those that the config does not mention. vLLM reads
every *.safetensors of a folder, with an index those that it names. Where the folder leaves no room for either, all programs read
the same model from it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from safetensors import safe_open

from lrserve.errors import InputError, reading, shown

if TYPE_CHECKING:
    import torch

INDEX: Final = "model.safetensors.index.json"
_SINGLE: Final = "model.safetensors"
_ADAPTER: Final = "adapter_config.json"
_ADAPTER_WEIGHTS: Final = "adapter_model."
_OTHER_WEIGHTS: Final = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack")
_LEFTOVERS: Final = re.compile(r"(.*\.)?(rotary_emb\.(inv_freq|cos_cached|sin_cached)|attn\.(masked_)?bias|position_ids)")
"""Tensors of old checkpoints that every program computes for itself: rotary frequencies and tables, causal masks, positions."""
_FLOATS: Final = ("F64", "F32", "F16", "BF16")
_SCALES: Final = re.compile(r".*(scale|scale_inv|scales|zero_point|zeros|qweight|g_idx|absmax|quant_map|quant_state.*|SCB|packed)")
"""Names of what quantized weights have besides."""
_EXPERTS: Final = ".experts."
_LLAVA_LIKE: Final = {
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
    "model.vision_tower.": "vision_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
}
_STORED_NAMES: Final[Mapping[str, Mapping[str, str]]] = {
    "gemma3": {**_LLAVA_LIKE, "model.vision_tower.": "vision_tower.vision_model."},
    "mistral3": _LLAVA_LIKE,
    "qwen2_5_vl": {"model.language_model.": "model.", "model.visual.": "visual."},
}
"""By model_type: how the names of tensors begin in checkpoints where modules of transformers have other names, and vLLM's too."""
_POINTER: Final = b"version https://git-lfs"
_DOWNLOAD: Final = "download it again"
_ROWS: Final = 4096


class Stored(NamedTuple):
    """A tensor by its file's header; the dtype is in safetensors' words."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def check_checkpoint(folder: Path, skeleton: Any, quantization: Any) -> None:
    """Check that a folder holds one set of weights, which is that of a dense model.

    Args:
        folder: in Hugging Face layout; config.json and all shards of the index are there.
        skeleton: the dense model of its config, on the meta device.
        quantization: config.json's `quantization_config`; None if it has none.

    Raises:
        InputError: files besides those of the model; damaged headers; missing, unexpected, misshapen or quantized tensors.
    """
    stored = _headers(folder)
    fault = _fault(folder, skeleton, stored)
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
        entry = f"config.json has a quantization_config of quant_method {shown(method)}"
        if fault is None:
            raise InputError(f"{folder}: the weights are dense, but {entry}: remove that entry from config.json")
        raise InputError(f"{folder} is already quantized or compressed ({entry}); give the dense model")
    if (other := getattr(skeleton.config, "transformers_weights", None)) is not None:
        raise InputError(f"{folder}: config.json names {shown(other)} as transformers_weights; remove that entry: others ignore it")
    if fault is not None:
        raise InputError(fault)


def stored_dtype(folder: Path) -> torch.dtype:
    """Return the narrowest dtype that holds all weights of a folder, whose headers are sound."""
    import torch

    kinds = {own.dtype for name, own in _headers(folder).items() if not _LEFTOVERS.fullmatch(name)}
    return {"BF16": torch.bfloat16, "F16": torch.float16}.get(kinds.pop(), torch.float32) if len(kinds) == 1 else torch.float32


def as_stored(model: Any, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model's tensors as checkpoints have them, for vLLM as well: under their names, each expert's alone."""
    if not any(_EXPERTS in name for name in state):
        return {stored_name(model, name): tensor for name, tensor in state.items()}
    from transformers.core_model_loading import revert_weight_conversion

    return dict(revert_weight_conversion(model, dict(state)))


def stored_name(model: Any, name: str) -> str:
    """Return the name in checkpoints of a tensor of a model with an output layer, or the beginning of such names."""
    for own, stored in _STORED_NAMES.get(model.config.model_type, {}).items():
        if name.startswith(own):
            return stored + name.removeprefix(own)
    return name


def stored_beginnings(model: Any, base: str) -> tuple[str, ...]:
    """Return how the names in checkpoints begin of tensors whose names in the model begin with `base`."""
    names = _STORED_NAMES.get(model.config.model_type)
    return (base,) if names is None else tuple(stored for own, stored in names.items() if own.startswith(base))


def instead_of_weights(folder: Path) -> str | None:
    """Return what a folder holds instead of a model's safetensors, and the next step; None if it has them, or nothing known."""
    names = sorted(path.name for path in folder.iterdir())
    if any(name.endswith(".safetensors") and not name.startswith(_ADAPTER_WEIGHTS) for name in names):
        return None
    if any(name == _ADAPTER or name.startswith(_ADAPTER_WEIGHTS) for name in names):
        try:
            base = json.loads((folder / _ADAPTER).read_text(encoding="utf-8"))["base_model_name_or_path"]
        except Exception:  # whatever stands there, it is an adapter
            base = None
        return (
            f"{folder} is an adapter (LoRA) of {shown(base) if base else 'another model'}: merge it first, and give what this "
            f'writes: python -c "from peft import AutoPeftModelForCausalLM as M; M.from_pretrained({str(folder)!r})'
            ".merge_and_unload().save_pretrained('MERGED')\"; copy the tokenizer's files to MERGED"
        )
    others = [name for name in names if name.endswith(_OTHER_WEIGHTS)]
    pickled = [name for name in others if name.startswith("pytorch_model")]
    if "config.json" in names and pickled:
        return (
            f"{folder} holds its weights as {pickled[0]}, not as safetensors: convert them, and give what this writes: python -c "
            f"\"from transformers import AutoModelForCausalLM as M; M.from_pretrained({str(folder)!r}, dtype='auto')"
            ".save_pretrained('CONVERTED')\"; copy the tokenizer's files to CONVERTED"
        )
    if others and not any(name.lower().endswith(".gguf") for name in names):
        return (
            f"{folder} holds no *.safetensors but {others[0]}: get the model in Hugging Face layout, or load it into its class "
            "of transformers and call save_pretrained"
        )
    return None


def _headers(folder: Path) -> dict[str, Stored]:
    """Return the tensors of a folder by name.

    Raises:
        InputError: files besides those of the model, a damaged one, or shards and index that disagree.
    """
    present = {path.name for path in folder.glob("*.safetensors")}
    index = None
    if (folder / INDEX).is_file():
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
    named = {_SINGLE} if index is None else set(index.values())
    if index is None and _SINGLE not in present:
        first = min(present)
        raise InputError(
            f"{folder} holds {first} but neither {_SINGLE} nor {INDEX}, which say where the weights are; "
            f"download the index too, or if {first} is all, call it {_SINGLE}"
        )
    if (folder / _ADAPTER).exists():
        raise InputError(f"{folder} holds an adapter beside the model ({_ADAPTER}): merge it into the weights or move it away")
    if extra := sorted(present - named):
        raise InputError(
            f"{folder} holds {len(extra)} *.safetensors besides the model's, first {extra[0]}: other programs would read "
            "them too; move what is not the model out of the folder"
        )
    stored: dict[str, Stored] = {}
    for name in sorted(named):
        path = folder / name
        for tensor, own in _header(path).items():
            if tensor in stored:
                raise InputError(f"{path} holds {shown(tensor)}, which {stored[tensor].file.name} holds too; {_DOWNLOAD}")
            if index is not None and index.get(tensor) != name:
                raise InputError(f"{path} holds {shown(tensor)}, {INDEX} says {shown(index.get(tensor))}; {_DOWNLOAD}")
            stored[tensor] = own
    if index is not None and (absent := [tensor for tensor in index if tensor not in stored]):
        raise InputError(f"{folder / index[absent[0]]} lacks {shown(absent[0])}, which {INDEX} says it holds; {_DOWNLOAD}")
    return stored


def _header(path: Path) -> dict[str, Stored]:
    with reading(path, _DOWNLOAD):
        with path.open("rb") as file:
            if file.read(len(_POINTER)) == _POINTER:
                raise InputError(f"{path} is a pointer of Git LFS, not the weights; get them with: git lfs pull")
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: Stored(path, tuple(own.get_shape()), own.get_dtype()) for name, own in slices.items()}


def _fault(folder: Path, skeleton: Any, stored: Mapping[str, Stored]) -> str | None:
    """Return what is wrong with a folder's tensors, as one line; None if they are the model's."""
    wanted = {name: tuple(tensor.shape) for name, tensor in as_stored(skeleton, skeleton.state_dict()).items()}
    tied = {stored_name(skeleton, own): stored_name(skeleton, source) for own, source in skeleton.all_tied_weights_keys.items()}
    missing = [name for name in wanted if name not in stored and name not in tied]
    unexpected = [name for name in stored if name not in wanted and not _LEFTOVERS.fullmatch(name)]
    for name, own in stored.items():
        if own.dtype not in _FLOATS and not _LEFTOVERS.fullmatch(name):
            return f"{folder} holds quantized weights ({name} is {own.dtype}); give the dense model, in 16 or 32 bits"
    if scales := [name for name in unexpected if _SCALES.fullmatch(name)]:
        return f"{folder} holds quantized weights (it has {scales[0]}); give the dense model, in 16 or 32 bits"
    if missing or unexpected:
        parts = [f"lack {counted(missing)} that it promises"] if missing else []
        parts += [f"have {counted(unexpected)} that it does not mention"] if unexpected else []
        return f"{folder}: the weights do not fit config.json: they {' and '.join(parts)}; {_advice(skeleton, missing, unexpected)}"
    for name, shape in wanted.items():
        if name in stored and (own := stored[name]).shape != shape:
            return f"{own.file}: {name} has shape {own.shape}, config.json gives {shape}; take both files from one place"
    for target, source in tied.items():
        if target in stored and not _same(stored[target], target, stored[source], source):
            return (
                f"{folder}: {target} and {source} differ, but config.json says that they are one (tie_word_embeddings); "
                "set tie_word_embeddings to false"
            )
    return None


def counted(names: list[str]) -> str:
    """Return how many tensors there are, and the first, for a message."""
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} (first {shown(names[0])})"


def _advice(skeleton: Any, missing: list[str], unexpected: list[str]) -> str:
    prefix = f"{skeleton.base_model_prefix}."
    if missing == [stored_name(skeleton, "lm_head.weight")] and not unexpected:
        return "download them again, or if the model has no output layer of its own, set tie_word_embeddings to true"
    if unexpected and all(name.endswith(".bias") for name in unexpected) and not missing:
        return "take config.json from where the weights are from; it may lack attention_bias or mlp_bias"
    if missing and all(prefix + name in missing for name in unexpected) and unexpected:
        return f"the names lack the prefix {prefix!r}: write the model again with AutoModelForCausalLM and save_pretrained"
    return "take config.json and the weights from one place, or download them again"


def _same(one: Stored, name: str, other: Stored, its_name: str) -> bool:
    """Say whether two stored tensors hold the same values; reads them a few rows at a time."""
    import torch

    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    with safe_open(one.file, "pt") as first, safe_open(other.file, "pt") as second:
        rows, its_rows = first.get_slice(name), second.get_slice(its_name)
        return all(torch.equal(rows[i : i + _ROWS], its_rows[i : i + _ROWS]) for i in range(0, one.shape[0], _ROWS))
