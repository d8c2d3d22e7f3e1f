from __future__ import annotations

import pytest

from lrserve.pipeline.measure import timing_conditions


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "GLIBC_TUNABLES", "LD_PRELOAD"])
def test_times_under_other_settings_are_not_reused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = timing_conditions()
    assert before == timing_conditions()
    monkeypatch.setenv(name, "another")
    assert before != timing_conditions()
