"""The ONNX folder of SmolLM2-135M in onnxruntime-genai, optimum and transformers.js, unmodified: `make soak`.

Each loads model, tokenizer and chat template itself and continues the same chats greedily as transformers does. Two chats of
unequal lengths are padded as each program pads: onnxruntime-genai on the right, the other two on the left.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from exporters.onnx import OnnxExporter
from exporters.onnx_profiles import LEFT_PADDING, Profile
from lrserve.inputs.demo import demo_model
from lrserve.inputs.source import Source, open_source

pytestmark = pytest.mark.soak

HERE = Path(__file__).parent
PROMPTS = [
    "Write a short story about a lighthouse keeper who finds a letter in a bottle.",
    "List ten things that a beginner should know about growing tomatoes on a balcony, and explain each of them in a sentence.",
]
NEW_TOKENS = 32
PROFILES: tuple[Profile, ...] = ("genai", "portable")


@pytest.fixture(scope="module")
def environments() -> Path:
    """The folder in which `make soak` made the environments of optimum and transformers.js."""
    assert "LRSERVE_SOAK" in os.environ, "run these tests by: make soak"
    return Path(os.environ["LRSERVE_SOAK"])


@pytest.fixture(scope="module")
def source() -> Source:
    return open_source(str(demo_model()))


@pytest.fixture(scope="module")
def folders(source: Source, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The model's ONNX folder in both profiles."""
    model = source.load(torch.float32)
    out = tmp_path_factory.mktemp("soak")
    for profile in PROFILES:
        (out / profile).mkdir()
        OnnxExporter(profile).export(model, source.path, out / profile, torch.float32)
    return {profile: out / profile / "onnx" for profile in PROFILES}


@pytest.fixture(scope="module")
def expected(source: Source) -> list[list[int]]:
    """What transformers continues each chat with, alone."""
    model, tokenizer = source.load(torch.float32), source.tokenizer()
    found, lengths = [], set()
    for prompt in PROMPTS:
        chat = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        tokens = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        lengths.add(inputs["input_ids"].shape[1])
        found.append(tokens[0, inputs["input_ids"].shape[1] :].tolist())
    assert len(lengths) == len(PROMPTS)
    assert all(len(tokens) == NEW_TOKENS and tokenizer.eos_token_id not in tokens for tokens in found)
    return found


def command(program: str, environments: Path) -> list[str]:
    """How a program's script is run in its environment."""
    match program:
        case "genai":
            return [sys.executable, str(HERE / "genai_generate.py")]
        case "optimum":
            return [str(environments / "optimum/bin/python"), str(HERE / "optimum_generate.py")]
        case _:  # node looks for packages beside the script
            script = shutil.copy(HERE / "transformers_js_generate.mjs", environments / "js")
            return ["node", str(script)]


def generate(program: str, environments: Path, folder: Path, prompts: list[str]) -> dict[str, Any]:
    request = json.dumps({"folder": str(folder), "prompts": prompts, "new_tokens": NEW_TOKENS})
    done = subprocess.run(command(program, environments), input=request, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("program", ["genai", "optimum", "transformers.js"])
def test_loads_and_continues_as_transformers_does(
    program: str, profile: Profile, environments: Path, folders: dict[str, Path], expected: list[list[int]]
) -> None:
    for prompt, tokens in zip(PROMPTS, expected, strict=True):
        assert generate(program, environments, folders[profile], [prompt]) == {"tokens": [tokens]}
    batch = generate(program, environments, folders[profile], PROMPTS)
    if profile == "genai" and program != "genai":  # which pad on the left
        assert LEFT_PADDING in batch["error"]
    else:
        assert batch == {"tokens": expected}
