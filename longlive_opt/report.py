"""A campaign's results -> tables, figures and OPTIMIZATION_LOG.md. No GPU, no torch.

    python -m longlive_opt.report outputs/demo [--log OPTIMIZATION_LOG.md]

The log has the form of `log_template.md`: headings, tables and configuration blocks stay, blanks are filled.
An experiment that was not run keeps its blanks; one that was run keeps none: what could not be measured reads
`n/a (reason)`. Words come from presets, numbers from result.json, verdicts from rules that the log states.
The same results give the same bytes.
"""

import argparse
import json
import logging
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from longlive_opt import figures, metrics
from longlive_opt.errors import UserError
from longlive_opt.figures import TARGET_MS, lookup, number
from longlive_opt.inputs import project_path
from longlive_opt.results import atomic_path, is_na, na, read_campaign
from longlive_opt.timeline import Event
from longlive_opt.variations import variations_table

log = logging.getLogger(__name__)

Result = Mapping[str, Any]

BASELINE = "baseline"
EXPERIMENTS = ("cuda_graphs", "static_kv", "async_vae", "quality", "balanced", "speed")  # 1 to 6 in the log
LOG_NAME = "OPTIMIZATION_LOG.md"
SUMMARY = "summary"  # folder of the campaign's figures
_TEMPLATE = Path(__file__).with_name("log_template.md")
_BLANK = "___"
_SUMMARY_NAMES = {BASELINE: "Baseline", "quality": "Quality", "balanced": "Balanced", "speed": "Speed"}
_FIGURES = {"SS Mean": "latency.ss_ms_per_frame.mean", "SS P99": "latency.ss_ms_per_frame.p99",
            "SS Max": "latency.ss_ms_per_frame.max", "PS Mean": "latency.ps_ms.mean", "FPS": "fps",
            "Memory": "memory_gb.peak_allocated"}
_OTHERS = {"PS Mean": ("PS mean", "ms"), "Memory": ("memory", "GB")}
_QUALITY = {"PSNR": "psnr_db", "SSIM": "ssim", "LPIPS": "lpips", "CLIP Delta": "clip_delta"}
_NOISE = {"ss_mean": "SS mean", "ss_p50": "SS p50", "ss_max": "SS max", "ps_mean": "PS mean", "fps": "FPS",
          "peak_allocated": "memory"}
_WORLD = {"world_before": "world.adherence_before", "world_after": "world.adherence_after",
          "world_delay_blocks": "world.delay_blocks", "world_never": "world.never",
          "world_permanence": "world.permanence"}
_SWITCHES = ("use_cuda_graphs", "use_torch_compile", "use_static_kv", "use_quantized_kv", "use_async_vae",
             "use_prompt_cache", "model_dtype")
# What the block of a preset beyond the template shows as well.
_MORE_SWITCHES = (*_SWITCHES, "compile_mode", "kv_quantization", "kv_read_path", "use_fused_kernels",
                  "use_text_offload", "use_vae_offload")
_WORDS = ("name", "title", "hypothesis", "prompts", "prompts_file")


# ------------------------------------------------------------------------------- a campaign


@dataclass(frozen=True)
class Failure:
    """A run that ended without a result: its folder's label, why, and the parameters that it was given.
    `outcome` is "failed", or "not available" where the machine lacks what the preset needs.
    """

    label: str
    reason: str
    parameters: Mapping[str, Any]
    outcome: str = "failed"

    @property
    def preset(self) -> str:
        """`baseline` for the label baseline.repeat2."""
        return re.sub(r"\.repeat\d+$", "", self.label)


@dataclass(frozen=True)
class Campaign:
    """What lies in a campaign's folder: results, failed runs, and (place, reason) of what is not usable."""

    folder: Path
    results: list[dict[str, Any]]
    failures: list[Failure]
    problems: list[tuple[str, str]]


def load(campaign_dir: str | Path) -> Campaign:
    """Read a campaign's folder. A bad result is listed as a problem and hides no other.

    Raises:
        UserError: there is no such folder.
    """
    pd.set_option("display.max_colwidth", None)  # reasons are read, not counted
    folder = project_path(campaign_dir)
    results, problems = read_campaign(folder)
    failed = [path for path in sorted(folder.glob("*/failed.json")) if path.parent.name != SUMMARY]
    # Messages hold the whole path; a log that is published must not.
    told = [(path.relative_to(folder).as_posix(), reason.removeprefix(f"{path}: ").replace(f"{folder}/", ""))
            for path, reason in problems if path.with_name("failed.json") not in failed]
    return Campaign(folder, decided(results), [_read_failure(path) for path in failed], told)


def _read_failure(path: Path) -> Failure:
    label = path.parent.name.removesuffix(".failed")
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        report = None
    if not isinstance(report, dict):
        return Failure(label, "failed.json is not readable", {})
    parameters = report.get("parameters")
    return Failure(str(report.get("label", label)), str(report.get("meaning", "no reason recorded")),
                   parameters if isinstance(parameters, dict) else {}, str(report.get("status", "failed")))


def decided(results: Sequence[Result]) -> list[dict[str, Any]]:
    """The results, each with the verdict that the whole campaign allows.

    While a preset runs, the A/A repeat that tells the noise may still lie ahead. So a decision that records
    its `gate` is made anew with the baseline and the noise that are there now; others stay as they are.
    """
    baseline, noise = _baseline(results), _noise(results)
    return [{**result, "decision": {**metrics.decide(result, baseline, noise, gate), "gate": gate}}
            if (gate := lookup(result, "decision.gate")) else dict(result) for result in results]


def _baseline(results: Iterable[Result]) -> Result | None:
    return next((result for result in results if result["preset"] == BASELINE), None)


def _noise(results: Sequence[Result]) -> dict[str, Any] | None:
    """A/A noise of the campaign; None if nothing was run twice, or not on one kind of machine."""
    try:
        return metrics.campaign_noise(results)
    except UserError as error:
        log.warning("%s", error)
        return None


def _change(result: Result, baseline: Result | None, label: str) -> float | None:
    """Percent against the baseline; None where either is n/a or the two may not be compared."""
    if baseline is None or metrics.unfair(result, baseline):
        return None
    value, reference = (number(run, _FIGURES[label]) for run in metrics.matched(result, baseline))
    return None if value is None or not reference else 100 * (value / reference - 1)


def _within_target(result: Result) -> bool:
    worst = number(result, _FIGURES["SS Max"])
    return worst is not None and worst <= TARGET_MS


# ------------------------------------------------------------------------------- tables


def summary_table(results: Sequence[Result]) -> pd.DataFrame:
    """One row per result, numbers only (NaN for n/a); the change is against the first run of the baseline.

    The columns `world_...` are there if a video of the small world was judged in some run.
    """
    paths = {"ss_mean_ms": _FIGURES["SS Mean"], "ss_p50_ms": "latency.ss_ms_per_frame.p50",
             "ss_p95_ms": "latency.ss_ms_per_frame.p95", "ss_p99_ms": _FIGURES["SS P99"],
             "ss_max_ms": _FIGURES["SS Max"], "ps_mean_ms": _FIGURES["PS Mean"],
             "ps_max_ms": "latency.ps_ms.max", "fps": "fps", "peak_gb": _FIGURES["Memory"],
             "kv_cache_gb": "memory_gb.kv_cache", "startup_buffer_ms": "playback.startup_buffer_ms",
             "psnr_db": "quality.psnr_db.mean", "ssim": "quality.ssim.mean", "lpips": "quality.lpips.mean",
             "clip_delta": "quality.clip_delta.mean", "blocks": "sizes.blocks_measured",
             "switches": "sizes.switches"} | (_WORLD if any(map(_is_judged, results)) else {})
    baseline, rows = _baseline(results), []
    for result in results:
        row = {"preset": result["preset"], "run": result.get("run", 1)}
        row |= {name: number(result, path) for name, path in paths.items()}
        rows.append(row | {
            "change_ss_mean_pct": _change(result, baseline, "SS Mean"),
            "within_40_ms": _within_target(result), "identical": lookup(result, "quality.identical"),
            "keep": lookup(result, "decision.keep"), "quick": lookup(result, "sizes.quick"),
            "weights": lookup(result, "weights.kind"), "gpu": lookup(result, "environment.gpu"),
            "created_utc": result.get("created_utc")})
    return pd.DataFrame(rows) if rows else pd.DataFrame(columns=["preset", "run", *paths])


def numbers_table(results: Sequence[Result]) -> pd.DataFrame:
    """The main columns of `summary_table` for readers: a row per run, and words where there is no number."""
    baseline, rows = _baseline(results), []
    verdicts = {True: "keep", False: "drop"}
    for result in results:
        ours = result["preset"] == BASELINE
        rows.append({
            "preset": result["preset"], "run": result.get("run", 1),
            "SS mean, ms": _rounded(result, _FIGURES["SS Mean"], 2),
            "change": _percent(_change(result, baseline, "SS Mean")),
            "SS max, ms": _rounded(result, _FIGURES["SS Max"], 2),
            "PS mean, ms": _rounded(result, _FIGURES["PS Mean"], 0),
            "FPS": _rounded(result, _FIGURES["FPS"], 1),
            "start-up buffer": figures.buffer_words(result),
            "memory, GB": _rounded(result, _FIGURES["Memory"], 2),
            "KV cache, GB": _rounded(result, "memory_gb.kv_cache", 2),
            "PSNR, dB": _fidelity_cell(result, baseline, "psnr_db", 1),
            "SSIM": _fidelity_cell(result, baseline, "ssim", 4),
            "verdict": "reference" if ours else verdicts.get(lookup(result, "decision.keep"), "undecided"),
            "blocks": _rounded(result, "sizes.blocks_measured", 0)})
    return pd.DataFrame(rows) if rows else pd.DataFrame(columns=["preset", "run"])


def _rounded(result: Result, path: str, digits: int) -> str:
    value = number(result, path)
    return "n/a" if value is None else f"{value:.{digits}f}"


def _fidelity_cell(result: Result, baseline: Result | None, metric: str, digits: int) -> str:
    """A figure of fidelity, or why there is no need of one; what is not identical must not look like it."""
    if result is baseline:
        return "reference"
    if lookup(result, "quality.identical") is True:
        return "identical"
    text = _rounded(result, f"quality.{metric}.mean", digits)
    return "0.9999" if metric == "ssim" and text == "1.0000" else text


def to_csv(results: Sequence[Result], path: str | Path) -> Path:
    """Write `summary_table` as CSV, atomically; return the path."""
    with atomic_path(path) as temporary:
        summary_table(results).to_csv(temporary, index=False)
    return Path(path)


def runs_table(campaign: Campaign) -> pd.DataFrame:
    """Everything that lies in the campaign's folder, and what became of it."""
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
    """A/A noise in percent of the preset that was run twice; no row if none was."""
    noise = _noise(results)
    shares = {name: number(noise or {}, key) for key, name in _NOISE.items()}
    row = {name: None if share is None else round(100 * share, 2) for name, share in shares.items()}
    rows = [{"preset": noise["preset"]} | row] if noise else []
    return pd.DataFrame(rows, columns=["preset", *_NOISE.values()])


def _is_judged(result: Result) -> bool:
    """Whether the result says how well the video followed its prompts."""
    return bool(result.get("world")) and not is_na(result["world"])


def world_table(results: Sequence[Result]) -> pd.DataFrame | None:
    """How well each run's video followed its prompts in the small world: shares, delays in blocks, what was
    wrong. A run whose video was not judged says why; None if none was judged.
    """
    if not any(map(_is_judged, results)):
        return None
    absent = na("not judged", "run the preset again")
    rows = []
    for result in results:
        world = result.get("world") or absent
        never = f", {world['never']} of {world['switches']} never" if world.get("never") else ""
        cells = {"adherence before": _share(world.get("adherence_before", world)),
                 "adherence after": _share(world.get("adherence_after", world)),
                 "switch delay, blocks": _share(world.get("delay_blocks", world), 1) + never,
                 "permanence": _share(world.get("permanence", world)),
                 "wrong": ", ".join(world.get("wrong", ())),
                 "not judged": ", ".join(world.get("not_judged", ()))}
        rows.append({"preset": result["preset"], "run": result.get("run", 1)} | cells)
    return pd.DataFrame(rows)


def _share(value: Any, digits: int = 3) -> str:
    return f"n/a ({value['reason']})" if is_na(value) else f"{value:.{digits}f}"


# ------------------------------------------------------------------------------- writing


def save_figures(campaign: Campaign) -> dict[str, figures.Chart]:
    """Draw the campaign's figures, save each as summary/<name>.png in its folder, return them by name."""
    charts = figures.campaign_figures(campaign.results)
    for name, chart in charts.items():
        with atomic_path(campaign.folder / SUMMARY / f"{name}.png") as temporary:
            chart.save(temporary)
    return charts


def write_campaign_log(campaign: Campaign, log_path: str | Path = "") -> Path:
    """Write summary/summary.csv and the log (default: into the campaign's folder); return the log's path."""
    to_csv(campaign.results, campaign.folder / SUMMARY / "summary.csv")
    path = project_path(log_path) if log_path else campaign.folder / LOG_NAME
    source = _shown(campaign.folder)
    if path != campaign.folder / LOG_NAME:
        source += f" --log {_shown(path)}"
    return write_log(campaign.results, path,
                     failures=campaign.failures, problems=campaign.problems, source=source)


def _shown(path: Path) -> str:
    """As seen from the project's folder, where it lies there: a log that is published holds no other path."""
    root = project_path("")
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name


def write_log(results: Sequence[Result], path: str | Path, *, failures: Sequence[Failure] = (),
              problems: Sequence[tuple[str, str]] = (), source: str = "") -> Path:
    """Write OPTIMIZATION_LOG.md atomically; return its path.

    Args:
        results: valid results; of a preset that was run twice, the first gives the figures.
        failures: runs without a result.
        problems: (place, reason) of what could not be read.
        source: what the log shall name as the arguments of the command that made it.

    Raises:
        UserError: the file cannot be written.
    """
    text = render_log(results, failures=failures, problems=problems, source=source)
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


# ------------------------------------------------------------------------------- the log


def render_log(results: Sequence[Result], *, failures: Sequence[Failure] = (),
               problems: Sequence[tuple[str, str]] = (), source: str = "") -> str:
    """The text of OPTIMIZATION_LOG.md; arguments as for `write_log`."""
    results = decided(results)
    found = {run.preset: run for run in map(_Run, figures.first_runs(results))}
    for failure in failures:
        if failure.label == failure.preset and failure.preset not in found:  # a repeat has no section
            words = {key: failure.parameters.get(key) for key in ("title", "hypothesis")}
            known = {"preset": failure.preset, **words, "parameters": failure.parameters}
            found[failure.preset] = _Run(known, failure.reason, failure.outcome)
    order = [preset for preset in (BASELINE, *EXPERIMENTS) if preset in found]
    runs = {preset: found[preset] for preset in [*order, *(p for p in found if p not in order)]}
    noise = _noise(results)

    # Ten parts: head, baseline, experiments 1 to 6, summary with recommendation, notes.
    head, baseline, *sections, summary, notes = _TEMPLATE.read_text(encoding="utf-8").split("\n---\n")
    blank = sections[EXPERIMENTS.index("balanced")]
    base = runs.get(BASELINE)
    if base:
        baseline = _fill_baseline(baseline, base, noise)
    for preset, run in runs.items():
        if preset in EXPERIMENTS:
            index = EXPERIMENTS.index(preset)
            sections[index] = _fill_experiment(sections[index], run, base, noise)
        elif preset != BASELINE:
            section = _extra_section(blank, len(sections) + 1, run, base)
            sections.append(_fill_experiment(section, run, base, noise))
    observed = [*_observations(results, runs, noise), *_troubles(failures, problems),
                *_closing(results, source)]
    notes = f"{notes.rstrip()}\n\n{_bullets(observed)}\n"
    return "\n---\n".join([head, baseline, *sections, _fill_summary(summary, runs), notes])


@dataclass
class _Run:
    """A preset that was run, as the log reads it: its figures as text, and why some are missing."""

    result: Result  # of a failed run: preset, title, hypothesis and parameters only
    failure: str = ""
    outcome: str = ""
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def preset(self) -> str:
        return str(self.result["preset"])

    @property
    def name(self) -> str:
        return _SUMMARY_NAMES.get(self.preset) or _escape(self.result.get("title") or self.preset)

    def figure(self, label: str) -> str:
        """One of `_FIGURES` as text."""
        return self.text(label, _FIGURES[label])

    def text(self, label: str, path: str) -> str:
        """The number at `path` as text, or n/a with a short reason; the long one is kept for the notes."""
        value = number(self.result, path)
        if value is not None:
            return _digits(value)
        if self.failure:
            return f"n/a ({self.outcome})"
        places = (lookup(self.result, at) for at in (path, path.rpartition(".")[0]))
        absent = next(filter(is_na, places), {"reason": "not recorded", "how_to_fix": "run the preset again"})
        self.missing[label] = f"{absent['reason']}; {absent.get('how_to_fix', '')}"
        clause = re.split("[;:(]", absent["reason"])[0].strip()
        return f"n/a ({_escape(clause if len(clause) <= 60 else clause[:59] + '…')})"


def _digits(value: float) -> str:
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}" if abs(value) >= 1 else f"{value:.4f}"


def _percent(value: float | None) -> str:
    return "n/a" if value is None else f"{round(value, 1) + 0.0:+.1f}%"  # + 0.0: no -0.0


def _escape(text: Any) -> str:
    """Somebody's text as one line of Markdown that shows just this text: no markup, no HTML, no blank."""
    text = " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    # Within a word an underscore is plain text in Markdown, and names are full of them.
    return re.sub(r"[\\`*\[\]|~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\\g<0>", text)


def _sentence(text: Any) -> str:
    text = str(text).strip().rstrip(" .;")
    is_word = re.match(r"[a-z]{2,}(?![\w.=])", text) or re.match(r"an? ", text)  # and no name or symbol
    return f"{_escape(text[:1].upper() + text[1:] if is_word else text)}."


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _label(line: str) -> str:
    """The first cell of a table row, else empty."""
    return line.split("|")[1].strip() if line.startswith("|") else ""


def _row(line: str, values: Sequence[str]) -> str:
    """A table row with its blanks filled in order; an n/a takes the place of both number and unit."""
    cells, todo = line.split("|"), iter(values)
    for index, cell in enumerate(cells):
        if _BLANK in cell:
            value = next(todo)
            cells[index] = f" {value} " if value.startswith("n/a") else cell.replace(_BLANK, value)
    return "|".join(cells)


def _fill_baseline(section: str, run: _Run, noise: Mapping[str, Any] | None) -> str:
    settings, lines = _settings(run), []
    for line in section.rstrip("\n").split("\n"):
        label = _label(line)
        if label in settings:
            line = f"| {label} | {settings[label]} |"
        elif label in _FIGURES:
            text = run.figure(label)
            if label in run.missing and label == "SS P99":
                n = lookup(run.result, "latency.ss_ms_per_frame.n")
                text = f"n/a: n too small (n={n}), max {run.figure('SS Max')} ms"
            line = _row(line, [text])
        lines.append(line)
        if label == "Dtype" and not run.failure:
            lines += ["", _bullets(_provenance(run))]
    notes = [*_run_notes(run, None, noise), *_missing(run)]
    return "\n".join([*lines, "", "**Notes**:", _bullets(notes)]) + "\n"


def _settings(run: _Run) -> dict[str, str]:
    parameters = lookup(run.result, "parameters")
    model = lookup(run.result, "model.name") or parameters.get("model")
    steps = parameters.get("denoising_steps")
    count = f"{len(steps)} ({', '.join(map(str, steps))})" if steps else "n/a"
    gpu, cpu = lookup(run.result, "environment.gpu"), lookup(run.result, "environment.cpu")
    device = f"n/a ({run.outcome})" if run.failure else gpu or f"none (CPU: {cpu or 'unknown'})"
    return {"Model": "LongLive-1.3B" if model == "longlive-1.3b" else _escape(model), "GPU": _escape(device),
            "Denoising Steps": _escape(count),
            "Local Attention": f"{_escape(parameters.get('local_attn_size', 'n/a'))} frames",
            "Frame Sink": f"{_escape(parameters.get('sink_size', 'n/a'))} frames",
            "Dtype": _escape(parameters.get("model_dtype", "n/a"))}


def _provenance(run: _Run) -> list[str]:
    """What the figures hang on, as lines below the table of settings."""
    result, environment = run.result, run.result["environment"]
    files = ", ".join(f"{part} sha256 {str(digest)[:12]}"
                      for part, digest in (lookup(result, "weights.sha256") or {}).items())
    weights = _escape(result["weights"]["kind"] + (f" ({files})" if files else ""))
    if weights == "random":
        weights += f", seed {_escape(lookup(result, 'weights.seed'))} (no official checkpoint was loaded)"
    names = {"driver": "driver", "CUDA": "cuda", "torch": "torch", "cuDNN": "cudnn", "Triton": "triton",
             "Python": "python", "attention": "attention_backend"}
    versions = ", ".join(f"{name} {_escape(environment.get(key) or 'n/a')}" for name, key in names.items())
    commit = _escape((environment.get("git_commit") or "unknown")[:12])
    dirty = " with uncommitted changes" if environment.get("git_dirty") else ""
    width, height = (lookup(result, f"parameters.{side}") or lookup(result, f"model.sizes.{side}") or "?"
                     for side in ("width", "height"))
    return [f"Weights: {weights}", f"Versions: {versions}",
            f"Code: commit {commit}{dirty}, run of {_escape(result['created_utc'])}",
            f"Pictures: {width}x{height} pixels, {result['sizes']['frames_per_block']} video frames a block"]


def _extra_section(blank: str, index: int, run: _Run, base: _Run | None) -> str:
    """The blank section of a preset that the template does not have, in the form of experiment 5.

    Its block holds the template's switches and every parameter that is not the baseline's.
    """
    parameters = lookup(run.result, "parameters")
    reference = lookup(base.result, "parameters") if base else parameters
    keys = [key for key in parameters if key in _MORE_SWITCHES
            or key not in _WORDS and parameters[key] != reference.get(key, parameters[key])]
    lines = (yaml.safe_dump({key: parameters[key]}, default_flow_style=True, width=1000) for key in keys)
    block = "\n".join(line.strip("{}\n") for line in lines)
    column = run.name if len(run.name) <= 24 else _escape(run.preset)
    text = re.sub(r"### Experiment 5: .*", lambda _: f"### Experiment {index}: {run.name}", blank)
    text = re.sub(r"(?s)```yaml\n.*?\n```", lambda _: f"```yaml\n{block}\n```", text)
    return text.replace("| Balanced |", f"| {column} |")


def _fill_experiment(section: str, run: _Run, base: _Run | None, noise: Mapping[str, Any] | None) -> str:
    lines = []
    notes = [*_run_notes(run, base, noise), *_configuration_notes(section, run)]
    run, base = _matched(run, base)
    for line in section.replace("\n**Notes**:\n", "\n").rstrip("\n").split("\n"):
        label, metric = _label(line), re.match(rf"- (.+): {_BLANK}(.*)", line)
        if label in _FIGURES:
            reference = base.figure(label) if base else "n/a (no baseline)"
            change = _percent(_change(run.result, base.result if base else None, label))
            line = _row(line, [reference, run.figure(label), change.rstrip("%")])
        elif metric:
            line = f"- {metric[1]}: {_quality(run, metric[1], metric[2])}"
        elif line.startswith("**Quality**") and f"- PSNR: {_BLANK}" not in section:
            line += f"\n{_quality_sentence(run)}"
        elif line.startswith("**Decision**"):
            decision = run.result.get("decision") or {"keep": None}
            keep, drop = ("x" if decision["keep"] is wanted else " " for wanted in (True, False))
            reason = f"No decision: {run.outcome}." if run.failure else \
                f"{_sentence(decision['rationale'])} Rule: {_sentence(decision['rule'])}"
            line = f"**Decision**: [{keep}] Keep  [{drop}] Drop\n{reason}"
        lines.append(line)
    notes += _missing(run)
    return "\n".join(lines).rstrip("\n") + f"\n\n**Notes**:\n{_bullets(notes)}\n"


# ------------------------------------------------------------------------------- words about one run


def _quality(run: _Run, label: str, unit: str) -> str:
    """What follows "PSNR: " and its siblings: the mean, and the worst frame where it is recorded."""
    if label == "PSNR" and lookup(run.result, "quality.identical") is True:
        return "infinite, all compared frames are identical"
    name = _QUALITY[label]
    text = run.text(label, f"quality.{name}.mean")
    worst = number(run.result, f"quality.{name}.{'max' if label == 'LPIPS' else 'min'}")
    if text.startswith("n/a") or worst is None:
        return text if text.startswith("n/a") else text + unit
    return f"{text}{unit} (worst frame {_digits(worst)}{unit})"


def _quality_sentence(run: _Run) -> str:
    """The free text of experiments 1 to 3."""
    if run.failure:
        return f"n/a ({run.outcome})"
    quality = run.result["quality"]
    if not quality.get("reference"):
        return f"Not compared: {_sentence(lookup(quality, 'psnr_db.reason') or 'no reference')}"
    compared = f"{quality.get('frames_compared')} of {quality.get('frames_total')} frames compared"
    if quality.get("identical") is True:
        return f"Exact: bit-identical to the baseline ({compared}); {_escape(quality.get('label'))}."
    values = ", ".join(f"{name} {_quality(run, name, ' dB' if name == 'PSNR' else '')}" for name in _QUALITY)
    return f"{values}, against the baseline ({compared}); {_escape(quality.get('label'))}."


def _quality_short(run: _Run) -> str:
    if lookup(run.result, "quality.identical") is True:
        return "exact"
    text = run.text("PSNR", "quality.psnr_db.mean")
    return text if text.startswith("n/a") else f"PSNR {text} dB"


def _configuration_notes(section: str, run: _Run) -> list[str]:
    """Where the run's parameters are not those of the configuration block of its section."""
    block = yaml.safe_load(re.search(r"(?s)```yaml\n(.*?)\n```", section)[1]) or {}
    there = lookup(run.result, "parameters")
    return [f"Configuration: run with {key} {_escape(json.dumps(there[key]))}, not "
            f"{_escape(json.dumps(value))} as above."
            for key, value in block.items() if key in there and there[key] != value]


def _run_notes(run: _Run, base: _Run | None, noise: Mapping[str, Any] | None) -> list[str]:
    """Hypothesis and outcome, what the rooms did, and everything that qualifies the figures."""
    result = run.result
    other = "" if _is_large(result) else f" (of LongLive-1.3B on an H100; this is the model {_model(result)})"
    notes = [f"Hypothesis{other}: {_sentence(result['hypothesis'])}"] if result.get("hypothesis") else []
    if run.failure:
        return [*notes, f"Failed: {_sentence(run.failure)}"]
    if base and not base.failure:
        notes += [_outcome(run, base), *_lengths(run, base), *_apart(run.result, base.result)]
    notes += [_room(room) for room in result["rooms"]]
    notes.append(f"Clocks: {_sentence(lookup(result, 'latency.clock_disagreement.sentence'))}")
    if noise:
        notes.append(_noise_sentence(noise))
    notes.append(_sample(result))
    setup = {name: number(result, f"setup_s.{name}") for name in result["setup_s"]}
    seconds = ", ".join(f"{_escape(name)} {_digits(value)} s" for name, value in setup.items() if value)
    notes.append(f"Set-up, not part of any latency: {seconds or 'nothing recorded'}.")
    notes.append(_playback(result))
    notes += [*_memory(result), *_gpu_clocks(result)]
    if lookup(result, "environment.co_scheduled"):
        notes.append("Something else ran on the machine meanwhile: not fit for comparison.")
    notes += [f"Quality check: {_sentence(flag)}" for flag in lookup(result, "quality.flags") or []]
    if lookup(result, "quality.free_running"):
        free = {name: number(result, f"quality.free_running.{key}.mean") for name, key in _QUALITY.items()}
        words = ", ".join(f"{name} {_digits(value)}" for name, value in free.items() if value is not None)
        same = lookup(result, "quality.free_running.identical") is True
        notes.append("Free-running, where differences add up from block to block: "
                     f"{'identical frames' if same else words or 'n/a'}.")
    if lookup(result, "quality.reference"):
        notes.append(f"Quality is {_escape(lookup(result, 'quality.label'))}: how far the frames are from "
                     f"those of {_escape(lookup(result, 'quality.reference'))}, not how good they look.")
    notes += _world(result)
    notes += _variations(result)
    notes += [_sentence(note) for note in result.get("notes") or []]
    return notes


def _missing(run: _Run) -> list[str]:
    """Why some of the figures that were asked for are not there."""
    return [f"{label} is n/a: {_sentence(reason)}" for label, reason in run.missing.items()]


def _world(result: Result) -> list[str]:
    """Whether the video showed its prompts, where that was asked: a note, or why it cannot be told."""
    world = result.get("world")
    if not world:
        return []
    if is_na(world):
        return [f"Small world: n/a, {_escape(world['reason'])}; {_sentence(world['how_to_fix'])}"]
    never = f" ({world['never']} of {world['switches']} switches never came)" if world["never"] else ""
    text = (f"Small world: prompt adherence {_share(world['adherence_before'])} before a prompt switch and "
            f"{_share(world['adherence_after'])} from the second block after it on, switch delay in blocks "
            f"{_share(world['delay_blocks'], 1)}{never}, object permanence "
            f"{_share(world['permanence'])}; {world['label']}")
    told = [_sentence(text)]
    told += [f"{name}: {_escape(', '.join(world[key]))}."
             for name, key in (("Wrong", "wrong"), ("Not judged", "not_judged")) if world[key]]
    return [" ".join(told)]


def _variations(result: Result) -> list[str]:
    """One note for each variation of the preset, after one that says what they are."""
    if not result.get("variations"):
        return []
    lines = ["Variations, each the preset with one key changed, measured by the same two streams:"]
    for name, row in variations_table(result).iterrows():
        cells = (f"{column.partition(',')[0]} {_cell(value, column.partition(',')[2])}"
                 for column, value in row.items())
        lines.append(f"  - {_escape(name)}: {'; '.join(cells)}")
    return ["\n".join(lines)]


def _cell(value: Any, unit: str) -> str:
    if is_na(value):
        return f"n/a ({_escape(value['reason'])})"
    return value if isinstance(value, str) else f"{_digits(value)}{unit}"


def _matched(run: _Run, base: _Run | None) -> tuple[_Run, _Run | None]:
    """Both over the blocks and switches that are compared (`metrics.matched`)."""
    if base is None or run.failure or base.failure or metrics.unfair(run.result, base.result):
        return run, base
    pair = metrics.matched(run.result, base.result)
    return replace(run, result=pair[0]), replace(base, result=pair[1])


def _lengths(run: _Run, base: _Run) -> list[str]:
    """That the table shows a part of the longer run only, and what all of it gives."""
    lines = []
    for whole, part in zip((run, base), _matched(run, base)):
        if part.result is not whole.result:
            sizes, all_sizes = part.result["sizes"], whole.result["sizes"]
            lines.append(f"Compared over the first {sizes['blocks_measured']} steady-state blocks and "
                         f"{sizes['switches']} prompt switches of both; all that was measured of "
                         f"{whole.name}: {all_sizes['blocks_measured']} blocks, SS mean "
                         f"{whole.figure('SS Mean')} ms, SS max {whole.figure('SS Max')} ms.")
    return lines


def _apart(result: Result, baseline: Result) -> list[str]:
    """That the two were not measured in one go."""
    codes = [str(lookup(r, "environment.git_commit") or "unknown")[:12] for r in (result, baseline)]
    if codes[0] == codes[1]:
        return []
    days = [_escape(r["created_utc"]) for r in (result, baseline)]
    return [f"Not measured in one go with the baseline: commit {codes[0]}, {days[0]}; the baseline's is "
            f"{codes[1]}, {days[1]}."]


def _outcome(run: _Run, base: _Run) -> str:
    """What the hypothesis is to be compared with."""
    run, base = _matched(run, base)
    text = f"Outcome: SS mean {run.figure('SS Mean')} ms per video frame against {base.figure('SS Mean')}"
    if difference := metrics.unfair(run.result, base.result):
        return f"{text}, not comparable: {_escape(difference)}."
    verb = "meets" if _within_target(run.result) else "misses"
    target = f" {verb} the {TARGET_MS:.0f} ms target" if _is_large(run.result) else ""
    others = "; ".join(f"{name} {run.figure(label)} {unit} ({change})"
                       for label, (name, unit) in _OTHERS.items()
                       if (change := _percent(_change(run.result, base.result, label))) != "n/a")
    return (f"{text} ({_percent(_change(run.result, base.result, 'SS Mean'))}); SS max "
            f"{run.figure('SS Max')} ms{target}; {others}{'; ' if others else ''}{_per_block(run, base)}.")


def _per_block(run: _Run, base: _Run) -> str:
    """How far the block interval moved, and through which stages."""
    runs = [base.result, run.result]
    before, after = (math.fsum(r["latency"]["ss_block_ms"]) / r["sizes"]["blocks_measured"] for r in runs)
    rest, moved = after - before, []
    for name in run.result["latency"]["stages_ms"]:
        was, now = (number(r, f"latency.stages_ms.{name}.mean") for r in runs)
        if was is not None and now is not None:
            rest -= now - was
            moved.append(f"{_escape(name)} {now - was:+.1f} ms")
    parts = ", ".join([*moved, f"overlap of stages and time outside them {rest:+.1f} ms"])
    return f"per block {after - before:+.1f} ms: {parts}"


def _memory(result: Result) -> list[str]:
    """What stands behind the one figure of the tables."""
    names = {"allocated": "peak_allocated", "reserved": "peak_reserved", "in use on the GPU": "device_used",
             "KV cache": "kv_cache"}
    values = {name: number(result, f"memory_gb.{key}") for name, key in names.items()}
    words = ", ".join(f"{name} {_digits(value)}" for name, value in values.items() if value is not None)
    return [f"Memory in GB: {words}."] if values["allocated"] is not None else []


def _gpu_clocks(result: Result) -> list[str]:
    found = [lookup(result, f"environment.clocks_{when}") for when in ("before", "after")]
    if not all(clocks and clocks.get("sm_mhz") for clocks in found):
        return []
    before, after = (f"{clocks['sm_mhz']:.0f} MHz at {clocks['power_w'] or 0:.0f} W" for clocks in found)
    held = ", ".join(found[1].get("throttle_reasons") or [])
    return [f"GPU clock: {before} before the streams, {after} after"
            f"{f', held back by {_escape(held)}' if held else ''}."]


def _room(room: Mapping[str, Any]) -> str:
    report = room.get("report") or {}
    facts = [str(value) if key == "done" else f"{key} {json.dumps(value)}" for key, value in report.items()]
    state = "" if room.get("applied") else ", NOT applied"
    level = f" ({_escape(room['level'])})" if room.get("level") else ""
    done = _sentence("; ".join(facts) or "nothing reported")
    return f"Room {_escape(room.get('name'))}{level}{state}: {done}"


def _is_large(result: Result) -> bool:
    """Whether it is the model that the hypotheses and the target speak of."""
    return _model(result) == "longlive-1.3b"


def _model(result: Result) -> str:
    return _escape(lookup(result, "model.name") or lookup(result, "parameters.model") or "unknown")


def _noise_sentence(noise: Mapping[str, Any]) -> str:
    shares = {name: number(noise, key) for key, name in _NOISE.items()}
    words = ", ".join(f"{name} {share:.1%}" for name, share in shares.items() if share is not None)
    over = f"over {noise['blocks']} blocks and {noise['switches']} prompt switches"
    return f"Noise (A/A, {_escape(noise['preset'])} run twice, {over}): {words}."


def _sample(result: Result) -> str:
    sizes = result["sizes"]
    quick = " (a quick run, too short for more than a first impression)" if sizes["quick"] else ""
    text = (f"Sample: {sizes['blocks_measured']} steady-state blocks after {sizes['warmup_blocks']} of "
            f"warm-up, {sizes['switches']} prompt switches{quick}.")
    by_prompt = lookup(result, "latency.ps_by_prompt") or {}
    if by_prompt:
        text += " PS by prompt cache: " + ", ".join(
            f"{_escape(outcome)} {_digits(times['mean'])} ms (n={times['n']})"
            for outcome, times in sorted(by_prompt.items())) + "."
    built = {kind: count for kind, count in (result.get("built_while_measured") or {}).items() if count}
    if built:
        text += " Not rehearsed, built inside the measured streams: " + ", ".join(
            f"{count} {_escape(kind)}" for kind, count in built.items()) + "."
    if not sizes["switches"] or "switch_events" not in result:
        return text
    all_blocks = metrics.with_switches(map(Event.from_row, result["switch_events"]),
                                       first_measured_block=sizes["warmup_blocks"],
                                       frames_per_block=sizes["frames_per_block"])
    return (f"{text} In the stream in which every second block is a switch: mean "
            f"{_digits(all_blocks['mean'])} ms, max {_digits(all_blocks['max'])} ms per video frame.")


def _playback(result: Result) -> str:
    words = []
    for path, name in (("playback", "steady state"),
                       ("playback.switch_stream", "with a prompt switch every second block")):
        buffer_ms = number(result, f"{path}.startup_buffer_ms")
        if buffer_ms is not None:
            slow = lookup(result, f"{path}.sustained") is False
            words.append(f"{name}, " + ("too slow" if slow else f"start-up buffer {buffer_ms:.0f} ms"))
    return f"Playback at {number(result, 'playback.fps') or 0:g} FPS: {'; '.join(words) or 'n/a'}."


# ------------------------------------------------------------------------------- words about all runs


def _fill_summary(section: str, runs: Mapping[str, _Run]) -> str:
    presets, lines = {name: preset for preset, name in _SUMMARY_NAMES.items()}, []
    for line in section.split("\n"):
        label = _label(line)
        run = runs.get(presets.get(label, ""))
        lines.append(_summary_row(line, run) if run else line)
        if label == "Speed":
            others = [run for preset, run in runs.items() if preset not in _SUMMARY_NAMES]
            lines += [_summary_row(line.replace(" Speed ", f" {run.name} "), run) for run in others]
    text = "\n".join(lines)
    if set(runs) <= {BASELINE}:
        return text
    best, rationale = _recommend(runs)
    text = text.replace(f"**Preset**: {_BLANK}", f"**Preset**: {best.name if best else 'none'}")
    text = text.replace("**Rationale**:\n-\n-\n-", f"**Rationale**:\n{_bullets(rationale)}")
    for preset in ("quality", "speed"):
        if preset in runs:
            blank = f"- {_SUMMARY_NAMES[preset]}: {_BLANK}"
            text = text.replace(blank, blank.replace(_BLANK, _when(runs[preset], best or runs.get(BASELINE))))
    others = [run for run in _worth_taking(runs) if run.preset not in ("quality", "speed") and run != best]
    if best and others:
        text = f"{text.rstrip()}\n{_bullets(f'{run.name}: {_when(run, best)}' for run in others)}\n"
    return text


def _summary_row(line: str, run: _Run) -> str:
    if _within_target(run.result):
        line = line.replace("[ ]", "[x]")
    return _row(line, [run.figure("SS Max"), run.figure("FPS"), run.figure("Memory"), _quality_short(run)])


def _recommend(runs: Mapping[str, _Run]) -> tuple[_Run | None, list[str]]:
    """The recommended run, or None, and why."""
    measured = sorted((run for run in runs.values() if not run.failure),
                      key=lambda run: number(run.result, _FIGURES["SS Max"]))
    best = next((run for run in measured if _within_target(run.result) and _kept(run)), None)
    faster = measured[:measured.index(best)] if best else measured[:3]
    small = sorted({_model(run.result) for run in measured if not _is_large(run.result)})
    reasons = [f"These are runs of the model {', '.join(small)}: they show the rule at work and recommend "
               "nothing for LongLive-1.3B."] if small else []
    reasons += [f"Rule: the lowest SS max among the presets that stay within {TARGET_MS:.0f} ms per video "
               "frame and whose decision is Keep (gain above the noise, quality gate passed); the baseline "
               "needs no decision."]
    if best:
        base = runs[BASELINE].result if BASELINE in runs else None
        reasons += [f"{best.name}: SS max {best.figure('SS Max')} ms, FPS {best.figure('FPS')}, SS mean "
                    f"{best.figure('SS Mean')} ms ({_percent(_change(best.result, base, 'SS Mean'))} against "
                    "the baseline).",
                    f"Quality: {'it is the reference' if best.preset == BASELINE else _quality_short(best)}."]
    else:
        reasons.append("No measured preset meets it.")
    return best, [*reasons, *(f"Not {run.name}, SS max {run.figure('SS Max')} ms: "
                              f"{_sentence(run.result['decision']['rationale'])}" for run in faster)]


def _worth_taking(runs: Mapping[str, _Run]) -> list[_Run]:
    """The kept presets that no other one beats: none is at least as fast and as faithful, and better in one.
    One that is not meant to be fast is always worth it.
    """
    kept = [run for run in runs.values() if not run.failure and run.preset != BASELINE and _kept(run)]
    costs = {run.preset: (number(run.result, _FIGURES["SS Max"]), -_fidelity(run)) for run in kept}

    def is_beaten(ours: tuple[float, float]) -> bool:
        return any(cost != ours and cost[0] <= ours[0] and cost[1] <= ours[1] for cost in costs.values())

    return [run for run in kept if _objective(run) != "latency" or not is_beaten(costs[run.preset])]


def _objective(run: _Run) -> str:
    return lookup(run.result, "decision.gate.objective") or "latency"


def _kept(run: _Run) -> bool:
    return run.preset == BASELINE or lookup(run.result, "decision.keep") is True


def _when(run: _Run, other: _Run | None) -> str:
    """When to take `run` instead of `other`, the recommended one or the baseline."""
    if run.failure:
        return f"n/a ({run.outcome})"
    if run is other:
        return "it is the recommended one"
    facts = f"SS max {run.figure('SS Max')} ms, {_quality_short(run)}{'' if _kept(run) else ', not kept'}"
    if other is None or other.failure:
        return f"nothing to compare it with ({facts})"
    if _objective(run) != "latency":
        label = {"memory": "Memory", "switch": "PS Mean"}[_objective(run)]
        better = (number(run.result, _FIGURES[label]) or 0) < (number(other.result, _FIGURES[label]) or 0)
        name, unit = _OTHERS[label]
        facts = f"{name} {run.figure(label)} {unit}, {facts}"
        purpose = f"where {'memory' if label == 'Memory' else 'the wait at a prompt switch'} counts most"
    elif run.preset == "speed":
        better = number(run.result, _FIGURES["SS Max"]) < number(other.result, _FIGURES["SS Max"])
        purpose = "where latency counts more than fidelity"
    else:
        better = _fidelity(run) > _fidelity(other)
        purpose = "where fidelity counts more than latency"
    return f"{purpose if better else f'no reason in these figures to prefer it to {other.name}'} ({facts})"


def _fidelity(run: _Run) -> float:
    """PSNR to the baseline: infinite if identical, below all else if unknown."""
    if run.preset == BASELINE or lookup(run.result, "quality.identical") is True:
        return float("inf")
    psnr = number(run.result, "quality.psnr_db.mean")
    return float("-inf") if psnr is None else psnr


def _observations(results: Sequence[Result], runs: Mapping[str, _Run],
                  noise: Mapping[str, Any] | None) -> list[str]:
    if not results:
        return []
    lines = [_noise_sentence(noise) if noise else "Noise (A/A): unknown, no preset was run twice under equal "
             "conditions; small changes mean nothing."]
    for path, words in (("latency.clock_disagreement.flag", "Clocks: host and CUDA clock disagree in"),
                        ("sizes.quick", "Quick runs, too short for more than a first impression:")):
        presets = [run.preset for run in runs.values() if lookup(run.result, path)]
        if presets:
            lines.append(f"{words} {_escape(', '.join(presets))}.")
    read = [run for run in runs.values() if lookup(run.result, "latency.clock_disagreement.available")]
    if read and not any(lookup(run.result, "latency.clock_disagreement.flag") for run in read):
        lines.append("Clocks: host and CUDA clock agree wherever both were read.")
    held = [f"{run.preset} ({lookup(run.result, 'environment.clocks_after.sm_mhz'):.0f} MHz)"
            for run in runs.values() if lookup(run.result, "environment.clocks_after.throttle_reasons")
            and lookup(run.result, "environment.clocks_after.sm_mhz")]
    if held:
        lines.append(f"The GPU held its clock back at the end of {_escape(', '.join(held))}.")
    for path in ("environment.git_commit", "environment.torch", "environment.gpu"):
        found = sorted({str(lookup(result, path))[:24] for result in results})
        if len(found) > 1:
            lines.append(f"The runs differ in {path}: {_escape(', '.join(found))}.")
    return lines


def _troubles(failures: Sequence[Failure], problems: Sequence[tuple[str, str]]) -> list[str]:
    return [
        *(
            f"{failure.outcome.capitalize()}: {_escape(failure.label)}: {_sentence(failure.reason)}"
            for failure in failures
        ),
        *(f"Not usable: {_escape(place)}: {_sentence(reason)}" for place, reason in problems),
    ]


def _closing(results: Sequence[Result], source: str) -> list[str]:
    keys = {"SS": "ss_ms_per_frame", "PS": "ps_ms", "P99": "percentile", "FPS": "fps", "Memory": "memory_gb",
            "Clocks": "clocks", "Comparison": "comparison"}
    lines = [f"{name}: {_escape(metrics.DEFINITIONS[key])}" for name, key in keys.items()] if results else []
    command = f" by `python -m longlive_opt.report {source}`" if source else ""
    return [*lines, f"This file is generated{command} from {len(results)} results: do not edit it."]


def main(argv: Sequence[str] | None = None) -> int:
    """Write a campaign's log, table and figures anew. Exit status 2 for wrong input."""
    parser = argparse.ArgumentParser(prog="python -m longlive_opt.report", description=main.__doc__)
    parser.add_argument("campaign", type=Path, metavar="CAMPAIGN_DIR", help="such as outputs/demo")
    parser.add_argument("--log", type=Path, metavar="PATH", help=f"default: {LOG_NAME} in CAMPAIGN_DIR")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        campaign = load(arguments.campaign.resolve())
        charts = save_figures(campaign)
        path = write_campaign_log(campaign, arguments.log.resolve() if arguments.log else "")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    log.info("%s: %d results, %d failed, %d not usable, %d figures", path.name, len(campaign.results),
             len(campaign.failures), len(campaign.problems), len(charts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
