"""Evaluate whether a video of Moving Shapes shows the requested scene, by geometry alone and without learned
parts.

Colours within a scene differ, so an object is found by its colour. A requested object in a wrong colour is
matched with an object that the prompt does not name, by its other attributes. An attribute that cannot be
evaluated, such as the shape of an object that the edge cuts in every frame, is left out. An absent object has
all attributes wrong.

Adherence is the mean share of right attributes over the objects and the ground. Each object too many counts
as one with none right. A block is 12 video frames.

Reading the frames is half of the work. To evaluate the same frames several times, read them once with `read`.
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
    read_tracks,
)
from .motion import SCALES
from .scene import COLOURS, MOTIONS, STAYING, ObjectSpec, SceneSpec
from .tracking import LEAST_FRAMES, WINDOW_FRAMES, Trajectory, follow, motion_of

__all__ = ["Check", "Drift", "Reading", "Detection", "changed", "changed_share", "check", "drift", "ends",
           "permanence", "read", "read_objects", "switch_delay", "wandered"]

BLOCK_FRAMES = 12
FPS = 16

_GAP_FRAMES = 30  # longest absence of an object that leaves at one edge and enters at the other
_HIDDEN_FRAMES = 80

Marks = Mapping[str, bool | None]


@dataclass(frozen=True)
class Reading:
    """What `read` found in T frames. A slice of it is the reading of those frames."""

    frames: Tensor  # uint8 [T, 3, H, W]
    tracks: Mapping[str, Track]
    clear: Tensor  # [T, H, W] where only ground is visible
    trajectories: dict[tuple[str, ...], Trajectory] = field(default_factory=dict)  # cache of `_trajectory`

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, part: slice) -> Reading:
        arrays = [f.name for f in fields(Track) if f.name != "colour"]
        tracks = {colour: replace(track, **{name: getattr(track, name)[part] for name in arrays})
                  for colour, track in self.tracks.items()}
        return Reading(self.frames[part], tracks, self.clear[part])


Frames = Tensor | np.ndarray | Reading


def read(frames: Frames, least: int = 1) -> Reading:
    """Read `frames`, uint8 [T, 3, 128, 128], at least `least` of them. Returns a `Reading` unchanged.

    Raises:
        UserError: frames of another shape or dtype, or too few.
    """
    if isinstance(frames, Reading) and len(frames) >= least:
        return frames
    frames = check_frames(frames.frames if isinstance(frames, Reading) else frames, least)
    return Reading(frames, *read_tracks(frames))


@dataclass(frozen=True)
class Check:
    """Which attributes of a scene are right in a span of frames. None marks those that cannot be evaluated.

    `objects`: marks for colour, shape, size, motion and, on large objects, letter. `ground`: marks for colour
    and pattern. `extra`: number of objects that the scene does not have.
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
        """The wrong attributes, such as 'object 0 motion', 'ground pattern', 'extra'."""
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
    """Compare `frames`, uint8 [T, 3, 128, 128] or a reading of them, at least 12 (0.75 s), with a scene.

    Raises:
        UserError: frames of another shape or dtype, or too few.
    """
    reading = read(frames, least=BLOCK_FRAMES)
    least = max(2, len(reading) // 5)
    tracks = {colour: track for colour, track in reading.tracks.items() if track.there.sum() >= least}
    seen = replace(reading, tracks=tracks)  # shares the trajectories of `reading`
    found = {i: tracks[thing.colour] for i, thing in enumerate(scene.objects) if thing.colour in tracks}
    named = {thing.colour for thing in scene.objects}
    others = [colour for colour in tracks if colour not in named]
    marks: dict[int, Marks] = {i: _judge(seen, track.colour, scene, i) for i, track in found.items()}
    missing = [i for i in range(len(scene.objects)) if i not in found]
    taken = _assign(missing, others, scene, seen, marks)
    nothing = {field: False for field in ("colour", "shape", "size", "motion")}
    extra = len(others) - taken + sum(np.median(track.strays[track.there]) > 60 for track in found.values())
    ground, pattern = read_ground(reading.frames, reading.clear)
    return Check(tuple(marks.get(i, nothing) for i in range(len(scene.objects))),
                 {"colour": ground == scene.ground, "pattern": pattern == scene.pattern}, int(extra))


def switch_delay(frames: Frames, scene: SceneSpec, before: SceneSpec | None = None,
                 threshold: float = 0.9) -> int | None:
    """Blocks from a prompt switch at the first of `frames` to the end of the first block with the new scene.

    1 means the first block, None means never. A block shows the scene if its adherence is at least
    `threshold`. With the scene `before` the switch, it does if that share of the changed attributes is right.

    Raises:
        UserError: see `check`.
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
    """Share of the frames in which every object of the scene is present, by its colour.

    An object may be absent for 30 frames while it passes an edge, and for 80 frames while another object that
    hides it is visible.
    """
    tracks = read(frames).tracks
    present = np.ones(len(frames), bool)
    for index, thing in enumerate(scene.objects):
        track = tracks.get(thing.colour)
        if track is None:
            return 0.0
        front = [tracks[other.colour] for other in scene.objects[index + 1:] if other.colour in tracks]
        present &= _accounted(track, front, thing)
    return float(present.mean())


def drift(frames: Tensor | np.ndarray, scene: SceneSpec, seconds: float = 5) -> Drift:
    """Adherence in the first and in the last `seconds` of a video that shows one scene.

    Raises:
        UserError: see `ends`.
    """
    first, last = (check(end, scene) for end in ends(frames, seconds))
    return Drift(first.adherence, last.adherence)


def ends(frames: Tensor | np.ndarray, seconds: float = 5) -> tuple[Reading, Reading]:
    """Readings of the first and the last `seconds` of a video.

    Raises:
        UserError: the video is shorter than twice `seconds`; or see `check`.
    """
    count = round(seconds * FPS)
    frames = check_frames(frames, least=BLOCK_FRAMES)
    if len(frames) < 2 * count or count < BLOCK_FRAMES:
        raise UserError(f"frames: {len(frames)} of them for {seconds} s at each end; give at least "
                        f"{2 * count}.")
    return read(frames[:count]), read(frames[-count:])


def wandered(first: Reading, last: Reading, scene: SceneSpec) -> list[float]:
    """How far, in pixels, each object that should keep its place (spins, pulses, stands still) moved between
    two spans of a video. An object that `last` does not show counts as infinitely far. One that `first` does
    not show is left out.
    """
    distances = []
    for index, thing in enumerate(scene.objects):
        if thing.motion in STAYING and (start := _place(first, scene, index)) is not None:
            end = _place(last, scene, index)
            distances.append(float("inf") if end is None else float(np.linalg.norm(end - start)))
    return distances


def changed(result: Check, scene: SceneSpec, before: SceneSpec) -> Marks:
    """The marks of a check for those attributes of `scene` that differ from `before`."""
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
    """Share of the attributes of `scene` that differ from `other` and are right in `frames`.

    Raises:
        UserError: see `check`.
    """
    return _share(changed(check(frames, scene), scene, other))


def _share(marks: Marks) -> float:
    evaluated = [mark for mark in marks.values() if mark is not None]
    return float(np.mean(evaluated)) if evaluated else 0.0


def _place(reading: Reading, scene: SceneSpec, index: int) -> np.ndarray | None:
    """Median x, y of object `index`, or None if it is visible in too few frames."""
    colour = scene.objects[index].colour
    if colour not in reading.tracks:
        return None
    place = _trajectory(reading, colour, scene, index).place
    known = place[np.isfinite(place).all(axis=1)]
    return np.median(known, axis=0) if len(known) >= LEAST_FRAMES else None


def _trajectory(reading: Reading, colour: str, scene: SceneSpec, index: int) -> Trajectory:
    """Follow a colour as object `index`, once. Any object except those behind it may hide it."""
    thing = scene.objects[index]
    never = {colour, *(other.colour for other in scene.objects[:index + 1])}
    front = [track for name, track in reading.tracks.items() if name not in never]
    key = (colour, thing.shape, thing.size, *(track.colour for track in front))
    if key not in reading.trajectories:
        reading.trajectories[key] = follow(reading.tracks[colour], front, (thing.shape, SCALES[thing.size]))
    return reading.trajectories[key]


def _assign(missing: list[int], others: list[str], scene: SceneSpec, reading: Reading,
            marks: dict[int, Marks]) -> int:
    """Match missing objects with tracks that the scene does not name, as they fit best. Adds their marks and
    returns the number of matches.
    """
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
    """Marks of the object with this colour, evaluated as object `index`."""
    track, thing = reading.tracks[colour], scene.objects[index]
    trajectory = _trajectory(reading, colour, scene, index)
    marks: dict[str, bool | None] = {"colour": True, "shape": None, "size": None}
    if trajectory.shape is not None:
        marks["shape"] = trajectory.shape == thing.shape
    if trajectory.scale is not None:
        large = is_large(trajectory.scale)
        marks["size"] = large == (thing.size == "large")
        if thing.size == "large" and not large:
            marks["letter"] = None if thing.letter is None else False
        elif thing.size == "large":
            marks["letter"] = _has_letter(track, trajectory, thing.letter)
    starts = range(0, len(track.area) - LEAST_FRAMES + 1, WINDOW_FRAMES)
    votes = [motion_of(track, trajectory, slice(start, start + WINDOW_FRAMES)) for start in starts]
    evaluated = [vote == thing.motion for vote in votes if vote]
    marks["motion"] = bool(np.mean(evaluated) >= 0.5) if evaluated else None
    return marks


def _has_letter(track: Track, trajectory: Trajectory, letter: str | None) -> bool | None:
    """Whether the object has that letter, or none. None if its place is never visible."""
    frames = np.flatnonzero(trajectory.whole)
    if len(frames):
        some = _spread(frames)
        return read_letter(track, some, trajectory.shape)[0] == letter
    some = _spread(np.flatnonzero(trajectory.open))
    if not len(some):
        return None
    return read_letter(track, some, trajectory.shape, trajectory.place[some], trajectory.scale)[0] == letter


def _spread(frames: np.ndarray) -> np.ndarray:
    """At most 8 of the frames, from first to last."""
    return frames[np.unique(np.linspace(0, len(frames) - 1, 8).astype(int))] if len(frames) > 8 else frames


def _accounted(track: Track, front: list[Track], thing: ObjectSpec) -> np.ndarray:
    """[T] whether the object is present, or absent for a valid reason."""
    accounted = track.there.copy()
    shown = np.flatnonzero(track.there)
    bounds = np.concatenate([[-1], shown, [len(accounted)]])
    for before, after in zip(bounds, bounds[1:]):
        gap = slice(before + 1, after)
        length = after - before - 1
        ends = [end for end in (before, after) if 0 <= end < len(accounted)]
        leaves = thing.motion in MOTIONS[:4] and any(track.at_edge[end] for end in ends)
        hides = any(track.touches[end, COLOURS.index(other.colour)] and other.there[gap].all()
                    for end in ends for other in front)
        if length and ((leaves and length <= _GAP_FRAMES) or (hides and length <= _HIDDEN_FRAMES)):
            accounted[gap] = True
    return accounted
