"""Throughput of a compressed model against its dense one, measured on two live engines in turns."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from lrserve.recipe import EngineSettings, Workload
from lrserve.serving.engine import Engine, Throughput, engine_version, interleaved

GPU_MEMORY: Final = 0.9
"""Share of a GPU's memory that all engines on it take together."""


class Rated(Protocol):
    """A measured run."""

    @property
    def output_tokens_per_second(self) -> float:
        """Generated tokens per wall-clock second, prefill included."""


class Paired:
    """Runs of a dense and of a compressed model; run i of one stands beside run i of the other."""

    dense: Sequence[Rated]
    compressed: Sequence[Rated]

    @property
    def speedups(self) -> list[float]:
        """Output tokens per second, compressed over dense, round by round."""
        return [c.output_tokens_per_second / d.output_tokens_per_second for d, c in zip(self.dense, self.compressed, strict=True)]

    @property
    def speedup(self) -> float:
        """Median of the rounds' speedups."""
        return statistics.median(self.speedups)

    def speedup_json(self) -> dict[str, float]:
        """Return the rounds' number, and the median and the spread of their speedups."""
        found = self.speedups
        return {
            "rounds": len(found),
            "speedup": self.speedup,
            "speedup_lowest": min(found),
            "speedup_highest": max(found),
        }


@dataclass(frozen=True)
class Comparison(Paired):
    """Interleaved runs of the same prompts on both engines; run i of one stands beside run i of the other."""

    dense: Sequence[Throughput]
    compressed: Sequence[Throughput]
    engine: str

    @property
    def undisturbed_speedup(self) -> float:
        """Ratio of the fastest rounds: what else runs on a machine only ever makes a round slower, so this ranks plans best."""
        dense, compressed = (max(run.output_tokens_per_second for run in runs) for runs in (self.dense, self.compressed))
        return compressed / dense

    def to_json(self) -> dict[str, Any]:
        """Return medians and spreads; throughput in output tokens per second, CPU time in seconds per run."""

        def side(runs: Sequence[Throughput]) -> dict[str, Any]:
            rates = [run.output_tokens_per_second for run in runs]
            return {
                "tokens_per_second": statistics.median(rates),
                "lowest": min(rates),
                "highest": max(rates),
                "cpu_seconds": statistics.median(run.cpu_seconds for run in runs),
            }

        return {
            "engine": self.engine,
            "dense": side(self.dense),
            "compressed": side(self.compressed),
            **self.speedup_json(),
            "undisturbed_speedup": self.undisturbed_speedup,
        }


def read_comparison(path: Path) -> Comparison:
    """Read what `dataclasses.asdict` made of a comparison."""
    data = json.loads(path.read_text(encoding="utf-8"))
    dense, compressed = ([Throughput(**run) for run in data[side]] for side in ("dense", "compressed"))
    return Comparison(dense=dense, compressed=compressed, engine=data["engine"])


def open_engine(model: Path, workload: Workload, settings: EngineSettings, *, sharing: int = 1, log: Path | None = None) -> Engine:
    """Build (not start) an engine large enough for a workload; `sharing` is how many engines share one GPU."""
    return Engine(
        model,
        dtype=settings.dtype,
        max_model_len=workload.prompt_tokens + workload.output_tokens,
        max_num_seqs=workload.concurrency,
        enforce_eager=settings.enforce_eager,
        gpu_memory_utilization=GPU_MEMORY / sharing if sharing > 1 else None,
        log=log,
    )


def compare(
    dense: Engine,
    compressed: Engine,
    workload: Workload,
    repeats: int,
    *,
    seed: int = 0,
    progress: Callable[[], None] = lambda: None,
) -> Comparison:
    """Measure two running engines in turns, each round with prompts of its own; the first run of each is discarded."""
    runs = interleaved(
        {"dense": dense, "compressed": compressed},
        workload.prompt_tokens,
        workload.output_tokens,
        workload.concurrency,
        repeats=repeats,
        seed=seed,
        progress=lambda name, index, result: progress(),
    )
    return Comparison(dense=runs["dense"], compressed=runs["compressed"], engine=engine_version())
