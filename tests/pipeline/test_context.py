"""What fits into a model's context: counted as the engines count it, defaults shortened, what was given refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from lrserve.errors import InputError
from lrserve.pipeline.context import context_length, fitted
from lrserve.recipe import Recipe, Workload


@pytest.mark.parametrize(
    ("model_type", "rope", "engines", "context"),
    [
        ("llama", {"rope_type": "default"}, ["vllm"], 1000),
        ("llama", {"rope_type": "linear", "factor": 2.5}, ["vllm"], 2500),
        ("llama", {"rope_type": "dynamic", "factor": 2.0}, ["vllm"], 2000),
        ("llama", {"rope_type": "linear", "factor": 2.0}, ["vllm", "onnx"], 1000),
        ("llama", {"rope_type": "linear", "factor": None}, ["vllm"], 1000),
        ("llama", {"rope_type": "llama3", "factor": 8.0}, ["vllm"], 1000),
        ("qwen2", {"rope_type": "yarn", "factor": 4.0}, ["vllm"], 1000),
        ("gemma3_text", {"full_attention": {"rope_type": "linear", "factor": 8.0}}, ["vllm"], 1000),
    ],
)
def test_the_context_is_what_the_engines_run(model_type: str, rope: dict[str, Any], engines: list[str], context: int) -> None:
    config = SimpleNamespace(max_position_embeddings=1000, model_type=model_type, rope_parameters=rope)
    assert context_length(config, engines) == context


def recipe(**settings: Any) -> Recipe:
    return Recipe.model_validate({"model": "m", **settings})


def longest(made: Recipe) -> int:
    windows = [made.calibration.length, made.search.validation_length, made.report.length]
    return max([*windows, *(w.prompt_tokens + w.output_tokens for w in made.requests.values())])


@pytest.mark.parametrize("context", [16, 17, 64, 100, 511, 1055, 1056, 2047])
def test_defaults_are_shortened_in_one_line(context: int) -> None:
    lines: list[str] = []
    made = fitted(recipe(), context, lines.append)
    assert longest(made) <= context
    assert Recipe.model_validate(made.model_dump()) == made  # within every bound
    (line,) = lines
    assert f"context is {context} tokens" in line
    assert f"calibration.length {context}" in line
    assert made.calibration.length == context


def test_what_fits_stays() -> None:
    lines: list[str] = []
    given = recipe(calibration={"length": 4096}, workloads={"a": Workload(prompt_tokens=4000, output_tokens=96)})
    assert fitted(given, 4096, lines.append) is given
    assert lines == []


def test_what_was_given_stays_and_the_rest_is_shortened() -> None:
    made = fitted(recipe(report={"prompt_tokens": 90}, search={"validation_length": 100}), 100, print)
    assert (made.report.prompt_tokens, made.report.new_tokens, made.search.validation_length) == (90, 10, 100)
    assert fitted(recipe(report={"new_tokens": 98}), 100, print).report.prompt_tokens == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"calibration": {"length": 101}}, r"calibration\.length 101 is more than the model's context of 100 tokens"),
        ({"report": {"prompt_tokens": 100}}, r"report\.prompt_tokens 100 and report\.new_tokens 32 together are more"),
        ({"report": {"new_tokens": 99}}, r"report\.new_tokens 99"),
        ({"workloads": {"a": {"prompt_tokens": 60, "output_tokens": 41}}}, r"workloads\.a\.prompt_tokens 60"),
    ],
)
def test_what_was_given_is_refused_by_its_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        fitted(recipe(**settings), 100, print)


def test_a_context_of_a_few_tokens_is_refused() -> None:
    with pytest.raises(InputError, match="the model's context is 15 tokens"):
        fitted(recipe(), 15, print)
