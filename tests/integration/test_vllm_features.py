"""What users switch on around a factorized layer, on real vLLM engines with tiny random artifacts, held against transformers.

Compiled and eager, tensor parallel, chunked prefill, prefix caching, drafts, LoRA, dummy weights, 16-bit dtypes. A rank takes 10 to
20 seconds to start, and compiling as long, so features that do not hide each other share an engine.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tiny import VOCABULARY, dense_model, factorized_model, write_artifact
from transformers import AutoModelForCausalLM
from vllm_engine import BLOCK, FeatureEngine, Serving

import lrserve  # noqa: F401 - registers the quantizer
from exporters.vllm import low_rank_groups
from lrserve.compression.layers import LowRankLinear
from lrserve.compression.lowrank import install_low_rank
from lrserve.compression.spec import quantization_config
from lrserve.engines.transcripts import Transcript, transcribe_model
from lrserve.pipeline.agreement import agree

pytestmark = pytest.mark.engine

TOLERANCE = 1e-3
NEW_TOKENS = 64

_RANDOM = random.Random(7)  # no two best tokens of the greedy texts are within 9e-4 nats of each other


def _random_prompt(length: int) -> list[int]:
    return [_RANDOM.randrange(VOCABULARY) for _ in range(length)]


PROMPTS = [_random_prompt(length) for length in (100, 1, 17)]
LIKE_THE_FIRST = PROMPTS[0][: 2 * BLOCK] + _random_prompt(9)
"""Shares two blocks with the first prompt."""


@dataclass(frozen=True)
class Case:
    """An artifact, and what transformers computes with it."""

    folder: Path
    reference: list[Transcript]
    """Of `PROMPTS` and then `LIKE_THE_FIRST`."""


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def case_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Case]:
    @cache
    def make(architecture: str, layers: int = 2) -> Case:
        model = factorized_model(architecture, layers=layers, apart=True)
        folder = write_artifact(model, tmp_path_factory.mktemp(architecture) / "model")
        return Case(folder, transcribe_model(load(folder), [*PROMPTS, LIKE_THE_FIRST], NEW_TOKENS))

    return make


@pytest.fixture
def llama(case_of: Callable[..., Case]) -> Case:
    return case_of("LlamaForCausalLM")


def assert_agree(reference: Sequence[Transcript], found: Sequence[Transcript]) -> None:
    """Every log probability, every greedy token, and at each the distance of the second best."""
    equal = agree("vLLM", reference, found, TOLERANCE)
    assert equal["greedy_equal"] == equal["greedy_tokens"] == NEW_TOKENS * len(reference)
    for expected, other in zip(reference, found, strict=True):
        assert other.margins == pytest.approx(expected.margins, abs=2 * TOLERANCE)


def continuations(transcripts: Sequence[Transcript]) -> list[Transcript]:
    return [replace(transcript, logprobs=()) for transcript in transcripts]


def assert_agrees_compiled_and_eager(engine: FeatureEngine, case: Case, ranks: int) -> None:
    """With the first prompt's prefill in three chunks, and a prompt that finds its beginning in the cache."""
    assert_agree(case.reference[:3], engine.transcribe(PROMPTS, NEW_TOKENS))
    found, cached = engine.greedy([LIKE_THE_FIRST], NEW_TOKENS)
    assert cached == [2 * BLOCK]
    assert_agree(continuations(case.reference[3:]), found)
    assert engine.run_eager() == [[True]] * ranks
    assert_agree(case.reference[:3], engine.transcribe(PROMPTS, NEW_TOKENS))


WITH_DRAFTS = ("LlamaForCausalLM", "Qwen2ForCausalLM")


def test_two_ranks_compiled_and_eager(llama: Case, serving: Serving) -> None:
    with serving(llama.folder, enforce_eager=False, tensor_parallel_size=2) as engine:
        assert_agrees_compiled_and_eager(engine, llama, ranks=2)


def test_compiled_and_eager_with_ngram_drafts(case_of: Callable[..., Case], serving: Serving) -> None:
    case = case_of(WITH_DRAFTS[1])
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    extra = {"speculative_config": drafts, "disable_log_stats": False}
    with serving(case.folder, enforce_eager=False, extra=extra) as engine:
        assert_agrees_compiled_and_eager(engine, case, ranks=1)
        drafted, accepted = engine.drafted_and_accepted()
        assert 0 < accepted < drafted


def test_compiled_and_eager_with_a_compressed_draft_model(case_of: Callable[..., Case], serving: Serving, tmp_path: Path) -> None:
    """The draft is the model's own map as other factors: a layer of it that computed anything else would show as refused tokens."""
    case = case_of(WITH_DRAFTS[0])
    draft = write_artifact(as_two_factors(case.folder, WITH_DRAFTS[0]), tmp_path / "model")
    drafts = {"method": "draft_model", "model": str(draft), "num_speculative_tokens": 3}
    extra = {"speculative_config": drafts, "disable_log_stats": False}
    with serving(case.folder, enforce_eager=False, extra=extra) as engine:
        assert_agrees_compiled_and_eager(engine, case, ranks=1)
        drafted, accepted = engine.drafted_and_accepted()
        assert accepted == drafted > NEW_TOKENS


@torch.no_grad()
def as_two_factors(folder: Path, architecture: str) -> Any:
    """The artifact's model with every identity block written out as a plain A."""
    model, twin = load(folder), dense_model(architecture)
    specs = {name: replace(spec, structure="low_rank", ordered=False) for name, spec in low_rank_groups(model).items()}
    install_low_rank(twin, specs)
    twin.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if ".A." not in name}, strict=False)
    for name, layer in twin.named_modules():
        if isinstance(layer, LowRankLinear):
            layer.first.weight.copy_(model.get_submodule(name).first(torch.eye(layer.first.weight.shape[1])).T)
    twin.config.quantization_config = quantization_config(specs)
    return twin


LORA_RANK = 8


def test_lora_adapter_with_replicated_key_heads(case_of: Callable[..., Case], serving: Serving, tmp_path: Path) -> None:
    """PEFT trains an adapter beside every linear of all structures. Four ranks serve it, for two key heads; then without it.

    Not both in one batch: there vLLM's CPU build gives the last adapter to requests that ask for none, dense models included.
    """
    case = case_of("LlamaForCausalLM", layers=3)
    model = train_adapter(load(case.folder))
    model.save_pretrained(tmp_path)
    adapted = transcribe_model(model, PROMPTS, NEW_TOKENS)
    assert all(with_it.tokens != without.tokens for with_it, without in zip(adapted, case.reference, strict=False))

    extra = {"enable_lora": True, "max_lora_rank": LORA_RANK, "max_loras": 1}
    with serving(case.folder, extra=extra, tensor_parallel_size=4) as engine:
        assert_agree(continuations(adapted), engine.greedy(PROMPTS, NEW_TOKENS, tmp_path)[0])
        assert_agree(continuations(case.reference[:3]), engine.greedy(PROMPTS, NEW_TOKENS)[0])


def train_adapter(model: Any) -> Any:
    """LoRA by PEFT's name for all linears, after some steps on the prompts."""
    torch.manual_seed(0)
    options = {"r": LORA_RANK, "lora_alpha": 2 * LORA_RANK, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(model, peft.LoraConfig(**options))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for step in range(12):
        prompt = torch.tensor([PROMPTS[step % len(PROMPTS)]])
        model(input_ids=prompt, labels=prompt).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_dummy_weights_need_no_checkpoint_and_are_all_written(llama: Case, serving: Serving, tmp_path: Path) -> None:
    """vLLM's dummy weights are so small that every token is as probable as any other; memory that nobody wrote is not."""
    (tmp_path / "config.json").write_text((llama.folder / "config.json").read_text())
    with serving(tmp_path, load_format="dummy") as engine:
        for transcript in engine.transcribe(PROMPTS, 4):
            assert transcript.logprobs == pytest.approx([-math.log(VOCABULARY)] * len(transcript.logprobs), abs=0.01)
            assert transcript.margins == pytest.approx([0.0] * 4, abs=0.01)


def test_sixteen_bits_stay_near_float32(llama: Case, serving: Serving) -> None:
    with serving(llama.folder, dtype="float16") as engine:
        for expected, found in zip(llama.reference, engine.transcribe(PROMPTS, 1), strict=False):
            assert found.logprobs == pytest.approx(expected.logprobs, abs=0.03)
