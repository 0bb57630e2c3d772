"""Whether a video of Moving Shapes shows the scene that was asked for: no learned parts, only geometry.

An object is found by its colour, for colours within a scene differ; one that is there in another colour is
found by what it else has in common with an object nobody asked for. What cannot be evaluated (the shape of an
object that is cut by the edge in every frame, say) counts neither way; what is not there is wrong.

Adherence is the mean over the objects and the ground of the share of right attributes; an object too many
counts as one with none right. A block is 12 video frames.

Reading the frames is half of the work; who judges the same frames several times reads them once, by `read`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from itertools import combinations, permutations
from typing import Mapping

import numpy as np
from torch import Tensor

from ...errors import UserError
from .detection import (
    Detection,
    Track,
    check_frames,
    is_large,
    read_ground,
    read_letter,
    read_objects,
    read_traces,
)
from .motion import SCALES
from .scene import COLOURS, MOTIONS, STAYING, ObjectSpec, SceneSpec
from .tracking import LEAST_FRAMES, WINDOW_FRAMES, Trajectory, follow, motion_of

__all__ = ["Check", "Drift", "Reading", "Detection", "changed", "changed_share", "check", "drift", "ends",
           "permanence", "read", "read_objects", "switch_delay", "wandered"]

BLOCK_FRAMES = 12
FPS = 16

_GAP_FRAMES = 30  # how long an object that left at one edge may take to come in at the other
_HIDDEN_FRAMES = 80

Marks = Mapping[str, bool | None]


@dataclass(frozen=True)
class Reading:
    """What `read` found in T frames; a slice of it is what it had found in those frames."""

    frames: Tensor  # uint8 [T, 3, H, W]
    traces: Mapping[str, Track]
    clear: Tensor  # [T, H, W] where only ground is seen
    courses: dict[tuple[str, ...], Trajectory] = field(default_factory=dict)  # what `_course` followed

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, part: slice) -> Reading:
        arrays = [f.name for f in fields(Track) if f.name != "colour"]
        traces = {colour: replace(trace, **{name: getattr(trace, name)[part] for name in arrays})
                  for colour, trace in self.traces.items()}
        return Reading(self.frames[part], traces, self.clear[part])


Frames = Tensor | np.ndarray | Reading


def read(frames: Frames, least: int = 1) -> Reading:
    """Read `frames`, uint8 [T, 3, 128, 128], at least `least` of them; what is read stays as it is.

    Raises:
        UserError: frames of another shape or dtype, or too few.
    """
    if isinstance(frames, Reading) and len(frames) >= least:
        return frames
    frames = check_frames(frames.frames if isinstance(frames, Reading) else frames, least)
    return Reading(frames, *read_traces(frames))


@dataclass(frozen=True)
class Check:
    """What of a scene is right in a span of frames; None is what could not be evaluated.

    `objects`: marks for colour, shape, size, motion and, on large objects, letter. `ground`: for colour and
    pattern. `extra`: objects that nobody asked for.
    """

    objects: tuple[Marks, ...]
    ground: Marks
    extra: int

    @property
    def adherence(self) -> float:
        """Mean over objects and ground of the share of right attributes, 0 for each object too many."""
        shares = [_share(marks) for marks in (*self.objects, self.ground)] + [0.0] * self.extra
        return float(np.mean(shares))

    @property
    def wrong(self) -> tuple[str, ...]:
        """What is wrong, as 'object 0 motion', 'ground pattern', 'extra'."""
        named = [(f"object {i}", marks) for i, marks in enumerate(self.objects)] + [("ground", self.ground)]
        found = [f"{name} {field}" for name, marks in named for field, mark in marks.items() if mark is False]
        return tuple(found + ["extra"] * self.extra)


@dataclass(frozen=True)
class Drift:
    """Adherence at the start and at the end of a long video."""

    first: float
    last: float

    @property
    def lost(self) -> float:
        return self.first - self.last


def check(frames: Frames, scene: SceneSpec) -> Check:
    """Compare `frames`, uint8 [T, 3, 128, 128] or a reading of them, at least 12 (0.75 s), with the scene
    claimed.

    Raises:
        UserError: frames of another shape or dtype, or too few.
    """
    reading = read(frames, least=BLOCK_FRAMES)
    least = max(2, len(reading) // 5)
    traces = {colour: trace for colour, trace in reading.traces.items() if trace.there.sum() >= least}
    seen = replace(reading, traces=traces)  # with the courses of `reading`
    found = {i: traces[thing.colour] for i, thing in enumerate(scene.objects) if thing.colour in traces}
    named = {thing.colour for thing in scene.objects}
    others = [colour for colour in traces if colour not in named]
    marks: dict[int, Marks] = {i: _judge(seen, trace.colour, scene, i) for i, trace in found.items()}
    missing = [i for i in range(len(scene.objects)) if i not in found]
    taken = _assign(missing, others, scene, seen, marks)
    nothing = {field: False for field in ("colour", "shape", "size", "motion")}
    extra = len(others) - taken + sum(np.median(trace.strays[trace.there]) > 60 for trace in found.values())
    ground, pattern = read_ground(reading.frames, reading.clear)
    return Check(tuple(marks.get(i, nothing) for i in range(len(scene.objects))),
                 {"colour": ground == scene.ground, "pattern": pattern == scene.pattern}, int(extra))


def switch_delay(frames: Frames, scene: SceneSpec, before: SceneSpec | None = None,
                 threshold: float = 0.9) -> int | None:
    """Blocks from a prompt switch, at the first of `frames`, to the end of the first with the new scene.

    1: already the first block does. None: never. A block shows the scene when its adherence is at least
    `threshold`; with the scene `before` the switch, when that share of what changed is right.

    Raises:
        UserError: as `check`.
    """
    if not isinstance(frames, Reading):
        frames = check_frames(frames, least=BLOCK_FRAMES)
    for block in range(len(frames) // BLOCK_FRAMES):
        shown = frames[block * BLOCK_FRAMES:(block + 1) * BLOCK_FRAMES]
        score = check(shown, scene).adherence if before is None else changed_share(shown, scene, before)
        if score >= threshold:
            return block + 1
    return None


def permanence(frames: Frames, scene: SceneSpec) -> float:
    """Share of the frames in which every object of the scene is there, by its colour.

    An object may be away for 30 frames next to its passing an edge, and for 80 while the object lasts behind
    which it vanished or from behind which it comes.
    """
    traces = read(frames).traces
    present = np.ones(len(frames), bool)
    for index, thing in enumerate(scene.objects):
        trace = traces.get(thing.colour)
        if trace is None:
            return 0.0
        front = [traces[other.colour] for other in scene.objects[index + 1:] if other.colour in traces]
        present &= _accounted(trace, front, thing)
    return float(present.mean())


def drift(frames: Tensor | np.ndarray, scene: SceneSpec, seconds: float = 5) -> Drift:
    """Adherence in the first and in the last `seconds` of a video that shows one scene.

    Raises:
        UserError: as `ends`.
    """
    first, last = (check(end, scene) for end in ends(frames, seconds))
    return Drift(first.adherence, last.adherence)


def ends(frames: Tensor | np.ndarray, seconds: float = 5) -> tuple[Reading, Reading]:
    """What the first and the last `seconds` of a video show.

    Raises:
        UserError: a video shorter than twice that, or as `check`.
    """
    count = round(seconds * FPS)
    frames = check_frames(frames, least=BLOCK_FRAMES)
    if len(frames) < 2 * count or count < BLOCK_FRAMES:
        raise UserError(f"frames: {len(frames)} of them for {seconds} s at each end; give at least "
                        f"{2 * count}.")
    return read(frames[:count]), read(frames[-count:])


def wandered(first: Reading, last: Reading, scene: SceneSpec) -> list[float]:
    """How far, in pixels, each object that is to stay where it is (spins, pulses, stands still) has come
    between two spans of a video; infinitely far if `last` does not show it, left out if `first` does not.
    """
    distances = []
    for index, thing in enumerate(scene.objects):
        if thing.motion in STAYING and (start := _place(first, scene, index)) is not None:
            end = _place(last, scene, index)
            distances.append(float("inf") if end is None else float(np.linalg.norm(end - start)))
    return distances


def changed(result: Check, scene: SceneSpec, before: SceneSpec) -> Marks:
    """Of the marks of a check those of what `scene` asks for and `before` did not."""
    marks: dict[str, bool | None] = {}
    if len(scene.objects) < len(before.objects):
        marks["extra"] = result.extra == 0
    if scene.ground != before.ground:
        marks["ground"] = result.ground["colour"]
    if scene.pattern != before.pattern:
        marks["pattern"] = result.ground["pattern"]
    for i, thing in enumerate(scene.objects):
        old = before.objects[i] if i < len(before.objects) else None
        marks |= {f"{i} {field}": mark for field, mark in result.objects[i].items()
                  if old is None or getattr(old, field) != getattr(thing, field)}
    return marks


def changed_share(frames: Frames, scene: SceneSpec, other: SceneSpec) -> float:
    """Share right in `frames` of what `scene` asks for and `other`, before or after it, does not.

    Raises:
        UserError: as `check`.
    """
    return _share(changed(check(frames, scene), scene, other))


def _share(marks: Marks) -> float:
    evaluated = [mark for mark in marks.values() if mark is not None]
    return float(np.mean(evaluated)) if evaluated else 0.0


def _place(reading: Reading, scene: SceneSpec, index: int) -> np.ndarray | None:
    """x, y around which object `index` is; None if it is seen too seldom."""
    colour = scene.objects[index].colour
    if colour not in reading.traces:
        return None
    place = _course(reading, colour, scene, index).place
    known = place[np.isfinite(place).all(axis=1)]
    return np.median(known, axis=0) if len(known) >= LEAST_FRAMES else None


def _course(reading: Reading, colour: str, scene: SceneSpec, index: int) -> Trajectory:
    """Follow a colour taken for object `index`, once; all but the objects behind that one may hide it."""
    thing = scene.objects[index]
    never = {colour, *(other.colour for other in scene.objects[:index + 1])}
    front = [trace for name, trace in reading.traces.items() if name not in never]
    key = (colour, thing.shape, thing.size, *(trace.colour for trace in front))
    if key not in reading.courses:
        reading.courses[key] = follow(reading.traces[colour], front, (thing.shape, SCALES[thing.size]))
    return reading.courses[key]


def _assign(missing: list[int], others: list[str], scene: SceneSpec, reading: Reading,
            marks: dict[int, Marks]) -> int:
    """Judge missing objects by the traces that nobody asked for, as it fits best; how many were used."""
    count = min(len(missing), len(others))
    best: tuple[float, dict[int, Marks]] = -1.0, {}
    known = {(i, colour): _judge(reading, colour, scene, i) | {"colour": False}
             for i in missing for colour in others}
    for wanted in combinations(missing, count):
        for chosen in permutations(others, count):
            evaluated = {i: known[i, colour] for i, colour in zip(wanted, chosen)}
            score = sum(map(_share, evaluated.values()))
            if score > best[0]:
                best = score, evaluated
    marks |= best[1]
    return count


def _judge(reading: Reading, colour: str, scene: SceneSpec, index: int) -> dict[str, bool | None]:
    """Marks of what has this colour, taken for object `index`."""
    trace, thing = reading.traces[colour], scene.objects[index]
    course = _course(reading, colour, scene, index)
    marks: dict[str, bool | None] = {"colour": True, "shape": None, "size": None}
    if course.shape is not None:
        marks["shape"] = course.shape == thing.shape
    if course.scale is not None:
        large = is_large(course.scale)
        marks["size"] = large == (thing.size == "large")
        if thing.size == "large" and not large:
            marks["letter"] = None if thing.letter is None else False
        elif thing.size == "large":
            marks["letter"] = _has_letter(trace, course, thing.letter)
    starts = range(0, len(trace.area) - LEAST_FRAMES + 1, WINDOW_FRAMES)
    votes = [motion_of(trace, course, slice(start, start + WINDOW_FRAMES)) for start in starts]
    evaluated = [vote == thing.motion for vote in votes if vote]
    marks["motion"] = bool(np.mean(evaluated) >= 0.5) if evaluated else None
    return marks


def _has_letter(trace: Track, course: Trajectory, letter: str | None) -> bool | None:
    """Whether that letter, or none, is on the object; None where it never shows."""
    frames = np.flatnonzero(course.whole)
    if len(frames):
        some = _spread(frames)
        return read_letter(trace, some, course.shape)[0] == letter
    some = _spread(np.flatnonzero(course.open))
    if not len(some):
        return None
    return read_letter(trace, some, course.shape, course.place[some], course.scale)[0] == letter


def _spread(frames: np.ndarray) -> np.ndarray:
    """At most 8 of them, from first to last."""
    return frames[np.unique(np.linspace(0, len(frames) - 1, 8).astype(int))] if len(frames) > 8 else frames


def _accounted(trace: Track, front: list[Track], thing: ObjectSpec) -> np.ndarray:
    """[T] whether the object is there, or away for a reason."""
    accounted = trace.there.copy()
    shown = np.flatnonzero(trace.there)
    bounds = np.concatenate([[-1], shown, [len(accounted)]])
    for before, after in zip(bounds, bounds[1:]):
        gap = slice(before + 1, after)
        length = after - before - 1
        ends = [end for end in (before, after) if 0 <= end < len(accounted)]
        leaves = thing.motion in MOTIONS[:4] and any(trace.at_edge[end] for end in ends)
        hides = any(trace.touches[end, COLOURS.index(other.colour)] and other.there[gap].all()
                    for end in ends for other in front)
        if length and ((leaves and length <= _GAP_FRAMES) or (hides and length <= _HIDDEN_FRAMES)):
            accounted[gap] = True
    return accounted
