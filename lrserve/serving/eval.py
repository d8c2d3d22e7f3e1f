"""lrserve eval: an artifact and its dense model on tasks of lm-evaluation-harness, and what the artifact keeps of dense."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from lrserve.compression.groups import family_of
from lrserve.engines.gpu import require_devices
from lrserve.engines.harness import Harness
from lrserve.errors import ArtifactError, InputError
from lrserve.inputs.cloze import CLOZE_ITEMS, write_cloze
from lrserve.inputs.source import open_source
from lrserve.inputs.text import Documents, load_texts, read_documents
from lrserve.plugins.versions import engine_version, eval_version, require_eval, require_sound_torchvision
from lrserve.recipe import Recipe, Text
from lrserve.report.console import Say, progress_bar
from lrserve.report.eval import card_with_tasks, eval_table, write_eval
from lrserve.report.machine import made
from lrserve.serving.recovery import compare
from lrserve.serving.reports import make_report_folder
from lrserve.serving.server import check_engine
from lrserve.storage.store import check_files, read_manifest, replace_files, write_json
from lrserve.storage.temporary import remove_leftovers, temporary_folder, temporary_leftovers

_CARD, _METRICS = "README.md", "lrserve/metrics.json"


def evaluate(
    out: Path,
    *,
    tasks: Sequence[str] = (),
    dense: str | None = None,
    engine: Literal["transformers", "vllm"] = "transformers",
    limit: int | None = None,
    shots: int | None = None,
    text: str | None = None,
    report: Path | None = None,
    say: Say = print,
) -> dict[str, Any]:
    """Run an artifact and its dense model on the same tasks, print the table, and add the result to the artifact.

    Args:
        out: the artifact.
        tasks: names of lm-evaluation-harness (also several with commas), YAML files or folders of them; without any, the task that
            `write_cloze` makes from `text`.
        dense: the dense model; the one that the artifact was made from when None.
        engine: what runs both models.
        limit: items of each task; None is all, and 200 for the task made from text.
        shots: examples before each item; None is the task's own number.
        text: file or dataset for the task made from text; the report text of the artifact's recipe when None.
        report: folder for eval.json and eval.md; made if need be.
        say: takes the table.

    Returns:
        The figures: `tasks` by name, as `recovery.compare` gives them; when and where they were `made`, the names of the `models`,
        `engine` and `dtype`.

    Raises:
        LrserveError: not an artifact, no dense model, no such task, a missing package, or a failing engine.
    """
    read_manifest(out)
    if not (out / "config.json").is_file():
        raise ArtifactError(f"{out} has no checkpoint; export it with --export vllm")
    check_files(out)
    require_eval()
    if engine == "vllm":
        check_engine()
    require_sound_torchvision()
    wanted = named_tasks(tasks)
    if report is not None:
        make_report_folder(report, out)
    remove_leftovers([temporary_leftovers()], say)
    recipe = Recipe.load(out / "lrserve" / "recipe.yaml", {})
    settings = recipe.engine
    if engine == "vllm":
        require_devices(settings.tensor_parallel_size)
    source = open_source(dense or recipe.model, accept=family_of)
    with temporary_folder() as folder:
        if not wanted:
            documents = _unseen(recipe.text, text, source.tokenizer())
            for note in documents.notes:
                say(note)
            wanted = [str(write_cloze(documents, Path(folder), limit or CLOZE_ITEMS, seed=recipe.seed))]
        found: list[dict[str, Any]] = []
        with progress_bar(2 * len(wanted), "eval") as progress:
            for model in (source.path, out.resolve()):
                results: dict[str, Any] = {}
                with Harness(
                    model,
                    wanted,
                    engine=engine,
                    dtype=settings.dtype,
                    enforce_eager=settings.enforce_eager,
                    gpu_memory_utilization=settings.gpu_memory_share,
                    tensor_parallel_size=settings.tensor_parallel_size,
                ) as harness:
                    for index, task in enumerate(wanted, 1):
                        results |= harness.evaluate(task, limit=limit, shots=shots)
                        progress(len(wanted) * len(found) + index)
                found.append(results)
    before, after = found
    backend = engine_version() if engine == "vllm" else f"transformers {metadata.version('transformers')}"
    figures = {
        "made": made(),
        "models": {"dense": source.title, "compressed": out.resolve().name},
        "engine": f"{eval_version()}, {backend}",
        "dtype": settings.dtype,
        "tasks": {name: compare(before[name], after[name]) for name in before},
    }
    say(eval_table(figures))
    if report is not None:
        write_json(report / "eval.json", figures)
        write_eval(figures, report)
    _record(out, figures, say)
    return figures


def named_tasks(tasks: Sequence[str]) -> list[str]:
    """Split names at commas, and make paths absolute.

    Raises:
        InputError: a path that is not there.
    """
    found = []
    for task in tasks:
        place = os.path.expanduser(task)
        for name in [place] if os.path.exists(place) else filter(None, task.split(",")):
            if os.path.exists(os.path.expanduser(name)):
                found.append(os.path.abspath(os.path.expanduser(name)))
            elif name.endswith((".yaml", ".yml")) or os.sep in name:
                raise InputError(f"no task at {name}: there is no such file or folder; check the path")
            else:
                found.append(name)
    return list(dict.fromkeys(found))


def _unseen(settings: Text, given: str | None, tokenizer: Any) -> Documents:
    """Return text that no step has seen: what the user gives, or the report text of the artifact's recipe."""
    if given is not None:
        return read_documents(given, tokenizer)
    try:
        if settings.report is not None:
            return read_documents(settings.report, tokenizer)
        return load_texts(settings.sources, settings.validation, None, tokenizer).report
    except InputError as error:
        raise InputError(f"the text of the artifact's recipe cannot be read: {error}. Give --text FILE, or --tasks") from error


def _record(out: Path, figures: Mapping[str, Any], say: Say) -> None:
    """Add the tasks to metrics.json, model card and manifest; where the artifact cannot be changed, say so."""
    conditions = {**{key: figures[key] for key in ("made", "engine", "dtype")}, "dense": figures["models"]["dense"]}
    own = {name: {**task, **conditions} for name, task in figures["tasks"].items()}
    try:
        metrics = json.loads((out / _METRICS).read_text(encoding="utf-8"))
        metrics["eval"] = {**metrics.get("eval", {}), **own}
        card = card_with_tasks((out / _CARD).read_text(encoding="utf-8"), metrics["eval"])
        replace_files(out, {_METRICS: json.dumps(metrics, indent=1) + "\n", _CARD: card})
    except (OSError, ArtifactError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        say(f"\n{out} stays as it is: {reason}. Keep the figures with --report FOLDER")
    else:
        say(f"\nAdded to {out / _CARD} and {_METRICS}")
