"""Expectation, measurement and verdict of a run: the card on top of its report, and the last cell of its
notebook. No torch.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from ..config import BASELINE
from ..measurement import decision, worst_block
from ..measurement.catalogue import Metric, glossary, metric_of, shown_for, shown_in
from ..measurement.result import block_ms, lookup
from ..models.specs import LONGLIVE
from .tables import AS_IS, name_of

Result = Mapping[str, Any]

_COLOURS = {"keep": "#0072b2", "drop": "#d55e00"}  # blue and vermilion, which nobody mixes up
_GREY = "#7f8388"
_DECIDES = ("The campaign's summary decides once every run has finished. It writes decisions.json and puts "
            "the verdict on top of this report.")

NOISE_BY_DESIGN = ("The weights are random, so the video is noise by design: it shows no prompt. Latency and "
                   "memory are those of the real model.")

_COLUMNS = ["this run", "baseline", "difference", "change"]


class Page(str):
    """HTML that a notebook renders."""

    def _repr_html_(self) -> str:
        return str(self)


def expected_of(result: Result) -> str:
    """What a hypothesis is about, where the run is something else; else empty."""
    model = result["model"]["name"]
    return "" if model == LONGLIVE else f" (of LongLive-1.3B on an H100; this run used the model {model})"


def card_html(result: Result, baseline: Result | None, entry: Mapping[str, Any], campaign: str, *,
              recommended: bool = False) -> str:
    """The card at the top of a report, as escaped HTML: the verdict, and the main metrics against the
    baseline's over equally many blocks.

    Args:
        entry: the run's entry in decisions.json.
        campaign: the campaign's name.
        recommended: whether the log recommends this run.
    """
    verdict = entry["verdict"]
    words = [f"{entry['rationale'][:1].upper()}{entry['rationale'][1:]}."]
    if result["hypothesis"]:
        words.insert(0, f"Expected{expected_of(result)}: {result['hypothesis']}")
    if recommended:
        words.append("The log recommends this preset.")
    if verdict in ("keep", "drop", "undecided"):
        words.append(f"Rule: {entry['rule']}.")
    words.append(f"From decisions.json of the campaign {campaign}.")
    head = f"Verdict: {verdict}. {result['title']}"
    return _card("verdict", head, verdict, _card_rows(result, baseline), words)


def recommendation_html(best: Result | None, baseline: Result | None, reasons: Sequence[str]) -> Page:
    """The card at the top of a campaign's summary: the recommended preset, its main metrics, and the reasons.
    """
    if best is None:
        return Page(_card("recommendation", "Which preset to take: none", "", [], reasons))
    return Page(_card("recommendation", f"Which preset to take: {best['title']}", "keep",
                      _card_rows(best, baseline), reasons))


def _card_rows(result: Result, baseline: Result | None) -> list[tuple[str, str, str]]:
    """(metric, value, change against the baseline) for each metric that the catalogue shows in a card, the
    slowest block and the speed-up first.
    """
    alone = result["preset"] == BASELINE and result["run"] == 1
    pair = None if alone else decision.compared(result, baseline)
    ours, theirs = pair or (result, {})
    same = lookup(result, "quality.identical") is True
    rows = []
    metrics = shown_for("card", ours)
    order = {key: place for place, key in enumerate(("ss_max", "fps", "ps_mean"))}
    for metric in sorted(metrics, key=lambda metric: order.get(metric.key, len(order))):
        value = "identical" if same and metric.key == "error_ratio" else metric.with_unit(ours)
        rows.append((metric.label, value, metric.change(metric.value(ours), metric.value(theirs))))
    means = [metric_of("ss_mean").value(run) for run in (ours, theirs)]
    if all(means):
        rows.insert(1, ("speed-up", f"{means[1] / means[0]:.2f}x", "by SS mean"))
    return rows


def _card(name: str, head: str, verdict: str, rows: Sequence[tuple[str, str, str]],
          words: Sequence[str]) -> str:
    cells = "".join(f"<div>{html.escape(label)}<br><b>{html.escape(value)}</b><br>{html.escape(change)}&nbsp;"
                    "</div>" for label, value, change in rows)
    table = f'<div style="display:flex;flex-wrap:wrap;gap:0.4em 1.4em;margin:0.4em 0">{cells}</div>' \
        if rows else ""
    paragraphs = "".join(f'<p style="margin:0.3em 0">{html.escape(text)}</p>' for text in words)
    return (f'<section id="{name}" style="margin:1em;padding:0.6em 1em;border-left:6px solid '
            f'{_COLOURS.get(verdict, _GREY)};background:rgba(127,127,127,0.1);font-family:sans-serif;'
            'font-size:14px">'
            f'<p style="margin:0.3em 0;font-size:18px"><b>{html.escape(head)}</b></p>{table}{paragraphs}'
            "</section>")


def provenance_html(runs: Sequence[Result]) -> str:
    """The foot of a page, as escaped HTML: model, machine, commit, versions and dates of the runs."""
    def all_of(path: str) -> str:
        values = dict.fromkeys(str(value)[:12] if path.endswith("commit") else str(value)
                               for run in runs if (value := lookup(run, path)) is not None)
        return html.escape(", ".join(values)) or "unknown"

    dates = sorted(date for run in runs if (date := lookup(run, "created_utc")))
    span = "no run" if not dates else f"run of {html.escape(dates[0])}" if len(runs) == 1 else \
        f"runs from {html.escape(dates[0])} to {html.escape(dates[-1])}"
    machine = all_of("environment.gpu") if any(lookup(run, "environment.gpu") for run in runs) else \
        all_of("environment.cpu")
    changed = " with uncommitted changes" if any(lookup(run, "environment.git_dirty") for run in runs) else ""
    return (f"Model {all_of('model.name')}, weights: {all_of('weights.kind')}, on {machine}. Commit "
            f"{all_of('environment.git_commit')}{changed}, torch {all_of('environment.torch')}, {span}.")


def conclusion_html(result: Result, baseline: Result | None) -> str:
    """HTML: the hypothesis, the measurements against the campaign's `baseline`, and the decision rule.

    The verdict is not included. It needs the whole campaign, and the card on top of the report shows it.
    """
    other = None if result["preset"] == BASELINE and result["run"] == 1 else baseline
    parts = [_paragraph("", scope(result)),
             _paragraph("Hypothesis", result["hypothesis"] or "none was stated."),
             measured(result, other).to_html(border=0)]
    if other is not None and other["sizes"] != result["sizes"] and not decision.unfair(result, other):
        parts.append(_paragraph("", "The comparison uses equally many blocks and switches, the first of each "
                                    "run."))
    if other is not None and (difference := decision.unfair(result, other)):
        parts.append(_paragraph("", f"Not compared with the baseline: {difference}."))
    if result.get("ablations"):
        parts.append(ablated(result).to_html(border=0))
    parts.append(_paragraph("Clocks", result["latency"]["clock_disagreement"]["sentence"]))
    parts.append(_paragraph("", worst_block.explain(result)))
    if result["preset"] != BASELINE and not decision.is_study(result):
        parts.append(_paragraph("Rule", f"{result['decision']['rule']}."))
        parts.append(_paragraph("", _DECIDES))
    return "".join(parts)


def definitions_html() -> Page:
    """The definition of every metric, folded."""
    rows = "".join(f"<dt><b>{html.escape(name)}</b></dt><dd>{html.escape(text)}</dd>"
                   for name, text in glossary().items())
    return Page(f"<details><summary>What the metrics mean</summary><dl>{rows}</dl></details>")


def scope(result: Result) -> str:
    """Why the numbers cannot confirm the hypothesis. Empty for a full run on the machine that it names."""
    sizes, machine = result["sizes"], result["environment"]["gpu"] or result["environment"].get("cpu")
    words = []
    if result["model"]["name"] != LONGLIVE or "H100" not in (machine or ""):
        words.append(f"These are the {result['model']['name']} model's latencies on this machine "
                     f"({machine or 'unknown'}). The presets' hypotheses are about LongLive-1.3B on an H100.")
    if sizes["quick"]:
        words.append(f"{sizes['note'][:1].upper()}{sizes['note'][1:]}.")
    if result["environment"].get("co_scheduled"):
        words.append(decision.CROWDED)
    return " ".join(words)


def measured(result: Result, baseline: Result | None) -> pd.DataFrame:
    """The metrics of a run, and the baseline's if the two are comparable, over equally many blocks and
    switches as in the log. A metric that the run does not record has no row.
    """
    pair = decision.compared(result, baseline)
    result, baseline = pair or (result, {})
    rows = {"block interval, SS mean, ms": _compared(block_ms(result), block_ms(baseline))}
    for metric in shown_for("comparison", result):
        if metric.path.startswith("quality.") or not metric.is_recorded(result):
            continue
        rows[metric.heading] = _compared(metric.value(result), metric.value(baseline), metric)
    table = pd.DataFrame.from_dict(rows, orient="index", columns=_COLUMNS)
    table = table if pair else table[_COLUMNS[:1]]
    same = lookup(result, "quality.identical") and lookup(result, "quality.protocol") != 2
    for metric in shown_in("comparison") if lookup(result, "quality.reference") else ():
        if metric.path.startswith("quality.") and metric.is_recorded(result):
            value = "identical" if same else metric.shown(result)
            table.loc[metric.heading] = [value, *[""] * (table.shape[1] - 1)]
    return table


def ablated(result: Result) -> pd.DataFrame:
    """The effect of each ablation on the block interval, in the unit of the hypotheses."""
    runs = {AS_IS: result} | {name_of(row): row for row in result["ablations"]}
    ours = block_ms(result)
    return pd.DataFrame.from_dict({name: _compared(block_ms(run), ours)[::2] for name, run in runs.items()},
                                  orient="index", columns=["block interval, SS mean, ms", "difference"])


def _compared(ours: float | None, theirs: float | None, metric: Metric | None = None) -> list[str]:
    """Both values, their difference and the change in percent, as text."""
    text = _text if metric is None else metric.text
    if ours is None or theirs is None:
        return [text(ours), text(theirs), "", ""]
    change = f"{100 * (ours - theirs) / theirs:+.1f} %" if theirs else ""
    return [text(ours), text(theirs), text(ours - theirs, "+"), change]


def _text(value: float | None, sign: str = "") -> str:
    return "n/a" if value is None else f"{value:{sign}{'.1f' if abs(value) >= 100 else '.4g'}}"


def _paragraph(name: str, text: str) -> str:
    head = f"<b>{name}:</b> " if name else ""
    return f"<p>{head}{html.escape(text)}</p>" if text else ""
