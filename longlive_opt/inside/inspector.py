"""Open a preset and look inside: four calls, each with its figure. The numbers stay as attributes.

    look = Inspector.preset("balanced", device="cuda", model="longlive-1.3b")
    look.build()
    look.layer_errors()        # error of every layer against the reference     -> look.errors
    look.cache_slots()         # which latent frame lies in which slot          -> look.slots
    look.attention_mass()      # how much attention each latent frame gets      -> look.attention
    look.trace_blocks(path)    # three steady blocks and a switch, for Perfetto -> look.trace
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config import BASELINE, ExperimentConfig, notebook_parameters
from ..errors import UserError
from ..files import project_path
from ..live.opening import live_config
from ..measurement import block_trace, environment
from ..models.attention import make_attention
from ..optimizations import build_pipeline
from ..optimizations.quantized_kv_cache import QuantizedKV
from ..optimizations.static_kv_cache import StaticKV
from ..prompts import PromptSchedule
from ..report.charts.chart import Chart
from ..report.charts.heatmaps import attention_by_frame, error_by_layer, slots_by_block
from ..report.charts.stages import block_timeline
from ..streaming.kv_cache import RollingKVCache
from ..streaming.pipeline import Pipeline, cache_geometry
from ..streaming.session import StreamingSession
from ..streaming.timeline import Timeline
from . import attention_mass, cache_slots, layer_errors
from .cache_slots import SlotRow

CACHES = ("rolling", "static", "8-bit")
MADE_BY = {"pipeline": "build", "errors": "layer_errors", "slots": "cache_slots",
           "attention": "attention_mass", "trace": "trace_blocks"}
_OWN_KEYS = ("preset", "output_dir")


class Inspector:
    """One preset, seen from inside. Its stream has the config's first two prompts."""

    def __init__(self, config: ExperimentConfig):
        self.config = config
        window = config.window_blocks
        self.switch_block = 2 * window - 1
        self.blocks = 2 * window + 1
        """Blocks of the slots' figure: the ring turns, and the second prompt takes over at `switch_block`."""
        prompts = config.prompts[:2] or ("a large red square spins", )
        self.prompts = prompts if len(prompts) == 2 else (*prompts, f"{prompts[0]}, seen from far away")

    @classmethod
    def preset(cls, name: str, **keys: Any) -> Inspector:
        """Open the preset `name` with `keys` on top; the default is the tiny model on the CPU.

        Raises:
            UserError: an unknown preset, or keys that cannot be.
        """
        return cls(live_config(name, {"relative_rope": False, **keys}))

    @classmethod
    def from_notebook(cls, namespace: Mapping[str, Any]) -> Inspector:
        """Open the preset of a notebook's parameters (`globals()` after its first cells).

        Raises:
            UserError: an unknown preset, or keys that cannot be.
        """
        given = notebook_parameters(namespace)
        keys = {key: value for key, value in given.items() if key not in _OWN_KEYS and value is not None}
        return cls.preset(str(given.get("preset", BASELINE)), **keys)

    def __getattr__(self, name: str) -> Any:
        if (verb := MADE_BY.get(name)) is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        raise UserError(f"{name}: there is none yet; call {verb}() first.")

    def __repr__(self) -> str:
        done = [verb for name, verb in MADE_BY.items() if name in self.__dict__]
        return (f"Inspector({self.config.name}, {self.config.model} on {self.config.device}; done: "
                f"{', '.join(done) or 'nothing yet'})")

    def build(self) -> Pipeline:
        """Load the model and apply the preset's optimizations."""
        self.pipeline = build_pipeline(self.config)
        return self.pipeline

    def layer_errors(self, block: int | None = None) -> Chart:
        """The error of every layer in the denoising passes of `block` (default: the first with a window that
        has moved).
        """
        block = self.config.window_blocks if block is None else block
        self.errors = layer_errors.layer_errors(self.pipeline, self.prompts[0], block)
        reference = self.errors.reference
        return error_by_layer(self.config.name, self.errors.timesteps, self.errors.errors.tolist(),
                              None if reference is None else reference.tolist())

    def cache_slots(self, cache: str | None = None) -> Chart:
        """What lies in which slot after every block.

        Args:
            cache: `rolling`, `static` or `8-bit` instead of the preset's own.

        Raises:
            UserError: an unknown cache, or one that this machine cannot run.
        """
        schedule = self._schedule(self.switch_block)
        self.slots = cache_slots.cache_slots(_with_cache(self.pipeline, cache), schedule, self.blocks)
        rows = [[(row.role(slot, self.slots.sink), None if content is None else content.frame,
                  _mark(row, slot)) for slot, content in enumerate(row.slots)] for row in self.slots.rows]
        return slots_by_block(self.slots.cache, self.slots.sink, rows, [self.switch_block])

    def attention_mass(self, block: int | None = None) -> Chart:
        """How much attention each latent frame gets in the denoising passes of `block` (default: the first
        with a window that has moved), as the mean over the steps.
        """
        block = self.config.window_blocks if block is None else block
        self.attention = attention_mass.attention_mass(self.pipeline, self._schedule(None), block)
        found = self.attention
        return attention_by_frame(self.config.name, block, found.frames, found.roles,
                                  found.mass.mean(0).tolist())

    def trace_blocks(self, path: str | Path) -> Chart:
        """Trace three steady blocks and a prompt switch to `path` (.json.gz), relative to the project's
        folder. Compiles and captures before.

        Raises:
            UserError: the file cannot be written there.
        """
        path = project_path(path)
        if not path.name.endswith(".json.gz"):
            raise UserError(f"path: {path.name!r} does not end in .json.gz; the trace is gzipped JSON.")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"path: cannot make the folder of {path.name}: {error.strerror}; choose another "
                            "one.") from error
        session = StreamingSession(self.pipeline, timeline=Timeline(self.pipeline.device))
        if self.config.use_torch_compile or self.pipeline.device.type == "cuda":
            session.warm_up()
        self.trace = block_trace.record(session, self.prompts, first_block=self.config.window_blocks + 1)
        machine = environment.environment(self.pipeline.device)
        facts = {key: machine[key] for key in ("gpu", "cpu", "torch", "git_commit", "git_dirty")}
        self.trace.write(path, {"preset": self.config.name, "model": self.config.model, **facts})
        events = [event.to_row() for event in self.trace.events]
        return block_timeline({"preset": self.config.name, "events": events}, self.trace.shown)

    def _schedule(self, switch_block: int | None) -> PromptSchedule:
        if switch_block is None:
            return PromptSchedule(self.prompts[:1])
        return PromptSchedule(self.prompts, (switch_block * self.config.block_frames,))


def _mark(row: SlotRow, slot: int) -> str:
    content = row.slots[slot]
    if content is None:
        return ""
    if row.switched and content.kind == "recache":
        return "recached"
    return "old prompt" if content.prompt < row.prompt else ""


def _with_cache(pipeline: Pipeline, cache: str | None) -> Pipeline:
    """The pipeline with another cache, as its optimization would make it."""
    if cache is None:
        return pipeline
    if cache == "static":
        return StaticKV().apply(pipeline)
    if cache == "8-bit":
        return QuantizedKV(pipeline.config.kv_quantization, pipeline.config.kv_read_path).apply(pipeline)
    if cache != "rolling":
        raise UserError(f"cache: {cache!r} is unknown; choose one of {', '.join(CACHES)}.")
    geometry = cache_geometry(pipeline.config, pipeline.model)
    attention = make_attention(pipeline.attention_backend)
    return replace(
        pipeline, sampler=replace(pipeline.sampler, trim_recache=False),
        make_cache=lambda: RollingKVCache(geometry, attention, 1, pipeline.device, pipeline.dtype))
