"""compress-and-export, top to bottom: the story of the program."""

from __future__ import annotations

import glob
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from exporters.base import Configured, Exporter, SelfProving
from exporters.registry import exporter_points
from lrserve.allocation.database import connect, study_errors_named, without_password
from lrserve.allocation.losses import uniform
from lrserve.allocation.plan import BudgetFit, byte_cost
from lrserve.compression.filed import Filed
from lrserve.compression.gradients import GradientStore
from lrserve.compression.matmul import float32_matmuls
from lrserve.compression.spectra import SpectrumStore, features, write_spectra
from lrserve.engines.gpu import memory_errors_named
from lrserve.engines.onnx_provider import settled
from lrserve.engines.runtimes import loader_of, runtime_of
from lrserve.errors import ArtifactError
from lrserve.inputs.finite import require_finite
from lrserve.inputs.source import cache_folder
from lrserve.pipeline.collect import backpropagate, calibrate_blocks, require_shards
from lrserve.pipeline.estimate import StageCost, by_stage, disk_needed, estimate, in_words, time_forward
from lrserve.pipeline.evidence import collect_metrics, write_evidence
from lrserve.pipeline.holding import ALL, holding
from lrserve.pipeline.improve import improve_factors, validate_improved
from lrserve.pipeline.job import Job, open_job
from lrserve.pipeline.launched import Launch
from lrserve.pipeline.prove import Rendered, prove_agreement, report_perplexity
from lrserve.pipeline.rounding import gradient_reader, rounding_of
from lrserve.pipeline.search import tune
from lrserve.pipeline.stages import MODULES, provenance
from lrserve.pipeline.supported import require_divisible, require_engines
from lrserve.recipe import EngineSettings, Recipe
from lrserve.report import card
from lrserve.report.advice import advice
from lrserve.report.console import Say, progress_bar, reused, timed
from lrserve.storage.space import Place, bytes_below, require_space, resolved
from lrserve.storage.store import disk_errors_named, read_manifest, staged, verify_files
from lrserve.storage.temporary import remove_leftovers, restore_replaced, temporary_leftovers
from lrserve.storage.work import WorkFolder, differences, work_folder


def compress_and_export(
    recipe: Recipe,
    out: Path,
    *,
    work: Path | None = None,
    storage: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    launch: Launch | None = None,
    say: Say = print,
) -> dict[str, Any]:
    """Compress a model, search the ranks, export the result and prove it.

    1. open the model and the texts          4. search: probe, time single layers, run the study, measure its front
    2. calibrate, block by block             5. improve the result, if asked to, and export
    3. factorize, every rank at once         6. prove it: the engines agree, perplexity, throughput

    Finished stages are kept in the work folder and reused when the same inputs come again; `out` appears when it is whole.

    Args:
        recipe: every setting.
        out: the artifact's folder.
        work: folder for intermediate results; `<out>.work` when None.
        storage: URL of a database in which several runs with the same inputs share the study (`study.open_study`); each has a
            work folder and an artifact of its own.
        overwrite: replace an artifact at `out` that was made from other inputs.
        launch: the processes that a launcher started, of which this is the first (`launched`); all of them recover.
        dry_run: open the inputs, check the target, say what would be done; nothing is written to `out` or `work`.
        say: takes each line of result.

    Returns:
        What metrics.json holds; empty for a dry run.

    Raises:
        LrserveError: of any kind; nothing half-written is left at `out`.
    """
    out = resolved("-o", out)
    work = resolved("--work", work if work is not None else out.with_name(f"{out.name}.work"))
    if out == work or out in work.parents:
        raise ArtifactError(f"the work folder {work} lies inside {out}, which is published as a whole; choose another --work")
    if not dry_run:
        _clean_up(out, work, say)
    exporters = load_exporters(recipe.export, recipe.engine)
    job = replace(open_job(recipe, say), say=timed(say), launch=launch)
    recipe = job.recipe
    skeleton = job.source.skeleton()
    require_divisible(job)
    for exporter in [runtime_of(recipe.engine).exporter, *exporters]:  # it measures the plans, whatever is exported
        exporter.preflight(skeleton)
    linears = sum(group.dense_parameters for group in job.observed)
    say(
        f"1/6 open: {job.architecture}, {job.layers} layers, {len(job.groups)} fused groups, {linears / 1e6:.1f} M parameters in "
        f"linears; target {recipe.target}"
    )
    if (finished := _finished(out, provenance(job), overwrite)) is not None:
        say(f"{out} was made from these inputs before; nothing to do")
        _say_summary(finished, out, say)
        return finished
    if storage is not None:
        connect(storage)  # a mistake in the URL should not cost a calibration
    if recipe.target.sized:
        size = byte_cost(recipe.structure, job.dtype.itemsize) if recipe.target.max_bytes else None
        fit = BudgetFit(job.units, job.offers, size)
        fit.require((recipe.target.max_bytes or 1 - (recipe.target.ratio or 0.0)) * fit.dense_cost)
    costs = estimate(job, time_forward(job))
    there = bytes_below(work)
    for of_work, of_artifact in sorted(disk_needed(costs), key=sum, reverse=True):  # the fullest is named
        require_space(
            [
                Place("the artifact (-o)", out, of_artifact, replaced=True),
                Place("the work folder (--work)", work, max(0, of_work - there)),
            ]
        )
    say(in_words(costs))
    if (held := holding(job)) != ALL:
        say(f"memory: {held}")
    require_engines(job, exporters)
    if dry_run:
        _say_intent(job, costs, say)
        return {}

    database = without_password(storage) if storage else f"the work folder {work}"
    batches = f"lower calibration.batch_tokens ({recipe.calibration.batch_tokens}), or set CUDA_VISIBLE_DEVICES= to use the CPU"
    with (
        work_folder(work, say, MODULES) as folder,
        disk_errors_named(work),
        study_errors_named(database),
        memory_errors_named(batches),
        float32_matmuls(),
    ):
        if not held.tensors:
            job = replace(job, filed=Filed(folder.root))
        require_shards(job, folder)
        model = job.source.load(job.dtype)
        require_finite(model, job.source.path)
        statistics = calibrate_blocks(job, model, folder)
        gradients = backpropagate(job, model, folder)
        store = factorize_groups(job, model, statistics, gradients, folder)
        rounding = rounding_of(job, statistics, gradients)
        tuned = tune(job, model, store, rounding, gradients, folder, storage)
        del model
        plan = tuned.chosen.candidate.plan
        found = improve_factors(job, plan, store, gradient_reader(job, gradients), folder, rounding)
        improved, validation = validate_improved(job, tuned, found, store, rounding)
        del found
        with staged(out, replace=overwrite) as staging:
            rendered = Rendered(job.compressed_model(plan, improved.factors, rounding, improved.repairs).cpu(), exporters)
            _export(job, rendered, exporters, staging)
            proof = prove_agreement(job, rendered, exporters, staging, folder)
            del rendered
            report = report_perplexity(job, plan, improved, rounding, staging)
            metrics = collect_metrics(job, tuned, improved.done, validation, proof, report)
            write_evidence(job, tuned, metrics, staging)
    _say_summary(metrics, out, say)
    return metrics


def _clean_up(out: Path, work: Path, say: Say) -> None:
    """Remove what runs left that were killed, and put back what one of them had moved aside."""
    restore_replaced(out, say)
    beside = f".{glob.escape(out.name)}."
    places = [
        (out.parent, f"{beside}staging-*"),
        (out.parent, f"{beside}replaced-*"),
        (work, "**/*.partial-*"),
        (work, "lrserve-*"),
    ]
    cache = cache_folder()
    places += [(cache / "dequantized", "*.partial-*"), (cache / "demo", "lrserve-*"), (cache / "demo", "*.partial-*")]
    remove_leftovers([*places, temporary_leftovers()], say)


def load_exporters(names: Sequence[str], settings: EngineSettings) -> list[Exporter]:
    """Load exporters by name from the entry point group `lrserve.exporters`, each with its settings.

    Raises:
        InputError: an unknown name, or an exporter of another package that is not `SelfProving`; and as `settled`.
        EngineError: as `settled`.
    """
    exporters: list[Exporter] = [point.load()() for point in exporter_points(names)]
    for exporter in exporters:
        if not isinstance(exporter, SelfProving):
            loader_of(exporter, settings)
    return [exporter.configured(settled(settings)) if isinstance(exporter, Configured) else exporter for exporter in exporters]


def _finished(out: Path, provenance: Mapping[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """Return the metrics of an artifact at `out` that came from the same inputs; refuse to replace anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not out.is_dir():
        raise ArtifactError(f"{out} is a file; choose another -o")
    try:
        manifest = read_manifest(out)
    except ArtifactError:
        raise ArtifactError(f"{out} holds other files than an lrserve artifact; choose another -o") from None
    changed = differences(manifest["inputs"], json.loads(json.dumps(provenance)))
    if not changed and not verify_files(out):
        metrics: dict[str, Any] = json.loads((out / "lrserve" / "metrics.json").read_text(encoding="utf-8"))
        return metrics
    changed = changed or ["files that no longer match the manifest"]
    if overwrite:
        return None
    raise ArtifactError(f"{out} differs from what this run would make: {', '.join(changed)}; pass --overwrite or choose another -o")


def _say_intent(job: Job, costs: Sequence[StageCost], say: Say) -> None:
    recipe = job.recipe
    if recipe.target.ratio:
        fit = BudgetFit(job.units, job.offers)
        plan = uniform(fit, (1 - recipe.target.ratio) * fit.dense_cost)
        ranks = {unit.kind: plan.ranks[unit.name] for unit in reversed(job.units)}
        shown = ", ".join(f"{kind} {rank or 'dense'}" for kind, rank in reversed(ranks.items()))
        say(f"uniform ranks would be: {shown} (ratio {plan.ratio(job.units):.3f})")
    settings = recipe.factorization
    backwards = f" and backwards on {settings.fisher_tokens}" if settings.fisher else ""
    may = {None: ["perhaps propagate errors"] * (recipe.structure != "narrow"), True: ["propagate errors"], False: []}
    after = may[settings.propagate] + ["refine the blocks by Adam"] * (settings.refinement != "none")
    after += [f"recover for {settings.recover_minutes:g} minutes"] * bool(settings.recover_minutes)
    after += [f"recover on {settings.recover_tokens} tokens"] * bool(settings.recover_tokens)
    then = "".join(f"{step}, " for step in after)
    sequences, length = job.windows["calibration"].shape
    say(
        f"dry run: would calibrate on {sequences} x {length} tokens{backwards}, run "
        f"{recipe.search.trials} trials on {recipe.search.validation_tokens} validation tokens, measure up to "
        f"{recipe.search.measured_plans} plans on {runtime_of(recipe.engine).version}, {then}and export "
        f"{' and '.join(recipe.export)}"
    )
    say(by_stage(costs))


def factorize_groups(job: Job, model: Any, statistics: Path, gradients: GradientStore | None, folder: WorkFolder) -> SpectrumStore:
    """Stage 3: decompose every group at every rank, or reuse the spectra."""
    kinds = job.recipe.factorization.fisher
    stage = folder.stage(
        "spectra",
        {
            "calibration": statistics.name,
            "fisher": kinds,
            "gradients": gradients.folder.name if gradients is not None else None,
            "neurons": job.recipe.structure == "narrow",
        },
    )
    before = len(list(stage.glob("*.safetensors")))
    with progress_bar(job.layers, "3/6 factorize") as progress:
        decompose = features(statistics, gradient_reader(job, gradients))
        write_spectra(model, job.units, decompose, stage, statistics=statistics, progress=progress)
    job.say(f"3/6 factorize: {len(job.units)} groups at every rank{reused(before, job.layers)}")
    device = next(model.parameters()).device
    return SpectrumStore(stage, job.units, statistics, device)


def _export(job: Job, rendered: Rendered, exporters: Sequence[Exporter], staging: Path) -> None:
    with progress_bar(len(exporters), "5/6 export") as progress:
        for index, exporter in enumerate(exporters):
            exporter.export(rendered.by(exporter), job.source.path, staging, job.dtype)
            progress(index + 1)
    job.say(f"5/6 export: {' and '.join(exporter.name for exporter in exporters)}")


def _say_summary(metrics: Mapping[str, Any], out: Path, say: Say) -> None:
    say("")
    say(card.summary(metrics))
    say("")
    say(card.agreement(metrics))
    say("")
    say(advice(metrics, out))
