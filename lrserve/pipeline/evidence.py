"""Stage 6, the evidence: what metrics.json, the report and the model card say, collected once and written beside the weights."""

from __future__ import annotations

import importlib.metadata
import platform
import resource
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lrserve.allocation.goal import pareto_front, rule, why_not
from lrserve.allocation.study import importances, study_of, time_spent
from lrserve.compression.groups import Mixture
from lrserve.compression.spec import specs_of
from lrserve.engines.runtimes import runtime_of
from lrserve.pipeline.job import Job
from lrserve.pipeline.measure import Measured
from lrserve.pipeline.prove import Proof
from lrserve.pipeline.search import Tuned, measured_speed
from lrserve.pipeline.stages import provenance
from lrserve.recipe import shares
from lrserve.report import card
from lrserve.report.html import write_report
from lrserve.report.machine import made
from lrserve.report.sizes import sizes
from lrserve.storage.store import write_json, write_manifest


def collect_metrics(
    job: Job,
    tuned: Tuned,
    improved: dict[str, Any],
    validation: float,
    proof: Proof,
    report: dict[str, Any],
) -> dict[str, Any]:
    """Return what metrics.json holds (docs/format.md)."""
    recipe = job.recipe
    plan = tuned.chosen.candidate.plan
    levels = plan.changed(job.units)
    return {
        "made": made(),
        "model": {"name": job.source.title, "architecture": job.architecture, "licence": _licence(job)},
        "target": str(recipe.target),
        "dtype": recipe.engine.dtype,
        "exports": list(recipe.export),
        "runtime": recipe.engine.runtime,
        "enforce_eager": recipe.engine.enforce_eager,
        "workloads": {name: workload.model_dump(mode="json") for name, workload in recipe.workloads.items()},
        "tokens": {use: windows.numel() for use, windows in job.windows.items()},  # the recipe has what was asked for
        "plan": {
            "origin": tuned.chosen.candidate.origin,
            "usual": tuned.chosen.candidate.usual,
            "structure": plan.structure,
            "embedding": plan.embedding,
            "embedding_loss": tuned.embedding_loss,
            "groups": len(job.units),
            "factorized": sum(level.rank is not None for unit, level in levels if not isinstance(unit, Mixture)),
            "fewer_experts": sum(level.experts is not None for _, level in levels),
            "narrower_experts": sum(
                level.rank is not None and level.experts is None for unit, level in levels if isinstance(unit, Mixture)
            ),
            "rounded": dict(Counter(level.weights for level in plan.levels.values() if level.weights is not None)),
            "residuals": sum(level.residual > 0 for level in plan.levels.values()),
        },
        "improved": improved,
        "sizes": sizes(job.source.skeleton(), specs_of(plan.changed(job.units), plan.structure), job.dtype.itemsize),
        "perplexity": {
            "validation": {
                "dense": tuned.goal.dense_perplexity,
                "searched": tuned.chosen.candidate.perplexity,
                "compressed": validation,
            },
            "report": report,
        },
        "throughput": tuned.chosen.comparison.to_json(),
        "measured_plans": [
            {
                "origin": m.candidate.origin,
                "usual": m.candidate.usual,
                "chosen": m is tuned.chosen,
                "validation_perplexity": m.candidate.perplexity,
                "linear_bytes": m.candidate.plan.byte_share(job.units, job.dtype.itemsize),
                "predicted_speedup": m.predicted_speedup,
                "corrected_speedup": m.corrected,
                "predicted": dict(m.predicted),
                **m.comparison.to_json(),
            }
            for m in tuned.measured
        ],
        "trials": [
            {
                "number": t.trial,
                "origin": t.origin,
                "validation_perplexity": t.perplexity if t.finite else None,
                "complete": t.complete,
                "predicted_tokens_per_second": t.tokens_per_second,
            }
            for t in tuned.trials
        ],
        "not_finite": {"left_dense": dict(tuned.left_dense), "trials": sum(not t.finite for t in tuned.trials)},
        "agreement": proof.agreement,
        "samples": proof.samples,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,  # without the engines' processes
        "versions": versions(job),
    }


def _licence(job: Job) -> dict[str, str]:
    """Return what the source model's card says about its licence, by the Hub's keys; empty where it says nothing."""
    found = job.source.card()
    return {key: found[key] for key in ("license", "license_name", "license_link") if isinstance(found.get(key), str)}


def versions(job: Job) -> dict[str, str]:
    """Versions of everything that had a part in the result."""
    found = {"python": platform.python_version(), "engine": runtime_of(job.recipe.engine).version}
    for name in ("lrserve", "torch", "transformers", "optuna", "onnx", "onnxruntime", "onnxruntime-gpu"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def search_report(job: Job, tuned: Tuned) -> dict[str, Any]:
    """Return what `html.write_report` draws besides metrics.json: the search and its plans."""
    recipe, goal = job.recipe, tuned.goal
    study = study_of(tuned.study_path)
    front = pareto_front(tuned.trials, tuned.speed.speedup)
    kinds: dict[str, list[dict[str, Any]]] = {}
    plan = tuned.chosen.candidate.plan
    for unit in job.units:
        level, stored = plan.levels[unit.name], unit.stored_as(plan.structure)
        rank, full, of = level.rank, unit.full_rank, None
        if isinstance(unit, Mixture) and rank is not None:
            rank, full, of = (
                (level.experts, unit.experts, "experts") if level.experts else (unit.sizes(level)[1], unit.n, "neurons")
            )
        cell: dict[str, Any] = {"layer": unit.layer, "rank": rank, "dense_rank": full, "of": of}
        cell |= {"kept": unit.parameters(level.rank, stored) / unit.dense_parameters}
        kinds.setdefault(unit.kind, []).append({**cell, "weights": level.weights, "residual": level.residual})
    seconds, own = time_spent(study), [trial for trial in tuned.trials if trial.trial is not None]
    share = shares(recipe.workloads)
    return {
        "title": job.source.title,
        "target": str(recipe.target),
        "engine": tuned.chosen.comparison.engine,
        "dtype": runtime_of(recipe.engine).dtype,
        "structure": plan.structure,
        "workloads": {
            name: {**workload.model_dump(mode="json"), "share": share[name]} for name, workload in recipe.workloads.items()
        },
        "dense": {"perplexity": goal.dense_perplexity},
        "trials": [
            {
                "number": trial.trial,
                "origin": trial.origin,
                "perplexity": trial.perplexity,
                "speedup": tuned.speed.speedup(trial.plan),
                "ratio": trial.plan.ratio(job.units),
                "bytes": trial.plan.byte_share(job.units, job.dtype.itemsize),
                "complete": trial.complete,
                "front": any(trial is best for best in front),
            }
            for trial in tuned.trials
        ],
        "rule": f"trial {recipe.search.choose}, which search.choose names" if recipe.search.choose is not None else rule(goal),
        "measured": [_measured(m, tuned) for m in tuned.measured],
        "importances": importances(study, goal),
        "plan": {"layers": job.layers, "kinds": kinds},
        "search": {
            "trials": len(own),
            "stopped_early": sum(not trial.complete for trial in tuned.trials),
            "trials_per_minute": 60 * len(own) / max(sum(seconds.values()), 1e-9),
            "seconds_forward": seconds.get("forward", 0.0),
            "seconds_rewrite": seconds.get("weights", 0.0),
            "seconds_sampler": seconds.get("sampler", 0.0),
            "standard_error": tuned.standard_error,
        },
    }


def _measured(measured: Measured, tuned: Tuned) -> dict[str, Any]:
    mix, candidate = measured.comparison.to_json(), measured.candidate
    chosen = measured is tuned.chosen
    own, best = (measured_speed(m, tuned.goal) for m in (measured, tuned.chosen))

    def figures(found: Mapping[str, Any]) -> dict[str, float]:
        return {"speedup": found["speedup"], "lowest": found["speedup_lowest"], "highest": found["speedup_highest"]}

    return {
        "number": candidate.trial,
        "origin": candidate.origin,
        "perplexity": candidate.perplexity,
        "predicted": measured.predicted_speedup,
        "corrected": measured.corrected,
        **figures(mix),
        "chosen": chosen,
        "why_not": None if chosen else why_not(own, best, tuned.goal),
        "workloads": {name: {"predicted": measured.predicted[name], **figures(found)} for name, found in mix["workloads"].items()},
    }


def write_evidence(job: Job, tuned: Tuned, metrics: dict[str, Any], staging: Path) -> None:
    """Write recipe, plan, metrics, study, report, model card and, last, the manifest."""
    folder = staging / "lrserve"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(job.recipe.to_yaml(), encoding="utf-8")
    tuned.chosen.candidate.plan.write(folder / "plan.json")
    write_json(folder / "metrics.json", metrics)
    shutil.copyfile(tuned.study_path, folder / "study.sqlite3")
    write_report(metrics, search_report(job, tuned), folder)
    (staging / "README.md").write_text(card.model_card(metrics), encoding="utf-8")
    write_manifest(staging, versions(job), provenance(job))
