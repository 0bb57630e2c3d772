"""How the tiny model was trained and what it can do: tables and figures from the files that training leaves.

    training/log.jsonl   a line every so many steps: {stage, step, progress, ms_per_step, losses ...}
    check.json           held-out prompts judged by the checker of the world; the same with parts taken away

Both lie in the folder of the weights. Reading them needs neither torch nor a GPU.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd
from IPython.display import HTML

from .errors import UserError
from .figures import Chart
from .inputs import project_path
from .results import lookup, number

LOG = "training/log.jsonl"
CHECK = "check.json"
DRIFT = "long.lost"
TARGETS = {"plain.adherence": (">=", 0.90), "switch.adherence": (">=", 0.85), DRIFT: ("<=", 0.05)}
"""What the tiny model is to reach: adherence to held-out prompts, in the second block after a switch, and
what of it a minute may cost."""

_FIGURES = {
    "plain.adherence": "prompt adherence, 5 s of one held-out prompt",
    "switch.adherence": "adherence in the second block after a prompt switch",
    DRIFT: "adherence lost over 60 s (first 5 s minus last 5 s)",
    "switch.later_adherence": "adherence from the third block after a switch on",
    "switch.delay_blocks": "switch delay in blocks, where the new scene came",
    "switch.delay_blocks_never": "switches whose new scene never came",
    "plain.permanence": "object permanence, 5 s of one prompt",
    "switch.old_left": "share of what changed that is as before, 0.25 to 1 s after a switch",
    "switch.permanence": "object permanence after a switch",
    "long.first": "adherence, first 5 s of 60 s",
    "long.last": "adherence, last 5 s of 60 s",
    "long.permanence": "object permanence, last 5 s of 60 s",
    "long.in_place": "share of the objects that keep their place over 60 s, of those that are to",
}
_ABLATION = {"videos": "switch.videos", "second block after a switch": "switch.adherence",
             "later": "switch.later_adherence", "delay, blocks": "switch.delay_blocks",
             "never": "switch.delay_blocks_never", "old prompt left": "switch.old_left",
             "permanence": "switch.permanence",
             "videos of 60 s": "long.videos", "first 5 s": "long.first", "last 5 s": "long.last",
             "lost over 60 s": DRIFT, "in place": "long.in_place"}
_NEVER = "switch.delay_blocks_never"
_BARS = {"switch.adherence": ("", "adherence"),  # what the title says after the column, and what is counted
         "switch.old_left": (" after a switch", "share of what changed"),
         "long.last": (" of 60 s", "adherence"),
         "long.in_place": (" after 60 s", "share of what is to stay")}
_FULL = "full model"
_VARIANTS = {"no_sink": "no sink", "no_recache": "no recache",
             "full": f"{_FULL}, on the videos of the windows"}
_MACHINE = ("gpu", "cpu", "cpu_threads", "torch", "git_commit", "git_dirty")
_TITLES = {"vae": "VAE", "text": "text encoder alone", "teacher": "teacher", "student": "student"}
_SERIES = {"loss": "weighted sum", "l1": "pixels, L1", "edges": "differences in space, L1",
           "change": "differences in time, L1", "kl": "KL", "flow": "flow",
           "opening_flow": "flow of openings", "switch_flow": "flow after a switch", "opening": "openings",
           "reading": "attributes of the prompt, cross entropy", "true": "true past", "stream": "own past",
           "gradient": "norm of the gradient", "read_right": "share read rightly"}
_NO_LOSS = ("gradient", "read_right")
_BESIDE = ("stage", "step", "progress", "ms_per_step")
_COLOURS = ("#3b75af", "#d1491b", "#5aa469", "#9467bd", "#8a8a8a", "#e0a100")
_LOG_FROM = 4.0  # a curve that falls by less shows more on a linear scale

Row = dict[str, Any]


@dataclass(frozen=True)
class TrainingReport:
    """What the notebook shows of one weights folder; what is not there becomes a sentence that says how to
    make it.
    """

    folder: Path
    name: str  # as it was given: what a command shall read

    @classmethod
    def open(cls, weights_dir: str) -> TrainingReport:
        """Args: weights_dir: seen from the project's folder."""
        pd.set_option("display.max_colwidth", None)
        return cls(project_path(weights_dir), str(weights_dir))

    def losses(self, stage: str) -> Chart | HTML:
        """Loss curves of one stage: vae, text, teacher or student."""
        if not (self.folder / LOG).is_file():
            return self._train_first()
        rows = [row for row in read_log(self.folder, self.name) if row["stage"] == stage]
        if not rows:
            return _sentence(f"The log in {self.name} has no steps of the stage {stage}.")
        return loss_chart(rows)

    def stages(self) -> pd.DataFrame | HTML:
        """Steps and minutes of every stage."""
        there = (self.folder / LOG).is_file()
        return stage_table(read_log(self.folder, self.name)) if there else self._train_first()

    def about(self) -> HTML:
        """On what the check was made."""
        return self._of_check(lambda check: _sentence(conditions(check)))

    def check(self) -> pd.DataFrame | HTML:
        """The figures against their targets."""
        return self._of_check(check_table)

    def ablation(self) -> pd.DataFrame | HTML:
        """The model with parts taken away, beside the full one."""
        return self._of_check(ablation_table)

    def ablation_figure(self) -> Chart | HTML:
        """The same as bars."""
        return self._of_check(ablation_chart)

    def conclusions(self) -> HTML:
        """What the check says in the end."""
        return self._of_check(lambda check: HTML("".join(
            f"<p>{html.escape(line)}</p>" for line in conclusions(check))))

    def _of_check(self, show: Callable[[dict[str, Any]], Any]) -> Any:
        if (self.folder / CHECK).is_file():
            return show(read_check(self.folder, self.name))
        return _sentence(f"{self.name} was not checked yet; with trained weights there, run: "
                         f"{check_command(self.name)}")

    def _train_first(self) -> HTML:
        return _sentence(f"{self.name} has no training log; train the model, on an H100 in about 25 minutes: "
                         f"{train_command(self.name)}")


def train_command(name: str) -> str:
    """What makes a log."""
    return f"python -m longlive_opt.training --out {name} --device cuda"


def check_command(name: str) -> str:
    """What makes a check."""
    return f"{train_command(name)} --stage check"


# ------------------------------------------------------------------------------- reading


def read_log(folder: str | Path, name: str = "") -> list[Row]:
    """The rows of a training log, without those that a resumed stage made again.

    Args:
        name: the folder as messages shall name it.

    Raises:
        UserError: no log there, or a line of it is damaged.
    """
    path, name = Path(folder) / LOG, name or str(folder)
    text = _read(path, f"train the model first: {train_command(name)}")
    rows: dict[str, list[Row]] = {}
    for line, content in enumerate(text.splitlines(), 1):
        row = _parse(content)
        if not isinstance(row, dict) or not isinstance(row.get("stage"), str) \
                or not all(_is_number(row.get(key)) for key in _BESIDE[1:]) \
                or not all(_is_number(value) for key, value in row.items() if key != "stage"):
            raise UserError(f"{path}: line {line} is damaged; delete that line, or delete the folder "
                            f"{name}/training and train again: {train_command(name)}")
        stage = rows.setdefault(row["stage"], [])
        while stage and stage[-1]["step"] >= row["step"]:  # resumed from a checkpoint before it
            stage.pop()
        stage.append(row)
    if not rows:
        raise UserError(f"{path}: is empty; train the model first: {train_command(name)}")
    return [row for stage in rows.values() for row in stage]


def read_check(folder: str | Path, name: str = "") -> dict[str, Any]:
    """The content of check.json, with `lost` added where a minute was judged.

    Args:
        name: the folder as messages shall name it.

    Raises:
        UserError: no check there, or it is damaged.
    """
    path, name = Path(folder) / CHECK, name or str(folder)
    check = _parse(_read(path, f"check the weights first: {check_command(name)}"))
    parts = [check, *_variants(check).values()] if isinstance(check, dict) else []
    if not parts or not all(isinstance(part, dict) for part in parts) or not lookup(check, "plain.videos") \
            and not lookup(check, "switch.videos") and not lookup(check, "long.videos"):
        raise UserError(f"{path}: is damaged, or no check; make it again: {check_command(name)}")
    for part in parts:
        first, last = number(part, "long.first"), number(part, "long.last")
        if first is not None and last is not None:
            part["long"].setdefault("lost", round(first - last, 4))
    return check


def _variants(check: Mapping[str, Any]) -> Mapping[str, Any]:
    variants = check.get("variants")
    return variants if isinstance(variants, Mapping) else {}


def _read(path: Path, remedy: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise UserError(f"{path}: cannot be read ({reason}); {remedy}") from error


def _parse(text: str) -> Any:
    """JSON, or None for anything else, NaN and infinity included."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None


def _refuse(token: str) -> None:
    raise ValueError(token)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _sentence(text: str) -> HTML:
    return HTML(f"<p>{html.escape(text)}</p>")


# ------------------------------------------------------------------------------- tables


def stage_table(rows: Sequence[Row]) -> pd.DataFrame:
    """One row per stage: steps, minutes of training, progress (the share of the planned time that had passed
    at the last line of the log, beyond which no step counts), and what became of each curve.
    """
    table = {}
    for stage in dict.fromkeys(row["stage"] for row in rows):
        own = [row for row in rows if row["stage"] == stage]
        steps, spent = own[-1]["step"], _minutes(own)
        table[_TITLES.get(stage, stage)] = {
            "steps": int(steps), "minutes": round(spent, 2),
            "ms per step": round(6e4 * spent / steps, 1), "progress": own[-1]["progress"],
            "from, to": "; ".join(_curves(own))}
    return pd.DataFrame.from_dict(table, orient="index")


def _curves(rows: Sequence[Row]) -> list[str]:
    """Of each curve of a stage that lasts to its end: the first value and the mean of the last tenth."""
    last, curves = rows[-math.ceil(len(rows) / 10):], []
    for key in _series(rows):
        if all(key in row for row in last):
            first = next(row for row in rows if key in row)
            since = "" if first is rows[0] else f" (from step {first['step']:.0f})"
            end = sum(row[key] for row in last) / len(last)
            curves.append(f"{_SERIES.get(key, key)} {_digits(first[key])} to {_digits(end)}{since}")
    return curves


def _minutes(rows: Sequence[Row]) -> float:
    """Of training up to the last of the rows of a stage. A line after a resumption is a mean over fewer steps
    than lie between it and the line before, so time is counted by the progress, and only its scale by lines.
    """
    scale = median((now["step"] - before["step"]) * now["ms_per_step"]
                   / max(now["progress"] - before["progress"], 1e-4)
                   for before, now in pairwise([{"step": 0, "progress": 0}, *rows]))
    return scale * rows[-1]["progress"] / 6e4


def check_table(check: Mapping[str, Any]) -> pd.DataFrame:
    """Every figure of a check, those with a target first, with the number of videos that it is a mean of."""
    rows = []
    for path, words in _FIGURES.items():
        kind, _, key = path.partition(".")
        sign, target = TARGETS.get(path, ("", None))
        none_came = key == "delay_blocks" and (number(check, f"{path}_never") or 0) > 0
        rows.append({"figure": words,
                     "value": _cell(check, path) or ("none came" if none_came else "not measured"),
                     "target": "" if target is None else f"{sign} {target:.2f}",
                     "met": "" if target is None else _met(check, path),
                     "videos": (lookup(check, f"{kind}.videos") or 0)
                     - int(number(check, _NEVER) or 0) * (key == "delay_blocks")})
    return pd.DataFrame(rows)


def _met(check: Mapping[str, Any], path: str) -> str:
    value, (sign, target) = number(check, path), TARGETS[path]
    if value is None:
        return "not measured"
    return "yes" if (value >= target if sign == ">=" else value <= target) else "no"


def _cell(part: Mapping[str, Any], path: str) -> str:
    """A figure with its error where it has one; empty if it was not measured."""
    if path == _NEVER:
        never = _share(part, path)
        videos = int(number(part, "switch.videos") or 0)
        return "" if never is None else f"{round(never * videos)} of {videos}"
    value, error = number(part, path), _error(part, path)
    if value is None or error is None:
        return "" if value is None else _digits(value)
    return f"{value:.3f} ± {error:.2f}"


def _figure(part: Mapping[str, Any], path: str) -> float | None:
    """A figure as it is compared: of the switches whose scene never came their share."""
    return _share(part, path) if path == _NEVER else number(part, path)


def _share(part: Mapping[str, Any], path: str) -> float | None:
    """A figure that is a share of each video; None if it is none, or was not measured."""
    videos = number(part, f"{path.partition('.')[0]}.videos")
    if not videos or path.endswith((".videos", ".delay_blocks")):
        return None
    return (number(part, path) or 0.0) / videos if path == _NEVER else number(part, path)  # named if it was


def _error(part: Mapping[str, Any], path: str) -> float | None:
    """Standard error of a figure. Where the check kept none, or all videos agree, that of a share from above:
    between 0 and 1 nothing spreads more than videos that are wholly right or wholly wrong. One of each is
    added, since 12 of 12 prove little.
    """
    if recorded := number(part, f"{path}_se"):
        return recorded
    if path == DRIFT:
        ends = [_error(part, f"long.{end}") for end in ("first", "last")]
        return None if None in ends else math.hypot(*ends)
    share, videos = _share(part, path), number(part, f"{path.partition('.')[0]}.videos")
    if share is None:
        return None
    share = (videos * share + 1) / (videos + 2)
    return math.sqrt(share * (1 - share) / (videos + 2))


def ablation_table(check: Mapping[str, Any]) -> pd.DataFrame:
    """The full model and each variant, a row each; an empty cell was not measured."""
    table = {_variant(name): {column: _cell(part, path) for column, path in _ABLATION.items()}
             for name, part in {_FULL: check, **_variants(check)}.items()}
    return pd.DataFrame.from_dict(table, orient="index", columns=list(_ABLATION))


def conclusions(check: Mapping[str, Any]) -> list[str]:
    """A sentence on each target, and one on each variant: where it differs from the full model by more than
    twice the error of the difference.
    """
    lines = []
    for path, (sign, target) in TARGETS.items():
        value, error = number(check, path), _error(check, path)
        state = {"yes": "is met", "no": "is missed"}.get(_met(check, path), "was not measured")
        near = value is not None and error is not None and abs(value - target) < error
        found = _cell(check, path) and f": {_cell(check, path)}"
        lines.append(f"Target {sign} {target:.2f} for {_FIGURES[path]} {state}"
                     f"{', by less than the error' if near else ''}{found}.")
    for name, part in _variants(check).items():
        if name != "full":
            # Windows are judged on fewer videos, and so is what they are compared with.
            full = _variants(check).get("full", check) if name.startswith("window_") else check
            found = [f"{column} {_cell(part, path)} against {_cell(full, path)}"
                     for column, path in _ABLATION.items() if _differ(part, full, path)]
            lines.append(f"{_variant(name).capitalize()}, beyond twice the error of the difference: "
                         f"{'; '.join(found) or 'nothing'}.")
    return lines


def _differ(part: Mapping[str, Any], full: Mapping[str, Any], path: str) -> bool:
    values, errors = ([of(one, path) for one in (part, full)] for of in (_figure, _error))
    return None not in (*values, *errors) and abs(values[0] - values[1]) > 2 * math.hypot(*errors)


def conditions(check: Mapping[str, Any]) -> str:
    """On what a check was made, in a sentence."""
    beside = ("weights", "sizes", "variants", "plain", "switch", "long", "environment")
    machine = {key: lookup(check, f"environment.{key}") for key in _MACHINE}
    facts = {key: value for key, value in check.items() if key not in beside} | machine
    words = (f"{key.replace('_', ' ')} {json.dumps(value).strip(chr(34))}" for key, value in facts.items()
             if value is not None)
    return f"Checked: {check.get('weights', 'weights')}; {', '.join(words)}."


def _variant(name: str) -> str:
    if name.startswith("window_"):
        return f"window of {name.removeprefix('window_')} latent frames"
    return _VARIANTS.get(name, name)


def _series(rows: Sequence[Row]) -> list[str]:
    return [key for key in dict.fromkeys(key for row in rows for key in row) if key not in _BESIDE]


def _digits(value: float | None) -> str:
    if value is None:
        return "?"
    return f"{value:.0f}" if value == round(value) and abs(value) >= 2 or value == 0 else f"{value:.3g}"


# ------------------------------------------------------------------------------- figures


def loss_chart(rows: Sequence[Row]) -> Chart:
    """Curves of one stage over its steps: losses, and beside them each figure that is none. A panel whose
    curves are positive and fall far is logarithmic.
    """
    series = _series(rows)
    panels = [[key for key in series if key not in _NO_LOSS], *([key] for key in _NO_LOSS if key in series)]
    panels = [keys for keys in panels if keys]
    chart = Chart(figsize=(9, 2.9), dpi=110, layout="constrained")
    axes = chart.subplots(1, len(panels), squeeze=False,
                          width_ratios=[2, *[1] * (len(panels) - 1)])[0]
    title = _TITLES.get(rows[0]["stage"], rows[0]["stage"])
    for ax, keys in zip(axes, panels):
        for key, colour in zip(keys, _COLOURS * len(keys)):
            points = [(row["step"], row[key]) for row in rows if key in row]
            ax.plot(*zip(*points), color=colour, lw=1.2, label=_SERIES.get(key, key),
                    marker="." if len(points) < 40 else None)
        values = [row[key] for row in rows for key in keys if key in row]
        if min(values) > 0 and max(values) > _LOG_FROM * min(values):
            ax.set_yscale("log")
        name = f"{title}: losses" if keys is panels[0] else _SERIES[keys[0]]
        _dress(ax, name, "step")
    axes[0].legend(frameon=False, fontsize=8)
    chart.alt = f"{title}, curves over {rows[-1]['step']:.0f} steps: {'; '.join(_curves(rows))}."
    return chart


def ablation_chart(check: Mapping[str, Any]) -> Chart:
    """The full model and each variant: what is there after a switch, and at the end of a minute."""
    parts = {_variant(name): part for name, part in {_FULL: check, **_variants(check)}.items()}
    chart = Chart(figsize=(11, 1.4 + 0.34 * len(parts)), dpi=110, layout="constrained")
    columns = [(column, path) for column, path in _ABLATION.items() if path in _BARS]
    for ax, (column, path) in zip(chart.subplots(1, len(_BARS), sharey=True), columns):
        when, unit = _BARS[path]
        for height, (name, part) in enumerate(parts.items()):
            value, error = number(part, path), _error(part, path)
            ax.barh(height, value or 0.0, height=0.62, color=_COLOURS[0] if name == _FULL else "#b8b8b8")
            if value is None:
                ax.text(0.02, height, "not measured", va="center", fontsize=8)
                continue
            ax.plot([max(value - error, 0.0), min(value + error, 1.0)], [height] * 2, color="#222222", lw=1.0)
            ax.text(1.04, height, f"{value:.2f}", va="center", fontsize=8)
        ax.set(xlim=(0, 1), ylim=(len(parts) - 0.4, -0.6))
        ax.set_yticks(range(len(parts)), list(parts))
        _dress(ax, column + when, f"{unit}{_target(path)}")
        if path in TARGETS:
            ax.axvline(TARGETS[path][1], color="#c21f1f", lw=1.0, ls="--")
    chart.supxlabel("black: ± one standard error", fontsize=8)
    told = ("; ".join(f"{name} {_cell(part, path) or 'n/a'}" for name, part in parts.items())
            for _, path in columns)
    chart.alt = "Bars with one standard error. " + " ".join(
        f"{column}{_BARS[path][0]}: {words}." for (column, path), words in zip(columns, told))
    return chart


def _target(path: str) -> str:
    return f"   (dashed: target {TARGETS[path][1]:.2f})" if path in TARGETS else ""


def _dress(ax: Any, title: str, label: str) -> None:
    ax.set_title(title, loc="left", fontsize=9)
    ax.set_xlabel(label, fontsize=8)
    ax.tick_params(labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(color="#e6e6e6", lw=0.7)
    ax.set_axisbelow(True)
