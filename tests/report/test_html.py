"""The report is two valid files that need nothing else, whatever the search found."""

from __future__ import annotations

import copy
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from lrserve.report.html import write_report

_WORKLOADS = {
    "chat": {"prompt_tokens": 128, "output_tokens": 128, "concurrency": 8, "share": 0.7},
    "long <prompts>": {"prompt_tokens": 1024, "output_tokens": 32, "concurrency": 4, "share": 0.3},
}


def _trial(number: int, origin: str, perplexity: float, speedup: float, **more: Any) -> dict[str, Any]:
    trial = {"number": number, "origin": origin, "perplexity": perplexity, "speedup": speedup, "ratio": 0.2}
    return {**trial, "complete": True, "front": False, **more}


def _measured(number: int, origin: str, perplexity: float, speedup: float, *, chosen: bool) -> dict[str, Any]:
    found = {"predicted": speedup - 0.02, "speedup": speedup, "lowest": speedup - 0.03, "highest": speedup + 0.02}
    rates = {"dense_tokens_per_second": 350.0, "tokens_per_second": 350.0 * speedup}
    plan = {"number": number, "origin": origin, "perplexity": perplexity, "ratio": 0.2, "corrected": speedup - 0.01}
    return {**plan, **found, "chosen": chosen, "workloads": {name: {**found, **rates} for name in _WORKLOADS}}


def _kind(layers: int, width: int) -> list[dict[str, Any]]:
    cells = []
    for layer in range(layers):
        rank = None if layer % 4 == 3 else width // (2 + layer % 3)
        cells.append({"layer": layer, "rank": rank, "dense_rank": width, "kept": 1.0 if rank is None else rank / width})
    return cells


def _report(layers: int = 30) -> dict[str, Any]:
    trials = [
        _trial(0, "loss_aware", 42.4, 1.07, front=True),
        _trial(1, "greedy", 55.0, 1.05),
        _trial(2, "uniform", 2.4e7, 1.04),
        _trial(3, "trial 3", 47.0, 1.12, front=True),
        _trial(4, "trial 4", 60.0, 1.11, complete=False),
        _trial(5, "evolution", 41.0, 1.03, front=True),
    ]
    return {
        "title": "SmolLM2-135M-Instruct",
        "target": "ratio 0.2",
        "engine": "vllm 0.32.0+cpu",
        "dtype": "bfloat16",
        "structure": "narrow",
        "workloads": _WORKLOADS,
        "dense": {"perplexity": 33.61, "tokens_per_second": 357.0},
        "trials": trials,
        "measured": [
            _measured(0, "loss_aware", 42.4, 1.08, chosen=True),
            _measured(3, "trial 3", 47.0, 1.09, chosen=False),
            _measured(5, "evolution", 41.0, 1.02, chosen=False),
        ],
        "importances": {"perplexity": {"base": 0.6, "down.0": 0.4}, "speed": {"down.0": 0.9, "base": 0.1}},
        "plan": {"layers": layers, "kinds": {"qkv": _kind(layers, 576), "o": _kind(layers, 576), "down": _kind(layers, 1536)}},
        "search": {
            "trials": 6,
            "stopped_early": 1,
            "trials_per_minute": 14.2,
            "seconds_forward": 70.1,
            "seconds_rewrite": 20.0,
            "seconds_sampler": 9.9,
            "standard_error": 0.004,
        },
    }


class _Tags(HTMLParser):
    """Checks that elements close in order, and collects ids and what is referred to."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.names: set[str] = set()
        self.ids: list[str] = []
        self.references: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "data")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def _written(report: dict[str, Any], folder: Path) -> tuple[str, _Tags]:
    before = copy.deepcopy(report)
    write_report(report, folder)
    assert sorted(path.name for path in folder.iterdir()) == ["pareto.png", "report.html"]
    assert imread(folder / "pareto.png").shape == (600, 900, 4)
    assert str(report) == str(before)
    page = (folder / "report.html").read_text(encoding="utf-8")
    tags = _Tags()
    tags.feed(page)
    assert tags.open == []
    return page, tags


def test_the_page_holds_what_was_found_and_needs_nothing_else(tmp_path: Path) -> None:
    report = _report()
    page, tags = _written(report, tmp_path)
    for plan in report["measured"]:
        assert f"{plan['origin']} (#{plan['number']})</td><td>all</td><td>{plan['predicted']:.3f}</td>" in page
        error = plan["corrected"] / plan["speedup"] - 1
        assert f"<td>{plan['lowest']:.3f} to {plan['highest']:.3f}</td>" in page
        assert f"<td>{error:+.1%}</td>" in page
    assert page.count("<td>long &lt;prompts&gt;</td>") == 1 + len(report["measured"])
    for cell in report["plan"]["kinds"]["down"]:
        assert f"down, layer {cell['layer']}: {'dense' if cell['rank'] is None else cell['rank']}" in page
    assert re.findall(r"<td>(\d+)</td><td>(?:loss_aware|greedy|uniform|trial \d|evolution)</td>", page) == list("503124")
    assert "<td>about 60.00</td>" in page
    assert "up to 2.4e+07" in page
    assert "71% of it" not in page  # 70.1 of 100 seconds
    assert "70% of it" in page
    assert "optuna-dashboard sqlite:///study.sqlite3" in page
    assert "script" not in tags.names
    assert len(tags.ids) == len(set(tags.ids))
    assert all(reference.startswith("#") and reference[1:] in tags.ids for reference in tags.references)
    assert set(re.findall(r"https?://[^\"' ]+", page)) == {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert set(re.findall(r"url\(#([^)]+)\)", page)) <= set(tags.ids)


def test_it_is_the_same_every_time(tmp_path: Path) -> None:
    pages = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        pages.append(_written(_report(), tmp_path / name)[0])
    assert pages[0] == pages[1]


def test_hostile_names_are_text(tmp_path: Path) -> None:
    hostile = "</title><script>alert('$x_$')</script> -->"
    report = _report(layers=2)
    report.update(title=hostile, target=hostile, engine=hostile, dtype=hostile, workloads={hostile: _WORKLOADS["chat"]})
    for plan in [*report["trials"], *report["measured"]]:
        plan["origin"] = hostile
    for plan in report["measured"]:
        plan["workloads"] = {hostile: plan["workloads"]["chat"]}
    report["plan"]["kinds"] = {hostile: _kind(2, 64), '" onclick="': _kind(2, 64)}
    report["importances"] = {"perplexity": {hostile: 1.0}, "speed": {}}
    page, tags = _written(report, tmp_path)
    assert "<script" not in page
    assert "script" not in tags.names
    assert 'title="" onclick' not in page


@pytest.mark.parametrize("perplexity", [math.inf, math.nan, 1e300, 30.0])
def test_one_trial_of_one_layer(tmp_path: Path, perplexity: float) -> None:
    report = _report(layers=1)
    report["workloads"] = {"chat": _WORKLOADS["chat"]}
    report["trials"] = [_trial(0, "uniform", perplexity, 1.0, front=True)]
    plan = _measured(0, "uniform", perplexity, 1.0, chosen=True)
    plan.update(predicted=1.0, corrected=1.0, lowest=1.0, highest=1.0, workloads={"chat": plan["workloads"]["chat"]})
    report["measured"] = [plan]
    report["importances"] = {}
    report["plan"]["kinds"] = {"qkv": [{"layer": 0, "rank": None, "dense_rank": 576, "kept": 1.0}]}
    report["search"].update(dict.fromkeys(("seconds_forward", "seconds_rewrite", "seconds_sampler", "trials_per_minute"), 0.0))
    page, _ = _written(report, tmp_path)
    assert "Too few trials" in page
    assert "rounds do not agree" in page


def test_many_layers_and_no_front(tmp_path: Path) -> None:
    report = _report(layers=100)
    report["trials"] = [{**trial, "complete": False, "front": False} for trial in report["trials"]]
    report["plan"]["kinds"]["o"] = _kind(50, 576)
    page, _ = _written(report, tmp_path)
    assert "down, layer 98: 384 of 1536, 25% of the parameters" in page
    assert 'class="heat many"' in page
