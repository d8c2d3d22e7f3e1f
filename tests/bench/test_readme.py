"""The int8 row of README's table is the dense model, rounded; every row is measured alike."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lrserve.engines.transcripts import Transcript
from lrserve.recipe import PROFILES, Recipe
from readme import label_of, perplexity, render


def test_perplexity_is_of_all_tokens_that_have_a_context() -> None:
    class Uniform:
        def transcribe(self, prompts: Any, new_tokens: int) -> list[Transcript]:
            return [Transcript(logprobs=(math.log(0.5),) * (len(prompt) - 1), tokens=(0,), margins=(0.0,)) for prompt in prompts]

    engine: Any = Uniform()
    windows = torch.zeros(3, 5, dtype=torch.long)
    done: list[None] = []
    assert perplexity(engine, windows, lambda: done.append(None)) == pytest.approx(2.0)
    assert len(done) == 3


@pytest.mark.parametrize(
    ("target", "label"),
    [({"min_speedup": 1.25}, "lrserve at 1.25x"), ({"ratio": 0.3}, "lrserve, ratio 0.3"), ({}, "lrserve, front")],
)
def test_rows_are_named_by_their_target(target: dict[str, float], label: str, tmp_path: Path) -> None:
    (tmp_path / "lrserve").mkdir()
    (tmp_path / "lrserve" / "recipe.yaml").write_text(Recipe.model_validate({"model": "m", "target": target}).to_yaml())
    assert label_of(tmp_path) == label


def test_the_table_fits_into_readme() -> None:
    speed = {"speedup": 1.234, "speedup_lowest": 0.987, "speedup_highest": 1.501}
    rows = [
        {"model": "dense, bfloat16", "perplexity": 20.911, "bytes": 2.69e8},
        {
            "model": "lrserve at 1.25x",
            "perplexity": 1234.5,
            "bytes": 2.69e9,
            "speed": {**speed, "workloads": dict.fromkeys(PROFILES, speed)},
        },
    ]
    lines = render(rows, PROFILES).splitlines()
    assert max(map(len, lines)) <= 120
    assert lines[2].split("|")[4].strip() == "1"
    assert lines[3].count("1.23 (0.99-1.50)") == 4
