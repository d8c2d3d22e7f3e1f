"""What a run says of itself in tables, printed and in report.html, and the model card."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import yaml

from lrserve.compression.groups import FAMILIES, Structure
from lrserve.report.machine import day, describe

Rows = list[list[str]]

SUMMARY_HEADER: Final = ("", "dense", "compressed", "change")
MEASURED_HEADER: Final = ("measured plans", "perplexity, validation text", "nats", "bytes of the linears", "all workloads")
AGREEMENT_HEADER: Final = (
    "engine",
    "float32: largest difference, nats",
    "tolerance",
    "equal tokens",
    "as served: mean difference (dense)",
    "equal tokens (dense)",
)

_STRUCTURES: Final[Mapping[Structure, str]] = {
    "identity_block": "low-rank factors (identity blocks)",
    "low_rank": "low-rank factors",
    "narrow": "smaller (MLPs have fewer neurons, other linears are low-rank factors)",
}
_NAMED: Final = 4  # groups in a line
_INSTALL: Final = {
    "vllm": """    pip install '.[vllm]'    # on a machine with a GPU
    pip install '.[cpu]'     # on an x86-64 machine without one
""",
    "onnx": """    pip install '.[onnx]'    # for ONNX Runtime; '.[onnx-gpu]' on a machine with a GPU
""",
}


def _count(value: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return f"{value:g}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a Markdown table with aligned columns."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *rest = (cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths, strict=True)))
        return "| " + " | ".join([first, *rest]) + " |"

    rule = "|" + "|".join("-" * (w + 1) + ("-" if i == 0 else ":") for i, w in enumerate(widths)) + "|"
    return "\n".join([line(header), rule, *map(line, rows)])


def speedup_cell(figures: Mapping[str, Any]) -> str:
    """Format a speedup and its spread, as `workloads.Rounds.speedup_json` gives them."""
    return f"{figures['speedup']:.2f}x ({figures['speedup_lowest']:.2f} to {figures['speedup_highest']:.2f})"


def quality_rows(metrics: Mapping[str, Any]) -> Rows:
    """Return the perplexity on the report text as a row of the summary."""
    quality = metrics["perplexity"]["report"]
    return [["perplexity, report text", f"{quality['dense']:.2f}", f"{quality['compressed']:.2f}", f"{quality['increase']:+.1%}"]]


def speed_rows(metrics: Mapping[str, Any]) -> Rows:
    """Return the measured throughputs, by workload and of all, as rows of the summary."""
    speed = metrics["throughput"]
    rows = [
        [
            f"output tokens/s, {name}: {workload['concurrency']} x ({workload['prompt_tokens']} + {workload['output_tokens']})",
            f"{found['dense']['tokens_per_second']:.1f}",
            f"{found['compressed']['tokens_per_second']:.1f}",
            speedup_cell(found),
        ]
        for name, found in speed["workloads"].items()
        for workload in [metrics["workloads"][name]]
    ]
    return [*rows, ["the same requests, all workloads", "", "", speedup_cell(speed)]]


def size_rows(metrics: Mapping[str, Any]) -> Rows:
    """Return the sizes (`sizes.sizes`) as rows of the summary."""
    names = {
        "linear_parameters": "parameters of the linears",
        "model_parameters": "parameters of the model",
        "bytes": "bytes of the weights",
        "flops_per_token": "FLOPs per token",
    }
    return [
        [label, _count(size["dense"]), _count(size["compressed"]), f"{0.0 - size['ratio']:+.1%}"]
        for key, label in names.items()
        for size in [metrics["sizes"][key]]
    ]


def summary(metrics: Mapping[str, Any]) -> str:
    """Render metrics.json as the tables that end a run: dense against compressed, and what else was measured."""
    own = table(SUMMARY_HEADER, [*quality_rows(metrics), *speed_rows(metrics), *size_rows(metrics)])
    return "\n\n".join([own, table(MEASURED_HEADER, measured_rows(metrics)), *not_finite(metrics)])


def not_finite(metrics: Mapping[str, Any]) -> list[str]:
    """Say in one line what was left dense, and which trials did not count, since a number was not finite; empty for nothing."""
    found = metrics.get("not_finite") or {"left_dense": {}, "trials": 0}
    left = [f"{name} ({why})" for name, why in found["left_dense"].items()]
    shown = ", ".join([*left[:_NAMED], *[f"{len(left) - _NAMED} more"] * (len(left) > _NAMED)])
    parts = [f"{len(left)} groups stay dense: {shown}"] * bool(left)
    parts += [f"{found['trials']} trials do not count"] * bool(found["trials"])
    return [f"Numbers that are not finite: {'; '.join(parts)}."] if parts else []


def measured_rows(metrics: Mapping[str, Any]) -> Rows:
    """Return the dense model and every measured plan, with the factors of the search: what could be served instead."""
    dense = metrics["perplexity"]["validation"]["dense"]
    rows = [["dense", f"{dense:.2f}", "", "100%", "1x"]]
    for plan in metrics["measured_plans"]:
        loss = math.log(plan["validation_perplexity"] / dense) if math.isfinite(plan["validation_perplexity"]) else math.inf
        name = f"{plan['origin']}{' (chosen)' if plan['chosen'] else ''}"
        rows.append(
            [name, f"{plan['validation_perplexity']:.2f}", f"{loss:+.3f}", f"{plan['linear_bytes']:.0%}", speedup_cell(plan)]
        )
    return rows


def made_of(metrics: Mapping[str, Any]) -> str:
    """Say what was done to the groups of linears."""
    plan = metrics["plan"]
    done = [f"{plan['factorized']} are {_STRUCTURES[plan['structure']]}"] * bool(plan["factorized"])
    done += [f"{fewer} are mixtures of fewer experts" for fewer in [plan.get("fewer_experts")] if fewer]
    done += [f"{narrower} are mixtures of narrower experts" for narrower in [plan.get("narrower_experts")] if narrower]
    done += [f"{count} have weights in {weights.partition('_')[0]}" for weights, count in plan["rounded"].items()]
    done += [f"{plan['residuals']} have a low-rank residual beside them"] * bool(plan["residuals"])
    return " and ".join(done) or "none is changed"


def agreement_rows(metrics: Mapping[str, Any]) -> Rows:
    """Return how closely each engine agrees with transformers in prompt log probabilities and greedy tokens, one row an engine.

    In float32 with the compressed model in memory; as served, where that was compared, beside what the dense model shows.
    """
    rows = []
    for engine, a in metrics["agreement"].items():
        served = ["", ""]
        if found := a.get("as_served"):
            dense, own = found["dense"], found["compressed"]
            served = [f"{own['mean']:.1e} ({dense['mean']:.1e})"]
            served += [f"{own['greedy_equal']} ({dense['greedy_equal']}) of {own['greedy_tokens']}"]
        float32 = ["", "", ""]
        if "max_logprob_difference" in a:
            equal = f"{a['greedy_equal']} of {a['greedy_tokens']}"
            float32 = [f"{a['max_logprob_difference']:.1e}", f"{a['tolerance']:g}", equal]
        rows.append([engine, *float32, *served])
    return rows


def agreement(metrics: Mapping[str, Any]) -> str:
    """Render `agreement_rows`, and what was allowed as served."""
    rendered = table(AGREEMENT_HEADER, agreement_rows(metrics))
    served = [found["as_served"] for found in metrics["agreement"].values() if "as_served" in found]
    if not served:
        return rendered
    factor, floor = served[0]["factor"], served[0]["floor"]
    ways = " and ".join(dict.fromkeys(f"{s['dtype']}, {'compiled' if s['compiled'] else 'not compiled'}" for s in served))
    rounded = [s["rounded"]["mean"] for s in served if "rounded" in s]
    beside = (
        f" or, if that is more, of what rounding inputs changes in transformers ({max(rounded):.1e} on average)" if rounded else ""
    )
    return (
        f"{rendered}\n\nAs served is {ways}; in brackets the dense model. Allowed: {factor:g} times the mean and {factor**2:g} "
        f"times the largest difference of the dense model{beside}, and {floor:g} nats more."
    )


def validation(metrics: Mapping[str, Any]) -> str:
    """Say the validation perplexity of the exported factors and, if they were improved after it, that of the search."""
    found = metrics["perplexity"]["validation"]
    searched = ""
    if found["searched"] != found["compressed"]:
        searched = f" ({found['searched']:.2f} with the factors of the search, before they were improved)"
    return f"Its validation perplexity is {found['compressed']:.2f}{searched}, that of the dense model {found['dense']:.2f}."


def made_line(metrics: Mapping[str, Any]) -> str:
    """Say when, where and with which versions the artifact was made."""
    versions = metrics["versions"]
    others = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers") if name in versions)
    return (
        f"Made on {day(metrics['made'])} by lrserve {versions['lrserve']} on {describe(metrics['made']['machine'])}; "
        f"{versions['engine']}, {others}."
    )


def _is_multimodal(metrics: Mapping[str, Any]) -> bool:
    family = FAMILIES.get(metrics["model"]["architecture"])
    return family is not None and family.multimodal


def _front_matter(metrics: Mapping[str, Any]) -> str:
    """Return the YAML at the head of the card; the licence is the base model's, where its card states one."""
    model = metrics["model"]
    multimodal = _is_multimodal(metrics)
    data = {
        "base_model": model["name"],
        "base_model_relation": "quantized",  # the Hub's word for a compressed form of the same model
        **model["licence"],
        "pipeline_tag": "image-text-to-text" if multimodal else "text-generation",
        "library_name": "transformers",
        "tags": ["lrserve", "low-rank", "compressed", *metrics["exports"]],
    }
    return yaml.safe_dump(data, sort_keys=False, default_flow_style=None, allow_unicode=True)


def _serving(metrics: Mapping[str, Any]) -> str:
    exports = metrics["exports"]
    text = "Install lrserve in a clone of its repository:\n\n"
    text += "".join(_INSTALL[name] for name in exports if name in _INSTALL)
    if "vllm" in exports:
        loader = "AutoModelForImageTextToText" if _is_multimodal(metrics) else "AutoModelForCausalLM"
        text += f"""    lrserve serve PATH_TO_THIS_FOLDER    # OpenAI API on 127.0.0.1:8000

`vllm serve PATH_TO_THIS_FOLDER` works too, and so does `{loader}.from_pretrained(...)` in Python after
`import lrserve`. `lrserve bench PATH_TO_THIS_FOLDER` measures it against the dense model on your machine. No
`trust_remote_code` is needed.
"""
    if "onnx" in exports:
        text += (
            "\n`onnx/model.onnx` is the model for ONNX Runtime, with a KV cache; onnxruntime-genai, optimum and "
            "transformers.js load the folder. Unless it was made with `--onnx-profile portable`, it refuses batches that are "
            "padded on the left.\n"
        )
        served = metrics["agreement"].get("onnxruntime", {}).get("as_served", {})
        if (dtype := served.get("dtype", "float32")) != "float32":
            text += f"\nThe graph is in {dtype}, for NVIDIA GPUs: onnxruntime-genai loads it with its build for CUDA.\n"
    return text


def model_card(metrics: Mapping[str, Any]) -> str:
    """Render the artifact's README.md."""
    model, plan, speed = metrics["model"], metrics["plan"], metrics["throughput"]
    report = metrics["perplexity"]["report"]
    improved = metrics.get("improved", {})
    after = f" After the search it was improved: {', '.join(improved)}." if improved else ""
    compiled = "" if metrics["runtime"] == "onnx" else f" {'without' if metrics['enforce_eager'] else 'with'} torch.compile"
    return f"""---
{_front_matter(metrics)}---

# {model["name"].rpartition("/")[2]}-lrserve

{model["name"]} ({model["architecture"]}), compressed by lrserve to the target {metrics["target"]}:
of its {plan["groups"]} groups of linears {made_of(metrics)}.{after}

{summary(metrics)}

{made_line(metrics)}
Perplexity: {report["tokens"]} tokens of report text in windows of {report["length"]}, with transformers in {metrics["dtype"]}.
{validation(metrics)}
Throughput: {speed["engine"]}{compiled}, requests at once x (prompt + output tokens), median and spread of
{speed["rounds"]} rounds in turns with the dense model on that machine. `lrserve/report.html` shows the search.

{agreement(metrics)}

## Serve

{_serving(metrics)}
The recipe, the plan, the Optuna study and every figure are in `lrserve/`. `lrserve verify` checks the files.
The base model's licence applies to these weights.
"""
