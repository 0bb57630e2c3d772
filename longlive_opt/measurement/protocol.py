"""Measures a pipeline: a rehearsal, then two streams whose events give every latency.

Each stream fills the window first. One stream has no switch and measures the steady state. The other has a
prompt switch at every second block; every second switch requests a prompt that was never used before.

A chunk is ready when its frames are in page-locked host memory, from where they can be shown or sent.

Python's garbage is collected before each stream. Loading and compiling leave many objects, and the first scan
through them would otherwise fall into a measured block. A stream's own garbage collections, and the GPU
allocator's requests to the driver, are part of the measurement and are recorded. So are the GPU's clock,
power and energy (`telemetry`).

On several GPUs, a third, shorter stream runs afterwards without communication. Its frames have no meaning;
the difference of its stages is the communication that the others do not hide.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import time
from pathlib import Path
from typing import Any, Iterator

from ..config import REHEARSED_BLOCKS, ExperimentConfig
from ..errors import UserError
from ..kernels.torch_internals import compile_seconds, compiled_graphs
from ..models.specs import VAE_TEMPORAL_STRIDE
from ..optimizations.prompt_cache import CachedPrompts
from ..optimizations.several_gpus import Leader, rank_device, rank_memory
from ..prompts import PromptSchedule
from ..streaming.pipeline import Pipeline
from ..streaming.session import Chunk, StreamingSession
from ..streaming.timeline import GARBAGE, Event, Timeline
from . import block_trace, environment, metrics
from .result import na
from .telemetry import Samples, Telemetry

PROGRESS_SECONDS = 10.0
SWITCH_EVERY = 2
MUTED_BLOCKS, MUTED_SWITCHES = 12, 4
"""Blocks, and switches among them, of the stream without communication."""


class Measurement:
    """Measures one pipeline with its own session, which may be used afterwards. Prints its progress.
    """

    def __init__(self, pipeline: Pipeline, schedule: PromptSchedule):
        """Args: schedule: its prompts are the ones that the streams request, in turn."""
        self.pipeline = pipeline
        self.config = pipeline.config
        self.timeline = Timeline(pipeline.device)
        self.session = StreamingSession(pipeline, timeline=self.timeline)
        ranks = self.config.gpus if pipeline.device.type == "cuda" else 1
        self._telemetry = Telemetry([rank_device(self.config, rank) for rank in range(ranks)])
        self._prompts = schedule.prompts
        self._variations = itertools.count(1)

    def rehearse(self) -> None:
        """Run one short stream through everything that the measured streams will do. Its time is set-up time,
        because compilation and capture happen here.
        """
        started, built_before = time.perf_counter(), self._building_seconds()
        self._start_over()
        blocks = self.config.warmup_blocks + REHEARSED_BLOCKS
        warmup = self.config.warmup_blocks
        setup = self.pipeline.setup_s
        with self._frames_to_host():
            chunks = self._stream_with_switches(blocks, [warmup, warmup + 2])
            next(chunks)
            setup["first_block"] = time.perf_counter() - started
            for chunk in chunks:
                last = chunk
        if not last.latents.isfinite().all():
            raise UserError(f"latents: those of block {last.block} are not finite, so the video is black; "
                            "check timestep_shift, lora_alpha and weights, or run the tests of the kernels.")
        setup["rehearsal"] = time.perf_counter() - started
        setup |= {kind: spent - built_before[kind] for kind, spent in self._building_seconds().items()}
        print(
            f"rehearsal of {blocks} blocks: {setup['rehearsal']:.1f} s, of it compiling "
            f"{setup['compile']:.1f} s, capturing {setup['capture']:.1f} s"
        )

    def run(self) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Run the measured streams, after `rehearse`.

        Returns:
            The sections of result.json that come from the streams, and two sections of its environment: other
            processes during the streams (`environment.company_of`), and the clocks before and after.
        """
        device, config, ranks = self.pipeline.device, self.config, self.pipeline.ranks
        assert ranks is None or isinstance(ranks, Leader)
        environment.reset_peak_memory(device)
        if ranks is not None:
            ranks.replies("reset_peak")
        clocks_before, built_before = environment.clocks(device), self._built()
        cpu_before, asked_driver = environment.cpu_seconds(), environment.allocator_counts(device)
        steady, gpu_steady = self._record(config.warmup_blocks + config.measure_blocks, [])
        asked_before = len(self._prompt_outcomes())
        switched, gpu_switched = self._record(
            config.warmup_blocks + SWITCH_EVERY * config.num_switches, switch_blocks(config)
        )
        company = environment.company_of(device, cpu_before, environment.cpu_seconds())
        pauses = [event.duration_ms for event in (*steady, *switched) if event.name == GARBAGE]
        interruptions = {"garbage_collections": len(pauses), "garbage_ms_max": max(pauses, default=0.0)}
        interruptions |= {kind: count - asked_driver[kind]
                          for kind, count in environment.allocator_counts(device).items()}
        measured = metrics.measurements(
            steady,
            first_measured_block=config.warmup_blocks,
            frames_per_block=config.block_frames * VAE_TEMPORAL_STRIDE,
            switch_events=switched if config.num_switches else None,
            playback_fps=config.playback_fps,
            target_ms=config.target_ms_per_frame,
        )
        # The stream's first request is not a switch.
        outcomes = self._prompt_outcomes()[asked_before + 1:]
        latency = measured["latency"]
        latency["ps_by_prompt"] = metrics.grouped(latency["ps_ms_all"], outcomes)
        latency["ps_random_by_prompt"] = metrics.random_moments_by_group(
            latency["ps_ms_all"], latency["ps_before_ms_all"], outcomes)
        measured |= {
            "events": [event.to_row() for event in steady],
            "switch_events": [event.to_row() for event in switched],
            "built_while_measured": {
                kind: count - built_before[kind] for kind, count in self._built().items()
            },
            "interruptions": interruptions,
            "frames_on": "host",
            "gpu_samples": gpu_steady.section() | (
                {} if self._telemetry.missing else {"switch_stream": gpu_switched.section()}),
            "energy": self._energy(steady, gpu_steady) | (
                {"switch_stream": self._energy(switched, gpu_switched)} if config.num_switches else {}),
            "memory_gb": environment.memory_gb(device, self.session.cache.nbytes),
        }
        if ranks is not None:
            measured["ranks"] = self._ranks_section(ranks, steady, switched)
        clocks = {"clocks_before": clocks_before, "clocks_after": environment.clocks(device)}
        return measured, company, clocks

    def trace(self, path: Path) -> dict[str, Any]:
        """Write a trace of steady blocks and a switch to `path` (`block_trace`), after `run`.

        Returns:
            The section `trace` of result.json.
        """
        config = self.config
        other = self._prompts[1] if len(self._prompts) > 1 else f"{self._prompts[0]} (trace)"
        traced = block_trace.record(self.session, (self._prompts[0], other), first_block=config.warmup_blocks)
        machine = environment.environment(self.pipeline.device,
                                          attention_backend=self.pipeline.attention_backend)
        facts = {key: machine[key] for key in ("gpu", "cpu", "torch", "git_commit", "git_dirty")}
        traced.write(path, {"preset": config.name, "model": config.model, **facts})
        print(f"trace of blocks {traced.blocks[0]} to {traced.shown[-1]}: {len(traced.kernels)} kernels")
        return {"file": path.name, "blocks": list(traced.blocks), "switch_block": traced.switch_block,
                "kernels": len(traced.kernels)}

    def _ranks_section(self, ranks: Leader, steady: list[Event], switched: list[Event]) -> dict[str, Any]:
        """The `ranks` section of a result. Runs a stream without communication."""
        config, device = self.config, self.pipeline.device
        memory = [rank_memory(device, self.session.cache.nbytes), *ranks.replies("memory")]
        section = {"count": config.gpus, "denoising": config.denoising_ranks, "decoding": config.vae_ranks,
                   "memory_gb": memory, "peak_allocated_gb": (
                       max(rank["peak_allocated"] for rank in memory) if device.type == "cuda" else
                       na(f"the allocator is watched on CUDA only; the run was on {device.type}",
                          "run on a GPU"))}
        if config.gpu_memory_limit_gb is not None:
            return section | {"exposed_ms": na("a second cache might not fit into gpu_memory_limit_gb",
                                               "measure without a limit")}
        muted = self._without_communication(ranks)
        exposed: dict[str, Any] = {}
        for stage, loud in (("denoise", steady), ("decode", steady), ("recache", switched)):
            times = [metrics.stage_mean(events, stage, config.warmup_blocks) for events in (loud, muted)]
            exposed[stage] = (na(f"the streams have no stage {stage}", "raise num_switches") if None in times
                              else times[0] - times[1])
        return section | {"exposed_ms": exposed}

    def _without_communication(self, ranks: Leader) -> list[Event]:
        """The events of a stream in which the ranks exchange nothing, with a rehearsal of its own."""
        warmup = self.config.warmup_blocks
        switches = [warmup + MUTED_BLOCKS + SWITCH_EVERY * i for i in range(MUTED_SWITCHES)]
        # A cache of its own, because captured passes contain their exchanges.
        self.session.reset()
        session, own = StreamingSession(self.pipeline, timeline=self.timeline), self.session
        ranks.mute(True)
        try:
            self.session = session
            with self._frames_to_host():
                for _ in self._stream_with_switches(warmup + REHEARSED_BLOCKS, [warmup, warmup + 2]):
                    pass
            events, _ = self._record(switches[-1] + SWITCH_EVERY, switches)
        finally:
            ranks.mute(False)
            self.session = own
        return events

    def _record(self, blocks: int, switches: list[int]) -> tuple[list[Event], Samples]:
        """Return the events of a stream's first `blocks` blocks and the GPU's samples. If decoding overlaps
        the next block, the stream has one more block: nothing competes with the decoding of its last block,
        which is not a steady state.
        """
        gc.collect()
        self._start_over()
        with (self._frames_to_host(), self.timeline.garbage(),
              self._telemetry.recording(self.timeline.now_ms) as samples):
            for _ in self._stream_with_switches(blocks + self.config.overlaps_decoding, switches):
                pass
        events = self.timeline.resolve()
        return [event for event in events if event.block is None or event.block < blocks], samples

    def _energy(self, events: list[Event], samples: Samples) -> dict[str, Any]:
        """The `energy` section of one stream."""
        first = self.config.warmup_blocks
        counted = sum(block >= first for block in metrics.marks(events, metrics.CHUNK_READY))
        frames = counted * self.config.block_frames * VAE_TEMPORAL_STRIDE
        return samples.energy(*metrics.measured_ms(events, first), frames)

    @contextlib.contextmanager
    def _frames_to_host(self) -> Iterator[None]:
        """Deliver chunks in host memory, only for the measured streams: that memory is reused, and other
        users of the session may keep their chunks.
        """
        self.session.host_frames = True
        try:
            yield
        finally:
            self.session.host_frames = False

    def _start_over(self) -> None:
        self.session.reset()
        self.timeline.clear()

    def _stream_with_switches(self, blocks: int, switches: list[int]) -> Iterator[Chunk]:
        prompts, pending, last_shown = self._prompts, list(switches), time.perf_counter()
        for chunk in self.session.stream(prompts[0], blocks):
            yield chunk
            if pending and chunk.ends_block and self.session.next_block >= pending[0]:
                number = len(switches) - len(pending) + 1
                pending.pop(0)
                prompt = prompts[number % len(prompts)]
                if number % 2 == 0:
                    prompt = f"{prompt} (ablation {next(self._variations)})"
                self.session.switch_prompt(prompt)
            if time.perf_counter() - last_shown > PROGRESS_SECONDS:
                last_shown = time.perf_counter()
                print(f"block {chunk.block + 1} of {blocks}", flush=True)

    def _stats(self) -> list[dict[str, Any]]:
        reports = [optimization["report"] for optimization in self.pipeline.optimizations]
        return [report["stats"].summary() for report in reports if "stats" in report]

    def _built(self) -> dict[str, int]:
        """Numbers of CUDA graphs captured and regions compiled so far."""
        return {"captured": sum(stats.get("captured", 0) for stats in self._stats()),
                "compiled": compiled_graphs()}

    def _building_seconds(self) -> dict[str, float]:
        """Compilation and capture times so far, including other experiments of this process."""
        return {"compile": compile_seconds(),
                "capture": sum(stats.get("capture_s", 0.0) for stats in self._stats())}

    def _prompt_outcomes(self) -> list[str]:
        """The prompt cache's outcome of every request so far; empty without a cache."""
        encode = self.pipeline.encode_prompt
        return list(encode.stats.outcomes) if isinstance(encode, CachedPrompts) else []


def switch_blocks(config: ExperimentConfig) -> list[int]:
    """Blocks of the switch stream with a prompt switch: every second one after warm-up."""
    return [config.warmup_blocks + SWITCH_EVERY * i for i in range(config.num_switches)]
