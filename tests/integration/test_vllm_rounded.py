"""Rounded artifacts on real vLLM engines, held against transformers in float32: every precision and structure, ranks, LoRA.

In float32 nothing is rounded but the stored weights (`schemes.InFloat32`), so both compute the same. bfloat16 shows that the
engine's kernels for 8 and 4 bits multiply by the same weights, and round inputs as transformers does.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from test_vllm_features import LORA_RANK, continuations, train_adapter
from tiny import VOCABULARY, Rounding, rounded_model, write_artifact
from transformers import AutoModelForCausalLM
from vllm_engine import Serving

import lrserve  # noqa: F401 - registers the quantizer
from lrserve.engines.transcripts import Transcript, transcribe_model
from lrserve.errors import ArtifactError

pytestmark = pytest.mark.engine

NEW_TOKENS = 12
_RANDOM = random.Random(0)
PROMPTS = [[_RANDOM.randrange(VOCABULARY) for _ in range(length)] for length in (40, 1, 17)]
MIXED = [
    Rounding("int8"),
    Rounding("int8", "narrow", 8),
    Rounding("int4_g32", None, 8),
    Rounding("int8", "low_rank"),
    Rounding("int4_g32", "narrow", 8),
]
ALONE = [Rounding("int8", "identity_block"), Rounding("int4_g32", "low_rank"), Rounding("int4_g32", "identity_block")]


def write(folder: Path, architecture: str, *roundings: Rounding) -> tuple[Path, list[Transcript]]:
    """Write an artifact with a layer for each rounding, and return it with what transformers computes."""
    path = write_artifact(rounded_model(architecture, *roundings, layers=len(roundings)), folder / "model")
    return path, transcribe_model(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), PROMPTS, NEW_TOKENS)


def transcribe(serving: Serving, folder: Path, dtype: str = "float32") -> list[Transcript]:
    with serving(folder, dtype=dtype) as engine:
        return engine.transcribe(PROMPTS, NEW_TOKENS)


def assert_agree(reference: list[Transcript], found: list[Transcript], largest: float = 1e-3, mean: float = 1e-4) -> None:
    differences = [
        abs(a - b) for one, other in zip(reference, found, strict=True) for a, b in zip(one.logprobs, other.logprobs, strict=True)
    ]
    print(f"largest {max(differences):.2g}, mean {sum(differences) / len(differences):.2g}")
    assert max(differences) < largest
    assert sum(differences) < mean * len(differences)


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM", "Gemma3ForCausalLM"])
def test_vllm_computes_what_transformers_does(architecture: str, tmp_path: Path, serving: Serving) -> None:
    folder, reference = write(tmp_path, architecture, *MIXED, *(ALONE if architecture == "LlamaForCausalLM" else []))
    assert_agree(reference, transcribe(serving, folder))


def test_sixteen_bit_kernels_multiply_by_the_same_weights(tmp_path: Path, serving: Serving) -> None:
    folder, reference = write(tmp_path, "LlamaForCausalLM", *MIXED)
    assert_agree(reference, transcribe(serving, folder, "bfloat16"), largest=0.4, mean=0.06)  # a dense model's differ by as much


def test_fp8_agrees_where_vllm_has_a_kernel(tmp_path: Path, serving: Serving) -> None:
    folder, reference = write(tmp_path, "LlamaForCausalLM", Rounding("fp8"), Rounding("fp8", "narrow", 4))
    assert_agree(reference, transcribe(serving, folder))


def test_two_ranks_compiled(tmp_path: Path, serving: Serving) -> None:
    whole_groups = Rounding("int4_g32", None, 8, kinds=("qkv", "o", "gate_up"))  # half of 96 inputs are not
    folder, reference = write(tmp_path, "LlamaForCausalLM", Rounding("int8", None, 8), MIXED[1], whole_groups, MIXED[3])
    with serving(folder, enforce_eager=False, tensor_parallel_size=2) as engine:
        assert_agree(reference, engine.transcribe(PROMPTS, NEW_TOKENS))


def test_lora_beside_rounded_layers(tmp_path: Path, serving: Serving) -> None:
    folder, reference = write(tmp_path, "LlamaForCausalLM", MIXED[0], Rounding("int4_g32", None, 8), MIXED[3])
    model = train_adapter(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    model.save_pretrained(tmp_path / "adapter")
    adapted = transcribe_model(model, PROMPTS, NEW_TOKENS)
    assert all(with_it.tokens != without.tokens for with_it, without in zip(adapted, reference, strict=True))
    extra = {"enable_lora": True, "max_lora_rank": LORA_RANK, "max_loras": 1}
    with serving(folder, extra=extra) as engine:
        for expected, found in (
            (adapted, engine.greedy(PROMPTS, NEW_TOKENS, tmp_path / "adapter")[0]),
            (reference, engine.greedy(PROMPTS, NEW_TOKENS)[0]),
        ):
            for one, other in zip(continuations(expected), found, strict=True):
                assert other.tokens == one.tokens
                assert other.margins == pytest.approx(one.margins, abs=0.05)


def test_missing_tensors_fail_the_load_by_name(tmp_path: Path, serving: Serving) -> None:
    from safetensors.torch import load_file, save_file

    folder, _ = write(tmp_path, "Qwen2ForCausalLM", Rounding("int8", None, 8))
    tensors = load_file(folder / "model.safetensors")
    missing = ["self_attn.k_proj.weight_scale", "self_attn.k_proj.bias", "self_attn.qkv_proj.residual_A.weight"]
    for name in missing:
        del tensors[f"model.layers.0.{name}"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    named = ", ".join(f"model.layers.0.{name}" for name in missing).replace(".", r"\.")
    with pytest.raises(ArtifactError, match=f"missing from the checkpoint: {named}"):
        transcribe(serving, folder)


def test_latencies_are_of_the_rounded_layers_and_none_where_there_is_no_kernel(tmp_path: Path, serving: Serving) -> None:
    folder, _ = write(tmp_path, "LlamaForCausalLM", Rounding("int8"))
    plain = {"n": 576, "m": 1536, "rank": None, "structure": "low_rank", "ordered": False}
    factors = {**plain, "rank": 64, "structure": "identity_block"}
    entries = [
        plain,
        *({**plain, "weights": weights, "residual": r} for weights in ("int8", "int4_g32") for r in (0, 16)),
        *({**factors, "weights": weights} for weights in ("int8", "int4_g64")),
    ]
    unsupported = [{**plain, "weights": "int4_g128"}, {**factors, "rank": 40, "weights": "int4_g32"}]
    with serving(folder, dtype="bfloat16") as engine:
        arguments = {"tokens": [1, 8], "dtype": "bfloat16", "seconds": None}
        table = engine._request("latency_table", entries=[*unsupported, *entries], **arguments)["microseconds"]
    assert table[:2] == [None, None]
    assert all(len(row) == 2 and min(row) > 0 for row in table[2:])
