from __future__ import annotations

from datetime import datetime, timedelta

import pytest
import torch

from lrserve.report.machine import day, describe, machine, made


def test_the_date_is_utc_to_the_second() -> None:
    date = datetime.fromisoformat(made()["date"])
    assert date.utcoffset() == timedelta(0)
    assert date.microsecond == 0
    assert abs(datetime.now(date.tzinfo) - date) < timedelta(minutes=1)
    assert day({"date": "2026-11-29T07:10:00+00:00"}) == "2026-11-29"


def test_the_machine_is_described() -> None:
    found = machine()
    assert found["processor"]
    assert found["cores"] >= 1
    assert found["memory_gb"] >= 1
    text = describe(found)
    assert str(found["processor"]) in text
    assert f"{found['memory_gb']} GB" in text


@pytest.mark.parametrize(("count", "name"), [(1, "NVIDIA H200"), (2, "2 x NVIDIA H200")])
def test_gpus_are_named_and_counted(monkeypatch: pytest.MonkeyPatch, count: int, name: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    assert machine()["gpu"] == name
    assert describe(machine()).startswith(f"{name}, ")


def test_one_core_is_one_core() -> None:
    assert describe({"processor": "X", "instructions": ["avx2"], "cores": 1, "memory_gb": 0, "gpu": None}) == "X, avx2, 1 core"
