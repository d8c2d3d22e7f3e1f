"""`lrserve bench` on the artifact of a whole job, behind two servers of vLLM: `make soak`.

The same behind servers of the ONNX graph is in tests/integration/test_pipeline.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from integration.test_pipeline import made, place  # noqa: F401 - fixtures

from lrserve.serving.bench import bench

pytestmark = [pytest.mark.soak, pytest.mark.usefixtures("forked_engines")]


def test_bench_measures_it_again(made: tuple[Path, dict[str, Any], list[str]], tmp_path: Path) -> None:  # noqa: F811
    said: list[str] = []
    figures = bench(
        made[0], workload={"concurrency": 1, "prompt_tokens": None}, report=tmp_path / "new" / "report", say=said.append
    )
    assert json.loads((tmp_path / "new" / "report" / "bench.json").read_text()) == figures
    assert (tmp_path / "new" / "report" / "bench.md").read_text().strip().endswith(said[-1])
    assert (tmp_path / "new" / "report" / "bench.png").read_bytes().startswith(b"\x89PNG")
    (result,) = figures["workloads"].values()
    assert result["workload"] == {"prompt_tokens": 8, "output_tokens": 8, "concurrency": 1, "share": 1.0}
    assert result["rounds"] == 2
    for side in ("dense", "compressed"):
        assert result[side]["tokens_per_second"]["median"] > 0
        assert result[side]["time_per_output_token_ms"]["median"] > 0
        assert result[side]["time_to_first_token_ms"]["p99"] >= result[side]["time_to_first_token_ms"]["median"] > 0
