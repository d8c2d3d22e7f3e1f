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
from report.synthetic import WORKLOADS, kind, measured, metrics, search, trial

from lrserve.report.html import write_report


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


def _written(report: dict[str, Any], folder: Path, **changes: Any) -> tuple[str, _Tags]:
    before = copy.deepcopy(report)
    write_report(metrics(**changes), report, folder)
    assert sorted(path.name for path in folder.iterdir()) == ["pareto.png", "report.html"]
    assert imread(folder / "pareto.png").shape == (600, 900, 4)
    assert str(report) == str(before)
    page = (folder / "report.html").read_text(encoding="utf-8")
    tags = _Tags()
    tags.feed(page)
    assert tags.open == []
    return page, tags


def test_the_page_holds_what_was_found_and_needs_nothing_else(tmp_path: Path) -> None:
    report = search()
    page, tags = _written(report, tmp_path)
    for plan in report["measured"]:
        number = "" if plan["number"] is None else f" (#{plan['number']})"
        assert f"{plan['origin']}{number}</td><td>all</td><td>{plan['predicted']:.3f}</td>" in page
        error = plan["corrected"] / plan["speedup"] - 1
        assert f"<td>{plan['lowest']:.3f} to {plan['highest']:.3f}</td>" in page
        assert f"<td>{error:+.1%}</td>" in page
    assert page.count("<td>long &lt;prompts&gt;</td>") == 1 + len(report["measured"])
    for cell in report["plan"]["kinds"]["down"]:
        untouched = cell["rank"] is None and cell["weights"] is None
        assert f"down, layer {cell['layer']}: {'dense' if untouched else cell['rank'] or cell['dense_rank']}" in page
        if cell["residual"]:
            assert f"of the parameters; weights in int4_g32; residual of rank {cell['residual']}" in page
    assert re.findall(r"<td>(\d+)</td><td>(?:loss_aware|greedy|uniform|trial \d)</td>", page) == list("503124")
    assert "<td>about 60.00</td>" in page
    assert "up to 2.4e+07" in re.sub(r"\N{NO-BREAK SPACE}|&#160;", " ", page)
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
        pages.append(_written(search(), tmp_path / name)[0])
    assert pages[0] == pages[1]


def test_hostile_names_are_text(tmp_path: Path) -> None:
    hostile = "</title><script>alert('$x_$')</script> -->"
    report = search(layers=2)
    report.update(title=hostile, target=hostile, engine=hostile, dtype=hostile, workloads={hostile: WORKLOADS["chat"]})
    for plan in [*report["trials"], *report["measured"]]:
        plan["origin"] = hostile
    for plan in report["measured"]:
        plan["workloads"] = {hostile: plan["workloads"]["chat"]}
    report["plan"]["kinds"] = {hostile: kind(2, 64), '" onclick="': kind(2, 64)}
    report["importances"] = {"perplexity": {hostile: 1.0}, "speed": {}}
    for plan in report["measured"]:
        plan["why_not"] = None if plan["chosen"] else hostile
    report["rule"] = hostile
    text = dict.fromkeys(("prompt", "dense", "compressed"), hostile)
    machine = {"processor": hostile, "instructions": [], "cores": 1, "memory_gb": 1, "gpu": hostile}
    made = {"date": "2026-11-29T07:10:00+00:00", "machine": machine}
    page, tags = _written(report, tmp_path, samples=[text], made=made, versions={hostile: hostile, "lrserve": "0", "engine": "x"})
    assert "<script" not in page
    assert "script" not in tags.names
    assert 'title="" onclick' not in page


@pytest.mark.parametrize("perplexity", [math.inf, math.nan, 1e300, 30.0])
def test_one_trial_of_one_layer(tmp_path: Path, perplexity: float) -> None:
    report = search(layers=1)
    report["workloads"] = {"chat": WORKLOADS["chat"]}
    report["trials"] = [trial(0, "uniform", perplexity, 1.0, front=True)]
    plan = measured(0, "uniform", perplexity, 1.0)
    plan.update(predicted=1.0, corrected=1.0, lowest=1.0, highest=1.0, workloads={"chat": plan["workloads"]["chat"]})
    report["measured"] = [plan]
    report["importances"] = {}
    report["plan"]["kinds"] = {"qkv": [{"layer": 0, "rank": None, "dense_rank": 576, "kept": 1.0, "weights": None, "residual": 0}]}
    report["search"].update(dict.fromkeys(("seconds_forward", "seconds_rewrite", "seconds_sampler", "trials_per_minute"), 0.0))
    speed = {**metrics()["throughput"], "speedup_lowest": 0.98}
    page, _ = _written(report, tmp_path, throughput=speed)
    assert "Too few trials" in page
    assert "rounds do not agree" in page
    assert "rounds do not agree" not in _written(search(), tmp_path)[0]


def test_many_layers_and_no_front(tmp_path: Path) -> None:
    report = search(layers=100)
    report["trials"] = [{**plan, "complete": False, "front": False} for plan in report["trials"]]
    report["plan"]["kinds"]["o"] = kind(50, 576)
    page, _ = _written(report, tmp_path)
    assert "down, layer 98: 384 of 1536, 25% of the parameters" in page
    assert 'class="heat many"' in page


def _cells(page: str, first: str) -> list[str]:
    """Return the other cells of the first table row that begins with this text."""
    row = page[page.index(f"<td>{first}</td>") :].partition("</tr>")[0]
    return re.findall(r"<td>(.*?)</td>", row)[1:]


def test_the_page_states_what_was_made(tmp_path: Path) -> None:
    page, _ = _written(search(), tmp_path)
    assert "Made on 2026-11-29 by lrserve 0.1.0 on AMD EPYC, 2 cores, 25 GB; vllm 0.32.0+cpu" in page
    # the exported factors' perplexity, and that of the search only as what it was before
    assert "Its validation perplexity is 38.21 (42.40 with the factors of the search, before they were improved)" in page
    assert _cells(page, "perplexity, report text") == ["31.50", "36.75", "+16.7%"]
    assert _cells(page, "vllm") == ["3.1e-04", "0.005", "128 of 128", "2.6e-02 (2.6e-02)", "291 (275) of 512"]
    assert _cells(page, "onnxruntime") == ["2.0e-05", "0.001", "127 of 128", "", ""]
    assert _cells(page, "torch") == ["2.13.0"]
    assert _cells(page, "chat")[2:] == ["70%", "350.0", "378.0", "1.08x (1.05 to 1.10)"]
    assert _cells(page, "long &lt;prompts&gt;")[2] == "30%"


def test_factors_that_were_not_improved_have_one_perplexity(tmp_path: Path) -> None:
    perplexity = {**metrics()["perplexity"], "validation": {"dense": 33.61, "searched": 42.4, "compressed": 42.4}}
    page, _ = _written(search(), tmp_path, perplexity=perplexity)
    assert "Its validation perplexity is 42.40, that of the dense model 33.61." in page


def test_every_measured_plan_that_was_not_chosen_is_explained(tmp_path: Path) -> None:
    page, _ = _written(search(), tmp_path)
    assert "the choice is the lowest of everything: <b>loss_aware</b> (#0; perplexity 42.40, 1.080x, 1.050 to 1.100)" in page
    assert "<li><b>trial 3</b> (#3; perplexity 47.00, 1.090x, 1.060 to 1.110): it misses &lt;something&gt;.</li>" in page
    assert page.count("<li>") == 3
    assert "<li><b>int8 everywhere</b> (perplexity 34.00, 1.110x, 1.080 to 1.130): it is larger" in page


def test_samples_stand_side_by_side_where_there_are_some(tmp_path: Path) -> None:
    page, _ = _written(search(), tmp_path)
    assert "to both models" not in page
    samples = [{"prompt": "Once <upon>", "dense": "a time", "compressed": "a rhyme"}]
    page, _ = _written(search(), tmp_path, samples=samples)
    assert "<td>Once &lt;upon&gt;</td><td>a time</td><td>a rhyme</td>" in page
