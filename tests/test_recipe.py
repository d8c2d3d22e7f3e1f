"""Recipes: defaults, overrides, round trip, clear refusals."""

from __future__ import annotations

from pathlib import Path

import pytest

from lrserve.errors import InputError
from lrserve.recipe import PROFILES, Recipe, Workload, shares


def test_defaults_overrides_and_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("model: some/model\ntarget: {ratio: 0.4}\nsearch: {trials: 7}\n")
    recipe = Recipe.load(path, {"search.trials": 9, "seed": None, "target.ratio": None, "export": ["onnx"]})
    assert (recipe.model, recipe.target.ratio, recipe.search.trials, recipe.export) == ("some/model", 0.4, 9, ("onnx",))
    again = tmp_path / "again.yaml"
    again.write_text(recipe.to_yaml())
    assert Recipe.load(again, {}) == recipe
    assert Recipe.load(None, {"model": "m"}).target.front
    assert not recipe.target.front
    assert str(Recipe.load(None, {"model": "m"}).target) == "front"
    assert Recipe.load(None, {"model": "m"}).workloads == PROFILES
    assert str(Recipe.load(path, {"target.min_speedup": 1.3}).target) == "min-speedup 1.3"


def test_workloads_share_the_machines_time(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("model: m\nworkloads:\n  a: {concurrency: 2, share: 3}\n  b: {}\n")
    workloads = Recipe.load(path, {}).workloads
    assert workloads == {"a": Workload(concurrency=2, share=3.0), "b": Workload()}
    assert shares(workloads) == {"a": 0.75, "b": 0.25}


def test_a_structure_is_one_that_plans_know() -> None:
    assert Recipe.load(None, {"model": "m", "factorization.structure": "low_rank"}).structure == "low_rank"
    with pytest.raises(InputError, match="factorization.structure: Input should be 'identity_block', 'low_rank' or 'narrow'"):
        Recipe.load(None, {"model": "m", "factorization.structure": "narrow_in"})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model": "m", "search.generations": 3}, r"search\.generations"),
        ({"model": "m", "factorization.refine": "none", "factorization.refine_steps": 3}, "counts steps of Adam"),
        ({"model": "m", "factorization.recover_minutes": 1.0, "factorization.refine_steps": 3}, "refine is none"),
        ({"model": "m", "factorization.recover_minutes": float("inf")}, "finite number"),
        ({}, "no model: give one"),
        ({"model": "m", "target.ratio": 1.5}, r"target\.ratio: .*less than 1; got 1\.5"),
        ({"model": "m", "target.ratio": 0.2, "target.min_speedup": 2.0}, "give one of ratio"),
        ({"model": "m", "search.trials": 0}, r"search\.trials"),
        ({"model": "m", "workloads": {}}, "workloads: Dictionary should have at least 1 item"),
        ({"model": "m", "workloads": {"a": {"share": 0}}}, r"workloads\.a\.share"),
        ({"model": "m", "engine.runtime": "tgi"}, "engine.runtime: Input should be 'vllm' or 'onnx'"),
        ({"model": "m", "search.trial": 5}, r"search\.trial: Extra inputs"),
    ],
)
def test_refusals_name_the_setting(overrides: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Recipe.load(None, overrides)


def test_unreadable_recipes(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read the recipe"):
        Recipe.load(tmp_path / "nowhere.yaml", {})
    path = tmp_path / "recipe.yaml"
    path.write_text("a: [")
    with pytest.raises(InputError, match="not YAML"):
        Recipe.load(path, {})
    path.write_text("- 1\n")
    with pytest.raises(InputError, match="holds a list"):
        Recipe.load(path, {})
    path.write_text("search: 3\n")
    with pytest.raises(InputError, match="search must hold settings"):
        Recipe.load(path, {"search.trials": 4})
