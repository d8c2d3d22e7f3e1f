"""The figures of a search's report: what its plans cost and bring, and how well their speeds were predicted.

A plan's cost is its log perplexity over the dense model's, in nats, which adds up and is what the search minimises.
"""

from __future__ import annotations

import math
import re
import textwrap
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
_SPEEDS: Final = ("speedup", "lowest", "highest")
_LARGEST_COST: Final = 60.0  # nats; the exponential of much more overflows
_COSTS_ALIKE: Final = 0.02  # nats; the axis of costs reaches at least so far
_SPEEDS_ALIKE: Final = 0.1  # an axis of speedups reaches at least so far around the median
_NEAR: Final = 13  # points; a text further off has a line to what it names
_DIRECTIONS: Final = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))
_OFFSETS: Final = [(r * x, r * y) for r in (7, _NEAR, 22, 35, 50, 70, 95) for x, y in _DIRECTIONS]


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

    The axes show the dense model, the chosen plan and what is usual (`_heights`, `_usual`). Plans beyond are triangles at the edge,
    and a line above the axes says how far out they are.
    """
    dense = report["dense"]["perplexity"]
    trials, measured = report["trials"], report["measured"]
    chosen = [m for m in measured if m["chosen"]]

    def cost(plan: Mapping[str, Any]) -> float:
        return increase(plan["perplexity"], dense)

    front = sorted((t for t in trials if t["front"]), key=lambda t: (t["speedup"], cost(t)))
    x = _usual(
        [p[key] for p in [*trials, *measured] for key in _SPEEDS if key in p],
        [1.0, *(m[key] for m in chosen for key in _SPEEDS)],
    )
    y = _heights([cost(p) for p in [*trials, *measured]], [cost(p) for p in [*front, *measured]], [cost(p) for p in chosen])

    def places(plans: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[float]]:
        return [_clamped(p["speedup"], x) for p in plans], [_clamped(cost(p), y) for p in plans]

    def inside(plan: Mapping[str, Any]) -> bool:
        return x[0] <= plan["speedup"] <= x[1] and y[0] <= cost(plan) <= y[1]

    limits = _padded(x, 0.07)
    with _styled():
        figure, axes = _axes(7.5, 5)
        figure.suptitle(f"{report['title']}, {report['target']}", fontsize=10)
        axes.set_title(_beyond([p for p in [*trials, *measured] if not inside(p)], x, y, dense), fontsize=7.5)
        axes.set_xlabel(f"tokens per second over dense, {report['engine']}, {report['dtype']}")
        axes.set_ylabel("log perplexity over dense, nats")
        axes.axvline(1, color=_INK, linewidth=0.8, linestyle=":")
        axes.axhline(0, color=_INK, linewidth=0.8, linestyle=":")
        line = [t["speedup"] for t in front], [min(cost(t), 1e3) for t in front]
        axes.plot(*line, color=_FRONT, linewidth=1.2, label="predicted front")
        named = _named(trials)
        groups: dict[str, tuple[Callable[[Any], bool], dict[str, Any]]] = {
            "trial": (lambda t: t["complete"] and t not in named, {"color": _TRIAL, "s": 22}),
            "stopped early": (lambda t: not t["complete"], {"facecolor": "none", "edgecolor": _TRIAL, "s": 22, "alpha": 0.6}),
            "allocator": (lambda t: t["complete"] and t in named, {"color": _FRONT, "s": 30, "marker": "s"}),
        }
        for label, (belongs, look) in groups.items():
            if shown := [t for t in trials if belongs(t) and inside(t)]:
                axes.scatter(*places(shown), label=label, zorder=3, clip_on=False, **look)
        axes.scatter([1], [0], color=_INK, marker="D", s=30, zorder=4)
        for label, plans, color, marker, size in (
            ("measured", [m for m in measured if not m["chosen"] and inside(m)], _MEASURED, "o", 6),
            ("chosen", chosen, _CHOSEN, "*", 13),
        ):
            if plans:
                look = {"color": color, "marker": marker, "markersize": size, "zorder": 5}
                _spread(axes, *places(plans), plans, limits, "xerr", label=label, **look)
        for color, plans in ((_TRIAL, trials), (_MEASURED, [m for m in measured if not m["chosen"]])):
            for plan in (p for p in plans if not inside(p)):
                side = "<" if plan["speedup"] < x[0] else ">" if plan["speedup"] > x[1] else "v" if cost(plan) < y[0] else "^"
                axes.scatter(*places([plan]), color=color, marker=side, s=30, zorder=4, clip_on=False)
        axes.set_xlim(*limits)
        axes.set_ylim(*_padded(y, 0.08))
        right = axes.secondary_yaxis("right")
        right.yaxis.set_major_formatter(lambda value, _: perplexity_text(dense * math.exp(value)))
        right.set_ylabel("validation perplexity")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8)
        plans = [*chosen, *(t for t in named if t["origin"] not in {m["origin"] for m in chosen})]
        texts = [(1.0, 0.0, "dense"), *zip(*places(plans), [p["origin"] for p in plans], strict=True)]
        crowded = [(1.0, 0.0), *zip(*places(trials), strict=True)]
        crowded += [(1.0, height) for height in np.linspace(*y, 60)] + [(place, 0.0) for place in np.linspace(*x, 60)]
        for here, there in pairwise(front):
            crowded += zip(*(np.linspace(a, b, 20) for a, b in zip(*places([here, there]), strict=True)), strict=True)
        for plan in measured:
            ends = _clamped(plan["lowest"], limits), _clamped(plan["highest"], limits)
            crowded += [(place, _clamped(cost(plan), y)) for place in np.linspace(*ends, 20)]
        _write_names(axes, list(dict.fromkeys(texts)), np.array(crowded))
    return figure


def predictions(report: Mapping[str, Any]) -> Figure:
    """Draw measured over predicted speedups, with the diagonal and 5 % about it; what is far from the others at the edge."""
    measured = report["measured"]
    names = list(report["workloads"])
    parts = {name: [m["workloads"][name] for m in measured if name in m["workloads"]] for name in names if len(names) > 1}
    everything = [*measured, *(part for found in parts.values() for part in found)]
    keys = ("predicted", "corrected", *_SPEEDS)
    values = [p[key] for p in everything for key in keys if key in p]
    ends = _usual(values, [m[key] for m in measured if m["chosen"] for key in keys])

    def places(plans: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
        return [_clamped(p[key], ends) for p in plans], [_clamped(p["speedup"], ends) for p in plans]

    with _styled():
        figure, axes = _axes(6, 5.6)
        axes.set_xlabel("predicted tokens per second over dense")
        axes.set_ylabel("measured tokens per second over dense")
        if any(_clamped(p[key], ends) != p[key] for p in everything for key in keys if key in p):
            axes.set_title("what lies beyond the axes is drawn at their edge; the table has the figures", fontsize=7.5)
        low, high = _padded(ends, 0.06)
        diagonal = np.array([low, high])
        axes.fill_between(diagonal, 0.95 * diagonal, 1.05 * diagonal, color=_TRIAL, alpha=0.2, linewidth=0, label="within 5 %")
        axes.plot(diagonal, diagonal, color=_INK, linewidth=0.8, label="as predicted")
        for index, (name, found) in enumerate(parts.items()):
            look: dict[str, Any] = {"color": _WORKLOADS[index % len(_WORKLOADS)], "marker": "v", "markersize": 4, "alpha": 0.6}
            _spread(axes, *places(found, "predicted"), found, (low, high), "yerr", label=f"{name}, predicted", **look)
        before, speeds = places(measured, "predicted")
        axes.hlines(speeds, before, places(measured, "corrected")[0], color=_MEASURED, linewidth=0.8)
        axes.scatter(before, speeds, s=34, facecolor="none", edgecolor=_MEASURED, label="plan, predicted")
        for label, plans, color, marker, size in (
            ("plan, corrected", [m for m in measured if not m["chosen"]], _MEASURED, "o", 6),
            ("chosen, corrected", [m for m in measured if m["chosen"]], _CHOSEN, "*", 13),
        ):
            if plans:
                look = {"color": color, "marker": marker, "markersize": size, "zorder": 5}
                _spread(axes, *places(plans, "corrected"), plans, (low, high), "yerr", label=label, **look)
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
        if trial["origin"] != "dense" and not trial["origin"].startswith("trial "):
            first.setdefault(trial["origin"], trial)
    return list(first.values())


def _heights(costs: Sequence[float], wanted: Sequence[float], always: Sequence[float]) -> tuple[float, float]:
    """Return the ends of the y axis: 0, `always`, and those costs that are within three times the median of what is wanted."""
    finite = [c for c in costs if c < math.inf]
    usual = sorted(c for c in wanted if c < math.inf)
    limit = min(3 * usual[len(usual) // 2] if usual else 0.0, _LARGEST_COST)
    shown = [*(c for c in always if c < _LARGEST_COST), *(c for c in finite if c <= limit)]
    top = max([_COSTS_ALIKE, *shown])
    return max(min([0.0, *finite]), -top), 1.05 * top


def _usual(values: Sequence[float], always: Sequence[float]) -> tuple[float, float]:
    """Return the ends of an axis of speedups: `always`, and the values within five median deviations of the median.

    Up to half of the values may be outliers.
    """
    middle = float(np.median(values))
    reach = max(5 * float(np.median(np.abs(np.subtract(values, middle)))), _SPEEDS_ALIKE)
    shown = [*always, *(value for value in values if abs(value - middle) <= reach)]
    return min(shown), max(shown)


def _clamped(value: float, ends: tuple[float, float]) -> float:
    return min(max(value, ends[0]), ends[1])


def _beyond(plans: Sequence[Mapping[str, Any]], x: tuple[float, float], y: tuple[float, float], dense: float) -> str:
    """Say which plans are drawn at the edge, and how far out they are; nothing where there are none."""
    high = [p["perplexity"] for p in plans if not increase(p["perplexity"], dense) <= y[1]]
    low = [p["perplexity"] for p in plans if increase(p["perplexity"], dense) < y[0]]
    speeds = [p["speedup"] for p in plans]
    notes = []
    if high:
        reach = perplexity_text(max(high)) if all(map(math.isfinite, high)) else "infinity"
        notes.append(f"{len(high)} above perplexity {perplexity_text(dense * math.exp(y[1]))}, up to {reach}")
    if low:
        notes.append(f"{len(low)} below perplexity {perplexity_text(dense * math.exp(y[0]))}, down to {perplexity_text(min(low))}")
    if slow := [s for s in speeds if s < x[0]]:
        notes.append(f"{len(slow)} below {x[0]:.2f}x, down to {min(slow):.2f}x")
    if fast := [s for s in speeds if s > x[1]]:
        notes.append(f"{len(fast)} above {x[1]:.2f}x, up to {max(fast):.2f}x")
    whole = [note.replace(" ", "\N{NO-BREAK SPACE}") for note in notes]  # lines break between notes
    return textwrap.fill(f"Triangles lie beyond the axes: {'; '.join(whole)}", 110) if notes else ""


def _padded(values: Sequence[float], share: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    pad = max(share * (high - low), 1e-3)
    return low - pad, high + pad


def _spread(
    axes: Any,
    x: Sequence[float],
    y: Sequence[float],
    plans: Sequence[Mapping[str, Any]],
    ends: tuple[float, float],
    way: str,
    **look: Any,
) -> None:
    """Draw points with the spread of their measured speedups, up to the `ends` of that axis."""
    middle = [_clamped(p["speedup"], ends) for p in plans]
    error = [
        [max(at - _clamped(p["lowest"], ends), 0) for at, p in zip(middle, plans, strict=True)],
        [max(_clamped(p["highest"], ends) - at, 0) for at, p in zip(middle, plans, strict=True)],
    ]
    axes.errorbar(x, y, **{way: error}, linestyle="none", capsize=3, elinewidth=1, clip_on=False, **look)


def _write_names(axes: Any, texts: Sequence[tuple[float, float, str]], crowded: Any) -> None:
    """Write texts beside their points, each where it covers the fewest of the crowded points (n, 2) and of the texts before it.

    A text that finds no room near its point is joined to it by a line.
    """
    from matplotlib.text import Text

    axes.figure.draw_without_rendering()
    renderer = axes.figure.canvas.get_renderer()
    points = axes.transData.transform(crowded)
    taken: list[Any] = []
    for x, y, text in texts:
        tried = []
        for order, (dx, dy) in enumerate(_OFFSETS):
            sides = ("left", "right")[dx < 0] if dx else "center", ("bottom", "top")[dy < 0] if dy else "center"
            line = {"arrowstyle": "-", "linewidth": 0.5, "color": _INK, "alpha": 0.5} if max(abs(dx), abs(dy)) > _NEAR else None
            note = axes.annotate(
                text, (x, y), (dx, dy), textcoords="offset points", ha=sides[0], va=sides[1], fontsize=8, arrowprops=line
            )
            note.set_in_layout(False)
            note.update_positions(renderer)
            box = Text.get_window_extent(note, renderer).padded(2)  # without the line
            outside = not (axes.bbox.contains(box.x0, box.y0) and axes.bbox.contains(box.x1, box.y1))
            worth = 1000 * outside + 100 * box.count_overlaps(taken) + box.count_contains(points)
            tried.append((worth, order, note, box))
        _, best, note, box = min(tried, key=lambda entry: entry[:2])
        taken.append(box)
        for _, order, other, _ in tried:
            if order != best:
                other.remove()
