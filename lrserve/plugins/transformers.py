"""The transformers side of an artifact: `from_pretrained` builds low-rank layers where config.json lists them.

`import lrserve` registers this with transformers (lrserve/__init__.py). transformers itself fills a parameter that the
checkpoint lacks with random numbers and a warning, and for quantized models does not compare shapes; here both are
errors, found in the safetensors files before the weights are loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lrserve.compression.lowrank import (
    QUANT_METHOD,
    FirstFactor,
    IdentityBlock,
    LowRankLinear,
    install_low_rank,
    is_permutation,
    parse_groups,
    quantization_config,
    stored_tensors,
)
from lrserve.errors import ArtifactError


class LrserveQuantizationConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """config.json's `quantization_config` as transformers holds it.

    Raises:
        ArtifactError: malformed, or of another format version.
    """

    def __init__(self, **entries: Any) -> None:
        self.quant_method = QUANT_METHOD
        self.groups = parse_groups(entries)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form, as docs/format.md has it."""
        return quantization_config(self.groups)


class LrserveQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts `LowRankLinear` layers into the empty model, and refuses a checkpoint that does not fill them."""

    requires_calibration = True  # loads artifacts; does not make them

    def __init__(self, quantization_config: LrserveQuantizationConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._dtypes: dict[str, torch.dtype] = {}

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Sequence[str] | None = None, **kwargs: Any) -> Any:
        base = f"{model.base_model_prefix}."
        # Groups carry the causal LM's names; a base model (AutoModel) has no `model.` level.
        is_base = not hasattr(model, model.base_model_prefix)
        with torch.device("meta"):
            install_low_rank(model, self.quantization_config.groups, prefix=base if is_base else "")
        _check_tensors(model, base, checkpoint_files or ())
        self._dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        # For a quantized model transformers keeps the checkpoint's dtype of every tensor whose name it had to adapt
        # (loading a base model from a causal LM's artifact), whatever `dtype` says.
        for name, parameter in model.named_parameters():
            if parameter.dtype != self._dtypes.get(name, parameter.dtype):
                parameter.data = parameter.data.to(self._dtypes[name])
        return model

    def is_serializable(self) -> bool:
        """Say that `save_pretrained` works: it writes an artifact's config and tensors again."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Say that the factors can be trained: they are ordinary parameters."""
        return True


def _check_tensors(model: nn.Module, base: str, checkpoint_files: Iterable[str]) -> None:
    """Hold the model against the checkpoint: factors must be there, shapes must fit, orders must be permutations."""
    files = [Path(file) for file in checkpoint_files]
    for file in files:
        if file.suffix != ".safetensors":
            raise ArtifactError(f"{file}: an lrserve artifact keeps its tensors in safetensors files only")
    stored, stored_orders = stored_tensors(files)
    for name, order in stored_orders.items():
        if not is_permutation(order):
            raise ArtifactError(f"{name} is no permutation of the layer's inputs in int32. Export the artifact again")
    factors = set(_factor_names(model))
    missing = []
    orders = [
        (f"{name}.order", module.order)
        for name, module in model.named_modules()
        if isinstance(module, IdentityBlock) and module.order is not None
    ]
    for name, tensor in (*model.named_parameters(), *orders):
        shape = next((stored[key] for key in (name, base + name, name.removeprefix(base)) if key in stored), None)
        if shape is None:
            if name in factors:
                missing.append(name)
        elif shape != tuple(tensor.shape):
            raise ArtifactError(
                f"{name} is {shape} in the checkpoint; config.json makes it {tuple(tensor.shape)}. Export the artifact again"
            )
    if missing:
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        raise ArtifactError(
            f"missing from the checkpoint: {', '.join(missing[:4])}{more}. The artifact is incomplete: run lrserve "
            "verify on it, or export it again"
        )


def _factor_names(model: nn.Module) -> Iterable[str]:
    for name, module in model.named_modules():
        if isinstance(module, (LowRankLinear, FirstFactor)):
            yield from (f"{name}.{tensor}" for tensor in module.state_dict())


if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:  # a module that is loaded again must not register twice
    register_quantization_config(QUANT_METHOD)(LrserveQuantizationConfig)
    register_quantizer(QUANT_METHOD)(LrserveQuantizer)
