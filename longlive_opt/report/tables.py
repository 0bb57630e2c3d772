"""Results as tables: one per step of an experiment's notebook, its ablations, and a campaign's results for
readers and as CSV. No torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from ..config import ExperimentConfig
from ..files import atomic_path
from ..measurement import decision
from ..measurement.catalogue import Metric, metric_of, shown_for, shown_in
from ..measurement.result import is_na, lookup, na, number, numbers
from . import charts
from .campaign import (
    Campaign,
    Result,
    baseline_of,
    by_ladder,
    change_of,
    is_judged,
    noise_of,
    verdict_of,
    within_target,
)
from .log import steps
from .log.markdown import percent, share_text

_ADHERENCE = "adherence."


def summary_table(results: Sequence[Result]) -> pd.DataFrame:
    """One row per result, numbers only (NaN for n/a), with the change against the first run of the baseline.

    A stream that is not `sustained` has no start-up buffer, since the buffer would only reflect the length of
    the stream. The columns `adherence_...` exist if some run evaluated a video of Moving Shapes, and
    `peak_resident_gb` if one was on the CPU.
    """
    evaluated = any(map(is_judged, results))
    metrics = [metric for metric in shown_in("csv") if evaluated or not metric.path.startswith(_ADHERENCE)]
    metrics = [metric for metric in metrics if metric.key != "peak_resident"
               or any(metric.is_recorded(result) for result in results)]
    baseline, rows = baseline_of(results), []
    for result in results:
        row = {"preset": result["preset"], "run": result.get("run", 1)}
        row |= {metric.csv_column: metric.value(result) for metric in metrics}
        sustained = lookup(result, "playback.sustained")
        if sustained is False:
            row[metric_of("startup_buffer").csv_column] = None
        rows.append(row | {
            "change_ss_mean_pct": change_of(result, baseline, metric_of("ss_mean")),
            "target_ms": charts.target_of(result), "within_target": within_target(result),
            "sustained": sustained,
            "identical": lookup(result, "quality.identical"),
            "keep": lookup(result, "decision.keep"), "verdict": verdict_of(result),
            "not_comparable": "" if baseline is None or result is baseline
                              else decision.fidelity_reason(result, baseline),
            "quick": lookup(result, "sizes.quick"),
            "weights": lookup(result, "weights.kind"), "gpu": lookup(result, "environment.gpu"),
            "created_utc": result.get("created_utc")})
    return pd.DataFrame(rows) if rows else \
        pd.DataFrame(columns=["preset", "run", *(metric.csv_column for metric in metrics)])


def numbers_table(results: Sequence[Result]) -> pd.DataFrame:
    """The main metrics for readers: one row per run in the order of the log, with words where a number is
    missing.
    """
    baseline, rows, mean = baseline_of(results), [], metric_of("ss_mean")
    for result in by_ladder(results):
        cells = {_summary_heading(metric): _summary_cell(metric, result, baseline)
                 for metric in shown_for("summary", *results)}
        change = percent(change_of(result, baseline, mean))
        changes = {mean.heading: cells.pop(mean.heading), "change": change}
        rows.append({"preset": result["preset"], "run": result.get("run", 1), **changes, **cells,
                     "verdict": verdict_of(result)})
    return pd.DataFrame(rows) if rows else pd.DataFrame(columns=["preset", "run"])


def _summary_heading(metric: Metric) -> str:
    return metric.label if metric.key == "startup_buffer" else metric.heading  # its cells have a unit


def _summary_cell(metric: Metric, result: Result, baseline: Result | None) -> str:
    """The metric as text, with words where the number alone would mislead."""
    if metric.key == "startup_buffer":
        return charts.buffer_words(result)
    if metric.key == "error_ratio":
        return _ratio_cell(result, baseline)
    return _fidelity_cell(result, baseline) if metric.key == "psnr" else metric.shown(result)


def _ratio_cell(result: Result, baseline: Result | None) -> str:
    """The error ratio, or the word that replaces it."""
    if result is baseline:
        return "reference"
    if lookup(result, "quality.identical") is True:
        return "identical"
    return metric_of("error_ratio").shown(result)


def _fidelity_cell(result: Result, baseline: Result | None) -> str:
    """PSNR to the truth. Results older than protocol 2 show the PSNR to the baseline or a word for it."""
    cell = _ratio_cell(result, baseline)
    old = lookup(result, "quality.protocol") != 2
    return cell if old and cell in ("reference", "identical") else metric_of("psnr").shown(result)


def to_csv(results: Sequence[Result], path: str | Path) -> Path:
    """Write `summary_table` as CSV, atomically, and return the path."""
    with atomic_path(path) as temporary:
        summary_table(results).to_csv(temporary, index=False)
    return Path(path)


def runs_table(campaign: Campaign) -> pd.DataFrame:
    """Every run in the campaign's folder, with its status."""
    rows = []
    for result in campaign.results:
        repeat = "" if result.get("run", 1) == 1 else f", run {result['run']}"
        rows.append({"run": f"{result['preset']}{repeat}", "status": "ok",
                     "detail": lookup(result, "sizes.note"), "weights": lookup(result, "weights.kind"),
                     "device": lookup(result, "environment.gpu") or "CPU"})
    rows += [{"run": f.label, "status": f.outcome, "detail": f.reason} for f in campaign.failures]
    rows += [{"run": place, "status": "not usable", "detail": reason} for place, reason in campaign.problems]
    return pd.DataFrame(rows, columns=["run", "status", "detail", "weights", "device"]).fillna("")


def noise_table(results: Sequence[Result]) -> pd.DataFrame:
    """A/A noise in percent and the range of SS max, one row per preset that was run more than once."""
    rows, most = [], metric_of("ss_max")
    for preset, noise in noise_of(results).items():
        shares = {metric.label: number(noise, metric.key) for metric in shown_in("noise")}
        worst = numbers(noise, f"values.{most.key}")
        rows.append({"preset": preset, "runs": noise["runs"]}
                    | {name: None if share is None else round(100 * share, 2)
                       for name, share in shares.items()}
                    | {most.heading: f"{most.text(min(worst))} to {most.text(max(worst))}"
                       if worst else "n/a"})
    labels = [metric.label for metric in shown_in("noise")]
    return pd.DataFrame(rows, columns=["preset", "runs", *labels, most.heading])


def adherence_table(results: Sequence[Result]) -> pd.DataFrame | None:
    """How well each run's video followed its prompts in Moving Shapes: shares, delays in blocks, and errors.

    A run without an evaluation gives the reason. Returns None if no video was evaluated.
    """
    if not any(map(is_judged, results)):
        return None
    absent = na("not evaluated", "run the preset again")
    rows = []
    for result in results:
        adherence = result.get("adherence") or absent
        never = f", {adherence['never']} of {adherence['switches']} never" if adherence.get("never") else ""
        cells = {metric.heading: share_text(adherence.get(metric.path.removeprefix(_ADHERENCE), adherence),
                                            metric.digits)
                 + (never if metric.key == "adherence_delay" else "") for metric in shown_in("adherence")}
        cells |= {"wrong": ", ".join(adherence.get("wrong", ())),
                 "not evaluated": ", ".join(adherence.get("not_evaluated", ()))}
        rows.append({"preset": result["preset"], "run": result.get("run", 1)} | cells)
    return pd.DataFrame(rows)


def steps_table(campaign: Campaign) -> pd.DataFrame | None:
    """The steps of outputs/steps.yaml with a run of this campaign, as in the log. None if there is none.

    Raises:
        UserError: the file is wrong.
    """
    found = steps.rows(steps.outcomes(campaign, whole=False))
    return pd.DataFrame(found, columns=list(steps.COLUMNS)).set_index(steps.COLUMNS[0]) if found else None


def parameters_table(config: ExperimentConfig) -> pd.DataFrame:
    """The parameters that differ from the baseline's on the laptop."""
    default, own = ExperimentConfig().to_dict(), config.to_dict()
    rows = {key: {"value": own[key], "default": default[key]} for key in own if own[key] != default[key]}
    return pd.DataFrame.from_dict(rows, orient="index", columns=["value", "default"])


def optimizations_table(optimizations: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """One row per optimization: its name, its exactness, and what it did."""
    rows = [(optimization["name"], optimization["exactness"], optimization["report"]["done"])
            for optimization in optimizations]
    return pd.DataFrame(rows, columns=["optimization", "exactness", "what it did"])


def headline_table(measured: Mapping[str, Any]) -> pd.DataFrame:
    """The main metrics of the sections that `measurement.protocol` makes."""
    rows = {}
    for metric in shown_for("headline", measured):
        value = metric.value(measured)
        rows[metric.heading] = plain(lookup(measured, metric.path)) if value is None else \
            round(value, metric.digits)
    return pd.DataFrame({"value": rows})


def fidelity_table(quality: Mapping[str, Any], facts: Mapping[str, Any] | None) -> pd.DataFrame:
    """Errors against the truth for this run, the campaign's baseline and its null rows, free-running and
    teacher-forced. A cell is a number, n/a with the reason, or empty.

    Args:
        quality: the run's section `quality`.
        facts: the facts of the campaign's truth, None if it has none.
    """
    free = quality.get("free_running") or {}
    rows = {"this run, free-running": _fidelity_row(free or quality),
            "this run, teacher-forced": _fidelity_row(quality)}
    if (decoder := quality.get("decoder")) and not is_na(decoder):
        rows[f"decoder differs: {decoder['name']} on the truth's latents"] = _fidelity_row(decoder)
    if facts is not None:
        for name, title in (("free_running", "free-running"), ("forced", "teacher-forced")):
            error = facts["baseline"][name]
            rows[f"baseline, {title}"] = _fidelity_row({"latent_error": error})
        for null in facts["nulls"]:
            running = null.get("free_running") or null
            rows[f"null: {null['title']}, free-running"] = {
                name: cell for name, cell in _fidelity_row(running).items()
                if running is null or not str(cell).startswith("n/a")}  # the run's own row says why
            if "free_running" in null and not is_na(null["latent_error"]):
                rows[f"null: {null['title']}, teacher-forced"] = _fidelity_row(null)
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    return pd.DataFrame([[row.get(name, "") for name in columns] for row in rows.values()],
                        index=list(rows), columns=columns, dtype=object)


def _fidelity_row(section: Mapping[str, Any]) -> dict[str, Any]:
    error, ratio = section.get("latent_error"), section.get("error_ratio")
    row: dict[str, Any] = {}
    for key, words in (("all", ""), ("last", ", last block"), ("worst", ", worst block")):
        for values, name, scale in ((error, "latent error, %", 100), (ratio, "error ratio", 1)):
            if values is not None:
                row[name + words] = plain(values if is_na(values) else scale * values[key])
    for metric in shown_in("fidelity"):
        name, values = metric.heading, section.get(metric.path.split(".")[1])
        if values is None:
            continue
        row[name] = plain(values if is_na(values) else "equal" if values["mean"] is None else values["mean"])
        worst = "max" if metric.better == "lower" else "min"
        if not is_na(values) and worst in values:
            row[f"{name}, worst frame"] = "equal" if values[worst] is None else plain(values[worst])
    return row


def plain(value: Any) -> Any:
    """A metric for a table, rounded, or 'n/a: reason'."""
    if is_na(value):
        return f"n/a: {value['reason']}"
    return round(value, 3) if isinstance(value, float) else value


AS_IS = "as is"


def ablation_summary(measured: Mapping[str, Any], fidelity: Mapping[str, Any], setup_s: Mapping[str, Any]
                      ) -> dict[str, Any]:
    """The part of an ablation that is stored: its metrics without events and samples, and its quality."""
    latency = measured["latency"]
    return {"latency": {key: latency[key] for key in ("ss_ms_per_frame", "ps_ms", "stages_ms")},
            "fps": measured["fps"], "memory_gb": measured["memory_gb"], "sizes": measured["sizes"],
            "quality": fidelity, "setup_s": setup_s}


def ablations_table(result: Mapping[str, Any]) -> pd.DataFrame:
    """One row for the unchanged preset and one per ablation. A cell is a number, or n/a with the reason."""
    rows = {AS_IS: result} | {name_of(row): row for row in result.get("ablations", [])}
    metrics = shown_for("ablation", *rows.values())
    return pd.DataFrame.from_dict({name: {metric.heading: _cell(row, metric) for metric in metrics}
                                   for name, row in rows.items()}, orient="index",
                                  columns=[metric.heading for metric in metrics])


def name_of(ablation: Mapping[str, Any]) -> str:
    """`local_attn_size: 9`"""
    return ", ".join(f"{key}: {json.dumps(value)}" for key, value in ablation["changed"].items())


def _cell(row: Mapping[str, Any], metric: Metric) -> Any:
    if "failure" in row:
        return row["failure"]
    if (value := metric.value(row)) is not None:
        return value
    path = metric.path
    if path.startswith("quality") and lookup(row, "quality.identical"):
        return "identical"
    places = (lookup(row, path), lookup(row, path.rpartition(".")[0]),
              lookup(row, "quality.psnr_db") if path.startswith("quality") else None)
    absent = next(filter(is_na, places), None)
    return absent or {"value": None, "reason": "not recorded", "how_to_fix": "run it again"}
