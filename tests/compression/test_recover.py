"""Recovery lowers the divergence from the dense model, keeps the ranks, and survives interruptions."""

from __future__ import annotations

from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import VOCABULARY, dense_model, levels_of
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from lrserve.allocation.quality import Divergence
from lrserve.compression.assemble import compress_model
from lrserve.compression.factorize import factorize
from lrserve.compression.groups import Group, find_groups
from lrserve.compression.recover import Recovered, Schedule, _backward, _texts, recover
from lrserve.compression.spectra import SpectrumStore, write_spectra
from lrserve.compression.training import install_trainable
from lrserve.errors import CalibrationError

WINDOWS = torch.randint(3, VOCABULARY, (12, 64), generator=torch.Generator().manual_seed(1))
THREE_SECONDS = Schedule(seconds=3.0)
TOKENS = Schedule(tokens=1536, batch_tokens=256)  # twice the text, in six steps


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


def run(plan: Any, folder: Path, schedule: Schedule = THREE_SECONDS, **options: Any) -> Recovered:
    ranks, store = plan
    dense = dense_model("Qwen2ForCausalLM")
    return recover(
        dense, lambda: dense_model("Qwen2ForCausalLM"), ranks, store, WINDOWS, folder, schedule=schedule, seed=0, **options
    )


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


def test_tokens_are_a_budget_and_decide_the_learning_rate(plan: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    step = torch.optim.AdamW.step

    def note(optimizer: Any, *arguments: Any) -> Any:
        rates.append(optimizer.param_groups[0]["lr"])
        return step(optimizer, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", note)
    monkeypatch.setattr("lrserve.compression.recover._WARMUP_STEPS", 1)
    spent: list[int] = []
    outcome = run(plan, tmp_path / "tokens", TOKENS, progress=spent.append)
    assert (outcome.steps, outcome.tokens) == (6, 1536)
    assert spent == [256, 512, 768, 1024, 1280, 1536]
    assert rates == pytest.approx([1.5e-4 * (1 - done / 6) for done in range(6)])
    assert run(plan, tmp_path / "seconds").tokens == 30 * 768  # all of the text in a step, at ten steps a second


def test_an_interruption_changes_nothing_of_a_budget_of_tokens(plan: Any, tmp_path: Path) -> None:
    def interrupt(done: int) -> None:
        if done == 768:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(plan, tmp_path / "cut", TOKENS, progress=interrupt)
    cut, whole = (run(plan, tmp_path / name, TOKENS) for name in ("cut", "whole"))
    assert cut.steps == whole.steps
    assert cut.last_divergence == whole.last_divergence
    for name, tensor in whole.factors.tensors().items():
        assert torch.equal(cut.factors.tensors()[name], tensor)


@pytest.mark.parametrize("portions", [{"pass_tokens": 64}, {"pass_tokens": 128, "recompute": True}])
def test_passes_and_recomputing_do_not_change_what_is_learnt(
    plan: Any, tmp_path: Path, portions: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_block: list[int] = []
    forward = Qwen2DecoderLayer.forward

    def counted(*arguments: Any, **options: Any) -> Any:
        run_block.append(1)
        return forward(*arguments, **options)

    monkeypatch.setattr(Qwen2DecoderLayer, "forward", counted)
    whole = run(plan, tmp_path / "whole", TOKENS)
    once = len(run_block)
    parts = run(plan, tmp_path / "parts", replace(TOKENS, **portions))
    passes = TOKENS.batch_tokens // portions["pass_tokens"]
    again = 1.5 if "recompute" in portions else 1.0  # teacher, student, and the student again
    assert len(run_block) - once == once * passes * again
    assert parts.last_divergence == pytest.approx(whole.last_divergence, rel=1e-5)
    for name, tensor in whole.factors.tensors().items():
        torch.testing.assert_close(parts.factors.tensors()[name], tensor, rtol=1e-4, atol=1e-5)


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
    value = _backward(teacher, student, windows, drawn) / len(drawn)
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
    monkeypatch.setattr("lrserve.compression.recover.LENGTH", 5)
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
        recover(teacher, lambda: dense_model("Qwen2ForCausalLM"), ranks, store, WINDOWS, tmp_path, schedule=THREE_SECONDS, seed=0)
