"""lrserve bench: the throughput of an artifact against its dense model, measured again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lrserve.artifacts.card import table
from lrserve.artifacts.store import read_manifest, write_json
from lrserve.errors import ArtifactError, InputError
from lrserve.inputs.source import open_source
from lrserve.job import Say, progress_bar
from lrserve.recipe import Recipe
from lrserve.serving.loadtest import compare, open_engine


def bench(
    out: Path,
    *,
    dense: str | None = None,
    overrides: dict[str, Any] | None = None,
    json_file: Path | None = None,
    say: Say = print,
) -> dict[str, Any]:
    """Measure an artifact and its dense model in turns on vLLM and print the table.

    Args:
        out: the artifact.
        dense: the dense model; the one that the artifact was made from when None.
        overrides: dotted settings of the recipe to change; `None` values are passed over.
        json_file: also write the figures here.
        say: takes the table.

    Returns:
        The figures: `Comparison.to_json` with the workload and the settings.

    Raises:
        LrserveError: not an artifact, no dense model, or a failing engine.
    """
    read_manifest(out)
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise InputError(f"no folder {json_file.absolute().parent} for --json; make it first")
    if not (out / "config.json").is_file():
        raise ArtifactError(f"{out} has no vLLM checkpoint; export it with --export vllm")
    recipe = Recipe.load(out / "lrserve" / "recipe.yaml", overrides or {})
    source = open_source(dense or recipe.model)
    workload, settings = recipe.workload, recipe.engine
    with (
        progress_bar(2 * settings.repeats, "bench") as progress,
        open_engine(source.path, workload, settings, sharing=2) as dense_engine,
        open_engine(out, workload, settings, sharing=2) as engine,
    ):
        done = 0

        def step() -> None:
            nonlocal done
            done += 1
            progress(done)

        result = compare(dense_engine, engine, workload, settings.repeats, seed=recipe.seed, progress=step)
    figures = {
        **result.to_json(),
        "workload": workload.model_dump(mode="json"),
        "settings": settings.model_dump(mode="json"),
        "dense_model": source.name,
    }
    rows = []
    for name in ("dense", "compressed"):
        side = figures[name]
        spread = f"{side['lowest']:.1f} to {side['highest']:.1f}"
        rows.append([name, f"{side['tokens_per_second']:.1f}", spread, f"{side['cpu_seconds']:.2f}"])
    say(table(["", "output tokens/s", "spread", "CPU seconds per run"], rows))
    say(
        f"speedup {figures['speedup']:.2f}x ({figures['speedup_lowest']:.2f} to {figures['speedup_highest']:.2f}) on "
        f"{figures['engine']}, {'eager' if settings.enforce_eager else 'compiled'}: {workload.concurrency} requests at once of "
        f"{workload.prompt_tokens} prompt and {workload.output_tokens} output tokens, {settings.repeats} rounds"
    )
    if json_file is not None:
        write_json(json_file, figures)
    return figures
