"""Look inside a preset: errors by layer, slots of the cache, attention by latent frame, a trace of blocks."""

from .inspector import Inspector

__all__ = ["Inspector"]
