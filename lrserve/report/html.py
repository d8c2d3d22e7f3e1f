"""The report of a run: one HTML file that needs nothing else, and its first figure as a PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, Final

from lrserve.compression.level import SCHEMES
from lrserve.report import card, figures
from lrserve.storage.store import atomic_path

_CSS: Final = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; --bar: #2f7ed8; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 0 auto; padding: 1rem;
  background: light-dark(#fff, #16191d); color: light-dark(#24292f, #d8dde3); }
h1 { font-size: 1.6rem; line-height: 1.2; overflow-wrap: anywhere; } h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; }
p { max-width: 50rem; } code { background: var(--soft); padding: .1em .3em; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; margin: 1rem 0; }
svg { display: block; width: 100%; min-width: 36rem; height: auto; margin: 0 auto; }
.front svg { max-width: 56rem; } .predictions svg { min-width: 28rem; max-width: 38rem; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } tr.strong { font-weight: 600; background: var(--soft); }
.heat th, .heat td { border: 0; padding: .2rem 0; text-align: center; font-size: .7rem; font-weight: 400; }
.heat td { min-width: 1.9rem; height: 1.9rem; border: 1px solid light-dark(#fff, #16191d); color: #10243a; }
.heat th:first-child { padding-right: .5rem; font-size: .8rem; position: sticky; left: 0; background: light-dark(#fff, #16191d); }
.heat .deep { color: #fff; } .heat.many td { min-width: .75rem; height: 2.2rem; }
.heat.many .layer, .heat.many td { writing-mode: vertical-rl; font-size: .55rem; line-height: .75rem; padding: .1rem 0; }
.dense { background: repeating-linear-gradient(45deg, #8886 0 2px, #8882 2px 6px); }
.key { display: inline-block; width: 6rem; height: .8rem; vertical-align: middle; } .key.dense { width: 1.6rem; margin-left: 1rem; }
.bars { width: 100%; max-width: 56rem; } .bars th, .bars td { text-align: left; } .bars td { width: 45%; }
.samples { table-layout: fixed; width: 100%; max-width: 70rem; } .samples td { text-align: left; white-space: pre-wrap;
  vertical-align: top; overflow-wrap: anywhere; } .samples th { text-align: left; }
.bars i { display: inline-block; height: .7rem; min-width: 1px; margin-right: .4rem; background: var(--bar); }
"""
_DEEP, _PALE = (11, 79, 138), (214, 233, 248)  # colours of the smallest share that a plan keeps, and of all
_WIDE: Final = 36  # layers; a heat map of more has narrow columns, and text that runs down


def write_report(metrics: Mapping[str, Any], search: Mapping[str, Any], folder: Path) -> None:
    """Write report.html and pareto.png.

    Args:
        metrics: what metrics.json holds: every figure of the artifact.
        search: what the search found, as plain JSON data: title, target, engine, dtype and structure; workloads by name,
            with their `share` of the dense model's time, of which the sum is 1; `dense`; `trials`, with predicted speedups;
            `measured` plans, with the speedup `predicted` by the latency table, `corrected` by earlier measurements, and
            measured, one of them `chosen`, the others with the reason `why_not`; the `rule` of the choice; `importances` by
            objective; the chosen `plan`, by kind and layer; and what the `search` took.
        folder: where to; it is there.
    """
    figure = figures.pareto(search)
    figures.write_png(figure, folder / "pareto.png")
    front = _scroll(figures.svg(figure, "front"), "front")
    page = _page(metrics, search, front, _scroll(figures.svg(figures.predictions(search), "predictions"), "predictions"))
    with atomic_path(folder / "report.html") as partial:
        partial.write_text(page, encoding="utf-8")


def _page(metrics: Mapping[str, Any], report: Mapping[str, Any], front: str, predictions: str) -> str:
    title = escape(f"{report['title']}, {report['target']}")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}: report</title>
<style>{_CSS}</style>
</head>
<body>
<h1>{title}</h1>
<p>{escape(card.made_line(metrics))}</p>
{_summary(metrics, report)}
<h2>What the plans cost and bring</h2>
<p>Each point is a plan: to the right it is faster, below it predicts text better. Trials stand at their predicted speedup, measured
plans at the median of their rounds with the lowest and highest as a bar. Of trials that were stopped early the perplexity is an
estimate. All perplexities here are with the factors of the search.</p>
{front}
{_choice(report)}
<h2>The chosen plan</h2>
{_heat_map(report["plan"], report["structure"])}
{_samples(metrics)}<h2>Do the engines agree?</h2>
<p>Differences are of a prompt token's log probability, in nats, from transformers on the same prompts; equal tokens are those of
greedy continuations before the first difference. In brackets: what the dense model shows between the same two engines.</p>
{_table(card.AGREEMENT_HEADER, card.agreement_rows(metrics))}
<h2>Predicted and measured speed</h2>
<p>The latency table predicts a plan's speedup; the corrected prediction takes into account what the engine said of the plans that
were measured before it. An error is the prediction over the measurement, less one.</p>
{predictions}
{_measured(report)}
<h2>What mattered in the search</h2>
{_importances(report["importances"])}
<h2>What bounded the search</h2>
{_search(report["search"])}
<h2>Trials</h2>
{_trials(report)}
<p><code>optuna-dashboard sqlite:///study.sqlite3</code>, beside a copy of that file, opens the study.</p>
<h2>Versions</h2>
{_table(["", "version"], [[name, version] for name, version in metrics["versions"].items()])}
</body>
</html>
"""


def _scroll(element: str, name: str = "") -> str:
    return f'<div class="scroll {name}">{element}</div>'


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], strong: Sequence[bool] = ()) -> str:
    """Return a table of plain text; rows that are `strong` stand out."""
    lines = ["".join(f"<th>{escape(cell)}</th>" for cell in header)]
    lines += ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    classes = ["", *(' class="strong"' if s else "" for s in strong)] + [""] * len(rows)
    return _scroll("<table>" + "\n".join(f"<tr{c}>{line}</tr>" for c, line in zip(classes, lines, strict=False)) + "</table>")


def _perplexity(plan: Mapping[str, Any]) -> str:
    return ("" if plan.get("complete", True) else "about ") + figures.perplexity_text(plan["perplexity"])


def _summary(metrics: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    speed, text = metrics["throughput"], metrics["perplexity"]["report"]
    decided = speed["speedup_lowest"] > 1 or speed["speedup_highest"] < 1
    doubt = "" if decided else " The rounds do not agree on which of the two is faster."
    left_out = metrics["sizes"]["linear_parameters"]["ratio"]
    words = (
        f"Chosen of {len(report['trials'])} trials, {len(report['measured'])} of them measured: {metrics['plan']['origin']}. "
        f"It leaves out {left_out:.1%} of the parameters of the decoder's linears. On the report text, which no other step reads, "
        f"its perplexity is {text['compressed']:.2f}, that of the dense model {text['dense']:.2f} ({text['increase']:+.1%}). "
        f"{card.validation(metrics)} On {speed['engine']} in {report['dtype']} it serves the same requests at "
        f"{speed['speedup']:.2f} times the speed of the dense model ({speed['speedup_lowest']:.2f} to "
        f"{speed['speedup_highest']:.2f}).{doubt}"
    )
    rows = [*card.quality_rows(metrics), *card.size_rows(metrics)]
    return f"<p>{escape(words)}</p>" + _table(card.SUMMARY_HEADER, rows) + _workloads(metrics, report["workloads"])


def _workloads(metrics: Mapping[str, Any], workloads: Mapping[str, Mapping[str, Any]]) -> str:
    rows = []
    for name, load in workloads.items():
        found = metrics["throughput"]["workloads"].get(name)
        rates = [f"{found[side]['tokens_per_second']:.1f}" for side in ("dense", "compressed")] if found else ["", ""]
        settings = [f"{load['prompt_tokens']} + {load['output_tokens']}", f"{load['concurrency']}"]
        rows.append([name, *settings, f"{load['share']:.0%}", *rates, card.speedup_cell(found) if found else ""])
    header = ["workload", "prompt + output tokens", "requests at once", "share of dense time"]
    return _table([*header, "dense tokens/s", "chosen tokens/s", "speedup"], rows)


def _choice(report: Mapping[str, Any]) -> str:
    """Say by which rule the plan was chosen, and of every other measured plan why it was not."""

    def named(plan: Mapping[str, Any]) -> str:
        speed = f"{plan['speedup']:.3f}x, {plan['lowest']:.3f} to {plan['highest']:.3f}"
        number = "" if plan["number"] is None else f"#{plan['number']}; "
        return f"<b>{escape(plan['origin'])}</b> ({number}perplexity {_perplexity(plan)}, {speed})"

    chosen = next(m for m in report["measured"] if m["chosen"])
    lines = [f"<li>{named(plan)}: {escape(plan['why_not'])}.</li>" for plan in report["measured"] if not plan["chosen"]]
    others = "<p>Why not the other measured plans:</p>\n<ul>" + "\n".join(lines) + "</ul>" if lines else ""
    return f"<p>Of the measured plans the choice is {escape(report['rule'])}: {named(chosen)}.</p>\n{others}"


def _samples(metrics: Mapping[str, Any]) -> str:
    """Show the continuations of the same prompts by both models side by side; nothing where there are none."""
    samples = metrics.get("samples") or []
    if not samples:
        return ""
    lines = ["<th>prompt</th><th>dense</th><th>compressed</th>"]
    lines += ["".join(f"<td>{escape(sample[key].strip())}</td>" for key in ("prompt", "dense", "compressed")) for sample in samples]
    table = '<table class="samples">' + "\n".join(f"<tr>{line}</tr>" for line in lines) + "</table>"
    return f"<h2>The same prompts to both models</h2>\n<p>Greedy continuations of report text.</p>{_scroll(table)}\n"


def _heat_map(plan: Mapping[str, Any], structure: str) -> str:
    layers = plan["layers"]
    lowest = min((cell["kept"] for row in plan["kinds"].values() for cell in row), default=1.0)
    lines = ["<th>layer</th>" + "".join(f'<th class="layer">{layer}</th>' for layer in range(layers))]
    for kind, row in plan["kinds"].items():
        cells = {cell["layer"]: _heat_cell(kind, cell, lowest) for cell in row}
        lines.append(f"<th>{escape(kind)}</th>" + "".join(cells.get(layer, "<td></td>") for layer in range(layers)))
    table = (
        f'<table class="heat{" many" if layers > _WIDE else ""}">' + "\n".join(f"<tr>{line}</tr>" for line in lines) + "</table>"
    )
    number = "rank, or the neurons of a narrow MLP" if structure == "narrow" else "rank"
    if "experts" in plan["kinds"]:
        number += ", or how many experts stay, or with an n the neurons of each expert"
    scale = f'{lowest:.0%} <span class="key" style="background: linear-gradient(90deg, rgb{_DEEP}, rgb{_PALE})"></span> 100%'
    return (
        f"<p>Share of the parameters that is left of each group of linears; the number is its {number}, 8 and 4 are the bits of "
        f"rounded weights, and + stands for a residual beside them.</p>{_scroll(table)}"
        f'<p>{scale} <span class="key dense"></span> as in the dense model</p>'
    )


def _heat_cell(kind: str, cell: Mapping[str, Any], lowest: float) -> str:
    name, weights, residual = f"{kind}, layer {cell['layer']}", cell["weights"], cell["residual"]
    if cell["rank"] is None and weights is None:
        return f'<td class="dense" title="{escape(name)}: dense"></td>'
    height = min((cell["kept"] - lowest) / (1 - lowest), 1.0) if lowest < 1 else 1.0
    color = tuple(round(a + (b - a) * height) for a, b in zip(_DEEP, _PALE, strict=True))
    of = {"experts": " experts", "neurons": " neurons of each expert"}.get(cell.get("of") or "", "")
    said = [f"{cell['rank'] or cell['dense_rank']} of {cell['dense_rank']}{of}, {cell['kept']:.0%} of the parameters"]
    said += [f"weights in {weights}"] * bool(weights) + [f"residual of rank {residual}"] * bool(residual)
    shown = [f"{cell['rank']}{'n' if cell.get('of') == 'neurons' else ''}"] * bool(cell["rank"])
    if weights:
        shown.append(f"{SCHEMES[weights].bits}{'+' if residual else ''}")
    title = escape(f"{name}: {'; '.join(said)}")
    text = "".join(f"<div>{line}</div>" for line in shown)
    return f'<td{" class=deep" if height < 0.5 else ""} style="background: rgb{color}" title="{title}">{text}</td>'


def _measured(report: Mapping[str, Any]) -> str:
    rows, strong = [], []
    for plan in report["measured"]:
        name = f"{'★ ' if plan['chosen'] else ''}{plan['origin']}"
        name += "" if plan["number"] is None else f" (#{plan['number']})"
        for workload, found in {"all": plan, **plan["workloads"]}.items():
            predictions = [found["predicted"], found.get("corrected")]
            rows.append(
                [name if found is plan else "", workload]
                + [f"{p:.3f}" if p is not None else "" for p in predictions]
                + [f"{found['speedup']:.3f}", f"{found['lowest']:.3f} to {found['highest']:.3f}"]
                + [f"{p / found['speedup'] - 1:+.1%}" if p is not None else "" for p in predictions]
                + [_perplexity(plan) if found is plan else ""]
            )
            strong.append(found is plan and plan["chosen"])
    header = ["plan", "workload", "predicted", "corrected", "measured", "spread", "error", "corrected error", "perplexity"]
    return _table(header, rows, strong)


def _importances(importances: Mapping[str, Mapping[str, float]]) -> str:
    perplexity, speed = importances.get("perplexity", {}), importances.get("speed", {})
    largest = max([*perplexity.values(), *speed.values()], default=0.0)
    if not largest > 0:
        return "<p>Too few trials to tell the parameters of the search apart.</p>"
    names = sorted({**perplexity, **speed}, key=lambda name: -max(perplexity.get(name, 0), speed.get(name, 0)))

    def bar(share: float) -> str:
        return f'<td><i style="width: {75 * share / largest:.1f}%"></i>{share:.0%}</td>'

    lines = [f"<th>{escape(name)}</th>{bar(perplexity.get(name, 0.0))}{bar(speed.get(name, 0.0))}" for name in names]
    lines.insert(0, "<th></th><th>perplexity</th><th>speed</th>")
    table = '<table class="bars">' + "\n".join(f"<tr>{line}</tr>" for line in lines) + "</table>"
    return (
        "<p>PED-ANOVA importances of what a trial suggests: the base allocator and, for a kind of linear in a run of layers, the "
        f"multiplier and what may be done to its weights. Each column sums to 100%.</p>{_scroll(table)}"
    )


def _search(search: Mapping[str, Any]) -> str:
    names = {
        "seconds_forward": "forward passes for perplexity",
        "seconds_rewrite": "writing factors into the model",
        "seconds_sampler": "the sampler",
    }
    total = sum(search[key] for key in names)
    first = max(names, key=lambda key: float(search[key]))
    most = f" Most of the time went to {names[first]}, {search[first] / total:.0%} of it." if total > 0 else ""
    text = (
        f"{search['trials']} trials at {search['trials_per_minute']:.1f} a minute, "
        f"{search['stopped_early']} of them stopped early.{most} "
        f"The standard error of a log perplexity is {search['standard_error']:.2g} nats."
    )
    rows = [[name, f"{search[key]:.1f}", f"{search[key] / total:.0%}" if total > 0 else ""] for key, name in names.items()]
    return f"<p>{escape(text)}</p>" + _table(["", "seconds", "share"], rows)


def _trials(report: Mapping[str, Any]) -> str:
    measured = {m["origin"]: m["chosen"] for m in report["measured"]}
    trials = sorted(report["trials"], key=lambda t: (not t["front"], not t["complete"], t["perplexity"]))
    rows = []
    for trial in trials:
        notes = ["front"] * trial["front"] + ["stopped early"] * (not trial["complete"])
        origin, number = trial["origin"], "" if trial["number"] is None else f"{trial['number']}"
        notes += (["chosen"] if measured[origin] else ["measured"]) if origin in measured else []
        cost = figures.increase(trial["perplexity"], report["dense"]["perplexity"])
        row = [number, origin, _perplexity(trial), f"{cost:+.3f}"]
        rows.append([*row, f"{trial['speedup']:.3f}", f"{trial['ratio']:.1%}", f"{trial['bytes']:.0%}", ", ".join(notes)])
    header = ["trial", "origin", "perplexity", "nats over dense", "predicted speedup", "parameters left out", "bytes", ""]
    return _table(header, rows, [t["front"] for t in trials])
