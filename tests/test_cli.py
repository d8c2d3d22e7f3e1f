"""The command line as a user meets it: help at once, one clear line for bad input, exit code 2, nothing left behind."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from faults.refusing import Ran, ran
from tiny import dense_model, factorized_model, write_artifact, write_dense, write_text
from typer.testing import CliRunner

import lrserve
from lrserve import cli
from lrserve.storage.store import write_manifest


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dense(dense_model("LlamaForCausalLM"), tmp_path_factory.mktemp("cli") / "model")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.jsonl", 400, repetitions=8)


ASKED = """
import contextlib, io, json, os, sys
from lrserve.cli import main
heavy = ["torch", "transformers", "vllm", "optuna", "onnx", "onnxruntime", "scipy", "matplotlib"]
for line in sys.stdin:
    cwd, *sys.argv[1:] = json.loads(line)
    os.chdir(cwd)
    out, error, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
    print(json.dumps([code, out.getvalue(), error.getvalue(), [name for name in heavy if name in sys.modules]]), flush=True)
"""
Asked = Callable[..., Ran]


@pytest.fixture(scope="module")
def without_torch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asked]:
    """Run commands in a process of their own, and see that it imported neither torch nor what imports torch."""
    elsewhere = tmp_path_factory.mktemp("cwd")
    command = [sys.executable, "-c", ASKED]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        questions, answers = process.stdin, process.stdout

        def ask(*arguments: str, cwd: Path = elsewhere) -> Ran:
            print(json.dumps([str(cwd), *arguments]), file=questions, flush=True)
            code, out, error, imported = json.loads(answers.readline())
            assert imported == [], error
            return Ran(code, out, error)

        yield ask
        questions.close()


ONNX = ("--target", "onnx", "--export", "onnx")  # whose engine starts in a second
VERBS = ("compress-and-export", "calibrate", "generate", "serve", "bench", "eval", "inspect", "verify")


def test_help_answers_in_under_a_second() -> None:
    command = [sys.executable, "-c", "from lrserve.cli import main; main()", "compress-and-export", "--help"]
    subprocess.run(command, capture_output=True, check=True)  # compiles
    began = os.times()
    subprocess.run(command, capture_output=True, check=True)
    ended = os.times()  # processor time: a busy machine is no fault
    assert ended.children_user + ended.children_system - began.children_user - began.children_system < 1


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_needs_no_torch(verb: str, without_torch: Asked) -> None:
    shown = without_torch(*verb.split(), "--help")
    assert shown.code == 0
    for word in VERBS if not verb else ["--help"]:
        assert word in shown.out


def test_the_version_and_shell_completion(without_torch: Asked) -> None:
    assert without_torch("--version") == Ran(0, f"lrserve {lrserve.__version__}\n", "")
    assert "--install-completion" in without_torch("--help").out


def test_importing_the_package_and_its_recipe_imports_no_engine() -> None:
    heavy = ["vllm", "optuna", "onnx", "onnxruntime", "torch", "transformers"]
    code = f"import lrserve.recipe, sys; print([name for name in {heavy} if name in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def test_the_public_api_is_pinned() -> None:
    assert sorted(lrserve.__all__) == ["LowRankLinear", "LrserveError", "Plan", "Recipe", "__version__", "compress_and_export"]
    for name in lrserve.__all__:
        assert getattr(lrserve, name) is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere/at/all"], "no model at 'nowhere/at/all'"),
        (["MODEL", "--calibration", "missing.txt"], "no text file at missing.txt"),
        (["MODEL", "--calibration", "TINY"], "tokens, less than one window of 256: give more text"),
        (["MODEL"], "no calibration text; give --calibration"),
        (["FALCON", "--calibration", "TEXT"], "unsupported architecture: FalconForCausalLM"),
        (["MODEL", "--calibration", "TEXT", "--recipe", "SMALL", "-o", "MODEL"], "holds other files than an lrserve artifact"),
        (["MODEL", "--calibration", "TEXT", "--recipe", "SMALL", "-o", "TEXT/out"], "cannot write to"),
    ],
)
def test_bad_input_is_one_clear_line(
    arguments: list[str], message: str, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    falcon = tmp_path / "falcon"
    falcon.mkdir()
    (falcon / "config.json").write_text(json.dumps({"model_type": "falcon", "architectures": ["FalconForCausalLM"]}))
    (falcon / "model.safetensors").write_bytes(b"")
    small = tmp_path / "small.yaml"
    small.write_text("calibration: {sequences: 4, length: 32}\nreport: {tokens: 128, length: 64}\n")
    tiny = tmp_path / "tiny.jsonl"
    tiny.write_text("".join(json.dumps({"text": f"Text {number}."}) + "\n" for number in range(4)))
    places = {"MODEL": model, "TEXT": text, "FALCON": falcon, "SMALL": small, "TINY": tiny}
    words = [str(places.get(head, head)) + rest for head, rest in ((w.split("/")[0], w[len(w.split("/")[0]) :]) for w in arguments)]
    if "-o" not in words:
        words += ["-o", str(tmp_path / "out")]
    before = sorted(p.name for p in tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    shown = ran("compress-and-export", *words)
    assert shown.code == 2, shown.error
    last = shown.error.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
    assert "Traceback" not in shown.error
    assert sorted(p.name for p in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ratio", "1.5"], "error: --ratio: must be below 1; got '1.5'"),
        (["--ratio", "nan"], "error: --ratio: must be"),
        (["--ratio", "0.2", "--min-speedup", "2"], "error: --ratio and --min-speedup: give only one of ratio"),
        (["--trials", "0"], "error: --trials: must be at least 3; got '0'"),
        (["--onnx-profile", "hf"], "error: --onnx-profile: must be 'genai' or 'portable'; got 'hf'"),
        (["--recover", "-1"], "error: --recover: must be at least 0; got '-1'"),
        (["--seed", "-1"], "error: --seed: must be at least 0; got '-1'"),
        (["--export", "tflite"], "error: no exporter named 'tflite'; --export takes onnx, vllm"),
        (["--export", "onxx"], "did you mean onnx?"),
        (["--target", "tgi"], "error: --target: must be 'vllm' or 'onnx'; got 'tgi'"),
        (["--ratio", "half"], "error: --ratio: must be a number; got 'half'"),
        (["--trials", "3.5"], "error: --trials: must be a whole number; got '3.5'"),
        (["--min-speedup", "inf"], "error: --min-speedup: must be a finite number; got 'inf'"),
        (["--ration", "0.2"], "No such option: --ration"),
        (["--recipe", "missing.yaml"], "error: the recipe 'missing.yaml' cannot be read: FileNotFoundError"),
        (["--recipe", "typo.yaml"], "error: there is no setting search.trial (recipe typo.yaml); did you mean search.trials?"),
        (["--recipe", "wrong.yaml"], "error: search.trials (recipe wrong.yaml): must be at least 3; got 1"),
        (["--recipe", "wrong.yaml", "--trials", "2"], "error: --trials: must be at least 3; got '2'"),
    ],
)
def test_a_wrong_flag_or_setting_is_answered_before_torch_is_imported(
    arguments: list[str], message: str, without_torch: Asked, tmp_path: Path
) -> None:
    (tmp_path / "typo.yaml").write_text("search: {trial: 5}\n")
    (tmp_path / "wrong.yaml").write_text("search: {trials: 1}\n")
    shown = without_torch("compress-and-export", "MODEL", "-o", "out", *arguments, cwd=tmp_path)
    assert shown.code == 2
    assert message in shown.error.splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", ["3/2", "0/2", "2", "a/b", "1/2/3", "-1/2"])
def test_a_wrong_shard_is_answered_before_torch_is_imported(part: str, without_torch: Asked) -> None:
    shown = without_torch("calibrate", "MODEL", "--work", "work", f"--shard={part}")
    assert shown.code == 2
    assert f"error: --shard: must be I/N with I from 1 to N, such as 2/8; got '{part}'" in shown.error.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compress", "A"], "No such command 'compress'. Did you mean compress-and-export?"),
        (["verfy", "A"], "No such command 'verfy'. Did you mean 'verify'?"),
        (["bench", "A", "B"], "bench: unexpected 'B'; it measures one artifact"),
        (["bench", "A", "B", "--", "--enforce-eager"], "bench: unexpected 'B'"),
        (["bench", "A", "--enforce-eager"], "No such option: --enforce-eager"),
        (["bench", "A", "--concurrency", "0"], "error: --concurrency: must be at least 1; got '0'"),
        (["bench", "A", "--repeats", "few"], "error: --repeats: must be a whole number; got 'few'"),
        (["eval", "A", "B"], "unexpected extra argument"),
        (["eval", "A", "--limit", "0"], "Invalid value for '--limit'"),
        (["eval", "A", "--engine", "onnx"], "Invalid value for '--engine'"),
        (["eval", "A", "--tasks", "a", "--text", "b"], "error: eval: --text is for the task made from text"),
        (["serve", "A", "B"], "serve: unexpected 'B'; give one model first, then vLLM's flags"),
        (["serve", "A", "B", "--port", "8001"], "serve: unexpected 'B'"),
        (["serve", "--port", "8001", "A"], "serve: unexpected '--port'; give one model first"),
        (["serve", "A", "B", "--engine", "onnxruntime"], "serve: unexpected 'B'"),
        (["serve", "A", "--engine", "onnx"], "Invalid value for '--engine'"),
        (["generate", "A"], "Missing argument 'prompt'"),
        (["generate", "A", "a", "b"], "unexpected extra argument"),
        (["generate", "A", "a", "--max-tokens", "0"], "Invalid value for '--max-tokens'"),
        (["generate", "A", "a", "--temperature", "-1"], "Invalid value for '--temperature'"),
        (["inspect", "A", "B"], "unexpected extra argument"),
        (["verify", "A", "B"], "unexpected extra argument"),
    ],
)
def test_stray_arguments_are_refused(arguments: list[str], message: str, without_torch: Asked) -> None:
    shown = without_torch(*arguments)
    assert shown.code == 2
    assert message in shown.error.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "passed"),
    [
        (["serve", "A"], []),
        (["serve", "A", "--port", "8001", "--enforce-eager", "-tp=2"], ["--port", "8001", "--enforce-eager", "-tp=2"]),
        (["serve", "A", "--lora-modules", "a=x", "b=y", "--", "--help", "--"], ["--lora-modules", "a=x", "b=y", "--help", "--"]),
        (["serve", "A", "--", "--port", "1"], ["--port", "1"]),
        (["bench", "A", "--repeats", "3"], []),
        (["bench", "A", "--repeats", "3", "--", "--enforce-eager", "--seed", "1"], ["--enforce-eager", "--seed", "1"]),
    ],
)
def test_flags_of_vllm_reach_it_in_their_order(arguments: list[str], passed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr("lrserve.serving.server.serve", lambda model, extra: given.extend((model, extra)))
    monkeypatch.setattr("lrserve.serving.bench.bench", lambda out, vllm_arguments, **_: given.extend((str(out), vllm_arguments)))
    assert CliRunner().invoke(cli.app, arguments).exit_code == 0
    assert given == ["A", passed]


def test_each_engine_has_its_server(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr("lrserve.serving.server.serve", lambda model, extra: given.append(("vllm", model, extra)))
    monkeypatch.setattr("lrserve.serving.onnx_server.serve", lambda model, extra: given.append(("onnxruntime", model, extra)))
    monkeypatch.setattr("lrserve.serving.generation.generate", lambda out, prompt, **options: given.append((prompt, options)))
    arguments = ["serve", "A", "--engine", "onnxruntime", "--port", "1", "--", "--threads", "2"]
    for words in (
        arguments,
        ["serve", "A", "--engine=vllm"],
        ["generate", "A", "What?", "--engine", "vllm", "--raw", "--seed", "3"],
    ):
        assert CliRunner().invoke(cli.app, words).exit_code == 0
    options = {"engine": "vllm", "max_tokens": 256, "temperature": 0.0, "seed": 3, "raw": True}
    assert given == [("onnxruntime", "A", ["--port", "1", "--threads", "2"]), ("vllm", "A", []), ("What?", options)]


def test_a_dry_run_writes_nothing(model: Path, text: Path, tmp_path: Path) -> None:
    small = tmp_path / "small.yaml"
    small.write_text("calibration: {sequences: 4, length: 32}\nreport: {tokens: 128, length: 64}\n")
    shown = ran(
        "compress-and-export",
        str(model),
        "-o",
        str(tmp_path / "out"),
        "--calibration",
        str(text),
        "--recipe",
        str(small),
        "--ratio",
        "0.2",
        *ONNX,
        "--dry-run",
    )
    assert shown.code == 0, shown.error
    assert "uniform ranks would be: qkv" in shown.out
    assert "dry run: would calibrate on 4 x 32 tokens" in shown.out
    assert [p.name for p in tmp_path.iterdir()] == ["small.yaml"]


def test_less_text_than_the_defaults_ask_for_is_used_with_a_warning(model: Path, text: Path, tmp_path: Path) -> None:
    options = ["--calibration", str(text), "--ratio", "0.2", *ONNX, "--dry-run"]
    shown = ran("compress-and-export", str(model), "-o", str(tmp_path / "out"), *options)
    assert shown.code == 0, shown.error
    warnings = [line for line in shown.out.splitlines() if line.startswith("warning: ")]
    for setting in ("calibration.sequences", "report.tokens"):
        assert sum(f"tokens that {setting} asks for; all of them are used" in line for line in warnings) == 1
    used = int(re.search(r"would calibrate on (\d+) x 256 tokens", shown.out)[1])  # type: ignore[index]
    assert 1 <= used < 1024
    assert any(f"has {used * 256:,} of the 262,144 tokens" in line for line in warnings)


def test_a_run_whose_output_is_piped_prints_plain_lines(model: Path, text: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "calibration: {sequences: 4, length: 32}\n"
        "factorization: {fisher: [], refine: none}\n"
        "search: {trials: 3, rank_step: 8, probe_tokens: 64, validation_tokens: 64, validation_length: 32, measured_plans: 1}\n"
        "workloads: {chat: {prompt_tokens: 4, output_tokens: 4, concurrency: 1}}\n"
        "engine: {dtype: float32, repeats: 1}\n"
        "report: {tokens: 100000, length: 32, prompts: 1, prompt_tokens: 8, new_tokens: 4}\n"
    )
    options = ["--calibration", str(text), "--recipe", str(recipe), "--target", "onnx", "--export", "onnx", "--ratio", "0.2"]
    command = [sys.executable, "-c", "from lrserve.cli import main; main()", "compress-and-export", str(model)]
    shown = subprocess.run([*command, "-o", str(tmp_path / "out"), *options], capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr
    assert "2/6 calibrate: covariances of 2 blocks from 128 tokens" in shown.stdout
    for output in (shown.stdout, shown.stderr):
        assert all(character.isprintable() or character == "\n" for character in output), repr(output)
    assert "%|" not in shown.stderr  # no bar
    assert "of the 100,000 tokens that report.tokens asks for; all of them are used" in shown.stdout
    metrics = json.loads((tmp_path / "out" / "lrserve" / "metrics.json").read_text())
    assert metrics["tokens"]["calibration"] == 128
    assert 0 < metrics["tokens"]["report"] == metrics["perplexity"]["report"]["tokens"] < 100_000
    assert "tokens: 100000" in (tmp_path / "out" / "lrserve" / "recipe.yaml").read_text()


def test_a_database_that_is_not_there_is_noticed_before_the_work(model: Path, text: Path, tmp_path: Path) -> None:
    small = tmp_path / "small.yaml"
    small.write_text("calibration: {sequences: 4, length: 32}\nreport: {tokens: 128, length: 64}\n")
    options = ["--calibration", str(text), "--recipe", str(small), "--storage", "sqlite:////no/such/folder/study.sqlite3"]
    shown = ran("compress-and-export", str(model), "-o", str(tmp_path / "out"), *options)
    assert shown.code == 2
    assert "--storage: no study can be kept at the sqlite URL" in shown.error
    assert "calibrate" not in shown.out


def test_inspect_describes_a_dense_model(model: Path) -> None:
    shown = ran("inspect", str(model))
    assert shown.code == 0, shown.error
    assert "gate_up" in shown.out
    assert "192 x 64" in shown.out


def test_json_is_all_of_standard_output(tmp_path: Path) -> None:
    artifact = write_artifact(factorized_model("LlamaForCausalLM"), tmp_path / "model")
    write_manifest(artifact, {"lrserve": "0"}, {})
    command = [sys.executable, "-c", "from lrserve.cli import main; main()", "inspect", str(artifact), "--json"]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)  # nor what libraries print
    assert found["groups"]["qkv"]["structures"] == ["identity_block", "low_rank"]
    assert found["groups"]["qkv"]["ranks"] == [16, 20]
    text = ran("inspect", str(artifact)).out
    assert f"{found['sizes']['model_parameters']['compressed']:,}" in text
    shown = ran("verify", str(artifact), "--json")
    assert json.loads(shown.out)["faults"] == []
    assert json.loads(shown.out)["groups"] == 6
    (artifact / "config.json").unlink()
    shown = ran("verify", str(artifact), "--json")
    assert shown.code == 2
    assert json.loads(shown.out)["faults"] == ["config.json is missing"]
    shown = ran("inspect", str(tmp_path / "nowhere"), "--json")
    assert (shown.code, shown.out) == (2, "")


def test_bench_prints_its_figures_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    def bench(out: Path, say: Any, **_: Any) -> dict[str, Any]:
        say("| a table |")
        return {"engine": "vllm"}

    monkeypatch.setattr("lrserve.serving.bench.bench", bench)
    assert CliRunner().invoke(cli.app, ["bench", "A", "--json"]).stdout == '{"engine": "vllm"}\n'
    assert CliRunner().invoke(cli.app, ["bench", "A"]).stdout == "| a table |\n"


def test_eval_prints_its_figures_as_json_and_hands_on_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def evaluate(out: Path, say: Any, **options: Any) -> dict[str, Any]:
        say("| a table |")
        given.update(options)
        return {"tasks": {}}

    monkeypatch.setattr("lrserve.serving.eval.evaluate", evaluate)
    arguments = ["eval", "A", "--tasks", "a,b", "--tasks", "c.yaml", "--engine", "vllm", "--limit", "7", "--json"]
    assert CliRunner().invoke(cli.app, arguments).stdout == '{"tasks": {}}\n'
    assert (given["tasks"], given["engine"], given["limit"], given["shots"]) == (["a,b", "c.yaml"], "vllm", 7, None)
    assert CliRunner().invoke(cli.app, ["eval", "A"]).stdout == "| a table |\n"


@pytest.mark.parametrize("verb", ["inspect", "serve"])
def test_a_torchvision_that_does_not_fit_torch_is_named(verb: str, model: Path, tmp_path: Path) -> None:
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    path = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    command = [sys.executable, "-c", "from lrserve.cli import main; main()", verb, str(model)]
    shown = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, check=False)
    assert shown.returncode == 2
    assert "pip uninstall torchvision torchaudio torchcodec" in shown.stderr.splitlines()[-1]


@pytest.mark.parametrize("verb", ["verify", "bench", "eval"])
def test_what_is_no_artifact_is_refused(verb: str, model: Path, tmp_path: Path) -> None:
    for folder, message in ((tmp_path / "nowhere", "no folder at"), (model, "has no manifest.json")):
        shown = ran(verb, str(folder))
        assert shown.code == 2
        assert message in shown.error


def test_a_pipe_gets_each_line_when_it_is_printed() -> None:
    code = (
        "import os, signal\n"
        "from lrserve import cli\n"
        "def killed():\n"
        "    print('2/6 calibrate: done')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "cli.app = killed\n"
        "cli.main()\n"
    )
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=buffered, check=False)
    assert (shown.returncode, shown.stdout) == (-9, "2/6 calibrate: done\n")
