"""How an ONNX graph is told positions and padding: its profile.

`genai`: GroupQueryAttention takes both from the *lengths* of the sequences and turns queries and keys itself. That is the fastest
graph, and right where batches are padded on the right, as onnxruntime-genai pads them. The lengths cannot say that a batch is
padded on the left: one node fails then, on the CPU as on a GPU, and its name says what to do.

`portable`: position_ids (B, S) is an input, RotaryEmbedding turns by it, and GroupQueryAttention gets a mask as its attention
bias. Any padding is right, also that on the left, which transformers.js and optimum use. GroupQueryAttention's own input
position_ids does not do: in a prefill its kernel reads one number of it, the offset of all rows. Its CUDA kernel has no bias.

Notations are those of onnx_graph.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol

import numpy as np

Profile = Literal["genai", "portable"]

LEFT_PADDING: Final = "left padding: pad on the right, or export the portable profile (--onnx-profile portable)"
"""The name of the node that fails; ONNX Runtime's error quotes it."""

_HIDDEN: Final = -(2.0**15)
"""The bias of what is not seen: its softmax is 0, and float16 has it, with room for the score."""


@dataclass(frozen=True)
class Attention:
    """What one GroupQueryAttention is given besides values and caches: queries, keys, the inputs from seqlens_k on, attributes."""

    q: Any
    k: Any
    inputs: Sequence[Any]
    attributes: Mapping[str, Any]


class Positions(Protocol):
    """A profile's nodes in one graph.

    inputs: those of the graph, besides input_ids, attention_mask and the caches.
    packed: whether queries, keys and values may come as one: as q, and no k and v.
    """

    inputs: Sequence[Any]
    packed: bool

    def attention(self, q: Any, k: Any, rotary: Sequence[Any], window: int, where: str) -> Attention:
        """Prepare one layer's attention.

        Args:
            q: queries (B, S, heads D), not turned yet.
            k: keys (B, S, K D), not turned yet.
            rotary: cosines and sines of every position; empty where queries and keys are not turned.
            window: tokens, itself included, that a query sees; -1 for all of them.
            where: the layer's name.
        """


def positions(profile: Profile, nodes: Any, ids: Any, mask: Any, heads: tuple[int, int], width: int) -> Positions:
    """Append a profile's shared nodes to `nodes` (onnx_linear's `Nodes`).

    Args:
        profile: which.
        nodes: the graph in the making.
        ids: the input input_ids.
        mask: the input attention_mask.
        heads: number of heads of queries, and of keys.
        width: of a head.
    """
    return ByLengths(nodes, mask) if profile == "genai" else ByIds(nodes, ids, mask, heads, width)


class ByLengths:
    """The profile `genai`."""

    packed = True

    def __init__(self, nodes: Any, mask: Any) -> None:
        self.inputs: Sequence[Any] = []
        int32 = int(nodes.ir.DataType.INT32)
        zero, one = nodes.constant("zero", 0, np.int64), nodes.constant("one", [1], np.int64)
        tokens = nodes.node("ReduceSum", [mask, one], "mask.tokens", keepdims=0)
        first = nodes.node("Gather", [mask, zero], "mask.first", axis=1)
        least = nodes.node("ReduceMin", [first], "mask.first.least", keepdims=1)
        size = nodes.node("Add", [one, nodes.node("Sub", [one, least], "mask.padded")], "mask.size")
        # One element as one, or as two. Every provider reads shapes on the host and checks them there; on a GPU an index out of
        # range is no error. The result is used, so that no optimizer drops the node.
        checked = nodes.node("Reshape", [one, size], LEFT_PADDING, outputs=[nodes.ir.Value(name="mask.checked")])
        last = nodes.node("Cast", [nodes.node("Sub", [tokens, checked], "mask.last")], "seqlens_k", to=int32)
        self._lengths = [last, _total(nodes, mask)]

    def attention(self, q: Any, k: Any, rotary: Sequence[Any], window: int, where: str) -> Attention:
        """Leave all to GroupQueryAttention."""
        attributes = {"local_window_size": window, "do_rotary": int(bool(rotary)), "rotary_interleaved": 0}
        return Attention(q, k, [*self._lengths, *rotary], attributes)


class ByIds:
    """The profile `portable`."""

    packed = False

    def __init__(self, nodes: Any, ids: Any, mask: Any, heads: tuple[int, int], width: int) -> None:
        self._nodes, self._heads, self._width = nodes, heads, width
        int32, boolean = int(nodes.ir.DataType.INT32), int(nodes.ir.DataType.BOOL)
        self._ids = nodes.value("position_ids", ["batch_size", "sequence_length"], "INT64")
        self.inputs: Sequence[Any] = [self._ids]
        one = nodes.constant("one", [1], np.int64)
        total = nodes.node("Shape", [mask], "mask.columns", start=1, end=2)
        # Every row is as long as the mask is wide: the bias says what is padding.
        rows = nodes.node("Shape", [mask], "mask.rows", start=0, end=1)
        last = nodes.node("Expand", [nodes.node("Sub", [total, one], "mask.last"), rows], "mask.lasts")
        self._lengths = [nodes.node("Cast", [last], "seqlens_k", to=int32), _total(nodes, mask)]
        # Positions of keys (B, 1, 1, T) and of queries (B, 1, S, 1), from the mask: position_ids may begin at 1, as transformers.js
        # has it for Gemma, which turns queries and keys alike and would shift a window.
        counted = nodes.node("CumSum", [mask, nodes.constant("axis.columns", 1, np.int64)], "mask.counted")
        new = nodes.node("Shape", [ids], "ids.columns", start=1, end=2)
        past = nodes.node("Sub", [total, new], "mask.past")
        queries = nodes.node("Slice", [counted, past, total, one], "mask.counted.new")
        keys_axes, queries_axes = nodes.constant("axes.keys", [1, 2], np.int64), nodes.constant("axes.queries", [1, 3], np.int64)
        self._keys = nodes.node("Unsqueeze", [counted, keys_axes], "bias.keys")
        self._queries = nodes.node("Unsqueeze", [queries, queries_axes], "bias.queries")
        real = nodes.node("Unsqueeze", [nodes.node("Cast", [mask], "mask.real", to=boolean), keys_axes], "bias.real")
        before = nodes.node("LessOrEqual", [self._keys, self._queries], "bias.before")
        self._seen = nodes.node("And", [before, real], "bias.seen")
        self._biases: dict[int, Any] = {}

    def bias(self, window: int) -> Any:
        """Return what is added to the scores, (B, 1, S, T): 0 where a query sees a key, `_HIDDEN` elsewhere."""
        if window not in self._biases:
            nodes, seen, name = self._nodes, self._seen, "bias" if window < 0 else f"bias.window.{window}"
            if window >= 0:
                width = nodes.constant(f"{name}.width", window, np.int64)
                near = nodes.node(
                    "Greater", [self._keys, nodes.node("Sub", [self._queries, width], f"{name}.begin")], f"{name}.near"
                )
                seen = nodes.node("And", [seen, near], f"{name}.seen")
            # Finite, for a row that sees nothing, a token of padding, has a softmax too.
            self._biases[window] = nodes.node(
                "Where", [seen, nodes.number("bias.shown", 0.0), nodes.number("bias.hidden", _HIDDEN)], name
            )
        return self._biases[window]

    def attention(self, q: Any, k: Any, rotary: Sequence[Any], window: int, where: str) -> Attention:
        """Turn queries and keys by position_ids, and mask.

        The window counts positions, as the mask does, and not columns, as GroupQueryAttention would: onnxruntime-genai goes on
        behind a padded prompt, so that columns of padding lie between two tokens.
        """
        if rotary:
            turned = 2 * int(rotary[0].shape[1])
            part = {} if turned == self._width else {"rotary_embedding_dim": turned}
            q, k = (
                self._nodes.node(
                    "RotaryEmbedding", [x, *rotary, self._ids], f"{where}.{name}.rotary", num_heads=heads, interleaved=0, **part
                )
                for x, name, heads in ((q, "q", self._heads[0]), (k, "k", self._heads[1]))
            )
        inputs = [*self._lengths, None, None, None, self.bias(window)]
        return Attention(q, k, inputs, {"local_window_size": -1, "do_rotary": 0})


def _total(nodes: Any, mask: Any) -> Any:
    """Return T, the columns of the mask, as a scalar of int32."""
    width = nodes.node("Squeeze", [nodes.node("Shape", [mask], "mask.shape", start=1, end=2)], "mask.width")
    return nodes.node("Cast", [width], "total_sequence_length", to=int(nodes.ir.DataType.INT32))
