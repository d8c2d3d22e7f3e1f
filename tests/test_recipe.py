"""Recipes: defaults, overrides, round trip, clear refusals."""

from __future__ import annotations

import re
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from lrserve.errors import InputError
from lrserve.recipe import PROFILES, Recipe, Workload, _names, shares


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


@pytest.mark.parametrize(
    ("given", "cpu", "gpu"),
    [
        ({}, (16, 16), (64, 256)),
        ({"rank_step": 8}, (8, 8), (8, 8)),
        ({"width_step": 128}, (16, 128), (64, 128)),
        ({"rank_step": 32, "width_step": 96}, (32, 96), (32, 96)),
    ],
)
def test_steps_that_are_left_out_are_those_of_the_device(given: dict[str, int], cpu: tuple[int, int], gpu: tuple[int, int]) -> None:
    search = Recipe.load(None, {"model": "m", "search": given}).search
    assert (search.steps(gpu=False), search.steps(gpu=True)) == (cpu, gpu)


def test_workloads_share_the_machines_time(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("model: m\nworkloads:\n  a: {concurrency: 2, share: 3}\n  b: {}\n")
    workloads = Recipe.load(path, {}).workloads
    assert workloads == {"a": Workload(concurrency=2, share=3.0), "b": Workload()}
    assert shares(workloads) == {"a": 0.75, "b": 0.25}


def test_a_structure_is_one_that_plans_know() -> None:
    assert Recipe.load(None, {"model": "m", "factorization.structure": "low_rank"}).structure == "low_rank"
    with pytest.raises(
        InputError, match="factorization.structure: must be 'identity_block', 'low_rank' or 'narrow'; got 'narrow_in'"
    ):
        Recipe.load(None, {"model": "m", "factorization.structure": "narrow_in"})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"factorization.refine": "none", "factorization.refine_steps": 3}, "factorization: refine_steps counts steps of Adam"),
        ({"factorization.recover_minutes": 1.0, "factorization.refine_steps": 3}, "refine is none"),
        (
            {"factorization.recover_minutes": 1.0, "factorization.recover_tokens": 8},
            "give recover_minutes or recover_tokens, not both",
        ),
        ({"text.recovery": "owner/name"}, "the recipe: text.recovery needs factorization.recover_tokens"),
        ({"factorization.recover_minutes": float("inf")}, "factorization.recover_minutes: must be a finite number; got inf"),
        ({"target.ratio": 1.5}, "target.ratio: must be below 1; got 1.5"),
        ({"target.ratio": 0}, "target.ratio: must be above 0; got 0"),
        ({"target.ratio": 0.2, "target.min_speedup": 2.0}, "target: give only one of ratio"),
        ({"search.trials": 0}, "search.trials: must be at least 3; got 0"),
        ({"search.trials": "many"}, "search.trials: must be a whole number; got 'many'"),
        ({"search.trials": 3.5}, "search.trials: must be a whole number; got 3.5"),
        ({"search.speed_weight": []}, "search.speed_weight: must be a number; got []"),
        ({"factorization.propagate": "perhaps"}, "factorization.propagate: must be true or false; got 'perhaps'"),
        ({"factorization.fisher": ["qkv", "v"]}, "factorization.fisher.1: must be 'qkv', 'o', 'gate_up' or 'down'; got 'v'"),
        ({"text.calibration": 3}, "text.calibration: must be text; got 3"),
        ({"search": 3}, "search: must be settings by name; got 3"),
        ({"workloads": {}}, "workloads: must have at least 1 entry; got {}"),
        ({"workloads": {"a": {"share": 0}}}, "workloads.a.share: must be above 0; got 0"),
        ({"workloads": {1: {}}}, "workloads.1: must be text; got 1"),
        ({"export": "onnx"}, "export: must be a list; got 'onnx'"),
        ({"engine.runtime": "tgi"}, "engine.runtime: must be 'vllm' or 'onnx'; got 'tgi'"),
        ({"search.trial": 5}, "there is no setting search.trial; did you mean search.trials?"),
        ({"serch": {"trials": 5}}, "there is no setting serch; did you mean search?"),
        ({"trials": 5}, "there is no setting trials; did you mean search.trials?"),
        (
            {"workloads": {"a": {"concurency": 5}}},
            "there is no setting workloads.a.concurency; did you mean workloads.a.concurrency?",
        ),
        ({"xyzzy": 5}, "there is no setting xyzzy; docs/recipe.md lists them"),
    ],
)
def test_refusals_name_the_setting_in_plain_words(overrides: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as caught:
        Recipe.load(None, {"model": "m", **overrides})
    assert message in str(caught.value)


JUNK = [
    None,
    "x",
    "",
    [],
    {},
    1.5,
    -1,
    0,
    True,
    float("nan"),
    float("inf"),
    b"x",
    date(2020, 1, 1),
    [1],
    {1: 2},
    {"a": 1},
    "x" * 999,
]


@pytest.mark.parametrize("name", [*_names(Recipe), *_names(Workload, "workloads.a.")])
def test_no_value_of_any_setting_is_answered_in_pydantics_words(name: str) -> None:
    for value in JUNK:
        data: dict[str, Any] = {"model": "m"}
        *parents, leaf = name.split(".")
        place = data
        for parent in parents:
            place = place.setdefault(parent, {})
        place[leaf] = value
        try:
            Recipe.load(None, data)
        except InputError as error:
            message = str(error)
            assert not re.search("should|valid |instance|Input|permitted|parse|\\n", message), message
            assert name.split(".")[0] in message or "no model" in message
            assert len(message) < 250


def test_refusals_name_the_flag_that_gave_the_value(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("model: m\nsearch: {trials: 1}\n")
    flags = {"target.ratio": "--ratio", "target.min_speedup": "--min-speedup", "search.trials": "--trials", "export": "--export"}

    def refused(**overrides: object) -> str:
        with pytest.raises(InputError) as caught:
            Recipe.load(path, {name.replace("__", "."): value for name, value in overrides.items()}, flags)
        return str(caught.value)

    assert refused(search__trials=2) == "--trials: must be at least 3; got 2"
    assert refused(search__trials=None) == f"search.trials (recipe {path}): must be at least 3; got 1"
    assert refused(search__trials=5, target__ratio=1.5, export=None) == "--ratio: must be below 1; got 1.5"
    both = refused(search__trials=5, target__ratio=0.2, target__min_speedup=2.0)
    assert both.startswith("--ratio and --min-speedup: give only one of ratio, min_speedup, max_bytes and max_ppl_increase")
    assert refused(search__trials=5, export=[1]) == "--export: must be text; got 1"
    path.write_text("model: m\nsearch: {trails: 5}\n")
    assert refused() == f"there is no setting search.trails (recipe {path}); did you mean search.trials?"


def test_a_long_value_is_cut() -> None:
    with pytest.raises(InputError) as caught:
        Recipe.load(None, {"model": "m", "search.sampler": "x" * 5000})
    assert str(caught.value).endswith("; got '" + "x" * 99 + "...")


def test_a_recipe_without_a_model_is_refused() -> None:
    with pytest.raises(InputError, match="no model: give one"):
        Recipe.load(None, {})


def test_unreadable_recipes(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere.yaml' cannot be read: FileNotFoundError"):
        Recipe.load(tmp_path / "nowhere.yaml", {})
    path = tmp_path / "recipe.yaml"
    path.write_text("a: [")
    with pytest.raises(InputError, match="cannot be read: ParserError"):
        Recipe.load(path, {})
    path.write_text("- 1\n")
    with pytest.raises(InputError, match="holds a list"):
        Recipe.load(path, {})
    path.write_text("search: 3\n")
    with pytest.raises(InputError, match="search must hold settings"):
        Recipe.load(path, {"search.trials": 4})
