"""The chunk of prefill that the speed model counts is the one that every engine and server is started with."""

from __future__ import annotations

from pathlib import Path

from lrserve.allocation.speed import calls
from lrserve.engines.workloads import open_engine
from lrserve.recipe import EngineSettings, Workload
from lrserve.serving.bench import server_arguments

LONG = Workload(prompt_tokens=3000, output_tokens=1, concurrency=8)  # more tokens than one forward pass may have


def test_engines_and_servers_prefill_in_the_chunks_that_the_speed_model_counts() -> None:
    (chunk,) = (rows for rows in calls(LONG) if rows > LONG.concurrency)
    assert chunk < LONG.prompt_tokens * LONG.concurrency
    assert open_engine(Path("model"), {"long": LONG}, EngineSettings())._settings["max_num_batched_tokens"] == chunk
    assert f"--max-num-batched-tokens={chunk}" in server_arguments({"long": LONG}, EngineSettings())
