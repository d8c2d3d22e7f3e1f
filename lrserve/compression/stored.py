"""What a checkpoint's safetensors files hold, from their headers, and whether that is exactly what a model is made of.

Where the checkpoint of an artifact lacks a tensor, a norm or an embedding for example, transformers fills it with random numbers,
and vLLM leaves it uninitialised. Both pass over tensors that they do not know. Here each of these is a fault.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from lrserve.compression.groups import FAMILIES
from lrserve.compression.layers import exact_names
from lrserve.compression.spec import is_permutation
from lrserve.errors import ArtifactError, listed, one_line
from lrserve.inputs.checkpoint import as_stored, stored_beginnings, stored_name

_DTYPES: Final = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "I8": torch.int8,
    "I32": torch.int32,
    "I64": torch.int64,
}
_PLAIN: Final = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_NAMED: Final = 4  # tensors in a message


class StoredTensor(NamedTuple):
    """A tensor in a safetensors file: its shape, its dtype, None where lrserve does not know it, and the file's name."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    file: str


class Headers(NamedTuple):
    """What safetensors files hold: every tensor by name, and the values of the identity blocks' orders."""

    tensors: Mapping[str, StoredTensor]
    orders: Mapping[str, torch.Tensor]


def read_headers(files: Iterable[Path]) -> Headers:
    """Read the headers of safetensors files, and the identity blocks' orders.

    Raises:
        ArtifactError: a file is damaged, or no file at all, or two files hold the same tensor.
    """
    tensors: dict[str, StoredTensor] = {}
    orders: dict[str, torch.Tensor] = {}
    for path in files:
        try:
            if not path.is_file():  # a pipe would be waited for
                raise ArtifactError(f"{path} is no file; copy or export the artifact again")
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    if name in tensors:
                        others = f"{path} holds {name}, and so does {tensors[name].file}"
                        raise ArtifactError(f"{others}; remove the file that does not belong to the model")
                    header = file.get_slice(name)
                    tensors[name] = StoredTensor(tuple(header.get_shape()), _DTYPES.get(header.get_dtype()), path.name)
                    if name.endswith(".A.order"):
                        orders[name] = file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise ArtifactError(f"{path} is damaged: {one_line(error)}; copy or export the artifact again") from error
    return Headers(tensors, orders)


def tensor_faults(model: Any, stored: Headers, *, dtype: torch.dtype | None = None) -> list[str]:
    """Hold every tensor of a model against what is stored for it, and the other way round.

    A causal LM's checkpoint may be loaded into a model of another class, such as the one without the output layer. There, what
    stands outside of their common base model is neither missing nor too much.

    Args:
        model: a transformers model with the compressed layers in place; on the meta device, for example.
        stored: the checkpoint.
        dtype: of every tensor that is not rounded; None where any plain floating point number will be cast.

    Returns:
        A line for each kind of fault, or for each tensor that does not fit.
    """
    base = f"{model.base_model_prefix}."
    prefix = "" if hasattr(model, model.base_model_prefix) else base
    whole = type(model).__name__ in FAMILIES
    exact = {stored_name(model, prefix + name) for name in exact_names(model)}
    tied = {stored_name(model, prefix + name) for name in getattr(model, "all_tied_weights_keys", None) or ()}
    own = as_stored(model, {prefix + name: tensor for name, tensor in model.state_dict().items()})
    wanted = {name: (tensor, name in exact) for name, tensor in own.items() if name not in tied}
    beginnings = stored_beginnings(model, base)
    prefixed = any(name.startswith(beginnings) for name in stored.tensors)
    names = {name if prefixed else base + name: name for name in stored.tensors}

    def counts(name: str) -> bool:
        return whole or name.startswith(beginnings)

    files = sorted({tensor.file for tensor in stored.tensors.values()})
    place = files[0] if len(files) == 1 else f"{len(files)} safetensors files"
    faults = []
    if missing := [name for name in wanted if name not in names and counts(name)]:
        faults.append(f"{place}: missing from the checkpoint: {listed(missing, ', ', _NAMED)}")
    if unexpected := [own for name, own in names.items() if name not in wanted and counts(name)]:
        file = stored.tensors[unexpected[0]].file
        faults.append(f"{file}: not in the model that config.json describes: {listed(unexpected, ', ', _NAMED)}")
    for name, (tensor, is_exact) in wanted.items():
        if name in names:
            found = stored.tensors[names[name]]
            kept = is_exact or not tensor.is_floating_point()
            fault = _misfit(found, stored.orders.get(names[name]), tuple(tensor.shape), tensor.dtype if kept else dtype)
            faults += [f"{found.file}: {names[name]} is {fault}"] if fault else []
    return faults


def _misfit(found: StoredTensor, order: torch.Tensor | None, shape: tuple[int, ...], dtype: torch.dtype | None) -> str | None:
    """Say why a stored tensor does not fit; its dtype may be any of floating point numbers where None is wanted."""
    if found.shape != shape:
        return f"{found.shape} in the checkpoint; config.json makes it {shape}"
    if order is not None and not is_permutation(order):
        return "no permutation of the layer's inputs in int32"
    if found.dtype not in (_PLAIN if dtype is None else (dtype,)):
        wanted = dtype or "a floating point number"
        return f"{found.dtype or 'of an unknown dtype'} in the checkpoint; config.json makes it {wanted}"
    return None
