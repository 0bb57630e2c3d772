"""Simulate the motion of Moving Shapes: `simulate` turns scenes into `Tracks`, one row per video frame.

Positions are in pixels of a 128x128 picture, with y downwards. Angles are in radians, clockwise. A video has
16 frames per second.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Sequence

import numpy as np
import torch
from torch import Tensor

from ...errors import UserError
from .scene import GROUNDS, LETTERS, MAX_OBJECTS, MOTIONS, PATTERNS, SHAPES, SceneSpec

SIZE = 128
FADE_FRAMES = 6
GLIDE = 4.0  # pixels per frame of an object that moves into the picture
GAP = 3.0  # pixels that objects which stay in the picture keep from its edge
PULSE = 0.2  # share of its size by which a pulsing object grows and shrinks

SCALES = {"small": 0.55, "large": 1.0}
RADII = {"square": 28.3, "circle": 23.0, "triangle": 29.0, "star": 29.0}  # to a corner of a large object
RGB = {"red": (232, 52, 58), "green": (52, 196, 84), "blue": (56, 134, 252), "yellow": (252, 212, 44),
       "purple": (186, 84, 236), "white": (246, 246, 240)}


@dataclass(frozen=True)
class Tracks:
    """The state of up to N = 3 objects, back to front, in B videos of T frames. Tensors are on the CPU.

    Shapes, letters and grounds come in pairs with the share of the second, for frames in which one turns into
    the other. A ground is `GROUNDS` index x 3 + `PATTERNS` index.
    """

    position: Tensor  # [B, T, N, 2] x, y
    scale: Tensor  # [B, T, N] 1 = large
    angle: Tensor  # [B, T, N]
    alpha: Tensor  # [B, T, N] 0 = not there
    rgb: Tensor  # [B, T, N, 3] in 0..1
    shape: Tensor  # [B, T, N, 2] indices in SHAPES
    shape_mix: Tensor  # [B, T, N]
    letter: Tensor  # [B, T, N] index in LETTERS
    letter_alpha: Tensor  # [B, T, N] 0 = no letter
    ground: Tensor  # [B, T, 2]
    ground_mix: Tensor  # [B, T]

    @property
    def frames(self) -> int:
        return self.alpha.shape[1]

    def __getitem__(self, key) -> Tracks:
        """Select videos and frames, as in `tracks[:, 40:80]`. Slices or lists keep both axes."""
        return Tracks(**{field.name: getattr(self, field.name)[key] for field in fields(self)})


def simulate(scenes: Sequence[Sequence[tuple[int, SceneSpec]]], frames: int, seed: int) -> Tracks:
    """Motion of B videos of `frames` video frames. Each video is a list of (first video frame, scene).

    At a switch, object i continues from its position. Its motion changes at once; colour, shape, letter and
    ground change within 6 frames. New objects fade in, removed objects fade out. Start positions, phases and
    speeds depend on `seed` and the index of the video.

        left, right, up, down  1.5 to 2.5 pixels per frame; leaves at one edge and enters at the other
        bounces                1.8 to 2.6 pixels per frame, 35 to 55 degrees off the axes
        orbits                 a circle with a radius of 20 to 26 pixels at 1.8 to 2.4 pixels per frame
        spins                  one turn in 63 to 90 frames
        pulses                 0.8 to 1.2 of the size in 28 to 36 frames

    Objects that never leave the picture first glide into it, at 4 pixels per frame.

    Raises:
        UserError: the first scene of a video is not at frame 0, or its switches are not in order.
    """
    for video, timeline in enumerate(scenes):
        starts = [start for start, _ in timeline]
        if not starts or starts[0] != 0 or any(b <= a for a, b in zip(starts, starts[1:])):
            raise UserError(f"scenes: video {video} has scenes at frames {starts}; begin at 0 and increase.")
    world = _World(scenes, seed)
    rows = []
    for frame in range(frames):
        world.switch(frame)
        rows.append(world.row(frame))
        world.advance()
    columns = {name: np.stack([row[name] for row in rows], axis=1) for name in rows[0]}
    return Tracks(**{name: torch.from_numpy(column) for name, column in columns.items()})


class _World:
    """State of all objects of all videos as arrays [B, N], moved one frame at a time."""

    def __init__(self, scenes: Sequence[Sequence[tuple[int, SceneSpec]]], seed: int) -> None:
        shape = len(scenes), MAX_OBJECTS
        self.rngs = [np.random.default_rng([seed, video]) for video in range(len(scenes))]
        self.events: dict[int, list[tuple[int, SceneSpec]]] = {}
        for video, timeline in enumerate(scenes):
            for start, scene in timeline:
                self.events.setdefault(start, []).append((video, scene))
        self.position, self.velocity, self.centre = (np.zeros((*shape, 2)) for _ in range(3))
        self.motion = np.full(shape, MOTIONS.index("still"))
        self.turn, self.phase, self.orbit, self.beat, self.spin = (np.zeros(shape) for _ in range(5))
        self.scale, self.scale_goal, self.swell = np.ones(shape), np.ones(shape), np.zeros(shape)
        self.angle, self.alpha, self.alpha_goal = (np.zeros(shape) for _ in range(3))
        self.rgb = np.zeros((*shape, 2, 3))
        self.shape, self.letter = np.zeros((*shape, 2), np.int64), np.full((*shape, 2), -1)
        self.ground = np.zeros((len(scenes), 2), np.int64)
        self.changed, self.ground_changed = np.zeros(shape, np.int64), np.zeros(len(scenes), np.int64)

    def switch(self, frame: int) -> None:
        """Start the scenes that begin at this frame."""
        for video, scene in self.events.get(frame, ()):
            ground = GROUNDS.index(scene.ground) * len(PATTERNS) + PATTERNS.index(scene.pattern)
            self.ground[video] = ground if frame == 0 else self.ground[video, 1], ground
            self.ground_changed[video] = frame
            for index in range(MAX_OBJECTS):
                there = index < len(scene.objects)
                if there:
                    self._take(video, index, scene.objects[index], frame)
                self.alpha_goal[video, index] = there
                if frame == 0:
                    self.alpha[video, index] = there

    def _take(self, video: int, index: int, thing, frame: int) -> None:
        """Turn object `index` into what the scene describes."""
        at, rng = (video, index), self.rngs[video]
        new = self.alpha_goal[at] == 0
        looks = (np.array(RGB[thing.colour]) / 255, SHAPES.index(thing.shape),
                 -1 if thing.letter is None else LETTERS.index(thing.letter))
        for state, look in zip((self.rgb, self.shape, self.letter), looks):
            state[at] = (look if new else state[at][1].copy()), look
        self.changed[at] = frame
        self.scale_goal[at] = SCALES[thing.size]
        if new:
            self.scale[at], self.swell[at], self.angle[at] = SCALES[thing.size], 0, 0
            self.position[at] = self._free_place(video, index)
        motion = MOTIONS.index(thing.motion)
        if new or motion != self.motion[at]:
            self.motion[at] = motion
            self._start(at, thing.motion, rng.uniform(size=6), settled=new)

    def _free_place(self, video: int, index: int) -> np.ndarray:
        """The one of a few random places that overlaps least with the objects already there."""
        margin = self._reach((video, index)) + GAP
        places = self.rngs[video].uniform(margin, SIZE - margin, size=(24, 2))
        others = [i for i in range(MAX_OBJECTS) if i != index and self.alpha_goal[video, i]]
        if not others:
            return places[0]
        gaps = [np.hypot(*(places - self.position[video, i]).T) - margin - self._reach((video, i))
                for i in others]
        return places[np.argmax(np.minimum(np.min(gaps, axis=0), 0))]

    def _reach(self, at) -> np.ndarray:
        """Distance in pixels from the middle of the objects `at` to their farthest corner."""
        return np.array([RADII[name] for name in SHAPES])[self.shape[at][..., 1]] * self.scale_goal[at]

    def _start(self, at: tuple[int, int], motion: str, draws: np.ndarray, settled: bool) -> None:
        """Set the speeds and phases of a new motion from six numbers in 0..1."""
        sign = np.where(draws[:3] < 0.5, -1, 1)
        speed, tilt = 1.8 + 0.8 * draws[3], math.radians(35 + 20 * draws[4])
        self.velocity[at] = 0
        if motion in ("left", "right"):
            self.velocity[at] = (1.5 + draws[3]) * (1 if motion == "right" else -1), 0
        elif motion in ("up", "down"):
            self.velocity[at] = 0, (1.5 + draws[3]) * (1 if motion == "down" else -1)
        elif motion == "bounces":
            self.velocity[at] = speed * math.cos(tilt) * sign[0], speed * math.sin(tilt) * sign[1]
        elif motion == "orbits":
            self.orbit[at] = 20 + 6 * draws[3]
            self.turn[at] = (1.8 + 0.6 * draws[4]) / self.orbit[at] * sign[0]
            self.phase[at] = 2 * math.pi * draws[5]
            inwards = SIZE / 2 - self.position[at]
            distance = np.hypot(*inwards)
            if distance > 1:
                self.phase[at] = math.atan2(-inwards[1], -inwards[0])
            arm = self.orbit[at] * np.array([math.cos(self.phase[at]), math.sin(self.phase[at])])
            margin = min(self.orbit[at] + 0.8 * self._reach(at), SIZE / 2)
            self.centre[at] = np.clip(self.position[at] - arm, margin, SIZE - margin)
            if settled:
                self.position[at] = self.centre[at] + arm
        elif motion == "spins":
            self.spin[at] = (0.07 + 0.03 * draws[3]) * sign[0]
        elif motion == "pulses":
            self.beat[at] = 2 * math.pi / (28 + 8 * draws[3])
            self.phase[at] = 0

    def row(self, frame: int) -> dict[str, np.ndarray]:
        """This frame of `Tracks`."""
        mix = np.clip((frame - self.changed + 1) / FADE_FRAMES, 0, 1)
        letter = np.where(mix > 0.5, self.letter[..., 1], self.letter[..., 0])
        same = self.letter[..., 0] == self.letter[..., 1]
        ground_mix = np.clip((frame - self.ground_changed + 1) / FADE_FRAMES, 0, 1)
        real = np.float32
        old, new = self.rgb[..., 0, :], self.rgb[..., 1, :]
        return {
            "position": self.position.astype(real), "angle": self.angle.astype(real),
            "scale": (self.scale * (1 + self.swell * np.sin(self.phase))).astype(real),
            "alpha": self.alpha.astype(real), "shape": self.shape.copy(), "shape_mix": mix.astype(real),
            "rgb": (old + mix[..., None] * (new - old)).astype(real),
            "letter": np.maximum(letter, 0),
            "letter_alpha": np.where(letter < 0, 0, np.where(same, 1, np.abs(2 * mix - 1))).astype(real),
            "ground": self.ground.copy(), "ground_mix": ground_mix.astype(real),
        }

    def advance(self) -> None:
        """Advance by one frame."""
        def doing(*names: str) -> np.ndarray:
            return np.isin(self.motion, [MOTIONS.index(name) for name in names])

        reach = self._reach(...)
        low, high = (reach + GAP)[..., None], (SIZE - reach - GAP)[..., None]
        bouncing = doing("bounces")[..., None]
        speed = np.abs(self.velocity)
        self.velocity = np.where(bouncing & (self.position < low), speed, self.velocity)
        self.velocity = np.where(bouncing & (self.position > high), -speed, self.velocity)
        orbiting, pulsing = doing("orbits"), doing("pulses")
        self.phase += np.where(orbiting, self.turn, np.where(pulsing | (self.swell > 0), self.beat, 0))
        arm = self.orbit[..., None] * np.stack([np.cos(self.phase), np.sin(self.phase)], axis=-1)
        place = np.where(orbiting[..., None], self.centre + arm, np.clip(self.position, low, high))
        glide = np.clip(place - self.position, -GLIDE, GLIDE)
        self.position = self.position + np.where(self.velocity == 0, glide, self.velocity)
        wrap = self.velocity * ~bouncing
        span = SIZE + 2 * reach[..., None]
        self.position -= np.where((wrap > 0) & (self.position > SIZE + reach[..., None]), span, 0)
        self.position += np.where((wrap < 0) & (self.position < -reach[..., None]), span, 0)
        self.angle += np.where(doing("spins"), self.spin, 0)
        self.swell = np.clip(self.swell + np.where(pulsing, 0.04, -0.04), 0, PULSE)
        self.scale += np.clip(self.scale_goal - self.scale, -0.06, 0.06)
        self.alpha += np.clip(self.alpha_goal - self.alpha, -1 / FADE_FRAMES, 1 / FADE_FRAMES)
