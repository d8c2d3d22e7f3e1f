"""vLLM's view of an artifact's `quantization_config`: which of the model's layers are compressed. Imports vLLM."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from lrserve.compression.spec import QUANT_METHOD, GroupSpec, parse_groups
from lrserve.errors import ArtifactError, EngineError
from lrserve.plugins.versions import require_vllm

_DRAFT_PREFIX = "draft_model."  # vLLM builds the draft model of speculative decoding under this name


class LrserveConfig(QuantizationConfig):
    """Gives every listed group a method of layers.py, and every other layer vLLM's own unquantized method."""

    def __init__(self, groups: Mapping[str, GroupSpec]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.groups = dict(groups)

    @classmethod
    def get_name(cls) -> str:  # type: ignore[override]
        """Return the `quant_method` of config.json."""
        return QUANT_METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """Return every dtype that vLLM's unquantized kernels multiply."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Return the least CUDA capability: any, since there is no CUDA kernel of our own."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return no file names: everything stands in config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> LrserveConfig:
        """Read `quantization_config`.

        Raises:
            EngineError: this vLLM is outside the range that lrserve is tested with.
            ArtifactError: the entry is malformed or of another format version.
        """
        require_vllm()
        return cls(parse_groups(config))

    def maybe_update_config(self, model_name: str, *args: Any, **options: Any) -> None:
        """Refuse an artifact in a folder whose files or tensors are not what its manifest and config.json say.

        vLLM calls this before it builds the model, whose norms and embeddings it would leave uninitialised where the checkpoint
        lacks them. Of a name on the Hub nothing has been downloaded yet.

        Raises:
            ArtifactError: see `checkpoint.require_sound`.
        """
        if (folder := Path(model_name)).is_dir():
            from lrserve.plugins.checkpoint import require_sound

            require_sound(folder)

    @property
    def online_quantization_config(self) -> None:
        """None: an artifact says itself what its weights are rounded to."""
        return None

    @online_quantization_config.setter
    def online_quantization_config(self, online: Any) -> None:
        """Refuse what `--quantization-config` asks for.

        Raises:
            EngineError: always, but for None.
        """
        if online is not None:
            raise EngineError(
                "--quantization-config cannot round the weights of an lrserve artifact: its config.json says what each of them is "
                "stored in. Leave it out, or compress the dense model again with the precision that you want"
            )

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Rename the groups as vLLM renames the model's modules."""
        self.groups = hf_to_vllm_mapper.apply_dict(self.groups)

    def groups_of(self, prefix: str) -> list[GroupSpec | None]:
        """Return what the artifact says about the layer `prefix`: one entry, or one for each linear that it is made of.

        None is a dense layer, or a dense linear.

        Raises:
            ArtifactError: the artifact groups this layer's linears in another way than vLLM fuses them.
        """
        name = prefix.removeprefix(_DRAFT_PREFIX)
        parent, _, leaf = name.rpartition(".")
        fused = tuple(self.packed_modules_mapping.get(leaf) or (leaf,))
        spec = self.groups.get(name)
        alone = [self.groups.get(f"{parent}.{member}") for member in fused if member != leaf]
        if not any(alone):
            if spec is not None and spec.members != fused:
                raise ArtifactError(
                    f"{name}: config.json groups {', '.join(spec.members)}, but vLLM multiplies {', '.join(fused)} as one "
                    "layer. Export the artifact again with this lrserve"
                )
            return [spec]
        wrong = []
        for member, own in zip(fused, alone, strict=True):
            if own is not None and (own.members != (member,) or own.structure not in ("low_rank", "identity_block") or own.weights):
                rounded = f" in {own.weights}" if own.weights else ""
                wrong.append(f"{parent}.{member} as {own.structure} of {', '.join(own.members)}{rounded}")
        if wrong:
            raise ArtifactError(
                f"{name}: config.json lists {', '.join(wrong)}, but vLLM multiplies {', '.join(fused)} as one layer, of which a "
                "part is one linear, low_rank or identity_block, and not rounded. Export the artifact again with this lrserve"
            )
        return alone

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """Choose the method of one layer; None (vLLM's default) for what is not listed and no linear, such as embeddings."""
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

        if not isinstance(layer, LinearBase):
            return self._method_of_experts(layer, prefix)
        from lrserve.plugins.vllm.apart import PerShardMethod
        from lrserve.plugins.vllm.layers import LowRankLinearMethod, StockMethod

        specs = self.groups_of(prefix)
        if len(specs) > 1:
            return PerShardMethod(prefix, self.packed_modules_mapping[prefix.rpartition(".")[2]], specs)
        if specs[0] is None:
            return UnquantizedLinearMethod()
        if specs[0].structure == "experts":
            raise ArtifactError(f"{prefix}: config.json lists experts, vLLM has a linear layer there. Export the artifact again")
        return (StockMethod if specs[0].structure in ("dense", "narrow_out") else LowRankLinearMethod)(prefix, specs[0])

    def _method_of_experts(self, layer: nn.Module, prefix: str) -> Any:
        """Choose the method of a mixture of experts; None where it is dense, and for any other layer.

        Raises:
            ArtifactError: config.json lists another kind of layer there.
        """
        spec = self.groups.get(prefix.removeprefix(_DRAFT_PREFIX))
        if spec is None:
            return None
        from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

        from lrserve.plugins.vllm.experts import MixtureMethod

        if spec.structure != "experts" or not isinstance(layer, RoutedExperts):
            raise ArtifactError(
                f"{prefix}: config.json lists {spec.structure}, vLLM has {type(layer).__name__} there. Export the artifact again"
            )
        return MixtureMethod(prefix, spec, layer)
