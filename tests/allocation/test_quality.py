"""Perplexity and divergence against transformers' own loss and a direct computation."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from tiny import FAMILIES_TESTED, VOCABULARY, dense_model

from lrserve.allocation.quality import Divergence, negative_log_likelihood, perplexity
from lrserve.compression.groups import find_groups

WINDOWS = torch.randint(3, VOCABULARY, (5, 33), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("architecture", FAMILIES_TESTED)
def test_perplexity_is_the_exponential_of_transformers_loss(architecture: str) -> None:
    model = dense_model(architecture)
    with torch.inference_mode():
        losses = torch.stack([model(input_ids=w[None], labels=w[None]).loss for w in WINDOWS])
    torch.testing.assert_close(negative_log_likelihood(model, WINDOWS).float(), losses, rtol=1e-4, atol=1e-4)
    assert perplexity(model, WINDOWS) == pytest.approx(math.exp(float(losses.mean())), rel=1e-4)


@pytest.mark.parametrize("architecture", FAMILIES_TESTED)
def test_divergence_is_zero_for_the_same_model_and_right_for_another(architecture: str) -> None:
    model = dense_model(architecture, layers=3)
    dense = copy.deepcopy(model)
    divergence = Divergence(model, WINDOWS)
    for first_changed in range(3):
        assert abs(divergence(model, first_changed)) < 1e-4
    changed = next(group for group in find_groups(model) if group.kind == "o" and group.layer == 1)
    model.get_submodule(changed.name).weight.data[::2] = 0  # not a scaling, which Gemma normalises away
    with torch.inference_mode():
        p, q = (m(WINDOWS).logits.double().log_softmax(-1) for m in (dense, model))
    expected = float((p.exp() * (p - q)).sum(-1).mean())
    assert expected > 1e-3
    for first_changed in range(2):
        assert divergence(model, first_changed) == pytest.approx(expected, rel=0.01)
