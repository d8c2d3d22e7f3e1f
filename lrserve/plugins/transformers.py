"""The transformers side of an artifact: `from_pretrained` builds compressed layers where config.json lists them.

`import lrserve` registers this with transformers (lrserve/__init__.py). transformers itself fills a parameter that the
checkpoint lacks with random numbers and a warning, and for quantized models does not compare shapes; here both are
errors, found in the safetensors files before the weights are loaded.

Where nobody has imported lrserve, transformers passes over a `quantization_config` whose method it does not know, and would build
the dense model of random numbers. So an artifact's config.json names a file with weights that cannot be (`spec.NEEDS_LRSERVE`), at
which transformers stops. The quantizer takes that entry away first.
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

from lrserve.compression.layers import LowRankLinear, RoundedLinear
from lrserve.compression.lowrank import install_low_rank
from lrserve.compression.spec import QUANT_METHOD, WEIGHTS_ENTRY, parse_groups, quantization_config
from lrserve.compression.stored import read_headers, tensor_faults
from lrserve.errors import ArtifactError, listed
from lrserve.storage.store import check_files


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

    def update_tp_plan(self, config: Any) -> Any:
        """Take from the config what stops a program without lrserve; transformers looks for the weights after this."""
        if hasattr(config, WEIGHTS_ENTRY):
            delattr(config, WEIGHTS_ENTRY)
        return config

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
        _check_checkpoint(model, checkpoint_files or ())
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


def _check_checkpoint(model: nn.Module, checkpoint_files: Iterable[str]) -> None:
    """Hold the files against their manifest, if they have one, and their tensors against the model."""
    files = [Path(file) for file in checkpoint_files]
    for file in files:
        if file.suffix != ".safetensors":
            raise ArtifactError(f"{file}: an lrserve artifact keeps its tensors in safetensors files only")
    for folder in sorted({file.parent for file in files}):
        check_files(folder)
    if faults := tensor_faults(model, read_headers(files)):
        raise ArtifactError(f"{files[0].parent}: {listed(faults)}; run lrserve verify on it, copy it or export it again")


if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:  # a module that is loaded again must not register twice
    register_quantization_config(QUANT_METHOD)(LrserveQuantizationConfig)
    register_quantizer(QUANT_METHOD)(LrserveQuantizer)
