"""Mixtures of experts: what is collected of them, and what is left of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import VOCABULARY, WITH_EXPERTS, dense_model, write_artifact
from transformers import AutoModelForCausalLM

import lrserve  # noqa: F401 - registers the quantizer
from lrserve.compression.assemble import MergedLevels, compress_model
from lrserve.compression.calibrate import calibrate, merge_statistics, read_expert_statistics
from lrserve.compression.experts import ExpertAccumulator, ExpertStatistics, FewerExpertsRouter
from lrserve.compression.groups import Group, Mixture, find_mixtures, find_units
from lrserve.compression.level import DENSE, Level
from lrserve.compression.spec import quantization_config, specs_of
from lrserve.compression.spectra import SpectrumStore, features, write_spectra
from lrserve.errors import CalibrationError, NotFiniteError
from lrserve.plugins.checkpoint import open_checkpoint

WINDOWS = torch.randint(3, VOCABULARY, (8, 12), generator=torch.Generator().manual_seed(1))
MIXTURE = Mixture("experts", "experts", 0, ("experts",), (4,), 8, experts=6, active=2)


def made(architecture: str, folder: Path) -> tuple[SpectrumStore, list[Mixture]]:
    """Calibrate a tiny model, and rank its experts."""
    model = dense_model(architecture)
    units = find_units(model)
    calibrate(model, units, WINDOWS, folder / "statistics", pool_sequences=4, batch_tokens=24)
    write_spectra(model, units, features(folder / "statistics"), folder / "spectra", statistics=folder / "statistics")
    return SpectrumStore(folder / "spectra", units), find_mixtures(model)


def expert_outputs(model: Any, mixture: Mixture) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what each expert alone adds to the layer's output, (tokens, E, m) float64, and whether it was chosen, (tokens, E)."""
    seen: list[torch.Tensor] = []
    experts = model.get_submodule(mixture.members[0])
    handle = experts.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs))
    with torch.no_grad():
        model(WINDOWS)
    handle.remove()
    x, chosen, gates = seen
    added = torch.zeros(len(x), mixture.experts, mixture.m, dtype=torch.float64)
    was_chosen = torch.zeros(len(x), mixture.experts, dtype=torch.bool)
    for token in range(len(x)):
        for expert, gate in zip(chosen[token].tolist(), gates[token].double(), strict=True):
            g, up = (experts.gate_up_proj[expert].double() @ x[token].double()).chunk(2)
            added[token, expert] = gate * (experts.down_proj[expert].double() @ (torch.nn.functional.silu(g) * up))
            was_chosen[token, expert] = True
    return added.detach(), was_chosen


@pytest.mark.parametrize("architecture", WITH_EXPERTS)
def test_statistics_of_the_experts(architecture: str, tmp_path: Path) -> None:
    made(architecture, tmp_path)
    model = dense_model(architecture)
    for mixture in find_mixtures(model):
        found = read_expert_statistics(tmp_path / "statistics", mixture)
        added, chosen = expert_outputs(model, mixture)
        sizes = added.norm(dim=-1)
        assert torch.equal(found.tokens, chosen.sum(0))
        torch.testing.assert_close(found.saliency.double(), sizes.sum(0) / chosen.sum(0).clamp_min(1), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found.error.double(), sizes.square().mean(0), rtol=1e-4, atol=1e-6)


def test_the_least_salient_go_first_and_their_errors_add_up() -> None:
    found = ExpertStatistics(torch.tensor([5, 1, 0]), torch.tensor([2.0, 3.0, 0.0]), torch.tensor([4.0, 1.0, 0.0]))
    assert found.order().tolist() == [1, 0, 2]
    assert found.errors().tolist() == [5.0, 4.0, 0.0, 0.0]


def test_shards_of_the_text_merge_to_the_statistics_of_all(tmp_path: Path) -> None:
    model = dense_model(WITH_EXPERTS[0])
    units = find_units(model)
    options: dict[str, Any] = {"pool_sequences": 4, "batch_tokens": 24}
    calibrate(model, units, WINDOWS, tmp_path / "whole", **options)
    parts = [tmp_path / "first", tmp_path / "second"]
    for part, windows in zip(parts, WINDOWS.split(4), strict=True):
        calibrate(model, units, windows, part, partial=True, **options)
    (tmp_path / "merged").mkdir()
    merge_statistics(parts, units, tmp_path / "merged")
    for mixture in find_mixtures(model):
        whole, merged = (read_expert_statistics(tmp_path / name, mixture) for name in ("whole", "merged"))
        for field in ("tokens", "saliency", "error"):
            torch.testing.assert_close(getattr(merged, field), getattr(whole, field))


def test_statistics_that_cannot_be_used() -> None:
    nothing = ExpertAccumulator(MIXTURE)
    with pytest.raises(CalibrationError, match="no token reached"):
        nothing.finish()
    endless = ExpertAccumulator(MIXTURE)
    endless.add({name: torch.full_like(total, torch.inf) for name, total in nothing.state().items()})
    with pytest.raises(NotFiniteError, match="not finite"):
        endless.finish()


def test_levels_of_a_mixture() -> None:
    assert MIXTURE.levels() == [Level(8 * count, experts=count) for count in (2, 3, 4, 5)]
    assert [MIXTURE.sizes(level) for level in (*MIXTURE.levels()[:1], DENSE)] == [(2, 8), (6, 8)]
    assert MIXTURE.dense_parameters == 6 * 3 * 4 * 8
    many = Mixture("experts", "experts", 0, ("experts",), (4,), 8, experts=128, active=8)
    assert [level.experts for level in many.levels()] == list(range(8, 128, 8))


def removals(store: SpectrumStore, mixtures: list[Mixture]) -> list[tuple[Group, Level]]:
    return [(mixture, mixture.fewer(3 - index)) for index, mixture in enumerate(mixtures)]


@pytest.mark.parametrize("architecture", WITH_EXPERTS)
@torch.no_grad()
def test_the_router_chooses_among_the_experts_that_stay(architecture: str, tmp_path: Path) -> None:
    store, mixtures = made(architecture, tmp_path)
    changed = removals(store, mixtures)
    compressed = compress_model(dense_model(architecture), changed, "narrow", store, torch.float32)
    masked: Any = dense_model(architecture)

    def mask(kept: torch.Tensor) -> Any:
        def hook(router: Any, inputs: tuple[torch.Tensor, ...], outputs: Any) -> Any:
            logits = outputs[0].float()
            hidden = torch.full_like(logits, -torch.inf).index_copy(1, kept, logits[:, kept])
            scores, chosen = hidden.softmax(-1).topk(router.top_k)
            return hidden, scores / scores.sum(-1, keepdim=True), chosen

        return hook

    for unit, level in changed:
        assert isinstance(unit, Mixture)
        kept = store.kept(unit, level).experts
        order = read_expert_statistics(tmp_path / "statistics", unit).saliency.argsort(descending=True)
        assert set(kept.tolist()) == set(order[: level.experts].tolist())
        masked.get_submodule(unit.router).register_forward_hook(mask(kept))
    torch.testing.assert_close(compressed(WINDOWS).logits, masked(WINDOWS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", WITH_EXPERTS)
@torch.no_grad()
def test_what_is_judged_is_what_is_exported_and_loaded(architecture: str, tmp_path: Path) -> None:
    store, mixtures = made(architecture, tmp_path)
    changed = removals(store, mixtures)
    model: Any = dense_model(architecture)
    before = model(WINDOWS).logits
    merged = MergedLevels(model, list(store.groups.values()), store)
    merged.apply({unit.name: level for unit, level in changed})
    judged = model(WINDOWS).logits
    assert (judged - before).abs().max() > 1e-2
    exported = compress_model(dense_model(architecture), changed, "narrow", store, torch.float32)
    assert torch.equal(exported(WINDOWS).logits, judged)
    merged.apply({})
    assert torch.equal(model(WINDOWS).logits, before)

    folder = write_artifact(exported, tmp_path / "artifact")
    specs, faults = open_checkpoint(folder)
    assert not faults
    assert specs == specs_of(changed, "narrow")
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(loaded(WINDOWS).logits, judged)
    assert loaded.config.quantization_config.to_dict() == quantization_config(specs)
    loaded.save_pretrained(tmp_path / "again")
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert torch.equal(again(WINDOWS).logits, judged)


def test_a_router_without_the_rows_of_removed_experts_shows_its_sizes() -> None:
    model = dense_model(WITH_EXPERTS[0])
    [mixture, _] = find_mixtures(model)
    router = model.get_submodule(mixture.router)
    assert "experts=3 of 4" in repr(FewerExpertsRouter(router, router.weight.data, 3))
