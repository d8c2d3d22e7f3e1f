"""Attention without Python, held against the same layers through Python: outputs and caches, pass by pass.

Names of layers have to be strings, which vLLM decides when it is imported. So the checks run in a process of their own.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.engine

HEADS, KV_HEADS, SIZE, BLOCK, BLOCKS = 4, 2, 64, 32, 4


def test_layers_that_attend_without_python_do_what_they_do_through_it() -> None:
    script = f"import {Path(__file__).stem} as checks; checks.run()"
    environment = {**os.environ, "VLLM_USE_LAYERNAME": "0", "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def run() -> None:
    """Run every check, each with layers of its own."""
    for name, check in list(globals().items()):
        if name.startswith("check_"):
            print(name)
            check()


@dataclass
class Layer:
    """What vLLM's context knows a layer by."""

    impl: Any
    kv_cache: torch.Tensor
    isa: str
    kv_sharing_target_layer_name: str | None = None
    _k_scale_float: float = 1.0
    _v_scale_float: float = 1.0


def layer(scale: float = 0.125, window: int | None = None, **options: Any) -> Layer:
    from vllm.v1.attention.backends import cpu_attn

    from lrserve.serving.attention import OneCallAttention

    cpu_attn.get_current_vllm_config = lambda: SimpleNamespace(model_config=SimpleNamespace(dtype=torch.float32))
    impl = OneCallAttention(HEADS, SIZE, scale, KV_HEADS, None, window, "auto", **options)
    isa = cpu_attn._get_attn_isa(torch.float32, BLOCK, SIZE, "auto")
    return Layer(impl, torch.zeros(BLOCKS, KV_HEADS, BLOCK, 2 * SIZE), isa)


def metadata(lengths: Sequence[int], window: int = -1) -> Any:
    """One new token for each request; request i has block i to itself."""
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadata, _get_attn_isa

    number = len(lengths)
    starts, seq_lens = torch.arange(number + 1, dtype=torch.int32), torch.tensor(lengths, dtype=torch.int32)
    schedule = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=number,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=SIZE,
        seq_lens=seq_lens,
        dtype=torch.float32,
        query_start_loc=starts,
        causal=True,
        sliding_window_size=window,
        isa=_get_attn_isa(torch.float32, BLOCK, SIZE, "auto"),
        enable_kv_split=False,
    )
    slots = torch.tensor([BLOCK * i + length - 1 for i, length in enumerate(lengths)])
    table = torch.arange(number, dtype=torch.int32)[:, None]
    return CPUAttentionMetadata(number, 1, starts, max(lengths), seq_lens, table, slots, schedule)


class Model:
    """Layers, and the same ones again whose caches are filled through Python only."""

    def __init__(self, layers: dict[str, Layer]) -> None:
        self.layers = layers
        self.reference = {name: Layer(own.impl, own.kv_cache.clone(), own.isa) for name, own in layers.items()}

    def attend(self, by_layer: dict[str, Any] | None, rows: int, names: Sequence[str] | None = None) -> int:
        """Pass once through the layers, or the first of them; check outputs and caches; return how many needed no Python."""
        from vllm.forward_context import ForwardContext, override_forward_context

        before = torch.ops.lrserve.attention_count()
        names = list(self.layers) if names is None else names
        inputs = {name: [torch.randn(rows, heads, SIZE) for heads in (HEADS, KV_HEADS, KV_HEADS)] for name in names}
        outputs = {}
        context = ForwardContext(no_compile_layers=self.layers, attn_metadata=by_layer, slot_mapping={})
        with override_forward_context(context):
            for name in names:
                outputs[name] = torch.full((rows, HEADS, SIZE), 7.0)
                torch.ops.vllm.unified_attention_with_output(*inputs[name], outputs[name], name)
        for name in names:
            expected, other = torch.full((rows, HEADS, SIZE), 7.0), self.reference[name]
            now = None if by_layer is None else by_layer[name]
            other.impl.forward(other, *inputs[name], other.kv_cache, now, expected)
            assert torch.equal(outputs[name], expected), name
            assert torch.equal(self.layers[name].kv_cache, other.kv_cache), name
        return int(torch.ops.lrserve.attention_count()) - before


def same(model: Model, of_all: Any) -> dict[str, Any]:
    return dict.fromkeys(model.layers, of_all)


def check_layers_need_no_python_from_the_second_pass_on() -> None:
    model = Model({name: layer() for name in ("a0", "a1", "a2")})
    assert [model.attend(same(model, metadata([5 + i, 3 + i])), 2) for i in range(4)] == [1, 3, 3, 3]
    assert model.attend(same(model, metadata([9])), 1) == 3  # fewer requests


def check_layers_with_metadata_and_windows_of_their_own() -> None:
    model = Model({"b0": layer(), "b1": layer(window=4), "b2": layer(scale=0.5, logits_soft_cap=2.0), "b3": layer(window=4)})
    for i, expected in enumerate((1, 4, 4)):
        everywhere, near = metadata([20 + i, 7 + i]), metadata([20 + i, 7 + i], window=3)
        assert model.attend({"b0": everywhere, "b1": near, "b2": everywhere, "b3": near}, 2) == expected


def check_rows_that_are_padding_are_left_alone() -> None:
    model = Model({name: layer() for name in ("c0", "c1")})
    assert [model.attend(same(model, metadata([5 + i, 3 + i])), 4) for i in range(2)] == [1, 2]


def check_what_a_pass_has_left_is_forgotten() -> None:
    model = Model({name: layer() for name in ("d0", "d1", "d2")})
    for i in range(2):
        model.attend(same(model, metadata([5 + i, 3 + i])), 2)
    assert model.attend(same(model, metadata([7, 5])), 2, ["d0"]) == 1  # broken off, d1 and d2 have entries
    assert model.attend(same(model, metadata([6, 9])), 2, ["d1", "d2"]) == 1  # begins with a layer that has followed
    assert model.attend(same(model, metadata([7, 5])), 2, ["d0"]) == 1
    assert model.attend(None, 2) == 0  # a trial run writes nothing
    assert model.attend(same(model, metadata([4, 9])), 2) == 3


def check_a_draft_model_has_passes_of_its_own() -> None:
    model, draft = (Model({name: layer() for name in names}) for names in (("e0", "e1"), ("f0", "f1")))
    found = []
    for i in range(3):
        both = same(model, metadata([8 + i])) | same(draft, metadata([8 + i]))
        found.append((model.attend(both, 1), draft.attend(both, 1), draft.attend(same(draft, metadata([9 + i])), 1)))
    assert found == [(1, 1, 2), (2, 2, 2), (2, 2, 2)]


def check_another_engines_layers_of_the_same_names_are_others() -> None:
    for scale, first in ((0.125, 1), (0.5, 2)):  # the second one's order is known
        model = Model({name: layer(scale) for name in ("g0", "g1")})
        assert [model.attend(same(model, metadata([5 + i])), 1) for i in range(2)] == [first, 2]


def check_a_cache_that_moves_is_found() -> None:
    model = Model({name: layer() for name in ("h0", "h1")})
    for i in range(2):
        model.attend(same(model, metadata([5 + i])), 1)
    model.layers["h1"].kv_cache = model.layers["h1"].kv_cache.clone()
    assert model.attend(same(model, metadata([7])), 1) == 2


def check_layers_that_read_anothers_cache_go_through_python() -> None:
    model = Model({"i0": layer(), "i1": layer(kv_sharing_target_layer_name="i0"), "i2": layer()})
    assert [model.attend(same(model, metadata([5 + i])), 1) for i in range(3)] == [1, 2, 2]


def check_caches_are_let_go_with_their_engine() -> None:
    model, now = Model({name: layer() for name in ("j0", "j1")}), metadata([5])
    for _ in range(2):
        model.attend(same(model, now), 1)
    (group,) = model.layers["j0"].impl.followed[1]
    number = group.number
    arguments = now.query_start_loc, now.seq_lens, now.block_table, now.slot_mapping, now.scheduler_metadata, 1, 1, True
    torch.ops.lrserve.attention_pass(number, *arguments)
    del model, group
    gc.collect()
    with pytest.raises(IndexError):
        torch.ops.lrserve.attention_pass(number, *arguments)


def check_a_layer_without_metadata_for_a_while_is_taken_up_again() -> None:
    model = Model({name: layer() for name in ("k0", "k1", "k2")})
    for i, (names, expected) in enumerate(((("k0", "k1", "k2"), 1), (("k0", "k1"), 2), (("k0", "k1", "k2"), 3))):
        assert model.attend(dict.fromkeys(names, metadata([5 + i])), 1, names) == expected
