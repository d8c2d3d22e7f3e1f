"""Stage 4 with an engine that is made up: what is measured, exported, reused and chosen, without vLLM."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tiny import WITH_EXPERTS, dense_model, write_dense, write_text

from exporters.vllm import VllmExporter
from lrserve.allocation.speed import Shape
from lrserve.allocation.study import study_of
from lrserve.compression.groups import Mixture
from lrserve.engines.protocol import Throughput
from lrserve.engines.runtimes import Runtime
from lrserve.engines.timing import elements
from lrserve.errors import InfeasibleTargetError, InputError
from lrserve.pipeline.job import Job, open_job
from lrserve.pipeline.rounding import rounding_of
from lrserve.pipeline.run import backpropagate, calibrate_blocks, factorize_groups
from lrserve.pipeline.search import Tuned, tune
from lrserve.recipe import Recipe
from lrserve.storage.work import WorkFolder, work_folder

SMALL: dict[str, Any] = {
    "calibration": {"sequences": 8, "length": 32},
    "factorization": {"fisher_tokens": 128, "weights": []},
    "search": {
        "trials": 6,
        "rank_step": 8,
        "depth_groups": 2,
        "probe_tokens": 64,
        "validation_tokens": 256,
        "validation_pool": 512,
        "validation_length": 32,
        "measured_plans": 2,
    },
    "workloads": {"decode": {"prompt_tokens": 4, "output_tokens": 8, "concurrency": 2}},
    "engine": {"dtype": "float32", "repeats": 3},
    "report": {"tokens": 64, "length": 32, "prompts": 1, "prompt_tokens": 8},
}


def stored_parameters(folder: Path) -> float:
    """Count what is stored, in float32 numbers of as many bytes."""
    return sum(t.nbytes for path in folder.glob("*.safetensors") for t in load_file(path).values()) / 4


@dataclass
class Engines:
    """Made-up engines, whose time is proportional to the parameters that they load, and what was done with them."""

    started: list[Path] = field(default_factory=list)
    running: list[Path] = field(default_factory=list)
    sharing: set[int] = field(default_factory=set)
    most_at_once: int = 0
    seconds_per_parameter: float = 1e-6

    def open(self, model: Path, workloads: Mapping[str, Any], *, sharing: int = 1, log: Path | None = None) -> Any:
        self.sharing.add(sharing)
        return MadeUpEngine(self, model)


class MadeUpEngine:
    def __init__(self, engines: Engines, model: Path) -> None:
        self.engines, self.model, self.parameters = engines, model, 0.0

    def start(self) -> None:
        self.parameters = stored_parameters(self.model)
        self.engines.started.append(self.model)
        self.engines.running.append(self.model)
        self.engines.most_at_once = max(self.engines.most_at_once, len(self.engines.running))

    def close(self, *, keep_log: bool = False) -> None:
        self.engines.running.remove(self.model)

    def __enter__(self) -> MadeUpEngine:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def throughput(self, prompt_tokens: int, output_tokens: int, concurrency: int, *, seed: int = 0) -> Throughput:
        seconds = self.engines.seconds_per_parameter * self.parameters * output_tokens
        return Throughput(seconds=seconds, cpu_seconds=seconds, output_tokens=output_tokens * concurrency)

    def latency_table(
        self, shapes: Sequence[Shape], tokens: Sequence[int], *, dtype: str, seconds: Any = None
    ) -> list[list[float]]:
        per_weight = 1e6 * self.engines.seconds_per_parameter
        size = {None: 4.0, "int8": 1.0, "int4_g32": 0.5 + 2 / 32}
        return [[per_weight * elements(vars(shape)) * size[shape.weights] / 4 for _ in tokens] for shape in shapes]

    def transcribe(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[Any]:
        from lrserve.engines.transcripts import Transcript

        return [Transcript((0.0,) * (len(prompt) - 1), (0,) * new_tokens, (1.0,) * new_tokens) for prompt in prompts]


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Engines:
    made_up = Engines()
    runtime = Runtime("vllm", "made up 1", "float32", False, VllmExporter(), loads_sources=True, open=made_up.open)
    monkeypatch.setattr("lrserve.pipeline.search.runtime_of", lambda settings: runtime)
    return made_up


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("search")
    write_dense(dense_model("LlamaForCausalLM"), place / "model")
    write_text(place / "text.jsonl", 200)
    return place


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[WorkFolder]:
    with work_folder(tmp_path / "work", lambda line: None) as folder:
        yield folder


def open_small(place: Path, lines: list[str] | None = None, **overrides: Any) -> Job:
    settings = {"model": str(place / "model"), "text.calibration": str(place / "text.jsonl"), **SMALL, **overrides}
    return open_job(Recipe.load(None, settings), say=lambda line: None if lines is None else lines.append(line))


def tuned(job: Job, folder: WorkFolder, storage: str | None = None) -> Tuned:
    model = job.source.load(job.dtype)
    statistics = calibrate_blocks(job, model, folder)
    gradients = backpropagate(job, model, folder)
    store = factorize_groups(job, model, statistics, gradients, folder)
    return tune(job, model, store, rounding_of(job, statistics, gradients), gradients, folder, storage)


def test_the_front_is_measured_beside_one_dense_engine(place: Path, folder: WorkFolder, engines: Engines) -> None:
    job = open_small(place, **{"target.ratio": 0.3, "search": {**SMALL["search"], "trials": 12}})
    found = tuned(job, folder)
    assert engines.started.count(place / "model") == 1  # for the layers and for the plans
    assert engines.most_at_once == 2
    assert engines.running == []
    assert len(found.measured) == 2
    assert len({m.candidate.plan.key() for m in found.measured}) == 2
    assert found.chosen in found.measured
    for measured in found.measured:
        assert measured.candidate.plan.ratio(job.units) >= 0.3
        # the made-up engine is as fast as its parameters are few, so the table predicts it but for what it leaves out
        assert measured.comparison.speedup == pytest.approx(measured.predicted_speedup, rel=0.05)
    assert not (folder.root / "candidate").exists()


@pytest.mark.parametrize("architecture", WITH_EXPERTS)
def test_mixtures_of_experts_are_units_of_the_plan(architecture: str, tmp_path: Path, folder: WorkFolder, engines: Engines) -> None:
    write_dense(dense_model(architecture), tmp_path / "model")
    write_text(tmp_path / "text.jsonl", 200)
    job = open_small(tmp_path, **{"target.ratio": 0.3})
    mixtures = [unit for unit in job.units if isinstance(unit, Mixture)]
    assert len(mixtures) == 2
    found = tuned(job, folder)
    plan = found.chosen.candidate.plan
    assert any(plan.levels[mixture.name].rank for mixture in mixtures), "attention alone has not so many parameters"
    assert plan.ratio(job.units) >= 0.3
    for measured in found.measured:
        assert measured.comparison.speedup == pytest.approx(measured.predicted_speedup, rel=0.05)


def test_on_a_small_gpu_dense_and_plans_run_one_after_the_other(
    place: Path, folder: WorkFolder, engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = Runtime("vllm", "made up 1", "float32", False, VllmExporter(), loads_sources=True, open=engines.open, on_gpu=True)
    monkeypatch.setattr("lrserve.pipeline.search.runtime_of", lambda settings: runtime)
    monkeypatch.setattr("lrserve.pipeline.holding.runtime_of", lambda settings: runtime)
    monkeypatch.setattr("lrserve.pipeline.holding.device_memory", lambda: 2**32)
    job = open_small(place, **{"target.ratio": 0.3})
    found = tuned(job, folder)
    assert (engines.most_at_once, engines.sharing, engines.running) == (1, {1}, [])
    assert engines.started.count(place / "model") == 1 + len(found.measured)  # for the layers, and after each plan
    for measured in found.measured:
        assert measured.comparison.speedup == pytest.approx(measured.predicted_speedup, rel=0.05)


def test_a_second_run_measures_nothing_again(place: Path, folder: WorkFolder, engines: Engines) -> None:
    job = open_small(place, **{"target.ratio": 0.3})
    first = tuned(job, folder)
    engines.started.clear()
    lines: list[str] = []
    again = tuned(open_small(place, lines, **{"target.ratio": 0.3}), folder)
    assert engines.started == []
    assert again.chosen.candidate.plan == first.chosen.candidate.plan
    assert again.chosen.comparison.speedup == first.chosen.comparison.speedup
    for stage in ("probe", "validation", "latency", "search", "measure"):
        assert any(line.startswith(f"4/6 {stage}") and "reused" in line for line in lines), stage


def test_machines_of_two_kinds_share_a_search(
    place: Path, tmp_path: Path, engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, lines, found = f"sqlite:///{tmp_path / 'shared.sqlite3'}", list[str](), list[Tuned]()
    for number, (kind, seconds) in enumerate((("cpu", 1e-6), ("cpu", 2e-6), ("gpu", 1e-7))):
        monkeypatch.setattr("lrserve.pipeline.measure.timing_conditions", lambda kind=kind: {"processor": kind})
        engines.seconds_per_parameter = seconds
        lines.clear()
        with work_folder(tmp_path / str(number), lambda line: None) as own:
            found.append(tuned(open_small(place, lines, **{"target.ratio": 0.3}), own, url))
    first, same, other = found
    assert same.trials == first.trials, "the first one's table, and its trials"
    assert [trial.trial for trial in other.trials] == [*range(6), *[None] * 6]
    assert [trial.plan for trial in other.trials[6:]] == [trial.plan for trial in first.trials]
    assert any("6 plans judged on other machines" in line for line in lines)
    assert other.validation.dense == first.validation.dense
    per_second = {run.speed.dense_tokens_per_second for run in found}
    assert len(per_second) == 2, "one table for each kind"
    assert other.speed.dense_tokens_per_second == pytest.approx(10 * first.speed.dense_tokens_per_second, rel=1e-3)
    assert len(study_of(other.study_path).trials) == 6


def test_another_engine_setting_measures_anew(place: Path, folder: WorkFolder, engines: Engines) -> None:
    tuned(open_small(place, **{"target.ratio": 0.3}), folder)
    engines.started.clear()
    tuned(open_small(place, **{"target.ratio": 0.3, "engine": {"dtype": "float32", "repeats": 3, "enforce_eager": True}}), folder)
    assert engines.started.count(place / "model") == 1


def test_min_speedup_chooses_the_best_of_those_that_are_fast_enough(place: Path, folder: WorkFolder, engines: Engines) -> None:
    found = tuned(open_small(place, **{"target.min_speedup": 1.1}), folder)
    assert found.chosen.comparison.speedup >= 1.1
    fast = [m for m in found.measured if m.comparison.speedup >= 1.1]
    assert found.chosen.candidate.perplexity == min(m.candidate.perplexity for m in fast)


def test_a_speedup_that_the_engine_does_not_show_is_refused(place: Path, folder: WorkFolder, engines: Engines) -> None:
    """The table promises what whole plans do not keep: every engine is as slow as the dense one."""
    engines.open = lambda model, workloads, *, sharing=1, log=None: MadeUpDense(engines, model)  # type: ignore[method-assign]
    runtime = Runtime("vllm", "made up 1", "float32", False, VllmExporter(), loads_sources=True, open=engines.open)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lrserve.pipeline.search.runtime_of", lambda settings: runtime)
        with pytest.raises(InfeasibleTargetError, match=r"no measured plan reaches 1\.1x of dense"):
            tuned(open_small(place, **{"target.min_speedup": 1.1}), folder)
    assert engines.running == []


class MadeUpDense(MadeUpEngine):
    def start(self) -> None:
        super().start()
        self.parameters = 100_000


def test_a_trial_is_exported_by_its_number(place: Path, folder: WorkFolder, engines: Engines) -> None:
    job = open_small(place, **{"target.ratio": 0.3})
    first = tuned(job, folder)
    other = next(t for t in first.trials if t.complete and t.plan != first.chosen.candidate.plan)
    search = job.recipe.search.model_copy(update={"choose": other.trial})
    picked = tuned(replace(job, recipe=job.recipe.model_copy(update={"search": search})), folder)
    assert picked.chosen.candidate.plan == other.plan
    assert len(picked.measured) == 1
    search = job.recipe.search.model_copy(update={"choose": 99})
    with pytest.raises(InputError, match="no trial 99"):
        tuned(replace(job, recipe=job.recipe.model_copy(update={"search": search})), folder)
    assert engines.running == []


def test_an_engine_that_fails_leaves_none_running(place: Path, folder: WorkFolder, engines: Engines) -> None:
    class Fails(MadeUpEngine):
        def throughput(self, *arguments: Any, **options: Any) -> Throughput:
            if self.model.name == "candidate":
                raise RuntimeError("out of memory")
            return super().throughput(*arguments, **options)

    runtime = Runtime(
        "vllm", "made up 1", "float32", False, VllmExporter(), loads_sources=True, open=lambda model, w, **_: Fails(engines, model)
    )  # type: ignore[arg-type, return-value]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lrserve.pipeline.search.runtime_of", lambda settings: runtime)
        with pytest.raises(RuntimeError, match="out of memory"):
            tuned(open_small(place, **{"target.ratio": 0.3}), folder)
    assert engines.running == []


ROUNDED = {"factorization": {"fisher_tokens": 128, "weights": ["int8", "int4_g32"], "residuals": [4]}}


def test_precision_is_part_of_the_plan_and_what_users_would_serve_is_measured(
    place: Path, folder: WorkFolder, engines: Engines
) -> None:
    """The made-up engine is as fast as the bytes that it loads are few."""
    lines: list[str] = []
    job = open_small(place, lines, **ROUNDED, **{"target.min_speedup": 1.4})
    found = tuned(job, folder)
    assert any("weights of float32, int8, int4_g32" in line for line in lines)
    usual = {m.candidate.origin: m for m in found.measured if m.candidate.trial is None}
    assert list(usual) == ["int8 everywhere", "int4_g32 everywhere"]
    assert len(found.measured) in (3, 4)
    for measured in found.measured:
        assert measured.comparison.speedup == pytest.approx(measured.predicted_speedup, rel=0.1)
    weights = {level.weights for trial in found.trials for level in trial.plan.levels.values()}
    assert weights == {None, "int8", "int4_g32"}
    fast = [m for m in found.measured if m.comparison.speedup >= 1.4]
    assert found.chosen.candidate.perplexity == min(m.candidate.perplexity for m in fast)
    assert usual["int8 everywhere"] in fast
    assert found.chosen.candidate.perplexity <= usual["int8 everywhere"].candidate.perplexity


def test_bytes_are_a_target(place: Path, folder: WorkFolder, engines: Engines) -> None:
    job = open_small(place, **ROUNDED, **{"target.max_bytes": 0.2})
    found = tuned(job, folder)
    for trial in found.trials:
        assert trial.plan.byte_share(job.units, 4) <= 0.2
    fits = {m.candidate.origin: m.candidate.fits for m in found.measured if m.candidate.trial is None}
    assert fits == {"int8 everywhere": False, "int4_g32 everywhere": True}
    assert found.chosen.candidate.fits


def test_an_engine_without_kernels_for_rounded_weights_is_offered_none(
    place: Path, folder: WorkFolder, engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    def latency_table(self: Any, shapes: Sequence[Shape], tokens: Sequence[int], **_: Any) -> list[Any]:
        return [None if shape.weights else [1e-3 * elements(vars(shape)) for _ in tokens] for shape in shapes]

    monkeypatch.setattr(MadeUpEngine, "latency_table", latency_table)
    lines: list[str] = []
    found = tuned(open_small(place, lines, **ROUNDED, **{"target.ratio": 0.3}), folder)
    assert any("the engine cannot run int8, int4_g32 here" in line for line in lines)
    assert all(level.weights is None for m in found.measured for level in m.candidate.plan.levels.values())
