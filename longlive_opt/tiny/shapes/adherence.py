"""Evaluate whether a video of Moving Shapes shows its prompts: the section `adherence` of result.json.

PSNR (peak signal-to-noise ratio) measures only how far a preset's frames are from the baseline's. In Moving
Shapes the truth is known, so this module finds a preset that breaks a prompt. `evaluator` reads objects,
motion and ground from the frames by geometry alone.

A prompt is evaluated over its whole time in the video. After a prompt switch, evaluation begins with the
second block, because the old scene turns into the new one within the first. A block is 12 video frames; the
first block of a video has 9. A prompt shorter than 12 frames is n/a, because no motion shows in it. Long
times are read in spans of 6 blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Any, Sequence

import numpy as np
import pandas as pd
from torch import Tensor

from ...errors import UserError
from ...measurement.result import is_na, na
from .captions import parse
from .evaluator import (
    BLOCK_FRAMES,
    FPS,
    Check,
    Reading,
    changed,
    check,
    drift,
    permanence,
    read,
    switch_delay,
)
from .motion import SIZE
from .scene import SceneSpec

SPAN_FRAMES = 6 * BLOCK_FRAMES
"""Length of one reading, and the longest switch delay that is looked for."""
DRIFT_SECONDS = 5

_EXTRA = "an object too many"


@dataclass(frozen=True)
class _Segment:
    """The frames start..stop of a video that belong to one prompt."""

    prompt: str
    scene: SceneSpec
    start: int
    stop: int


def evaluate(frames: Tensor | np.ndarray, frame_prompts: Sequence[str], *, weights_kind: str) -> dict[str,
                                                                                                      Any]:
    """The section `adherence` of result.json for a video `frames`, uint8 [T, 3, 128, 128], and the prompt of
    each frame. The whole section is n/a if a prompt is not of Moving Shapes or the picture has another size.

    METRIC below is a number or n/a (`measurement.result`). Adherence and permanence are shares; 1 is best.

        label             the meaning of the metrics; random weights are called random
        adherence_before  METRIC, of the first prompt
        adherence_after   METRIC, mean over the later prompts, each from its second block on
        delay_blocks      METRIC, mean over the switches whose new scene came; 1 is within the first block
        switches, never   number of switches with a delay, and of those whose new scene did not come
        drift             n/a or {prompt, seconds, first, last, change}, for the longest prompt of at least
                          three spans: adherence in its first third and in its last third, and the last minus
                          the first; below 0 the video gets worse
        permanence        METRIC, share of the evaluated frames in which every object is present
        wrong, not_evaluated [str], such as "red circle: motion", of all prompts
        segments          [{prompt, first_frame, frames, evaluated_from, evaluated_frames, adherence: METRIC,
                          permanence: METRIC, wrong [str], not_evaluated [str]}], one per prompt. After a
                          switch also delay_blocks: METRIC or null (never), and delay_limit_blocks, the
                          longest delay that was looked for. A segment of at least 10 s also has drift
                          {first, last}: adherence in its first and its last 5 s

    Raises:
        UserError: the number of prompts is not that of the frames, or the frames have another dtype or rank.
    """
    if len(frames) != len(frame_prompts):
        raise UserError(f"frame_prompts: {len(frame_prompts)} for {len(frames)} frames; give one per frame.")
    if frames.ndim == 4 and tuple(frames.shape[2:]) != (SIZE, SIZE):
        height, width = frames.shape[2:]
        return na(f"the picture is {height} x {width}, and the evaluator reads {SIZE} x {SIZE}",
                  "leave height and width of the tiny model as they are")
    try:
        segments = _segments(frame_prompts)
    except UserError as error:
        reason, _, remedy = str(error).removeprefix("prompt: ").rpartition("; ")
        return na(f"a prompt is not of Moving Shapes: {reason}", remedy.rstrip("."))
    earlier = [None, *(segment.scene for segment in segments)]
    rows = [_evaluate_segment(frames, segment, before) for segment, before in zip(segments, earlier)]
    return {"label": _label(weights_kind), **_summary(rows), "segments": rows}


def table(section: dict[str, Any], frame_prompts: Sequence[str]) -> pd.DataFrame:
    """One row per prompt of a video, with its metrics from `evaluate` as numbers or n/a."""
    columns = ["prompt", "evaluated from frame", "frames", "adherence", "switch delay, blocks", "permanence",
               "wrong", "not evaluated"]
    if is_na(section):
        rows = [(prompt, "", "", section, "", "", "", "") for prompt, _ in groupby(frame_prompts)]
    else:
        rows = [(row["prompt"], row["evaluated_from"], row["evaluated_frames"], row["adherence"],
                 delay_of(row),
                 row["permanence"], ", ".join(row["wrong"]), ", ".join(row["not_evaluated"]))
                for row in section["segments"]]
    return pd.DataFrame(rows, columns=columns)


def delay_of(row: dict[str, Any]) -> Any:
    """The switch delay of a segment for a table: a number, n/a, 'never within ...' or empty."""
    if "delay_blocks" not in row:
        return ""
    return f"never within {row['delay_limit_blocks']}" if row["delay_blocks"] is None else row["delay_blocks"]


def _label(weights_kind: str) -> str:
    if weights_kind == "random":
        return "random weights: how well noise fits a prompt by chance"
    return "read from the frames by geometry, without learned parts"


def _segments(frame_prompts: Sequence[str]) -> list[_Segment]:
    found, start = [], 0
    for prompt, group in groupby(frame_prompts):
        stop = start + sum(1 for _ in group)
        found.append(_Segment(prompt, parse(prompt), start, stop))
        start = stop
    return found


def _evaluate_segment(frames: Tensor | np.ndarray, segment: _Segment,
                   before: SceneSpec | None) -> dict[str, Any]:
    """A row of `segments`. `before` is the scene before the switch, None for the first prompt."""
    skipped = min(BLOCK_FRAMES if before else 0, segment.stop - segment.start)
    whole, count = frames[segment.start:segment.stop], segment.stop - segment.start - skipped
    row: dict[str, Any] = {"prompt": segment.prompt, "first_frame": segment.start, "frames": len(whole),
                           "evaluated_from": segment.start + skipped, "evaluated_frames": count, "wrong": [],
                           "not_evaluated": []}
    spans = _spans(whole)
    checks: list[Check] = []
    if count < BLOCK_FRAMES:
        after = " after its first block" if before else ""
        row["adherence"] = row["permanence"] = na(
            f"the prompt has {count} video frames{after}, but a motion needs {BLOCK_FRAMES} to show",
            "generate more latent frames, or switch elsewhere")
    else:
        evaluated = [spans[0][skipped:], *spans[1:]]
        checks = [check(span, segment.scene) for span in evaluated]
        lengths = [len(span) for span in evaluated]
        row["adherence"] = float(np.average([one.adherence for one in checks], weights=lengths))
        row["permanence"] = float(np.average([permanence(span, segment.scene) for span in evaluated],
                                             weights=lengths))
        row |= _attributes(checks, segment.scene)
        third = len(checks) // 3
        if third:
            first, last = (
                float(np.average([one.adherence for one in checks[part]], weights=lengths[part]))
                for part in (slice(third), slice(-third, None)))
            row["thirds"] = {"first": first, "last": last, "change": last - first}
    if before is not None:
        row |= _delay(spans[0], segment.scene, before, checks[:1])
    if count >= 2 * DRIFT_SECONDS * FPS:
        found = drift(whole[skipped:], segment.scene, DRIFT_SECONDS)
        row["drift"] = {"first": found.first, "last": found.last}
    return row


def _spans(frames: Tensor | np.ndarray) -> list[Reading]:
    """Read `frames` in spans of SPAN_FRAMES. The last span includes a remainder below two blocks."""
    starts = [*range(0, max(1, len(frames) - 2 * BLOCK_FRAMES + 1), SPAN_FRAMES)]
    return [read(frames[start:stop]) for start, stop in zip(starts, [*starts[1:], len(frames)])]


def _attributes(checks: Sequence[Check], scene: SceneSpec) -> dict[str, list[str]]:
    """`wrong`: attributes that are wrong in some span, with the number of spans. `not_evaluated`: attributes
    that no span could evaluate.
    """
    marks = [_marks(one, scene) for one in checks]
    votes = {name: [found[name] for found in marks if name in found]
             for name in dict.fromkeys(name for found in marks for name in found)}
    share = f" ({{}} of {len(checks)} spans)" if len(checks) > 1 else ""
    return {"wrong": [name + share.format(found.count(False)) for name, found in votes.items()
                      if False in found],
            "not_evaluated": [name for name, found in votes.items() if set(found) == {None}]}


def _marks(result: Check, scene: SceneSpec) -> dict[str, bool | None]:
    """All marks of a check by readable name; without a requested letter, `letter` is only listed if wrong."""
    named = {f"{thing.colour} {thing.shape}: {field}": mark
             for thing, marks in zip(scene.objects, result.objects) for field, mark in marks.items()
             if not (field == "letter" and thing.letter is None and mark is None)}
    named |= {f"ground: {field}": mark for field, mark in result.ground.items()}
    return named | ({_EXTRA: False} if result.extra else {})


def _delay(after: Reading, scene: SceneSpec, before: SceneSpec, later: Sequence[Check]) -> dict[str, Any]:
    """delay_blocks and its limit. `later` is the check from the second block after the switch on, if any.

    A change that only all blocks together show, or that stays hidden, gives no delay and does not count as
    never, because a single block shows less than all of them.
    """
    limit = min(len(after), SPAN_FRAMES) // BLOCK_FRAMES
    delay: Any = None
    if scene == before:
        delay = na("the new prompt describes the same scene in other words", "change something")
    elif not limit:
        delay = na(f"the video ends {len(after)} frames after the switch", "switch a block earlier")
    else:
        delay = switch_delay(after[:limit * BLOCK_FRAMES], scene, before)
    if delay is None and later:
        marks = [mark for mark in changed(later[0], scene, before).values() if mark is not None]
        if not marks:
            delay = na("what the new prompt changes could not be evaluated: hidden, cut by the edge or "
                       "without a clear shape", "look at the video")
        elif all(marks):
            delay = na("the new scene is there, but no single block shows it clearly", "look at the video")
    return {"delay_blocks": delay, "delay_limit_blocks": limit}


def _drift(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The drift of the row with the longest evaluated time among those that have thirds."""
    long = max((row for row in rows if "thirds" in row), key=lambda row: row["evaluated_frames"],
               default=None)
    if long is None:
        return na(f"no prompt lasts three spans of {SPAN_FRAMES} frames", "generate more latent frames")
    return {"prompt": long["prompt"], "seconds": long["evaluated_frames"] / FPS, **long["thirds"]}


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    later = rows[1:]
    no_switch = na("the video has no prompt switch", "give the preset two prompts")
    after = [row["adherence"] for row in later if not is_na(row["adherence"])]
    delays = [row["delay_blocks"] for row in later if not is_na(row["delay_blocks"])]
    came = [delay for delay in delays if delay is not None]
    evaluated = [row for row in rows if not is_na(row["permanence"])]
    if came:
        delay: Any = float(np.mean(came))
    elif delays:
        limit = max(row["delay_limit_blocks"] for row in later)
        delay = na(f"the new scene never came within {limit} blocks", "look at `wrong` and at the video")
    else:
        delay = later[0]["delay_blocks"] if later else no_switch
    return {
        "adherence_before": rows[0]["adherence"],
        "adherence_after": float(np.mean(after)) if after else later[0]["adherence"] if later else no_switch,
        "delay_blocks": delay, "drift": _drift(rows),
        "switches": len(delays), "never": len(delays) - len(came),
        "permanence": float(np.average([row["permanence"] for row in evaluated],
                                       weights=[row["evaluated_frames"] for row in evaluated]))
        if evaluated else rows[0]["permanence"],
        **{key: list(dict.fromkeys(name for row in rows for name in row[key]))
           for key in ("wrong", "not_evaluated")},
    }
