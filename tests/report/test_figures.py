"""Outliers stretch no axis, and no two names overlap."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import pytest
from matplotlib.collections import PathCollection
from matplotlib.text import Text
from report.synthetic import measured, search, trial

from lrserve.report.figures import pareto, predictions


def _crowded() -> dict[str, Any]:
    """Plans between 1.02x and 1.12x and 0.2 to 0.5 nats, the allocators' close together, and a plan far out on every side."""
    report = search()
    usual = [trial(n, f"trial {n}", 42 + n / 2, 1.02 + n / 200, complete=n % 5 != 0) for n in range(6, 26)]
    named = [trial(n, name, 42.4 + n / 10, 1.07 + n / 500) for n, name in enumerate(("loss_aware", "greedy", "uniform", "probed"))]
    far = [
        trial(30, "trial 30", 2.4e7, 1.04),
        trial(31, "trial 31", 44.0, 0.2),
        trial(32, "trial 32", 44.0, 6.5),
        trial(33, "trial 33", math.inf, 9.0, front=True),
    ]
    report["trials"] = [*named, *usual, *far]
    report["measured"] = [
        measured(0, "loss_aware", 42.4, 1.08),
        measured(8, "trial 8", 46.0, 1.09, why_not="no"),
        measured(32, "trial 32", 44.0, 5.0, why_not="no"),
    ]
    report["measured"][1]["lowest"] = 0.3
    return report


def test_one_outlier_does_not_stretch_the_axes() -> None:
    figure = pareto(_crowded())
    axes = figure.axes[0]
    low, high = axes.get_xlim()
    assert 0.9 < low < 1 < 1.12 < high < 1.25
    bottom, top = axes.get_ylim()
    assert bottom <= 0
    assert 0.45 < top < 1.1
    note = axes.get_title().replace("\N{NO-BREAK SPACE}", " ")
    assert "2 above perplexity" in note
    assert "up to infinity" in note
    assert "1 below 1.00x, down to 0.20x" in note
    assert "3 above" in note
    assert "up to 9.00x" in note
    places = [place for shown in axes.collections if isinstance(shown, PathCollection) for place in shown.get_offsets()]
    assert len(places) >= len(_crowded()["trials"])
    assert all(axes.viewLim.contains(*place) for place in places)  # those beyond stand at the edge


def test_an_outlier_does_not_stretch_the_predictions() -> None:
    figure = predictions(_crowded())
    low, high = figure.axes[0].get_xlim()
    assert figure.axes[0].get_ylim() == (low, high)
    assert 0.9 < low < high < 1.3
    assert "beyond the axes" in figure.axes[0].get_title()


def test_without_outliers_every_plan_is_within_the_axes_and_no_note_is_made() -> None:
    report = search()
    report["trials"] = [plan for plan in report["trials"] if plan["perplexity"] < 100]
    for figure in (pareto(report), predictions(report)):
        assert figure.axes[0].get_title() == ""


@pytest.mark.parametrize("origin", ["loss_aware 1.10x", "a name of some length"])
def test_names_do_not_overlap(origin: str) -> None:
    report = _crowded()
    for number, plan in enumerate(report["trials"][:4]):
        plan["origin"] = f"{origin} {number}"
    figure = pareto(report)
    figure.draw_without_rendering()
    axes = figure.axes[0]
    texts = [text for text in axes.texts if text.get_text()]
    assert {text.get_text() for text in texts} >= {"dense", "loss_aware", f"{origin} 1", f"{origin} 3"}
    boxes = [Text.get_window_extent(text) for text in texts]
    assert not [pair for pair in combinations(boxes, 2) if pair[0].overlaps(pair[1])]
    assert all(axes.bbox.contains(*corner) for box in boxes for corner in (box.min, box.max))
