"""Scales that move from inputs to weights leave every family's outputs as they were."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import FAMILIES_TESTED, VOCABULARY, WITH_MLPS, dense_model

from lrserve.compression.groups import FAMILIES, find_groups
from lrserve.compression.smoothing import fold, foldable, smoothed_moment, smoothing, value_heads


def is_power_of_two(s: torch.Tensor) -> bool:
    return bool((torch.frexp(s).mantissa == 0.5).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", FAMILIES_TESTED)
@torch.no_grad()
def test_folding_changes_no_output(architecture: str, dtype: torch.dtype) -> None:
    model = dense_model(architecture).to(dtype).float()  # weights that are exact in dtype, arithmetic in float32
    before = copy.deepcopy(model)
    tokens = torch.randint(VOCABULARY, (2, 32), generator=torch.Generator().manual_seed(0))
    inputs: dict[str, list[torch.Tensor]] = {}
    for group in find_groups(model):
        for which in (before, model):
            hook = inputs.setdefault(group.name, []).append
            which.get_submodule(group.members[0]).register_forward_pre_hook(lambda _, args, hook=hook: hook(args[0]))
    generator = torch.Generator().manual_seed(1)
    scales = {}
    for group in find_groups(model):
        if foldable(model, group):
            W = torch.cat([model.get_submodule(member).weight for member in group.members])
            scales[group.name] = smoothing(10 ** torch.randn(group.n, generator=generator), W, value_heads(model, group))
            fold(model, group, scales[group.name])
    assert len(scales) == 2 * (len(FAMILIES[architecture].scaled_by) if architecture in WITH_MLPS else 2)
    expected, found = before(input_ids=tokens).logits, model(input_ids=tokens).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for parameter in model.parameters():
        assert torch.equal(parameter, parameter.to(dtype).float())  # still exact
    for name, s in scales.items():
        assert is_power_of_two(s)
        assert s.max() > s.min()
        torch.testing.assert_close(inputs[name][1], inputs[name][0] / s, rtol=1e-4, atol=1e-5)


def test_norms_that_add_one_are_refused() -> None:
    model = dense_model("Gemma3ForCausalLM")
    group = find_groups(model)[0]
    with pytest.raises(ValueError, match="cannot be scaled exactly"):
        fold(model, group, torch.ones(group.n))


def test_heads_of_one_value_head_share_their_scales() -> None:
    model = dense_model("LlamaForCausalLM")
    group = next(group for group in find_groups(model) if group.kind == "o")
    s = torch.ones(group.n)
    s[0] = 2
    with pytest.raises(ValueError, match="share a value head"):
        fold(model, group, s)


def test_scales_make_sizes_even() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = 2.0 ** torch.randint(-6, 7, (64,), generator=generator)
    W = torch.randn(16, 64, generator=generator)
    s = smoothing(sizes, W, alpha=1.0)
    assert (sizes / s).max() / (sizes / s).min() <= 2
    assert torch.equal(smoothing(sizes, W, alpha=0.5) * 0, torch.zeros(64))
    assert is_power_of_two(smoothing(torch.zeros(64), W))
    x = torch.randn(100, 64, generator=generator)
    torch.testing.assert_close(smoothed_moment(x.T @ x, s), (x / s).T @ (x / s))
