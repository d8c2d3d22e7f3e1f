"""Two processes that recover together, with copies of the models or with parts of them: what one learns, also across interruptions.

Two processes go through all cases once, which a fixture starts: a process takes seconds to import torch.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from compression.test_repair import Case
from tiny import VOCABULARY, dense_model

from lrserve.compression import recover as recover_module
from lrserve.compression.recover import Schedule, recover
from lrserve.compression.repair import recover_rounded
from lrserve.compression.team import ALONE, Team

WINDOWS = torch.randint(3, VOCABULARY, (15, 64), generator=torch.Generator().manual_seed(1))
STEP = 320
SCHEDULE = Schedule(tokens=8 * STEP, batch_tokens=STEP, pass_tokens=64, recompute=True)
"""Five windows a step, one a pass: three passes for one of two processes, and two for the other."""
LAST = SCHEDULE.tokens - STEP
PATIENCE = 180  # seconds
HOW = ("copies", "sharded")
KINDS = ("factors", "residuals", "structure")
"""What learns: factors, some of MLPs with fewer neurons, or what is not an integer of a rounded model (`test_repair.PLANS`)."""


class Recovery:
    """A recovery of a tiny model, made of the same inputs in every process; `place` is for its files."""

    def __init__(self, kind: str, place: Path, dtype: torch.dtype = torch.float32) -> None:
        place.mkdir(parents=True, exist_ok=True)
        self.kind, self.case = kind, Case("structure" if kind == "factors" else kind, place)
        self.teacher = self.case.dense
        self.student = dense_model(self.case.architecture) if kind == "factors" else self.case.compressed()
        self.teacher, self.student = self.teacher.to(dtype), self.student.to(dtype)

    def run(self, folder: Path, team: Team = ALONE, at: Callable[[int], None] = lambda spent: None) -> dict[str, torch.Tensor]:
        """Train, calling `at` with the tokens that are spent; returns what was learnt, by unique names."""
        how: dict[str, Any] = {"schedule": SCHEDULE, "seed": 0, "team": team, "progress": at}
        if self.kind == "factors":
            ranks = [(unit, 48 if unit.fed_by else 24) for unit, _ in self.case.changed]
            return recover(self.teacher, lambda: self.student, ranks, self.case.store, WINDOWS, folder, **how).factors.tensors()
        return recover_rounded(self.teacher, self.student, self.case.changed, WINDOWS, folder, **how)[0].tensors

    def run_until(self, folder: Path, team: Team, stop: int) -> None:
        """Train until so many tokens are spent."""

        def interrupt(spent: int) -> None:
            if spent == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            self.run(folder, team, interrupt)
        team.wait()  # for what the first one saves

    def held(self) -> int:
        """Return the bytes that this process holds of the decoder blocks of both models."""
        blocks = [model.model.layers for model in (self.teacher, self.student)]
        tensors = [tensor for own in blocks for tensor in (*own.parameters(), *own.buffers())]
        return sum(own.nbytes for own in map(local, tensors))


def local(tensor: Any) -> torch.Tensor:
    """Return what this process holds of a tensor."""
    found: torch.Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return found


def noting(noted: dict[str, int]) -> Callable[..., Any]:
    """Return AdamW's step, which notes under `bytes` how many bytes of moments this process holds."""
    step = torch.optim.AdamW.step

    def note(optimizer: Any, *arguments: Any) -> Any:
        found = step(optimizer, *arguments)
        noted["bytes"] = sum(local(value).nbytes for moments in optimizer.state.values() for value in moments.values())
        return found

    return note


def go_through_all(folder: Path, index: int) -> None:
    """Be one of two processes, and leave in `folder` what every case comes to."""
    meeting = (folder / "meeting").as_uri()
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=index, world_size=2)
    moments: dict[str, int] = {}
    torch.optim.AdamW.step = noting(moments)  # type: ignore[method-assign]

    def recovery(kind: str) -> Recovery:
        return Recovery(kind, folder / f"inputs-{index}-{kind}")

    for kind in KINDS:
        for how in HOW:
            place, team = folder / f"{kind}-{how}", Team(index, 2, sharded=how == "sharded")
            recovery(kind).run_until(place, team, 3 * STEP)
            if index == 0:
                copytree(place, folder / f"{kind}-{how}-cut")
            (last := recovery(kind)).run_until(place, team, LAST)
            held = {"blocks": last.held(), "moments": moments["bytes"]}
            (folder / f"{kind}-{how}-held-{index}.json").write_text(json.dumps(held))
            if index == 0:
                copytree(place, folder / f"{kind}-{how}-last")
            recovery(kind).run(place, team)
        in_16_bits = Recovery(kind, folder / f"inputs-{index}-{kind}", torch.bfloat16)
        in_16_bits.run_until(folder / f"{kind}-bfloat16", Team(index, 2, sharded=True), 3 * STEP)
    sharded = Team(index, 2, sharded=True)
    with pytest.raises(KeyboardInterrupt):
        recovery("factors").run(folder / "told", sharded, in_the_third_step_of(1, index, signal.SIGTERM))
    sharded.wait()
    recover_module._SAVE_SECONDS = 0.0  # type: ignore[misc]
    with suppress(RuntimeError):  # of gloo: the other process is gone
        recovery("factors").run(folder / "killed", sharded, in_the_third_step_of(1, index, signal.SIGKILL))


def in_the_third_step_of(whom: int, index: int, number: signal.Signals) -> Callable[[int], None]:
    """Return what sends a signal to this process, if it is the one."""

    def send(spent: int) -> None:
        if index == whom and spent == 3 * STEP:
            os.kill(os.getpid(), number)

    return send


def in_two_processes(target: Callable[[Path, int], None], folder: Path) -> list[int | None]:
    """Call a function in two processes with their numbers; returns their exit codes."""
    context = multiprocessing.get_context("spawn")
    members = [context.Process(target=target, args=(folder, index)) for index in range(2)]
    for process in members:
        process.start()
    for process in members:
        process.join(PATIENCE)
    return [process.exitcode for process in members]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes leave of every case."""
    folder = tmp_path_factory.mktemp("team")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        patch.setenv("OMP_NUM_THREADS", "1")
        assert in_two_processes(go_through_all, folder) == [0, -signal.SIGKILL]
    return folder


@pytest.fixture(scope="module", params=KINDS)
def one(request: pytest.FixtureRequest, done: Path) -> Alone:
    return Alone(request.param, done)


class Alone:
    """What one process learns, without an interruption, and what it holds."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind, self.inputs = kind, folder / f"inputs-{kind}"
        place, moments = folder / f"{kind}-alone", {}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.optim.AdamW, "step", noting(moments))
            (recovery := Recovery(kind, self.inputs)).run_until(place, ALONE, LAST)
        self.held = {"blocks": recovery.held(), "moments": moments["bytes"]}
        self.curve = curve(place)
        self.learnt = Recovery(kind, self.inputs).run(place)

    def goes_on(self, place: Path) -> dict[str, torch.Tensor]:
        """Return what one process learns, or reads, from what is in a folder."""
        return Recovery(self.kind, self.inputs).run(place)


def curve(folder: Path) -> list[float]:
    found: list[float] = torch.load(folder / "state.pt", weights_only=True)["progress"]["divergences"]
    return found


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", HOW)
def test_two_processes_learn_what_one_does(how: str, one: Alone, done: Path) -> None:
    assert len(curve(done / f"{one.kind}-{how}-cut")) == 3
    assert len(one.curve) == 7
    assert curve(done / f"{one.kind}-{how}-last") == pytest.approx(one.curve, rel=1e-5)
    assert_same(one.goes_on(done / f"{one.kind}-{how}"), one.learnt)


def test_models_in_16_bits_are_divided_beside_what_is_trained_in_32(one: Alone, done: Path) -> None:
    alone = Recovery(one.kind, one.inputs, torch.bfloat16)
    alone.run_until(place := done / f"{one.kind}-bfloat16-alone", ALONE, 3 * STEP)
    assert curve(done / f"{one.kind}-bfloat16") == pytest.approx(curve(place), rel=1e-3)


def test_one_process_goes_on_from_what_two_with_parts_have_saved(one: Alone, done: Path) -> None:
    assert_same(one.goes_on(done / f"{one.kind}-sharded-cut"), one.learnt)


def test_processes_with_parts_hold_half_of_blocks_and_moments(one: Alone, done: Path) -> None:
    for index in range(2):
        copies, parts = (json.loads((done / f"{one.kind}-{how}-held-{index}.json").read_text()) for how in HOW)
        assert copies == one.held
        for what, size in parts.items():
            assert size < 0.56 * one.held[what], what


@pytest.mark.parametrize("one", ["factors"], indirect=True)
def test_a_process_that_is_told_to_end_ends_all_after_the_next_step_and_one_that_is_killed_loses_what_was_not_saved(
    one: Alone, done: Path
) -> None:
    assert len(curve(done / "told")) == 4
    assert_same(one.goes_on(done / "told"), one.learnt)
    assert len(curve(done / "killed")) == 2
    assert_same(one.goes_on(done / "killed"), one.learnt)


def test_every_item_is_one_processes() -> None:
    for items in (0, 1, 5, 8):
        for count in (1, 2, 3, 9):
            team = [Team(index, count) for index in range(count)]
            assert [item for each in team for item in each.part(items)] == list(range(items))
            passes = [each.passes(items, 2) for each in team]
            assert [[item for run in own for item in run] for own in passes] == [list(each.part(items)) for each in team]
            assert len({len(own) for own in passes}) == 1
            assert all(len(run) <= 2 for own in passes for run in own)
