"""Two processes that recover together: the loss curve and the factors of one, also across an interruption."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from forking import FORKING
from tiny import VOCABULARY, dense_model

from lrserve.compression.factorize import factorize
from lrserve.compression.groups import find_groups
from lrserve.compression.recover import Schedule, recover
from lrserve.compression.spectra import SpectrumStore, write_spectra
from lrserve.compression.team import ALONE, Team
from lrserve.compression.training import TrainedFactors

WINDOWS = torch.randint(3, VOCABULARY, (15, 64), generator=torch.Generator().manual_seed(1))
SCHEDULE = Schedule(tokens=8 * 320, batch_tokens=320, pass_tokens=128)  # five windows a step: three for one of two processes
LAST = SCHEDULE.tokens - 320
PATIENCE = 180  # seconds


def train(place: Path, folder: Path, team: Team, stop: int | None = None) -> TrainedFactors:
    """Recover in `folder`, to the end or until so many tokens are spent."""

    def interrupt(spent: int) -> None:
        if spent == stop:
            raise KeyboardInterrupt

    dense = dense_model("Qwen2ForCausalLM")
    groups = find_groups(dense)
    ranks, store = [(group, 24) for group in groups if group.kind != "o"], SpectrumStore(place, groups)
    student = dense_model("Qwen2ForCausalLM")
    how: dict[str, Any] = {"schedule": SCHEDULE, "seed": 0, "team": team, "progress": interrupt}
    return recover(dense, student, ranks, store, WINDOWS, folder, **how).factors


def member(place: Path, folder: Path, index: int, stop: int | None) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    meeting = folder / f"meeting-{stop}"
    torch.distributed.init_process_group("gloo", init_method=meeting.as_uri(), rank=index, world_size=2)
    interrupted = False
    try:
        train(place, folder, Team(index, 2), stop)
    except KeyboardInterrupt:
        interrupted = True
    assert interrupted == (stop is not None)
    torch.distributed.destroy_process_group()


def together(place: Path, folder: Path, stop: int | None) -> None:
    folder.mkdir(exist_ok=True)
    members = [FORKING.Process(target=member, args=(place, folder, index, stop)) for index in range(2)]
    for process in members:
        process.start()
    for process in members:
        process.join(PATIENCE)
        assert process.exitcode == 0


def curve(folder: Path) -> list[float]:
    found: list[float] = torch.load(folder / "state.pt", weights_only=True)["progress"]["divergences"]
    return found


def test_two_processes_learn_what_one_does(tmp_path: Path) -> None:
    model = dense_model("Qwen2ForCausalLM")
    groups = find_groups(model)
    write_spectra(model, groups, lambda g, W, beta: factorize(W, torch.eye(g.n), torch.zeros(g.n), beta), tmp_path / "spectra")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "spectra", tmp_path / "one", ALONE, LAST)
    expected = curve(tmp_path / "one")
    one = train(tmp_path / "spectra", tmp_path / "one", ALONE).tensors()
    together(tmp_path / "spectra", tmp_path / "two", 3 * 320)  # is interrupted
    assert len(curve(tmp_path / "two")) == 3
    together(tmp_path / "spectra", tmp_path / "two", LAST)  # goes on, and is interrupted
    assert curve(tmp_path / "two") == pytest.approx(expected, rel=1e-5)
    assert len(expected) == 7
    together(tmp_path / "spectra", tmp_path / "two", None)
    two = train(tmp_path / "spectra", tmp_path / "two", ALONE).tensors()  # which reads what is there
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-5)


def test_every_item_is_one_processes() -> None:
    for items in (0, 1, 5, 8):
        for count in (1, 2, 3, 9):
            assert [item for index in range(count) for item in Team(index, count).part(items)] == list(range(items))
