"""Throughput of compressed models against their dense one, measured on live engines in turns."""

from __future__ import annotations

import json
import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import comb
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

from lrserve.allocation.speed import PREFILL_CHUNK
from lrserve.engines.protocol import EngineProcess, Throughput
from lrserve.engines.vllm import Engine
from lrserve.recipe import EngineSettings, Workload, shares

_COVERAGE: Final = 0.9

T = TypeVar("T")
Run = TypeVar("Run")


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Return the interval between two of the values that holds the true median with a probability of at least 90 %.

    The k-th lowest and the k-th highest, for the largest such k, whatever the values' distribution (the sign test's interval); the
    lowest and the highest where there are fewer than five values, with less.
    """
    n, k, outside = len(values), 0, 0.0
    while (outside := outside + 2 * comb(n, k) / 2**n) <= 1 - _COVERAGE:
        k += 1
    ordered = sorted(values)
    return ordered[max(k - 1, 0)], ordered[n - max(k, 1)]


class Rated(Protocol):
    """A measured run."""

    @property
    def output_tokens_per_second(self) -> float:
        """Generated tokens per wall-clock second, prefill included."""


class Rounds(ABC):
    """Speedups of a compressed model over its dense one, measured in turns."""

    @property
    @abstractmethod
    def speedups(self) -> list[float]:
        """Output tokens per second, compressed over dense, round by round."""

    @property
    def speedup(self) -> float:
        """Median of the rounds' speedups."""
        return statistics.median(self.speedups)

    @property
    def spread(self) -> tuple[float, float]:
        """Interval of the speedup (`spread`)."""
        return spread(self.speedups)

    def speedup_json(self) -> dict[str, float]:
        """Return the rounds' number, and the median and the spread of their speedups."""
        low, high = self.spread
        return {"rounds": len(self.speedups), "speedup": self.speedup, "speedup_lowest": low, "speedup_highest": high}


class Paired(Rounds):
    """Runs of a dense and of a compressed model; run i of one stands beside run i of the other."""

    dense: Sequence[Rated]
    compressed: Sequence[Rated]

    @property
    def speedups(self) -> list[float]:
        """Output tokens per second, compressed over dense, round by round."""
        return [c.output_tokens_per_second / d.output_tokens_per_second for d, c in zip(self.dense, self.compressed, strict=True)]


@dataclass(frozen=True)
class Comparison(Paired):
    """Interleaved runs of the same prompts on both engines; run i of one stands beside run i of the other."""

    dense: Sequence[Throughput]
    compressed: Sequence[Throughput]

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
            "dense": side(self.dense),
            "compressed": side(self.compressed),
            **self.speedup_json(),
            "undisturbed_speedup": self.undisturbed_speedup,
        }


def mixed(speedups: Mapping[str, float], shares: Mapping[str, float]) -> float:
    """Return the speedup of a mix, whose workloads have these shares of the dense model's time."""
    return 1 / sum(share / speedups[name] for name, share in shares.items())


@dataclass(frozen=True)
class Mix(Rounds):
    """Comparisons by workload, and the workloads' shares of the dense model's time."""

    workloads: Mapping[str, Paired]
    shares: Mapping[str, float]

    @property
    def speedups(self) -> list[float]:
        """Speedups of the mix, round by round."""
        rounds = zip(*(comparison.speedups for comparison in self.workloads.values()), strict=True)
        return [mixed(dict(zip(self.workloads, found, strict=True)), self.shares) for found in rounds]


@dataclass(frozen=True)
class MixComparison(Mix):
    """Comparisons on two engines."""

    workloads: Mapping[str, Comparison]
    engine: str

    @property
    def undisturbed_speedup(self) -> float:
        """The mix of the workloads' (`Comparison.undisturbed_speedup`)."""
        return mixed({name: comparison.undisturbed_speedup for name, comparison in self.workloads.items()}, self.shares)

    @property
    def relative_times(self) -> dict[str, float]:
        """Time over dense by workload, of the fastest rounds."""
        return {name: 1 / comparison.undisturbed_speedup for name, comparison in self.workloads.items()}

    def to_json(self) -> dict[str, Any]:
        """Return the mix's speedup, and every workload's figures."""
        return {
            "engine": self.engine,
            **self.speedup_json(),
            "undisturbed_speedup": self.undisturbed_speedup,
            "workloads": {
                name: {"share": self.shares[name], **comparison.to_json()} for name, comparison in self.workloads.items()
            },
        }


def read_comparison(path: Path) -> MixComparison:
    """Read what `dataclasses.asdict` made of a comparison."""
    data = json.loads(path.read_text(encoding="utf-8"))

    def runs(found: Mapping[str, Any], side: str) -> list[Throughput]:
        return [Throughput(**run) for run in found[side]]

    comparisons = {name: Comparison(runs(found, "dense"), runs(found, "compressed")) for name, found in data["workloads"].items()}
    return MixComparison(workloads=comparisons, shares=data["shares"], engine=data["engine"])


def open_engine(
    model: Path,
    workloads: Mapping[str, Workload],
    settings: EngineSettings,
    *,
    sharing: int = 1,
    load_format: str | None = None,
    log: Path | None = None,
) -> Engine:
    """Build (not start) an engine large enough for every workload; `sharing` is how many engines share the GPUs' memory."""
    return Engine(
        model,
        dtype=settings.dtype,
        max_model_len=max(workload.prompt_tokens + workload.output_tokens for workload in workloads.values()),
        max_num_seqs=max(workload.concurrency for workload in workloads.values()),
        max_num_batched_tokens=PREFILL_CHUNK,
        enforce_eager=settings.enforce_eager,
        gpu_memory_utilization=settings.gpu_memory_share / sharing,
        tensor_parallel_size=settings.tensor_parallel_size,
        load_format=load_format,
        log=log,
    )


def in_turns(
    measured: Mapping[str, T],
    measure: Callable[[T, int], Run],
    repeats: int,
    *,
    seed: int,
    progress: Callable[[str, int, Run], None] | None = None,
) -> dict[str, list[Run]]:
    """Measure several things in turns: A B C, B C A, C A B, ...; discarded runs come before, and are the caller's.

    Interleaving and rotation spread the machine's slow minutes, and the cost of following a certain one, over all of them.
    All get the same prompts, from the seed that `measure` is given; each round has its own, from `seed` + 1 on.
    `progress` is told (name, round, result).

    Returns the runs of each in the order of the rounds.
    """
    names = list(measured)
    results: dict[str, list[Run]] = {name: [] for name in names}
    for index in range(repeats):
        shift = index % max(len(names), 1)
        for name in names[shift:] + names[:shift]:
            result = measure(measured[name], seed + 1 + index)
            results[name].append(result)
            if progress is not None:
                progress(name, index, result)
    return results


def compare(
    dense: EngineProcess,
    compressed: Sequence[EngineProcess],
    workloads: Mapping[str, Workload],
    repeats: int,
    *,
    version: str,
    seed: int = 0,
    progress: Callable[[], None] = lambda: None,
) -> list[MixComparison]:
    """Measure running engines and their dense one in turns, workload by workload; `version` names the engine.

    Each round has prompts of its own; the first run of each workload on every engine is discarded.
    """
    found: list[dict[str, Comparison]] = [{} for _ in compressed]
    for name, workload in workloads.items():
        of_dense, *others = _rounds([dense, *compressed], workload, repeats, seed, progress)
        for own, runs in zip(found, others, strict=True):
            own[name] = Comparison(of_dense, runs)
    return [MixComparison(workloads=own, shares=shares(workloads), engine=version) for own in found]


def compare_apart(
    dense: EngineProcess,
    compressed: EngineProcess,
    workloads: Mapping[str, Workload],
    repeats: int,
    *,
    version: str,
    seed: int = 0,
    progress: Callable[[], None] = lambda: None,
) -> MixComparison:
    """Measure two engines that do not fit on the GPU together: start one, run all rounds of all workloads, end it, then the other.

    The rounds have the prompts that they have in `compare`.
    """
    sides = []
    for engine in (compressed, dense):
        with engine:
            sides.append([_rounds([engine], workload, repeats, seed, progress)[0] for workload in workloads.values()])
    pairs = zip(workloads, *reversed(sides), strict=True)
    found = {name: Comparison(of_dense, runs) for name, of_dense, runs in pairs}
    return MixComparison(workloads=found, shares=shares(workloads), engine=version)


def _rounds(
    engines: Sequence[EngineProcess], workload: Workload, repeats: int, seed: int, progress: Callable[[], None]
) -> list[list[Throughput]]:
    """Run a workload on running engines in turns, after a run of each that is discarded; returns the runs of each."""

    def measure(engine: EngineProcess, seed: int) -> Throughput:
        return engine.throughput(workload.prompt_tokens, workload.output_tokens, workload.concurrency, seed=seed)

    for engine in reversed(engines):
        measure(engine, seed)
    named = {str(place): engine for place, engine in enumerate(engines)}
    return list(in_turns(named, measure, repeats, seed=seed, progress=lambda *_: progress()).values())
