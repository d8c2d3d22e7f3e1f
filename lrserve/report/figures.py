"""The figures of a search's report: what its plans cost and bring, and how well their speeds were predicted.

A plan's cost is its log perplexity over the dense model's, in nats, which adds up and is what the search minimises.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from lrserve.storage.store import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_INK: Final = "#24292f"  # becomes the page's text colour in an SVG, so that it is read in the light and in the dark
_TRIAL, _FRONT, _MEASURED, _CHOSEN = "#6b8fb5", "#2f7ed8", "#e8710a", "#d6336c"
_WORKLOADS: Final = ("#2f9e6e", "#8a63d2", "#b58900", "#1b9aaa", "#c0564b")
_STYLE: Final[Any] = {
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "legend.frameon": False,
    "svg.hashsalt": "lrserve",
    "text.color": _INK,
    "text.parse_math": False,  # names may hold dollar signs
    "xtick.color": _INK,
    "ytick.color": _INK,
}
_OFFSETS: Final = [(x, y) for r in (7, 13, 22) for x, y in ((r, 0), (-r, 0), (0, r), (0, -r), (r, r), (-r, r), (r, -r), (-r, -r))]


def increase(perplexity: float, dense: float) -> float:
    """Return log(perplexity / dense), and infinity for what is no number."""
    return math.log(perplexity / dense) if 0 < perplexity < math.inf else math.inf


def write_png(figure: Figure, path: Path) -> None:
    """Write a figure on white, whole or not at all."""
    with atomic_path(path) as partial:
        figure.savefig(partial, format="png", dpi=120, facecolor="white")


def svg(figure: Figure, name: str) -> str:
    """Render a figure as an SVG element to stand inside HTML: transparent, and with ids that begin with `name`."""
    text = StringIO()
    with _styled():
        figure.savefig(text, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    element = text.getvalue()
    element = element[element.index("<svg") :].replace(_INK, "currentColor")
    return re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", element)


def pareto(report: Mapping[str, Any]) -> Figure:
    """Draw the increase of log perplexity over the speedup: trials, their front, and measured plans with their spread.

    The y axis ends at three times what the plans of the front usually cost: some trials are worse by orders of magnitude. They are
    drawn at its edge.
    """
    dense = report["dense"]["perplexity"]

    def cost(plan: Mapping[str, Any]) -> float:
        return increase(plan["perplexity"], dense)

    trials, measured = report["trials"], report["measured"]
    front = sorted((t for t in trials if t["front"]), key=lambda t: (t["speedup"], cost(t)))
    low, top = _heights([cost(p) for p in [*trials, *measured]], [cost(p) for p in [*front, *measured]])

    def places(plans: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[float]]:
        return [p["speedup"] for p in plans], [min(cost(p), top) for p in plans]

    with _styled():
        figure, axes = _axes(7.5, 5)
        axes.set_xlabel(f"tokens per second over dense, {report['engine']}, {report['dtype']}")
        axes.set_ylabel("log perplexity over dense, nats")
        axes.axvline(1, color=_INK, linewidth=0.8, linestyle=":")
        axes.axhline(0, color=_INK, linewidth=0.8, linestyle=":")
        axes.plot(*places(front), color=_FRONT, linewidth=1.2, label="predicted front")
        named = _named(trials)
        groups: dict[str, tuple[Callable[[Any], bool], dict[str, Any]]] = {
            "trial": (lambda t: t["complete"] and t not in named, {"color": _TRIAL, "s": 22}),
            "stopped early": (lambda t: not t["complete"], {"facecolor": "none", "edgecolor": _TRIAL, "s": 22, "alpha": 0.6}),
            "allocator": (lambda t: t["complete"] and t in named, {"color": _FRONT, "s": 30, "marker": "s"}),
        }
        for label, (belongs, look) in groups.items():
            if shown := [t for t in trials if belongs(t)]:
                axes.scatter(*places(shown), label=label, zorder=3, clip_on=False, **look)
        axes.scatter([1], [0], color=_INK, marker="D", s=30, zorder=4)
        chosen = [m for m in measured if m["chosen"]]
        for label, plans, color, marker, size in (
            ("measured", [m for m in measured if not m["chosen"]], _MEASURED, "o", 6),
            ("chosen", chosen, _CHOSEN, "*", 13),
        ):
            if plans:
                _spread(axes, *places(plans), plans, "xerr", color=color, label=label, marker=marker, markersize=size, zorder=5)
        axes.set_title(f"{report['title']}, {report['target']}", fontsize=10)
        beyond = [p["perplexity"] for p in [*trials, *measured] if cost(p) > top]
        if beyond:
            reach = f"up to {max(beyond):.2g}" if max(map(cost, [*trials, *measured])) < math.inf else "or infinite"
            note = f"{len(beyond)} at the upper edge: perplexity above {perplexity_text(dense * math.exp(top))}, {reach}"
            axes.axhline(top, color=_INK, linewidth=0.8, linestyle="--", alpha=0.4)
            axes.set_title(note, loc="right", y=0.97, va="top", fontsize=8)
        speeds = [1.0, *(t["speedup"] for t in trials), *(m[end] for m in measured for end in ("lowest", "highest"))]
        axes.set_xlim(*_padded(speeds, 0.07))
        axes.set_ylim(low, top + 0.13 * (top - low))
        right = axes.secondary_yaxis("right")
        right.yaxis.set_major_formatter(lambda value, _: perplexity_text(dense * math.exp(value)))
        right.set_ylabel("validation perplexity")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8)
        texts = [(1.0, 0.0, "dense"), *((m["speedup"], min(cost(m), top), m["origin"]) for m in chosen)]
        texts += [(t["speedup"], min(cost(t), top), t["origin"]) for t in named]
        crowded = [(1.0, 0.0), *zip(*places(trials), strict=True)]
        for here, there in pairwise(front):
            crowded += zip(*(np.linspace(a, b, 20) for a, b in zip(*places([here, there]), strict=True)), strict=True)
        for plan in measured:
            crowded += [(x, min(cost(plan), top)) for x in np.linspace(plan["lowest"], plan["highest"], 20)]
        _write_names(axes, list(dict.fromkeys(texts)), np.array(crowded))
    return figure


def predictions(report: Mapping[str, Any]) -> Figure:
    """Draw measured over predicted speedups, with the diagonal and 5 % about it."""
    measured = report["measured"]
    names = list(report["workloads"])
    parts = {name: [m["workloads"][name] for m in measured if name in m["workloads"]] for name in names if len(names) > 1}
    everything = [*measured, *(part for found in parts.values() for part in found)]
    low, high = _padded([p[key] for p in everything for key in ("predicted", "corrected", "lowest", "highest") if key in p], 0.06)
    with _styled():
        figure, axes = _axes(6, 5.6)
        axes.set_xlabel("predicted tokens per second over dense")
        axes.set_ylabel("measured tokens per second over dense")
        ends = np.array([low, high])
        axes.fill_between(ends, 0.95 * ends, 1.05 * ends, color=_TRIAL, alpha=0.2, linewidth=0, label="within 5 %")
        axes.plot(ends, ends, color=_INK, linewidth=0.8, label="as predicted")
        for index, (name, found) in enumerate(parts.items()):
            color = _WORKLOADS[index % len(_WORKLOADS)]
            places = [p["predicted"] for p in found], [p["speedup"] for p in found]
            _spread(axes, *places, found, "yerr", color=color, label=f"{name}, predicted", marker="v", markersize=4, alpha=0.6)
        speeds = [m["speedup"] for m in measured]
        axes.hlines(speeds, [m["predicted"] for m in measured], [m["corrected"] for m in measured], color=_MEASURED, linewidth=0.8)
        axes.scatter(
            [m["predicted"] for m in measured], speeds, s=34, facecolor="none", edgecolor=_MEASURED, label="plan, predicted"
        )
        for label, plans, color, marker, size in (
            ("plan, corrected", [m for m in measured if not m["chosen"]], _MEASURED, "o", 6),
            ("chosen, corrected", [m for m in measured if m["chosen"]], _CHOSEN, "*", 13),
        ):
            if plans:
                places = [m["corrected"] for m in plans], [m["speedup"] for m in plans]
                _spread(axes, *places, plans, "yerr", color=color, label=label, marker=marker, markersize=size, zorder=5)
        axes.set_xlim(low, high)
        axes.set_ylim(low, high)
        axes.set_aspect("equal")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    return figure


def perplexity_text(value: float) -> str:
    """Format a perplexity, which may be astronomical."""
    return f"{value:.2f}" if value < 1000 else f"{value:.3g}"


def _styled() -> Any:
    from matplotlib import rc_context

    return rc_context(_STYLE)


def _axes(width: float, height: float) -> tuple[Figure, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.grid(alpha=0.2)
    axes.set_axisbelow(True)
    return figure, axes


def _named(trials: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the first trial of each allocator."""
    first: dict[str, Mapping[str, Any]] = {}
    for trial in trials:
        if trial["origin"] not in ("evolution", "dense") and not trial["origin"].startswith("trial "):
            first.setdefault(trial["origin"], trial)
    return list(first.values())


def _heights(costs: Sequence[float], wanted: Sequence[float]) -> tuple[float, float]:
    """Return the ends of the y axis: 0 and all below it, up to three times the median of what is wanted."""
    shown = sorted(c for c in wanted if c < math.inf)
    middle = shown[len(shown) // 2] if shown else 0.0
    finite = [c for c in costs if c < math.inf]
    top = max(min(3 * middle, 1.08 * max(finite, default=0.0), 60.0), 0.02)
    bottom = min(0.0, *finite) if finite else 0.0
    return bottom - 0.08 * (top - bottom), top


def _padded(values: Sequence[float], share: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    pad = max(share * (high - low), 0.05 - (high - low) / 2)
    return low - pad, high + pad


def _spread(axes: Any, x: Sequence[float], y: Sequence[float], plans: Sequence[Mapping[str, Any]], way: str, **look: Any) -> None:
    """Draw points with the spread of their measured speedups."""
    error = [[max(p["speedup"] - p["lowest"], 0) for p in plans], [max(p["highest"] - p["speedup"], 0) for p in plans]]
    axes.errorbar(x, y, **{way: error}, linestyle="none", capsize=3, elinewidth=1, clip_on=False, **look)


def _write_names(axes: Any, texts: Sequence[tuple[float, float, str]], crowded: Any) -> None:
    """Write texts beside their points, each where it covers the fewest of the crowded points (n, 2) and of the texts before it."""
    axes.figure.draw_without_rendering()
    renderer = axes.figure.canvas.get_renderer()
    points = axes.transData.transform(crowded)
    taken: list[Any] = []
    for x, y, text in texts:
        tried = []
        for order, (dx, dy) in enumerate(_OFFSETS):
            sides = ("left", "right")[dx < 0] if dx else "center", ("bottom", "top")[dy < 0] if dy else "center"
            note = axes.annotate(text, (x, y), (dx, dy), textcoords="offset points", ha=sides[0], va=sides[1], fontsize=8)
            note.set_in_layout(False)
            box = note.get_window_extent(renderer).padded(2)
            outside = not (axes.bbox.contains(box.x0, box.y0) and axes.bbox.contains(box.x1, box.y1))
            tried.append((100 * outside + 10 * box.count_overlaps(taken) + box.count_contains(points), order, note, box))
        _, best, note, box = min(tried, key=lambda entry: entry[:2])
        taken.append(box)
        for _, order, other, _ in tried:
            if order != best:
                other.remove()
