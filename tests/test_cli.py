"""The command line as a user meets it: help at once, one clear line for bad input, exit code 2, nothing left behind."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import dense_model, write_dense

import lrserve


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from lrserve.cli import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dense(dense_model("LlamaForCausalLM"), tmp_path_factory.mktemp("cli") / "model")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    rows = ({"text": f"Document {i}: " + "some words that repeat and some that do not, " * 8 + str(i * 7919)} for i in range(400))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_help_takes_less_than_a_second_of_processor_time() -> None:
    run("--help")  # compiles
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    shown = run("--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1
    assert shown.returncode == 0
    for verb in ("compress-and-export", "serve", "bench", "inspect", "verify"):
        assert verb in shown.stdout


def test_importing_the_package_and_its_recipe_imports_no_engine() -> None:
    heavy = ["vllm", "optuna", "onnx", "onnxruntime", "torch", "transformers"]
    code = f"import lrserve.recipe, sys; print([name for name in {heavy} if name in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def test_the_public_api_is_pinned() -> None:
    assert sorted(lrserve.__all__) == ["LowRankLinear", "LrserveError", "RankPlan", "Recipe", "__version__", "compress_and_export"]
    for name in lrserve.__all__:
        assert getattr(lrserve, name) is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere/at/all"], "no model at nowhere/at/all"),
        (["MODEL", "--ratio", "1.5"], "target.ratio: Input should be less than 1; got 1.5"),
        (["MODEL", "--ratio", "0.2", "--min-speedup", "2"], "give one of ratio"),
        (["MODEL", "--export", "tflite"], "no exporter named 'tflite'; --export takes onnx, vllm"),
        (["MODEL", "--calibration", "missing.txt"], "no text file at missing.txt"),
        (["MODEL", "--calibration", "TEXT"], "are needed: give more text, or lower the sequences"),
        (["MODEL", "--recipe", "missing.yaml"], "cannot read the recipe missing.yaml"),
        (["MODEL"], "no calibration text; give --calibration"),
        (["FALCON", "--calibration", "TEXT"], "unsupported architecture: FalconForCausalLM"),
        (["MODEL", "--calibration", "TEXT", "--recipe", "SMALL", "-o", "MODEL"], "holds other files than an lrserve artifact"),
        (["MODEL", "--calibration", "TEXT", "--recipe", "SMALL", "-o", "TEXT/out"], "cannot write to"),
    ],
)
def test_bad_input_is_one_clear_line(arguments: list[str], message: str, model: Path, text: Path, tmp_path: Path) -> None:
    falcon = tmp_path / "falcon"
    falcon.mkdir()
    (falcon / "config.json").write_text(json.dumps({"model_type": "falcon", "architectures": ["FalconForCausalLM"]}))
    (falcon / "model.safetensors").write_bytes(b"")
    small = tmp_path / "small.yaml"
    small.write_text("calibration: {sequences: 4, length: 32}\nreport: {tokens: 128, length: 64}\n")
    places = {"MODEL": model, "TEXT": text, "FALCON": falcon, "SMALL": small}
    words = [str(places.get(head, head)) + rest for head, rest in ((w.split("/")[0], w[len(w.split("/")[0]) :]) for w in arguments)]
    if "-o" not in words:
        words += ["-o", str(tmp_path / "out")]
    before = sorted(p.name for p in tmp_path.iterdir())
    shown = run("compress-and-export", *words, cwd=tmp_path)
    assert shown.returncode == 2, shown.stderr
    last = shown.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
    assert "Traceback" not in shown.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_a_dry_run_writes_nothing(model: Path, text: Path, tmp_path: Path) -> None:
    small = tmp_path / "small.yaml"
    small.write_text("calibration: {sequences: 4, length: 32}\nreport: {tokens: 128, length: 64}\n")
    shown = run(
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
        "--dry-run",
    )
    assert shown.returncode == 0, shown.stderr
    assert "uniform ranks would be: qkv" in shown.stdout
    assert "dry run: would calibrate on 4 x 32 tokens" in shown.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["small.yaml"]


def test_a_database_that_is_not_there_is_noticed_before_the_work(model: Path, text: Path, tmp_path: Path) -> None:
    small = tmp_path / "small.yaml"
    small.write_text("calibration: {sequences: 4, length: 32}\nreport: {tokens: 128, length: 64}\n")
    options = ["--calibration", str(text), "--recipe", str(small), "--storage", "sqlite:////no/such/folder/study.sqlite3"]
    shown = run("compress-and-export", str(model), "-o", str(tmp_path / "out"), *options)
    assert shown.returncode == 2
    assert "--storage: no study can be kept at the sqlite URL" in shown.stderr
    assert "calibrate" not in shown.stdout


def test_inspect_describes_a_dense_model(model: Path) -> None:
    shown = run("inspect", str(model))
    assert shown.returncode == 0, shown.stderr
    assert "gate_up" in shown.stdout
    assert "192 x 64" in shown.stdout


@pytest.mark.parametrize("verb", ["verify", "bench"])
def test_what_is_no_artifact_is_refused(verb: str, model: Path, tmp_path: Path) -> None:
    for folder, message in ((tmp_path / "nowhere", "no folder at"), (model, "has no manifest.json")):
        shown = run(verb, str(folder))
        assert shown.returncode == 2
        assert message in shown.stderr
