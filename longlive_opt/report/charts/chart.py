"""The figure class for notebooks, the parts that all charts share (axes, notes, alternative text, colours),
and readers for the values of a result. A missing value reads as None or empty.
"""

import io
import math
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from ...config import ExperimentConfig
from ...measurement.result import is_finite, lookup, number, numbers
from ...streaming.timeline import Event

FONT = 9  # points
_KEPT_COLOURS = 64
_DPI = 110
_WIDTH = 9  # inches


class Chart(Figure):
    """A Figure that a notebook renders without pyplot, hence without global state.

    `alt` is its alternative text. If it is empty, the titles serve instead.
    """

    alt = ""

    def _repr_png_(self) -> tuple[bytes, dict[str, str]]:
        buffer = io.BytesIO()
        self.save(buffer)
        return buffer.getvalue(), {"alt": self.alt or "; ".join(ax.get_title(loc="left") for ax in self.axes)}

    def save(self, target: Path | BinaryIO) -> None:
        """Write as PNG. A chart without pictures gets a palette, which takes a third of the size."""
        if any(ax.images for ax in self.axes):
            self.savefig(target, format="png")
            return
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        _few_colours(Image.open(buffer).convert("RGB")).save(target, "PNG", optimize=True)


def _few_colours(picture: Image.Image) -> Image.Image:
    """Reduce the picture to 256 colours: the most frequent ones unchanged, the others by greatest coverage.

    Frequency alone would give a thin line the colour of a thicker one.
    """
    codes = np.asarray(picture, dtype=np.int64) @ (1 << 16, 1 << 8, 1)
    found, places, counts = np.unique(codes, return_inverse=True, return_counts=True)
    colours = np.stack([found >> 16, found >> 8 & 255, found & 255], axis=1)
    others = picture.quantize(256 - _KEPT_COLOURS, Image.Quantize.MAXCOVERAGE).getpalette()
    frequent = colours[np.argsort(-counts, kind="stable")[:_KEPT_COLOURS]]
    palette = np.concatenate([frequent, np.reshape(others, (-1, 3))])[:256]
    nearest = ((colours[:, None] - palette) ** 2).sum(axis=2).argmin(axis=1).astype(np.uint8)
    few = Image.fromarray(nearest[places].reshape(codes.shape), "P")
    few.putpalette(palette.astype(np.uint8).tobytes())
    return few


def new_axes(title: str, height: float) -> tuple[Chart, Axes]:
    figure, axes = new_lanes(title, height, 1)
    return figure, axes[0]


def new_lanes(title: str, height: float, count: int) -> tuple[Chart, list[Axes]]:
    """A chart with `count` axes below one another that share their x axis, and the title above the first."""
    figure = Chart(figsize=(_WIDTH, height), dpi=_DPI, layout="constrained")
    axes = list(figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0])
    axes[0].set_title(title, loc="left", fontsize=FONT + 2)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(color="#e6e6e6", lw=0.7)
        ax.set_axisbelow(True)
        ax.tick_params(labelsize=FONT)
    return figure, axes


def not_drawn(title: str, reason: Any) -> Chart:
    figure, ax = new_axes(title, 1.4)
    ax.set_axis_off()
    ax.text(0.0, 0.6, f"Not drawn: {plain(reason)}.", transform=ax.transAxes, color=GREY)
    return described(figure, f"Not drawn: {plain(reason)}")


def described(chart: Chart, shown: str, readings: Iterable[str] = ()) -> Chart:
    """Give the chart its alternative text: the title, what is shown, and the values to read."""
    values = "; ".join(readings)
    title = chart.axes[0].get_title(loc="left")
    words = f"{title}{'' if title.endswith('?') else '.'} {shown}{': ' if values else ''}{values}."
    chart.alt = words.replace(r"\$", "$")
    return chart


def note(ax: Axes, text: str, at: tuple[float, float], offset: tuple[float, float], **style: Any) -> None:
    """Text at `offset` points from `at`."""
    ax.annotate(text, at, offset, textcoords="offset points",
                **{"fontsize": FONT, "color": DARK, "annotation_clip": False} | style)


def name_rows(ax: Axes, names: Sequence[str]) -> None:
    """Name the rows on the left, from top to bottom."""
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.4, -0.75)
    ax.grid(visible=False, axis="y")


def plain(text: Any, length: int = 100) -> str:
    """One line of bounded length, with dollar signs escaped so that matplotlib reads no mathtext."""
    text = " ".join(str(text).split())
    return (text if len(text) <= length else text[:length - 1] + "…").replace("$", r"\$")


def in_ms(milliseconds: float) -> str:
    return f"{milliseconds:.0f}" if abs(milliseconds) >= 10 else f"{round(milliseconds, 1) + 0.0:.1f}"


STAGE_COLOURS = {"text_encode": "#5a2d82", "recache": "#e0a100", "denoise": "#3b75af",
                 "clean_pass": "#7ba7d4", "decode": "#5aa469", "copy_to_host": "#c06a9b", "other": "#b8b8b8"}
STAGES = tuple(STAGE_COLOURS)
PRESET_COLOURS = {  # distinguishable in pairs, also with red-green colour blindness
    "baseline": "#4d4d4d", "cuda_graphs": "#d97c10", "static_kv": "#0998ca", "async_vae": "#9176a0",
    "quality": "#7c32a3", "balanced": "#4a6e77", "speed": "#c35301", "low_memory": "#7a1413",
    "realtime": "#2c1bf1", "ablation": "#9856ff", "realtime_8gb": "#b32313",
    "compile_parts": "#34a598", "exact": "#08a47d", "faithful": "#3d983c", "record": "#437a5b",
    "tiny_vae": "#6403b9", "fp8_vae": "#300e5d"}
DARK, GREY, RED = "#222222", "#8a8a8a", "#c21f1f"
_MORE_COLOURS = ("#e7298a", "#455a8f", "#a6761d", "#2f6b3a", "#9c6ade", "#b3562b")
_ON_LIGHT = ("recache", "clean_pass", "other")  # stages whose colour is too light for white digits


def colour_of(preset: str) -> str:
    """The preset's colour, darker on several GPUs. A preset outside the table gets a colour that depends only
    on its name.
    """
    several = re.fullmatch(r"(.+)_(\d+)gpus", preset)
    if several and several[1] in PRESET_COLOURS:
        share = 0.65 ** math.log2(int(several[2]))
        red, green, blue = (int(value * share) for value in bytes.fromhex(PRESET_COLOURS[several[1]][1:]))
        return f"#{red:02x}{green:02x}{blue:02x}"
    spare = _MORE_COLOURS[zlib.crc32(preset.encode()) % len(_MORE_COLOURS)]
    return PRESET_COLOURS.get(preset, spare)


def stage_colour(stage: str) -> str:
    return STAGE_COLOURS.get(stage, STAGE_COLOURS["other"])


def ink_on(stage: str) -> str:
    """The colour of digits on a stage's bar."""
    return DARK if stage in _ON_LIGHT else "white"


Result = Mapping[str, Any]


def target_of(result: Result) -> float:
    """The target of the run in ms per video frame: its `target_ms_per_frame`, or the key's default if the
    result states none.
    """
    return number(result, "latency.ss_over_target.target_ms") or ExperimentConfig.target_ms_per_frame


def targets_of(results: Iterable[Result]) -> list[float]:
    """The distinct targets of the runs."""
    return sorted({target_of(result) for result in results})


def first_runs(results: Iterable[Result]) -> list[Result]:
    """The first result of each preset. A/A repeats only measure noise."""
    kept: dict[str, Result] = {}
    for result in results:
        kept.setdefault(preset_of(result), result)
    return list(kept.values())


def preset_of(result: Result) -> str:
    return str(result.get("preset"))


def name_of(result: Result) -> str:
    return plain(preset_of(result), 22)


def result_colour(result: Result) -> str:
    return colour_of(preset_of(result))


def frames_per_block(result: Result) -> float:
    return number(result, "sizes.frames_per_block") or 12.0


def mean_of(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def ms_per_frame(result: Result) -> list[float]:
    return [interval / frames_per_block(result) for interval in numbers(result, "latency.ss_block_ms")]


def steady_blocks(result: Result) -> list[int]:
    """Block index of each steady-state sample, or consecutive numbers if the result has no indices."""
    blocks = [int(block) for block in numbers(result, "latency.ss_blocks")]
    n = len(numbers(result, "latency.ss_block_ms"))
    return blocks if len(blocks) == n else list(range(n))


def first_measured(result: Result) -> int:
    """The first block after warm-up, the same in both streams of a result."""
    return int(number(result, "sizes.warmup_blocks") or 0)


def stage_names(result: Result) -> list[str]:
    stages = lookup(result, "latency.stages_ms")
    return ordered(stages) if isinstance(stages, Mapping) else []


def ordered(names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda name: (STAGES.index(name) if name in STAGES else len(STAGES), name))


def is_identical(result: Result) -> bool:
    return preset_of(result) == "baseline" or lookup(result, "quality.identical") is True


def events_of(result: Result, stream: str) -> list[Event]:
    rows = result.get(stream)
    return [Event.from_row(list(row)) for row in (rows if isinstance(rows, list) else [])
            if isinstance(row, (list, tuple)) and len(row) == 5 and is_finite(row[1]) and is_finite(row[2])]


def spans_of(result: Result, stream: str) -> list[Event]:
    """Stage spans that belong to a block, timed on the device's clock where the stage has one."""
    spans = [event for event in events_of(result, stream)
             if event.duration_ms > 0 and event.block is not None]
    on_device = {event.name for event in spans if event.clock == "cuda"}
    return [event for event in spans if (event.clock == "cuda") == (event.name in on_device)]
