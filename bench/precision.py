"""Perplexity by precision: what rounding costs, what each idea brings back, beside fewer parameters at more bytes.

    python bench/precision.py                       every row, on the demo's model and texts
    python bench/precision.py --row int4 --row int8

All rows are of one model and one set of statistics. *Bits* are those of a weight of the decoder's linears, scales and residuals
included. A cell is the perplexity on held-out text, with log(perplexity / dense perplexity) in brackets. Models are measured as
they are exported: integers, scales and residuals as stored, inputs rounded where the engine does so, in the serving dtype.

The work folder keeps finished stages and rows: an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from inputs import bench_recipe
from lrserve.allocation.losses import Losses
from lrserve.allocation.plan import BudgetFit, Offers, Plan, byte_cost
from lrserve.allocation.quality import Reference
from lrserve.compression.assemble import MergedLevels, parts
from lrserve.compression.level import Level, Precision
from lrserve.compression.lowrank import dequantized, load_rounded
from lrserve.compression.matmul import float32_matmuls
from lrserve.compression.quantize import round_to_nearest
from lrserve.compression.spectra import SpectrumStore, stacked_weight
from lrserve.inputs.demo import demo_texts
from lrserve.inputs.text import read_documents, token_windows
from lrserve.pipeline.job import Job, open_job, tensor_sha256
from lrserve.pipeline.probe import probed_losses
from lrserve.pipeline.rounding import rounding_of, weigh_tokens
from lrserve.pipeline.run import backpropagate, calibrate_blocks, factorize_groups
from lrserve.pipeline.search import everywhere
from lrserve.pipeline.stages import MODULES
from lrserve.recipe import Recipe
from lrserve.report.card import table
from lrserve.storage.store import write_json
from lrserve.storage.work import WorkFolder, work_folder
from publishing import add_results_option, conclude

BITS = 4.9  # of the rows with allocated residuals


@dataclass(frozen=True)
class Row:
    """A line of the table: how its model is made, and how many bits a weight has then."""

    label: str
    make: Callable[[Bench], tuple[Any, float]]


class Bench:
    """The opened inputs, and what every row is made from."""

    def __init__(self, job: Job, folder: WorkFolder) -> None:
        self.job, self.folder = job, folder
        model = job.source.load(job.dtype)
        statistics = calibrate_blocks(job, model, folder)
        gradients = backpropagate(job, model, folder)
        assert gradients is not None
        self.store: SpectrumStore = factorize_groups(job, model, statistics, gradients, folder)
        self.rounding = rounding_of(job, statistics, gradients)
        self.rounding.measure_by(weigh_tokens(job, model, gradients, folder))
        self.model = model

    def bits(self, plan: Plan) -> float:
        """Return the bits of a weight under a plan."""
        return 8 * self.job.dtype.itemsize * plan.byte_share(self.job.units, self.job.dtype.itemsize)

    def served(self, plan: Plan) -> tuple[Any, float]:
        """Return a plan's model as it is exported, in closed form."""
        return self.job.compressed_model(plan, self.store, self.rounding), self.bits(plan)

    def losses(self, offers: Offers) -> Losses:
        """Return the best guess of what levels lose."""
        merged = MergedLevels(self.model, self.job.units, self.store, self.rounding)
        _, found = probed_losses(self.job, merged, self.store, offers, self.folder)
        merged.apply({})
        return next(iter(found.values()))


def nearest(precision: Precision, *, inputs: bool = True) -> Callable[[Bench], tuple[Any, float]]:
    """Round every linear to nearest, as stock checkpoints have it; without `inputs` these are not rounded."""

    def make(bench: Bench) -> tuple[Any, float]:
        model = bench.job.source.load(bench.job.dtype)
        for unit in bench.job.units:
            for group in parts(unit):
                W, _ = stacked_weight(model, group)
                load_rounded(model, group, "weight", round_to_nearest(W.float(), precision, bench.job.dtype))
        plan = everywhere(bench.job.units, precision, Offers(1, bench.job.recipe.structure, (precision,)))
        return model if inputs else dequantized(model).to(bench.job.dtype), bench.bits(plan)

    return make


def level(level: Level, *, inputs: bool = True) -> Callable[[Bench], tuple[Any, float]]:
    """Give every unit this level; without `inputs` these are not rounded."""

    def make(bench: Bench) -> tuple[Any, float]:
        plan = Plan(dict.fromkeys((unit.name for unit in bench.job.units), level), bench.job.recipe.structure)
        model, bits = bench.served(plan)
        return model if inputs else dequantized(model).to(bench.job.dtype), bits

    return make


def allocated(precisions: tuple[Precision, ...], residuals: tuple[int, ...], bits: float) -> Callable[[Bench], tuple[Any, float]]:
    """Allocate precisions and residuals within so many bits a weight, by the losses of units one by one; nothing is removed."""

    def make(bench: Bench) -> tuple[Any, float]:
        return bench.served(fitted(bench, Offers(1 << 20, bench.job.recipe.structure, precisions, residuals), bits))

    return make


def smaller(precisions: tuple[Precision, ...], bits: float) -> Callable[[Bench], tuple[Any, float]]:
    """Allocate ranks, and precisions where there are some, within so many bits a weight."""

    def make(bench: Bench) -> tuple[Any, float]:
        return bench.served(fitted(bench, replace(bench.job.offers, precisions=precisions, residuals=()), bits))

    return make


def fitted(bench: Bench, offers: Offers, bits: float) -> Plan:
    """Return the plan of least expected loss within so many bits a weight."""
    itemsize = bench.job.dtype.itemsize
    fit = BudgetFit(bench.job.units, offers, byte_cost(offers.structure, itemsize))
    return fit.cheapest_loss(bench.losses(offers), bits / (8 * itemsize) * fit.dense_cost)


ROWS: Mapping[str, Row] = {
    "int8-alone": Row("int8 weights, rounded to nearest, inputs not rounded", nearest("int8", inputs=False)),
    "int8-nearest": Row("int8 W8A8, rounded to nearest (stock)", nearest("int8")),
    "int8": Row("**int8 W8A8**, scales moved from inputs to weights", level(Level(weights="int8"))),
    "int4-nearest": Row("int4 in groups of 32, rounded to nearest (stock)", nearest("int4_g32")),
    "int4-g64-nearest": Row("int4 in groups of 64, rounded to nearest", nearest("int4_g64")),
    "int4-g64": Row("int4 in groups of 64, searched scales and feedback", level(Level(weights="int4_g64"))),
    "int4": Row("int4 in groups of 32, searched scales and feedback", level(Level(weights="int4_g32"))),
    "int4-residual-8": Row("+ a residual of rank 8", level(Level(weights="int4_g32", residual=8))),
    "int4-residual-16": Row("+ a residual of rank 16", level(Level(weights="int4_g32", residual=16))),
    "int4-residual-32": Row("+ a residual of rank 32", level(Level(weights="int4_g32", residual=32))),
    "int4-allocated": Row(f"**int4** + allocated residuals, {BITS} bits", allocated(("int4_g32",), (4, 8, 16, 32, 64), BITS)),
    "mixed": Row(f"int8 and int4 with residuals, allocated, {BITS} bits", allocated(("int8", "int4_g32"), (8, 16, 32), BITS)),
    "mixed-6": Row("int8 and int4 with residuals, allocated, 6 bits", allocated(("int8", "int4_g32"), (8, 16, 32), 6.0)),
    "smaller": Row("20 % fewer bytes by fewer parameters alone", smaller((), 12.8)),
    "smaller-8": Row("8 bits by fewer parameters alone", smaller((), 8.0)),
    "smaller-int8": Row("int8 and a quarter fewer bytes by fewer parameters", smaller(("int8",), 6.0)),
}


def measure(bench: Bench, name: str, references: Mapping[str, Reference], texts: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Measure one row, or read it."""
    inputs = {
        "rounding": [bench.store.folder.name, BITS],
        "texts": {domain: tensor_sha256(windows) for domain, windows in texts.items()},
        "label": ROWS[name].label,
    }
    path = bench.folder.stage(f"row-{name}", inputs) / "result.json"
    if not path.is_file():
        model, bits = ROWS[name].make(bench)
        write_json(path, {"bits": bits, **{domain: reference(model) for domain, reference in references.items()}})
    return {"row": name, **json.loads(path.read_text(encoding="utf-8"))}


def render(results: list[dict[str, Any]], dense: Mapping[str, float]) -> str:
    """One line a row."""
    lines = [["dense", "16", *(f"{math.exp(nll):.2f}" for nll in dense.values()), ""]]
    for result in results:
        excess = {domain: result[domain]["nll"] - nll for domain, nll in dense.items()}
        cells = [f"{math.exp(result[domain]['nll']):.2f} ({excess[domain]:.3f})" for domain in dense]
        lines.append([ROWS[result["row"]].label, f"{result['bits']:.2f}", *cells, f"{sum(excess.values()) / len(excess):.3f}"])
    return table(["", "bits", *dense, "mean, nats"], lines)


@float32_matmuls()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, help="another model and calibration text [default: the demo's]")
    parser.add_argument(
        "--work", type=Path, default=Path("precision.work"), help="folder for what is finished [default: precision.work]"
    )
    parser.add_argument("--row", action="append", choices=ROWS, help="repeatable [default: all]")
    parser.add_argument("--tokens", type=int, default=8192, help="held-out tokens per domain [default: 8192]")
    add_results_option(parser)
    arguments = parser.parse_args()
    recipe = Recipe.load(arguments.recipe or bench_recipe(), {"search.rank_step": 32})
    job = open_job(recipe, print)
    length = recipe.report.length
    texts = {
        name: token_windows(
            job.source.tokenizer(), read_documents(str(demo_texts()[f"report-{name}"])), length, arguments.tokens // length
        )
        for name in ("wiki", "c4")
    }
    with work_folder(arguments.work, print, MODULES) as folder:
        bench = Bench(job, folder)
        references = {name: Reference(bench.model, windows) for name, windows in texts.items()}
        dense = {name: reference.nll for name, reference in references.items()}
        results = []
        for name in arguments.row or ROWS:
            results.append(measure(bench, name, references, texts))
            print(render(results[-1:], dense).splitlines()[-1], flush=True)
    markdown = (
        f"{job.source.title}, {job.windows['calibration'].numel()} calibration tokens, {arguments.tokens} held-out tokens per "
        f"domain\n\n"
        f"{render(results, dense)}\n\nThe dense weights come from a 4-bit file (asymmetric, groups of 32), which flatters int4.\n"
    )
    conclude(arguments.results, markdown, results)


if __name__ == "__main__":
    main()
