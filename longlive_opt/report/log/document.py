"""Write OPTIMIZATION_LOG.md by filling the blanks of `template.md`."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ...config import keys_of
from ...files import atomic_path, project_path, without_places
from ...measurement import decision, environment
from ...measurement.catalogue import Metric, of_template, recorded, shown_in
from ...measurement.result import lookup, number
from ...models.specs import MODELS
from .. import charts
from ..campaign import (
    BASELINE,
    LADDER,
    SUMMARY,
    Campaign,
    Failure,
    Result,
    change_of,
    decided,
    noise_of,
)
from ..noise_record import NOISE_FILE, read_record
from ..tables import to_csv
from ..verdicts import decisions_of, write_decisions
from . import outside
from .entry import Run, details_table, is_kept, is_large, matched_runs, quality_sentence, quality_text
from .findings import findings, folded
from .markdown import BLANK, bullets, escape, first_cell, percent, sentence, table_row
from .notes import missing_notes, run_notes
from .recommendation import (
    caveats,
    closing,
    definitions,
    fill_summary,
    headline,
    observations,
    recommend,
    rules,
    troubles,
)
from .scaling import ABSENT, scaling
from .steps import outcomes, steps_section

EXPERIMENTS = LADDER[1:]  # 1 to 6 in the log
LOG_NAME = "OPTIMIZATION_LOG.md"
_TEMPLATE = Path(__file__).with_name("template.md")
# Keys that the configuration block of a preset outside the template always shows, and keys that it omits.
_SHOWN = (*keys_of("optimizations"), "model_dtype")
_WORDS = (*keys_of("identity"), "prompts", "prompts_file")


def save_figures(campaign: Campaign) -> dict[str, charts.Chart]:
    """Draw the campaign's figures, save each as summary/<name>.png in its folder, and return them by name."""
    drawn = charts.campaign_figures(campaign.results)
    for name, chart in drawn.items():
        with atomic_path(campaign.folder / SUMMARY / f"{name}.png") as temporary:
            chart.save(temporary)
    return drawn


def write_campaign_log(campaign: Campaign, log_path: str | Path = "") -> Path:
    """Write decisions.json, summary/summary.csv and the log (default: into the campaign's folder), and return
    the log's path. A log elsewhere shows all steps, and one in the campaign's folder those with its runs.
    """
    best, reasons = recommend(_runs(campaign.results, campaign.failures))
    write_decisions(campaign.folder, decisions_of(campaign, best.preset if best else None, reasons))
    to_csv(campaign.results, campaign.folder / SUMMARY / "summary.csv")
    path = project_path(log_path) if log_path else campaign.folder / LOG_NAME
    source = _shown(campaign.folder)
    if path != campaign.folder / LOG_NAME:
        source += f" --log {_shown(path)}"
    steps = outcomes(campaign, whole=path.parent != campaign.folder)
    return write_log(campaign.results, path, steps=steps_section(steps),
                     failures=campaign.failures, problems=campaign.problems, source=source,
                     record=read_record(campaign.folder.with_name(Path(NOISE_FILE).name)),
                     code=environment.code_since([lookup(run, "environment.git_commit")
                                                 for run in campaign.results]))


def _shown(path: Path) -> str:
    """The path relative to the project's folder, or only its name, since a log is published."""
    root = project_path("")
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name


def write_log(results: Sequence[Result], path: str | Path, **more: Any) -> Path:
    """Write OPTIMIZATION_LOG.md atomically and return its path.

    Args:
        results: valid results. The first run of a preset gives the numbers.
        more: see `render_log`.

    Raises:
        UserError: the file cannot be written.
    """
    text = without_places(render_log(results, **more))
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


def render_log(results: Sequence[Result], *, failures: Sequence[Failure] = (),
               problems: Sequence[tuple[str, str]] = (), source: str = "",
               record: Sequence[Mapping[str, Any]] = (), code: Sequence[str] = (), steps: str = "") -> str:
    """The text of OPTIMIZATION_LOG.md.

    Args:
        results: valid results. The first run of a preset gives the numbers.
        failures: runs without a result.
        problems: (place, reason) of each unreadable file.
        source: the arguments of the command that made the log, as the log names them.
        record: rows of the noise record (`noise_record`).
        code: sentences on the differences between the current code and that of the runs.
        steps: the section on steps, which follows the recommendation; empty for none.
    """
    results = decided(results)
    runs, noise = _runs(results, failures), noise_of(results)

    # The template has ten parts: head, baseline, experiments 1 to 6, summary with recommendation, notes.
    head, baseline, *sections, summary, notes = _TEMPLATE.read_text(encoding="utf-8").split("\n---\n")
    blank = sections[EXPERIMENTS.index("balanced")]
    base = runs.get(BASELINE)
    if base:
        baseline = _fill_baseline(baseline, base)
    for preset, run in runs.items():
        if preset in EXPERIMENTS:
            index = EXPERIMENTS.index(preset)
            sections[index] = _fill_experiment(sections[index], run, base, noise)
        elif preset != BASELINE:
            section = _extra_section(blank, len(sections) + 1, run, base)
            sections.append(_fill_experiment(section, run, base, noise))
    sections, everywhere = _said_once(sections)
    compared = outside.sentences() if any(is_large(run.result) for run in runs.values()) else []
    several = scaling(runs)
    observed = [*observations(results, runs, noise, record), *map(escape, compared), *code,
                *_other_target(runs), *everywhere, *troubles(failures, problems), *rules(runs),
                *caveats(runs), *([] if several else [ABSENT]), closing(results, source)]
    notes = f"{notes.rstrip()}\n\n{bullets(observed)}\n\n{definitions(results)}".rstrip() + "\n"
    head = head.replace("\n\n## ", f"\n\n{result}\n\n## ", 1) if (result := headline(runs)) else head
    more = ["\n" + several] if several else []
    listed = [steps] if steps else []
    return "\n---\n".join([head, baseline, *sections, fill_summary(summary, runs), *listed, notes, *more])


def _runs(results: Sequence[Result], failures: Sequence[Failure]) -> dict[str, Run]:
    """preset -> its first run, failed or not, in the order of the log."""
    found = {}
    for first in charts.first_runs(results):
        again = tuple(run for run in results if run["preset"] == first["preset"] and run is not first
                      and not decision.unfair(run, first))
        found[first["preset"]] = Run(first, repeats=again)
    for failure in failures:
        if failure.label == failure.preset and failure.preset not in found:  # a repeat has no section
            words = {key: failure.parameters.get(key) for key in ("title", "hypothesis")}
            known = {"preset": failure.preset, **words, "parameters": failure.parameters}
            found[failure.preset] = Run(known, failure.reason, failure.outcome)
    order = [preset for preset in (BASELINE, *EXPERIMENTS) if preset in found]
    return {preset: found[preset] for preset in [*order, *(p for p in found if p not in order)]}


def _other_target(runs: Mapping[str, Run]) -> list[str]:
    """A note if the target of these runs is not the template's 40 ms."""
    targets = charts.targets_of(run.result for run in runs.values() if not run.failure)
    if not targets or targets == [40.0]:
        return []
    words = ", ".join(f"{target:g}" for target in targets)
    return [f"Target: {words} ms per video frame (target_ms_per_frame). The heading of the summary table "
            "comes from the template."]


def _said_once(sections: Sequence[str]) -> tuple[list[str], list[str]]:
    """Move notes on missing metrics that several sections share: (the shortened sections, those notes)."""
    found = Counter(line for section in sections for line in section.split("\n") if " is n/a: " in line)
    repeated = [line for line, count in found.items() if count > 1 and line.startswith("- ")]
    shortened = ["\n".join(line for line in section.split("\n") if line not in repeated)
                 for section in sections]
    return shortened, [line.removeprefix("- ") for line in repeated]


def _fill_baseline(section: str, run: Run) -> str:
    settings, lines = _settings(run), []
    for line in section.rstrip("\n").split("\n"):
        label = first_cell(line)
        if line.startswith("## "):
            line = f"{line}\n\n{bullets(findings(run, None))}"
        if label in settings:
            line = f"| {label} | {settings[label]} |"
        elif metric := _of_template(label, run):
            text = run.cell(metric.key)
            if label in run.missing and metric.key == "ss_p99":
                n = lookup(run.result, "latency.ss_ms_per_frame.n")
                text = f"n/a: n too small (n={n}), max {run.value('ss_max')} ms"
            line = table_row(line, [text])
        lines.append(line)
    provenance = [] if run.failure else _provenance(run)
    notes = bullets([*provenance, *run_notes(run, None), *missing_notes(run)])
    details = folded(f"**Notes**:\n{notes}\n\n{details_table(run, None)}")
    return "\n".join([*lines, "", details])


def _settings(run: Run) -> dict[str, str]:
    parameters = lookup(run.result, "parameters")
    model = lookup(run.result, "model.name") or parameters.get("model")
    steps = parameters.get("denoising_steps")
    count = f"{len(steps)} ({', '.join(map(str, steps))})" if steps else "n/a"
    gpu, cpu = lookup(run.result, "environment.gpu"), lookup(run.result, "environment.cpu")
    device = f"n/a ({run.outcome})" if run.failure else gpu or f"none (CPU: {cpu or 'unknown'})"
    return {"Model": MODELS[model].title if model in MODELS else escape(model or "n/a"),
            "GPU": escape(device),
            "Denoising Steps": escape(count),
            "Local Attention": f"{escape(parameters.get('local_attn_size', 'n/a'))} frames",
            "Frame Sink": f"{escape(parameters.get('sink_size', 'n/a'))} frames",
            "Dtype": escape(parameters.get("model_dtype", "n/a"))}


def _provenance(run: Run) -> list[str]:
    """The weights, versions, code and picture size of the run."""
    result, environment = run.result, run.result["environment"]
    files = ", ".join(f"{part} sha256 {str(digest)[:12]}"
                      for part, digest in (lookup(result, "weights.sha256") or {}).items())
    weights = escape(result["weights"]["kind"] + (f" ({files})" if files else ""))
    if weights == "random":
        weights += f", seed {escape(lookup(result, 'weights.seed'))} (no official checkpoint was loaded)"
    names = {"driver": "driver", "CUDA": "cuda", "torch": "torch", "cuDNN": "cudnn", "Triton": "triton",
             "Python": "python", "attention": "attention_backend"}
    versions = ", ".join(f"{name} {escape(environment.get(key) or 'n/a')}" for name, key in names.items())
    commit = escape(str(environment.get("git_commit") or "unknown")[:12])
    dirty = {True: " with uncommitted changes", False: ""}.get(
        environment.get("git_dirty"), " (state of the tree unknown)")
    width, height = (lookup(result, f"parameters.{side}") or lookup(result, f"model.sizes.{side}") or "?"
                     for side in ("width", "height"))
    return [f"Weights: {weights}", f"Versions: {versions}",
            f"Code: commit {commit}{dirty}, run of {escape(result['created_utc'])}",
            f"Pictures: {escape(width)}x{escape(height)} pixels, {result['sizes']['frames_per_block']} video "
            "frames per block"]


def _extra_section(blank: str, index: int, run: Run, base: Run | None) -> str:
    """A blank section for a preset outside the template, in the form of experiment 5.

    Its block lists the optimizations that have a value and every parameter that differs from the baseline's.
    """
    parameters = lookup(run.result, "parameters")
    reference = lookup(base.result, "parameters") if base else parameters
    keys = [key for key in parameters if key in _SHOWN and parameters[key] is not None
            or key not in _WORDS and parameters[key] != reference.get(key, parameters[key])]
    lines = (yaml.safe_dump({key: parameters[key]}, default_flow_style=True, width=1000) for key in keys)
    # On one line each, since a line of a text could end the block.
    block = "\n".join(" ".join(line.strip("{}\n").split()) for line in lines)
    column = run.name if len(run.name) <= 24 else escape(run.preset)
    text = re.sub(r"### Experiment 5: .*", lambda _: f"### Experiment {index}: {run.name}", blank)
    text = re.sub(r"(?s)```yaml\n.*?\n```", lambda _: f"```yaml\n{block}\n```", text)
    return text.replace("| Balanced |", f"| {column} |")


def _fill_experiment(section: str, run: Run, base: Run | None,
                     noise: Mapping[str, Mapping[str, Any]]) -> str:
    """The section's heading, three lines of findings, and the filled template of the section, folded."""
    notes = [*run_notes(run, base), *_configuration_notes(section, run), *_template_notes(section, run)]
    whole, before, lines = run, base, []
    run, base = matched_runs(run, base)
    against = _regressions(run, base, noise)
    for line in section.replace("\n**Notes**:\n", "\n").rstrip("\n").split("\n"):
        blank = re.match(rf"- (.+): {BLANK}", line)
        if metric := _of_template(first_cell(line), run):
            reference = base.cell(metric.key) if base else "n/a (no baseline)"
            change = percent(change_of(run.result, base.result if base else None, metric))
            line = table_row(line, [reference, run.cell(metric.key), change.rstrip("%")])
        elif blank and (metric := of_template(blank[1])):
            line = f"- {blank[1]}: {quality_text(run, metric)}"
        elif line.startswith("**Quality**") and f"- PSNR: {BLANK}" not in section:
            line += f"\n{quality_sentence(run)}"
        elif line.startswith("**Decision**"):
            found = run.result.get("decision") or {"keep": None}
            keep, drop = ("x" if found["keep"] is wanted else " " for wanted in (True, False))
            reason = f"No decision: {run.outcome}." if run.failure else sentence(found["rationale"]) + against
            line = f"**Decision**: [{keep}] Keep  [{drop}] Drop\n{reason}"
        lines.append(line)
    notes += missing_notes(run)
    heading, form = re.fullmatch(r"(?s)(.*### Experiment \d+: [^\n]*\n)(.*)", "\n".join(lines)).groups()
    details = f"{form.strip()}\n\n**Notes**:\n{bullets(notes)}\n\n{details_table(run, base)}"
    return f"{heading}\n{bullets(findings(whole, before, against))}\n\n{folded(details)}"


def _of_template(label: str, run: Run) -> Metric | None:
    """The metric of a row of the template, or the one that the run has instead."""
    metric = of_template(label)
    return metric and recorded(metric, run.result)


def _regressions(run: Run, base: Run | None, noise: Mapping[str, Mapping[str, Any]]) -> str:
    """The metrics that a kept preset makes worse by more than the noise."""
    if base is None or not is_kept(run):
        return ""
    worse, spreads = [], decision.noise_of_preset(run.preset, noise) or {}
    for metric in (metric for metric in shown_in("noise") if metric.template):
        change = change_of(run.result, base.result, metric) or 0.0
        spread = number(spreads, metric.key) or 0.0
        if (-change if metric.better == "higher" else change) > 100 * max(decision.NOISE_FLOOR, spread):
            worse.append(f"{metric.template} {percent(change)}")
    return f" Drawbacks: {', '.join(worse)}." if worse else ""


def _template_notes(section: str, run: Run) -> list[str]:
    """Notes where the wording of the template does not fit the run."""
    notes = []
    captured = any(number(applied, "report.stats.captured")
                   for applied in run.result.get("optimizations") or [])
    if captured and lookup(run.result, "parameters.use_cuda_graphs") is False:
        notes.append("use_cuda_graphs is false because the compile_mode captures graphs itself. The graphs "
                     "were replayed, and no shape is dynamic.")
    if "(Recommended)" in section:
        notes.append("The heading comes from the template. The recommendation is below the summary table.")
    if "quality_eval.py" in section:
        notes.append("There is no quality_eval.py. The preset's notebook evaluates quality.")
    return notes


def _configuration_notes(section: str, run: Run) -> list[str]:
    """The parameters of the run that differ from the configuration block of its section."""
    block = yaml.safe_load(re.search(r"(?s)```yaml\n(.*?)\n```", section)[1]) or {}
    there = lookup(run.result, "parameters")
    return [f"Configuration: run with {key} {escape(json.dumps(there[key]))}, not "
            f"{escape(json.dumps(value))} as above."
            for key, value in block.items() if key in there and there[key] != value]
