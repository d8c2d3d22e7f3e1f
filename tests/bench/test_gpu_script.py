"""bench/gpu.py as a whole, on the CPU and at a tiny shape, where nothing is installed but torch, transformers and lrserve."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import gpu

ABSENT = ("vllm", "onnx", "onnx_ir", "onnxruntime", "optuna", "scipy", "sklearn", "matplotlib", "gguf", "datasets")
SCRIPT = Path(gpu.__file__)
ALONE = (
    f"import sys, runpy; sys.modules.update(dict.fromkeys({ABSENT!r})); sys.path.insert(0, {str(SCRIPT.parent)!r}); "
    f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
)


def test_the_script_runs_every_part_without_a_gpu(tmp_path: Path) -> None:
    out = tmp_path / "tiny.json"
    command = [sys.executable, "-c", ALONE, "--device", "cpu", "--shape", "tiny", "--out", str(out)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(out.read_text())
    assert (found["device"], found["shape"], found["errors"], found["left_out"]) == ("cpu", "tiny", {}, [])
    assert {"made", "commit", "versions"} <= found.keys()
    for dtype in ("float32", "bfloat16"):  # the device is the CPU itself
        assert found["agreement"][dtype] == dict.fromkeys(gpu.STAGES, 0.0)
    assert list(found["stages"]) == list(gpu.STAGES)
    assert all(stage["seconds"] > 0 and stage["peak_bytes"] is None for stage in found["stages"].values())
    assert all(rate > 0 for rate in found["rates"].values())
    dense, factors, narrow = found["layers"]
    assert [(row["kind"], row["n"], row["m"], row["rank"]) for row in found["layers"]] == [
        ("dense", 64, 128, None),
        ("factors", 64, 128, 16),
        ("narrow", 64, 64, None),
    ]
    assert (dense["bytes"], factors["bytes"], narrow["bytes"]) == (2 * 64 * 128, 2 * 16 * (64 + 128), 2 * 64 * 64)
    for row in found["layers"]:
        assert row["tokens"] == list(gpu.TOKENS)
        assert min(*row["us"], *row["bound_us"]) > 0
        assert sorted(row["bound_us"]) == row["bound_us"]
        read, multiplied = row["bytes"] / found["rates"]["bytes"], 256 * row["bytes"] / found["rates"]["operations"]
        assert row["bound_us"][-1] == pytest.approx(1e6 * max(read, multiplied))


def test_without_a_gpu_the_script_says_what_to_do(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == 2
    assert "torch finds no CUDA device here" in capsys.readouterr().err


def test_a_part_that_fails_or_comes_too_late_does_not_cost_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no such kernel")

    out = tmp_path / "tiny.json"
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--shape", "tiny", "--out", str(out)])
    monkeypatch.setattr(gpu, "agreement", fail)
    monkeypatch.setattr(gpu, "layer_times", lambda *_: monkeypatch.setattr(gpu, "SECONDS", -1.0))
    assert gpu.main() == 1
    found = json.loads(out.read_text())
    assert found["errors"] == {"agreement": "RuntimeError: no such kernel"}
    assert found["left_out"] == ["stages"]
    assert found["rates"]["bytes"] > 0
