"""Is the search worth it? Fronts of perplexity against *measured* throughput: lrserve's search against four other methods.

    python bench/search.py                            five seeds, on the demo's model and texts
    python bench/search.py --seeds 2 --trials 12 --plans 2
    python bench/search.py --phase trials             no measurements of plans: may run beside other things once layers are timed
    python bench/search.py --phase engine             the rest; needs the machine for itself
    python bench/search.py --method lrserve --seeds 1 --plans 12 --repeats 6          a whole front: is its order the predicted one?

Every method evaluates the same number of plans on the same validation text, from the same statistics:

    lrserve     the two-objective study as `lrserve compress-and-export` runs it without a target
    random      random draws from the same space, without the plans that the study begins with
    uniform     uniform ranks at as many ratios; needs no seed
    evolution   level switching (bench/evolution.py) from the closed-form loss-aware plan, at each of four ratios with a quarter of
                the evaluations
    bolaco      its 5x4 space for single linears (bench/bolaco.py), at each of the same ratios with a quarter of the evaluations

Of each method's front the few plans of the largest hypervolume, by predicted speed (by parameters for bolaco), are served by vLLM
with random weights, which the clock does not see, and measured in turns with the dense model, six plans at once. The figure of
merit is the hypervolume of these measurements: the area of log(perplexity / dense) and speedup that the plans dominate, up to
`REFERENCE`, dense's speed. The same measurements say how good the table's predictions are for plans that were never measured
before: first as they stand, then corrected by the factor that the plans of the *other* seeds and methods ask for.

Finished work is kept in the work folder. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr

from baselines import baseline
from bolaco import bolaco
from evolution import evolve
from inputs import bench_recipe
from lrserve.allocation import losses as allocate
from lrserve.allocation.goal import FRONT_LIMIT, Goal
from lrserve.allocation.plan import BudgetFit, Plan
from lrserve.allocation.space import SearchSpace
from lrserve.allocation.speed import SpeedModel
from lrserve.allocation.study import run_study
from lrserve.compression.assemble import MergedLevels
from lrserve.compression.groups import Group, separate
from lrserve.compression.matmul import float32_matmuls
from lrserve.compression.spec import quantization_config, specs_of
from lrserve.compression.spectra import SpectrumStore, write_spectra
from lrserve.engines.runtimes import Runtime, runtime_of
from lrserve.engines.vllm import Engine
from lrserve.engines.workloads import MixComparison, compare, open_engine, read_comparison
from lrserve.pipeline.job import Job, open_job
from lrserve.pipeline.measure import DenseEngine, measure_layers, speed_model
from lrserve.pipeline.probe import probe_units, ranks_probed
from lrserve.pipeline.run import backpropagate, calibrate_blocks, factorize_groups
from lrserve.pipeline.search import choose_windows, judge, validation_on
from lrserve.pipeline.stages import MODULES
from lrserve.recipe import Recipe, Target, Workload
from lrserve.report.card import table
from lrserve.report.console import progress_bar
from lrserve.storage.store import fingerprint, write_json
from lrserve.storage.work import WorkFolder, work_folder
from publishing import add_results_option, command_line, publish

METHODS = ("lrserve", "random", "uniform", "evolution", "bolaco")
RATIOS = (0.15, 0.3, 0.45, 0.6)  # at which evolution and bolaco search
UNIFORM_RATIOS = (0.05, 0.65)
WORKLOADS = {
    "chat": Workload(prompt_tokens=128, output_tokens=64, concurrency=8),
    "prefill": Workload(prompt_tokens=1024, output_tokens=8, concurrency=4),
    "decode": Workload(prompt_tokens=32, output_tokens=64, concurrency=1),
}
"""The recipe's profiles with shorter answers, so that fifty plans can be measured within an hour."""
TOGETHER = 6
"""Plans whose engines are up at once."""
REFERENCE = (FRONT_LIMIT, 1.0)  # nats above dense, throughput over dense: what is beyond dominates nothing


@dataclass(frozen=True)
class Point:
    """A judged plan: loss in nats, predicted speedup (None: the table has no single linears), share of parameters removed."""

    plan: Plan
    loss: float
    predicted: float | None
    ratio: float


def front(points: Sequence[Point]) -> list[Point]:
    """Return the points that no other beats in loss and in speed, or parameters where there is no speed; best loss first."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.loss, -speed_of(p))):
        if math.isfinite(point.loss) and (not best or speed_of(point) > speed_of(best[-1])):
            best.append(point)
    return best


def speed_of(point: Point) -> float:
    return 1 + point.ratio if point.predicted is None else point.predicted


def best_of(points: Sequence[Point], count: int) -> list[Point]:
    """Return the plans of a front, so many, of the largest predicted hypervolume; all but the least loss may be useless."""
    useful = [p for p in points if p.loss < REFERENCE[0]] or list(points[:1])
    sets = combinations(useful, min(count, len(useful)))
    return list(max(sets, key=lambda chosen: hypervolume([(p.loss, speed_of(p)) for p in chosen])))


def hypervolume(points: Sequence[tuple[float, float]]) -> float:
    """Return the area that points (loss, speedup) dominate, up to `REFERENCE`."""
    area, slowest = 0.0, REFERENCE[1]
    for loss, speedup in sorted(point for point in points if point[0] < REFERENCE[0]):
        if speedup > slowest:
            area += (REFERENCE[0] - loss) * (speedup - slowest)
            slowest = speedup
    return area


def evolve_each(
    fit: BudgetFit, losses: allocate.Errors, trials: int, evaluate: Callable[[Plan], float], stage: Path, seed: int
) -> None:
    """Switch levels from the plan of least loss at each of `RATIOS`, one offspring a generation; `trials` evaluations in all."""
    for ratio in RATIOS:
        budget, state = (1 - ratio) * fit.dense_cost, stage / f"state-{ratio}.json"
        state.unlink(missing_ok=True)  # only a search that ran to the end keeps its points
        start = allocate.least_loss(fit, losses, budget)
        generations = trials // len(RATIOS) - 1  # the start is an evaluation too
        evolve(fit, start, budget, evaluate, state, generations=generations, offspring=1, seed=seed)


class Unguided(SearchSpace):
    """The space without the plans that a study begins with."""

    def first_trials(self) -> dict[str, dict[str, Any]]:
        """Return nothing."""
        return {}


class Bench:
    """The opened inputs, and every stage that the methods share, made at its first use."""

    def __init__(self, job: Job, folder: WorkFolder, trials: int, plans: int) -> None:
        self.job, self.folder, self.trials, self.plans = job, folder, trials, plans
        self.runtime: Runtime = runtime_of(job.recipe.engine)

    @cached_property
    def model(self) -> Any:
        """The dense model."""
        return self.job.source.load(self.job.dtype)

    @cached_property
    def statistics(self) -> Path:
        """Covariances."""
        return calibrate_blocks(self.job, self.model, self.folder)

    @cached_property
    def store(self) -> SpectrumStore:
        """lrserve's factors."""
        gradients = backpropagate(self.job, self.model, self.folder)
        return factorize_groups(self.job, self.model, self.statistics, gradients, self.folder)

    @cached_property
    def pairs(self) -> list[tuple[Group, Group]]:
        """Single linears, and the groups that they are of."""
        return separate(self.job.groups)

    @property
    def singles(self) -> list[Group]:
        """Single linears."""
        return [single for single, _ in self.pairs]

    @cached_property
    def single_store(self) -> SpectrumStore:
        """Bolaco's factors."""
        stage = self.folder.stage("spectra-bolaco", {"calibration": self.statistics.name})
        write_spectra(self.model, self.singles, baseline("bolaco", self.statistics, self.pairs), stage)
        return SpectrumStore(stage, self.singles)

    @cached_property
    def merged(self) -> MergedLevels:
        """The model under lrserve's plans."""
        return MergedLevels(self.model, self.job.units, self.store)

    @cached_property
    def table(self) -> tuple[dict[str, Any], str]:
        """Times of single layers."""
        log = self.folder.root / "dense-engine.log"
        with DenseEngine(self.runtime, self.job.source.path, self.job.recipe.requests, log) as dense:
            return measure_layers(self.job, self.runtime, dense, self.folder)

    @cached_property
    def speed(self) -> SpeedModel:
        """The predictions."""
        return speed_model(self.job, self.table[0])

    @cached_property
    def validation(self) -> Any:
        """The windows that trials are judged on."""
        return validation_on(self.job, choose_windows(self.job, self.merged, self.store, self.folder)[0])

    @cached_property
    def goal(self) -> Goal:
        """Both objectives."""
        return Goal(Target(), self.job.recipe.search.speed_weight, self.validation.dense_perplexity)

    def searched(self, method: str, seed: int) -> list[Point]:
        """Run one search, or read it."""
        identity = {"store": self.store.folder.name, "table": self.table[1], "trials": self.trials, "seed": seed}
        stage = self.folder.stage(f"{method}-{seed}", identity)
        path = stage / "points.json"
        if not path.is_file():
            points = self._bolaco(seed, stage) if method == "bolaco" else self._own(method, seed, stage)
            rows = [{**asdict(p), "plan": {"levels": p.plan.to_json(), "structure": p.plan.structure}} for p in points]
            write_json(path, rows)
        rows = json.loads(path.read_text(encoding="utf-8"))
        return [Point(**{**row, "plan": Plan.from_json(**row["plan"])}) for row in rows]

    def _point(self, plan: Plan, perplexity: float) -> Point:
        return Point(plan, self.goal.loss(perplexity), self.speed.speedup(plan), plan.ratio(self.job.units))

    def _own(self, method: str, seed: int, stage: Path) -> list[Point]:
        units, settings = self.job.units, self.job.recipe.search
        evaluate = judge(self.merged, self.validation)
        if method == "uniform":
            fit, (low, high) = BudgetFit(units, self.job.offers), UNIFORM_RATIOS
            ratios = [low + (high - low) * i / (self.trials - 1) for i in range(self.trials)]
            plans = [allocate.uniform(fit, (1 - ratio) * fit.dense_cost) for ratio in ratios]
            return [self._point(plan, evaluate(plan, []).perplexity) for plan in plans]
        probes = ranks_probed(probe_units(self.job, self.merged, self.store, self.job.offers, self.folder))
        of_ranks = allocate.estimates(self.store.errors(), probes, {unit.name for unit in units})
        if method == "evolution":
            return self._evolution(of_ranks["loss_aware"], seed, stage)
        levels = {unit.name: self.job.offers.levels(unit) for unit in units}
        losses = {base: allocate.by_level(units, levels, own, {}) for base, own in of_ranks.items()}
        search = settings.model_copy(update={"trials": self.trials, "sampler": "gp" if method == "lrserve" else "random"})
        space = (SearchSpace if method == "lrserve" else Unguided)(units, Target(), search, losses, self.speed, self.job.offers)
        trials = run_study(space, self.goal, self.speed, evaluate, search, stage / "study.sqlite3", seed=seed)
        return [self._point(trial.plan, trial.perplexity) for trial in trials if trial.complete]

    def _evolution(self, losses: allocate.Errors, seed: int, stage: Path) -> list[Point]:
        judged, points = judge(self.merged, self.validation), list[Point]()

        def evaluate(plan: Plan) -> float:
            points.append(self._point(plan, judged(plan, []).perplexity))
            return points[-1].loss

        fit = BudgetFit(self.job.units, self.job.offers)
        evolve_each(fit, losses, self.trials, evaluate, stage, seed)
        return points

    def _bolaco(self, seed: int, stage: Path) -> list[Point]:
        self.merged.apply({})
        merged = MergedLevels(self.model, self.singles, self.single_store)
        dense = sum(group.dense_parameters for group in self.singles)
        points: list[Point] = []

        def evaluate(plan: Plan) -> float:
            merged.apply(plan.levels)
            perplexity = self.validation(self.model).perplexity
            points.append(Point(plan, self.goal.loss(perplexity), None, plan.ratio(self.singles)))
            return float(perplexity)

        for ratio in RATIOS:
            trials, path = self.trials // len(RATIOS), stage / f"study-{ratio}.sqlite3"
            path.unlink(missing_ok=True)  # only a search that ran to the end keeps its points
            bolaco(self.singles, (1 - ratio) * dense, self.job.steps[0], 4, trials, evaluate, path, seed=seed)
        merged.apply({})
        return points

    def measured(self, chosen: Sequence[tuple[str, int, Point]]) -> list[MixComparison]:
        """Measure plans in turns with the dense model, or read what was measured.

        Those of lrserve and of random search with one seed run beside each other, so that one state of the machine is both's.
        """
        recipe, settings = self.job.recipe, self.job.recipe.engine
        identity = {"table": self.table[1], "settings": settings.model_dump(mode="json"), "together": TOGETHER}
        stage = self.folder.stage("measured", identity)
        paths = [stage / f"{method}-{seed}-{fingerprint(point.plan.key())[:16]}.json" for method, seed, point in chosen]
        missing: dict[int, list[int]] = {}
        for index, (method, seed, _) in enumerate(chosen):
            if not paths[index].is_file():
                missing.setdefault(seed if method in ("lrserve", "random") else -1, []).append(index)
        batches = [own[start : start + TOGETHER] for own in missing.values() for start in range(0, len(own), TOGETHER)]
        with progress_bar(sum(map(len, batches)), "engine") as progress:
            done = 0
            for batch in batches:
                with ExitStack() as stack:
                    dense = stack.enter_context(self._engine("dense", None, []))
                    engines = []
                    for index in batch:
                        method, _, point = chosen[index]
                        groups = self.singles if method == "bolaco" else self.job.units
                        engines.append(stack.enter_context(self._engine(f"candidate-{len(engines)}", point.plan, groups)))
                    found = compare(
                        dense, engines, recipe.workloads, settings.repeats, version=self.runtime.version, seed=recipe.seed
                    )
                for index, comparison in zip(batch, found, strict=True):
                    write_json(paths[index], asdict(comparison))
                done += len(batch)
                progress(done)
        return [read_comparison(path) for path in paths]

    def _engine(self, name: str, plan: Plan | None, groups: Sequence[Group]) -> Engine:
        recipe, config = self.job.recipe, self.job.source.config()
        folder = self.folder.root / name
        folder.mkdir(exist_ok=True)
        if plan is not None:
            config.quantization_config = quantization_config(specs_of(plan.changed(groups), plan.structure))
        config.save_pretrained(folder)
        return open_engine(folder, recipe.workloads, recipe.engine, sharing=1 + TOGETHER, load_format="dummy")


def errors_of_prediction(
    bench: Bench, chosen: Sequence[tuple[str, int, Point]], found: Sequence[MixComparison]
) -> list[dict[str, Any]]:
    """Hold predictions against measurements, each plan once, with the median where several seeds found it.

    A correction sees only plans of other searches.
    """
    rows, measured = [], dict[Any, list[MixComparison]]()
    for (_, _, point), comparison in zip(chosen, found, strict=True):
        measured.setdefault(point.plan.key(), []).append(comparison)
    for method, seed, point in chosen:
        comparisons = measured.pop(point.plan.key(), [])
        if point.predicted is None or not comparisons:
            continue
        others = [
            (p.plan, c.relative_times)
            for (m, s, p), c in zip(chosen, found, strict=True)
            if p.predicted is not None and (m, s) != (method, seed) and p.plan.key() != point.plan.key()
        ]
        corrected = bench.speed.corrected(others).speedup(point.plan)
        rows.append(
            {
                "method": method,
                "seed": seed,
                "predicted": point.predicted,
                "corrected": corrected,
                "measured": statistics.median(comparison.speedup for comparison in comparisons),
                "undisturbed": statistics.median(comparison.undisturbed_speedup for comparison in comparisons),
                "times": len(comparisons),
            }
        )
    return rows


def report(bench: Bench, methods: Sequence[str], seeds: int, engine: bool) -> dict[str, Any]:
    """Run what is missing and return all figures."""
    searches = {
        (method, seed): bench.searched(method, seed)
        for seed in range(seeds)
        for method in methods
        if method != "uniform" or not seed
    }
    predicted = {key: hypervolume([(p.loss, p.predicted) for p in points if p.predicted]) for key, points in searches.items()}
    result: dict[str, Any] = {"predicted_hypervolume": {f"{m} {s}": v for (m, s), v in predicted.items() if m != "bolaco"}}
    if not engine:
        return result
    chosen = [(*key, point) for key, points in searches.items() for point in best_of(front(points), bench.plans)]
    found = bench.measured(chosen)
    volumes: dict[str, dict[int, float]] = {}
    for method, seed in searches:
        points = [(p.loss, c.speedup) for (m, s, p), c in zip(chosen, found, strict=True) if (m, s) == (method, seed)]
        volumes.setdefault(method, {})[seed] = hypervolume(points)
    rows = errors_of_prediction(bench, chosen, found)
    accuracy = {}
    for kind in ("predicted", "corrected")[: min(2, len({(row["method"], row["seed"]) for row in rows}))]:
        errors = [abs(row[kind] / row["measured"] - 1) for row in rows]
        correlation = spearmanr([row[kind] for row in rows], [row["measured"] for row in rows]).statistic
        accuracy[kind] = {"median_error": statistics.median(errors), "largest_error": max(errors), "spearman": float(correlation)}
    points_out = [
        {"method": m, "seed": s, "loss": p.loss, "ratio": p.ratio, "predicted": p.predicted, **c.speedup_json()}
        for (m, s, p), c in zip(chosen, found, strict=True)
    ]
    return result | {"hypervolume": volumes, "accuracy": accuracy, "points": points_out, "predictions": rows}


def render(result: Mapping[str, Any]) -> str:
    """Tables of hypervolumes and of predictions."""
    lines = []
    for method, by_seed in result["hypervolume"].items():
        values = list(by_seed.values())
        spread_of = f"{min(values):.3f} to {max(values):.3f}" if len(values) > 1 else ""
        lines.append([method, f"{statistics.median(values):.3f}", spread_of, str(len(values))])
    kinds = [
        [kind, f"{found['median_error']:.1%}", f"{found['largest_error']:.1%}", f"{found['spearman']:.2f}"]
        for kind, found in result["accuracy"].items()
    ]
    first = table(["hypervolume, measured", "median", "lowest to highest", "seeds"], lines)
    second = table(["speedup", "median error", "largest", "Spearman"], kinds)
    return f"{first}\n\n{second}\n"


@float32_matmuls()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, help="another model and texts [default: the demo's]")
    parser.add_argument("--method", action="append", choices=METHODS, help="repeatable [default: all]")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--plans", type=int, default=3, help="plans of each front that are measured [default: 3]")
    parser.add_argument("--repeats", type=int, default=4, help="counted rounds of a measurement [default: 4]")
    parser.add_argument("--compiled", action="store_true", help="vLLM with torch.compile; the demo's recipe is without")
    parser.add_argument("--phase", choices=("trials", "engine"), default="engine", help="engine does both [default]")
    parser.add_argument("--work", type=Path, default=Path("search.work"), help="folder for what is finished [default: search.work]")
    add_results_option(parser)
    arguments = parser.parse_args()
    if arguments.results and arguments.phase == "trials":
        parser.error("--results needs measurements; leave out --phase trials")
    overrides = {
        "engine.repeats": arguments.repeats,
        "engine.enforce_eager": False if arguments.compiled else None,
        "factorization.weights": (),  # what all methods have is ranks
        "workloads": {name: workload.model_dump() for name, workload in WORKLOADS.items()},
    }
    job = open_job(Recipe.load(arguments.recipe or bench_recipe(), overrides), print)
    with work_folder(arguments.work, lambda line: None, MODULES) as folder:
        bench = Bench(job, folder, arguments.trials, arguments.plans)
        result = report(bench, arguments.method or METHODS, arguments.seeds, arguments.phase == "engine")
    if "hypervolume" in result:
        print(render(result))
        if arguments.results:
            publish(arguments.results, command_line(), render(result), result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
