"""Recovery lowers the divergence from the dense model, keeps the ranks, and survives interruptions."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import VOCABULARY, dense_model, levels_of

from lrserve.allocation.quality import Divergence
from lrserve.compression.assemble import compress_model
from lrserve.compression.factorize import factorize
from lrserve.compression.groups import Group, find_groups
from lrserve.compression.recover import Recovered, _backward, _texts, recover
from lrserve.compression.spectra import SpectrumStore, write_spectra
from lrserve.compression.training import install_trainable
from lrserve.errors import CalibrationError

WINDOWS = torch.randint(3, VOCABULARY, (12, 64), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[tuple[Group, int]], SpectrumStore]:
    model = dense_model("Qwen2ForCausalLM")
    groups = find_groups(model)
    folder = tmp_path_factory.mktemp("spectra")
    write_spectra(model, groups, lambda group, W, beta: factorize(W, torch.eye(group.n), torch.zeros(group.n), beta), folder)
    return [(group, 24) for group in groups if group.kind != "o"], SpectrumStore(folder, groups)


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step is a tenth of a second, so that a recovery of so many seconds is of so many steps."""
    ticks = count()
    monkeypatch.setattr("lrserve.compression.recover.time", SimpleNamespace(monotonic=lambda: next(ticks) / 10))


def run(plan: Any, folder: Path, seconds: float = 3.0, **options: Any) -> Recovered:
    ranks, store = plan
    dense = dense_model("Qwen2ForCausalLM")
    return recover(dense, dense_model("Qwen2ForCausalLM"), ranks, store, WINDOWS, folder, seconds=seconds, seed=0, **options)


def test_divergence_falls_and_ranks_stay(plan: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lrserve.compression.recover._LEARNING_RATE", 3e-3)  # for a tiny model and seconds
    monkeypatch.setattr("lrserve.compression.recover._AVERAGED", 2)
    ranks, store = plan
    outcome = run(plan, tmp_path)
    divergence = Divergence(dense_model("Qwen2ForCausalLM"), WINDOWS)

    def of(source: Any) -> float:
        return divergence(
            compress_model(dense_model("Qwen2ForCausalLM"), levels_of(ranks), "identity_block", source, torch.float32)
        )

    assert of(outcome.factors) < 0.95 * of(store)
    assert outcome.last_divergence < outcome.first_divergence
    assert all(outcome.factors.cut(group.name, rank).rank == rank for group, rank in ranks)
    again = run(plan, tmp_path)  # a second run takes what is there
    assert again.reused
    assert not outcome.reused
    assert again.steps == outcome.steps
    assert all(torch.equal(again.factors.cut(g.name, r).A, outcome.factors.cut(g.name, r).A) for g, r in ranks)
    with pytest.raises(ValueError, match="have rank"):
        outcome.factors.cut(ranks[0][0].name, 8)


def test_an_interruption_keeps_what_was_learned(plan: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(done: int) -> None:
        if done >= 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(plan, tmp_path, progress=interrupt)
    before = torch.load(tmp_path / "state.pt", weights_only=True)["progress"]
    learned = before["divergences"]
    assert before["seconds"] == pytest.approx(len(learned) / 10)
    assert len(learned) in (5, 6)  # half a second is rounded to one, and interrupts
    monkeypatch.setattr("lrserve.compression.recover._AVERAGED", len(learned))
    outcome = run(plan, tmp_path)
    assert outcome.steps == 30
    assert outcome.first_divergence == pytest.approx(sum(learned) / len(learned))
    assert not (tmp_path / "state.pt").exists()


def test_the_gradient_is_that_of_the_divergence(plan: Any) -> None:
    ranks, store = plan
    teacher, student = dense_model("Qwen2ForCausalLM"), dense_model("Qwen2ForCausalLM")
    trainable = install_trainable(student, ranks, store)
    windows = WINDOWS[:2]
    all_tokens = windows.numel()

    def loss(rows: torch.Tensor) -> torch.Tensor:
        p, q = (m(windows).logits.flatten(0, 1)[rows].log_softmax(-1) for m in (teacher, student))
        return (p.exp() * (p - q)).sum() / len(rows)

    drawn = torch.randperm(all_tokens, generator=torch.Generator().manual_seed(7))[: all_tokens // 2]
    value = _backward(teacher, student, windows, 7)
    found = {name: group.A.grad.clone() for name, group in trainable.items() if group.A.grad is not None}
    assert len(found) == len(ranks)
    student.zero_grad()
    for group in trainable.values():
        group.zero_grad()
    expected = loss(drawn)
    expected.backward()
    assert value == pytest.approx(float(expected.detach()), rel=1e-4)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient / len(drawn), trainable[name].A.grad, rtol=1e-3, atol=1e-6)


def test_short_windows_keep_the_token_that_all_begin_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lrserve.compression.recover._LENGTH", 5)
    windows = torch.arange(2 * 9).reshape(2, 9)
    assert _texts(windows).tolist() == [[0, 1, 2, 3, 4], [9, 10, 11, 12, 13]]
    windows[:, 0] = 1
    assert _texts(windows).tolist() == [[1, 1, 2, 3, 4], [1, 5, 6, 7, 8], [1, 10, 11, 12, 13], [1, 14, 15, 16, 17]]


def test_a_diverging_model_is_refused(plan: Any, tmp_path: Path) -> None:
    ranks, store = plan
    teacher = dense_model("Qwen2ForCausalLM")
    with torch.no_grad():
        teacher.model.norm.weight[0] = float("nan")
    with pytest.raises(CalibrationError, match="divergence is nan"):
        recover(teacher, dense_model("Qwen2ForCausalLM"), ranks, store, WINDOWS, tmp_path, seconds=2, seed=0)
