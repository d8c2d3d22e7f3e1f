"""Checkpoints that vLLM serves without lrserve: a dense model in compressed-tensors' format, rounded to nearest.

int8: one scale for each output channel, activations rounded with one scale for each token while the engine runs (W8A8).
int4: one scale for 32 weights of an output channel; activations stay as they are (W4A16). vLLM 0.32 has no online int8 for linears.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from exporters.companions import copy_companions
from lrserve.compression.level import Precision
from lrserve.compression.packing import pack_int4
from lrserve.compression.quantize import Rounded, round_to_nearest
from lrserve.compression.spec import compressed_tensors_config
from lrserve.inputs.source import Source


def write_stock(source: Source, linears: Collection[str], precision: Precision, folder: Path, dtype: torch.dtype) -> Path:
    """Write a checkpoint of which vLLM serves these linears in a precision; returns the folder, which is made.

    Scales of groups are in `dtype`, those of rows in float32.

    Raises:
        ValueError: the model has not all of the linears' weights.
    """
    folder.mkdir()
    weights = {f"{linear}.weight" for linear in linears}
    for shard in sorted(source.path.glob("*.safetensors")):
        tensors = {}
        for name, tensor in load_file(shard).items():
            if name in weights:
                weights.remove(name)
                tensors |= _stored(name, round_to_nearest(tensor, precision, dtype), dtype)
            else:
                tensors[name] = tensor
        save_file(tensors, folder / shard.name, metadata={"format": "pt"})
    if weights:
        raise ValueError(f"{source.path} lacks {len(weights)} weights, first {min(weights)}")
    config = json.loads((source.path / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = compressed_tensors_config(precision, ["Linear"], ["lm_head"])
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    copy_companions(source.path, folder)
    return folder


def _stored(name: str, rounded: Rounded, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    if rounded.scheme.group is None:
        return {name: rounded.values, f"{name}_scale": rounded.scales}
    return {
        f"{name}_packed": pack_int4(rounded.values),
        f"{name}_scale": rounded.scales.to(dtype),
        f"{name}_shape": torch.tensor(rounded.values.shape),
    }
