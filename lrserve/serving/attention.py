"""Attention of vLLM's CPU build with less Python. Imports vLLM.

A decode step on the CPU spends more time between the kernels of attention than in them: vLLM enters Python once a layer to put keys
and values into the cache and once more to attend, and each time cuts the cache into its halves anew. At one request that is an
eighth of a step of SmolLM2-135M (docs/performance.md). The backend here is vLLM's, with its metadata and its kernels; it does both
in one call, and cuts a layer's cache once. Where it takes the place of vLLM's is plugin.py's to say.

Most layers need no Python at all. What a layer attends by, its cache and the metadata of the forward pass, only Python can look up,
but it is there for all layers as soon as the first one asks. So when attention.cpp meets the first layer of a pass, Python hands it
what that one needs and those that came after it in earlier passes; each entry is used once. What has no entry goes through Python:
all but the first layer in the first pass of a model, trial runs, and all that is not a plain decoder's attention.
"""

from __future__ import annotations

import functools
import weakref
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, Final

import torch
from vllm.distributed.kv_transfer import has_kv_transfer_group
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import attention as vllms
from vllm.utils import torch_utils
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl

from lrserve.serving import native

_ARGUMENTS: Final = ["query", "key", "value", "output", "layer_name", "output_scale", "output_block_scale", "kv_cache_dummy_dep"]
"""Of vLLM's operation, as attention.cpp knows them."""


def _first(rows: torch.Tensor, count: int) -> torch.Tensor:
    """Return the first rows; slices that cut nothing off would be a tenth of a call."""
    return rows if rows.shape[0] == count else rows[:count]


class OneCallAttention(CPUAttentionBackendImpl):  # type: ignore[misc]
    """vLLM's attention of a decoder's layer, whose `forward` also stores the keys and values."""

    _cache: torch.Tensor | None = None
    _halves: tuple[torch.Tensor, ...] = ()
    """Keys and values of `_cache`, each (blocks, KV heads, tokens of a block, head size)."""
    followed: tuple[int, list[_Group]] = (0, [])
    """Of passes that begin with this layer: how many layers had metadata last time, and the groups of them."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        _install()

    def halves(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Cut a cache (blocks, KV heads, tokens of a block, 2 * head size) into its keys and values."""
        if kv_cache is not self._cache:
            blocks, heads, tokens, _ = kv_cache.shape
            self._cache, self._halves = kv_cache, kv_cache.view(blocks, heads, 2 * tokens, -1).chunk(2, dim=2)
        return self._halves

    @property
    def plain(self) -> bool:
        """Whether attention.cpp does what `forward` does: no scales of the cache, biases of positions or sinks."""
        if type(self).forward is not OneCallAttention.forward:
            return False
        own = self.attn_type == AttentionType.DECODER and self.kv_sharing_target_layer_name is None
        return own and self.kv_cache_dtype == "auto" and self.alibi_slopes is None and self.sinks is None

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend with query (tokens, heads, head size) and write `output`, of the same shape.

        key, value: (tokens, KV heads, head size), or None where the layer reads what another one has stored.
        kv_cache: (blocks, KV heads, tokens of a block, 2 * head size).
        """
        arguments = (layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale)
        encodes = self.attn_type in (AttentionType.ENCODER, AttentionType.ENCODER_ONLY)
        if attn_metadata is None or encodes:  # a trial run, or nothing to store
            return self._vllms(*arguments)
        keys, values = self.halves(kv_cache)
        now = attn_metadata.num_actual_tokens
        scales = layer._k_scale_float, layer._v_scale_float, self.kv_cache_dtype
        if key is not None and value is not None and self.kv_sharing_target_layer_name is None:
            slots = attn_metadata.slot_mapping
            stored = slots.shape[0]  # not `now`: a cross-attention stores the encoder's tokens
            key, value = _first(key, stored), _first(value, stored)
            torch.ops._C.cpu_attn_reshape_and_cache.default(key, value, keys, values, slots, layer.isa, *scales)
        if self.sinks is not None or output_scale is not None or output_block_scale is not None:
            return self._vllms(*arguments)
        torch.ops._C.cpu_attention_with_kv_cache.default(
            _first(query, now),
            keys,
            values,
            _first(output, now),
            attn_metadata.query_start_loc,
            attn_metadata.seq_lens,
            self.scale,
            attn_metadata.causal,
            self.alibi_slopes,
            self.sliding_window,
            attn_metadata.block_table,
            self.logits_soft_cap,
            attn_metadata.scheduler_metadata,
            None,
            attn_metadata.dynamic_causal,
            *scales,
        )
        return output

    def _vllms(self, *arguments: Any) -> torch.Tensor:
        output: torch.Tensor = super().forward(*arguments)
        return output


class OneCallBackend(CPUAttentionBackend):  # type: ignore[misc]
    """vLLM's CPU backend with `OneCallAttention`."""

    forward_includes_kv_cache_update = True

    @staticmethod
    def get_impl_cls() -> type[OneCallAttention]:
        """Return the class of the layers' `impl`."""
        return OneCallAttention


def _forget(_: object = None) -> None:
    """Drop the entries that are left: their pass is over. Called with its context's weak reference when that has died."""
    torch.ops.lrserve.attention_forget.default()


class _Group:
    """Layers that share one metadata in each pass, in the form in which attention.cpp keeps them."""

    def __init__(self, layers: Mapping[str, Any]) -> None:
        self._layers: list[tuple[str, Any, OneCallAttention, torch.Tensor]] = [
            (name, layer, layer.impl, layer.kv_cache) for name, layer in layers.items()
        ]
        self.first = self._layers[0][0]
        impls = [impl for _, _, impl, _ in self._layers]
        self.number = torch.ops.lrserve.attention_group(
            list(layers),
            *map(list, zip(*(impl.halves(cache) for _, _, impl, cache in self._layers), strict=True)),
            [impl.scale for impl in impls],
            [impl.logits_soft_cap for impl in impls],
            [impl.sliding_window for impl in impls],
            [layer.isa for layer in layers.values()],
        )
        weakref.finalize(self, torch.ops.lrserve.attention_drop, self.number).atexit = False

    def stands(self, layers: Mapping[str, Any], by_layer: Mapping[str, Any]) -> bool:
        """Whether these are still the layers, with the caches that they had, and still share their metadata."""
        metadata = by_layer.get(self.first)
        return metadata is not None and all(
            layer.impl is impl and layer.kv_cache is cache and layers.get(name) is layer and by_layer.get(name) is metadata
            for name, layer, impl, cache in self._layers
        )


class _Passes:
    """Knows which layers a forward pass has that begins with a given one, and hands attention.cpp what they need."""

    def __init__(self) -> None:
        self._under_way: weakref.ref[Any] | None = None
        """vLLM's context of the forward pass, which is another object in each."""
        self._first = ""
        self._layers: defaultdict[str, dict[str, None]] = defaultdict(dict)
        """Names of layers by that of the first one: there may be a draft model as well, or another engine."""

    def enter(self, name: str, rows: int) -> None:
        """Note that a layer attends for which attention.cpp has no entry; if it is the first of a pass, hand over what there is."""
        context: Any = get_forward_context()
        before = None if self._under_way is None else self._under_way()
        if before is not context:
            if before is not None:
                _forget()  # what a pass has left that was broken off, and whose context somebody keeps
            self._under_way, self._first = weakref.ref(context, _forget), name
            self._layers[name][name] = None
            self._hand_over(context, rows)
        else:
            self._layers[self._first][name] = None

    def _hand_over(self, context: Any, rows: int) -> None:
        layers, by_layer = context.no_compile_layers, context.attn_metadata
        names = self._layers[self._first]
        impl = layers[self._first].impl
        if not isinstance(by_layer, dict) or not isinstance(impl, OneCallAttention) or has_kv_transfer_group():
            return
        known, groups = impl.followed
        present = len(names.keys() & by_layer.keys())
        if known != present or not all(group.stands(layers, by_layer) for group in groups):
            groups = _groups_of(names, layers, by_layer)
            impl.followed = present, groups
        for group in groups:
            metadata = by_layer[group.first]
            if metadata.scheduler_metadata is not None and metadata.dynamic_causal is None:
                torch.ops.lrserve.attention_pass.default(
                    group.number,
                    metadata.query_start_loc,
                    metadata.seq_lens,
                    metadata.block_table,
                    metadata.slot_mapping,
                    metadata.scheduler_metadata,
                    metadata.num_actual_tokens,
                    rows,
                    metadata.causal,
                )


def _groups_of(names: Iterable[str], layers: Mapping[str, Any], by_layer: Mapping[str, Any]) -> list[_Group]:
    """Group those of the layers that need no Python by their metadata."""
    by_metadata: defaultdict[int, dict[str, Any]] = defaultdict(dict)
    for name in names:
        layer: Any = layers.get(name)
        metadata = by_layer.get(name)
        if layer is None or metadata is None or not isinstance(layer.impl, OneCallAttention):
            continue
        if layer.impl.plain and layer.kv_sharing_target_layer_name is None and hasattr(layer, "isa"):
            by_metadata[id(metadata)][name] = layer
    return [_Group(members) for members in by_metadata.values()]


_passes = _Passes()


@functools.cache
def _install() -> None:
    """Put attention.cpp in the place of vLLM's operation, if it has the arguments known here and layers' names are strings."""
    schema = torch.ops.vllm.unified_attention_with_output.default._schema
    if torch_utils._USE_LAYERNAME or [x.name for x in schema.arguments] != _ARGUMENTS:
        return
    torch.library.define("lrserve::attention_in_python", str(schema)[str(schema).index("(") :])
    torch.library.impl("lrserve::attention_in_python", "CPU", vllms.unified_attention_with_output)
    torch.library.define("lrserve::attention_enter", "(str layer_name, int rows) -> ()")
    torch.library.impl("lrserve::attention_enter", "CompositeExplicitAutograd", _passes.enter)
    native.load(native.ATTENTION, (), "attention goes through Python instead")
