"""The command line: parses, calls, prints; no logic. Heavy imports happen inside the verbs, so that --help answers at once."""

from __future__ import annotations

import signal
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from lrserve.errors import LrserveError

app = typer.Typer(
    name="lrserve",
    help="Make a language model cheaper to serve: low-rank factors, searched for the engine that serves them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # it takes "[default: ...]" in a help text for markup, and drops it
    context_settings={"help_option_names": ["-h", "--help"]},
)

_MODEL = "Hub id, folder in Hugging Face layout, or GGUF file; may stand in the recipe instead."
_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


class Runtime(str, Enum):
    """The engines of `recipe.EngineSettings.runtime`."""

    VLLM = "vllm"
    ONNX = "onnx"


@app.command("compress-and-export")
def compress_and_export(
    model: Annotated[str | None, typer.Argument(help=_MODEL)] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the artifact.")] = ...,  # type: ignore[assignment]
    ratio: Annotated[float | None, typer.Option(help="Best quality with this share of the linears' parameters removed.")] = None,
    min_speedup: Annotated[float | None, typer.Option(help="Best quality at this measured speedup over dense.")] = None,
    max_ppl_increase: Annotated[float | None, typer.Option(help="Best speed at this relative perplexity increase.")] = None,
    export: Annotated[list[str] | None, typer.Option(help="Rendering to export, repeatable [default: vllm and onnx].")] = None,
    recover: Annotated[
        float | None, typer.Option(metavar="MINUTES", help="Distil the dense model into the factors [default: 0].")
    ] = None,
    target: Annotated[
        Runtime | None, typer.Option(help="The engine that measures the plans, and is to serve [default: vllm].")
    ] = None,
    trials: Annotated[int | None, typer.Option(help="Trials of the search [default: 24].")] = None,
    choose: Annotated[
        int | None, typer.Option(metavar="TRIAL", help="Export this trial of a finished search (see its report.html).")
    ] = None,
    storage: Annotated[
        str | None, typer.Option(metavar="URL", help="Database in which several runs of the same inputs share the search.")
    ] = None,
    calibration: Annotated[str | None, typer.Option(help="Text file (.jsonl or plain) or Hub dataset.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="YAML file with any setting; the options here win over it.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of calibration windows and search [default: 0].")] = None,
    work: Annotated[Path | None, typer.Option(help="Folder for intermediate results [default: OUT.work].")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an artifact made from other inputs.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the inputs and say what would be done.")] = False,
) -> None:
    """Compress a model, search its ranks, export the result and prove it."""
    from lrserve.pipeline.run import compress_and_export as run
    from lrserve.recipe import Recipe

    overrides: dict[str, Any] = {
        "model": model,
        "target.ratio": ratio,
        "target.min_speedup": min_speedup,
        "target.max_ppl_increase": max_ppl_increase,
        "export": export or None,
        "factorization.recover_minutes": recover,
        "engine.runtime": None if target is None else target.value,
        "search.trials": trials,
        "search.choose": choose,
        "text.calibration": calibration,
        "seed": seed,
    }
    try:
        run(Recipe.load(recipe, overrides), out, work=work, storage=storage, overwrite=overwrite, dry_run=dry_run)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from where it stopped", file=sys.stderr)
        raise typer.Exit(130) from None


@app.command(context_settings=_PASS_ON)
def serve(
    context: typer.Context,
    out: Annotated[Path, typer.Argument(help="An artifact of lrserve, or a dense model.")],
) -> None:
    """Serve with vLLM's OpenAI-compatible server; further arguments go to vLLM unchanged."""
    from lrserve.serving.server import serve as run

    run(out, [argument for argument in context.args if argument != "--"])


@app.command(context_settings={"allow_extra_args": True})
def bench(
    context: typer.Context,
    out: Annotated[Path, typer.Argument(help="An artifact of lrserve.")],
    dense: Annotated[str | None, typer.Option(help="The dense model [default: the one it was made from].")] = None,
    prompt_tokens: Annotated[int | None, typer.Option(help="Tokens per prompt, for one workload instead of the recipe's.")] = None,
    output_tokens: Annotated[int | None, typer.Option(help="Tokens per answer, for one workload instead of the recipe's.")] = None,
    concurrency: Annotated[int | None, typer.Option(help="Requests at once, for one workload instead of the recipe's.")] = None,
    repeats: Annotated[int | None, typer.Option(help="Counted rounds [default: the recipe's].")] = None,
    compiled: Annotated[
        bool | None, typer.Option("--compiled/--eager", help="With torch.compile or without [default: the recipe's].")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Also write bench.json, bench.md and bench.png there.")
    ] = None,
) -> None:
    """Measure throughput and latency against the dense model, both behind vLLM's server, in turns; -- passes flags to vLLM."""
    from lrserve.serving.bench import bench as run

    run(
        out,
        dense=dense,
        workload={"prompt_tokens": prompt_tokens, "output_tokens": output_tokens, "concurrency": concurrency},
        overrides={
            "engine.repeats": repeats,
            "engine.enforce_eager": None if compiled is None else not compiled,
        },
        report=report,
        vllm_arguments=context.args,
    )


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="An artifact, or a dense model as for compress-and-export.")],
) -> None:
    """Say what a model or an artifact consists of: groups, shapes, ranks and sizes."""
    from lrserve.pipeline.inspect import inspect as run

    print(run(model))


@app.command()
def verify(out: Annotated[Path, typer.Argument(help="An artifact of lrserve.")]) -> None:
    """Check every file of an artifact against its manifest, and its tensors against its config."""
    from lrserve.pipeline.inspect import verify as run

    print(run(out))


def main() -> None:
    """Run the command line; a deliberate error becomes one line and exit code 2."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that staging folders and engines are cleaned up
    try:
        app()
    except LrserveError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
