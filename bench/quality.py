"""Perplexity of rank plans at one parameter count: what the factorization and the allocation each bring.

Rows: the dense model; plain SVD of the weights with uniform ranks; our feature factorization with uniform, greedy and loss-aware
ranks; the plan that the search chose. All are factors rounded to the serving dtype, on the same report text, as the exported
checkpoint would compute it. Plans and spectra come from a finished run of `lrserve compress-and-export --ratio ...`:

    python bench/quality.py demo

prints a Markdown table and, last, the same as one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import optuna

from lrserve.allocation.plan import RankPlan
from lrserve.allocation.quality import perplexity
from lrserve.artifacts.card import table
from lrserve.artifacts.work import work_folder
from lrserve.compression.spectra import SpectrumStore, plain_statistics, write_spectra
from lrserve.inputs.text import read_documents, token_windows
from lrserve.job import open_job
from lrserve.pipeline import calibrate_blocks, factorize_groups
from lrserve.recipe import Recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", type=Path, help="made with --ratio")
    parser.add_argument("--work", type=Path, help="its work folder [default: ARTIFACT.work]")
    parser.add_argument("--domain", action="append", default=[], metavar="NAME=FILE", help="also measure on this text")
    arguments = parser.parse_args()
    recipe = Recipe.load(arguments.artifact / "lrserve" / "recipe.yaml", {})
    job = open_job(recipe, print)
    texts = {"report": job.windows["report"]}
    for entry in arguments.domain:
        name, _, path = entry.partition("=")
        texts[name] = token_windows(job.source.tokenizer(), read_documents(path), recipe.report.length, 16)

    with work_folder(arguments.work or arguments.artifact.with_name(f"{arguments.artifact.name}.work"), print) as folder:
        model = job.source.load(job.dtype)
        store = factorize_groups(job, model, calibrate_blocks(job, model, folder), folder)
        svd = folder.stage("svd", job.model_inputs())
        write_spectra(model, job.groups, folder.root, svd, read=plain_statistics)

    study = optuna.load_study(study_name=None, storage=f"sqlite:///{arguments.artifact / 'lrserve' / 'study.sqlite3'}")
    plans = {
        origin: RankPlan(trial.user_attrs["ranks"])
        for trial in reversed(study.get_trials(states=(optuna.trial.TrialState.COMPLETE,)))
        if (origin := trial.user_attrs["origin"]) in ("uniform", "greedy", "loss_aware")
    }
    chosen = RankPlan.read(arguments.artifact / "lrserve" / "plan.json")
    rows: list[tuple[str, RankPlan | None, SpectrumStore]] = [
        ("dense", None, store),
        ("plain SVD, uniform ranks", plans["uniform"], SpectrumStore(svd, job.groups)),
        ("features, uniform ranks", plans["uniform"], store),
        ("features, greedy ranks", plans["greedy"], store),
        ("features, loss-aware ranks", plans["loss_aware"], store),
        ("features, searched ranks", chosen, store),
    ]
    results: list[dict[str, Any]] = []
    for label, plan, spectra in rows:
        compressed = model if plan is None else job.compressed_model(plan, spectra).to(job.dtype)
        measured = {name: perplexity(compressed, windows) for name, windows in texts.items()}
        results.append({"row": label, "ratio": 0.0 if plan is None else plan.ratio(job.groups), **measured})
        print(json.dumps(results[-1]), flush=True)
    dense = results[0]
    cells = [
        [r["row"], f"{r['ratio']:.3f}"] + [f"{r[name]:.1f} ({math.log(r[name] / dense[name]):.2f})" for name in texts]
        for r in results
    ]
    print(table(["", "ratio", *(f"{name}: perplexity (excess log)" for name in texts)], cells))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
