"""bfloat16 models on processors that cannot multiply bfloat16."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import dense_model
from torch import nn
from torch.overrides import TorchFunctionMode

from lrserve.compression import matmul
from lrserve.compression.matmul import float32_matmuls

attention = nn.functional.scaled_dot_product_attention
linear = nn.functional.linear


class Multiplied(TorchFunctionMode):
    """Notes the dtypes in which linears and attention arrive at torch."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (linear, attention):
            self.dtypes.add((*args, *(kwargs or {}).values())[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=[True, False])
def emulated(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(matmul, "emulated", lambda: request.param)
    return bool(request.param)


def bfloat16(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).to(torch.bfloat16)


def test_linears_multiply_in_float32_where_bfloat16_is_emulated(emulated: bool) -> None:
    x, W, b = bfloat16(5, 300), bfloat16(7, 300), bfloat16(7)
    exact = linear(x.float(), W.float(), b.float()).to(torch.bfloat16)
    with Multiplied() as multiplied, float32_matmuls():
        for y in (linear(x, W, bias=b), linear(input=x, weight=W, bias=b), linear(x, W) + b):
            torch.testing.assert_close(y, exact, rtol=0.02, atol=0.1)
    assert multiplied.dtypes == {torch.float32 if emulated else torch.bfloat16}


def test_attention_does_with_a_mask_of_either_kind_and_shared_heads(emulated: bool) -> None:
    q, k, v = bfloat16(1, 4, 6, 8), bfloat16(1, 2, 6, 8), bfloat16(1, 2, 6, 8)
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    additive = torch.zeros(6, 6, dtype=torch.bfloat16).masked_fill(~causal, -torch.inf)
    exact = attention(q.float(), k.float(), v.float(), is_causal=True, enable_gqa=True)
    with Multiplied() as multiplied, float32_matmuls():
        for mask in (causal, additive):
            y = attention(query=q, key=k, value=v, attn_mask=mask, enable_gqa=True)
            assert y.dtype is torch.bfloat16
            torch.testing.assert_close(y.float(), exact, rtol=0.02, atol=0.02)
    assert multiplied.dtypes == {torch.float32 if emulated else torch.bfloat16}


def test_what_is_not_bfloat16_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "emulated", lambda: True)
    with float32_matmuls():
        for dtype in (torch.float16, torch.float64):
            assert linear(torch.ones(1, 3, dtype=dtype), torch.ones(2, 3, dtype=dtype)).dtype is dtype
        with pytest.raises(RuntimeError, match="dtype"):
            linear(bfloat16(1, 3), torch.ones(2, 3))


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM", "Gemma3ForCausalLM"])
def test_gradients_are_those_of_float32(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "emulated", lambda: True)
    model = dense_model(architecture).to(torch.bfloat16)
    tokens = torch.arange(24).view(2, 12)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        nn.functional.cross_entropy(model(tokens).logits.float().flatten(0, 1), tokens.flatten()).backward()
        return {name: parameter.grad.float() for name, parameter in model.named_parameters()}

    with Multiplied() as multiplied, float32_matmuls():
        found = gradients()
    assert multiplied.dtypes == {torch.float32}
    model.float()
    for name, exact in gradients().items():
        assert (found[name] - exact).norm() < 0.1 * exact.norm(), name


def test_backward_pass_keeps_no_float32_copies() -> None:
    W = bfloat16(8, 4).requires_grad_()
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda value: kept.append(value) or value, lambda value: value):
        matmul._linear(bfloat16(3, 4), W)
    assert {value.dtype for value in kept} == {torch.bfloat16}
