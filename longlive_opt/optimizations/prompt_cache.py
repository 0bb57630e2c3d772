"""Prompt cache: keep encoded prompts, so that returning to a prompt needs no text encoder.

Idea: cross-attention's keys and values depend only on the prompt and the weights. A least-recently-used table
keeps them up to a byte limit, for the lifetime of its pipeline. An optional folder keeps the text encoder's
output (a few MB per prompt) for later runs. A run whose prompts are all there never loads the text encoder.

On disk an entry belongs to the exact text encoder and tokenizer that made it: its name includes their
fingerprint, so a changed encoder never uses a stale entry.

Replaces: `encode_prompt`. Costs: memory (94 MB per prompt for LongLive-1.3B in bf16). It does not help with
prompts that never return. Bit-exact.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import UserError
from ..files import project_path
from ..models.checkpoint import save_tensors
from ..models.dit import TextContext
from ..streaming.pipeline import Pipeline
from .base import Exactness, Optimization

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PromptCache(Optimization):
    name: ClassVar[str] = "prompt_cache"
    exactness: ClassVar[Exactness] = "bitwise"

    limit_mb: int = 1024
    folder: str | None = None

    def apply(self, pipeline: Pipeline) -> Pipeline:
        encoder = pipeline.text_encoder
        shape = (1, encoder.config.text_len, encoder.config.dim)
        store = EmbeddingStore(project_path(self.folder), encoder.fingerprint, shape) if self.folder else None
        cached = CachedPrompts(lambda prompt: encoder.encode([prompt]), pipeline.embed_text,
                               self.limit_mb * 2**20, store)
        pipeline = dataclasses.replace(pipeline, encode_prompt=cached)
        return self.report(pipeline, f"prompts are kept up to {self.limit_mb} MiB", stats=cached.stats)


@dataclass
class PromptStats:
    """The outcome of every request, in order: "hit" (memory), "disk" or "miss"."""

    outcomes: list[str] = field(default_factory=list)
    evicted: int = 0
    bytes: int = 0

    def summary(self) -> dict[str, Any]:
        return {**Counter(self.outcomes), "evicted": self.evicted, "bytes": self.bytes}


class CachedPrompts:
    """`encode_prompt` with a memory: text -> TextContext, dropping the least recently used entry first."""

    def __init__(
        self,
        encode: Callable[[str], Tensor],
        embed: Callable[[Tensor], TextContext],
        limit_bytes: int,
        store: EmbeddingStore | None = None,
    ):
        self._encode, self._embed, self._limit, self._store = encode, embed, limit_bytes, store
        self._entries: OrderedDict[str, TextContext] = OrderedDict()
        self.stats = PromptStats()

    def __call__(self, prompt: str) -> TextContext:
        known = self._entries.get(prompt)
        if known is not None:
            self._entries.move_to_end(prompt)
            self.stats.outcomes.append("hit")
            return known
        embedding = self._store.load(prompt) if self._store else None
        self.stats.outcomes.append("miss" if embedding is None else "disk")
        if embedding is None:
            embedding = self._encode(prompt)
            if self._store:
                self._store.save(prompt, embedding)
        context = self._embed(embedding)
        self._remember(prompt, context)
        return context

    def _remember(self, prompt: str, context: TextContext) -> None:
        if context.nbytes > self._limit:
            return
        self._entries[prompt] = context
        self.stats.bytes += context.nbytes
        while self.stats.bytes > self._limit:
            _, oldest = self._entries.popitem(last=False)
            self.stats.bytes -= oldest.nbytes
            self.stats.evicted += 1


class EmbeddingStore:
    """Text-encoder outputs [1, text_len, dim] as safetensors files, one per prompt; a damaged file counts as
    missing. The SHA-256 of an embedding is stored with it, because a wrong one gives a wrong video.
    """

    def __init__(self, folder: Path, fingerprint: str, shape: tuple[int, ...] | None = None):
        """Args: shape: that of every embedding; None: any. Raises UserError if `folder` cannot be made."""
        self._fingerprint = fingerprint
        self._shape = shape
        self._folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"prompt_cache_dir: cannot make {folder}: {error.strerror}; choose another folder."
            ) from error

    def path(self, prompt: str) -> Path:
        return (
            self._folder
            / f"{hashlib.sha256(f'{self._fingerprint} {prompt}'.encode()).hexdigest()}.safetensors"
        )

    def load(self, prompt: str) -> Tensor | None:
        path = self.path(prompt)
        if not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                embedding, digest = file.get_tensor("embedding"), (file.metadata() or {}).get("sha256")
            if self._shape not in (None, tuple(embedding.shape)):
                raise ValueError(f"its shape is {tuple(embedding.shape)}, not {self._shape}")
            if digest != _sha256(embedding):
                raise ValueError("its content does not have the SHA-256 that was stored with it")
            return embedding
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            logger.warning("prompt cache: %s is damaged and will be replaced (%s)", path.name, error)
            return None

    def save(self, prompt: str, embedding: Tensor) -> None:
        try:
            save_tensors(self.path(prompt), {"embedding": embedding}, {"sha256": _sha256(embedding)})
        except UserError as error:
            raise UserError(f"prompt_cache_dir: {error}") from error


def _sha256(embedding: Tensor) -> str:
    """SHA-256 of the tensor's dtype and bytes."""
    content = embedding.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(str(embedding.dtype).encode() + content).hexdigest()
