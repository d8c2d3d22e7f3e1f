"""A changed constant or default makes anew every stage that its code computes, and no other."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import lrserve.pipeline
from lrserve.allocation.plan import Plan
from lrserve.compression.level import Level
from lrserve.compression.training import TrainedFactors
from lrserve.pipeline import improve
from lrserve.pipeline.stages import MODULES, provenance
from lrserve.storage.work import WorkFolder

ON_SPECTRA = {"spectra", "propagate"}
ON_PLANS = {"probe", "validation", "study", "measure", "repair", "distil"}
SETTINGS: dict[str, set[str]] = {
    "compression.covariance._BLOCK": {"calibration", "gradients", "weighted", "propagate"},
    "compression.factorize._DAMPING": {*ON_SPECTRA, *ON_PLANS},
    "compression.factorize._RIDGE": {*ON_SPECTRA, *ON_PLANS},
    "compression.gradients._SAVED_TOKENS": {"gradients"},
    "compression.logits.LOGIT_ROWS": {"gradients", "probe", "validation", "study", "recover", "distil"},
    "compression.narrow._RIDGE": ON_SPECTRA,
    "compression.narrow._CANDIDATES": ON_SPECTRA,
    "compression.structure.MAX_INTERPOLATION": {*ON_PLANS, "propagate", "refine", "recover"},
    "compression.propagate.STRENGTH": {"propagate"},
    "compression.propagate.propagation.strength": {"propagate"},
    "compression.propagate.propagation.damping": {"propagate"},
    "compression.refine._WARM_UP": {"refine", "repair"},
    "compression.refine._FLOOR": {"refine", "repair"},
    "compression.refine.adam.learning_rate": {"refine", "repair"},
    "compression.training.TRAINED": {"propagate", "refine", "recover"},
    "compression.recover._LEARNING_RATE": {"recover", "distil"},
    "compression.recover._BETAS": {"recover", "distil"},
    "compression.repair._SCALE_UNIT": {"repair", "distil"},
    "compression.repair.repair.learning_rate": {"repair", "distil"},
    "allocation.space._MULTIPLIER": {"study"},
    "allocation.losses._SMALLEST": {"validation", "study"},
    "allocation.goal.FRONT_LIMIT": {"study"},
    "allocation.quality._STANDARD_ERRORS": {"probe", "validation", "study"},
    "allocation.speed._TRUST": {"latency", "study"},
    "engines.timing._MIN_ROUNDS": {"latency"},
    "pipeline.measure._DENSE_RUNS": {"latency", "measure"},
    "report.figures._INK": set(),
    "serving.online._WAVES": set(),
}


def change(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Change a constant, `room.module.NAME`, or a default, `room.module.function.parameter`."""
    room, module, *names = name.split(".")
    holder: Any = importlib.import_module(f"lrserve.{room}.{module}")
    if len(names) == 1:
        value = getattr(holder, names[0])
        monkeypatch.setattr(holder, names[0], (*value, 3) if isinstance(value, tuple) else value + type(value)(1))
    else:
        defaults = getattr(holder, names[0]).__kwdefaults__
        monkeypatch.setitem(defaults, names[1], 2 * defaults[names[1]])


@pytest.mark.parametrize("name", SETTINGS)
def test_stages_that_use_a_setting_are_made_anew_and_no_others(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    work = WorkFolder(tmp_path, said.append, MODULES)
    before = {stage: work.stage(stage, {}) for stage in MODULES}
    change(name, monkeypatch)
    assert {stage for stage, folder in before.items() if work.stage(stage, {}) != folder} == SETTINGS[name]
    assert len(said) == len(SETTINGS[name])
    assert all(name.rpartition(".")[2] in line for line in said)


def test_every_stage_of_the_pipeline_lists_its_modules() -> None:
    found = set()
    for path in Path(lrserve.pipeline.__path__[0]).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("folder.stage", "walked"):
                found.add(ast.unparse(node.args[0]).strip("'"))
    by_runtime = {name for name in found if "runtime.name" in name}  # one stage for each engine
    assert len(by_runtime) == 1
    found |= {"transcripts-vllm", "transcripts-onnxruntime"}
    assert found - by_runtime - {"name"} == set(MODULES)  # `name` is `walked`'s own


RECOVERY = {
    "recovers": True,
    "recover_minutes": 1.0,
    "recover_tokens": 0,
    "recover_batch_tokens": 8,
    "recover_recompute": False,
}


def improved(tmp_path: Path) -> list[str]:
    """The stages of a run that propagates, refines and recovers; nothing is computed."""
    settings = SimpleNamespace(propagate=True, refinement="adam", refine_steps=3, refine_tokens=8, **RECOVERY)
    job: Any = SimpleNamespace(
        recipe=SimpleNamespace(
            factorization=settings, text=SimpleNamespace(recovery=None), calibration=SimpleNamespace(batch_tokens=8), seed=0
        ),
        units=[],
        layers=1,
        dtype=torch.float32,
        windows={"calibration": torch.zeros(2, 8, dtype=torch.int64)},
        recovery_windows=lambda: torch.zeros(1, 8, dtype=torch.int64),
        source=SimpleNamespace(load=lambda dtype: None),
        recovery_processes=1,
        say=lambda line: None,
    )
    plan: Any = SimpleNamespace(
        structure="low_rank", changed=lambda units: [(None, Level(1))], key=Plan.of_ranks({"g": 1}, "low_rank").key
    )
    store: Any = SimpleNamespace(folder=Path("spectra-0"))
    improve.improve_factors(job, plan, store, lambda group: None, WorkFolder(tmp_path, lambda line: None, MODULES))
    return sorted(path.name for path in tmp_path.iterdir())


@pytest.mark.parametrize(("name", "made_anew"), [("propagate.STRENGTH", 3), ("refine._WARM_UP", 2), ("recover._BETAS", 1)])
def test_stage_that_starts_from_changed_factors_is_made_anew(
    name: str, made_anew: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = SimpleNamespace(
        factors=TrainedFactors({}), steps=1, tokens=8, first_divergence=1.0, last_divergence=1.0, reused=False
    )
    monkeypatch.setattr(improve, "walk", lambda *args, **kwargs: TrainedFactors({}))
    monkeypatch.setattr(improve, "recover", lambda *args, **kwargs: outcome)
    before = improved(tmp_path)
    assert [stage.partition("-")[0] for stage in before] == ["propagate", "recover", "refine"]
    assert improved(tmp_path) == before
    change(f"compression.{name}", monkeypatch)
    assert len(improved(tmp_path)) == len(before) + made_anew


@pytest.mark.parametrize(
    "name",
    [
        "compression.refine._WARM_UP",
        "pipeline.agreement.FACTOR",
        "pipeline.improve._PROPAGATED_RATIO",
        "pipeline.probe._PROBE_SHARE",
    ],
)
def test_an_artifact_made_with_other_settings_is_not_taken_for_finished(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    job: Any = SimpleNamespace(provenance=lambda: {"recipe": {}})
    before = provenance(job)
    assert provenance(job) == before
    change(name, monkeypatch)
    assert provenance(job)["recipe"] == before["recipe"]
    assert provenance(job)["code"] != before["code"]
