"""The model card: metadata that the Hub reads, the installation, and nothing of the machine's folders."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from report.synthetic import metrics

from lrserve.report.card import agreement, model_card, summary


def _card(**changes: Any) -> tuple[dict[str, Any], str]:
    _, head, body = model_card(metrics(**changes)).split("---\n", 2)
    return yaml.safe_load(head), body


def test_the_metadata_name_the_base_model_and_the_task() -> None:
    head, body = _card()
    assert head["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert (head["pipeline_tag"], head["library_name"]) == ("text-generation", "transformers")
    assert {"lrserve", "vllm", "onnx"} <= set(head["tags"])
    assert body.strip().splitlines()[0] == "# SmolLM2-135M-Instruct-lrserve"


def test_a_licence_is_stated_where_it_is_known_and_not_invented() -> None:
    head, body = _card()
    assert not any(key.startswith("license") for key in head)
    assert "The base model's licence applies to these weights." in body
    licence = {"license": "other", "license_name": "llama3", "license_link": "LICENSE"}
    head, _ = _card(model={**metrics()["model"], "licence": licence})
    assert {key: head[key] for key in licence} == licence


def test_the_card_says_when_and_where_it_was_made_and_the_exported_perplexity() -> None:
    _, body = _card()
    assert "Made on 2026-11-29 by lrserve 0.1.0 on AMD EPYC, 2 cores, 25 GB; vllm 0.32.0+cpu, torch 2.13.0" in body
    assert "Its validation perplexity is 38.21 (42.40 with the factors of the search" in body
    assert summary(metrics()) in body
    assert agreement(metrics()) in body


@pytest.mark.parametrize(
    ("exports", "wanted", "absent"),
    [
        (["vllm"], ["pip install '.[vllm]'", "pip install '.[cpu]'", "lrserve serve PATH"], [".[onnx]"]),
        (["onnx"], ["pip install '.[onnx]'", "onnx/model.onnx"], ["lrserve serve", ".[vllm]"]),
        (["vllm", "onnx"], ["pip install '.[vllm]'", "pip install '.[onnx]'", "vllm serve PATH"], []),
    ],
)
def test_the_installation_brings_the_engine(exports: list[str], wanted: list[str], absent: list[str]) -> None:
    _, body = _card(exports=exports)
    assert all(text in body for text in wanted)
    assert not any(text in body for text in absent)


def test_the_card_says_what_runs_a_graph_that_is_not_float32() -> None:
    _, before = _card()
    assert "NVIDIA GPUs" not in before
    found = metrics()["agreement"]
    served = {**found["vllm"]["as_served"], "dtype": "float16"}
    _, body = _card(agreement={**found, "onnxruntime": {**found["onnxruntime"], "as_served": served}})
    assert "The graph is in float16, for NVIDIA GPUs: onnxruntime-genai loads it with its build for CUDA." in body


def test_names_that_yaml_would_read_otherwise_are_quoted() -> None:
    head, _ = _card(model={"name": "a: [b]", "architecture": "X", "licence": {}})
    assert head["base_model"] == "a: [b]"
