"""The table of `lrserve eval`, and its section in the model card."""

from __future__ import annotations

from typing import Any

from report.synthetic import MADE, metrics

from lrserve.report.card import model_card
from lrserve.report.eval import card_with_tasks, eval_table


def task(verdict: str = "worse", *, dense: float = 0.8, compressed: float = 0.6, **more: Any) -> dict[str, Any]:
    sides = {"dense": {"value": dense, "stderr": 0.0123}, "compressed": {"value": compressed, "stderr": None}}
    metric = {**sides, "higher_is_better": True, "recovery": compressed / dense, "verdict": verdict}
    conditions = {"made": MADE, "engine": "lm-eval 0.4.13, transformers 5.19.0", "dtype": "bfloat16", "dense": "Big"}
    return {"items": 200, "shots": 0, "chance": 0.25, "metrics": {"acc_norm": {**metric, **more}}, **conditions}


def test_the_table_has_both_sides_recovery_and_verdict() -> None:
    tasks = {"arc": task(), "wiki": task("within noise", dense=10.0, compressed=12.5, recovery=0.8, higher_is_better=False)}
    tasks["wiki"]["shots"] = 5
    figures = {
        "models": {"dense": "Big", "compressed": "OUT"},
        **{k: task()[k] for k in ("made", "engine", "dtype")},
        "tasks": tasks,
    }
    lines = eval_table(figures).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:4]]
    assert cells[0] == ["arc", "acc_norm", "200", "0.800 ± 0.012", "0.600", "75.0%", "worse"]
    assert cells[1][:2] == ["wiki, 5 shots", "acc_norm (lower is better)"]
    assert cells[1][5:] == ["80.0%", "within noise"]
    assert "- dense: Big; compressed: OUT" in lines
    assert lines[-1] == "- lm-eval 0.4.13, transformers 5.19.0, bfloat16; 2026-11-29"
    assert not any("lrserve_cloze" in line for line in lines)


def test_the_card_gets_one_section_before_serving_and_keeps_the_rest() -> None:
    plain = model_card(metrics())
    first = card_with_tasks(plain, {"arc": task()})
    second = card_with_tasks(first, {"arc": task(), "lrserve_cloze": task("within noise")})
    assert second.count("## Tasks") == 1
    before, _, after = plain.partition("## Serve")
    assert second.startswith(before)
    assert second.endswith("## Serve" + after)
    assert "which of four sentences follows a passage" in second
    assert card_with_tasks(second, {"arc": task()}) == first
    assert "- arc: against Big; lm-eval 0.4.13" in first


def test_a_card_that_its_user_wrote_gets_the_section_at_its_end() -> None:
    first = card_with_tasks("# Mine\n\nAll is well.\n", {"arc": task()})
    assert first.startswith("# Mine\n\nAll is well.\n\n## Tasks\n\n| task")
    assert card_with_tasks(first, {"arc": task()}) == first
