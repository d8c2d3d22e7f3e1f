"""The summary of a run: sizes in four units, the table that is printed, and the model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from lrserve.allocation.plan import RankPlan
from lrserve.compression.groups import Group, Structure


def sizes(groups: Sequence[Group], plan: RankPlan, total_parameters: int, head_parameters: int, dtype_bytes: int) -> dict[str, Any]:
    """Return dense and compressed sizes in four units.

    Linear parameters (of the decoder's factorizable linears, biases included), whole-model parameters, bytes of the checkpoint's
    tensors, and FLOPs per token in matrix products (2 per weight: linears and output layer; attention scores, which grow with
    the context, left out).

    Args:
        groups: what the plan allocates.
        plan: their ranks.
        total_parameters: of the dense model, tied weights once.
        head_parameters: of the output layer.
        dtype_bytes: bytes per stored value.
    """
    dense = sum(group.dense_parameters for group in groups)
    compressed = plan.parameters(groups)
    biases = sum(group.bias_entries(None) for group in groups)
    new_biases = sum(group.bias_entries(plan.ranks[group.name]) for group in groups)
    orders = 4 * plan.order_entries(groups)
    rows = {
        "linear_parameters": (dense, compressed),
        "model_parameters": (total_parameters, total_parameters - dense + compressed),
        "bytes": (total_parameters * dtype_bytes, (total_parameters - dense + compressed) * dtype_bytes + orders),
        "flops_per_token": (2 * (dense - biases + head_parameters), 2 * (compressed - new_biases + head_parameters)),
    }
    return {name: {"dense": d, "compressed": c, "ratio": 1 - c / d} for name, (d, c) in rows.items()}


_STRUCTURES: Final[Mapping[Structure, str]] = {
    "identity_block": "low-rank factors (identity blocks)",
    "low_rank": "low-rank factors",
    "narrow": "compressed: MLPs have fewer neurons, other linears are low-rank factors",
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
    """Format a speedup and its spread, as `loadtest.Rounds.speedup_json` gives them."""
    return f"{figures['speedup']:.2f}x ({figures['speedup_lowest']:.2f} to {figures['speedup_highest']:.2f})"


def summary(metrics: Mapping[str, Any]) -> str:
    """Render metrics.json as the table that ends a run: dense against compressed."""
    quality, speed = metrics["perplexity"]["report"], metrics["throughput"]
    rows = [
        [
            "perplexity, report text",
            f"{quality['dense']:.2f}",
            f"{quality['compressed']:.2f}",
            f"{quality['increase']:+.1%}",
        ],
        *(
            [
                f"output tokens/s, {name}: {workload['concurrency']} x ({workload['prompt_tokens']} + {workload['output_tokens']})",
                f"{found['dense']['tokens_per_second']:.1f}",
                f"{found['compressed']['tokens_per_second']:.1f}",
                speedup_cell(found),
            ]
            for name, found in speed["workloads"].items()
            for workload in [metrics["workloads"][name]]
        ),
        ["the same requests, all workloads", "", "", speedup_cell(speed)],
    ]
    names = {
        "linear_parameters": "parameters of the linears",
        "model_parameters": "parameters of the model",
        "bytes": "bytes of the weights",
        "flops_per_token": "FLOPs per token",
    }
    for key, label in names.items():
        size = metrics["sizes"][key]
        rows.append([label, _count(size["dense"]), _count(size["compressed"]), f"{-size['ratio']:+.1%}"])
    return table(["", "dense", "compressed", "change"], rows)


def agreement(metrics: Mapping[str, Any]) -> str:
    """Render how closely the renderings agree with transformers: in float32, and as they are served."""
    rows = [
        [
            engine,
            f"{a['max_logprob_difference']:.1e}",
            f"{a['tolerance']:g}",
            f"{a['greedy_equal']} of {a['greedy_tokens']}",
        ]
        for engine, a in metrics["agreement"].items()
    ]
    in_float32 = table(["engine, float32", "largest log-prob difference", "tolerance", "greedy tokens equal"], rows)
    served = {engine: found["as_served"] for engine, found in metrics["agreement"].items() if "as_served" in found}
    if not served:
        return in_float32
    rows = []
    for engine, found in served.items():
        dense, own = found["dense"], found["compressed"]
        rows.append(
            [
                f"{engine}, {found['dtype']}{', compiled' if found['compiled'] else ''}",
                f"{dense['mean']:.2g} / {own['mean']:.2g}",
                f"{dense['largest']:.2g} / {own['largest']:.2g}",
                f"{dense['greedy_equal']} / {own['greedy_equal']} of {own['greedy_tokens']}",
            ]
        )
    header = ["as served: dense / compressed", "mean log-prob difference", "largest", "greedy tokens equal"]
    factor, floor = ({found[name] for found in served.values()}.pop() for name in ("factor", "floor"))
    allowed = f"Allowed as served: {factor:g} times dense on average, {factor**2:g} times for the largest, and {floor:g} nats more."
    return f"{in_float32}\n\n{table(header, rows)}\n\n{allowed}"


def model_card(metrics: Mapping[str, Any]) -> str:
    """Render the artifact's README.md."""
    model, plan, speed = metrics["model"], metrics["plan"], metrics["throughput"]
    report = metrics["perplexity"]["report"]
    improved = metrics.get("improved", {})
    after = f" After the search the factors were improved: {', '.join(improved)}." if improved else ""
    made = _STRUCTURES[plan["structure"]]
    compiled = "" if metrics["runtime"] == "onnx" else f" {'without' if metrics['enforce_eager'] else 'with'} torch.compile"
    serving = ""
    if "vllm" in metrics["exports"]:
        serving += """    pip install lrserve
    vllm serve PATH_TO_THIS_FOLDER

or in Python, `import lrserve` and then `AutoModelForCausalLM.from_pretrained(...)`. No `trust_remote_code` is needed.

"""
    if "onnx" in metrics["exports"]:
        serving += "`onnx/model.onnx` is the model in float32 for ONNX Runtime, with a KV cache; pad on the right.\n\n"
    return f"""---
library_name: transformers
tags: [lrserve, low-rank, compressed]
---

# {model["name"]}, low-rank, {metrics["target"]}

Made by lrserve {metrics["versions"]["lrserve"]} from {model["name"]} ({model["architecture"]}):
of its {plan["groups"]} groups of linears {plan["factorized"]} are {made}; the others are as they were.{after}

{summary(metrics)}

Perplexity: {report["tokens"]} tokens of report text in windows of {report["length"]}, with
transformers in {metrics["dtype"]}. Throughput: {speed["engine"]}{compiled}, requests at once x (prompt +
output tokens), median and spread of {speed["rounds"]} rounds in turns with the dense model, on the machine that made
this card; `lrserve/report.html` shows the search.

{agreement(metrics)}

## Serve

{serving}The recipe, the rank plan, the Optuna study and every figure are in `lrserve/`.
`lrserve verify` checks the files. The base model's licence applies to these weights.
"""
