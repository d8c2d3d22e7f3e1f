"""vLLM's view of an artifact's `quantization_config`: which of the model's layers are low-rank. Imports vLLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from lrserve.compression.spec import QUANT_METHOD, GroupSpec, parse_groups
from lrserve.errors import ArtifactError, EngineError
from lrserve.plugins.versions import require_vllm

if TYPE_CHECKING:  # kernels, and what else the plugin need not load in every process
    from lrserve.plugins.vllm.kernels import Precision

_DRAFT_PREFIX = "draft_model."  # vLLM builds the draft model of speculative decoding under this name


class LrserveConfig(QuantizationConfig):
    """Gives every listed group a method of layers.py, and every other layer vLLM's own unquantized method."""

    def __init__(self, groups: Mapping[str, GroupSpec]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.groups = dict(groups)
        self._precision: Precision | None = None
        self._ignored: list[str] = []

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

    @property
    def online_quantization_config(self) -> None:
        """None: vLLM would put an online method in the place of whole layers, and knows no factors. See `precision_of`."""
        return None

    @online_quantization_config.setter
    def online_quantization_config(self, online: Any) -> None:
        """Take what `--quantization-config` asks for.

        Raises:
            EngineError: it asks for something else than int8 or fp8 by channels.
        """
        if online is None:
            return
        from vllm.model_executor.layers.quantization.utils.quant_utils import kFp8StaticChannelSym, kInt8StaticChannelSym

        known: dict[Any, Precision] = {kInt8StaticChannelSym: "int8", kFp8StaticChannelSym: "fp8"}
        spec = online.args.linear
        self._precision = known.get(spec.weight) if spec is not None and spec.activation is None else None
        if self._precision is None or online.args.targets is not None:
            raise EngineError(
                "lrserve quantizes factors to int8 or fp8 with one scale a row: --quantization-config takes "
                '{"linear": "int8_per_channel_static"} or {"linear": "fp8_per_channel_static"}, and "ignore" with names of layers'
            )
        self._ignored = list(online.args.ignore)

    def precision_of(self, prefix: str) -> Precision | None:
        """Return what a layer's weights are quantized to when they are loaded; None for not at all."""
        if self._precision is None:
            return None
        from vllm.model_executor.layers.quantization.compressed_tensors.utils import should_ignore_layer

        ignored = should_ignore_layer(prefix, ignore=self._ignored, fused_mapping=self.packed_modules_mapping, use_fnmatch=True)
        return None if ignored else self._precision

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
            if own is not None and (own.members != (member,) or own.structure not in ("low_rank", "identity_block")):
                wrong.append(f"{parent}.{member} as {own.structure} of {', '.join(own.members)}")
        if wrong:
            raise ArtifactError(
                f"{name}: config.json lists {', '.join(wrong)}, but vLLM multiplies {', '.join(fused)} as one layer, of which a "
                "part is one linear, low_rank or identity_block. Export the artifact again with this lrserve"
            )
        return alone

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """Choose the method of one layer; None (vLLM's default) for what is not a linear, such as embeddings."""
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

        if not isinstance(layer, LinearBase):
            return None
        from lrserve.plugins.vllm.layers import DenseMethod, FewerOutputsMethod, LowRankLinearMethod, PerShardMethod

        specs, precision = self.groups_of(prefix), self.precision_of(prefix)
        if len(specs) > 1:
            return PerShardMethod(prefix, self.packed_modules_mapping[prefix.rpartition(".")[2]], specs, precision)
        if specs[0] is None:
            return UnquantizedLinearMethod() if precision is None else DenseMethod(precision)
        return (FewerOutputsMethod if specs[0].structure == "narrow_out" else LowRankLinearMethod)(prefix, specs[0], precision)
