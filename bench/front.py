"""Plans for a series of speeds against what users would serve instead, on one engine, in one run.

    python bench/front.py                                   the model and texts of README's table
    python bench/front.py --recipe shape.yaml --speed-only  a shape with random weights, whose perplexity means nothing

For each speed the plan is the one of least expected loss, in closed form: no trials, no training. All rows are vLLM engines: the
dense model, int8 and int4 by stock vLLM (bench/stock.py), and the plans. All are up at once, or a few beside the dense one
(--at-once). Perplexity and speed are measured as by bench/readme.py. A plan is held against the best alternative: of the other rows
that are as fast as it is, or faster, the one that loses least.

    predicted    speedup by the table of single layers
    beats        whether the plan loses less than the best alternative; a tie is both dense, or both within 0.001 nats

Run it with nothing else on the machine. The last line is JSON.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from inputs import readme_recipe
from lrserve.allocation.goal import Evaluated, Goal
from lrserve.allocation.plan import BudgetFit, Plan
from lrserve.compression.assemble import MergedLevels
from lrserve.compression.matmul import float32_matmuls
from lrserve.compression.rounding import Rounding
from lrserve.compression.spectra import SpectrumStore
from lrserve.engines.runtimes import runtime_of
from lrserve.pipeline.job import Job, first_tokens, open_job
from lrserve.pipeline.measure import DenseEngine, dense_checkpoint, measure_front, measure_layers, speed_model
from lrserve.pipeline.rounding import rounding_of
from lrserve.pipeline.run import backpropagate, calibrate_blocks, factorize_groups
from lrserve.pipeline.search import everywhere, known_losses, rounding_metric
from lrserve.pipeline.stages import MODULES
from lrserve.plugins.versions import engine_version
from lrserve.recipe import Recipe
from lrserve.report.card import table
from lrserve.storage.work import WorkFolder, work_folder
from publishing import add_results_option, conclude
from readme import STOCK, add_at_once_option, measure

SPEEDS = (1.1, 1.2, 1.35, 1.6)
MARGIN = 1.02  # predictions are a little off: a plan is made for so much more than it is asked for
TIE = 1e-3  # nats


def plans_for(job: Job, speeds: Sequence[float], folder: WorkFolder) -> tuple[dict[str, tuple[Plan, float]], Any]:
    """Return the plans of least expected loss by their names, with their predicted speedups, and what builds their models."""
    model = job.source.load(job.dtype)
    statistics = calibrate_blocks(job, model, folder)
    gradients = backpropagate(job, model, folder)
    store = factorize_groups(job, model, statistics, gradients, folder)
    rounding = rounding_of(job, statistics, gradients)
    merged = MergedLevels(model, job.units, store, rounding)
    runtime = runtime_of(job.recipe.engine)
    with DenseEngine(runtime, dense_checkpoint(job, runtime, folder), job.recipe.requests, folder.root / "dense.log") as dense:
        layers, _ = measure_layers(job, runtime, dense, folder)
        speed = speed_model(job, layers)
        rounding_metric(job, merged, rounding, gradients, speed, folder)
        goal = Goal(job.recipe.target, job.recipe.search.speed_weight, 1.0)
        usual = [
            Evaluated(everywhere(job.units, precision, speed.offers), 1.0, 0.0, f"{precision} everywhere", None)
            for precision in STOCK.values()
            if precision in speed.offers.precisions
        ]
        found_of = measure_front(job, store, folder, runtime, dense, goal, speed, rounding, usual)
    speed = speed.corrected([(m.candidate.plan, m.comparison.relative_times) for m in found_of])
    speed, losses = known_losses(job, merged, store, speed, folder)
    fit = BudgetFit(job.units, speed.offers, speed.cost)
    found: dict[str, tuple[Plan, float]] = {}
    for asked in speeds:
        budget = speed.budget(MARGIN * asked)
        if budget < fit.smallest_cost:
            break
        plan = fit.cheapest_loss(next(iter(losses.values())), budget)
        found[f"lrserve at {asked:g}x"] = plan, speed.speedup(plan)
    return found, (store, rounding)


def export(job: Job, plan: Plan, source: tuple[SpectrumStore, Rounding], folder: Path) -> Path:
    """Write a plan's artifact; returns its folder, which is made."""
    folder.mkdir()
    store, rounding = source
    model = job.compressed_model(plan, store, rounding).cpu()
    runtime_of(job.recipe.engine).exporter.export(model, job.source.path, folder, job.dtype)
    return folder


def best_alternative(row: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Return the row of least perplexity of those that are at least as fast as a plan; None where none is."""
    fast = [other for other in others if other["speed"]["speedup"] >= row["speed"]["speedup"]]
    return min(fast, key=lambda other: other["perplexity"], default=None)


def judged(rows: Sequence[dict[str, Any]], made: Mapping[str, tuple[Plan, float]]) -> list[dict[str, Any]]:
    """Add to each row its loss in nats and, for plans, the prediction and the best alternative."""
    dense, others = rows[0]["perplexity"], [row for row in rows if row["model"] in STOCK]
    for row in rows:
        row["loss"] = math.log(row["perplexity"] / dense)
        if row["model"] not in made:
            continue
        row["predicted"] = made[row["model"]][1]
        best = best_alternative(row, others)
        row["alternative"] = None if best is None else best["model"]
        row["beats"] = best is None or row["loss"] < best["loss"] - TIE
        row["ties"] = best is not None and abs(row["loss"] - best["loss"]) <= TIE
    return list(rows)


def render(rows: Sequence[Mapping[str, Any]], speed_only: bool) -> str:
    """One line a row."""
    lines = []
    for row in rows:
        speed = row.get("speed")
        cells = [f"{row['bytes'] / 1e6:.0f}", "" if speed is None else f"{speed['speedup']:.2f}"]
        cells.append("" if speed is None else f"{speed['speedup_lowest']:.2f}-{speed['speedup_highest']:.2f}")
        cells.append(f"{row['predicted']:.2f}" if "predicted" in row else "")
        if not speed_only:
            verdict = "" if "predicted" not in row else "yes" if row["beats"] else "tie" if row["ties"] else "no"
            cells += [f"{row['perplexity']:.2f}", f"{row['loss']:+.3f}", row.get("alternative") or "", verdict]
        lines.append([row["model"], *cells])
    header = ["model", "MB", "speedup", "interval", "predicted"]
    return table(header if speed_only else [*header, "perplexity", "nats", "best alternative", "beats it"], lines)


def errors_of(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """Return the relative errors of the predicted speedups."""
    return [abs(row["predicted"] / row["speed"]["speedup"] - 1) for row in rows if "predicted" in row]


@float32_matmuls()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, help="another model, texts and workloads [default: those of README's table]")
    parser.add_argument("--speed", action="append", type=float, help=f"repeatable [default: {', '.join(map(str, SPEEDS))}]")
    parser.add_argument("--tokens", type=int, help="of report text [default: the recipe's]")
    parser.add_argument("--rounds", type=int, help="counted rounds [default: the recipe's]")
    parser.add_argument("--eager", action="store_true", help="without torch.compile; `vllm serve` compiles")
    parser.add_argument("--speed-only", action="store_true", help="leave the perplexities out: the weights are random")
    parser.add_argument("--work", type=Path, default=Path("front.work"), help="folder for what is finished [default: front.work]")
    add_at_once_option(parser)
    add_results_option(parser)
    arguments = parser.parse_args()
    overrides = {
        "report.tokens": arguments.tokens,
        "engine.repeats": arguments.rounds,
        "engine.enforce_eager": arguments.eager,
        "target.min_speedup": SPEEDS[0],
    }
    job = open_job(Recipe.load(arguments.recipe or readme_recipe(), overrides), print)
    with work_folder(arguments.work, print, MODULES) as folder, tempfile.TemporaryDirectory(prefix="lrserve-") as place:
        made, source = plans_for(job, sorted(arguments.speed or SPEEDS), folder)
        artifacts = {
            name: export(job, plan, source, Path(place) / f"{index}") for index, (name, (plan, _)) in enumerate(made.items())
        }
        windows = first_tokens(job.windows["report"], 1 if arguments.speed_only else job.recipe.report.tokens)
        rows = judged(measure(job, artifacts, windows, job.recipe.engine.repeats, arguments.at_once), made)
    errors = errors_of(rows)
    mode = "eager" if arguments.eager else "compiled"
    plans = "; ".join(f"{name}: {_levels(plan)}" for name, (plan, _) in made.items())
    markdown = (
        f"{job.source.title}, stock {engine_version()}, {mode}\n\n{render(rows, arguments.speed_only)}\n\n"
        f"Predicted speedups are off by {statistics.median(errors):.1%} in the median, {max(errors):.1%} at most. Speedups are "
        f"medians of {job.recipe.engine.repeats} rounds in turns over all workloads. Units of the plans by level: {plans}.\n"
    )
    conclude(arguments.results, markdown, rows)


def _levels(plan: Plan) -> str:
    """Count a plan's units by what was done to them."""
    counts: dict[str, int] = {}
    for level in plan.levels.values():
        parts = (["smaller"] if level.rank else []) + ([level.weights] if level.weights else [])
        name = " ".join(parts) or "dense"
        name += " + residual" * bool(level.residual)
        counts[name] = counts.get(name, 0) + 1
    return ", ".join(f"{count} {name}" for name, count in counts.items())


if __name__ == "__main__":
    main()
