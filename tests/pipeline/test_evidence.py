"""Every figure has one source: metrics.json, the card, the report, inspect and the stored tensors say the same."""

from __future__ import annotations

import json
import math
import re
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import dense_model, factorized_model, write_artifact, write_dense, write_text

from lrserve.allocation.goal import Evaluated, Goal
from lrserve.allocation.plan import Offers, Plan
from lrserve.allocation.speed import SpeedModel, shapes_to_measure, token_counts
from lrserve.allocation.study import open_study
from lrserve.compression.groups import Mixture, Structure
from lrserve.compression.level import DENSE
from lrserve.compression.spec import specs_of
from lrserve.engines.protocol import Throughput
from lrserve.engines.workloads import Comparison, MixComparison
from lrserve.pipeline.evidence import collect_metrics, search_report, write_evidence
from lrserve.pipeline.inspect import inspect
from lrserve.pipeline.job import Job, open_job
from lrserve.pipeline.measure import Measured
from lrserve.pipeline.prove import Proof
from lrserve.pipeline.search import Tuned
from lrserve.recipe import Recipe, shares
from lrserve.report.card import made_of
from lrserve.report.sizes import sizes

PROOF = Proof(
    {"vllm": {"max_logprob_difference": 1e-4, "tolerance": 0.005, "greedy_equal": 16, "greedy_tokens": 16}},
    [{"prompt": "Once", "dense": " upon a time", "compressed": " more"}],
)
REPORT = {"dense": 100.0, "compressed": 110.0, "increase": 0.1, "tokens": 128, "length": 32}
VALIDATION = 112.5
"""Perplexity of the improved factors."""


def opened(place: Path, model: Path, structure: Structure, **target: float) -> Job:
    write_text(place / "text.jsonl", 120)
    recipe = Recipe.model_validate(
        {
            "model": str(model),
            "target": target or {"ratio": 0.2},
            "text": {"calibration": str(place / "text.jsonl")},
            "calibration": {"sequences": 8, "length": 32},
            "factorization": {"structure": structure},
            "search": {"rank_step": 4, "probe_tokens": 64, "validation_tokens": 64, "validation_pool": 64, "validation_length": 32},
            "workloads": {"chat": {"share": 3.0}, "decode": {"concurrency": 1, "share": 1.0}, "prefill": {"share": 1.0}},
            "engine": {"dtype": "float32"},
            "report": {"tokens": 64, "length": 32, "prompts": 2, "prompt_tokens": 12, "new_tokens": 8},
            "export": ["vllm"],
        }
    )
    return open_job(recipe, lambda line: None)


def tuned(job: Job, plans: list[tuple[Plan, float, float]], place: Path) -> Tuned:
    """Return what the search would: plans with their perplexity and measured speedup, the first of them chosen."""
    workloads, offers = job.recipe.workloads, Offers(4, job.recipe.structure)
    shapes = shapes_to_measure(job.units, offers)
    table = {shape: dict.fromkeys(token_counts(workloads), 1e-3 * shape.n * (shape.rank or shape.m)) for shape in shapes}
    speed = SpeedModel(job.units, workloads, dict.fromkeys(workloads, 1.0), table, offers)
    measured, trials = [], []
    for number, (plan, perplexity, speedup) in enumerate(plans):
        trials.append(Evaluated(plan, perplexity, 100.0, f"trial {number}", number, nll=(math.log(perplexity),) * 2))
        rounds = Comparison(
            [Throughput(1.0, 1.0, 100)] * 5, [Throughput(1 / (speedup + d), 1.0, 100) for d in (-0.02, -0.01, 0, 0.01, 0.02)]
        )
        comparison = MixComparison(dict.fromkeys(workloads, rounds), shares(workloads), "vllm 0.32.0+cpu")
        measured.append(Measured(trials[-1], speed.speedups(plan), speed.speedup(plan), speed.speedup(plan), comparison))
    goal = Goal(job.recipe.target, 1.0, 100.0)
    open_study("lrserve", place / "study.sqlite3", goal.metrics)
    validation: Any = SimpleNamespace(standard_error=lambda nll: 0.01)
    return Tuned(measured[0], measured, trials, goal, speed, validation, place / "study.sqlite3", 0.0)


def plan_of(job: Job, model: Any) -> Plan:
    """Return the plan that a factorized model came from."""
    specs = model.config.quantization_config["groups"]
    plan = Plan.of_ranks(
        {unit.name: specs[unit.name]["rank"] if unit.name in specs else None for unit in job.units}, job.recipe.structure
    )
    assert set(specs_of(plan.changed(job.units), plan.structure)) == set(specs)
    return plan


def stored(folder: Path) -> dict[str, int]:
    """Count what is in the safetensors files, by nothing but names and shapes in their headers."""
    counts = dict.fromkeys(("linear_parameters", "model_parameters", "bytes", "flops_per_token"), 0)
    head = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            size = math.prod(entry["shape"])
            counts["bytes"] += entry["data_offsets"][1] - entry["data_offsets"][0]
            if name.endswith(".order"):
                continue
            counts["model_parameters"] += size
            linear = re.search(r"\.(self_attn|mlp)\.", name) and "norm" not in name
            counts["linear_parameters"] += size if linear else 0
            counts["flops_per_token"] += 2 * size if linear and len(entry["shape"]) == 2 else 0
            if name == "lm_head.weight" or (name == "model.embed_tokens.weight" and "lm_head.weight" not in header):
                head = 2 * size
    counts["flops_per_token"] += head
    return counts


def inspected(model: Path) -> dict[str, dict[str, int]]:
    """Return the sizes that `lrserve inspect` prints."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in inspect(str(model)).splitlines() if line.startswith("|")]
    begin = next(i for i, row in enumerate(rows) if row[:3] == ["", "dense", "as stored"])
    return {
        row[0].replace(" ", "_"): {"dense": int(row[1].replace(",", "")), "compressed": int(row[2].replace(",", ""))}
        for row in rows[begin + 2 :]
    }


@pytest.mark.parametrize("structure", ["narrow", "low_rank", "identity_block"])
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM", "Gemma3ForCausalLM"])
def test_sizes_are_the_same_everywhere_and_those_of_the_files(architecture: str, structure: Structure, tmp_path: Path) -> None:
    dense = write_dense(dense_model(architecture), tmp_path / "model")
    job = opened(tmp_path, dense, structure)
    model = factorized_model(architecture, structure=structure)
    out = write_artifact(model, tmp_path / "out")
    found = tuned(job, [(plan_of(job, model), 120.0, 1.2)], tmp_path)
    metrics = collect_metrics(job, found, {}, 120.0, PROOF, REPORT)
    write_evidence(job, found, metrics, out)

    written = json.loads((out / "lrserve" / "metrics.json").read_text())["sizes"]
    shown = {name: {side: size[side] for side in ("dense", "compressed")} for name, size in written.items()}
    assert {name: size["compressed"] for name, size in shown.items()} == stored(out)
    assert {name: size["dense"] for name, size in shown.items()} == stored(dense)
    assert inspected(out) == shown
    assert {name: size["compressed"] for name, size in inspected(dense).items()} == stored(dense)
    assert written["linear_parameters"]["ratio"] == pytest.approx(found.chosen.candidate.plan.ratio(job.units))


def test_mixtures_are_reported_by_what_is_left_of_them(tmp_path: Path) -> None:
    job = opened(tmp_path, write_dense(dense_model("MixtralForCausalLM", layers=3), tmp_path / "model"), "narrow")
    mixtures = [unit for unit in job.units if isinstance(unit, Mixture)]
    levels = {unit.name: DENSE for unit in job.units}
    levels |= {mixtures[0].name: mixtures[0].fewer(3), mixtures[1].name: mixtures[1].narrower(24)}
    plan = Plan(levels, "narrow")
    plan.write(tmp_path / "plan.json")
    assert Plan.read(tmp_path / "plan.json") == plan
    found = tuned(job, [(plan, 120.0, 1.2)], tmp_path)
    metrics = collect_metrics(job, found, {}, 120.0, PROOF, REPORT)
    counted = {name: metrics["plan"][name] for name in ("groups", "factorized", "fewer_experts", "narrower_experts")}
    assert counted == {"groups": 9, "factorized": 0, "fewer_experts": 1, "narrower_experts": 1}
    assert made_of(metrics) == "1 are mixtures of fewer experts and 1 are mixtures of narrower experts"
    assert metrics["sizes"]["linear_parameters"]["ratio"] == pytest.approx(plan.ratio(job.units))
    cells = search_report(job, found)["plan"]["kinds"]["experts"]
    assert [(cell["rank"], cell["dense_rank"], cell["of"], cell["kept"]) for cell in cells] == [
        (3, 4, "experts", 0.75),
        (24, 96, "neurons", 0.25),
        (None, 384, None, 1.0),
    ]
    write_evidence(job, found, metrics, tmp_path)
    page = (tmp_path / "lrserve" / "report.html").read_text()
    assert "experts, layer 0: 3 of 4 experts, 75% of the parameters" in page
    assert "experts, layer 1: 24 of 96 neurons of each expert, 25% of the parameters" in page


def test_linears_apart_and_every_structure_in_one_artifact_are_counted(tmp_path: Path) -> None:
    model = factorized_model("Qwen2ForCausalLM", layers=3, apart=True)
    out = write_artifact(model, tmp_path / "out")
    assert {name: size["compressed"] for name, size in inspected(out).items()} == stored(out)


def test_biases_cost_no_flops() -> None:
    """A token is multiplied by every weight once: 2 FLOPs each, whatever is added afterwards."""
    model = dense_model("Qwen2ForCausalLM")
    weights = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2)  # the tied output layer's too, once
    found = sizes(model, {}, 4)["flops_per_token"]
    assert found == {"dense": 2 * weights, "compressed": 2 * weights, "ratio": 0.0}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """An artifact of three measured plans; the first, whose factors were improved, was chosen under a speed target."""
    place = tmp_path_factory.mktemp("evidence")
    dense = write_dense(dense_model("LlamaForCausalLM"), place / "tiny-model")
    (dense / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: [en]\n---\n# A model\n")
    job = opened(place, dense, "low_rank", min_speedup=1.1)
    model = factorized_model("LlamaForCausalLM", structure="low_rank")
    plan = plan_of(job, model)
    found = tuned(job, [(plan, 120.0, 1.2), (plan, 110.0, 1.05), (plan, 130.0, 1.4)], place)
    improved = {"refine": {"method": "adam", "tokens": 128, "steps": 2}}
    metrics = collect_metrics(job, found, improved, VALIDATION, PROOF, REPORT)
    metrics["samples"] = [{"prompt": "some words", "dense": " that repeat", "compressed": " that do not"}]
    out = write_artifact(model, place / "out")
    write_evidence(job, found, metrics, out)
    return out, metrics


def test_the_report_states_the_figures_of_metrics_json(artifact: tuple[Path, dict[str, Any]]) -> None:
    out, metrics = artifact
    page = (out / "lrserve" / "report.html").read_text()
    assert json.loads((out / "lrserve" / "metrics.json").read_text()) == json.loads(json.dumps(metrics))
    shown = dict(re.findall(r"<tr><td>(chat|decode|prefill)</td>(?:<td>[\d +]+</td>){2}<td>(\d+%)</td>", page))
    assert shown == {"chat": "60%", "decode": "20%", "prefill": "20%"}
    assert {name: f"{found['share']:.0%}" for name, found in metrics["throughput"]["workloads"].items()} == shown
    assert "Its validation perplexity is 112.50 (120.00 with the factors of the search" in page
    assert f"It leaves out {metrics['sizes']['linear_parameters']['ratio']:.1%} of the parameters" in page
    assert "<td>perplexity, report text</td><td>100.00</td><td>110.00</td><td>+10.0%</td>" in page
    assert "<td>that do not</td>" in page
    assert metrics["made"]["date"].partition("T")[0] in page
    assert metrics["made"]["machine"]["processor"] in page


def test_the_report_says_why_plans_that_measured_better_were_not_chosen(artifact: tuple[Path, dict[str, Any]]) -> None:
    page = (artifact[0] / "lrserve" / "report.html").read_text()
    assert "the choice is the lowest perplexity of those that reach 1.1x, of those whose spread lies above dense" in page
    reasons = dict(re.findall(r"<li><b>(trial \d)</b> .*?: (.*?)\.</li>", page))
    assert reasons["trial 1"] == "it misses the target: 1.050x measured, 1.1x asked for"
    assert reasons["trial 2"] == "it reaches the target with a higher perplexity: 130.00, the chosen plan 120.00"


def test_the_card_has_the_licence_and_no_path_of_this_machine(artifact: tuple[Path, dict[str, Any]]) -> None:
    out, _ = artifact
    card = (out / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert "language" not in card
    assert "# tiny-model-lrserve" in card
    assert "Its validation perplexity is 112.50 (120.00" in card
    assert str(out.parent) not in card
    assert str(Path.home()) not in card
    assert "/tmp" not in card
    assert str(out.parent) not in (out / "lrserve" / "report.html").read_text()
