"""The compressed model as an ONNX graph, built node by node with onnx_ir: no tracing, seconds instead of minutes.

Notations. B sequences, S new tokens, T = past + S tokens, H hidden width, K key/value heads of width D, V vocabulary,
P = max_position_embeddings. Activations are (B, S, H). Linear layers are those of onnx_linear.py; q, k and v are one product
where attention takes them as one and the plan made the same of all three.

Inputs: input_ids (B, S) and attention_mask (B, T), int64; past_key_values.i.key and .value (B, K, T - S, D).
Outputs: logits (B, S, V), float32; present.i.key and .value (B, K, T, D). Caches are in the graph's number format.

Attention is ONNX Runtime's GroupQueryAttention. What it is told of positions and padding is the graph's profile
(onnx_profiles.py); the profile `portable` has the input position_ids (B, S), int64, as well.

Where values are float16 or bfloat16, norms add squares up in float32, by their operators' definition. Gemma's residual stream is
float32 then, and so are its norms: it was trained with weights 1 + w in float32, and adds up large numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from exporters.onnx_families import ACTIVATIONS, FAMILIES, check_renderable, head_width, rotary_frequencies, window
from exporters.onnx_linear import MICROSOFT, Nodes, Transform, side_by_side
from exporters.onnx_profiles import Positions, Profile, positions
from lrserve.compression.embedding import RoundedEmbedding
from lrserve.compression.groups import FAMILIES as LINEARS
from lrserve.compression.groups import is_dense
from lrserve.errors import UnsupportedModelError
from lrserve.recipe import Dtype


def build_graph(model: Any, profile: Profile = "genai", dtype: Dtype = "float32", *, last_logits: bool = False) -> Any:
    """Render a transformers causal LM, some of whose linears may be compressed, as an `onnx_ir.Model` in a number format.

    With `last_logits` the logits are (B, 1, V), of each sequence's last token: all that generation reads of a prompt.
    Weights are laid out one at a time when the graph is saved: until then the graph refers to the model's tensors.

    Raises:
        UnsupportedModelError: an architecture, layer or option that the graph would not render faithfully, by its name.
    """
    return _Builder(model, dtype).build(profile, last_logits)


def _plus_one(weight: torch.Tensor) -> torch.Tensor:
    return weight.float() + 1.0


class _Builder(Nodes):
    """The whole model's graph."""

    def __init__(self, model: Any, dtype: Dtype) -> None:
        check_renderable(model, dtype)
        super().__init__(model, dtype)
        self.model, self.config = model, model.config
        self.family = FAMILIES[type(model).__name__]
        self.groups = LINEARS[type(model).__name__].groups
        self.stream = "FLOAT" if self.family.gemma else self.real
        """Type of the residual stream."""
        self.head_dim = head_width(self.config)
        self.inputs: list[Any] = []
        self.presents: list[Any] = []

    # -- layers -------------------------------------------------------------------------------------------------------

    def wide(self, x: Any, where: str) -> Any:
        """Convert a value to the type of the residual stream."""
        return x if self.stream == self.real else self.cast(x, f"{where}.wide", self.stream)

    def narrow(self, x: Any, where: str) -> Any:
        """Convert it back."""
        return x if self.stream == self.real else self.cast(x, f"{where}.narrow", self.real)

    def norm_weights(self, module: Any, where: str) -> list[Any]:
        """Return a norm's weight and, of a LayerNorm, its bias."""
        weight = self.weight(module.weight, where, _plus_one if self.family.gemma else None, self.stream)
        return [weight, self.weight(module.bias, where, None, self.stream)] if isinstance(module, nn.LayerNorm) else [weight]

    def epsilon(self, module: Any) -> float:
        return float(module.eps if isinstance(module, nn.LayerNorm) else self.config.rms_norm_eps)

    def norm(self, x: Any, module: Any, where: str) -> Any:
        """Return the norm of a `wide` value, `wide` too."""
        operator = "LayerNormalization" if isinstance(module, nn.LayerNorm) else "RMSNormalization"
        return self.node(operator, [x, *self.norm_weights(module, where)], where, axis=-1, epsilon=self.epsilon(module))

    def add_norm(self, residual: Any, y: Any, module: Any, where: str, last: bool = False) -> tuple[Any, Any]:
        """Return residual + y, both `wide`, and its norm, `narrow`, in one pass over memory; no sum after the `last` norm."""
        outputs = [self.ir.Value(name=where)]
        if not last:  # the second and third, mean and inverse variance, are for training
            outputs += [self.ir.Value(name=""), self.ir.Value(name=""), self.ir.Value(name=f"{where}.sum")]
        operator = "SkipLayerNormalization" if isinstance(module, nn.LayerNorm) else "SkipSimplifiedLayerNormalization"
        inputs = [residual, y, *self.norm_weights(module, where)]
        self.node(operator, inputs, where, domain=MICROSOFT, outputs=outputs, epsilon=self.epsilon(module))
        return None if last else outputs[3], self.narrow(outputs[0], where)

    def before(self, residual: Any, y: Any, layer: Any, name: str | None, where: str, part: str) -> tuple[Any, Any]:
        """Return the residual stream with y added, if there is one yet, and what a part of the layer reads: the norm, if any."""
        module = layer.get_submodule(name) if name else None
        if module is not None and y is not None:
            return self.add_norm(residual, y, module, f"{where}.{name}")
        if y is not None:
            residual = self.node("Add", [residual, y], f"{where}.{part}.residual")
        x = residual if module is None else self.norm(residual, module, f"{where}.{name}")
        return residual, self.narrow(x, f"{where}.{name or part}")

    def after(self, y: Any, layer: Any, name: str | None, where: str, part: str) -> Any:
        """Return what is added to the residual stream, `wide`, given a part's output."""
        y = self.wide(y, f"{where}.{part}")
        if name:
            y = self.norm(y, layer.get_submodule(name), f"{where}.{name}")
        if self.family.multipliers:
            y = self.node("Mul", [y, self.number("residual_multiplier", layer.residual_multiplier)], f"{where}.{part}.scaled")
        return y

    def side_norm(self, x: Any, module: Any, where: str) -> Any:
        """Norm of queries or keys (B, S, heads D), of every head on its own if the norm is as wide as one head."""
        width = int(module.weight.shape[0])
        if width != self.head_dim:
            return self.narrow(self.norm(self.wide(x, where), module, where), where)
        heads = self.constant("shape.heads", [0, 0, -1, self.head_dim], np.int64)
        flat = self.constant("shape.flat", [0, 0, -1], np.int64)
        split = self.wide(self.node("Reshape", [x, heads], f"{where}.split"), where)
        normed = self.narrow(self.norm(split, module, where), where)
        return self.node("Reshape", [normed, flat], f"{where}.join")

    def split(self, x: Any, widths: Sequence[int], where: str) -> list[Any]:
        """Split x (B, S, n) into neighbouring parts."""
        sizes = self.constant(f"split.{'.'.join(map(str, widths))}", widths, np.int64)
        outputs = [self.ir.Value(name=f"{where}.{part}") for part in range(len(widths))]
        self.node("Split", [x, sizes], f"{where}.Split", outputs=outputs, axis=-1)
        return outputs

    def rotary_caches(self, layer_type: str) -> list[Any]:
        """Cosines and sines, (P, d / 2) each, of every position that the model was made for; d dimensions of a head are turned."""
        prefix = f"rotary.{layer_type}." if layer_type else "rotary."
        frequencies, factor = rotary_frequencies(self.model, layer_type)
        length = int(self.config.max_position_embeddings)

        def table(function: Transform) -> Callable[[], torch.Tensor]:
            return lambda: function(torch.outer(torch.arange(length, dtype=torch.float32), frequencies)) * factor

        shape = (length, len(frequencies))
        return [self.lazy(f"{prefix}cos", shape, table(torch.cos)), self.lazy(f"{prefix}sin", shape, table(torch.sin))]

    def attention(self, x: Any, index: int, positions: Positions, where: str) -> Any:
        attention = self.model.model.layers[index].self_attn
        q, k, v = self.queries_keys_values(x, attention, positions.packed, where)
        heads = int(self.config.num_key_value_heads)
        past, present = (
            [self.value(f"{kind}.{index}.{part}", ["batch_size", heads, length, self.head_dim]) for part in ("key", "value")]
            for kind, length in (("past_key_values", "past_sequence_length"), ("present", "total_sequence_length"))
        )
        self.inputs += past
        self.presents += present
        turned = getattr(attention, "use_rope", True)  # a layer of SmolLM3 may turn nothing
        caches = self.rotary_caches(self.config.layer_types[index] if self.family.gemma else "") if turned else []
        name = f"{where}.GroupQueryAttention"
        told = positions.attention(q, k, caches, window(self.model, attention), where)
        y = self.node(
            "GroupQueryAttention",
            [told.q, told.k, v, *past, *told.inputs],
            name,
            domain=MICROSOFT,
            outputs=[self.ir.Value(name=name), *present],
            num_heads=int(self.config.num_attention_heads),
            kv_num_heads=heads,
            scale=float(attention.scaling),
            **told.attributes,
        )
        return self.linear(y, attention.o_proj, f"{where}.o_proj")

    def queries_keys_values(self, x: Any, attention: Any, packed: bool, where: str) -> tuple[Any, Any, Any]:
        """Return q, k and v or, where they may be `packed` and can be, all three as one and no others."""
        modules = {name.rpartition(".")[2]: attention.get_submodule(name.rpartition(".")[2]) for name in self.groups["qkv"].members}
        normed = hasattr(attention, "q_norm")
        if packed and not normed and side_by_side(list(modules.values())):
            return self.linears(x, list(modules.values()), f"{where}.qkv_proj"), None, None
        parts = [self.linear(x, module, f"{where}.{name}") for name, module in modules.items()]
        if len(parts) == 1:
            queries, keys = (int(self.config.num_attention_heads), int(self.config.num_key_value_heads))
            parts = self.split(parts[0], [heads * self.head_dim for heads in (queries, keys, keys)], f"{where}.qkv_proj")
        q, k, v = parts
        if normed:
            q = self.side_norm(q, attention.q_norm, f"{where}.q_norm")
            k = self.side_norm(k, attention.k_norm, f"{where}.k_norm")
        return q, k, v

    def mlp(self, x: Any, layer: Any, where: str) -> Any:
        """Return down(act(gate x) * up x), or down(act(up x)) of a plain MLP."""
        names = self.groups["gate_up"]
        parts = [self.linear(x, layer.get_submodule(name), f"{where}.{name}") for name in names.members]
        if names.stacked > 1:
            rows = layer.get_submodule(names.members[0]).out_features // names.stacked
            parts = self.split(parts[0], [rows] * names.stacked, f"{where}.{names.fused}")
        operator, domain, attributes = ACTIVATIONS[getattr(self.config, self.family.activation)]
        y = self.node(operator, [parts[0]], f"{where}.mlp.act", domain=domain, **attributes)
        if len(parts) > 1:
            y = self.node("Mul", [y, parts[1]], f"{where}.mlp.Mul")
        [down] = self.groups["down"].members
        return self.linear(y, layer.get_submodule(down), f"{where}.{down}")

    # -- the model ----------------------------------------------------------------------------------------------------

    def embed(self, ids: Any) -> Any:
        embedding, where = self.model.model.embed_tokens, "model.embed_tokens"
        rounded = isinstance(embedding, RoundedEmbedding)
        if rounded:
            x = self.rows(ids, embedding, where)
        else:
            x = self.node("Gather", [self.weight(embedding.weight, where), ids], where)
        if self.family.multipliers:
            return self.node("Mul", [x, self.number("embedding_multiplier", self.config.embedding_multiplier)], f"{where}.scaled")
        if not self.family.gemma:
            return x
        scale = embedding.scale if rounded else float(embedding.embed_scale)
        return self.node("Mul", [x, self.number("embed_scale", scale)], "model.embed_tokens.scaled")

    def last_tokens(self, x: Any, ids: Any, mask: Any) -> Any:
        """Take of (B, S, H) each sequence's last token that is not padding, on whichever side that is: (B, 1, H)."""
        where, axis = "logits.last", self.constant("axis.1", [1], np.int64)
        new = self.node("Neg", [self.node("Shape", [ids], f"{where}.Shape", start=1, end=2)], f"{where}.Neg")
        end = self.constant("end", [np.iinfo(np.int64).max], np.int64)
        present = self.node("Slice", [mask, new, end, axis], f"{where}.Slice")
        index = self.node("ArgMax", [present], f"{where}.ArgMax", axis=1, keepdims=1, select_last_index=1)
        return self.node("GatherND", [x, self.node("Unsqueeze", [index, axis], f"{where}.Unsqueeze")], where, batch_dims=1)

    def head(self, x: Any) -> Any:
        head, embedding = self.model.lm_head, self.model.model.embed_tokens
        if is_dense(head) and head.weight is getattr(embedding, "weight", None):  # one matrix for both ends, stored once
            tied = self.weight(embedding.weight, "model.embed_tokens")
            # ONNX Runtime transposes once, when it loads the graph, and packs the result for its kernel.
            x = self.node("MatMul", [x, self.node("Transpose", [tied], "lm_head.Transpose", perm=[1, 0])], "lm_head.MatMul")
        else:
            x = self.linear(x, head, "lm_head")
        x = self.cast(x, "lm_head.Cast", "FLOAT")
        if self.family.multipliers:
            x = self.node("Div", [x, self.constant("logits_scaling", self.config.logits_scaling, np.float32)], "lm_head.scaled")
        cap = getattr(self.config, "final_logit_softcapping", None) if self.family.gemma else None
        if cap is not None:
            limit = self.constant("final_logit_softcapping", cap, np.float32)
            x = self.node("Tanh", [self.node("Div", [x, limit], "softcap.Div")], "softcap.Tanh")
            x = self.node("Mul", [x, limit], "softcap.Mul")
        return x

    def build(self, profile: Profile, last_logits: bool) -> Any:
        ids = self.value("input_ids", ["batch_size", "sequence_length"], "INT64")
        mask = self.value("attention_mask", ["batch_size", "total_sequence_length"], "INT64")
        heads = (int(self.config.num_attention_heads), int(self.config.num_key_value_heads))
        told = positions(profile, self, ids, mask, heads, self.head_dim)
        self.inputs += [ids, mask, *told.inputs]
        residual, y, norms = self.wide(self.embed(ids), "model.embed_tokens"), None, self.family.norms
        for index, layer in enumerate(self.model.model.layers):
            where = f"model.layers.{index}"
            residual, x = self.before(residual, y, layer, norms.before_attention, where, "self_attn")
            y = self.attention(x, index, told, f"{where}.self_attn")
            y = self.after(y, layer, norms.after_attention, where, "self_attn")
            residual, x = self.before(residual, y, layer, norms.before_mlp, where, "mlp")
            y = self.after(self.mlp(x, layer, where), layer, norms.after_mlp, where, "mlp")
        _, x = self.add_norm(residual, y, self.model.model.norm, "model.norm", last=True)
        logits = self.head(self.last_tokens(x, ids, mask) if last_logits else x)
        logits.name, logits.type = "logits", self.ir.TensorType(self.ir.DataType.FLOAT)
        logits.shape = self.ir.Shape(["batch_size", 1 if last_logits else "sequence_length", int(self.config.vocab_size)])
        self.check_complete()
        return self.finish(self.inputs, [logits, *self.presents])

    def check_complete(self) -> None:
        """Refuse a model with a parameter that no node reads: the graph would compute something else."""
        unread = sorted(name for key, name in self.parameters.items() if key not in self.read)
        if unread:
            raise UnsupportedModelError(
                f"the ONNX graph of {type(self.model).__name__} has no place for {len(unread)} of its parameters: "
                f"{', '.join(unread[:5])}{', ...' if len(unread) > 5 else ''}. Export this model for vLLM only"
            )
