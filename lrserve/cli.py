"""The command line: parses, calls, prints; no logic.

Heavy imports happen inside the verbs, after the flags were checked, so that --help and a mistyped value are answered at once. What
sets something in the recipe is text here, which the recipe parses: it has the ranges, and the words for what is wrong.
"""

from __future__ import annotations

import errno
import io
import json
import signal
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from lrserve.errors import InputError, LrserveError, shown

if TYPE_CHECKING:
    from lrserve.recipe import Recipe


class _Verbs(TyperGroup):
    """The verbs; typer suggests one for a typing error, this one also for its beginning."""

    def resolve_command(self, ctx: typer.Context, args: list[str]) -> Any:  # type: ignore[override]
        """Refuse the beginning of a verb with the verb's name, and look up anything else."""
        meant = [verb for verb in self.commands if args[0] and verb.startswith(args[0])]
        if meant and args[0] not in self.commands:
            ctx.fail(f"No such command {args[0]!r}. Did you mean {' or '.join(meant)}?")
        return super().resolve_command(ctx, args)


app = typer.Typer(
    name="lrserve",
    cls=_Verbs,
    help="Make a language model smaller and faster on vLLM and ONNX Runtime.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # it takes "[default: ...]" in a help text for markup, and drops it
    context_settings={"help_option_names": ["-h", "--help"]},
)

_LONGEST = 550  # characters of an error's one line
_BUG = (
    "this is a bug in lrserve: please open an issue in lrserve's repository, with these lines, the command, the recipe and what "
    "'pip freeze' prints"
)
_MODEL = "Hub id, folder in Hugging Face layout, or GGUF file"
_ENDINGS = (signal.SIGTERM, signal.SIGHUP)
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


class _PassesOn(TyperCommand):
    """A verb whose arguments after `--` are vLLM's; they go into the `obj` of the context."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        """Cut the arguments at the first `--`, which click would drop, and parse those before it."""
        cut = args.index("--") if "--" in args else len(args)
        ctx.obj = args[cut + 1 :]
        return super().parse_args(ctx, args[:cut])


def _show_version(wanted: bool) -> None:
    if wanted:
        from lrserve import __version__

        print(f"lrserve {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print lrserve's version.")
    ] = False,
) -> None:
    pass


@app.command("compress-and-export")
def compress_and_export(
    model: Annotated[str | None, typer.Argument(help=f"{_MODEL}; may stand in the recipe instead.")] = None,
    out: Annotated[Path, typer.Option("-o", "--out", metavar="FOLDER", help="Folder for the artifact.")] = ...,  # type: ignore[assignment]
    calibration: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Text file, FILE:COLUMN or Hub dataset, of the kind that you serve.")
    ] = None,
    ratio: Annotated[
        str | None,
        typer.Option(metavar="SHARE", help="Remove this share of the linear layers' parameters; 0.2 is 20 %."),
    ] = None,
    min_speedup: Annotated[
        str | None, typer.Option(metavar="FACTOR", help="Best quality at this measured speedup over the dense model, such as 1.2.")
    ] = None,
    max_ppl_increase: Annotated[
        str | None, typer.Option(metavar="SHARE", help="Best speed with at most so much more perplexity; 0.05 is 5 %.")
    ] = None,
    max_bytes: Annotated[
        str | None, typer.Option(metavar="SHARE", help="Keep at most this share of the linear layers' bytes; 0.4 is two fifths.")
    ] = None,
    export: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="vllm (a checkpoint) or onnx (a graph), repeatable [default: both].")
    ] = None,
    onnx_profile: Annotated[
        str | None, typer.Option(metavar="NAME", help="Graph for batches padded as genai does, or portable [default: genai].")
    ] = None,
    recover: Annotated[
        str | None, typer.Option(metavar="MINUTES", help="Train the result against the dense model for so long [default: 0].")
    ] = None,
    recover_tokens: Annotated[
        str | None, typer.Option(metavar="TOKENS", help="The same, on so many tokens in place of minutes [default: 0].")
    ] = None,
    target: Annotated[
        str | None, typer.Option(metavar="ENGINE", help="Engine that measures the plans: vllm or onnx [default: vllm].")
    ] = None,
    trials: Annotated[str | None, typer.Option(metavar="NUMBER", help="Plans that the search tries [default: 24].")] = None,
    choose: Annotated[
        str | None, typer.Option(metavar="TRIAL", help="Export this trial of a finished search (see its report.html).")
    ] = None,
    storage: Annotated[
        str | None, typer.Option(metavar="URL", help="Database in which several runs of the same inputs share the search.")
    ] = None,
    recipe: Annotated[Path | None, typer.Option(metavar="FILE", help="YAML file with any setting; flags win over it.")] = None,
    seed: Annotated[str | None, typer.Option(metavar="NUMBER", help="Seed of calibration windows and search [default: 0].")] = None,
    work: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Folder for intermediate results [default: OUT.work].")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an artifact made from other inputs.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the inputs, estimate time, memory and disk, and write nothing.")
    ] = False,
) -> None:
    """Compress a model, and prove the result.

    Give at most one of --ratio, --min-speedup, --max-bytes and --max-ppl-increase. If a run is interrupted, repeat its command: it
    continues.
    """
    from exporters.registry import exporter_points
    from lrserve.plugins.versions import require_compress

    given: dict[str, tuple[str, Any]] = {
        "MODEL": ("model", model),
        "--ratio": ("target.ratio", ratio),
        "--min-speedup": ("target.min_speedup", min_speedup),
        "--max-ppl-increase": ("target.max_ppl_increase", max_ppl_increase),
        "--max-bytes": ("target.max_bytes", max_bytes),
        "--export": ("export", export or None),
        "--onnx-profile": ("engine.onnx_profile", onnx_profile),
        "--recover": ("factorization.recover_minutes", recover),
        "--recover-tokens": ("factorization.recover_tokens", recover_tokens),
        "--target": ("engine.runtime", target),
        "--trials": ("search.trials", trials),
        "--choose": ("search.choose", choose),
        "--calibration": ("text.calibration", calibration),
        "--seed": ("seed", seed),
    }
    settings = _recipe(recipe, given)
    exporter_points(settings.export)
    require_compress("compress-and-export")

    from lrserve.pipeline.launched import launched
    from lrserve.pipeline.recovery_worker import follow
    from lrserve.pipeline.run import compress_and_export as run

    with _interruptible(), launched() as launch:
        if launch is not None and launch.index:
            follow(launch)
            return
        run(settings, out, work=work, storage=storage, overwrite=overwrite, dry_run=dry_run, launch=launch)


@app.command()
def calibrate(
    model: Annotated[str | None, typer.Argument(help=f"{_MODEL}; may stand in the recipe instead.")] = None,
    shard: Annotated[str, typer.Option(metavar="I/N", help="Which part: 2/8 is the second of eight.")] = ...,  # type: ignore[assignment]
    work: Annotated[Path, typer.Option(metavar="FOLDER", help="Work folder of the run that merges the shards.")] = ...,  # type: ignore[assignment]
    calibration: Annotated[str | None, typer.Option(metavar="TEXT", help="As of compress-and-export.")] = None,
    export: Annotated[list[str] | None, typer.Option(metavar="NAME", help="As of compress-and-export.")] = None,
    target: Annotated[str | None, typer.Option(metavar="ENGINE", help="As of compress-and-export.")] = None,
    recipe: Annotated[Path | None, typer.Option(metavar="FILE", help="As of compress-and-export.")] = None,
    seed: Annotated[str | None, typer.Option(metavar="NUMBER", help="As of compress-and-export.")] = None,
) -> None:
    """Collect one shard of the calibration, to share it among machines.

    Give the model, the text and the settings of the compress-and-export that will use it. Run all N shards, anywhere and in any
    order. Each writes the folder shard-I-of-N below --work; copy those of other machines there. compress-and-export with that
    --work merges them. If a shard is interrupted, repeat its command: it continues.
    """
    from lrserve.pipeline.shard import Shard
    from lrserve.plugins.versions import require_compress

    part = Shard.parse(shard)
    settings = _recipe(
        recipe,
        {
            "MODEL": ("model", model),
            "--calibration": ("text.calibration", calibration),
            "--export": ("export", export or None),
            "--target": ("engine.runtime", target),
            "--seed": ("seed", seed),
        },
    )
    require_compress("calibrate")

    from lrserve.pipeline.collect import calibrate_shard

    with _interruptible():
        calibrate_shard(settings, part, work)


class _Engine(str, Enum):
    vllm = "vllm"
    onnxruntime = "onnxruntime"


@app.command(cls=_PassesOn, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help=f"An artifact of lrserve, or a dense model: {_MODEL}.")],
    engine: Annotated[_Engine, typer.Option(help="What serves it; onnxruntime takes artifacts only.")] = _Engine.vllm,
) -> None:
    """Serve a model with vLLM's OpenAI server.

    Further flags go to vLLM unchanged, and so does all that follows --. The server listens on 127.0.0.1 without --host, and with
    LRSERVE_API_KEY clients must show that key.

    With --engine onnxruntime, onnxruntime-genai serves the ONNX graph: one answer at a time, other requests wait. Its flags are
    --host, --port, --api-key, --served-model-name, --max-model-len, --max-queue and --threads.
    """
    if model.startswith("-") or (context.args and not context.args[0].startswith("-")):
        stray = model if model.startswith("-") else context.args[0]
        raise InputError(f"serve: unexpected {stray!r}; give one model first, then vLLM's flags: lrserve serve MODEL [FLAGS]")
    arguments = [*context.args, *context.obj]
    if engine is _Engine.onnxruntime:
        from lrserve.serving.onnx_server import serve as serve_graph

        serve_graph(model, arguments)
    else:
        from lrserve.serving.server import serve as run

        run(model, arguments)


@app.command()
def generate(
    out: Annotated[Path, typer.Argument(help="An artifact of lrserve.")],
    prompt: Annotated[str, typer.Argument(help="What to answer.")],
    engine: Annotated[
        _Engine | None, typer.Option(help="What answers [default: onnxruntime if OUT has a graph, else vllm].")
    ] = None,
    max_tokens: Annotated[int, typer.Option(metavar="NUMBER", min=1, help="Longest answer, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(metavar="NUMBER", min=0, max=2, help="0 takes the most probable token.")] = 0,
    seed: Annotated[int | None, typer.Option(metavar="NUMBER", help="Seed of the draws, if --temperature is above 0.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt as it is, without the chat template.")] = False,
) -> None:
    """Answer one prompt on the terminal.

    The answer comes as it is generated; tokens and rates follow on standard error. vLLM runs without torch.compile here, so it
    starts sooner and computes slower than behind `serve`.
    """
    from lrserve.serving.generation import generate as run

    try:
        run(
            out,
            prompt,
            engine=engine.value if engine else None,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
            raw=raw,
        )
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


@app.command(cls=_PassesOn, context_settings={"allow_extra_args": True})
def bench(
    context: typer.Context,
    out: Annotated[Path, typer.Argument(help="An artifact of lrserve.")],
    engine: Annotated[_Engine, typer.Option(help="What serves both models.")] = _Engine.vllm,
    dense: Annotated[str | None, typer.Option(metavar="MODEL", help="The dense model [default: the artifact's own].")] = None,
    prompt_tokens: Annotated[
        str | None, typer.Option(metavar="NUMBER", help="Measure one workload only, with prompts of so many tokens.")
    ] = None,
    output_tokens: Annotated[
        str | None, typer.Option(metavar="NUMBER", help="Measure one workload only, with answers of so many tokens.")
    ] = None,
    concurrency: Annotated[
        str | None, typer.Option(metavar="NUMBER", help="Measure one workload only, with so many requests at once.")
    ] = None,
    repeats: Annotated[str | None, typer.Option(metavar="NUMBER", help="Rounds of measuring [default: the recipe's].")] = None,
    compiled: Annotated[
        bool | None,
        typer.Option("--compiled/--eager", help="Both with torch.compile, or both without [default: the recipe's]."),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Also write bench.json, bench.md and bench.png there.")
    ] = None,
    as_json: _Json = False,
) -> None:
    """Measure an artifact against its dense model.

    Both run behind vLLM's server, and what follows -- goes to both servers, but for names, keys and addresses; or behind the
    server of --engine onnxruntime, which answers one request at a time. Without --prompt-tokens, --output-tokens and --concurrency
    the recipe's workloads are measured.
    """
    if context.args:
        raise InputError(
            f"bench: unexpected {context.args[0]!r}; it measures one artifact against its dense model, or the one that --dense "
            "names. Flags of vLLM follow --"
        )
    given: dict[str, tuple[str, Any]] = {
        "--prompt-tokens": ("workloads.custom.prompt_tokens", prompt_tokens),
        "--output-tokens": ("workloads.custom.output_tokens", output_tokens),
        "--concurrency": ("workloads.custom.concurrency", concurrency),
        "--repeats": ("engine.repeats", repeats),
        "--compiled": ("engine.enforce_eager", None if compiled is None else not compiled),
    }
    checked = _recipe(None, {"OUT": ("model", str(out)), **given})

    from lrserve.serving.bench import bench as run

    figures = run(
        out,
        engine=engine.value,
        dense=dense,
        workload=checked.workloads["custom"].model_dump(exclude_unset=True) if "custom" in checked.workloads else {},
        overrides={f"engine.{name}": value for name, value in checked.engine.model_dump(exclude_unset=True).items()},
        report=report,
        vllm_arguments=context.obj,
        say=_silent if as_json else print,
    )
    if as_json:
        _print_json(figures)


class _EvalEngine(str, Enum):
    transformers = "transformers"
    vllm = "vllm"


@app.command("eval")
def evaluate(
    out: Annotated[Path, typer.Argument(help="An artifact of lrserve.")],
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TASK", help="Name in lm-evaluation-harness, YAML file or folder; repeatable [default: made from text]."
        ),
    ] = None,
    dense: Annotated[str | None, typer.Option(metavar="MODEL", help="The dense model [default: the artifact's own].")] = None,
    engine: Annotated[_EvalEngine, typer.Option(help="What runs both models.")] = _EvalEngine.transformers,
    limit: Annotated[
        int | None, typer.Option(metavar="NUMBER", min=1, help="Items of each task [default: all; 200 if made from text].")
    ] = None,
    shots: Annotated[
        int | None, typer.Option(metavar="NUMBER", min=0, help="Examples before each item [default: the task's own number].")
    ] = None,
    text: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Text from which to make the task [default: the recipe's report text].")
    ] = None,
    report: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Also write eval.json and eval.md there.")] = None,
    as_json: _Json = False,
) -> None:
    """Evaluate an artifact and its dense model on tasks.

    lm-evaluation-harness runs both. What the artifact keeps of dense, task by task, is added to its model card and metrics.json.
    Without --tasks, the task is to find the sentence that follows a passage, made from text that no step has seen.
    """
    if tasks and text is not None:
        raise InputError("eval: --text is for the task made from text; leave out --tasks or --text")
    from lrserve.serving.eval import evaluate as run

    figures = run(
        out,
        tasks=tasks or (),
        dense=dense,
        engine=engine.value,
        limit=limit,
        shots=shots,
        text=text,
        report=report,
        say=_silent if as_json else print,
    )
    if as_json:
        _print_json(figures)


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help=f"An artifact of lrserve, or a dense model: {_MODEL}.")],
    as_json: _Json = False,
) -> None:
    """Show the layers, ranks and sizes of a model."""
    from lrserve.pipeline.inspect import describe
    from lrserve.pipeline.inspect import inspect as run

    if as_json:
        _print_json(describe(model))
    else:
        print(run(model))


@app.command()
def verify(out: Annotated[Path, typer.Argument(help="An artifact of lrserve.")], as_json: _Json = False) -> None:
    """Check the files and tensors of an artifact.

    Every file is compared with the manifest, and the tensors with config.json.
    """
    from lrserve.pipeline.inspect import check
    from lrserve.pipeline.inspect import verify as run

    if not as_json:
        print(run(out))
        return
    found = check(out)
    _print_json(found)
    if found["faults"]:
        raise typer.Exit(2)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Turn Ctrl-C into one line and exit code 130."""
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from where it stopped", file=sys.stderr)
        raise typer.Exit(130) from None


def _recipe(path: Path | None, given: Mapping[str, tuple[str, Any]]) -> Recipe:
    """Read a recipe and lay over it what flags gave: by flag, the dotted name of the setting and the text or None."""
    from lrserve.recipe import Recipe

    return Recipe.load(path, dict(given.values()), {name: flag for flag, (name, _) in given.items()})


def _print_json(data: Any) -> None:
    print(json.dumps(data))


def _silent(line: str) -> None:
    pass


def _end(number: int, frame: object) -> None:
    """End the program so that staging folders and engines are cleaned up, which a second signal is not to interrupt."""
    for each in _ENDINGS:
        signal.signal(each, signal.SIG_IGN)
    sys.exit(128 + number)


def main() -> None:
    """Run a command: a deliberate error becomes one line and exit code 2, any other a traceback and a request to report it."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # a file or a pipe shows each stage's line as it ends, not blocks of 8 KiB
    for number in _ENDINGS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup's SIGHUP
            signal.signal(number, _end)
    try:
        app()
    except LrserveError as error:
        text = str(error)
        if len(text) > _LONGEST and "\n" not in text:  # a value that stands in it is long: what and where, and the next step
            text = f"{text[: _LONGEST - 120]} ... {text[-100:]}"
        print(f"error: {text}", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:  # only a user gives such names
            print(f"error: no file or folder can be called {shown(error.filename)}; check the argument", file=sys.stderr)
            sys.exit(2)
        traceback.print_exc()
        print(_BUG, file=sys.stderr)
        sys.exit(1)
