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

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch

from exporters.onnx_linear import MICROSOFT, Nodes, Transform, side_by_side
from exporters.onnx_profiles import Positions, Profile, positions
from lrserve.compression.embedding import RoundedEmbedding
from lrserve.compression.groups import is_dense
from lrserve.errors import UnsupportedModelError
from lrserve.recipe import Dtype


@dataclass(frozen=True)
class _Family:
    """What an architecture's graph needs to be told; everything else is read off the model's own modules."""

    activation: str = "hidden_act"
    gemma: bool = False
    """Scaled embedding, RMSNorm by 1 + w, norms after attention and MLP as well as before, RoPE by layer type."""


_FAMILIES: Final[Mapping[str, _Family]] = {
    "LlamaForCausalLM": _Family(),
    "MistralForCausalLM": _Family(),
    "Qwen2ForCausalLM": _Family(),
    "Qwen3ForCausalLM": _Family(),
    "Gemma3ForCausalLM": _Family(activation="hidden_activation", gemma=True),
}

# config name -> (operator, domain, attributes). QuickGelu is x sigmoid(alpha x), so SiLU in one pass at alpha 1.
_ACTIVATIONS: Final[Mapping[str, tuple[str, str, Mapping[str, Any]]]] = {
    "silu": ("QuickGelu", MICROSOFT, {"alpha": 1.0}),
    "swish": ("QuickGelu", MICROSOFT, {"alpha": 1.0}),
    "gelu": ("Gelu", "", {"approximate": "none"}),
    "gelu_pytorch_tanh": ("Gelu", "", {"approximate": "tanh"}),
}

# RoPE types whose frequencies do not change with the length of the sequence, so that one table of cosines is exact.
_STATIC_ROPE: Final = ("default", "linear", "llama3", "yarn")

_LAYER_TYPES: Final = ("full_attention", "sliding_attention")


def build_graph(model: Any, profile: Profile = "genai", dtype: Dtype = "float32", *, last_logits: bool = False) -> Any:
    """Render a transformers causal LM, some of whose linears may be compressed, as an `onnx_ir.Model` in a number format.

    With `last_logits` the logits are (B, 1, V), of each sequence's last token: all that generation reads of a prompt.
    Weights are laid out one at a time when the graph is saved: until then the graph refers to the model's tensors.

    Raises:
        UnsupportedModelError: an architecture, layer or option that the graph would not render faithfully, by its name.
    """
    return _Builder(model, dtype).build(profile, last_logits)


def head_width(config: Any) -> int:
    """Width D of one attention head of a transformers config."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def check_renderable(model: Any, dtype: Dtype = "float32") -> None:
    """Refuse what `build_graph` would render wrongly.

    Raises:
        UnsupportedModelError: naming every such option of the model's config.
    """
    name, config = type(model).__name__, model.config
    if name not in _FAMILIES:
        raise UnsupportedModelError(
            f"the ONNX graph does not know {name}; it renders {', '.join(_FAMILIES)}. Export this model for vLLM only"
        )
    family, problems = _FAMILIES[name], []
    activation = getattr(config, family.activation, None)
    if activation not in _ACTIVATIONS:
        problems.append(f"{family.activation} {activation!r} (known: {', '.join(_ACTIVATIONS)})")
    for layer_type, rope in _rope_parameters(model).items():
        if rope.get("rope_type") not in _STATIC_ROPE:
            where = f" of {layer_type}" if layer_type else ""
            problems.append(f"rope_type {rope.get('rope_type')!r}{where} (known: {', '.join(_STATIC_ROPE)})")
    # Mistral keeps its window in the config alone and pays no attention to layer types.
    types = set(getattr(config, "layer_types", None) or ()) if name != "MistralForCausalLM" else set()
    problems += [f"layer type {kind!r}" for kind in sorted(types.difference(_LAYER_TYPES))]
    if getattr(config, "attn_logit_softcapping", None) is not None:
        problems.append("attn_logit_softcapping, which transformers and vLLM treat differently")
    if getattr(config, "use_bidirectional_attention", False) or not getattr(config, "is_causal", True):
        problems.append("attention that is not causal")
    if family.gemma and dtype == "float16":
        problems.append("Gemma in float16, where its activations overflow (engine.onnx_dtype: bfloat16)")
    if head_width(config) % 16:
        problems.append(f"head_dim {head_width(config)} (GroupQueryAttention wants a multiple of 16)")
    if problems:
        raise UnsupportedModelError(
            f"{name}: the ONNX graph does not render {'; '.join(problems)}. Export this model for vLLM only"
        )


def _rope_parameters(model: Any) -> dict[str, dict[str, Any]]:
    """RoPE parameters by layer type; by the empty string where all layers have the same."""
    rope = model.config.rope_parameters
    if not _FAMILIES[type(model).__name__].gemma:
        return {"": rope}
    return {kind: rope[kind] for kind in _LAYER_TYPES if kind in model.config.layer_types}


def _rotary_frequencies(model: Any, layer_type: str) -> tuple[torch.Tensor, float]:
    """Inverse frequencies (D / 2,) in float32 and the factor on cosine and sine, as the config defines them.

    Computed afresh, by the model's own functions: the buffers of a model that was cast as a whole (`model.bfloat16()`)
    are rounded, and stay so when it is cast back.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind = _rope_parameters(model)[layer_type]["rope_type"]
    compute = model.model.rotary_emb.compute_default_rope_parameters if kind == "default" else ROPE_INIT_FUNCTIONS[kind]
    frequencies, factor = compute(model.config, **({"layer_type": layer_type} if layer_type else {}))
    return frequencies.float().cpu(), float(factor)


def _window(model: Any, attention: Any) -> int:
    """Tokens, itself included, that a query of this layer sees; -1 for all of them."""
    if type(model).__name__ == "MistralForCausalLM":
        window = model.config.sliding_window
    else:
        window = getattr(attention, "sliding_window", None)
    return -1 if window is None else int(window)


def _plus_one(weight: torch.Tensor) -> torch.Tensor:
    return weight.float() + 1.0


class _Builder(Nodes):
    """The whole model's graph."""

    def __init__(self, model: Any, dtype: Dtype) -> None:
        check_renderable(model, dtype)
        super().__init__(model, dtype)
        self.model, self.config = model, model.config
        self.family = _FAMILIES[type(model).__name__]
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

    def norm_weight(self, module: Any, where: str) -> Any:
        return self.weight(module.weight, where, _plus_one if self.family.gemma else None, self.stream)

    def norm(self, x: Any, module: Any, where: str) -> Any:
        """Return the norm of a `wide` value, `wide` too."""
        epsilon = float(self.config.rms_norm_eps)
        return self.node("RMSNormalization", [x, self.norm_weight(module, where)], where, axis=-1, epsilon=epsilon)

    def add_norm(self, residual: Any, y: Any, module: Any, where: str, last: bool = False) -> tuple[Any, Any]:
        """Return residual + y, both `wide`, and its norm, `narrow`, in one pass over memory; no sum after the `last` norm."""
        weight, epsilon = self.norm_weight(module, where), float(self.config.rms_norm_eps)
        outputs = [self.ir.Value(name=where)]
        if not last:  # the second and third, mean and inverse variance, are for training
            outputs += [self.ir.Value(name=""), self.ir.Value(name=""), self.ir.Value(name=f"{where}.sum")]
        operator = "SkipSimplifiedLayerNormalization"
        self.node(operator, [residual, y, weight], where, domain=MICROSOFT, outputs=outputs, epsilon=epsilon)
        return None if last else outputs[3], self.narrow(outputs[0], where)

    def head_norm(self, x: Any, module: Any, where: str) -> Any:
        """Norm of every head on its own: (B, S, heads D) -> the same shape."""
        heads = self.constant("shape.heads", [0, 0, -1, self.head_dim], np.int64)
        flat = self.constant("shape.flat", [0, 0, -1], np.int64)
        split = self.wide(self.node("Reshape", [x, heads], f"{where}.split"), where)
        normed = self.narrow(self.norm(split, module, where), where)
        return self.node("Reshape", [normed, flat], f"{where}.join")

    def rotary_caches(self, layer_type: str) -> list[Any]:
        """Cosines and sines, (P, D / 2) each, of every position that the model was made for."""
        prefix = f"rotary.{layer_type}." if layer_type else "rotary."
        frequencies, factor = _rotary_frequencies(self.model, layer_type)
        if len(frequencies) * 2 != self.head_dim:
            raise UnsupportedModelError(
                f"RoPE turns {len(frequencies) * 2} of the {self.head_dim} dimensions of a head (partial rotation); "
                "the ONNX graph turns all of them. Export this model for vLLM only"
            )
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
        caches = self.rotary_caches(self.config.layer_types[index] if self.family.gemma else "")
        name = f"{where}.GroupQueryAttention"
        told = positions.attention(q, k, caches, _window(self.model, attention), where)
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
        modules = {name: getattr(attention, f"{name}_proj") for name in ("q", "k", "v")}
        normed = hasattr(attention, "q_norm")
        if packed and not normed and side_by_side(list(modules.values())):
            return self.linears(x, list(modules.values()), f"{where}.qkv_proj"), None, None
        q, k, v = (self.linear(x, module, f"{where}.{name}_proj") for name, module in modules.items())
        if normed:
            q = self.head_norm(q, attention.q_norm, f"{where}.q_norm")
            k = self.head_norm(k, attention.k_norm, f"{where}.k_norm")
        return q, k, v

    def mlp(self, x: Any, mlp: Any, where: str) -> Any:
        gate = self.linear(x, mlp.gate_proj, f"{where}.gate_proj")
        up = self.linear(x, mlp.up_proj, f"{where}.up_proj")
        operator, domain, attributes = _ACTIVATIONS[getattr(self.config, self.family.activation)]
        gate = self.node(operator, [gate], f"{where}.act", domain=domain, **attributes)
        return self.linear(self.node("Mul", [gate, up], f"{where}.Mul"), mlp.down_proj, f"{where}.down_proj")

    # -- the model ----------------------------------------------------------------------------------------------------

    def embed(self, ids: Any) -> Any:
        embedding, where = self.model.model.embed_tokens, "model.embed_tokens"
        rounded = isinstance(embedding, RoundedEmbedding)
        if rounded:
            x = self.rows(ids, embedding, where)
        else:
            x = self.node("Gather", [self.weight(embedding.weight, where), ids], where)
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
        told = positions(profile, self, ids, mask, heads)
        self.inputs += [ids, mask, *told.inputs]
        residual, y = self.wide(self.embed(ids), "model.embed_tokens"), None
        for index, layer in enumerate(self.model.model.layers):
            where = f"model.layers.{index}"
            before_mlp = "pre_feedforward_layernorm" if self.family.gemma else "post_attention_layernorm"
            if y is None:
                x = self.norm(residual, layer.input_layernorm, f"{where}.input_layernorm")
                x = self.narrow(x, f"{where}.input_layernorm")
            else:
                residual, x = self.add_norm(residual, y, layer.input_layernorm, f"{where}.input_layernorm")
            y = self.attention(x, index, told, f"{where}.self_attn")
            if self.family.gemma:
                y = self.wide(y, f"{where}.self_attn")
                y = self.norm(y, layer.post_attention_layernorm, f"{where}.post_attention_layernorm")
            residual, x = self.add_norm(residual, y, getattr(layer, before_mlp), f"{where}.{before_mlp}")
            y = self.mlp(x, layer.mlp, f"{where}.mlp")
            if self.family.gemma:
                y = self.wide(y, f"{where}.mlp")
                y = self.norm(y, layer.post_feedforward_layernorm, f"{where}.post_feedforward_layernorm")
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
