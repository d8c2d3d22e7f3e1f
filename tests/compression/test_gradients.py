"""Gradient moments: against autograd's own gradients, and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import FAMILIES_TESTED, VOCABULARY, dense_model

from lrserve.compression.filed import Filed
from lrserve.compression.gradients import GradientStore, collect_gradients, gradient_side
from lrserve.compression.groups import find_groups
from lrserve.compression.spectra import stacked_weight
from lrserve.errors import CalibrationError

WINDOWS = torch.randint(3, VOCABULARY, (6, 16), generator=torch.Generator().manual_seed(1))


def collect(model: Any, folder: Path, **options: Any) -> GradientStore:
    collect_gradients(model, find_groups(model), WINDOWS, folder, batch_tokens=32, seed=5, **options)
    return GradientStore(folder)


@pytest.mark.parametrize("architecture", FAMILIES_TESTED)
def test_every_family_gives_positive_moments_in_the_weights_own_space(architecture: str, tmp_path: Path) -> None:
    model = dense_model(architecture)
    groups = find_groups(model)
    store = collect(model, tmp_path)
    for group in groups:
        side, moment = store.read(group)
        assert side == gradient_side(group)
        assert moment.shape == ((group.m, group.m) if side == "output" else (group.n, group.n))
        torch.testing.assert_close(moment, moment.T)
        assert torch.linalg.eigvalsh(moment)[0] >= -1e-6 * moment.trace()
        assert moment.trace() > 0
        if side == "input":  # no gradient leaves the row space of the weight
            weight = stacked_weight(model, group)[0].detach().double()
            projector = torch.linalg.pinv(weight) @ weight
            torch.testing.assert_close(projector @ moment @ projector, moment, rtol=1e-3, atol=1e-5 * float(moment.trace()))


def test_half_the_moment_predicts_the_divergence_of_small_errors(tmp_path: Path) -> None:
    """A perturbation of an output by e costs KL e^T Gamma^2 e / 2: the claim that the allocator `fisher` builds on."""
    model = dense_model("LlamaForCausalLM")
    group = next(g for g in find_groups(model) if g.kind == "down" and g.layer == 1)
    for seed in range(40):
        collect_gradients(model, [group], WINDOWS, tmp_path / str(seed), batch_tokens=96, seed=seed)
    moments = [GradientStore(tmp_path / str(seed)).read(group)[1] for seed in range(40)]
    side, _ = GradientStore(tmp_path / "0").read(group)
    assert side == "output"
    moment = torch.stack(moments).mean(0)
    error = torch.randn(group.m, generator=torch.Generator().manual_seed(2)) * 0.02

    def log_probabilities() -> torch.Tensor:
        with torch.no_grad():
            return model(WINDOWS).logits.double().log_softmax(-1)

    before = log_probabilities()
    module = model.get_submodule(group.members[0])
    handle = module.register_forward_hook(lambda _, inputs, output: output + error)
    after = log_probabilities()
    handle.remove()
    measured = float((before.exp() * (before - after)).sum(-1).mean())
    # an error in one token's output moves later tokens too: those cross terms are what the Kronecker block leaves out
    predicted = float(error.double() @ moment @ error.double()) / 2
    assert 0.5 < measured / predicted < 2


@pytest.mark.parametrize("architecture", FAMILIES_TESTED)
def test_with_less_memory_the_moments_are_the_same(architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lrserve.compression.filed._SMALL", 0)
    ran: list[int] = []
    model = dense_model(architecture)
    layer = find_groups(model)[0].members[0]
    model.get_submodule(layer).register_forward_pre_hook(lambda *_: ran.append(1))
    collect(model, tmp_path / "usual")
    times = len(ran)
    folder = tmp_path / "files"
    folder.mkdir()
    collect(model, tmp_path / "spare", recompute=True, filed=Filed(folder))
    assert len(ran) - times == 2 * times  # again on the way back
    assert not model.is_gradient_checkpointing
    assert not any(module.training for module in model.modules())
    usual, spare = (load_file(tmp_path / name / "moments.safetensors") for name in ("usual", "spare"))
    assert usual.keys() == spare.keys()
    for name, moment in usual.items():
        torch.testing.assert_close(spare[name], moment, msg=lambda text, name=name: f"{name}: {text}")


def test_an_interrupted_pass_resumes_to_the_same_moments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lrserve.compression.gradients._SAVED_TOKENS", 32)
    model = dense_model("Qwen2ForCausalLM")
    whole = collect(model, tmp_path / "whole")

    def interrupt(done: int) -> None:
        if done >= 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(model, tmp_path / "cut", progress=interrupt)
    reused = collect_gradients(model, find_groups(model), WINDOWS, tmp_path / "cut", batch_tokens=32, seed=5)
    assert reused == 4
    for group in find_groups(model):
        assert torch.equal(GradientStore(tmp_path / "cut").read(group)[1], whole.read(group)[1])


def test_missing_and_infinite_gradients_are_said(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="no gradients"):
        GradientStore(tmp_path)
    model = dense_model("LlamaForCausalLM")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(CalibrationError, match="not finite"):
        collect(model, tmp_path)
