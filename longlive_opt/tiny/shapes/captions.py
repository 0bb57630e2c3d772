"""Prompts of Moving Shapes: turn a scene into a sentence, and a sentence into a scene.

    a small red circle moves left and a large blue square with the letter A spins, on a dotted grey ground

Each phrase has a few paraphrases, so that a text encoder must learn to read. `parse(describe(scene, rng))`
always equals `scene`. Prompts are ASCII, lower case except for letters on objects, and at most 120 bytes
long, so that a tokenizer of UTF-8 bytes with 128 positions never cuts them. Three objects are therefore often
described in short form. This module imports no torch.
"""

from __future__ import annotations

import re
from typing import Mapping, Sequence

import numpy as np

from ...errors import UserError
from .scene import COLOURS, GROUNDS, LETTERS, ObjectSpec, SceneSpec

MAX_BYTES = 120

# The canonical phrase comes first. The shortest one is used if a sentence would become too long.
SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}
SHAPE_WORDS = {"square": ("square", "box"), "circle": ("circle", "disc"), "triangle": ("triangle",),
               "star": ("star",)}
MOTION_PHRASES = {
    **{way: (f"moves {way}", f"goes {way}") for way in ("left", "right", "up", "down")},
    "bounces": ("bounces", "bounces around"),
    "spins": ("spins", "rotates"),
    "orbits": ("orbits", "moves in a circle"),
    "pulses": ("pulses", "grows and shrinks"),
    "still": ("stands still", "stays"),
}
PATTERN_WORDS = {"checked": ("checked", "chequered"), "striped": ("striped",),
                 "dotted": ("dotted", "spotted")}
LETTER_FORMS = ("with the letter {}", "with letter {}", "{}")
GROUND_FORMS = ("on a {} {} ground", "over a {} {} floor", "on {} {}")

_ARTICLES = ("a", "an", "the", "one")
_SEPARATORS = (",", ".", ";", "and", "while", "then")
_KNOWN = (*_ARTICLES, "on", "over", "with", "letter", "ground", "floor")


def describe(scene: SceneSpec, rng: np.random.Generator | None = None) -> str:
    """The scene as a prompt of at most 120 bytes, in canonical phrases, or with `rng` in random ones.

    Objects come in the order of the scene, back to front.
    """
    if rng is None:
        full, short = _write(scene, None), _write(scene, None, short=True)
        return full if len(full) <= MAX_BYTES else short
    for _ in range(4):
        prompt = _write(scene, rng)
        if len(prompt) <= MAX_BYTES:
            return prompt
    return _write(scene, rng, short=True)


def strange(prompt: str) -> str:
    """A sentence on a prompt that is not of Moving Shapes, which the tiny model draws all the same; empty for
    one that is.
    """
    try:
        parse(prompt)
    except UserError as error:
        return f"The tiny model knows only its small world, and draws something else: {error}"
    return ""


def parse(prompt: str) -> SceneSpec:
    """The scene that a prompt describes, in any of the known phrases. Ignores case and punctuation.

    Raises:
        UserError: a word is unknown or a part is missing. The message lists the words known there.
    """
    reader = _Reader(prompt)
    objects: list[ObjectSpec] = []
    ground: tuple[str, str] | None = None
    while reader.skip(_SEPARATORS):
        if reader.peek() in ("on", "over"):
            if ground is not None:
                raise UserError(f"prompt: {prompt!r} names two grounds; name one.")
            ground = _read_ground(reader)
        else:
            objects.append(_read_object(reader))
    if not objects:
        raise UserError(f"prompt: {prompt!r} names no object; write for example "
                        "'a small red circle moves left, on a dotted grey ground'.")
    if ground is None:
        raise UserError(f"prompt: {prompt!r} names no ground; end it for example with "
                        "'on a dotted grey ground'.")
    return SceneSpec(tuple(objects), *ground)


def _write(scene: SceneSpec, rng: np.random.Generator | None, short: bool = False) -> str:
    def choose(forms: Sequence[str]) -> str:
        if short:
            return min(forms, key=len)
        return forms[0] if rng is None else forms[int(rng.integers(len(forms)))]

    drop_article = short or (rng is not None and rng.random() < 0.3)
    article = "" if drop_article else "a "
    things = []
    for thing in scene.objects:
        letter = f" {choose(LETTER_FORMS).format(thing.letter)}" if thing.letter else ""
        things.append(f"{article}{choose(SIZE_WORDS[thing.size])} {thing.colour} "
                      f"{choose(SHAPE_WORDS[thing.shape])}{letter} {choose(MOTION_PHRASES[thing.motion])}")
    ground = choose(GROUND_FORMS).format(choose(PATTERN_WORDS[scene.pattern]), scene.ground)
    last = ", " if short else " and "
    clause = last.join(([", ".join(things[:-1])] if things[1:] else []) + things[-1:])
    return f"{ground}, {clause}" if rng is not None and rng.random() < 0.25 else f"{clause}, {ground}"


class _Reader:
    """Reads the words of a prompt phrase by phrase."""

    def __init__(self, prompt: str) -> None:
        self.prompt = prompt
        self.words = re.findall(r"[^\s,.;]+|[,.;]", prompt.lower())
        self.at = 0

    def peek(self) -> str | None:
        return self.words[self.at] if self.at < len(self.words) else None

    def skip(self, words: Sequence[str]) -> bool:
        """Skip any of `words`. Returns whether words are left."""
        while self.peek() in words:
            self.at += 1
        return self.peek() is not None

    def take(self, phrases: Mapping[str, Sequence[str]], what: str) -> str:
        """The meaning of the longest of `phrases` that comes next."""
        fitting = [(len(words), meaning) for meaning, forms in phrases.items()
                   for words in map(str.split, forms)
                   if self.words[self.at:self.at + len(words)] == words]
        if fitting:
            length, meaning = max(fitting)
            self.at += length
            return meaning
        known = ", ".join(form for forms in phrases.values() for form in forms)
        found = self.peek()
        if found is None:
            raise UserError(f"prompt: {self.prompt!r} ends where a {what} is missing; add one of: {known}.")
        remedy = f"a {what} is expected here, one of: {known}"
        if found in _VOCABULARY:
            raise UserError(f"prompt: {found!r} is in the wrong place in {self.prompt!r}; {remedy}.")
        raise UserError(f"prompt: the word {found!r} in {self.prompt!r} is not known; {remedy}.")


def _read_ground(reader: _Reader) -> tuple[str, str]:
    reader.skip(("on", "over"))
    reader.skip(_ARTICLES)
    pattern = reader.take(PATTERN_WORDS, "pattern")
    ground = reader.take(_same(GROUNDS), "colour of the ground")
    reader.skip(("ground", "floor"))
    return ground, pattern


def _read_object(reader: _Reader) -> ObjectSpec:
    reader.skip(_ARTICLES)
    size = reader.take(SIZE_WORDS, "size")
    colour = reader.take(_same(COLOURS), "colour")
    shape = reader.take(SHAPE_WORDS, "shape")
    letter = None
    announced = reader.peek() == "with"
    if announced:
        reader.skip(("with", "the", "letter"))
    if announced or reader.peek() in map(str.lower, LETTERS):
        letter = reader.take({name: (name.lower(),) for name in LETTERS}, "letter")
    return ObjectSpec(size, colour, shape, reader.take(MOTION_PHRASES, "motion"), letter)


def _same(words: Sequence[str]) -> dict[str, tuple[str]]:
    return {word: (word,) for word in words}


_VOCABULARY = {word for table in (SIZE_WORDS, SHAPE_WORDS, MOTION_PHRASES, PATTERN_WORDS)
               for forms in table.values() for form in forms for word in form.split()}
_VOCABULARY |= {*COLOURS, *GROUNDS, *_KNOWN, *(letter.lower() for letter in LETTERS)}
