"""Scenes of Moving Shapes: one to three objects that move over a patterned ground.

The vocabularies are small so that a model of a few million parameters learns them in minutes and every word
of a prompt can be checked in the frames. Colours within a scene differ, so that a prompt can name one object
and the evaluator can find it. This module imports no torch.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from ...errors import UserError

SIZES = ("small", "large")
COLOURS = ("red", "green", "blue", "yellow", "purple", "white")
SHAPES = ("square", "circle", "triangle", "star")
LETTERS = ("A", "C", "T", "X")
MOTIONS = ("left", "right", "up", "down", "bounces", "spins", "orbits", "pulses", "still")
STAYING = ("spins", "pulses", "still")  # the motions of objects that keep their place
GROUNDS = ("grey", "navy", "brown", "teal")
PATTERNS = ("checked", "striped", "dotted")
MAX_OBJECTS = 3

_HELD_OUT_SHARE = 8  # one triple in eight
_HELD_OUT_SALT = 816  # spreads the held-out triples evenly over colours, shapes and motions


@dataclass(frozen=True)
class ObjectSpec:
    """One object: size, colour, shape, motion and, on a large one, perhaps a letter.

    Raises:
        UserError: a word that is not in its vocabulary, a letter on a small object, or a spinning circle
            without a letter, whose motion would be invisible.
    """

    size: str
    colour: str
    shape: str
    motion: str
    letter: str | None = None

    def __post_init__(self) -> None:
        for field, known in (("size", SIZES), ("colour", COLOURS), ("shape", SHAPES), ("motion", MOTIONS)):
            _check_word(field, getattr(self, field), known)
        if self.letter is not None:
            _check_word("letter", self.letter, LETTERS)
            if self.size != "large":
                raise UserError(f"letter: a small object has no space for {self.letter!r}; make it large.")
        elif self.shape == "circle" and self.motion == "spins":
            raise UserError("motion: a circle without a letter looks the same when it spins; give it a "
                            "letter, as in 'a large red circle with the letter A spins'.")

    @property
    def triple(self) -> tuple[str, str, str]:
        """(colour, shape, motion), the combination that separates training scenes from test scenes."""
        return self.colour, self.shape, self.motion


@dataclass(frozen=True)
class SceneSpec:
    """A ground (colour and pattern; it never moves) and its objects from back to front.

    Raises:
        UserError: an unknown word, no or too many objects, or two objects of one colour.
    """

    objects: tuple[ObjectSpec, ...]
    ground: str
    pattern: str

    def __post_init__(self) -> None:
        _check_word("ground", self.ground, GROUNDS)
        _check_word("pattern", self.pattern, PATTERNS)
        if not 1 <= len(self.objects) <= MAX_OBJECTS:
            raise UserError(f"objects: {len(self.objects)} in one scene; give 1 to {MAX_OBJECTS}.")
        colours = [thing.colour for thing in self.objects]
        for colour in colours:
            if colours.count(colour) > 1:
                raise UserError(f"colour: two objects are {colour}; give each object a colour of its own.")


def is_held_out(triple: tuple[str, str, str]) -> bool:
    """Whether this (colour, shape, motion) never occurs in training: one in eight, by a stable hash."""
    return zlib.crc32(" ".join((str(_HELD_OUT_SALT), *triple)).encode()) % _HELD_OUT_SHARE == 0


TRAINING_TRIPLES = tuple(t for t in product(COLOURS, SHAPES, MOTIONS) if not is_held_out(t))
HELD_OUT_TRIPLES = tuple(t for t in product(COLOURS, SHAPES, MOTIONS) if is_held_out(t))


def sample_scene(rng: np.random.Generator, held_out: bool = False, objects: int | None = None) -> SceneSpec:
    """A random scene with `objects` objects (None: 1 to 3), all triples from training or all held out."""
    if objects is not None and not 1 <= objects <= MAX_OBJECTS:
        raise UserError(f"objects: {objects} must be 1 to {MAX_OBJECTS}.")
    count = objects or int(rng.choice([1, 2, 3], p=[0.3, 0.4, 0.3]))
    chosen: tuple[ObjectSpec, ...] = ()
    for _ in range(count):
        chosen += (_sample_object(rng, held_out, taken={thing.colour for thing in chosen}),)
    return SceneSpec(chosen, _pick(rng, GROUNDS), _pick(rng, PATTERNS))


def change_scene(rng: np.random.Generator, scene: SceneSpec, held_out: bool = False) -> SceneSpec:
    """A scene for the next prompt of an interactive video. It always differs from `scene`.

    One or two of these changes happen: an object takes another colour, shape or motion; an object is
    replaced; a new object appears in front; the front object disappears; the ground changes. Everything else
    continues, and object i stays object i. Triples of changed objects are all from training, or all held out.
    """
    while True:
        changed = scene
        for _ in range(1 + (rng.random() < 0.4)):
            changed = _edit(rng, changed, held_out)
        if changed != scene:
            return changed


def _edit(rng: np.random.Generator, scene: SceneSpec, held_out: bool) -> SceneSpec:
    things = scene.objects
    kind = rng.choice(["attributes", "replace", "add", "remove", "ground"], p=[0.5, 0.1, 0.1, 0.1, 0.2])
    if kind == "ground":
        grounds = [pair for pair in product(GROUNDS, PATTERNS) if pair != (scene.ground, scene.pattern)]
        ground, pattern = _pick(rng, grounds)
        return replace(scene, ground=ground, pattern=pattern)
    if kind == "remove":
        return replace(scene, objects=things[:-1]) if len(things) > 1 else scene
    colours = {thing.colour for thing in things}
    if kind == "add":
        new = _sample_object(rng, held_out, colours) if len(things) < MAX_OBJECTS else None
        return replace(scene, objects=things + (new,)) if new else scene
    index = int(rng.integers(len(things)))
    old = things[index]
    if kind == "replace":
        new = _sample_object(rng, held_out, colours)
    else:
        new = _vary(rng, old, held_out, colours - {old.colour})
    return replace(scene, objects=things[:index] + (new,) + things[index + 1:])


def _vary(rng: np.random.Generator, old: ObjectSpec, held_out: bool, taken: set[str]) -> ObjectSpec:
    """The object with one or two of colour, shape and motion changed, or unchanged if that is impossible."""
    fields = rng.choice(3, size=1 + (rng.random() < 0.3), replace=False, p=[0.35, 0.2, 0.45])
    options = [triple for triple in (HELD_OUT_TRIPLES if held_out else TRAINING_TRIPLES)
               if triple[0] not in taken
               and all((new != was) == (i in fields) for i, (new, was) in enumerate(zip(triple, old.triple)))
               and (triple[1:] != ("circle", "spins") or old.letter)]
    if not options:
        return old
    colour, shape, motion = _pick(rng, options)
    return replace(old, colour=colour, shape=shape, motion=motion)


def _sample_object(rng: np.random.Generator, held_out: bool, taken: set[str]) -> ObjectSpec:
    triples = [t for t in (HELD_OUT_TRIPLES if held_out else TRAINING_TRIPLES) if t[0] not in taken]
    colour, shape, motion = _pick(rng, triples)
    must = (shape, motion) == ("circle", "spins")
    size = "large" if must or rng.random() < 0.6 else "small"
    letter = _pick(rng, LETTERS) if must or (size == "large" and rng.random() < 0.5) else None
    return ObjectSpec(size, colour, shape, motion, letter)


def _pick(rng: np.random.Generator, options):
    return options[int(rng.integers(len(options)))]


def _check_word(field: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UserError(f"{field}: {value!r} is not known here; choose from {', '.join(known)}.")
