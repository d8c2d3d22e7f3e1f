"""bench.md and bench.png say what was measured, when and where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from report.synthetic import MADE

from lrserve.recipe import EngineSettings, Workload
from lrserve.report.bench import _plot, bench_table, write_bench
from lrserve.serving.online import Load, OnlineComparison

WORKLOAD = Workload(prompt_tokens=4, output_tokens=3, concurrency=2)


def _runs(rate: float, per_token: tuple[float, ...] = (0.01, 0.02)) -> list[Load]:
    return [Load(rate * scale, (0.1, 0.3), per_token) for scale in (1.0, 1.1, 0.9)]


@pytest.fixture
def figures() -> dict[str, Any]:
    chat = OnlineComparison(WORKLOAD, _runs(10), _runs(15))
    one = OnlineComparison(WORKLOAD, _runs(10, ()), _runs(12, ()))
    return {
        "made": MADE,
        "models": {"dense": "SmolLM2-135M-Instruct", "compressed": "demo (ratio 0.2)"},
        "engine": "vllm 0.32.0+cpu",
        "settings": EngineSettings().model_dump(),
        "vllm_arguments": ["--block-size=32"],
        "mix": chat.speedup_json(),
        "promised": 1.4,
        "workloads": {"chat $x": chat.to_json(), "one": one.to_json()},
    }


def test_the_table_says_what_when_and_where(figures: dict[str, Any]) -> None:
    text = bench_table(figures)
    lines = text.splitlines()
    assert [line.count("|") for line in lines[:6]] == [8] * 6
    assert figures["workloads"]["one"]["dense"]["time_per_output_token_ms"] is None  # there is no time between tokens
    assert "All workloads: 1.50x (1.50 to 1.50); the search measured 1.40x, without a server." in lines
    assert "- dense: SmolLM2-135M-Instruct; compressed: demo (ratio 0.2)" in lines
    assert (
        "- vllm 0.32.0+cpu, bfloat16, compiled; AMD EPYC, 2 cores, 25 GB; 2026-11-29; further arguments of vLLM: `--block-size=32`"
    ) in lines


def test_the_files(figures: dict[str, Any], tmp_path: Path) -> None:
    write_bench(figures, tmp_path)
    text = (tmp_path / "bench.md").read_text()
    assert text == f"# demo (ratio 0.2) against SmolLM2-135M-Instruct\n\n{bench_table(figures)}\n"
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_the_plot_states_the_speedups_the_models_the_machine_and_the_date(figures: dict[str, Any]) -> None:
    figure = _plot(figures)
    title = figure.get_suptitle()
    for part in ("demo (ratio 0.2) against SmolLM2-135M-Instruct", "1.50x", "vllm 0.32.0+cpu", "AMD EPYC", "2026-11-29"):
        assert part in title
    assert [text.get_text() for text in figure.axes[0].texts] == ["1.50x", "1.20x"]
