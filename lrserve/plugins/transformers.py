"""The transformers side of an artifact: `from_pretrained` builds compressed layers where config.json lists them.

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

from lrserve.compression.layers import FirstFactor, LowRankLinear, RoundedLinear, SharedResidual, exact_names
from lrserve.compression.lowrank import install_low_rank
from lrserve.compression.spec import QUANT_METHOD, is_permutation, parse_groups, quantization_config, stored_tensors
from lrserve.errors import ArtifactError

_OWN = (LowRankLinear, RoundedLinear, FirstFactor, SharedResidual)


class LrserveQuantizationConfig(QuantizationConfigMixin):
    """config.json's `quantization_config` as transformers holds it.

    Raises:
        ArtifactError: malformed, or of another format version.
    """

    def __init__(self, **entries: Any) -> None:
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]  # a registered name, like those of the enumeration
        self.groups = parse_groups(entries)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form, as docs/format.md has it."""
        return quantization_config(self.groups)


class LrserveQuantizer(HfQuantizer):
    """Puts compressed layers into the empty model, and refuses a checkpoint that does not fill them."""

    quantization_config: LrserveQuantizationConfig
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
        for module in model.modules():
            if isinstance(module, (LowRankLinear, RoundedLinear)):
                # transformers would initialise a linear layer's weight, which here is computed or made of integers
                module._is_hf_initialized = True  # type: ignore[assignment]
        _check_tensors(model, base, checkpoint_files or ())
        self._dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        # For a quantized model transformers keeps the checkpoint's dtype of every tensor whose name it had to adapt
        # (loading a base model from a causal LM's artifact), whatever `dtype` says.
        for name, parameter in model.named_parameters():
            if parameter.dtype != self._dtypes.get(name, parameter.dtype):
                parameter.data = parameter.data.to(self._dtypes[name])
        # Rounded weights keep their dtypes by themselves and the rest is ordinary parameters: transformers need not refuse float(),
        # half() and training.
        model.is_quantized = False
        return model

    def is_serializable(self) -> bool:
        """Say that `save_pretrained` works: it writes an artifact's config and tensors again."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Say that factors and scales can be trained: they are ordinary parameters."""
        return True


def _check_tensors(model: nn.Module, base: str, checkpoint_files: Iterable[str]) -> None:
    """Hold the model against the checkpoint: what is compressed must be there, shapes and dtypes fit, orders be permutations."""
    files = [Path(file) for file in checkpoint_files]
    for file in files:
        if file.suffix != ".safetensors":
            raise ArtifactError(f"{file}: an lrserve artifact keeps its tensors in safetensors files only")
    stored, stored_orders = stored_tensors(files)
    for name, order in stored_orders.items():
        if not is_permutation(order):
            raise ArtifactError(f"{name} is no permutation of the layer's inputs in int32. Export the artifact again")
    own, exact = set(_own_names(model)), exact_names(model)
    missing = []
    for name, tensor in model.state_dict().items():
        found = next((stored[key] for key in (name, base + name, name.removeprefix(base)) if key in stored), None)
        if found is None:
            if name in own:
                missing.append(name)
            continue
        if found.shape != tuple(tensor.shape):
            raise ArtifactError(
                f"{name} is {found.shape} in the checkpoint; config.json makes it {tuple(tensor.shape)}. Export the artifact again"
            )
        fits = found.dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)
        if not (found.dtype == tensor.dtype if name in exact or not tensor.is_floating_point() else fits):
            expected = tensor.dtype if name in exact or not tensor.is_floating_point() else "a floating point number"
            raise ArtifactError(
                f"{name} is {found.dtype} in the checkpoint; config.json makes it {expected}. Export the artifact again"
            )
    if missing:
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        raise ArtifactError(
            f"missing from the checkpoint: {', '.join(missing[:4])}{more}. The artifact is incomplete: run lrserve "
            "verify on it, or export it again"
        )


def _own_names(model: nn.Module) -> Iterable[str]:
    for name, module in model.named_modules():
        if isinstance(module, _OWN):
            yield from (f"{name}.{tensor}" for tensor in module.state_dict())


if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:  # a module that is loaded again must not register twice
    register_quantization_config(QUANT_METHOD)(LrserveQuantizationConfig)
    register_quantizer(QUANT_METHOD)(LrserveQuantizer)
