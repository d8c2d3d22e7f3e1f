"""Fused layers inside vLLM whose linears have factors each of their own, or are dense. Imports vLLM.

One multiplication gives every z and the dense outputs, and each B is one more. Nothing of these layers is rounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.linear import LinearMethodBase

from lrserve.compression.spec import GroupSpec
from lrserve.errors import ArtifactError
from lrserve.plugins.vllm.kernels import Factor
from lrserve.plugins.vllm.loading import (
    Loading,
    LoadingApart,
    LoadingDense,
    Slice,
    check_identity_block,
    is_dummy,
    require_complete,
    rows_of,
    sibling,
)


class PerShardMethod(LinearMethodBase):
    """A layer of several linears (`members`), each with factors of its own or, where its spec is None, dense.

    The first multiplication is by one stacked weight: every A_i (r_i, n), and the dense members' W_i. z_i goes through B_i; what
    the dense members give is an output already.
    """

    def __init__(self, prefix: str, members: Sequence[str], specs: Sequence[GroupSpec | None]) -> None:
        self.prefix, self.members, self.specs = prefix, tuple(members), tuple(specs)
        self._widths: list[int] = []
        """Of what the first multiplication gives for each member: r_i, or this rank's outputs."""
        self._dummy = False

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Hang the stacked first weight into the layer as `layer.A`, and each member's B (m_i, r_i) as `layer.B[i]`."""
        if len(output_partition_sizes) != len(self.specs):
            raise ArtifactError(
                f"{self.prefix}: config.json lists {', '.join(self.members)} one by one, vLLM's layer is made of "
                f"{len(output_partition_sizes)} linears. Export the artifact again"
            )
        rows = [rows_of(layer, index, size) for index, size in enumerate(output_partition_sizes)]
        self._widths = [own.length if spec is None else spec.rank for spec, own in zip(self.specs, rows, strict=True)]
        layer.A = Factor(input_size, sum(self._widths), bias=True, dtype=params_dtype)
        layer.A.bias.data.zero_()  # of what no dense member's bias is loaded into
        layer.B = nn.ModuleList()
        parts: list[Loading | LoadingDense] = []
        for index, (spec, own) in enumerate(zip(self.specs, rows, strict=True)):
            name, start = sibling(self.prefix, self.members[index]), sum(self._widths[:index])
            if spec is None:
                layer.B.append(nn.Identity())
                parts.append(LoadingDense(name, layer.A, own, start))
                continue
            check_identity_block(name, spec, input_size)
            layer.B.append(Factor(spec.rank, own.length, bias=True, dtype=params_dtype))
            parts.append(
                Loading(
                    prefix=name,
                    spec=spec,
                    first=layer.A,
                    second=layer.B[index],
                    columns=Slice(input_size, 0, input_size),
                    rows=[own],
                    first_row=start,
                    materialise=spec.structure == "identity_block",
                    order=torch.arange(input_size) if spec.ordered else None,
                )
            )
        self._loading = LoadingApart(self.prefix, parts)
        # vLLM renames q_proj.B.weight to qkv_proj.B.weight and finds the loader there; these parameters hold nothing.
        layer.A.weight.weight_loader = self._loading.load_first
        for holder, name, loader in (
            (layer.A, "order", self._loading.load_order),
            (layer.B, "weight", partial(self._loading.load_second, "weight")),
            (layer.B, "bias", partial(self._loading.load_second, "bias")),
            (layer, "weight", self._loading.load_dense),
        ):
            empty = nn.Parameter(torch.empty(0, dtype=params_dtype), requires_grad=False)
            empty.weight_loader = loader  # type: ignore[attr-defined]
            setattr(holder, name, empty)
        layer.weight_loader = self._loading.load_dense  # of the dense layer's own bias, which vLLM makes after this
        self._dummy = is_dummy(get_current_vllm_config_or_none())

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check that every tensor has come, and bring the weights into the kernels' layout.

        Raises:
            ArtifactError: a tensor is missing from the checkpoint, by name.
        """
        require_complete(self.prefix, self._loading.finish(biased=layer.bias is not None), dummy=self._dummy)
        if layer.bias is not None:
            layer.bias.data.zero_()  # see LowRankLinearMethod
        del layer.A.order, layer.B.weight, layer.B.bias
        layer.A.pack()
        for second in layer.B:
            if isinstance(second, Factor):
                second.pack()

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Multiply x (..., n) -> (..., m); `bias`, the dense layer's own, is part of A's or B's and ignored."""
        parts = layer.A.multiply(x).split_with_sizes(self._widths, -1)
        outputs = [
            second.multiply(part) if isinstance(second, Factor) else part for part, second in zip(parts, layer.B, strict=True)
        ]
        return torch.cat(outputs, -1)
