"""Rounded weights and residuals in torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import Rounding, dense_model, random_residual, rounded_model
from torch import nn

from lrserve.compression.assemble import round_parameters
from lrserve.compression.groups import find_groups, is_dense
from lrserve.compression.layers import Factor, RoundedLinear, exact_names
from lrserve.compression.level import PRECISIONS, SCHEMES, Precision
from lrserve.compression.lowrank import (
    dequantized,
    has_rounded_inputs,
    install_low_rank,
    is_rounded,
    keep_outputs,
    load_residual,
    load_rounded,
    reorder_outputs,
)
from lrserve.compression.packing import pack_int4, unpack_int4
from lrserve.compression.quantize import Rounded, inputs_in_units, round_to_nearest
from lrserve.compression.spec import GroupSpec, leaves
from lrserve.errors import ArtifactError

M, N = 24, 128


def linear_of(weights: Precision, *, bias: bool = True) -> tuple[RoundedLinear, Rounded]:
    dense = nn.Linear(N, M, bias=bias)
    rounded = round_to_nearest(dense.weight.detach(), weights, torch.float32)
    layer = RoundedLinear.of(dense, weights)
    layer.put(rounded)
    return layer, rounded


def test_packing_is_that_of_compressed_tensors() -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    values = torch.randint(-8, 8, (M, N), dtype=torch.int8)
    assert torch.equal(pack_int4(values), helpers.pack_to_int32(values, 4))
    assert torch.equal(unpack_int4(pack_int4(values)), values)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("weights", PRECISIONS)
def test_a_rounded_linear_multiplies_by_q(weights: Precision, bias: bool) -> None:
    layer, rounded = linear_of(weights, bias=bias)
    x = torch.randn(2, 5, N)
    scheme, expected = SCHEMES[weights], x
    if scheme.rounds_inputs:
        scale = x.abs().amax(-1, keepdim=True) / scheme.largest
        units = x / scale
        expected = scale * (units.to(torch.float8_e4m3fn).float() if scheme.floating else units.round())
    expected = nn.functional.linear(expected, rounded.dense(), layer.bias)
    exact = nn.functional.linear(x, rounded.dense(), layer.bias)
    torch.testing.assert_close(layer(x), exact, atol=1e-5, rtol=1e-5)  # float32 rounds no inputs
    assert torch.equal(layer.dense(), rounded.dense())
    assert layer(torch.zeros(1, N)).isfinite().all()
    for dtype, bound in ((torch.bfloat16, 2e-2), (torch.float16, 1e-2)):
        found = layer.to(dtype)(x.to(dtype))
        assert found.dtype == dtype
        assert (found.float() - expected).norm() < bound * expected.norm()


@pytest.mark.parametrize("weights", PRECISIONS)
def test_casts_leave_what_is_rounded_alone(weights: Precision) -> None:
    layer, rounded = linear_of(weights)
    group = nn.Sequential(layer).to(torch.bfloat16).half().float()
    assert torch.equal(layer.dense(), rounded.dense()) or SCHEMES[weights].group  # whose scales have the dtype of the model
    assert {name for name, p in group.named_parameters() if p.requires_grad} == {"0.bias", "0.weight_scale"}
    values = {name: tensor.dtype for name, tensor in group.to(torch.bfloat16).state_dict().items()}
    scales = torch.bfloat16 if SCHEMES[weights].group else torch.float32
    assert values["0.weight_scale"] == scales
    assert ("0.weight_scale" in exact_names(group)) == (scales == torch.float32)
    round_parameters(group, torch.bfloat16)
    assert not is_dense(layer)
    assert layer.to("meta").weight_scale.is_meta


def test_gradients_pass_rounded_inputs() -> None:
    layer, rounded = linear_of("int8")
    x = torch.randn(3, N, dtype=torch.bfloat16, requires_grad=True)
    layer.to(torch.bfloat16)(x).sum().backward()
    torch.testing.assert_close(x.grad.float(), rounded.dense().sum(0).expand(3, N), atol=0.02, rtol=0.02)
    assert layer.weight_scale.grad is not None


@pytest.mark.parametrize("weights", ["int8", "fp8"])
def test_inputs_are_rounded_in_sixteen_bits_only(weights: Precision) -> None:
    layer, rounded = linear_of(weights, bias=False)
    x = torch.randn(3, N)
    torch.testing.assert_close(layer(x), x @ rounded.dense().T)
    near, scale = inputs_in_units(x.bfloat16(), SCHEMES[weights])
    assert near.unique().numel() <= 255
    expected = (near * scale) @ rounded.dense().T
    found = layer.to(torch.bfloat16)(x.bfloat16()).float()
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0.02)
    assert (expected - layer.to(torch.float32)(x.bfloat16().float())).abs().max() > 1e-4


@pytest.mark.parametrize("weights", ["int8", "int4_g32", "fp8"])
def test_loaders_split_the_rows_of_a_fused_group(weights: Precision) -> None:
    model = dense_model("Qwen2ForCausalLM")
    group = find_groups(model)[0]
    linears = [model.get_submodule(member) for member in group.members]
    biases = [linear.bias for linear in linears]
    rounded = round_to_nearest(torch.cat([linear.weight.detach() for linear in linears]), weights)
    with pytest.raises(TypeError, match="a residual stands beside a rounded weight"):
        load_residual(model, group, random_residual(group.m, group.n, 4))
    load_rounded(model, group, "weight", rounded)
    residual = random_residual(group.m, group.n, 4)
    load_residual(model, group, random_residual(group.m, group.n, 8))
    load_residual(model, group, residual)
    layers = [model.get_submodule(member) for member in group.members]
    assert [layer.bias is bias for layer, bias in zip(layers, biases, strict=True)] == [True] * 3
    assert torch.equal(torch.cat([layer.dense() for layer in layers]), rounded.dense())
    assert len({id(layer.residual_first) for layer in layers}) == 1
    names = [name for name in model.state_dict() if "layers.0" in name and "residual" in name]
    assert len(names) == 5  # A and its scales once, B three times
    x = torch.randn(2, group.n)
    plain = [layer.multiply(x, layer.bias) for layer in layers]
    torch.testing.assert_close(
        torch.cat([layer(x) for layer in layers], -1), torch.cat(plain, -1) + x @ residual.dense().T, atol=1e-4, rtol=1e-4
    )


def test_rows_change_places_whatever_they_are_stored_in() -> None:
    for rounding in (Rounding("int8", None, 4), Rounding("int4_g32", None, 4), Rounding("fp8"), Rounding("int8", "low_rank")):
        model = rounded_model("LlamaForCausalLM", rounding)
        down = next(group for group in find_groups(dense_model("LlamaForCausalLM")) if group.kind == "down")
        up, x, order = model.model.layers[0].mlp.up_proj, torch.randn(2, 64), torch.randperm(96)
        before = up(x)
        reorder_outputs(model, down, order)
        torch.testing.assert_close(up(x), before[:, order])


def test_outputs_are_removed_before_weights_are_rounded() -> None:
    model = rounded_model("LlamaForCausalLM", Rounding("int8"))
    with pytest.raises(TypeError, match="outputs are removed before weights are rounded"):
        keep_outputs(model, find_groups(dense_model("LlamaForCausalLM"))[2], torch.arange(32))


@pytest.mark.parametrize(
    "spec",
    [
        GroupSpec(0, ("down_proj",), "dense", weights="int4_g64"),
        GroupSpec(40, ("down_proj",), "low_rank", weights="int4_g32"),
        GroupSpec(40, ("down_proj",), "identity_block", True, "int4_g32"),
        GroupSpec(48, ("down_proj",), "narrow_in", weights="int4_g32"),
    ],
)
def test_groups_that_do_not_come_out_even_are_refused(spec: GroupSpec) -> None:
    with pytest.raises(ArtifactError, match=r"down_proj: \d+ inputs cannot be divided into groups of int4"):
        install_low_rank(dense_model("LlamaForCausalLM"), {"model.layers.0.mlp.down_proj": spec})


def test_installing_on_a_real_model_keeps_biases() -> None:
    model: Any = dense_model("Qwen2ForCausalLM")
    group = find_groups(model)[0]
    bias = model.get_submodule(group.members[1]).bias
    install_low_rank(model, {group.name: GroupSpec(0, leaves(group.members), "dense", weights="int8", residual=4)})
    layer = model.get_submodule(group.members[1])
    assert isinstance(layer, RoundedLinear)
    assert layer.bias is bias
    assert layer.residual == 4
    assert isinstance(Factor(4, 4, bias=False).weight, nn.Parameter)


@pytest.mark.parametrize(
    "rounding", [Rounding("int8", None, 4), Rounding("int4_g32", "narrow", 8), Rounding("int8", "low_rank")], ids=str
)
@torch.no_grad()
def test_a_model_without_rounded_weights_computes_the_same_in_float32(rounding: Rounding) -> None:
    model = rounded_model("LlamaForCausalLM", rounding)
    tokens = torch.arange(3, 23)[None]
    before = model(tokens).logits
    assert is_rounded(model)
    assert has_rounded_inputs(model) == (rounding.weights == "int8")
    plain = dequantized(model)
    assert not is_rounded(plain)
    assert not any("residual" in name or "scale" in name for name in plain.state_dict())
    torch.testing.assert_close(plain(tokens).logits, before, atol=1e-4, rtol=1e-4)
