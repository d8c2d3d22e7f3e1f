"""What vLLM does with an artifact that it must not serve, before an engine starts."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from faults.artifacts import change_tensors, make_manifest, whole_artifact

from lrserve.errors import ArtifactError

pytestmark = pytest.mark.engine

CONFIG = """
import sys
from vllm.engine.arg_utils import EngineArgs
EngineArgs(model=sys.argv[1], dtype="float32", max_model_len=64).create_engine_config()
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return whole_artifact(tmp_path_factory.mktemp("whole"), "low_rank")


@pytest.fixture
def artifact(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "out"))


def engine_config(folder: Path) -> Any:
    """What vLLM makes of a folder with lrserve's plugin."""
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(model=str(folder), dtype="float32", max_model_len=64, enforce_eager=True).create_engine_config()


def test_a_whole_artifact_passes(artifact: Path) -> None:
    assert engine_config(artifact).quant_config.get_name() == "lrserve"


@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.embed_tokens.weight", "model.layers.0.input_layernorm.weight", "lm_head.weight"]
)
def test_a_dense_tensor_that_is_missing_is_an_error(name: str, artifact: Path) -> None:
    change_tensors(artifact, {name: None})
    make_manifest(artifact)
    with pytest.raises(ArtifactError, match=f"missing from the checkpoint: {name}"):
        engine_config(artifact)


def test_tensors_and_files_too_many_are_errors(artifact: Path) -> None:
    shutil.copy(artifact / "model.safetensors", artifact / "zz.safetensors")
    with pytest.raises(ArtifactError, match="zz.safetensors is not in the manifest"):
        engine_config(artifact)
    (artifact / "zz.safetensors").unlink()
    change_tensors(artifact, {"model.layers.0.self_attn.q_proj.bias": torch.zeros(128)})
    make_manifest(artifact)
    with pytest.raises(ArtifactError, match="not in the model that config.json describes: model.layers.0.self_attn.q_proj.bias"):
        engine_config(artifact)


def test_vllm_without_the_plugin_refuses_artifacts(artifact: Path) -> None:
    environment = {**os.environ, "VLLM_PLUGINS": ""}
    done = subprocess.run(
        [sys.executable, "-c", CONFIG, str(artifact)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "Unknown quantization method: lrserve" in done.stderr
