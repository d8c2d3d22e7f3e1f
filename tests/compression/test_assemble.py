"""A plan with every kind of level: merged to judge it, and as the layers that are exported."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from blockwise import in_files_of
from tiny import FAMILIES_TESTED, VOCABULARY, WITH_MLPS, dense_model

from lrserve.compression.assemble import MergedLevels, compress_model, parts, rows_of
from lrserve.compression.calibrate import calibrate, read_statistics
from lrserve.compression.filed import Filed
from lrserve.compression.gradients import GradientStore, collect_gradients
from lrserve.compression.groups import Group, Structure, allocated, find_groups
from lrserve.compression.level import DENSE, Level
from lrserve.compression.rounding import Rounding
from lrserve.compression.spectra import SpectrumStore, features, write_spectra

WINDOWS = torch.randint(3, VOCABULARY, (8, 12), generator=torch.Generator().manual_seed(1))
LEVELS = (
    Level(weights="int8"),
    Level(weights="int4_g32"),
    Level(weights="int4_g32", residual=8),
    Level(32, "int8"),
    Level(64, "int4_g32"),
    Level(64, "int4_g32", 4),
    Level(16),
)
OF_MLPS = LEVELS[4:6]
"""Only fewer neurons are rounded to 4 bits."""


Made = Callable[[str], tuple[SpectrumStore, Rounding]]


def make(architecture: str, folder: Path) -> tuple[SpectrumStore, Rounding]:
    """Calibrate a tiny model and factorize it for plans that remove neurons."""
    model = dense_model(architecture)
    groups = find_groups(model)
    calibrate(model, groups, WINDOWS, folder / "statistics", pool_sequences=8, batch_tokens=48)
    collect_gradients(model, groups, WINDOWS, folder / "gradients", batch_tokens=48, seed=0)
    gradients = GradientStore(folder / "gradients")
    units = allocated(groups, "narrow")
    write_spectra(model, units, features(folder / "statistics", gradients.read), folder / "spectra")
    rounding = Rounding(
        lambda group: read_statistics(folder / "statistics", group).second_moment(), gradients.outputs, torch.float32
    )
    return SpectrumStore(folder / "spectra", units, folder / "statistics"), rounding


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """`make`, once for each architecture."""
    return cache(lambda architecture: make(architecture, tmp_path_factory.mktemp("made")))


def suits(unit: Group, level: Level, structure: Structure) -> bool:
    whole = level.rank is None or (unit.fed_by is not None and level.rank < unit.n)
    factors = level.rank is not None and level.rank < unit.full_rank and level.weights in (None, "int8")
    return whole or (factors and unit.stored_as(structure) != "narrow_in")


@pytest.mark.parametrize(
    ("level", "architecture"),
    [(level, name) for level in LEVELS for name in FAMILIES_TESTED if name in WITH_MLPS or level not in OF_MLPS],
    ids=str,
)
@torch.no_grad()
def test_what_is_judged_is_what_is_exported(
    level: Level, architecture: str, tmp_path: Path, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lrserve.compression.filed._SMALL", 0)
    store, rounding = made(architecture)
    changed = [(unit, level) for unit in store.groups.values() if suits(unit, level, "narrow")]
    assert changed
    model: Any = dense_model(architecture)
    before = model(WINDOWS).logits
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    merged = MergedLevels(model, list(store.groups.values()), store, rounding, scratch)
    merged.apply({unit.name: Level(weights="int8") for unit in store.groups.values()})
    kept = len(in_files_of(scratch))
    assert kept == len(find_groups(model))
    merged.apply({unit.name: level for unit, level in changed})
    if level == Level(weights="int8"):
        assert len(in_files_of(scratch)) == kept
    judged = model(WINDOWS).logits
    exported = compress_model(dense_model(architecture), changed, "narrow", store, torch.float32, rounding, Filed(scratch))(
        WINDOWS
    ).logits
    assert (judged - before).abs().max() > 1e-4
    difference, spread = (judged - exported).abs(), before.std()
    if level == Level(32, "int8"):  # the inputs of second factors are rounded in what is exported only
        assert difference.mean() <= 0.1 * spread
    else:  # inputs of 8 bits may fall on the other side of a half
        assert difference.max() <= (0.05 if level.weights == "int8" else 1e-3) * spread
    merged.apply({})
    assert torch.equal(model(WINDOWS).logits, before)


@torch.no_grad()
def test_a_residual_takes_most_of_the_error_of_rounding_back(made: Made) -> None:
    store, rounding = made("LlamaForCausalLM")
    units = list(store.groups.values())
    model: Any = dense_model("LlamaForCausalLM")
    before = model(WINDOWS).logits
    merged = MergedLevels(model, units, store, rounding)
    errors = []
    for residual in (0, 8, 32):
        merged.apply({unit.name: Level(weights="int4_g32", residual=residual) for unit in units})
        errors.append(float((model(WINDOWS).logits - before).square().mean()))
    assert errors[0] > 1.5 * errors[1] > 2 * errors[2]
    left = merged.left(units[0], "int4_g32", (8, 32))
    assert 1 > left[8] > left[32] >= 0
    merged.apply(dict.fromkeys(store.groups, DENSE))
    assert torch.equal(model(WINDOWS).logits, before)


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Phi3ForCausalLM"])  # q, k, v share an A, or are one tensor
@pytest.mark.parametrize("level", LEVELS, ids=str)
@torch.no_grad()
def test_weights_in_files_are_those_in_memory(
    level: Level, architecture: str, tmp_path: Path, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lrserve.compression.filed._SMALL", 0)
    store, rounding = made(architecture)
    units = list(store.groups.values())
    changed = [(unit, level) for unit in units if suits(unit, level, "narrow")]
    states, logits, files = [], [], []
    for place in (None, tmp_path / "files"):
        if place:
            place.mkdir()
        model = dense_model(architecture)
        merged = MergedLevels(model, units, store, rounding, None, Filed(place))
        merged.apply({unit.name: level for unit, level in changed})
        logits.append(model(WINDOWS).logits)
        exported = compress_model(dense_model(architecture), changed, "narrow", store, torch.bfloat16, rounding, Filed(place))
        states.append(exported.state_dict())
        if place:
            files = in_files_of(place)
            before = len(files)
            merged.apply({})
            assert len(in_files_of(place)) < before  # let go of with the tensor
    assert torch.equal(*logits)
    assert all(torch.equal(states[1][name], tensor) for name, tensor in states[0].items())
    weights = [name for name, tensor in states[1].items() if tensor.ndim == 2 and "proj" in name]
    assert len(files) >= len(weights) / 2
    places = [range(*(int(end, 16) for end in line.split()[0].split("-"))) for line in in_files_of(tmp_path / "files")]
    own = tuple(f"{name}." for unit, _ in changed for group in parts(unit) for name in (group.name, *group.members))
    for name, tensor in states[1].items():
        if name.startswith(own):
            assert any(tensor.data_ptr() in place for place in places), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn])
def test_a_tensor_in_a_file_keeps_its_kind(dtype: torch.dtype, tmp_path: Path) -> None:
    tensor = torch.arange(1 << 17).view(256, 512).remainder(100).to(dtype).T  # not contiguous
    filed = Filed(tmp_path)(tensor)
    assert in_files_of(tmp_path)
    assert (filed.dtype, filed.shape) == (dtype, tensor.shape)
    assert torch.equal(filed.float(), tensor.float())
    assert Filed()(tensor) is tensor
    assert Filed(tmp_path)(tensor[:4, :4]).data_ptr() == tensor.data_ptr()  # not worth a file


def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(OSError, match="No space"):
        Filed(tmp_path)(torch.zeros(1 << 16))
    assert not list(tmp_path.iterdir())


def test_rows_of_the_outputs_that_are_kept() -> None:
    gate_up = Group("mlp.gate_up", "gate_up", 0, ("mlp.gate", "mlp.up"), out_features=(6, 6), in_features=4)
    assert rows_of(gate_up, torch.tensor([1, 4])).tolist() == [1, 4, 7, 10]
