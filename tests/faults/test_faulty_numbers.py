"""Not a number is a result, not a crash and not a winner: in weights, spectra, latencies, probes, trials and proofs."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from allocation.searching import GROUPS, LATENCIES, LOSSES, SETTINGS, SPEED, WORKLOADS, evaluate, goal, perplexity, space
from faults.refusing import Fault, refused
from pipeline.test_improve import Run
from pipeline.test_search import Engines, MadeUpEngine, open_small, tuned
from tiny import dense_model, write_dense, write_text

from exporters.vllm import VllmExporter
from lrserve.allocation.goal import Evaluated, MeasuredSpeed, choose, next_candidate, pareto_front, why_not
from lrserve.allocation.plan import BudgetFit, Offers, Plan
from lrserve.allocation.quality import Divergence, Judgement
from lrserve.allocation.space import SearchSpace
from lrserve.allocation.speed import Shape, SpeedModel, output_layers
from lrserve.allocation.study import STUDY, importances, run_study, study_of
from lrserve.compression.gradients import collect_gradients
from lrserve.compression.groups import find_groups
from lrserve.compression.level import DENSE, Level
from lrserve.compression.spectra import SpectrumStore, write_spectra
from lrserve.engines.runtimes import Runtime
from lrserve.errors import (
    AgreementError,
    CalibrationError,
    EngineError,
    InfeasibleTargetError,
    InputError,
    NotFiniteError,
)
from lrserve.inputs.finite import require_finite
from lrserve.inputs.source import Source
from lrserve.pipeline import prove, search
from lrserve.recipe import Target
from lrserve.report.card import not_finite
from lrserve.storage.work import WorkFolder, work_folder

NAN, INF = math.nan, math.inf
TARGETS = (Target(ratio=0.3), Target(min_speedup=1.1), Target(max_ppl_increase=0.5), Target())

# Weights


def broken(tensor: str, value: float) -> Callable[[Path], object]:
    """Write a model of which one entry of a tensor has this value."""

    def damage(folder: Path) -> Path:
        model = dense_model("LlamaForCausalLM")
        with torch.no_grad():
            model.get_parameter(tensor).view(-1)[5] = value
        write_text(folder / "text.jsonl", 200)
        return write_dense(model, folder / "model")

    return damage


BROKEN = [
    ("lm_head.weight", NAN),
    ("lm_head.weight", INF),
    ("model.embed_tokens.weight", -INF),
    ("model.norm.weight", NAN),
    ("model.layers.1.mlp.down_proj.weight", INF),
    ("model.layers.0.input_layernorm.weight", -INF),
]
WEIGHTS = [Fault(f"{value} in {name}", broken(name, value), ("1 tensors", name, "(1 of ", "not finite")) for name, value in BROKEN]


@pytest.mark.parametrize("fault", WEIGHTS, ids=str)
def test_weights_that_are_not_finite_are_named(fault: Fault, tmp_path: Path) -> None:
    source = Source("model", Path(str(fault.damage(tmp_path))))
    with pytest.raises(InputError) as found:
        require_finite(source.load(torch.bfloat16), source.path)
    assert all(part in str(found.value) for part in fault.line)


def test_weights_are_looked_at_before_calibration(tmp_path: Path) -> None:
    fault = WEIGHTS[0]
    model = fault.damage(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("calibration: {sequences: 8, length: 32}\nreport: {tokens: 64, length: 32, prompts: 1, prompt_tokens: 8}\n")
    arguments = [
        "--calibration",
        tmp_path / "text.jsonl",
        "--recipe",
        recipe,
        "--target",
        "onnx",
        "--export",
        "onnx",
        "--ratio",
        "0.2",
    ]
    refused(fault, "compress-and-export", str(model), *arguments, "-o", tmp_path / "OUT")
    assert not list((tmp_path / "OUT.work").glob("calibration-*"))


def test_weights_beyond_float16_ask_for_another_dtype(tmp_path: Path) -> None:
    source = Source("model", Path(str(broken("lm_head.weight", 1e6)(tmp_path))))
    require_finite(source.load(torch.bfloat16), source.path)
    with pytest.raises(InputError, match=r"not finite in float16, first lm_head\.weight .* set engine\.dtype to bfloat16"):
        require_finite(source.load(torch.float16), source.path)


def test_logits_that_overflow_are_one_line(tmp_path: Path) -> None:
    model = dense_model("LlamaForCausalLM")
    with torch.no_grad():
        model.lm_head.weight.fill_(1e38)
    windows = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(0))
    with pytest.raises(CalibrationError, match="logits are not finite"):
        collect_gradients(model, find_groups(model), windows, tmp_path, batch_tokens=64, seed=0)


# Spectra


@pytest.mark.parametrize("failure", ["raises", "nan", "beyond float32"])
def test_a_spectrum_that_is_not_finite_is_known_as_such(failure: str, tmp_path: Path) -> None:
    from lrserve.compression.factorize import Spectrum, factorize

    model = dense_model("LlamaForCausalLM")
    groups = find_groups(model)
    sick = groups[1].name

    def decompose(group: Any, weight: torch.Tensor, bias: Any) -> Spectrum:
        found = factorize(weight, torch.eye(group.n), torch.zeros(group.n), bias)
        if group.name != sick:
            return found
        if failure == "raises":
            torch.linalg.eigh(torch.full((3, 3), NAN))
        return replace(found, eigenvalues=found.eigenvalues * (NAN if failure == "nan" else 1e300))

    write_spectra(model, groups, decompose, tmp_path)
    store = SpectrumStore(tmp_path, groups)
    assert store.not_finite() == {sick}
    assert all(torch.isfinite(store.cut(group.name, 8).B).all() for group in groups if group.name != sick)


# Latencies

RANKED, WHOLE = Shape(256, 256, 48), Shape(256, 256, None)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("shape", [RANKED, Shape(256, 256, 48, ordered=True), WHOLE], ids=["factors", "down's factors", "dense"])
def test_groups_with_a_latency_that_is_not_finite_stay_dense(shape: Shape, value: float) -> None:
    latencies = {**LATENCIES, shape: {**LATENCIES[shape], 4: value}}
    speed = SpeedModel(GROUPS, WORKLOADS, {"chat": 0.5, "decode": 0.1}, latencies, Offers(16, "low_rank"))
    down = {group.name for group in GROUPS if group.ordered}
    every = {group.name for group in GROUPS}
    assert speed.untimed == speed.offers.dense == (every if shape == WHOLE else down if shape.ordered else every - down)
    for group in GROUPS:
        assert (speed.offers.levels(group) == [DENSE]) == (group.name in speed.untimed)
    plan = BudgetFit(GROUPS, speed.offers, speed.cost).cheapest()
    assert all(plan.levels[name] == DENSE for name in speed.untimed)
    assert math.isfinite(speed.speedup(plan))
    assert math.isfinite(speed.budget(1.2))
    if shape != WHOLE:
        assert speed.speedup(plan) > 1
        timed = Plan({name: level if name not in speed.untimed else DENSE for name, level in plan.levels.items()}, plan.structure)
        assert speed.speedup(plan) == pytest.approx(SPEED.speedup(timed))
        found = SearchSpace(GROUPS, Target(ratio=0.05), SETTINGS, LOSSES, speed, speed.offers)
        assert found.fit.cheapest().levels == plan.levels


def test_an_output_layer_of_no_finite_latency_is_not_rounded() -> None:
    offers, layer = Offers(16, "low_rank", embedding="int8"), (512, 256)
    dense, rounded = output_layers(layer, offers)
    for sick in (dense, rounded):
        times = {**LATENCIES, dense: dict.fromkeys((1, 4, 256), 9.0), rounded: dict.fromkeys((1, 4, 256), 3.0)}
        times[sick] = {1: NAN, 4: 9.0, 256: 9.0}
        speed = SpeedModel(GROUPS, WORKLOADS, {"chat": 0.5, "decode": 0.1}, times, offers, layer)
        assert speed.offers.embedding is None
        assert speed.untimed == frozenset()


def test_what_the_engine_measured_of_a_plan_corrects_nothing_if_it_is_not_finite() -> None:
    plan = Plan.of_ranks({group.name: 48 for group in GROUPS}, "low_rank")
    told = SPEED.corrected([(plan, {"chat": NAN, "decode": 0.5}), (plan, {"chat": INF, "decode": INF})])
    assert told.speedup(plan) == SPEED.speedup(plan)


# Trials


def infinite(plan: Plan) -> Judgement:
    return Judgement(INF, (NAN,))


@pytest.mark.parametrize(
    ("sampler", "target"), [*(("gp", target) for target in TARGETS), ("tpe", TARGETS[0]), ("tpe", TARGETS[-1])]
)
def test_trials_that_are_not_finite_are_nobodys_rivals(target: Target, sampler: str, tmp_path: Path) -> None:
    seen: list[Sequence[Sequence[float]]] = []

    def judge(plan: Plan, rivals: Sequence[Sequence[float]]) -> Judgement:
        seen.append(rivals)
        return infinite(plan) if len(seen) in (1, 5, 8) else evaluate(plan)

    settings = SETTINGS.model_copy(update={"sampler": sampler, "trials": 12})
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trials = run_study(space(target), goal(target), SPEED, judge, settings, tmp_path / "s.sqlite3", seed=0)
    assert len(trials) == 12
    sick = [trial for trial in trials if not trial.finite]
    assert len(sick) >= 3
    assert trials[0] in sick
    assert all(math.isfinite(loss) for rivals in seen for rival in rivals for loss in rival)
    assert len({trial.plan.key() for trial in trials}) > 6  # the sampler goes on
    assert not any(trial in sick for trial in pareto_front(trials, SPEED.speedup))
    candidate = next_candidate(trials, [], goal(target), SPEED.speedup)
    assert candidate is None or candidate.finite
    study = study_of(tmp_path / "s.sqlite3")
    assert study.study_name == STUDY
    assert all(math.isfinite(value) for trial in study.best_trials for value in trial.values)
    assert all(math.isfinite(share) for of in importances(study, goal(target)).values() for share in of.values())


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_a_search_without_a_finite_trial_ends_in_one_line(target: Target, tmp_path: Path) -> None:
    trials = run_study(space(target), goal(target), SPEED, lambda plan, rivals: infinite(plan), SETTINGS, tmp_path / "s", seed=0)
    with pytest.raises(InfeasibleTargetError, match=r"none of the 9 trials has a finite validation perplexity; .*engine\.dtype"):
        next_candidate(trials, [], goal(target), SPEED.speedup)


def found(number: int, speedup: float, *, finite: bool = True) -> MeasuredSpeed:
    plan = Plan.of_ranks({group.name: 16 * (number + 1) for group in GROUPS}, "low_rank")
    return MeasuredSpeed(Evaluated(plan, perplexity(plan) if finite else INF, 1.0, f"plan {number}", number), speedup, speedup)


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize(
    "sick", [found(2, NAN), found(2, INF), found(2, 0.0), found(2, 9.0, finite=False)], ids=lambda f: f"{f.speedup}"
)
def test_a_plan_of_no_finite_figure_is_never_chosen(target: Target, sick: MeasuredSpeed) -> None:
    sound = found(1, 1.3)
    assert choose([sick, sound], goal(target)) is sound.trial
    assert "not finite" in why_not(sick, sound, goal(target))
    with pytest.raises(InfeasibleTargetError, match="no plan a finite speedup"):
        choose([sick], goal(target))


# The stage as a whole


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Engines:
    made_up = Engines()
    runtime = Runtime("vllm", "made up 1", "float32", False, VllmExporter(), loads_sources=True, open=made_up.open)
    monkeypatch.setattr("lrserve.pipeline.search.runtime_of", lambda settings: runtime)
    return made_up


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("numbers")
    write_dense(dense_model("LlamaForCausalLM", layers=4), place / "model")
    write_text(place / "text.jsonl", 200)
    return place


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[WorkFolder]:
    with work_folder(tmp_path / "work", lambda line: None) as folder:
        yield folder


class SickProbe(Divergence):
    """Finds no number in the first layer."""

    def __call__(self, model: Any, first_changed: int = 0) -> float:
        return NAN if first_changed == 0 else super().__call__(model, first_changed)


def sick_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lrserve.pipeline.probe.Divergence", SickProbe)


def sick_spectrum(monkeypatch: pytest.MonkeyPatch) -> None:
    from lrserve.compression.spectra import features

    def some(*arguments: Any) -> Any:
        decompose = features(*arguments)

        def fails(group: Any, weight: torch.Tensor, bias: Any) -> Any:
            if group.name == "model.layers.0.self_attn.o_proj":
                raise torch.linalg.LinAlgError("did not converge")  # type: ignore[attr-defined]
            return decompose(group, weight, bias)

        return fails

    monkeypatch.setattr("lrserve.pipeline.run.features", some)


def sick_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    table = MadeUpEngine.latency_table

    def some(self: MadeUpEngine, shapes: Sequence[Shape], *arguments: Any, **options: Any) -> list[list[float]]:
        rows = table(self, shapes, *arguments, **options)
        return [[NAN] * len(row) if (s.n, s.m, s.rank) == (128, 64, 8) else row for s, row in zip(shapes, rows, strict=True)]

    monkeypatch.setattr(MadeUpEngine, "latency_table", some)


@pytest.mark.parametrize(
    ("fault", "why", "pattern"),
    [(sick_probe, "probe", "layers.0."), (sick_spectrum, "spectrum", "layers.0.self_attn.o_"), (sick_latency, "latency", "o_proj")],
    ids=["probe", "spectrum", "latency"],
)
@pytest.mark.parametrize("structure", ["narrow", "identity_block"])
def test_groups_of_which_a_number_is_not_finite_stay_dense(
    fault: Callable[[pytest.MonkeyPatch], None],
    why: str,
    pattern: str,
    structure: str,
    place: Path,
    folder: WorkFolder,
    engines: Engines,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fault(monkeypatch)
    lines: list[str] = []
    factorization = {"structure": structure, "fisher_tokens": 128, "weights": ["int8"]}
    job = open_small(place, lines, **{"target.max_bytes": 0.8, "factorization": factorization})
    outcome = tuned(job, folder)
    dense = {unit.name for unit in job.units if pattern in unit.name}
    assert outcome.left_dense == dict.fromkeys(dense, why)
    assert any(line.startswith("4/6 left dense, since a number is not finite: ") and f"({why})" in line for line in lines)
    searched = [trial.plan for trial in outcome.trials]
    assert searched
    for plan in searched:
        assert {plan.levels[name] for name in dense} == {DENSE}
        assert set(plan.levels.values()) != {DENSE}
    assert outcome.chosen.candidate.plan.byte_share(job.units, job.dtype.itemsize) <= 0.8


def test_a_first_trial_and_a_usual_plan_that_are_not_finite_win_nothing(
    place: Path, folder: WorkFolder, engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged: list[Plan] = []
    sound = search.judge

    def judge(*arguments: Any) -> Any:
        evaluate = sound(*arguments)

        def some(plan: Plan, rivals: Sequence[Sequence[float]]) -> Judgement:
            judged.append(plan)
            return infinite(plan) if len(judged) in (1, 2) else evaluate(plan, rivals)

        return some

    monkeypatch.setattr(search, "judge", judge)
    lines: list[str] = []
    job = open_small(place, lines, **{"target.ratio": 0.2, "factorization": {"fisher_tokens": 128, "weights": ["int8"]}})
    outcome = tuned(job, folder)
    assert set(judged[0].levels.values()) == {Level(weights="int8")}
    assert "4/6 int8 everywhere: the validation perplexity is not finite, so this plan is left out" in lines
    assert [trial.finite for trial in outcome.trials] == [False, *[True] * (len(outcome.trials) - 1)]
    assert all(trial.complete for trial in outcome.trials[1:3])
    assert any("1 not finite" in line for line in lines)
    assert all(measured.candidate.finite for measured in outcome.measured)
    with pytest.raises(InputError, match="no trial 0 that was judged on all of the text, with a finite perplexity"):
        search._picked(outcome.trials, 0)


def test_windows_are_chosen_where_the_compressed_model_has_no_finite_loss(
    place: Path, folder: WorkFolder, engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = iter([1.0, NAN])  # dense, compressed
    monkeypatch.setattr(
        search, "negative_log_likelihood", lambda model, pool, progress: torch.arange(len(pool)).double() * next(runs)
    )
    merged: Any = SimpleNamespace(apply=lambda levels: None, model=None)
    store: Any = SimpleNamespace(folder=folder.root, not_finite=frozenset)
    job = open_small(place)
    validation = search.validation_on(job, search.choose_windows(job, merged, store, folder)[0])
    assert len(set(validation.dense)) == len(validation.windows) == 8
    assert max(validation.dense) > 10 > min(validation.dense)  # they stand for all of the pool


def test_a_dense_model_of_no_finite_loss_ends_the_search(place: Path, folder: WorkFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "negative_log_likelihood", lambda model, pool, progress: torch.full((len(pool),), NAN))
    merged: Any = SimpleNamespace(apply=lambda levels: None, model=None)
    store: Any = SimpleNamespace(folder=folder.root, not_finite=frozenset)
    with pytest.raises(CalibrationError, match=r"dense model's loss on the validation text is not finite in float32; set engine"):
        search.choose_windows(open_small(place), merged, store, folder)


def test_a_dense_run_of_no_finite_time_ends_the_search(
    place: Path, folder: WorkFolder, engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines.seconds_per_parameter = NAN
    with pytest.raises(EngineError, match="took nan s for the workload decode; remove .*latency-"):
        tuned(open_small(place, **{"target.ratio": 0.2}), folder)


def test_weights_of_tokens_that_are_not_finite_weigh_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def overflows(*arguments: Any) -> Any:
        raise NotFiniteError("activations are not finite")

    monkeypatch.setattr(search, "weigh_tokens", overflows)
    lines: list[str] = []
    job: Any = SimpleNamespace(say=lines.append)
    merged: Any = SimpleNamespace(apply=lambda levels: None, model=None)
    runnable: Any = SimpleNamespace(offers=Offers(8, precisions=("int4_g32",)))
    rounding: Any = SimpleNamespace(measure_by=lambda moment: lines.append("told"))
    search.rounding_metric(job, merged, rounding, object(), runnable, object())  # type: ignore[arg-type]
    assert lines == ["4/6 weigh: all tokens weigh alike, since activations are not finite"]


# The proof and the summary


@pytest.mark.parametrize(("perplexities", "name"), [((9.0, INF), "compressed"), ((INF, 9.0), "dense"), ((9.0, NAN), "compressed")])
def test_a_model_that_overflows_in_its_dtype_is_found_by_the_proof(
    perplexities: tuple[float, float], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = iter(perplexities)
    monkeypatch.setattr(prove, "perplexity", lambda model, windows, progress: next(told))
    job: Any = SimpleNamespace(
        windows={"report": torch.zeros(2, 8)},
        source=SimpleNamespace(load=lambda dtype: None),
        compressed_model=lambda *arguments: None,
        recipe=SimpleNamespace(engine=SimpleNamespace(dtype="float16")),
        dtype=torch.float16,
    )
    improved: Any = SimpleNamespace(factors=None, repairs=None)
    with pytest.raises(AgreementError, match=rf"the {name} model .* not finite in float16; nothing was published, choose another"):
        prove.report_perplexity(job, Plan({}), improved, None, tmp_path)  # type: ignore[arg-type]


def test_the_summary_says_in_one_line_what_was_not_finite() -> None:
    assert not_finite({}) == []
    assert not_finite({"not_finite": {"left_dense": {}, "trials": 0}}) == []
    left = {f"layers.{layer}": "probe" for layer in range(6)}
    assert not_finite({"not_finite": {"left_dense": left, "trials": 2}}) == [
        "Numbers that are not finite: 6 groups stay dense: layers.0 (probe), layers.1 (probe), layers.2 (probe), layers.3 (probe), "
        "2 more; 2 trials do not count."
    ]


# Improvements


@pytest.mark.parametrize(
    ("step", "broken_function", "settings"),
    [
        ("refine", "lrserve.compression.refine._loss", {}),
        ("recover", "lrserve.compression.recover._backward", {"recover_minutes": 0.01}),
    ],
)
def test_an_improvement_that_is_not_finite_is_given_up(
    step: str,
    broken_function: str,
    settings: dict[str, float],
    place: Path,
    folder: WorkFolder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = Run(place, folder, {"down": Level(64)}, **settings)
    monkeypatch.setattr(broken_function, lambda *arguments: torch.tensor(NAN))
    found = run.improved()
    assert found == (run.store, None, {})
    assert any(line.startswith(f"5/6 {step}: given up, since ") for line in run.lines)
