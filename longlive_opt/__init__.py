"""longlive_opt: LongLive-1.3B, its inference optimizations one by one and together, and what each does."""

__version__ = "0.1.0"
