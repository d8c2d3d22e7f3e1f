"""Whether an artifact's checkpoint is exactly what its config.json describes, by that file and the headers of the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import torch

from lrserve.compression.groups import as_listed, find_units
from lrserve.compression.lowrank import install_low_rank
from lrserve.compression.spec import QUANT_METHOD, GroupSpec, leaves, parse_groups
from lrserve.compression.stored import Headers, read_headers, tensor_faults
from lrserve.errors import ArtifactError, LrserveError, listed, one_line
from lrserve.inputs.config_file import text_entries
from lrserve.inputs.source import Source
from lrserve.storage.folder import shown
from lrserve.storage.json_files import read_object
from lrserve.storage.store import check_files

CONFIG: Final = "config.json"
_WEIGHTS: Final = "model.safetensors"
_INDEX: Final = "model.safetensors.index.json"
AGAIN: Final = "copy or export the artifact again"
_LONGEST: Final = 500  # characters of a message that quotes one


def require_sound(folder: Path) -> None:
    """Refuse an artifact that is about to be loaded unless its files and its tensors are what they should be; nothing is hashed.

    A folder without weights has its files compared only.

    Raises:
        ArtifactError: as `store.check_files` and `open_checkpoint`, or a tensor is missing, does not fit, or does not belong there.
    """
    check_files(folder)
    if any(folder.glob("*.safetensors")):
        _, faults = open_checkpoint(folder)
        if faults:
            raise ArtifactError(f"{folder}: {listed(faults)}; {AGAIN}")


def open_checkpoint(folder: Path) -> tuple[dict[str, GroupSpec], list[str]]:
    """Hold the tensors of an artifact against its config.json.

    Returns:
        The compressed groups that config.json lists, and a line for each fault.

    Raises:
        ArtifactError: config.json, the index of the weights or a header is damaged, or config.json describes no model.
    """
    path = folder / CONFIG
    config = read_object(path, AGAIN, ArtifactError)
    stored = _weights(folder)
    entry = config.get("quantization_config")
    if entry is not None and (not isinstance(entry, dict) or entry.get("quant_method") != QUANT_METHOD):
        raise ArtifactError(f"{path}: quantization_config is not lrserve's; {AGAIN}")
    layers = text_entries(config).get("num_hidden_layers")
    if isinstance(layers, int) and layers > len(stored.tensors):  # nobody wants to wait for so many to be built
        raise ArtifactError(f"{path} has {layers} layers, the weights have {len(stored.tensors)} tensors in all; {AGAIN}")
    try:
        specs = {} if entry is None else parse_groups(entry)
        skeleton = Source(name=str(folder), path=folder).skeleton()
        faults = _group_faults(skeleton, specs)
        if not faults:
            with torch.device("meta"):
                install_low_rank(skeleton, specs)
            faults = tensor_faults(skeleton, stored, dtype=getattr(skeleton.config, "dtype", None))
    except LrserveError as error:
        text = str(error) if str(path) in str(error) else f"{path}: {error}"
        raise ArtifactError(text if len(text) <= _LONGEST else text[:_LONGEST] + "...") from error
    except Exception as error:  # of whatever kind transformers raises for the config of a model that cannot be
        raise ArtifactError(f"{path} describes no model that can be built: {one_line(error)}; {AGAIN}") from error
    return specs, faults


def _group_faults(skeleton: Any, specs: dict[str, GroupSpec]) -> list[str]:
    groups = {group.name: leaves(group.members) for group in as_listed(find_units(skeleton), specs)}
    return [
        f"{CONFIG} lists {name} of {shown(', '.join(spec.members))}, which is no group of the architecture"
        for name, spec in specs.items()
        if groups.get(name) != spec.members
    ]


def _weights(folder: Path) -> Headers:
    """Read the headers of the safetensors files, which must be those that transformers loads, and the tensors where it looks."""
    files = sorted(folder.glob("*.safetensors"))
    path = folder / _INDEX
    stored = read_headers(files)
    if path.exists():
        places = read_object(path, AGAIN, ArtifactError).get("weight_map")
        if places != {name: tensor.file for name, tensor in stored.tensors.items()}:
            raise ArtifactError(f"{path} does not say in which files the tensors are; {AGAIN}")
    elif others := [file.name for file in files if file.name != _WEIGHTS]:
        raise ArtifactError(f"{folder} has weights in {', '.join(others[:3])} and no {_INDEX}; {AGAIN}")
    return stored
