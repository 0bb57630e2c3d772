"""An auxiliary head that trains the text encoder to read: it predicts the attributes that a prompt describes.

The gradient of a video loss reaches the text encoder late and weakly. So a small attention head has one
learned query per attribute of the scene and is trained with cross entropy. Within a minute the encoder
represents size, shape, motion and letter of the object of each colour. The transformer's cross-attention,
which works the same way, finds them there. While the teacher trains, the loss continues with a small weight.
The head is not exported.
"""

from __future__ import annotations

from functools import cache
from typing import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models.text import Tokenizer, UMT5Encoder
from ..shapes.captions import describe
from ..shapes.scene import (
    COLOURS,
    GROUNDS,
    LETTERS,
    MAX_OBJECTS,
    MOTIONS,
    PATTERNS,
    SHAPES,
    SIZES,
    SceneSpec,
    change_scene,
    sample_scene,
)

ABSENT = -100
_OBJECT = (tuple(range(MAX_OBJECTS)), SIZES, SHAPES, MOTIONS, (None, *LETTERS))
CLASSES = [2, *map(len, _OBJECT)] * len(COLOURS) + [len(GROUNDS), len(PATTERNS)]
"""Number of classes of each attribute. For each colour: whether an object has it (at most one), its place
from back to front, and its other attributes. Then the ground."""


def scene_labels(scene: SceneSpec) -> list[int]:
    """The attributes of a scene as class numbers, with ABSENT for those of a colour that no object has."""
    labels: list[int] = []
    things = {thing.colour: (i, thing) for i, thing in enumerate(scene.objects)}
    for colour in COLOURS:
        if colour not in things:
            labels += [0] + [ABSENT] * len(_OBJECT)
            continue
        place, thing = things[colour]
        values = (place, thing.size, thing.shape, thing.motion, thing.letter)
        labels += [1] + [known.index(value) for known, value in zip(_OBJECT, values)]
    return labels + [GROUNDS.index(scene.ground), PATTERNS.index(scene.pattern)]


def sample_scenes(rng: np.random.Generator, count: int) -> list[SceneSpec]:
    """Training scenes. Every second one is a change of the one before."""
    scenes: list[SceneSpec] = []
    for i in range(count):
        scenes.append(change_scene(rng, scenes[-1]) if i % 2 else sample_scene(rng))
    return scenes


def sample_prompts(tokenizer: Tokenizer, seed: Sequence[int], count: int) -> tuple[Tensor, Tensor]:
    """Ids [count, text_len] and labels [count, attributes] of random training prompts."""
    rng = np.random.default_rng(seed)
    scenes = sample_scenes(rng, count)
    ids, _ = tokenizer([describe(scene, rng) for scene in scenes])
    return ids, torch.tensor([scene_labels(scene) for scene in scenes])


class AttributeHead(nn.Module):
    """Text features [B, L, dim] -> logits [B, attributes, classes], by one learned query per attribute."""

    def __init__(self, dim: int, heads: int = 4):
        super().__init__()
        self.heads = heads
        self.queries = nn.Parameter(torch.randn(len(CLASSES), dim) * dim**-0.5)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.out = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, max(CLASSES))
        )

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (
            self.queries.expand(len(features), -1, -1), *self.key_value(features).chunk(2, dim=-1)))
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=(mask != 0)[:, None, None, :])
        return self.out(found.transpose(1, 2).flatten(-2))


@cache
def _class_counts(device: torch.device) -> Tensor:
    return torch.tensor(CLASSES, device=device)


def attribute_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy, and the share of attributes that are read correctly."""
    logits = logits.float()
    sizes = _class_counts(logits.device)
    logits = logits.masked_fill(torch.arange(logits.shape[-1], device=logits.device) >= sizes[:, None], -1e4)
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=ABSENT)
    asked = labels != ABSENT
    return loss, ((logits.argmax(-1) == labels) & asked).sum() / asked.sum()


def text_features(encoder: UMT5Encoder, ids: Tensor) -> Tensor:
    """Features [B, L, dim] of ids [B, L] as by `TextEncoder.encode`, for all prompts at once; padding is
    zero.
    """
    mask = ids != 0
    return encoder(ids, mask.long()).masked_fill(~mask[..., None], 0)
