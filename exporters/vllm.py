"""The vLLM rendering, which transformers loads too: an artifact as docs/format.md describes it."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import nn

from exporters.companions import copy_companions, without_code
from lrserve.compression.experts import size_of_experts
from lrserve.compression.groups import ORDERED, ExpertNames, family_of
from lrserve.compression.layers import LowRankLinear, RoundedLinear, exact_names
from lrserve.compression.spec import NEEDS_LRSERVE, WEIGHTS_ENTRY, GroupSpec, leaves, quantization_config
from lrserve.errors import ArtifactError
from lrserve.inputs.checkpoint import INDEX, as_stored, stored_name
from lrserve.plugins.versions import require_torchvision, require_vllm

_MAX_SHARD_SIZE: Final = "2GB"


class VllmExporter:
    """Writes config.json, safetensors and tokenizer files."""

    name = "vllm"
    tolerance = 0.02
    rounds = True
    rounds_embedding = False

    def preflight(self, skeleton: Any) -> None:
        """Raise EngineError if vLLM is missing, of an untested version, or lacks what it needs for a model that reads images."""
        require_vllm()
        if family_of(skeleton.config).multimodal:
            require_torchvision(type(skeleton).__name__)

    def export(self, model: Any, source: Path, out: Path, dtype: torch.dtype) -> None:
        """Write `model` into the existing folder `out`, with the tokenizer files of `source`.

        Tensors are stored in `dtype`, rounded weights and their float32 scales as they are. A model without compressed layers is
        written as the dense checkpoint that it is.

        Raises:
            ArtifactError: some linears of a fused group share a first factor, and others do not.
        """
        config = copy.deepcopy(model.config)
        if hasattr(config, "quantization_config"):  # a GGUF file's, or an older artifact's
            del config.quantization_config
        if groups := low_rank_groups(model):
            config.quantization_config = quantization_config(groups)
        config.architectures = [type(model).__name__]
        for part in (config, *(getattr(config, name) for name in config.sub_configs)):
            part.dtype = str(dtype).removeprefix("torch.")
        config.save_pretrained(out)
        path = out / "config.json"
        found = without_code(json.loads(path.read_text(encoding="utf-8"))) | ({WEIGHTS_ENTRY: NEEDS_LRSERVE} if groups else {})
        path.write_text(json.dumps(found, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        _save_weights(model, out, dtype)
        copy_companions(source, out)


def low_rank_groups(model: Any) -> dict[str, GroupSpec]:
    """Read off a causal LM which of its fused groups, or of their linears, are compressed, and how.

    In the artifact's terms (docs/format.md).

    Raises:
        ArtifactError: some linears of a group share a first factor, a rounding or a residual, and others do not; or those that feed
            an MLP with fewer neurons are factorized.
        UnsupportedModelError: unknown architecture.
    """
    family = family_of(model.config)
    layers: nn.Module = model.get_submodule(family.layers)
    groups: dict[str, GroupSpec] = {}
    for index, layer in enumerate(layers.children()):
        prefix = f"{family.layers}.{index}."
        for kind, names in family.groups_in(layer).items():
            modules = {member: model.get_submodule(prefix + member) for member in names.members}
            compressed = {name: own for name, own in modules.items() if isinstance(own, (LowRankLinear, RoundedLinear))}
            if len(modules) > 1 and all(isinstance(own, LowRankLinear) and not own.shares for own in compressed.values()):
                groups |= {prefix + member: _spec(prefix, [member], module) for member, module in compressed.items()}
                continue
            alike = {(_spec(prefix, names.members, own), *_shared(own)) for own in compressed.values()}
            if not compressed:
                continue
            if len(alike) > 1 or len(compressed) < len(modules):
                found = ", ".join(f"{member} {_described(own)}" for member, own in modules.items())
                raise ArtifactError(
                    f"{prefix}{names.fused}: its linears must all share one first factor, rounding and residual, or have factors "
                    f"each of their own; found {found}"
                )
            spec = alike.pop()[0]
            groups[prefix + names.fused] = spec
            if spec.structure == "narrow_in":
                fused = family.groups[ORDERED[kind]]
                feeding = groups.get(prefix + fused.fused, GroupSpec(0, leaves(fused.members), "dense"))
                alone = set(fused.members) - {fused.fused}
                if feeding.structure != "dense" or any(prefix + member in groups for member in alone):
                    raise ArtifactError(
                        f"{prefix}{fused.fused}: has factors, and {names.fused} fewer neurons; one of the two must go"
                    )
                narrowed = replace(feeding, rank=spec.rank, structure="narrow_out", stacked=fused.stacked)
                groups[prefix + fused.fused] = narrowed
        if family.experts is not None and family.experts_in(layer) is not None:
            groups |= _mixture(prefix, layer, family.experts, model.config)
    return groups


def _mixture(prefix: str, layer: nn.Module, names: ExpertNames, config: Any) -> dict[str, GroupSpec]:
    """Describe the mixture of experts of a decoder layer, by its name, if it is not dense."""
    if (sizes := size_of_experts(layer, names, config)) is None:
        return {}
    experts, width = sizes
    return {prefix + names.fused: GroupSpec(width, leaves([names.experts]), "experts", experts=experts)}


def _spec(prefix: str, members: Sequence[str], layer: LowRankLinear | RoundedLinear) -> GroupSpec:
    """Describe the group of these members by one of its layers."""
    if isinstance(layer, RoundedLinear):
        return GroupSpec(0, leaves(members), "dense", weights=layer.weights, residual=layer.residual)
    if layer.first is not None and layer.first.weights != layer.weights:
        raise ArtifactError(f"{prefix}{members[0]}: A is in {layer.first.weights}, B in {layer.weights}; they must be alike")
    return GroupSpec(layer.rank, leaves(members), layer.structure, layer.ordered, layer.weights, layer.residual)


def _shared(layer: LowRankLinear | RoundedLinear) -> tuple[int, int]:
    """Identify what the members of a group must share."""
    return id(layer.first if isinstance(layer, LowRankLinear) else None), id(layer.residual_first)


def _described(layer: nn.Module) -> str:
    if isinstance(layer, RoundedLinear):
        return f"{layer.weights} with a residual of rank {layer.residual}"
    return f"{layer.structure} of rank {layer.rank}" if isinstance(layer, LowRankLinear) else "dense"


def _save_weights(model: Any, out: Path, dtype: torch.dtype) -> None:
    """Write the state dict in `dtype`, without tied duplicates (an output layer that is the embedding), one shard after the other.

    Only a shard's tensors that have to be converted are in memory twice.
    """
    exact = {stored_name(model, name) for name in exact_names(model)}
    tied = {stored_name(model, name) for name in getattr(model, "all_tied_weights_keys", None) or ()}
    state, places, dtypes = as_stored(model, model.state_dict()), set[int](), {}
    for name in sorted(state, key=lambda name: name in tied):  # the originals first
        tensor = state[name]
        if name in tied and tensor.data_ptr() in places:
            continue
        places.add(tensor.data_ptr())
        dtypes[name] = dtype if tensor.is_floating_point() and name not in exact else tensor.dtype
    sizes = {name: torch.empty(state[name].shape, dtype=own, device="meta") for name, own in dtypes.items()}
    shards = split_torch_state_dict_into_shards(sizes, max_shard_size=_MAX_SHARD_SIZE)
    for file, names in shards.filename_to_tensors.items():
        save_file({name: state[name].to(dtypes[name]).contiguous() for name in names}, out / file, metadata={"format": "pt"})
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        (out / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
