"""Removing neurons: the order, the compensation, and what the errors promise."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import VOCABULARY, dense_model, levels_of

from lrserve.allocation.quality import Divergence
from lrserve.compression.assemble import compress_model
from lrserve.compression.calibrate import calibrate
from lrserve.compression.factorize import Factors, FactorSource, Side, factorize, sensitivity
from lrserve.compression.groups import allocated, find_groups
from lrserve.compression.level import Level
from lrserve.compression.narrow import _solved, narrow
from lrserve.compression.propagate import propagation
from lrserve.compression.recover import Schedule, recover
from lrserve.compression.refine import adam
from lrserve.compression.sequential import Step, walk
from lrserve.compression.spectra import SpectrumStore, features, write_spectra
from lrserve.compression.structure import structured
from lrserve.compression.training import TrainedFactors, install_trainable
from lrserve.errors import CalibrationError


def problem(m: int, n: int, seed: int, side: Side | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, object]:
    """W, C, mu and a gradient moment, float64."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    mixing, root = random(n, n), random(m, m)
    W = random(m, n)
    moment = root @ root.T
    gradient = None if side is None else (side, moment if side == "output" else W.T @ moment @ W)
    return W, mixing @ mixing.T / n, random(n), gradient


def error(W: torch.Tensor, C: torch.Tensor, F: torch.Tensor, kept: list[int]) -> float:
    """E|F (x - x')|^2 with x' the best linear guess of x from the kept entries."""
    guess = torch.linalg.solve(C[kept][:, kept], C[kept]).T
    left = C - guess @ C[kept]
    return float((F @ left @ F.T).trace())


@settings(max_examples=40, deadline=None)
@given(m=st.integers(1, 8), n=st.integers(1, 12), seed=st.integers(0, 999))
def test_every_width_is_the_best_guess_from_the_neurons_that_it_keeps(m: int, n: int, seed: int) -> None:
    W, C, mu, _ = problem(m, n, seed)
    beta = torch.ones(m, dtype=torch.float64)
    spectrum = narrow(W, C, mu, beta)
    errors = spectrum.errors()
    assert (errors[1:] <= errors[:-1]).all()
    for width in range(1, n + 1):
        factors = structured(spectrum.cut(width), "narrow_in")
        assert factors.order is not None
        kept = factors.order.tolist()
        assert len(set(kept)) == width == factors.rank
        B = torch.linalg.solve(C[kept][:, kept], C[kept] @ W.T).T
        # a ridge of a thousandth of each neuron's variance stands between the two
        assert error(W, C, W, kept) <= float(((W - place(factors.B, kept, n)) @ C * (W - place(factors.B, kept, n))).sum()) + 1e-9
        assert float(((place(factors.B - B, kept, n)) @ C * place(factors.B - B, kept, n)).sum()) <= 0.05 * float((W @ C * W).sum())
        torch.testing.assert_close(factors.B @ mu[kept] + factors.b, W @ mu + beta)  # exact in the mean
    whole = structured(spectrum.cut(n), "narrow_in")
    assert whole.order is not None
    torch.testing.assert_close(whole.B, W[:, whole.order.long()])


def place(B: torch.Tensor, kept: list[int], n: int) -> torch.Tensor:
    whole = B.new_zeros(len(B), n)
    whole[:, kept] = B
    return whole


@pytest.mark.parametrize("side", [None, "output", "input"])
def test_the_first_neuron_is_the_best_one_and_few_are_nearly_the_best_set(side: Side | None) -> None:
    for seed in range(8):
        W, C, mu, gradient = problem(6, 9, seed, side)
        F = sensitivity(W, gradient)  # type: ignore[arg-type]
        spectrum = narrow(W, C, mu, None, gradient)  # type: ignore[arg-type]
        order = structured(spectrum.cut(1), "narrow_in").order
        assert order is not None
        alone = [error(W, C, F, [j]) for j in range(9)]
        assert alone[int(order)] <= 1.001 * min(alone)
        chosen = structured(spectrum.cut(3), "narrow_in").order
        assert chosen is not None
        sets = sorted(error(W, C, F, list(kept)) for kept in itertools.combinations(range(9), 3))
        assert error(W, C, F, chosen.tolist()) <= sets[len(sets) // 10]  # among the best tenth of all sets
        promised = [float(value) for value in spectrum.errors()]
        assert promised[3] == pytest.approx(error(W, C, F, chosen.tolist()), rel=0.05)


def test_blocks_choose_as_one_by_one_does() -> None:
    """More neurons than one block: what the first block knows must count in the second."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 50, generator=generator, dtype=torch.float64)
    x = torch.cat([x, x + 0.01 * torch.randn(400, 50, generator=generator, dtype=torch.float64)], dim=1)  # each of them twice
    W = torch.randn(60, 100, generator=generator, dtype=torch.float64)
    spectrum = narrow(W, torch.cov(x.T), x.mean(0))
    assert float(spectrum.errors()[50] / spectrum.errors()[0]) < 0.01
    kept = structured(spectrum.cut(50), "narrow_in").order
    assert kept is not None
    assert len({int(j) % 50 for j in kept}) == 50


@pytest.mark.parametrize("kind", ["zero", "one token", "tiny", "huge", "half dead"])
def test_degenerate_covariances_give_finite_factors(kind: str) -> None:
    W, C, mu, _ = problem(5, 8, 0)
    if kind == "zero":
        C = torch.zeros_like(C)
    elif kind == "one token":
        C = torch.outer(mu, mu)
    elif kind in ("tiny", "huge"):
        C = C * (1e-30 if kind == "tiny" else 1e12)
    else:
        C[:4] = C[:, :4] = 0
    spectrum = narrow(W, C, mu)
    for tensor in (spectrum.WR, spectrum.scales, spectrum.eigenvalues, spectrum.mean, spectrum.offset):
        assert torch.isfinite(tensor.float()).all()
    for width in range(1, 9):
        factors = structured(spectrum.cut(width), "narrow_in")
        assert torch.isfinite(factors.B.bfloat16()).all()
        assert torch.isfinite(factors.b.bfloat16()).all()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_what_float32_cannot_solve_is_solved_in_float64(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(200, 3, generator=generator, dtype=torch.float64)
    R = (x @ x.T + 3e-6 * torch.eye(200)).float()
    assert torch.linalg.cholesky_ex(R)[1] > 0
    right = R @ torch.randn(200, 4, generator=generator)
    torch.testing.assert_close(R.double() @ _solved(R, right), right.double(), rtol=1e-3, atol=1e-3)


def test_statistics_that_are_not_finite_are_refused() -> None:
    W, C, mu, _ = problem(3, 4, 0)
    C[0, 0] = float("nan")
    with pytest.raises(CalibrationError, match="not finite"):
        narrow(W, C, mu)


def test_factors_that_read_every_input_are_no_narrow_ones() -> None:
    W, C, mu, _ = problem(5, 8, 0)
    with pytest.raises(ValueError, match="read all inputs cannot become narrow_in"):
        structured(factorize(W, C, mu).cut(3), "narrow_in")


def test_improvements_leave_the_neurons_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lrserve.compression.recover._LEARNING_RATE", 3e-3)
    steps = itertools.count()
    monkeypatch.setattr("lrserve.compression.recover.time", SimpleNamespace(monotonic=lambda: float(next(steps))))
    windows = torch.randint(3, VOCABULARY, (8, 24), generator=torch.Generator().manual_seed(1))
    model = dense_model("LlamaForCausalLM")
    groups = find_groups(model)
    calibrate(model, groups, windows, tmp_path / "statistics", pool_sequences=8, batch_tokens=48)
    units = allocated(groups, "narrow")
    write_spectra(model, units, features(tmp_path / "statistics"), tmp_path / "spectra")
    store = SpectrumStore(tmp_path / "spectra", units, tmp_path / "statistics")
    stored = sum(path.stat().st_size for path in (tmp_path / "spectra").iterdir())
    needed = 4 * sum(unit.m * unit.n if unit.fed_by else unit.full_rank * (unit.m + unit.n) for unit in units)
    assert stored < 1.2 * needed  # no (n, n) of neurons: their covariance is read again
    ranks = [(unit, 48 if unit.kind == "down" else 24) for unit in units]

    def walked(name: str, step: Step) -> FactorSource:
        return walk(dense_model("LlamaForCausalLM"), ranks, windows, tmp_path / name, step, batch_tokens=96)

    dense = dense_model("LlamaForCausalLM")
    found = {
        "propagated": walked("propagate", propagation()),
        "trained": walked("adam", adam(store, steps=20, learning_rate=3e-3)),
        "recovered": recover(
            dense,
            lambda: dense_model("LlamaForCausalLM"),
            ranks,
            store,
            windows,
            tmp_path / "recover",
            schedule=Schedule(seconds=20.0),
            seed=0,
        ).factors,
    }
    divergence = Divergence(dense_model("LlamaForCausalLM"), windows)
    before = divergence(compress_model(dense_model("LlamaForCausalLM"), levels_of(ranks), "narrow", store, torch.float32))
    for how, source in found.items():
        after = divergence(compress_model(dense_model("LlamaForCausalLM"), levels_of(ranks), "narrow", source, torch.float32))
        assert 0 < after < 0.6 * before, how
        for unit, rank in ranks:
            if unit.fed_by and how != "propagated":  # which chooses anew, for other inputs
                kept = [structured(factors.cut(unit.name, rank), "narrow_in").order for factors in (source, store)]
                assert kept[0] is not None
                assert kept[1] is not None
                assert torch.equal(*kept), how
    for how in ("trained", "recovered"):
        for unit, rank in ranks:
            if unit.fed_by:
                factors = found[how].cut(unit.name, rank)
                assert factors.feeding is not None
                assert factors.order is not None
                neurons = factors.order.long()
                dense_rows = [model.get_submodule(member).weight[neurons] for member in unit.fed_by.members]
                assert not torch.equal(factors.feeding, torch.cat(dense_rows)), how  # the rows that are left learn too
    exported = compress_model(dense_model("LlamaForCausalLM"), levels_of(ranks), "narrow", found["trained"], torch.float32)
    training = dense_model("LlamaForCausalLM")
    install_trainable(training, ranks, found["trained"])
    logits = [m(input_ids=windows, use_cache=False).logits for m in (exported, training)]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)


def test_trained_rows_are_rounded_and_have_to_be_finite() -> None:
    model = dense_model("LlamaForCausalLM", layers=1)
    unit = next(unit for unit in allocated(find_groups(model), "narrow") if unit.fed_by)
    assert unit.fed_by is not None
    A, B, order = torch.zeros(3, 0), torch.randn(unit.m, 3), torch.tensor([1, 4, 5], dtype=torch.int32)
    rows = torch.randn(6, unit.fed_by.n)

    def exported(feeding: torch.Tensor, dtype: torch.dtype) -> Any:
        source = TrainedFactors({unit.name: Factors(A=A, B=B, b=torch.zeros(unit.m), order=order, feeding=feeding)})
        kept = TrainedFactors.from_tensors(source.tensors())
        return compress_model(dense_model("LlamaForCausalLM", layers=1), [(unit, Level(3))], "narrow", kept, dtype)

    found = exported(rows, torch.bfloat16)
    gate, up = (found.get_submodule(member).weight for member in unit.fed_by.members)
    assert torch.equal(torch.cat([gate, up]), rows.bfloat16().float())
    rows[0, 0] = 1e6
    with pytest.raises(CalibrationError, match="not finite in torch.float16"):
        exported(rows, torch.float16)
