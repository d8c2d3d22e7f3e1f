"""A small job with both exports, and a load in vLLM, where nothing of lrserve is installed but its wheel: `make soak`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from integration.test_wheel import fresh, place, run, wheel  # noqa: F401 - fixtures
from tiny import dense_model, write_dense, write_text

pytestmark = pytest.mark.soak

SETTINGS: dict[str, Any] = {
    "target": {"ratio": 0.2},
    "calibration": {"sequences": 8, "length": 32, "pool_sequences": 4, "batch_tokens": 64},
    "factorization": {"weights": [], "fisher_tokens": 128, "propagate": False, "refine": "none"},
    "search": {
        "rank_step": 8,
        "depth_groups": 1,
        "probe_tokens": 64,
        "validation_tokens": 128,
        "validation_pool": 256,
        "validation_length": 32,
        "measured_plans": 1,
    },
    "workloads": {"chat": {"prompt_tokens": 8, "output_tokens": 4, "concurrency": 2}},
    "engine": {"dtype": "float32", "enforce_eager": True, "repeats": 1},
    "report": {"tokens": 64, "length": 32, "prompts": 1, "prompt_tokens": 12, "new_tokens": 4},
}
LOAD = """
import os, sys
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
from vllm import LLM, SamplingParams
llm = LLM(sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=64, max_num_seqs=2, kv_cache_memory_bytes=2**26)
[answer] = llm.generate("some words", SamplingParams(max_tokens=4, ignore_eos=True))
print(len(answer.outputs[0].token_ids), sys.modules["lrserve.plugins.vllm.layers"].__file__)
"""


def test_a_small_job_ends_and_vllm_loads_the_result(fresh: Path, place: Path) -> None:  # noqa: F811
    write_dense(dense_model("LlamaForCausalLM"), place / "model")
    write_text(place / "text.jsonl", 200)
    settings = {"model": "model", "text": {"calibration": "text.jsonl"}, **SETTINGS}
    (place / "recipe.yaml").write_text(json.dumps(settings))  # JSON is YAML
    run(fresh, ["lrserve", "compress-and-export", "--recipe", "recipe.yaml", "--trials", "3", "-o", "out"], place)
    assert (place / "out" / "onnx" / "model.onnx").is_file()
    tokens, layers = run(fresh, ["python", "-c", LOAD, "out"], place).splitlines()[-1].split()
    assert tokens == "4"
    assert Path(layers).is_relative_to(fresh)
