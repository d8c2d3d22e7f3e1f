"""Stage 5: what is rounded is repaired, what is judged is exported, and what is worse is given up."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import dense_model, write_dense, write_text

from lrserve.allocation.plan import Plan
from lrserve.allocation.quality import Validation, negative_log_likelihood
from lrserve.compression.level import DENSE, Level
from lrserve.compression.rounding import Rounding
from lrserve.compression.spectra import SpectrumStore
from lrserve.pipeline.improve import Improved, improve_factors, validate_improved
from lrserve.pipeline.job import Job, open_job
from lrserve.pipeline.run import calibrate_blocks, factorize_groups, rounding_of
from lrserve.pipeline.stages import MODULES
from lrserve.recipe import Recipe
from lrserve.storage.work import WorkFolder, work_folder

ROUNDED = {"qkv": Level(weights="int4_g32", residual=4), "o": Level(weights="int8")}
MIXED = {**ROUNDED, "down": Level(64, "int4_g32", 4)}


class Run:
    """A job, what its first stages left, and a plan of it."""

    def __init__(
        self, place: Path, folder: WorkFolder, levels: dict[str, Level], text: dict[str, str] | None = None, **factorization: Any
    ) -> None:
        trains = not {"refine", "recover_minutes", "recover_tokens"} & factorization.keys()
        settings: dict[str, Any] = {
            "model": str(place / "model"),
            "text": {"calibration": str(place / "text.jsonl"), **(text or {})},
            "calibration": {"sequences": 16, "length": 32},
            "factorization": {"fisher": [], "refine_tokens": 512, **({"refine_steps": 8} if trains else {}), **factorization},
            "engine": {"dtype": "float32"},
        }
        self.lines: list[str] = []
        self.job: Job = open_job(Recipe.load(None, settings), self.lines.append)
        model = self.job.source.load(self.job.dtype)
        statistics = calibrate_blocks(self.job, model, folder)
        self.store: SpectrumStore = factorize_groups(self.job, model, statistics, None, folder)
        self.rounding: Rounding = rounding_of(self.job, statistics, None)
        self.plan = Plan({unit.name: levels.get(unit.kind, DENSE) for unit in self.job.units}, self.job.recipe.structure)
        self.folder, self.dense = folder, model

    def improved(self) -> Improved:
        return improve_factors(self.job, self.plan, self.store, lambda group: None, self.folder, self.rounding)

    def logits(self, improved: Improved) -> torch.Tensor:
        model = self.job.compressed_model(self.plan, improved.factors, self.rounding, improved.repairs)
        with torch.no_grad():
            logits: torch.Tensor = model(self.job.windows["prompts"]).logits
        return logits

    def validated(self, improved: Improved, searched: float) -> tuple[Improved, float]:
        windows = self.job.windows["validation"][:4]
        candidate = SimpleNamespace(plan=self.plan, perplexity=searched)
        validation = Validation(windows, negative_log_likelihood(self.dense, windows).tolist())
        tuned: Any = SimpleNamespace(chosen=SimpleNamespace(candidate=candidate), validation=validation)
        return validate_improved(self.job, tuned, improved, self.store, self.rounding)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("improve")
    write_dense(dense_model("LlamaForCausalLM"), place / "model")
    write_text(place / "text.jsonl", 400)
    return place


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[WorkFolder]:
    with work_folder(tmp_path / "work", lambda line: None, MODULES) as folder:
        yield folder


def stages(folder: WorkFolder) -> set[str]:
    return {path.name.partition("-")[0] for path in folder.root.iterdir() if path.is_dir()} - {"calibration", "spectra"}


@pytest.mark.parametrize(("levels", "expected"), [(ROUNDED, ["repair"]), (MIXED, ["refine", "repair"])])
def test_a_rounded_plan_is_repaired_after_its_factors_are_refined(
    levels: dict[str, Level], expected: list[str], place: Path, folder: WorkFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(place, folder, levels)
    found = run.improved()
    assert list(found.done) == expected
    assert stages(folder) == set(expected)
    assert found.done["repair"] == {"tokens": 512, "steps": 8}
    assert (found.factors is run.store) == ("refine" not in expected)
    plain = Improved(found.factors, None, {})
    assert (run.logits(found) - run.logits(plain)).abs().max() > 1e-3
    monkeypatch.setattr("lrserve.compression.refine._loss", None)  # a second run trains nothing
    assert torch.equal(run.logits(run.improved()), run.logits(found))


def test_a_rounded_plan_is_recovered_as_a_rounded_model(place: Path, folder: WorkFolder) -> None:
    run = Run(place, folder, MIXED, recover_minutes=0.02)
    found = run.improved()
    assert list(found.done) == ["recover"]
    assert stages(folder) == {"distil"}
    assert found.factors is run.store
    assert found.repairs is not None
    assert "model.norm.weight" in found.repairs.tensors
    assert run.logits(found).isfinite().all()


def test_a_recovery_may_have_a_text_of_its_own(place: Path, folder: WorkFolder) -> None:
    text = write_text(place / "recovery.jsonl", 300, repetitions=2)
    levels, tokens = {"down": Level(64)}, {"recover_tokens": 4096, "recover_batch_tokens": 512}
    run = Run(place, folder, levels, text={"recovery": str(text)}, **tokens)
    found = run.improved()
    assert found.done["recover"]["tokens"] == 4096
    assert stages(folder) == {"recovery", "recover"}
    assert any(f"4096 tokens of {text}" in line for line in run.lines)
    assert torch.equal(run.logits(run.improved()), run.logits(found))
    assert run.job.provenance() != Run(place, folder, levels, **tokens).job.provenance()


def test_plans_without_few_bits_have_no_repairs(place: Path, folder: WorkFolder) -> None:
    found = Run(place, folder, {"down": Level(64)}).improved()
    assert list(found.done) == ["refine"]
    assert found.repairs is None
    for nothing in (Run(place, folder, ROUNDED, refine="none"), Run(place, folder, {"o": Level(weights="int8")})):
        assert nothing.improved() == Improved(nothing.store, None, {})


def test_what_is_worse_than_the_search_is_given_up(place: Path, folder: WorkFolder) -> None:
    run = Run(place, folder, MIXED)
    found = run.improved()
    kept, perplexity = run.validated(found, 1e9)
    assert kept is found
    factors, without = run.validated(Improved(found.factors, None, {"refine": {}}), 1e9)
    assert factors.repairs is None
    assert perplexity != without
    assert run.validated(found, 1.0) == (Improved(run.store, None, {}), 1.0)
    assert sum("given up" in line for line in run.lines) == 2  # all of it, then the factors alone
    assert found.repairs is not None
    found.repairs.tensors["model.layers.0.input_layernorm.weight"].mul_(100)
    kept, perplexity = run.validated(found, without)
    assert list(kept.done) == ["refine"]
    assert kept.repairs is None
    assert perplexity == without
