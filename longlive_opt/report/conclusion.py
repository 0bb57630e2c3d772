"""Last words of an experiment's notebook: what was expected, what was measured, what follows. No torch."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

import pandas as pd

from ..measurement import decision, worst_block
from ..measurement.metrics import DEFINITIONS
from ..measurement.result import block_ms, lookup, number
from .tables import AS_IS, name_of

Result = Mapping[str, Any]

_DECIDES = ("The verdict is the campaign's: once every run is there, its summary decides, writes "
            "decisions.json, and puts the verdict on top of this report.")

_BEFORE_STAGES = {"SS mean, ms per frame": "latency.ss_ms_per_frame.mean",
                  "SS max, ms per frame": "latency.ss_ms_per_frame.max"}
_AFTER_STAGES = {"PS mean, ms": "latency.ps_ms.mean", "PS max, ms": "latency.ps_ms.max",
                 "text encoding at a switch, ms": "latency.ps_breakdown_ms.text_encode",
                 "recache at a switch, ms": "latency.ps_breakdown_ms.recache",
                 "PS mean at a random moment, ms": "latency.ps_random_ms.mean", "FPS": "fps",
                 "FPS with prompt switches": "fps_with_switches",
                 "energy per video frame, J": "energy.joules_per_frame",
                 "peak memory, GB": "memory_gb.peak_allocated", "KV cache, GB": "memory_gb.kv_cache"}
_COLUMNS = ["this run", "baseline", "difference", "change"]
_FIDELITY = {"error ratio, free-running": "quality.free_running.error_ratio.all",
             "error ratio, teacher-forced": "quality.error_ratio.all",
             "PSNR, teacher-forced, dB": "quality.psnr_db.mean", "SSIM, teacher-forced": "quality.ssim.mean"}
_OLD_FIDELITY = {"PSNR, one block, dB": "quality.psnr_db.mean", "SSIM, one block": "quality.ssim.mean"}


def reading_html(result: Result, baseline: Result | None) -> str:
    """HTML: the hypothesis, what was measured against the campaign's `baseline`, and the rule that decides.
    The verdict is not here: it needs the whole campaign, and the report opens with it.
    """
    other = None if result["preset"] == "baseline" and result["run"] == 1 else baseline
    parts = [_paragraph("", scope(result)),
             _paragraph("Hypothesis", result["hypothesis"] or "none was written down."),
             measured(result, other).to_html(border=0)]
    if other is not None and other["sizes"] != result["sizes"] and not decision.unfair(result, other):
        parts.append(_paragraph("", "Compared over equally many blocks and switches, the first of each run."))
    if other is not None and (difference := decision.unfair(result, other)):
        parts.append(_paragraph("", f"Not compared with the baseline: {difference}."))
    if result.get("variations"):
        parts.append(varied(result).to_html(border=0))
    parts.append(_paragraph("Clocks", result["latency"]["clock_disagreement"]["sentence"]))
    parts.append(_paragraph("", worst_block.sentence(result)))
    if result["preset"] != "baseline" and not decision.is_study(result):
        parts.append(_paragraph("Rule", f"{result['decision']['rule']}."))
        parts.append(_paragraph("", _DECIDES))
    return "".join(parts)


def definitions_html() -> str:
    """What every figure means, folded."""
    rows = "".join(f"<dt><b>{html.escape(name)}</b></dt><dd>{html.escape(text)}</dd>"
                   for name, text in DEFINITIONS.items())
    return f"<details><summary>What the figures mean</summary><dl>{rows}</dl></details>"


def scope(result: Result) -> str:
    """What the figures cannot say of the hypothesis; empty for a full run of what it speaks of."""
    sizes, machine = result["sizes"], result["environment"]["gpu"] or result["environment"].get("cpu")
    words = []
    if result["model"]["name"] != "longlive-1.3b" or "H100" not in (machine or ""):
        words.append(f"These are the {result['model']['name']} model's latencies on this machine "
                     f"({machine or 'unknown'}); the presets' hypotheses speak of LongLive-1.3B on an H100.")
    if sizes["quick"]:
        words.append(f"{sizes['note'][:1].upper()}{sizes['note'][1:]}.")
    if result["environment"].get("co_scheduled"):
        words.append(decision.CROWDED)
    return " ".join(words)


def measured(result: Result, baseline: Result | None) -> pd.DataFrame:
    """The figures of a run, and beside them the baseline's where the two may be compared: over equally many
    blocks and switches, as in the log.
    """
    pair = decision.compared(result, baseline)
    result, baseline = pair or (result, {})
    stages = {f"{stage}, ms per block": f"latency.stages_ms.{stage}.mean"
              for stage in result["latency"]["stages_ms"]}
    rows = {"block interval, SS mean, ms": _beside(block_ms(result), block_ms(baseline))}
    rows |= {name: _beside(number(result, path), number(baseline, path))
             for name, path in (_BEFORE_STAGES | stages | _AFTER_STAGES).items()}
    table = pd.DataFrame.from_dict(rows, orient="index", columns=_COLUMNS)
    table = table if pair else table[_COLUMNS[:1]]
    of_truth = lookup(result, "quality.protocol") == 2
    fidelity = _FIDELITY if of_truth else _OLD_FIDELITY
    for name, path in fidelity.items() if lookup(result, "quality.reference") else ():
        same = lookup(result, "quality.identical") and not of_truth
        value = "identical" if same else _text(number(result, path))
        table.loc[name] = [value, *[""] * (table.shape[1] - 1)]
    return table


def varied(result: Result) -> pd.DataFrame:
    """What each variation does to the block interval, in the hypotheses' unit."""
    runs = {AS_IS: result} | {name_of(row): row for row in result["variations"]}
    ours = block_ms(result)
    return pd.DataFrame.from_dict({name: _beside(block_ms(run), ours)[::2] for name, run in runs.items()},
                                  orient="index", columns=["block interval, SS mean, ms", "difference"])


def _beside(ours: float | None, theirs: float | None) -> list[str]:
    if ours is None or theirs is None:
        return [_text(ours), _text(theirs), "", ""]
    change = f"{100 * (ours - theirs) / theirs:+.1f} %" if theirs else ""
    return [_text(ours), _text(theirs), _text(ours - theirs, "+"), change]


def _text(value: float | None, sign: str = "") -> str:
    return "n/a" if value is None else f"{value:{sign}{'.1f' if abs(value) >= 100 else '.4g'}}"


def _paragraph(name: str, text: str) -> str:
    head = f"<b>{name}:</b> " if name else ""
    return f"<p>{head}{html.escape(text)}</p>" if text else ""
