"""Quality at equal parameter counts: published closed forms against lrserve's, idea by idea, in one table.

    python bench/quality.py                          every row at ratios 0.2, 0.4 and 0.6, on the demo's model and texts
    python bench/quality.py --row default --ratio 0.2
    python bench/quality.py --list
    python bench/quality.py --rounding --ratio 0.2   what rounding the factors to the serving dtype does to the logits

Rows share the calibration text, its statistics and the seed. A cell holds the perplexity on held-out text of two domains, with
log(perplexity / dense perplexity) in brackets, and the mean KL divergence from the dense model on both, in nats per token. Models
are measured as they would be exported: factors rounded to the serving dtype, multiplied unmerged. The work folder keeps finished
stages and rows: an interrupted run goes on where it stopped, and a finished row is only printed.

The seconds are those of making the factors: the stages that a row's factorization needs (calibration, backward passes,
decomposition, each as long as it took when it was made) and its own allocation and improvement.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from baselines import BASELINES, baseline
from bolaco import bolaco, lord_plan
from evolution import evolve
from inputs import bench_recipe
from lrserve.allocation import losses as allocate
from lrserve.allocation.goal import Goal
from lrserve.allocation.plan import BudgetFit, Offers, Plan
from lrserve.allocation.quality import Divergence, Judgement, Reference, Validation, negative_log_likelihood, perplexity
from lrserve.allocation.space import SearchSpace
from lrserve.allocation.study import run_study
from lrserve.compression.assemble import MergedLevels, compress_model, round_parameters
from lrserve.compression.factorize import FactorSource
from lrserve.compression.groups import Group, Structure, allocated, separate
from lrserve.compression.level import Level
from lrserve.compression.matmul import float32_matmuls
from lrserve.compression.spectra import (
    SpectrumStore,
    features,
    write_spectra,
)
from lrserve.inputs.demo import demo_texts
from lrserve.inputs.text import read_documents, token_windows
from lrserve.pipeline.improve import improve_factors
from lrserve.pipeline.job import Job, first_tokens, open_job, tensor_sha256
from lrserve.pipeline.probe import probe_units, ranks_probed
from lrserve.pipeline.rounding import gradient_reader
from lrserve.pipeline.run import backpropagate, calibrate_blocks
from lrserve.pipeline.stages import MODULES
from lrserve.recipe import Recipe, Target
from lrserve.report.card import table
from lrserve.storage.store import write_json
from lrserve.storage.work import WorkFolder, work_folder
from publishing import add_results_option, command_line, publish

RATIOS = (0.2, 0.4, 0.6)
TRIALS = 50  # of Bolaco's search, as in the paper
GENERATIONS, OFFSPRING = 25, 4  # of the evolutionary allocator
STEP = 16
PROBING = ("probed", "loss_aware", "loss_aware_mlp", "searched", "evolution")  # allocators that look at the probes


@dataclass(frozen=True)
class Row:
    """One line of the table: how the factors are made, how the ranks are allocated, what comes after."""

    label: str
    factors: str
    allocator: str = "uniform"
    structure: Structure = "identity_block"
    after: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the recipe's `factorization` that improve the plan's factors, in the order in which they are applied."""


ROWS: Mapping[str, Row] = {
    "svd": Row("`svd`: plain SVD, uniform", "svd", structure="low_rank"),
    "asvd": Row("`asvd`, uniform", "asvd", structure="low_rank"),
    "svd-llm": Row("`svd-llm`: Cholesky whitening, uniform", "svd-llm", structure="low_rank"),
    "lord": Row("`lord`: one pool, v dense, q and k half", "lord", "lord", structure="low_rank"),
    "bolaco-5x1": Row("`bolaco` 5x1, 50 trials", "bolaco", "bolaco-1", structure="low_rank"),
    "bolaco-5x4": Row("`bolaco` 5x4, 50 trials", "bolaco", "bolaco-4", structure="low_rank"),
    "separate": Row("features, separate linears, uniform", "bolaco", structure="low_rank"),
    "fused": Row("+ fused groups", "features", structure="low_rank"),
    "identity": Row("+ identity blocks", "features"),
    "identity-probed": Row("+ probed allocation, no Fisher", "features", "probed"),
    "greedy": Row("features, identity blocks, greedy allocation", "features", "greedy"),
    "fisher-uniform": Row("two-sided (Fisher), identity blocks, uniform", "fisher"),
    "fisher-low-rank": Row("two-sided, two factors, loss-aware", "fisher", "loss_aware", structure="low_rank"),
    "fisher-only": Row("two-sided, identity blocks, Fisher allocation", "fisher", "fisher"),
    "fisher-probed": Row("two-sided, identity blocks, probed allocation", "fisher", "probed"),
    "loss-aware": Row("two-sided, identity blocks, loss-aware allocation: the *start*", "fisher", "loss_aware"),
    "without-qkv": Row("start, qkv one-sided", "fisher-but-qkv", "loss_aware"),
    "without-o": Row("start, o one-sided", "fisher-but-o", "loss_aware"),
    "without-gate_up": Row("start, gate_up one-sided", "fisher-but-gate_up", "loss_aware"),
    "without-down": Row("start, down one-sided", "fisher-but-down", "loss_aware"),
    "searched": Row("start + 24 trials of the search", "fisher", "searched"),
    "adam": Row("start + 25 Adam steps a block", "fisher", "loss_aware", after={"refine": "adam"}),
    "evolution": Row("start + evolutionary level switching", "fisher", "evolution"),
    "propagate": Row("start + error propagation", "fisher", "loss_aware", after={"propagate": True}),
    "identity-recover": Row("start + `--recover 10`", "fisher", "loss_aware", after={"recover_minutes": 10.0}),
    "narrow-uniform": Row("two-sided, fewer neurons, uniform", "fisher", structure="narrow"),
    "narrow-one-sided": Row("one-sided, fewer neurons, probed allocation", "features", "probed", "narrow"),
    "narrow": Row("two-sided, fewer neurons, loss-aware allocation", "fisher", "loss_aware", "narrow"),
    "narrow-mlp": Row("the same, attention left dense", "fisher", "loss_aware_mlp", "narrow"),
    "narrow-propagate": Row("the same + error propagation", "fisher", "loss_aware", "narrow", {"propagate": True}),
    "default": Row("**default**: fewer neurons + 25 Adam steps a block", "fisher", "loss_aware", "narrow", {"refine": "adam"}),
    "adam-recover": Row(
        "default, then `--recover 10`", "fisher", "loss_aware", "narrow", {"refine": "adam", "recover_minutes": 10.0}
    ),
    "recover": Row("fewer neurons, with `--recover 10`", "fisher", "loss_aware", "narrow", {"recover_minutes": 10.0}),
}


class _EqualSpeed:
    """Stands for a speed model where only quality counts."""

    def speedup(self, plan: Plan) -> float:
        return 1.0

    def tokens_per_second(self, plan: Plan) -> float:
        return 1.0

    def cost(self, group: Group, level: Level) -> float:
        return 0.0


class Bench:
    """The opened inputs, the dense reference, and every stage by name, made at its first use."""

    def __init__(self, job: Job, folder: WorkFolder, texts: Mapping[str, torch.Tensor]) -> None:
        self.job, self.folder, self.texts = job, folder, texts
        self.fused = job.groups
        self.pairs = separate(job.groups)
        self.single = [group for group, _ in self.pairs]
        self.model = job.source.load(job.dtype)
        self.reference = {name: Reference(self.model, windows) for name, windows in texts.items()}
        self.times_path = folder.root / "times.json"

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Keep how long a stage took, unless it only read what was there."""
        began = time.monotonic()
        yield
        times = self.times()
        seconds = time.monotonic() - began
        if seconds > times.get(name, 1.0):
            write_json(self.times_path, {**times, name: seconds})

    def times(self) -> dict[str, float]:
        """Seconds by stage."""
        return json.loads(self.times_path.read_text(encoding="utf-8")) if self.times_path.is_file() else {}

    @cache  # noqa: B019 - one bench per process
    def statistics(self) -> Path:
        """Covariances."""
        with self.timed("calibrate"):
            return calibrate_blocks(self.job, self.model, self.folder)

    @cache  # noqa: B019
    def gradients(self) -> Any:
        """Gradient moments."""
        with self.timed("gradients"):
            return backpropagate(self.job, self.model, self.folder)

    def groups(self, row: Row) -> list[Group]:
        """What is allocated under a factorization and a structure."""
        return self.single if row.factors in BASELINES else allocated(self.fused, row.structure)

    def job_of(self, row: Row, **settings: Any) -> Job:
        """The job with a row's structure, and other settings of the factorization."""
        factorization = self.job.recipe.factorization.model_copy(update={"structure": row.structure, **settings})
        return replace(self.job, recipe=self.job.recipe.model_copy(update={"factorization": factorization}))

    def spectra(self, row: Row) -> SpectrumStore:
        """Factors of every rank."""
        return self._spectra(row.factors, row.structure == "narrow")

    @cache  # noqa: B019
    def _spectra(self, factors: str, fewer_neurons: bool) -> SpectrumStore:
        statistics = self.statistics()
        if factors in BASELINES:
            decompose = baseline(factors, statistics, self.pairs)
        elif factors == "features":
            decompose = features(statistics)
        else:
            gradients, without = self.gradients(), factors.removeprefix("fisher-but-")
            decompose = features(statistics, lambda group: None if group.kind == without else gradients.read(group))
        inputs = {"calibration": statistics.name, "factors": factors}
        if factors.startswith("fisher"):
            inputs["gradients"] = self.gradients().folder.name
        groups = self.single if factors in BASELINES else self.fused
        name = f"spectra-{factors}"
        if fewer_neurons:
            name, groups, inputs["neurons"] = f"{name}-narrow", allocated(self.fused, "narrow"), "fewer"
        stage = self.folder.stage(name, inputs)
        with self.timed(name):
            write_spectra(self.model, groups, decompose, stage)
        return SpectrumStore(stage, groups, statistics)

    def plan(self, row: Row, ratio: float) -> tuple[Plan, list[str]]:
        """Allocate the ranks, or read the plan that another row left; returns it with the names of its timed stages."""
        name = f"plan-{row.factors}-{row.allocator}-{row.structure}-{ratio}"
        stages = ["calibrate", f"spectra-{row.factors}" + "-narrow" * (row.structure == "narrow"), name]
        store = self.spectra(row)
        inputs = {
            "spectra": store.folder.name,
            "validation": tensor_sha256(self.job.windows["validation"]),
            "settings": [TRIALS, GENERATIONS, OFFSPRING, STEP, self.job.recipe.seed],
            "search": self.job.recipe.search.model_dump(mode="json"),
        }
        if row.factors.startswith("fisher"):
            stages.append("gradients")
        if row.allocator in PROBING:
            self.probes(row)
            stages.append(f"probe-{row.factors}-{row.structure}")
        place = self.folder.stage(name, inputs)
        if not (place / "plan.json").is_file():
            with self.timed(name):
                plan = self._allocate(row, ratio, store, place)
            plan.write(place / "plan.json")
        return Plan.read(place / "plan.json"), stages

    def _allocate(self, row: Row, ratio: float, store: SpectrumStore, place: Path) -> Plan:
        groups = self.groups(row)
        fit = BudgetFit(groups, Offers(STEP, row.structure))
        budget = (1 - ratio) * fit.dense_cost
        if row.allocator == "uniform":
            return allocate.uniform(fit, budget)
        if row.allocator == "lord":
            return lord_plan(groups, budget, STEP)
        seed, validation = self.job.recipe.seed, self.job.windows["validation"]
        if row.allocator.startswith("bolaco"):
            runs = int(row.allocator.partition("-")[2])
            with self.judged(groups, store, lambda: perplexity(self.model, validation[:4])) as evaluate:
                return bolaco(groups, budget, STEP, runs, TRIALS, evaluate, place / "study.sqlite3", seed=seed)
        errors = store.errors()
        if row.allocator == "greedy":
            return allocate.least_loss(fit, allocate.relative(errors), budget)
        if row.allocator == "fisher":
            return allocate.least_loss(fit, allocate.fisher(errors), budget)
        without, two_sided = row.factors.removeprefix("fisher-but-"), row.factors.startswith("fisher")
        weighted = {group.name for group in groups if two_sided and group.kind != without}
        losses = allocate.estimates(errors, self.probes(row), weighted)
        if row.allocator == "loss_aware_mlp":  # what factors of attention lose is set beyond any price
            kept = {group.name for group in groups if not group.fed_by}
            losses = {"loss_aware_mlp": {n: x + 1e6 if n in kept else x for n, x in losses["loss_aware"].items()}}
        if row.allocator in losses:
            return allocate.least_loss(fit, losses[row.allocator], budget)
        if row.allocator == "searched":
            return self.searched(row, store, losses, ratio, place)
        start = allocate.least_loss(fit, losses["loss_aware"], budget)
        divergence = Divergence(self.model, validation[:2])
        with self.judged(groups, store, lambda: divergence(self.model)) as evaluate:
            state = place / "state.json"
            return evolve(fit, start, budget, evaluate, state, generations=GENERATIONS, offspring=OFFSPRING, seed=seed)

    @contextmanager
    def judged(
        self, groups: Sequence[Group], store: SpectrumStore, measure: Callable[[], float]
    ) -> Iterator[Callable[[Plan], float]]:
        """Yield what measures the model under a plan; the model is dense again afterwards."""
        merged = MergedLevels(self.model, groups, store)

        def evaluate(plan: Plan) -> float:
            merged.apply(plan.levels)
            return measure()

        try:
            yield evaluate
        finally:
            merged.apply({})

    def searched(self, row: Row, store: SpectrumStore, losses: Mapping[str, allocate.Errors], ratio: float, place: Path) -> Plan:
        """Return the plan of least perplexity of the pipeline's search, to which all plans are equally fast here."""
        recipe = self.job.recipe
        windows = first_tokens(self.job.windows["validation"], recipe.search.validation_tokens)
        speed: Any = _EqualSpeed()
        validation = Validation(windows, negative_log_likelihood(self.model, windows).tolist())
        target = Target(ratio=ratio)
        goal = Goal(target, recipe.search.speed_weight, validation.dense_perplexity)
        offers = self.offers(row)
        levels = {group.name: offers.levels(group) for group in self.groups(row)}
        by_level = {base: allocate.by_level(self.groups(row), levels, of_ranks, {}) for base, of_ranks in losses.items()}
        space = SearchSpace(self.groups(row), target, recipe.search, by_level, speed, offers)
        merged = MergedLevels(self.model, self.groups(row), store)

        def evaluate(plan: Plan, rivals: Sequence[Sequence[float]]) -> Judgement:
            merged.apply(plan.levels)
            return validation(self.model, rivals)

        trials = run_study(space, goal, speed, evaluate, recipe.search, place / "study.sqlite3", seed=recipe.seed)
        merged.apply({})
        return min((trial for trial in trials if trial.complete), key=lambda trial: trial.perplexity).plan

    def offers(self, row: Row) -> Offers:
        """Return the ranks that a row's groups may have; nothing is rounded."""
        step, width_step = self.job.steps
        return Offers(step, row.structure, width_step=width_step)

    def probes(self, row: Row) -> dict[str, tuple[int | None, float]]:
        """Divergences of the groups one by one."""
        store = self.spectra(row)
        merged = MergedLevels(self.model, self.groups(row), store)
        with self.timed(f"probe-{row.factors}-{row.structure}"):
            found = probe_units(self.job_of(row), merged, store, self.offers(row), self.folder)
        merged.apply({})
        return ranks_probed(found)

    def improved(self, row: Row, plan: Plan, ratio: float) -> tuple[FactorSource, list[str]]:
        """Improve the factors as the pipeline does, step by step; returns them with the names of the timed stages."""
        store = self.spectra(row)
        factors: FactorSource = store
        steps: dict[str, Any] = {"propagate": False, "refine": "none"}
        stages = []
        for step, value in row.after.items():
            steps[step] = value
            stages.append("-".join(["after", *(f"{k}={v}" for k, v in steps.items()), row.allocator, str(ratio)]))
            job = self.job_of(row, **steps)
            with self.timed(stages[-1]):
                factors = improve_factors(job, plan, store, gradient_reader(job, self.gradients()), self.folder)[0]
        return factors, stages

    def place(self, name: str, ratio: float) -> Path:
        """Return the folder that keeps a cell."""
        row = ROWS[name]
        inputs = {
            **self.job.calibration_inputs(),
            "row": [row.factors, row.allocator, row.structure, dict(row.after)],
            "ratio": ratio,
            "texts": {name: tensor_sha256(windows) for name, windows in self.texts.items()},
            "validation": tensor_sha256(self.job.windows["validation"]),
            "factorization": self.job.recipe.factorization.model_dump(mode="json", exclude={"propagate", "refine", "structure"}),
            "settings": [TRIALS, GENERATIONS, OFFSPRING, STEP, self.job.recipe.seed],
        }
        return self.folder.stage(f"row-{name}-{ratio}", inputs)

    def measure(self, name: str, ratio: float) -> dict[str, Any]:
        """Measure one cell, or read it."""
        row, path = ROWS[name], self.place(name, ratio) / "result.json"
        if not path.is_file():
            plan, before = self.plan(row, ratio)
            source, after = self.improved(row, plan, ratio)
            groups = self.groups(row)
            compressed = self.job.compressed_model(plan, source, units=groups)
            seconds = sum(self.times().get(stage, 0.0) for stage in before + after)
            result: dict[str, Any] = {"ratio": plan.ratio(groups), "seconds": seconds}
            for domain, reference in self.reference.items():
                result[domain] = reference(compressed)
            write_json(path, result)
        return {"row": name, "asked": ratio, **json.loads(path.read_text(encoding="utf-8"))}


@torch.inference_mode()
def rounding(bench: Bench, ratios: Sequence[float]) -> list[dict[str, Any]]:
    """Compare the loss-aware plans' factors in float32 with the same rounded to the serving dtype, in both structures.

    Everything else is equal: float32 arithmetic, and other weights that are exact in the serving dtype.
    """
    rows = []
    for ratio in ratios:
        for row in (ROWS["loss-aware"], replace(ROWS["loss-aware"], structure="low_rank")):
            plan, _ = bench.plan(row, ratio)
            model = round_parameters(bench.job.source.load(torch.float32), bench.job.dtype)
            exact = compress_model(model, plan.changed(bench.fused), plan.structure, bench.spectra(row), torch.float32)
            rounded = round_parameters(copy.deepcopy(exact), bench.job.dtype)
            for domain, windows in bench.texts.items():
                reference = Reference(exact, windows)
                found = reference(rounded)
                squares = torch.zeros(2, dtype=torch.float64)
                for window in torch.split(windows, 1):
                    logits = exact(input_ids=window, use_cache=False).logits
                    errors = rounded(input_ids=window, use_cache=False).logits.sub_(logits)
                    squares += torch.stack([errors.square_().mean(), logits.square_().mean()]).double() / len(windows)
                error, size = squares.sqrt().tolist()
                rows.append(
                    {
                        "ratio": ratio,
                        "structure": row.structure,
                        "text": domain,
                        "rms_logit_error": error,
                        "rms_logit": size,
                        "divergence": found["divergence"],
                        "perplexity_increase": math.expm1(found["nll"] - reference.nll),
                    }
                )
    return rows


def render_rounding(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line per ratio, structure and text."""
    lines = [
        [
            f"{row['ratio']:g}, {row['structure']}",
            row["text"],
            f"{row['rms_logit_error']:.4f}",
            f"{row['rms_logit']:.2f}",
            f"{row['divergence']:.1e}",
            f"{row['perplexity_increase']:+.2%}",
        ]
        for row in rows
    ]
    return table(["ratio, structure", "text", "RMS logit error", "RMS logit", "KL, nats", "perplexity"], lines)


def render(results: list[dict[str, Any]], dense: Mapping[str, float], ratios: list[float]) -> str:
    """One line per row, for each ratio the domains' perplexities and the mean divergence."""

    def cell(result: dict[str, Any] | None) -> list[str]:
        if result is None:
            return ["", "", ""]
        cells = []
        for domain, nll in dense.items():
            excess = result[domain]["nll"] - nll
            cells.append(f"{math.exp(min(result[domain]['nll'], 700)):.4g} ({excess:.2f})")
        return [*cells, f"{sum(result[domain]['divergence'] for domain in dense) / len(dense):.2f}"]

    domains = list(dense)
    header = ["", *(f"{ratio:g}: {what}" for ratio in ratios for what in [*domains, "KL"]), "seconds"]
    lines = [["dense", *(cell for _ in ratios for cell in [*(f"{math.exp(nll):.4g}" for nll in dense.values()), ""]), ""]]
    for name, row in ROWS.items():
        found = {result["asked"]: result for result in results if result["row"] == name}
        if found:
            seconds = max(result["seconds"] for result in found.values())
            lines.append([row.label, *(c for ratio in ratios for c in cell(found.get(ratio))), f"{seconds:.0f}"])
    return table(header, lines)


@float32_matmuls()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, help="another model and texts [default: the demo's]")
    parser.add_argument("--domain", action="append", metavar="NAME=FILE", help="held-out text [default: the demo's wiki and c4]")
    parser.add_argument(
        "--work", type=Path, default=Path("quality.work"), help="folder for what is finished [default: quality.work]"
    )
    parser.add_argument("--row", action="append", choices=ROWS, help="repeatable [default: all]")
    parser.add_argument("--ratio", action="append", type=float, help="repeatable [default: 0.2, 0.4 and 0.6]")
    parser.add_argument("--tokens", type=int, default=8192, help="held-out tokens per domain [default: 8192]")
    parser.add_argument("--rounding", action="store_true", help="measure what rounding the factors adds, instead of the rows")
    parser.add_argument("--list", action="store_true", help="list the rows")
    add_results_option(parser)
    arguments = parser.parse_args()
    if arguments.list:
        for name, row in ROWS.items():
            print(f"{name:18} {row.label}")
        return
    recipe = Recipe.load(arguments.recipe or bench_recipe(), {})
    job = open_job(recipe, print)
    if arguments.domain:
        files = dict(entry.split("=", 1) for entry in arguments.domain)
    else:
        files = {name: str(demo_texts()[f"report-{name}"]) for name in ("wiki", "c4")}
    length = recipe.report.length
    texts = {
        name: token_windows(job.source.tokenizer(), read_documents(path), length, arguments.tokens // length)
        for name, path in files.items()
    }
    if short := [files[name] for name, windows in texts.items() if windows.numel() < arguments.tokens // length * length]:
        parser.error(f"{', '.join(short)}: fewer tokens than --tokens {arguments.tokens}")
    ratios = sorted(set(arguments.ratio or RATIOS))
    with work_folder(arguments.work, lambda line: None, MODULES) as folder:
        bench = Bench(job, folder, texts)
        dense = {name: reference.nll for name, reference in bench.reference.items()}
        results: list[dict[str, Any]] = []
        if arguments.rounding:
            results = rounding(bench, ratios)
            markdown = render_rounding(results)
        else:
            for ratio in ratios:
                for name in arguments.row or ROWS:
                    results.append(bench.measure(name, ratio))
                    print(json.dumps(results[-1]), flush=True)
            markdown = render(results, dense, ratios)
    print(markdown)
    if arguments.results:
        publish(arguments.results, command_line(), markdown, {"dense_nll": dense, "rows": results})


if __name__ == "__main__":
    main()
