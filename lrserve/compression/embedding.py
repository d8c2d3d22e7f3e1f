"""A rounded embedding, and the output layer that may be the same weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lrserve.compression.layers import Matrix, RoundedLinear
from lrserve.compression.level import SCHEMES, Precision
from lrserve.compression.packing import dequantize, unpack_int4
from lrserve.compression.quantize import Rounded, quantize, round_to_nearest
from lrserve.compression.spec import weight_tensors


class RoundedEmbedding(Matrix):
    """Rows of a rounded weight (m, n) by their numbers: ids (...) -> (..., n).

    `scale` multiplies them, Gemma's, elsewhere 1; `embed_scale` is that in the dtype that the model computes in. `dense_module` is
    the embedding whose place this takes, with a weight on the meta device.
    """

    embed_scale: torch.Tensor

    def __init__(self, dense: Any, rounded: Rounded) -> None:
        super().__init__()
        weight = dense.weight
        self._hold(weight.shape[1], weight.shape[0], rounded.precision, weight.dtype, weight.device)
        self.put(rounded)
        self.scale = float(getattr(dense, "embed_scale", 1.0))
        self.register_buffer("embed_scale", torch.tensor(self.scale).to(weight), persistent=False)
        self._dense_module = (dense,)  # a tuple, so that torch does not register it
        dense.weight = nn.Parameter(weight.to("meta"), requires_grad=False)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self.embed_scale.fill_(self.scale)  # in whatever dtype it has become
        return self

    @property
    def dense_module(self) -> Any:
        """The embedding whose place this took."""
        return self._dense_module[0]

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Look rows up: ids (...) -> (..., n)."""
        assert self.weights is not None
        packed = SCHEMES[self.weights].group is not None
        rows = ids.flatten()
        values = unpack_int4(self.weight_packed[rows]) if packed else self.weight[rows]
        found = dequantize(values, self.weight_scale[rows].float()).to(self.embed_scale.dtype)
        return (found * self.embed_scale).view(*ids.shape, -1)

    def share(self, layer: RoundedLinear) -> None:
        """Let a linear of the same rounded weight hold the same tensors."""
        for name in weight_tensors(self.out_features, self.in_features, self.weights):
            setattr(layer, name, getattr(self, name))


@torch.no_grad()
def round_embedding(model: Any, precision: Precision, dtype: torch.dtype) -> None:
    """Round the embedding and the output layer of a causal LM, which stay one weight where they are one.

    Args:
        model: the causal LM.
        precision: whose groups divide the hidden width.
        dtype: in which scales of groups are stored.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied, layer = head.weight is embedding.weight, RoundedLinear.of(head, precision)
    rows = RoundedEmbedding(embedding, _rounded(embedding.weight, precision, dtype))
    if tied:
        rows.share(layer)
    else:
        layer.put(_rounded(head.weight, precision, dtype))
    model.set_input_embeddings(rows)
    model.set_output_embeddings(layer)


def _rounded(weight: torch.Tensor, precision: Precision, dtype: torch.dtype) -> Rounded:
    if SCHEMES[precision].bits < 8:  # whose scales are worth a search
        return quantize(weight, precision, dtype=dtype)
    return round_to_nearest(weight, precision, dtype)


@contextmanager
def rounded_values(model: Any, precision: Precision, dtype: torch.dtype) -> Iterator[None]:
    """Give the embedding and the output layer, which stay what they are, the values that rounding leaves; afterwards the old ones.

    Arguments are those of `round_embedding`.
    """
    parameters = {id(p): p for p in (model.get_input_embeddings().weight, model.get_output_embeddings().weight)}
    before = {key: parameter.detach().clone() for key, parameter in parameters.items()}
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.copy_(_rounded(parameter, precision, dtype).dense())
    try:
        yield
    finally:
        with torch.no_grad():
            for key, parameter in parameters.items():
                parameter.copy_(before[key])


@torch.no_grad()
def dequantize_embedding(model: Any) -> Any:
    """Let the embedding and the output layer be the floating point numbers that they stand for; returns the model, changed."""
    rows, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(rows, RoundedEmbedding):
        return model
    dtype, embedding = rows.embed_scale.dtype, rows.dense_module
    embedding.weight = nn.Parameter(rows.dense().to(dtype), requires_grad=False)
    layer = nn.Linear(head.in_features, head.out_features, head.bias is not None, device="meta")
    tied = head.weight_scale is rows.weight_scale
    layer.weight = embedding.weight if tied else nn.Parameter(head.dense().to(dtype), requires_grad=False)
    layer.bias = head.bias
    model.set_input_embeddings(embedding)
    model.set_output_embeddings(layer)
    return model
