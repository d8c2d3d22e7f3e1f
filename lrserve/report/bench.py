"""What `lrserve bench` shows: the table, bench.md and bench.png, of the figures that serving/bench.py measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lrserve.report.card import speedup_cell, table
from lrserve.report.figures import write_png
from lrserve.report.machine import day, describe
from lrserve.storage.store import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SIDES: Final = {"dense": "#8c98a4", "compressed": "#2f7ed8"}
_PANELS: Final = {
    "output tokens/s: median and spread": ("tokens_per_second", "lowest", "highest"),
    "time to first token, ms: median and p99": ("time_to_first_token_ms", "median", "p99"),
    "time per output token, ms: median and p99": ("time_per_output_token_ms", "median", "p99"),
}


def write_bench(figures: Mapping[str, Any], folder: Path) -> None:
    """Write bench.md and bench.png into a folder that is there."""
    models = figures["models"]
    text = f"# {models['compressed']} against {models['dense']}\n\n{bench_table(figures)}\n"
    with atomic_path(folder / "bench.md") as partial:
        partial.write_text(text, encoding="utf-8")
    write_png(_plot(figures), folder / "bench.png")


def bench_table(figures: Mapping[str, Any]) -> str:
    """Return the figures of `bench` as a Markdown table, and below it what was measured, when and where."""

    def latency(values: Mapping[str, float] | None) -> str:
        return "" if values is None else f"{values['median']:.1f}, {values['p99']:.1f}"

    rows = []
    for name, result in figures["workloads"].items():
        workload = result["workload"]
        title = f"{name}: {workload['concurrency']} x ({workload['prompt_tokens']} + {workload['output_tokens']})"
        for side in _SIDES:
            found = result[side]
            rate = found["tokens_per_second"]
            rows.append(
                [
                    title if side == "dense" else "",
                    side,
                    f"{rate['median']:.1f} ({rate['lowest']:.1f} to {rate['highest']:.1f})",
                    latency(found["time_to_first_token_ms"]),
                    latency(found["time_per_output_token_ms"]),
                    speedup_cell(result) if side == "compressed" else "",
                    result["verdict"] if side == "compressed" else "",
                ]
            )
    header = ["workload", "", "output tokens/s", "first token, ms: median, p99", "per output token, ms: median, p99", "speedup", ""]
    rounds = max(result["rounds"] for result in figures["workloads"].values())
    promised = "" if figures["promised"] is None else f"; the search measured {figures['promised']:.2f}x, without a server"
    arguments = f"; further arguments of vLLM: `{' '.join(figures['vllm_arguments'])}`" if figures["vllm_arguments"] else ""
    return (
        f"{table(header, rows)}\n\n"
        f"All workloads: {speedup_cell(figures['mix'])}{promised}.\n\n"
        f"- dense: {figures['models']['dense']}; compressed: {figures['models']['compressed']}\n"
        f"- {_conditions(figures)}{arguments}\n"
        f"- concurrency x (prompt + output tokens); {rounds} rounds in turns, each with prompts of its own, medians and spread; "
        "`undecided`: dense's speed lies within the spread"
    )


def _conditions(figures: Mapping[str, Any]) -> str:
    settings, made = figures["settings"], figures["made"]
    compiled = "" if settings["runtime"] == "onnx" else ", eager" if settings["enforce_eager"] else ", compiled"
    return f"{figures['engine']}, {settings['dtype']}{compiled}; {describe(made['machine'])}; {day(made)}"


def _plot(figures: Mapping[str, Any]) -> Figure:
    """Draw throughput with its spread and the speedup above it, and median and p99 of both latencies, dense beside compressed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    models, mix = figures["models"], figures["mix"]
    figure.suptitle(
        f"{models['compressed']} against {models['dense']}: speedup {speedup_cell(mix)}\n{_conditions(figures)}",
        fontsize=10,
        parse_math=False,
    )
    names = list(figures["workloads"])
    for axes, (title, (key, low, high)) in zip(figure.subplots(1, len(_PANELS)), _PANELS.items(), strict=True):
        for offset, (side, color) in zip((-0.2, 0.2), _SIDES.items(), strict=True):
            found = [figures["workloads"][name][side][key] for name in names]
            shown = [(index + offset, values) for index, values in enumerate(found) if values is not None]
            heights = [values["median"] for _, values in shown]
            spread = [
                [values["median"] - values[low] for _, values in shown],
                [values[high] - values["median"] for _, values in shown],
            ]
            axes.bar([place for place, _ in shown], heights, 0.4, yerr=spread, capsize=3, label=side, color=color)
        if key == "tokens_per_second":
            for index, name in enumerate(names):
                result = figures["workloads"][name]
                place = {"xytext": (0, 4), "textcoords": "offset points", "ha": "center"}
                axes.annotate(f"{result['speedup']:.2f}x", (index + 0.2, result["compressed"][key]["highest"]), fontsize=9, **place)
            axes.margins(y=0.12)
        axes.set_xticks(range(len(names)), names, parse_math=False)
        axes.set_title(title, fontsize=10)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure
