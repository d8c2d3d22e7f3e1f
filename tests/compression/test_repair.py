"""Training what rounding leaves: the integers stay, the error falls, and what is stored is what was trained."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from blockwise import windows
from safetensors.torch import load_file, save_file
from tiny import dense_model

from lrserve.allocation.quality import Divergence
from lrserve.compression import sequential
from lrserve.compression.assemble import compress_model
from lrserve.compression.calibrate import calibrate, read_statistics
from lrserve.compression.groups import Group, allocated, find_groups
from lrserve.compression.layers import LowRankLinear, RoundedLinear
from lrserve.compression.level import Level
from lrserve.compression.quantize import Residual
from lrserve.compression.recover import Schedule
from lrserve.compression.repair import Repairs, masters_of, outer_norms, recover_rounded, repair
from lrserve.compression.residual import rounded_factors
from lrserve.compression.rounding import Rounding
from lrserve.compression.spectra import SpectrumStore, features, write_spectra
from lrserve.errors import CalibrationError

BATCH = 5 * 12
RESIDUAL = Level(weights="int4_g32", residual=4)
PLANS: dict[str, tuple[str, dict[str, Level]]] = {
    "residuals": ("LlamaForCausalLM", dict.fromkeys(("qkv", "o", "down"), RESIDUAL)),
    "8 bits, norms of queries and keys": ("Gemma3ForCausalLM", dict.fromkeys(("qkv", "o", "down"), Level(weights="int8"))),
    "biases": ("Qwen2ForCausalLM", {"qkv": RESIDUAL, "o": Level(weights="int4_g32"), "down": Level(weights="int8")}),
    "structure": ("Qwen3ForCausalLM", {"qkv": Level(16), "o": Level(32, "int8"), "down": Level(64, "int4_g32", 4)}),
}
Changed = Sequence[tuple[Group, Level]]


class Case:
    """A tiny model, a plan for it, and the compressed model before it is repaired."""

    def __init__(self, name: str, folder: Path, layers: int = 2) -> None:
        self.architecture, levels = PLANS[name]
        self.dense, self.tokens = dense_model(self.architecture, layers=layers), windows()
        groups, folder = find_groups(self.dense), folder / "made"
        units = allocated(groups, "narrow")
        calibrate(self.dense, groups, self.tokens, folder / "statistics", pool_sequences=24, batch_tokens=96)
        write_spectra(self.dense, units, features(folder / "statistics"), folder / "spectra")
        self.store = SpectrumStore(folder / "spectra", units, folder / "statistics")
        self.rounding = Rounding(
            lambda group: read_statistics(folder / "statistics", group).second_moment(), lambda group: None, torch.float32
        )
        self.changed = [(unit, levels[unit.kind]) for unit in units]
        self.layers = layers

    def compressed(self) -> Any:
        model = dense_model(self.architecture, layers=self.layers)
        return compress_model(model, self.changed, "narrow", self.store, torch.float32, self.rounding)

    def repaired(self, folder: Path, compressed: Any | None = None, **options: Any) -> Repairs:
        compressed = compressed or self.compressed()
        how: dict[str, Any] = {"steps": 30, "learning_rate": 1e-3, "batch_tokens": BATCH, **options}
        return repair(self.dense, compressed, self.changed, self.tokens, folder, **how)

    def divergence(self, model: Any) -> float:
        return Divergence(self.dense, self.tokens)(model)


def integers(model: Any) -> dict[str, torch.Tensor]:
    """What must never change: the integers of rounded weights, and the order of inputs."""
    return {name: tensor for name, tensor in model.named_buffers() if "residual" not in name and not tensor.is_floating_point()}


def same(one: Repairs, other: Repairs) -> bool:
    return one.tensors.keys() == other.tensors.keys() and all(torch.equal(t, other.tensors[n]) for n, t in one.tensors.items())


@pytest.mark.parametrize("name", PLANS)
def test_repair_brings_the_model_closer_and_leaves_the_integers(name: str, tmp_path: Path) -> None:
    case = Case(name, tmp_path)
    compressed, trained = case.compressed(), case.compressed()
    repairs = case.repaired(tmp_path / "repair", trained)
    before, frozen = case.divergence(compressed), copy.deepcopy(integers(compressed))
    assert len(frozen) > 0
    assert not frozen.keys() & repairs.tensors.keys()
    repairs.apply(compressed)
    assert all(torch.equal(tensor, frozen[n]) for n, tensor in integers(compressed).items())
    after = case.divergence(compressed)
    assert 0 < after < 0.95 * before  # 8 bits leave little to repair
    assert after == case.divergence(trained)
    stored, state = compressed.state_dict(), trained.state_dict()
    assert all(torch.equal(tensor, state[n]) for n, tensor in stored.items())
    assert all(tensor.dtype == stored[n].dtype for n, tensor in repairs.tensors.items())


def test_what_is_trained(tmp_path: Path) -> None:
    case = Case("biases", tmp_path, layers=1)
    compressed = case.compressed()
    layer = "model.layers.0."
    expected = {
        *(f"{layer}{norm}.weight" for norm in ("input_layernorm", "post_attention_layernorm")),
        *(f"{layer}self_attn.{x}_proj.{leaf}" for x in "qkv" for leaf in ("weight_scale", "bias", "residual_B.weight")),
        *(f"{layer}self_attn.qkv_proj.residual_A.{leaf}" for leaf in ("weight", "weight_scale")),
        *(f"{layer}{x}_proj.weight_scale" for x in ("self_attn.o", "mlp.gate", "mlp.up", "mlp.down")),
    }
    assert set(masters_of(compressed, case.changed)()) == expected
    assert {name: set(own()) for name, own in outer_norms(compressed).items()} == {"model.norm": {"model.norm.weight"}}
    assert all(name.startswith("self_attn.") for name in masters_of(compressed, case.changed[:1])(layer) if "proj" in name)


@pytest.mark.parametrize("name", PLANS)
@torch.no_grad()
def test_before_the_first_step_the_masters_stand_for_the_model(name: str, tmp_path: Path) -> None:
    case = Case(name, tmp_path, layers=1)
    compressed = case.compressed()
    before = compressed(case.tokens).logits
    for masters in (masters_of(compressed, case.changed), *outer_norms(compressed).values()):
        Repairs(masters.stored()).apply(compressed)
    after = compressed(case.tokens).logits
    assert (after - before).abs().mean() < 1e-3 * before.std()  # inputs of 8 bits may fall on the other side of a half


def test_a_residual_is_rounded_again() -> None:
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(5, 96, generator=generator), torch.randn(64, 5, generator=generator) * torch.logspace(-3, 2, 5)
    B[:, 2] = 0
    found = rounded_factors(B, A)
    assert isinstance(found, Residual)
    assert int(found.A.abs().max()) == 127
    assert (found.dense() - B @ A).norm() < 0.01 * (B @ A).norm()


def test_values_are_stored_in_the_dtype_that_is_served(tmp_path: Path) -> None:
    case = Case("residuals", tmp_path, layers=1)
    case.dense = case.dense.bfloat16()
    served = case.compressed().bfloat16()
    repairs = case.repaired(tmp_path / "repair", served, steps=3)
    dtypes = {tensor.dtype for tensor in repairs.tensors.values()}
    assert dtypes == {torch.bfloat16, torch.float32, torch.int8}
    exact = repairs.apply(case.compressed())
    for name, tensor in repairs.tensors.items():
        assert torch.equal(exact.state_dict()[name], tensor.to(exact.state_dict()[name].dtype)), name


def test_an_interrupted_repair_resumes_with_the_same_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("residuals", tmp_path, layers=3)
    whole = case.repaired(tmp_path / "whole", steps=4)
    save = sequential.write_tensors

    def fail_at_the_second(path: Path, tensors: Any) -> None:
        if "00001" in path.name:
            raise KeyboardInterrupt
        save(path, tensors)

    monkeypatch.setattr(sequential, "write_tensors", fail_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        case.repaired(tmp_path / "cut", steps=4)
    monkeypatch.setattr(sequential, "write_tensors", save)
    done: list[int] = []
    assert same(case.repaired(tmp_path / "cut", steps=4, progress=done.append), whole)
    assert done == [1, 2, 3]


def test_repairs_of_another_plan_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="another plan"):
        Repairs({"model.layers.0.self_attn.q_proj.weight_scale": torch.zeros(2, 2)}).apply(dense_model("LlamaForCausalLM"))


@pytest.mark.parametrize("name", ["residuals", "structure"])
def test_recomputing_does_not_change_what_a_rounded_model_learns(name: str, tmp_path: Path) -> None:
    case = Case(name, tmp_path)

    def run(folder: str, **portions: Any) -> tuple[Repairs, Any]:
        schedule = Schedule(tokens=2 * case.tokens.numel(), batch_tokens=case.tokens.numel() // 2, **portions)
        return recover_rounded(
            case.dense, case.compressed(), case.changed, case.tokens, tmp_path / folder, schedule=schedule, seed=0
        )

    (whole, found), (parts, other) = run("whole"), run("parts", recompute=True, pass_tokens=case.tokens.numel() // 4)
    assert found.steps == 4
    assert other.last_divergence == pytest.approx(found.last_divergence, rel=1e-4)
    assert whole.tensors.keys() == parts.tensors.keys()
    for key, tensor in whole.tensors.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(parts.tensors[key], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["residuals", "structure"])
def test_recovery_of_a_rounded_model_lowers_the_divergence_and_resumes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = count()
    monkeypatch.setattr("lrserve.compression.recover.time", SimpleNamespace(monotonic=lambda: next(ticks) / 10))
    monkeypatch.setattr("lrserve.compression.recover._LEARNING_RATE", 1e-3)
    case = Case(name, tmp_path)

    def run(folder: Path, **options: Any) -> Any:
        return recover_rounded(
            case.dense, case.compressed(), case.changed, case.tokens, folder, schedule=Schedule(seconds=3.0), seed=0, **options
        )

    def interrupt(done: int) -> None:
        if done >= 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "recover", progress=interrupt)
    learned = len(torch.load(tmp_path / "recover" / "state.pt", weights_only=True)["progress"]["divergences"])
    repairs, found = run(tmp_path / "recover")
    assert learned >= 5
    assert found.steps == 30
    assert not found.reused
    compressed = case.compressed()
    frozen = copy.deepcopy(integers(compressed))
    before, after = case.divergence(compressed), case.divergence(repairs.apply(compressed))
    assert 0 < after < 0.9 * before
    assert all(torch.equal(tensor, frozen[n]) for n, tensor in integers(compressed).items())
    again, reused = run(tmp_path / "recover")
    assert reused.reused
    assert same(again, repairs)
    save_file(repairs.tensors, tmp_path / "repairs.safetensors")
    assert same(Repairs(load_file(tmp_path / "repairs.safetensors")), repairs)
    assert any(isinstance(module, (RoundedLinear, LowRankLinear)) for module in compressed.modules())
