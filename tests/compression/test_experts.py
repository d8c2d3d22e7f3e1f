"""Mixtures of experts: what is collected of them, and what is left of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from blockwise import in_files_of
from tiny import VOCABULARY, WITH_EXPERTS, dense_model, factorized_model, write_artifact
from transformers import AutoModelForCausalLM

import lrserve  # noqa: F401 - registers the quantizer
from lrserve.compression.assemble import MergedLevels, compress_model
from lrserve.compression.calibrate import calibrate, merge_statistics, read_expert_statistics
from lrserve.compression.experts import ExpertAccumulator, ExpertStatistics, FewerExpertsRouter, keep_mixtures, rank_experts
from lrserve.compression.filed import Filed
from lrserve.compression.groups import Group, Mixture, find_mixtures, find_units
from lrserve.compression.level import DENSE, Level
from lrserve.compression.lowrank import install_low_rank
from lrserve.compression.narrow import compensated
from lrserve.compression.sequential import Block, walk
from lrserve.compression.spec import GroupSpec, quantization_config, specs_of
from lrserve.compression.spectra import SpectrumStore, features, write_spectra
from lrserve.errors import ArtifactError, CalibrationError, NotFiniteError
from lrserve.plugins.checkpoint import open_checkpoint, require_sound

WINDOWS = torch.randint(3, VOCABULARY, (8, 12), generator=torch.Generator().manual_seed(1))
MIXTURE = Mixture("experts", "experts", 0, ("experts",), (4,), 8, experts=6, active=2)


def made(architecture: str, folder: Path) -> tuple[SpectrumStore, list[Mixture]]:
    """Calibrate a tiny model, and rank its experts."""
    model = dense_model(architecture)
    units = find_units(model)
    calibrate(model, units, WINDOWS, folder / "statistics", pool_sequences=4, batch_tokens=24)
    write_spectra(model, units, features(folder / "statistics"), folder / "spectra", statistics=folder / "statistics")
    return SpectrumStore(folder / "spectra", units, folder / "statistics"), find_mixtures(model)


def expert_neurons(model: Any, mixture: Mixture) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each expert's neurons, times its gate, (tokens, E, n) float64, and whether it was chosen, (tokens, E)."""
    seen: list[torch.Tensor] = []
    experts = model.get_submodule(mixture.members[0])
    handle = experts.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs))
    with torch.no_grad():
        model(WINDOWS)
    handle.remove()
    x, chosen, gates = seen
    neurons = torch.zeros(len(x), mixture.experts, mixture.n, dtype=torch.float64)
    was_chosen = torch.zeros(len(x), mixture.experts, dtype=torch.bool)
    for token in range(len(x)):
        for expert, gate in zip(chosen[token].tolist(), gates[token].double(), strict=True):
            g, up = (experts.gate_up_proj[expert].double() @ x[token].double()).chunk(2)
            neurons[token, expert] = gate * torch.nn.functional.silu(g) * up
            was_chosen[token, expert] = True
    return neurons.detach(), was_chosen


@pytest.mark.parametrize("architecture", WITH_EXPERTS)
def test_statistics_of_the_experts(architecture: str, tmp_path: Path) -> None:
    made(architecture, tmp_path)
    model = dense_model(architecture)
    for mixture in find_mixtures(model):
        found = read_expert_statistics(tmp_path / "statistics", mixture)
        neurons, chosen = expert_neurons(model, mixture)
        down = model.get_submodule(mixture.members[0]).down_proj.detach().double()
        sizes = torch.einsum("ten,emn->tem", neurons, down).norm(dim=-1)
        assert torch.equal(found.tokens, chosen.sum(0))
        torch.testing.assert_close(found.saliency.double(), sizes.sum(0) / chosen.sum(0).clamp_min(1), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found.error.double(), sizes.square().mean(0), rtol=1e-4, atol=1e-6)
        moments = torch.einsum("tei,tej->eij", neurons, neurons) / len(neurons)
        torch.testing.assert_close(found.moments.double(), moments, rtol=1e-4, atol=1e-5)


def test_the_least_salient_go_first_and_their_errors_add_up() -> None:
    moments = torch.zeros(3, 2, 2)
    found = ExpertStatistics(torch.tensor([5, 1, 0]), torch.tensor([2.0, 3.0, 0.0]), torch.tensor([4.0, 1.0, 0.0]), moments)
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
        for field in ("tokens", "saliency", "error", "moments"):
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
    fewer, narrower = [Level(8 * count, experts=count) for count in (2, 3, 4, 5)], [Level(6 * width) for width in (3, 6)]
    assert MIXTURE.levels(3) == [*fewer, *narrower]
    assert [MIXTURE.sizes(level) for level in (fewer[0], narrower[0], DENSE)] == [(2, 8), (6, 3), (6, 8)]
    assert [MIXTURE.error_index(level) for level in (fewer[0], narrower[0], DENSE)] == [2, 10, 6]
    assert MIXTURE.dense_parameters == 6 * 3 * 4 * 8
    assert [MIXTURE.parameters(level.rank, "experts") for level in (fewer[1], narrower[0])] == [3 * 3 * 4 * 8, 6 * 3 * 4 * 3]
    many = replace(MIXTURE, experts=128, active=8, in_features=768)
    sizes = [many.sizes(level) for level in many.levels(16)]
    assert sizes == [(count, 768) for count in range(8, 128, 8)] + [(128, width) for width in range(16, 768, 48)]


@pytest.mark.parametrize("tokens", [40, 4, 0])
def test_neurons_of_an_expert_are_chosen_by_what_it_saw(tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, 8, generator=generator, dtype=torch.float64)
    x[:, 1] = 0.7 * x[:, 0]  # nothing is lost without it
    down = torch.randn(1, 4, 8, generator=generator, dtype=torch.float64)
    moments = (x.T @ x / 40)[None]
    found = ExpertStatistics(torch.tensor([tokens]), torch.ones(1), torch.ones(1), moments)
    ranked = rank_experts(replace(MIXTURE, experts=1, active=1), down, found)
    errors, order = ranked["errors"][2:], ranked["neurons"][0]
    assert sorted(order.tolist()) == list(range(8))
    assert (errors.diff() <= 0).all()
    for width in (3, 7):
        kept = order[:width]
        B = compensated(down[0], found.metric(0), kept)
        lost = (x @ down[0].T - x[:, kept] @ B.T).square().sum() / 40
        if tokens == 40:
            best = torch.linalg.lstsq(x[:, kept], x @ down[0].T).solution
            assert lost == pytest.approx(float((x @ down[0].T - x[:, kept] @ best).square().sum() / 40), rel=1e-2, abs=1e-3)
            assert float(errors[width]) == pytest.approx(float(lost), rel=0.02, abs=1e-2)
        else:  # nothing makes up for the others
            torch.testing.assert_close(B, down[0][:, kept])
    if tokens == 40:
        assert order[-1] in (0, 1)
    if tokens == 0:
        assert order.tolist() == down[0].norm(dim=0).argsort(descending=True).tolist()


def test_a_mixture_of_numbers_that_are_not_finite_stays_dense() -> None:
    found = ExpertStatistics(torch.ones(6), torch.ones(6), torch.ones(6), torch.eye(8).repeat(6, 1, 1))
    errors = rank_experts(MIXTURE, torch.full((6, 4, 8), torch.nan), found)["errors"]
    assert errors[7:].isnan().all()


def removals(mixtures: list[Mixture]) -> list[tuple[Group, Level]]:
    """Three experts in the first layer, two in the second."""
    return [(mixture, mixture.fewer(3 - index)) for index, mixture in enumerate(mixtures)]


def narrowings(mixtures: list[Mixture]) -> list[tuple[Group, Level]]:
    """Fewer neurons in the first layer, fewer experts in the second."""
    return [(mixtures[0], mixtures[0].narrower(24)), (mixtures[1], mixtures[1].fewer(3))]


@pytest.mark.parametrize("architecture", WITH_EXPERTS)
@torch.no_grad()
def test_the_router_chooses_among_the_experts_that_stay(architecture: str, tmp_path: Path) -> None:
    store, mixtures = made(architecture, tmp_path)
    changed = removals(mixtures)
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


@pytest.mark.parametrize("chosen", [removals, narrowings])
@pytest.mark.parametrize("architecture", WITH_EXPERTS)
@torch.no_grad()
def test_what_is_judged_is_what_is_exported_and_loaded(architecture: str, chosen: Any, tmp_path: Path) -> None:
    store, mixtures = made(architecture, tmp_path)
    changed = chosen(mixtures)
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


def test_blocks_are_improved_behind_the_experts_that_stay(tmp_path: Path) -> None:
    store, mixtures = made("MixtralForCausalLM", tmp_path)
    changed = removals(mixtures)
    ranks = [(unit, 16) for unit in store.groups.values() if unit.kind == "o"]
    model, inputs = dense_model("MixtralForCausalLM"), list[torch.Tensor]()

    def step(block: Block) -> Any:
        inputs.append(block.compressed_inputs.clone())
        return block.install(store, block.ranks)

    def prepare(index: int) -> None:
        keep_mixtures(model, [(unit, level) for unit, level in changed if unit.layer == index], store)

    walk(model, ranks, WINDOWS, tmp_path / "walk", step, batch_tokens=48, prepare=prepare)
    plan = [*changed, *((unit, Level(rank)) for unit, rank in ranks)]
    compressed = compress_model(dense_model("MixtralForCausalLM"), plan, "low_rank", store, torch.float32)
    with torch.no_grad():
        states = compressed(WINDOWS, output_hidden_states=True).hidden_states
    torch.testing.assert_close(inputs[1], states[1], rtol=1e-4, atol=1e-4)
    assert isinstance(model.get_submodule(mixtures[0].router), type(dense_model("MixtralForCausalLM").model.layers[0].mlp.gate))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"experts": 1}, "1 experts of 96 neurons cannot be kept of 4 of 96, of which a token reads 2"),
        ({"experts": 5}, "5 experts of 96 neurons cannot be kept of 4 of 96"),
        ({"rank": 97}, "3 experts of 97 neurons cannot be kept"),
        ({"members": ["mlp"]}, "no group of the architecture"),
        ({"experts": 2}, r"not in the model that config.json describes: .*experts\.2\."),
        ({"experts": 4}, r"missing from the checkpoint: .*experts\.3\."),
        ({"rank": 64}, r"w2\.weight is \(64, 96\) in the checkpoint; config.json makes it \(64, 64\)"),
    ],
    ids=str,
)
def test_a_config_that_does_not_fit_is_refused(entry: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = write_artifact(factorized_model("MixtralForCausalLM", layers=1), tmp_path / "artifact")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["groups"]["model.layers.0.block_sparse_moe.experts"].update(entry)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match=message):
        require_sound(folder)


def test_experts_of_a_model_without_them_are_refused(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.experts"
    with pytest.raises(ArtifactError, match=f"{name}: config.json names a layer that the model does not have"):
        install_low_rank(dense_model("LlamaForCausalLM"), {name: GroupSpec(8, ("experts",), "experts", experts=2)})


@pytest.mark.parametrize("changes", [removals, narrowings])
@torch.no_grad()
def test_new_weights_of_experts_are_where_those_of_other_layers_are(
    changes: Callable[[list[Mixture]], list[tuple[Group, Level]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lrserve.compression.filed._SMALL", 0)
    store, mixtures = made(WITH_EXPERTS[0], tmp_path)
    changed, files = changes(mixtures), tmp_path / "files"
    files.mkdir()
    in_memory = compress_model(dense_model(WITH_EXPERTS[0]), changed, "narrow", store, torch.float32)
    in_files = compress_model(dense_model(WITH_EXPERTS[0]), changed, "narrow", store, torch.float32, filed=Filed(files))
    assert torch.equal(in_memory(WINDOWS).logits, in_files(WINDOWS).logits)
    assert len(in_files_of(files)) == 2 * len(changed)  # gate and up, down
    model = dense_model(WITH_EXPERTS[0])
    merged = MergedLevels(model, list(store.groups.values()), store, None, None, Filed(files))
    merged.apply({unit.name: level for unit, level in changed})
    assert len(in_files_of(files)) == 4 * len(changed)
    merged.apply({})
    assert len(in_files_of(files)) == 2 * len(changed)  # let go of
