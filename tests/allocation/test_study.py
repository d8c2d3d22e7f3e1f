"""The study: base plans first, stopping, resuming, sharing."""

from __future__ import annotations

import logging
import math
import os
import signal
import sqlite3
import time
from collections.abc import Sequence
from pathlib import Path

import optuna
import pytest
import torch
from allocation.searching import GROUPS, SETTINGS, SPEED, evaluate, goal, perplexity, space
from forking import FORKING

from lrserve.allocation.goal import Evaluated
from lrserve.allocation.plan import Plan
from lrserve.allocation.quality import Judgement, Validation, representative
from lrserve.allocation.shared import Shared
from lrserve.allocation.study import STUDY, Evaluate, copy_study, finished, importances, open_study, run_study, time_spent
from lrserve.errors import InputError
from lrserve.recipe import Search, Target


def run(
    target: Target, place: Path | Shared, judge: Evaluate = evaluate, search: Search = SETTINGS, seed: int = 0
) -> list[Evaluated]:
    return run_study(space(target), goal(target), SPEED, judge, search, place, seed=seed)


def load(path: Path) -> optuna.Study:
    return optuna.load_study(study_name=STUDY, storage=f"sqlite:///{path}")


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError])
def test_what_ends_a_trial_is_said_by_its_exception_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    def ends(plan: Plan, rivals: Sequence[Sequence[float]]) -> Judgement:
        raise error

    log = logging.getLogger("optuna")
    monkeypatch.setattr(log, "handlers", [caplog.handler])
    monkeypatch.setattr(log, "level", log.level)
    with pytest.raises(error):
        run(Target(ratio=0.3), tmp_path / "s.sqlite3", ends)
    assert not caplog.records


@pytest.mark.parametrize("sampler", ["gp", "tpe", "random"])
def test_every_trial_meets_the_ratio_and_the_base_plans_come_first(tmp_path: Path, sampler: str) -> None:
    trials = run(Target(ratio=0.3), tmp_path / "s.sqlite3", search=SETTINGS.model_copy(update={"sampler": sampler}))
    assert [trial.origin for trial in trials[:3]] == ["loss_aware", "probed", "uniform"]
    assert len(trials) == 9
    for trial in trials:
        assert 0.3 <= trial.plan.ratio(GROUPS) < 0.36
        assert trial.perplexity == perplexity(trial.plan)
    assert len({trial.plan.key() for trial in trials}) >= 6


@pytest.mark.parametrize("sampler", ["gp", "tpe"])
def test_without_a_target_two_objectives_are_optimised(tmp_path: Path, sampler: str) -> None:
    path = tmp_path / "s.sqlite3"
    trials = run(Target(), path, search=SETTINGS.model_copy(update={"sampler": sampler, "trials": 14}))
    study = load(path)
    assert [direction.name for direction in study.directions] == ["MINIMIZE", "MAXIMIZE"]
    assert study.metric_names == ["log(ppl / dense ppl)", "tokens per second"]
    for trial, kept in zip(trials, study.trials, strict=True):
        assert kept.values == [pytest.approx(math.log(trial.perplexity / 10)), pytest.approx(trial.tokens_per_second)]
    assert len({round(SPEED.speedup(trial.plan), 2) for trial in trials}) > 5


def test_a_limit_is_a_constraint_of_the_study(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite3"
    trials = run(Target(max_ppl_increase=0.5), path, search=SETTINGS.model_copy(update={"trials": 12}))
    kept = load(path).trials
    for trial, frozen in zip(trials, kept, strict=True):
        (value,) = [value for name, value in frozen.system_attrs.items() if name.startswith("constraints:")]
        assert (value <= 0) == (trial.perplexity <= 15.0)
    assert {value <= 15.0 for value in (trial.perplexity for trial in trials)} == {True, False}
    assert load(path).best_trial.user_attrs["perplexity"] <= 15.0


def test_a_killed_study_resumes_to_the_same_trials(tmp_path: Path) -> None:
    target = Target(ratio=0.3)
    whole = run(target, tmp_path / "whole.sqlite3", seed=3)
    calls = 0

    def dies(plan: Plan, rivals: Sequence[Sequence[float]]) -> Judgement:
        nonlocal calls
        calls += 1
        if calls in (2, 6):
            raise KeyboardInterrupt
        return evaluate(plan, rivals)

    path = tmp_path / "cut.sqlite3"
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(target, path, dies, seed=3)
    resumed = run(target, path, dies, seed=3)
    assert [t.plan.key() for t in resumed] == [t.plan.key() for t in whole]
    states = [trial.state.name for trial in load(path).trials]
    assert states.count("FAIL") == 2
    assert states.count("COMPLETE") == 9


def slowly(plan: Plan, rivals: Sequence[Sequence[float]]) -> Judgement:
    time.sleep(0.2)
    return evaluate(plan, rivals)


def work(place: Path | Shared) -> None:
    run(Target(ratio=0.3), place, slowly, seed=3)


def test_a_trial_in_which_the_process_was_killed_is_failed_and_done_again(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite3"
    process = FORKING.Process(target=work, args=(path,))
    process.start()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        time.sleep(0.05)
        if path.is_file():
            with sqlite3.connect(path) as database:
                try:
                    states = [state for (state,) in database.execute("SELECT state FROM trials")]
                except sqlite3.OperationalError:  # the tables are being made
                    continue
            if states.count("COMPLETE") >= 2 and "RUNNING" in states:
                break
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    resumed = run(Target(ratio=0.3), path, seed=3)
    whole = run(Target(ratio=0.3), tmp_path / "whole.sqlite3", seed=3)
    assert [t.plan.key() for t in resumed] == [t.plan.key() for t in whole]
    assert [trial.state.name for trial in load(path).trials].count("FAIL") == 1


def test_more_trials_go_on_where_fewer_ended(tmp_path: Path) -> None:
    path, target = tmp_path / "s.sqlite3", Target(ratio=0.3)
    first = run(target, path, search=SETTINGS.model_copy(update={"trials": 4}))
    reports: list[int] = []
    more = run_study(
        space(target), goal(target), SPEED, evaluate, SETTINGS, path, seed=0, progress=lambda done, last: reports.append(done)
    )
    assert more[:4] == first
    assert reports == [4, 5, 6, 7, 8, 9]


def test_workers_share_one_study(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'shared.sqlite3'}"
    place = Shared(url, "inputs", "machine")
    open_study(place.name, url, goal(Target(ratio=0.3)).metrics)  # SQLite's tables are not made by two at a time
    workers = [FORKING.Process(target=work, args=(place,)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    study = open_study(place.name, url, goal(Target(ratio=0.3)).metrics)
    trials = finished(study)
    assert 9 <= len(trials) <= 10  # the last of each may end together
    assert not study.get_trials(states=(optuna.trial.TrialState.FAIL,))
    overlapping = [
        (a, b)
        for a in study.trials
        for b in study.trials
        if a.number < b.number and b.datetime_start < a.datetime_complete  # type: ignore[operator]
    ]
    assert overlapping  # both worked
    copy_study(place, tmp_path / "copy.sqlite3")
    assert [trial.plan.key() for trial in finished(load(tmp_path / "copy.sqlite3"))] == [trial.plan.key() for trial in trials]


def forever(place: Shared) -> None:
    def judge(plan: Plan, rivals: Sequence[Sequence[float]]) -> Judgement:
        time.sleep(600)
        raise AssertionError

    run(Target(ratio=0.3), place, judge)


def test_the_trial_of_a_worker_that_is_gone_is_done_by_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Shared(f"sqlite:///{tmp_path / 'shared.sqlite3'}", "inputs", "machine")
    worker = FORKING.Process(target=forever, args=(place,))
    worker.start()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not _beats(tmp_path / "shared.sqlite3"):
        time.sleep(0.1)
    worker.kill()
    worker.join()
    monkeypatch.setattr("lrserve.allocation.database._GRACE_SECONDS", 1)
    monkeypatch.setattr("lrserve.allocation.database._HEARTBEAT_SECONDS", 1)
    time.sleep(2)
    trials = run(Target(ratio=0.3), place)
    assert [trial.origin for trial in trials[:3]] == ["loss_aware", "probed", "uniform"]
    assert [trial.trial for trial in trials] == list(range(1, 10))


def _beats(path: Path) -> bool:
    if not path.is_file():
        return False
    with sqlite3.connect(path) as database:
        try:
            return bool(database.execute("SELECT * FROM trial_heartbeats").fetchall())
        except sqlite3.OperationalError:  # the tables are being made
            return False


@pytest.mark.parametrize("url", ["postgresql+nosuchdriver://a@127.0.0.1/b", "no url", "sqlite:////no/such/folder/x.sqlite3"])
def test_a_database_that_cannot_be_used_is_named(url: str) -> None:
    with pytest.raises(InputError, match="--storage: no study can be kept at"):
        open_study("x", url)


def test_a_trial_is_compared_with_plans_that_are_at_least_as_fast(tmp_path: Path) -> None:
    seen: list[tuple[Plan, list[float]]] = []

    def judge(plan: Plan, rivals: Sequence[Sequence[float]]) -> Judgement:
        seen.append((plan, [sum(rival) for rival in rivals]))
        return evaluate(plan)

    trials = run(Target(), tmp_path / "s.sqlite3", judge)
    losses = {trial.plan.key(): math.log(trial.perplexity) for trial in trials}
    assert any(rivals for _, rivals in seen)
    for index, (plan, rivals) in enumerate(seen):
        faster = [p for p, _ in seen[:index] if SPEED.tokens_per_second(p) >= SPEED.tokens_per_second(plan)]
        assert sorted(rivals) == pytest.approx(sorted(losses[p.key()] for p in faster))


def test_what_is_said_of_the_search(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite3"
    trials = run(Target(), path, search=SETTINGS.model_copy(update={"trials": 60, "sampler": "random"}))
    found = importances(load(path), goal(Target()))
    assert set(found) == {"perplexity", "speed"}
    assert max(found["speed"], key=lambda name: found["speed"][name]) == "speedup"
    assert sum(found["perplexity"].values()) == pytest.approx(1)
    distinct = len({trial.plan.key() for trial in trials})
    assert time_spent(load(path))["forward"] == pytest.approx(0.25 * distinct)
    few = tmp_path / "few.sqlite3"
    run(Target(), few, search=SETTINGS.model_copy(update={"trials": 3}))
    assert importances(load(few), goal(Target())) == {"perplexity": {}, "speed": {}}


class Windows(torch.nn.Module):
    """Stands for a model: `negative_log_likelihood` is replaced by the losses that it holds."""

    def __init__(self, losses: list[float]) -> None:
        super().__init__()
        self.losses = losses


@pytest.fixture
def validation(monkeypatch: pytest.MonkeyPatch) -> Validation:
    def losses(model: Windows, windows: torch.Tensor) -> torch.Tensor:
        return torch.tensor([model.losses[int(i)] for i in windows[:, 0]], dtype=torch.float64)

    monkeypatch.setattr("lrserve.allocation.quality.negative_log_likelihood", losses)
    return Validation(torch.arange(8)[:, None].expand(8, 16), [1.0] * 8)


def test_a_model_that_is_surely_worse_is_stopped_after_half(validation: Validation) -> None:
    rival = [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7]
    worse = [loss + 0.5 + 0.01 * (i % 2) for i, loss in enumerate(rival)]
    found = validation(Windows(worse), [rival, [9.0] * 8])
    assert not found.complete
    assert found.nll == pytest.approx(tuple(worse[:4]))
    assert found.perplexity == pytest.approx(math.exp(sum(worse) / 8))  # the rival's second half stands in for its own
    for model, rivals in ((worse, []), (rival, [worse]), ([3.0, 0.0, 3.0, 0.0, *worse[4:]], [rival])):
        found = validation(Windows(model), rivals)
        assert found.complete
        assert found.perplexity == pytest.approx(math.exp(sum(model) / 8))
    assert not validation(Windows([math.nan] * 8), [rival]).complete
    assert validation(Windows([math.nan] * 8), [rival]).perplexity == math.inf


def test_chosen_windows_stand_for_the_pool() -> None:
    generator = torch.Generator().manual_seed(0)
    differences = torch.randn(64, generator=generator, dtype=torch.float64).exp()
    chosen = representative(differences.tolist(), 8)
    assert len(set(chosen)) == 8
    mean, error = float(differences.mean()), float(differences.std()) / math.sqrt(8)
    assert abs(float(differences[chosen].mean()) - mean) < error / 4
    assert abs(float(differences[chosen[:4]].mean()) - mean) < error
    assert representative([1.0, 2.0], 5) == [0, 1]
    assert sorted(representative([float(i) for i in range(10)], 5)) == [0, 2, 4, 6, 8]
