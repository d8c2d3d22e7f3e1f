"""Attention of vLLM's CPU build in one call from Python a layer, instead of two. Imports vLLM.

A decode step on the CPU spends more time between the kernels of attention than in them: vLLM enters Python once a layer to put keys
and values into the cache and once more to attend, and each time cuts the cache into its halves anew. At one request that is an
eighth of a step of SmolLM2-135M (docs/performance.md). The backend here is vLLM's, with its metadata and its kernels; it does both
in one call, and cuts a layer's cache once. Where it takes the place of vLLM's is plugin.py's to say.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl


def _first(rows: torch.Tensor, count: int) -> torch.Tensor:
    """Return the first rows; slices that cut nothing off would be a tenth of a call."""
    return rows if rows.shape[0] == count else rows[:count]


class OneCallAttention(CPUAttentionBackendImpl):  # type: ignore[misc]
    """vLLM's attention of a decoder's layer, whose `forward` also stores the keys and values."""

    _cache: torch.Tensor | None = None
    _halves: tuple[torch.Tensor, ...] = ()
    """Keys and values of `_cache`, each (blocks, KV heads, tokens of a block, head size)."""

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
        if kv_cache is not self._cache:
            blocks, heads, tokens, _ = kv_cache.shape
            self._cache, self._halves = kv_cache, kv_cache.view(blocks, heads, 2 * tokens, -1).chunk(2, dim=2)
        keys, values = self._halves
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
