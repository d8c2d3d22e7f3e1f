"""Bounds, speedups and limits of bench/speed.py, by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from lrserve.allocation.plan import Plan
from lrserve.compression.groups import allocated, find_groups
from lrserve.compression.level import Level
from lrserve.recipe import Recipe
from shape import recipe_for
from speed import LOADS, MODELS, PREFILL, PREFILL_LOAD, Contender, model_config, render, rows_of

LINEARS, HEAD = 106_168_320, 576 * 49152  # of SmolLM2
SCALES = 4 * 30 * (576 + 2 * 192 + 576 + 2 * 1536 + 576)  # bytes of int8's, one for each output
READ, MULTIPLIED = 50e9, 500e9  # bytes and operations a second


@pytest.fixture(scope="module")
def contenders() -> dict[str, Contender]:
    with torch.device("meta"):
        groups = find_groups(AutoModelForCausalLM.from_config(model_config("smollm2")))
    nothing = Plan.of_ranks(dict.fromkeys((group.name for group in groups), None), "low_rank")
    narrow = Plan.of_ranks({u.name: 768 if u.fed_by else None for u in allocated(groups, "narrow")}, "narrow")
    config = model_config("smollm2")
    return {
        "dense": Contender(config, groups, nothing),
        "half": Contender(config, groups, narrow),
        "int8": Contender(config, groups, Plan(dict.fromkeys(nothing.levels, Level(weights="int8")), "low_rank"), "int8"),
    }


def test_the_bound_is_the_longer_of_reading_and_multiplying(contenders: dict[str, Contender]) -> None:
    dense, int8 = contenders["dense"], contenders["int8"]
    assert dense.read_bytes == 2 * (LINEARS + HEAD)
    assert dense.bound("1 request", (READ, MULTIPLIED)) == (pytest.approx(2 * (LINEARS + HEAD) / READ), "memory")
    assert dense.bound("32 requests", (READ, MULTIPLIED)) == (pytest.approx(2 * 32 * (LINEARS + HEAD) / MULTIPLIED), "arithmetic")
    attention = 30 * 9 * 64 * 4 * PREFILL * (PREFILL + 1) / 2
    prompt = 2 * LINEARS * PREFILL + 2 * HEAD + attention
    assert dense.bound(PREFILL_LOAD, (READ, MULTIPLIED)) == (pytest.approx(prompt / MULTIPLIED), "arithmetic")
    assert int8.bound("1 request", (READ, MULTIPLIED)) == (pytest.approx((LINEARS + SCALES + 2 * HEAD) / READ), "memory")
    assert int8.bound("32 requests", (READ, MULTIPLIED)) is None


def timed(step: float, prefill: float) -> dict[str, Any]:
    return {"decode": {"1": step, "8": 2 * step, "32": 4 * step}, "prefill": prefill, "rates": [READ, MULTIPLIED]}


def test_rows_compare_round_by_round(contenders: dict[str, Contender]) -> None:
    rounds = {
        "dense": [timed(0.010, 0.4), timed(0.020, 0.8), timed(0.012, 0.5)],
        "half": [timed(0.008, 0.2), timed(0.010, 0.4), timed(0.008, 0.2)],
        "int8": [timed(0.005, 0.2), timed(0.005, 0.2), timed(0.005, 0.2)],
    }
    matmuls = {label: dict.fromkeys(LOADS, 0.002) for label in ("dense", "half")}
    result = {"rounds": rounds, "matmuls": matmuls}
    rows = {(row["plan"], row["load"]): row for row in rows_of(contenders, result)}
    assert len(rows) == len(contenders) * len(LOADS)
    half = rows["half", "1 request"]
    assert (half["speedup"], half["speedup_lowest"], half["speedup_highest"]) == pytest.approx((1.5, 1.25, 2.0))
    assert half["matmuls"] == pytest.approx(0.002 / 0.008)
    assert half["limit"] == pytest.approx(contenders["dense"].read_bytes / contenders["half"].read_bytes)
    assert half["share_of_bound"] == pytest.approx(contenders["half"].read_bytes / READ / 0.008)
    assert "speedup" not in rows["dense", "1 request"]
    assert "bound" not in rows["int8", PREFILL_LOAD]
    shown = render("smollm2", list(rows.values()), result, False)
    assert "1.50x (1.25 to 2.00)" in shown
    assert "50 to 50 GB/s, 500 to 500 GFLOP/s" in shown
    assert "3 rounds in turns" in shown


def test_every_shape_has_its_models_size() -> None:
    def parameters(name: str) -> float:
        with torch.device("meta"):
            return sum(p.numel() for p in AutoModelForCausalLM.from_config(model_config(name)).parameters())

    expected = {"smollm2": 135, "1b": 1100, "llama-1b": 1236, "0.5b": 494, "8b": 8030}
    assert {name: round(parameters(name) / 1e6) for name in MODELS} == expected


@pytest.mark.parametrize("short", [False, True])
def test_recipes_for_shapes_are_valid(short: bool, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    texts = {use: tmp_path / use for use in ("calibration", "validation", "report")}
    file.write_text(yaml.safe_dump(recipe_for(tmp_path / "model", texts, 1.3, 1536, short)), encoding="utf-8")
    target = Recipe.load(file, {}).target
    assert (target.ratio, target.min_speedup) == ((0.4, None) if short else (None, 1.3))
