from __future__ import annotations

import json
import random
from typing import Any

import optuna
import pytest

from lrserve.pipeline.measure import published, timing_conditions


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


def test_workers_that_share_a_study_share_the_first_ones_table() -> None:
    study = optuna.create_study()
    assert published(study, table(1)) == table(1)
    assert published(study, table(2)) == table(1)


def test_mysql_can_keep_the_table() -> None:
    study = optuna.create_study()
    published(study, table(1))
    assert len(json.dumps(table(1))) > 2**16
    assert all(len(json.dumps(value)) < 2**16 for value in study.user_attrs.values())


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "GLIBC_TUNABLES", "LD_PRELOAD"])
def test_times_under_other_settings_are_not_reused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = timing_conditions()
    assert before == timing_conditions()
    monkeypatch.setenv(name, "another")
    assert before != timing_conditions()
