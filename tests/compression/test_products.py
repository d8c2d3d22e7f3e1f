"""Products of bfloat16 values on processors without such products."""

from __future__ import annotations

import pytest
import torch
from tiny import dense_model
from torch import nn

from lrserve.compression import products
from lrserve.compression.products import fast_products


@pytest.fixture(params=[True, False])
def emulated(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(products, "emulated", lambda: request.param)
    return bool(request.param)


def bfloat16(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).to(torch.bfloat16)


def test_products_are_those_of_float32_rounded_once_where_bfloat16_is_emulated(emulated: bool) -> None:
    x, W, b = bfloat16(5, 300), bfloat16(7, 300), bfloat16(7)
    plain = nn.functional.linear(x, W, b)
    with fast_products():
        y = nn.functional.linear(x, W, bias=b)
    exact = nn.functional.linear(x.float(), W.float(), b.float()).to(torch.bfloat16)
    assert torch.equal(y, exact if emulated else plain)


def test_attention_takes_a_mask_of_either_kind(emulated: bool) -> None:
    q, k, v = (bfloat16(1, 2, 6, 8) for _ in range(3))
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    additive = torch.zeros(6, 6, dtype=torch.bfloat16).masked_fill(~causal, -torch.inf)
    exact = nn.functional.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True)
    with fast_products():
        for mask in (causal, additive):
            y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            assert y.dtype is torch.bfloat16
            torch.testing.assert_close(y.float(), exact, rtol=0.02, atol=0.02)


def test_other_dtypes_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "emulated", lambda: True)
    with fast_products():
        for dtype in (torch.float16, torch.float64):
            assert nn.functional.linear(torch.ones(1, 3, dtype=dtype), torch.ones(2, 3, dtype=dtype)).dtype is dtype


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Gemma3ForCausalLM"])
def test_models_and_gradients_come_out_alike(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "emulated", lambda: True)
    model = dense_model(architecture).to(torch.bfloat16)
    tokens = torch.arange(24).view(2, 12)
    plain = model(tokens).logits
    with fast_products():
        fast = model(tokens).logits
        fast.float().square().mean().backward()
    assert (fast - plain).norm() < 0.03 * plain.norm()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
