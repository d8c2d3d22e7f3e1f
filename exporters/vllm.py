"""The vLLM rendering, which transformers loads too: an artifact as docs/format.md describes it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Final

import torch
from huggingface_hub import save_torch_state_dict
from torch import nn

from exporters.companions import copy_companions
from lrserve.compression.groups import ORDERED, family_of
from lrserve.compression.lowrank import GroupSpec, LowRankLinear, leaves, quantization_config
from lrserve.errors import ArtifactError
from lrserve.plugins.versions import require_vllm

_MAX_SHARD_SIZE: Final = "5GB"


class VllmExporter:
    """Writes config.json, safetensors and tokenizer files."""

    name = "vllm"
    tolerance = 0.02

    def preflight(self, skeleton: Any) -> None:
        """Raise EngineError if vLLM is missing or of an untested version."""
        require_vllm()

    def export(self, model: Any, source: Path, out: Path, dtype: torch.dtype) -> None:
        """Write `model` into the existing folder `out`, with the tokenizer files of `source`.

        Tensors are stored in `dtype`, integers as they are. A model without factorized layers is written as the dense
        checkpoint that it is.

        Raises:
            ArtifactError: some linears of a fused group share a first factor, and others do not.
        """
        config = copy.deepcopy(model.config)
        if hasattr(config, "quantization_config"):  # a GGUF file's, or an older artifact's
            del config.quantization_config
        if groups := low_rank_groups(model):
            config.quantization_config = quantization_config(groups)
        config.architectures = [type(model).__name__]
        config.dtype = str(dtype).removeprefix("torch.")
        config.save_pretrained(out)
        save_torch_state_dict(_own_tensors(model, dtype), out, max_shard_size=_MAX_SHARD_SIZE)
        copy_companions(source, out)


def low_rank_groups(model: Any) -> dict[str, GroupSpec]:
    """Read off a causal LM which of its fused groups, or of their linears, are compressed, as what and to which rank.

    In the artifact's terms (docs/format.md).

    Raises:
        ArtifactError: some linears of a group share a first factor, and others do not; or those that feed an MLP with fewer
            neurons are factorized.
        UnsupportedModelError: unknown architecture.
    """
    family = family_of(model.config)
    layers: nn.Module = model.get_submodule(family.layers)
    groups: dict[str, GroupSpec] = {}
    for index in range(sum(1 for _ in layers.children())):
        prefix = f"{family.layers}.{index}."
        for kind, names in family.groups.items():
            modules = {member: model.get_submodule(prefix + member) for member in names.members}
            compressed = {member: module for member, module in modules.items() if isinstance(module, LowRankLinear)}
            if len(modules) > 1 and not any(module.shares for module in compressed.values()):
                for member, module in compressed.items():
                    groups[prefix + member] = GroupSpec(module.rank, leaves([member]), module.structure, module.ordered)
                continue
            if not compressed:
                continue
            alike = {(id(module.first), module.structure, module.rank, module.ordered) for module in compressed.values()}
            if len(alike) > 1 or len(compressed) < len(modules):
                found = ", ".join(
                    f"{member} {f'{own.structure} of rank {own.rank}' if (own := compressed.get(member)) else 'dense'}"
                    for member in modules
                )
                raise ArtifactError(
                    f"{prefix}{names.fused}: its linears must all share one first factor, or each have its own; found {found}"
                )
            _, stored, rank, ordered = alike.pop()
            groups[prefix + names.fused] = GroupSpec(rank, leaves(names.members), stored, ordered)
            if stored == "narrow_in":
                feeding = family.groups[ORDERED[kind]]
                if any(isinstance(model.get_submodule(prefix + member), LowRankLinear) for member in feeding.members):
                    raise ArtifactError(
                        f"{prefix}{feeding.fused}: has factors, and {names.fused} fewer neurons; one of the two must go"
                    )
                groups[prefix + feeding.fused] = GroupSpec(rank, leaves(feeding.members), "narrow_out")
    return groups


def _own_tensors(model: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """State dict without tied duplicates (an output layer that is the embedding), each tensor in its own storage."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    by_storage: set[int] = set()
    tensors = {}
    state = model.state_dict()
    for name in sorted(state, key=lambda name: name in tied):  # the originals first
        tensor = state[name]
        if name in tied and tensor.data_ptr() in by_storage:
            continue
        by_storage.add(tensor.data_ptr())
        # Rounded, or a row block of a stacked B, which is a view: safetensors wants each tensor alone and contiguous.
        rounded = tensor.to(dtype) if tensor.is_floating_point() else tensor
        alone = rounded.is_contiguous() and rounded.untyped_storage().nbytes() == rounded.nbytes
        tensors[name] = rounded if alone else rounded.clone(memory_format=torch.contiguous_format)
    return tensors
