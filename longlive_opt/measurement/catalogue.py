"""Every metric of a result, one row each: what it is called, what it means and where it is shown.

Decisions, noise, tables, summary.csv, the log, the conclusion card and the glossary read these rows. A new
metric needs its computation, one row here and its test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .metrics import CLOCK_THRESHOLD, P99_SAMPLES
from .result import is_na, lookup, number

PLACES = {
    "noise": "A/A noise in decisions.json, the noise table and the log",
    "record": "outputs/noise.json",
    "csv": "summary.csv",
    "summary": "the results table of a campaign",
    "headline": "the table after a notebook's measurement",
    "comparison": "the table of a run against the baseline",
    "card": "the conclusion card on top of a report",
    "ablation": "the table of an ablation",
    "fidelity": "the table of errors against the truth",
    "adherence": "the table of prompt adherence",
    "log": "the table in the details of a log entry",
}


@dataclass(frozen=True)
class Metric:
    """One number of a result.

    Args:
        key: its name in the code, in decisions.json and in noise.json.
        label: its name for readers.
        unit: the unit of the shown value; empty for a ratio or a count.
        path: dotted path in result.json.
        better: "lower", "higher", or empty if neither is.
        digits: decimals in a table.
        shown_in: names of `PLACES`, separated by spaces.
        definition: the measured interval or value, its clock and its stream.
        column: its name in summary.csv, by default the key.
        template: its name in the log's template; empty if the template does not use it.
        scale: the shown value is `scale` times the stored one.
        instead: the key of the metric that a table shows where no run has a value of this one.
        derived: makes the stored number of what lies at `path`, which is no number then.
    """

    key: str
    label: str
    unit: str
    path: str
    better: str
    digits: int
    shown_in: str
    definition: str
    column: str = ""
    template: str = ""
    scale: float = 1.0
    instead: str = ""
    derived: Callable[[Any], float | None] | None = None

    @property
    def heading(self) -> str:
        """`SS mean, ms per frame`"""
        return f"{self.label}, {self.unit}" if self.unit else self.label

    @property
    def csv_column(self) -> str:
        return self.column or self.key

    def value(self, result: Mapping[str, Any]) -> float | None:
        """The number in its unit; None if it is missing or n/a."""
        found = self.derived(lookup(result, self.path)) if self.derived else number(result, self.path)
        return None if found is None else found if self.scale == 1 else self.scale * found

    def text(self, value: float | None, sign: str = "") -> str:
        """`value` with the metric's decimals and without its unit, or n/a. `sign`: "+" for a difference."""
        return "n/a" if value is None else f"{value:{sign}.{self.digits}f}"

    def shown(self, result: Mapping[str, Any]) -> str:
        """The metric of `result` as text, or n/a."""
        return self.text(self.value(result))

    def with_unit(self, result: Mapping[str, Any]) -> str:
        """`25.2 ms per frame`, or n/a."""
        text = self.shown(result)
        return text if text == "n/a" or not self.unit else f"{text} {self.unit}"

    def change(self, ours: float | None, theirs: float | None) -> str:
        """Ours against theirs in percent, or the difference in decibels; empty if either is unknown."""
        if ours is None or theirs is None:
            return ""
        if self.unit == "dB":
            return f"{ours - theirs:+.{self.digits}f} dB"
        return f"{round(100 * (ours / theirs - 1), 1) + 0.0:+.1f}%" if theirs else ""  # + 0.0: no -0.0

    def is_recorded(self, result: Mapping[str, Any]) -> bool:
        """Whether the result records it, even as n/a."""
        section = lookup(result, self.path.rpartition(".")[0])
        return lookup(result, self.path) is not None or is_na(section)


_SS = ("Steady-state (SS) latency per video frame. One sample is one block: the time between the marks "
       "`chunk_ready` of two blocks in a row, divided by the video frames in a block. A block is ready when "
       "its frames are in page-locked host memory (in results without `frames_on`: complete on the GPU). "
       "Host clock, synchronised at the block edge. Stream without prompt switches, blocks after warm-up: "
       "the window is full and compilation is over. With asynchronous decoding the last block does not "
       "count, since no block competes with it.")
_JITTER = ("How far the 99th percentile of the steady-state latency lies above its median, in percent of the "
           f"median; with fewer than {P99_SAMPLES} samples, how far the maximum does, which is no less.")
_TARGET = ("Share of the steady-state blocks that took longer per video frame than the run's "
           "`target_ms_per_frame`.")
_STAGE = ("Mean time of the stage per steady-state block, summed over its spans: CUDA events on a GPU, else "
          "the host clock. With early decode, denoising contains the clean pass of the block before.")
_PS = ("Prompt-switch (PS) latency: from the mark `switch_request`, at a block's edge, to the mark "
       "`chunk_ready` of the first block under the new prompt or, with early frames, to `first_frames`, when "
       "the first of its frames are there. Host clock. Stream in which every second block is a switch.")
_PS_RANDOM = ("PS latency of a request at a random moment, which also waits for the end of the current "
              "block. Derived from the measured switches: each request is spread evenly over the block "
              "before it. Mean: PS plus half of that block. p95: of the mixture of all switches, exact.")
_PS_PART = ("Mean time of the stage in the switch blocks: CUDA events on a GPU, else the host clock. What no "
            "stage explains is `other`; it is negative where stages overlap.")
_FIRST = ("From the first event of the stream to the mark `chunk_ready` of its first block or, with early "
          "frames, to `first_frames`. Host clock. It contains compilation if nothing was warmed up before.")
_FPS = ("Video frames of the measured blocks divided by their wall-clock time, from `block_start` of the "
        "first (with asynchronous decoding, from the chunk before) to the last `chunk_ready`. Host clock, "
        "stream without switches: 1000 / SS mean but for rounding.")
_FPS_SWITCHES = "FPS, of the stream in which every second block is a prompt switch."
_ENERGY = ("Energy by the GPU's own counter (NVML) over the measured part of the steady stream, per video "
           "frame, and divided by wall-clock time for the mean power. The counter is read several times per "
           "second and taken to grow evenly in between. The whole GPU counts, idle power included; CPU, host "
           "memory and fans do not.")
_PEAK = ("Peak of the CUDA caching allocator in 1e9 bytes over the two measured streams, without loading and "
         "compiling: tensors (peak memory) or what is held from the driver (reserved memory).")
_RESIDENT = ("Of a run on the CPU: peak resident set size of the process in 1e9 bytes over the two measured "
             "streams: weights, tensors, code and all else that the process holds in the host's memory.")
_IN_USE = "All memory of the GPU that is taken at the end, in 1e9 bytes, other processes included."
_KV = "Bytes of the key and value caches, in 1e9 bytes."
_EXPOSED = ("Time of a stage on rank 0 that communication with the other ranks adds, waiting for them "
            "included: the stage's mean in the measured stream minus that in a stream in which nothing is "
            "sent. Per steady-state block; of the recache, per switch. CUDA events on a GPU, else the host "
            "clock. With vae_ranks: own, `decode` is the wait for the frames.")
_RANKS = "Number of GPUs (on a CPU: processes) that make one stream. Older results had one."
_PEAK_RANK = "As peak memory, of the rank with the most."
_BUFFER = ("Smallest delay after the first chunk with which playback never stalls. A viewer shows frame i at "
           "start + i / FPS. Derived from the `chunk_ready` marks of the steady stream; a stream that is "
           "slower than playback has none.")
_STALLS = "How often a viewer without a buffer waits, in the steady stream."
_MISSES = "Share of the chunks that come later than the chunk before them lasts on screen."
_RATIO = ("Error of the latents against the baseline in float32, divided by that of the baseline in its own "
          "dtype: 1 is as exact as bfloat16, less is closer to float32. The greater of the teacher-forced "
          "and the free-running ratio; with weights that magnify the baseline's rounding more than twofold, "
          "the teacher-forced one.")
_LATENT = ("Root mean square of the difference of the latents to those of the baseline in float32, divided "
           "by that of the latter, over a stream with one prompt switch.")
_FRAMES = "of the uint8 frames to the truth's, teacher-forced, mean over the frames (see Fidelity)."
_DECODER = ("Peak signal-to-noise ratio of a tiny VAE's frames to the Wan VAE's for the same latents, the "
            "truth's: the part of the frames' error that no error ratio contains.")
_CLIP = "Change of the CLIP score of frame and prompt against the baseline. n/a with random weights."
_SAMPLES = "How many steady-state blocks, and how many prompt switches, were measured."
_ADHERENCE = ("Read from the frames of the video by geometry, only for prompts of Moving Shapes: share of "
              "the attributes that are right before the first switch and from the second block after one on, "
              "blocks until the new scene is there, share of frames in which every object is there, and the "
              "change of "
              "adherence from the first to the last third of a long prompt.")



def _jitter(distribution: Any) -> float | None:
    found = {name: number({"of": distribution}, f"of.{name}") for name in ("p50", "p99", "max")}
    above = found["max"] if found["p99"] is None else found["p99"]
    return None if above is None or not found["p50"] else above / found["p50"] - 1


METRICS: tuple[Metric, ...] = (
    Metric("ss_mean", "SS mean", "ms per frame", "latency.ss_ms_per_frame.mean", "lower", 2,
           "noise record csv summary headline comparison card ablation", _SS, "ss_mean_ms", "SS Mean"),
    Metric("ss_p50", "SS p50", "ms per frame", "latency.ss_ms_per_frame.p50", "lower", 2,
           "noise csv headline log", _SS, "ss_p50_ms"),
    Metric("ss_p95", "SS p95", "ms per frame", "latency.ss_ms_per_frame.p95", "lower", 2,
           "csv headline log", _SS, "ss_p95_ms"),
    Metric("ss_p99", "SS p99", "ms per frame", "latency.ss_ms_per_frame.p99", "lower", 2, "csv headline",
           _SS, "ss_p99_ms", "SS P99"),
    Metric("ss_max", "SS max", "ms per frame", "latency.ss_ms_per_frame.max", "lower", 2,
           "noise record csv summary headline comparison card ablation", _SS, "ss_max_ms", "SS Max"),
    Metric("ss_jitter", "SS jitter", "% of p50", "latency.ss_ms_per_frame", "lower", 1, "csv headline log",
           _JITTER, "ss_jitter_percent", scale=100, derived=_jitter),
    Metric("ss_over_target", "SS blocks over the target", "%", "latency.ss_over_target.share", "lower", 1,
           "headline log", _TARGET, scale=100),
    Metric("stage_denoise", "denoise", "ms per block", "latency.stages_ms.denoise.mean", "lower", 1,
           "comparison ablation log", _STAGE),
    Metric("stage_decode", "decode", "ms per block", "latency.stages_ms.decode.mean", "lower", 1,
           "comparison ablation log", _STAGE),
    Metric("stage_copy", "copy_to_host", "ms per block", "latency.stages_ms.copy_to_host.mean", "lower", 2,
           "comparison log", _STAGE),
    Metric("ps_mean", "PS mean", "ms", "latency.ps_ms.mean", "lower", 1,
           "noise record csv summary headline comparison card ablation", _PS, "ps_mean_ms", "PS Mean"),
    Metric("ps_max", "PS max", "ms", "latency.ps_ms.max", "lower", 1, "csv headline comparison log", _PS,
           "ps_max_ms"),
    Metric("ps_random_mean", "PS mean at a random moment", "ms", "latency.ps_random_ms.mean", "lower", 1,
           "csv headline comparison log", _PS_RANDOM, "ps_random_mean_ms"),
    Metric("ps_random_p95", "PS p95 at a random moment", "ms", "latency.ps_random_ms.p95", "lower", 1,
           "csv headline log", _PS_RANDOM, "ps_random_p95_ms"),
    Metric("ps_text_encode", "text encoding at a switch", "ms", "latency.ps_breakdown_ms.text_encode",
           "lower", 1, "comparison log", _PS_PART),
    Metric("ps_recache", "recache at a switch", "ms", "latency.ps_breakdown_ms.recache", "lower", 1,
           "comparison log", _PS_PART),
    Metric("first_frame", "first frame", "ms", "latency.first_frame_ms", "lower", 1, "headline log", _FIRST),
    Metric("fps", "FPS", "", "fps", "higher", 1, "noise csv summary headline comparison card ablation", _FPS,
           template="FPS"),
    Metric("fps_with_switches", "FPS with prompt switches", "", "fps_with_switches", "higher", 1,
           "csv headline comparison log", _FPS_SWITCHES),
    Metric("joules_per_frame", "energy", "J per frame", "energy.joules_per_frame", "lower", 1,
           "csv summary comparison log", _ENERGY),
    Metric("mean_power", "mean power", "W", "energy.mean_power_w", "lower", 0, "csv log", _ENERGY,
           "mean_power_w"),
    Metric("peak_allocated", "peak memory", "GB", "memory_gb.peak_allocated", "lower", 2,
           "noise csv summary headline comparison card ablation", _PEAK, "peak_gb", "Memory",
           instead="peak_resident"),
    Metric("peak_resident", "peak resident memory", "GB", "memory_gb.peak_resident", "lower", 2, "csv log",
           _RESIDENT, "peak_resident_gb"),
    Metric("peak_reserved", "reserved memory", "GB", "memory_gb.peak_reserved", "lower", 2, "log", _PEAK),
    Metric("device_used", "memory in use on the GPU", "GB", "memory_gb.device_used", "lower", 2, "log",
           _IN_USE),
    Metric("kv_cache", "KV cache", "GB", "memory_gb.kv_cache", "lower", 2,
           "csv headline comparison ablation log", _KV, "kv_cache_gb"),
    Metric("gpus", "GPUs", "", "ranks.count", "", 0, "csv log", _RANKS),
    Metric("exposed_denoise", "exposed communication, denoise", "ms per block", "ranks.exposed_ms.denoise",
           "lower", 2, "csv log", _EXPOSED, "exposed_denoise_ms"),
    Metric("exposed_decode", "exposed communication, decode", "ms per block", "ranks.exposed_ms.decode",
           "lower", 2, "csv log", _EXPOSED, "exposed_decode_ms"),
    Metric("exposed_recache", "exposed communication, recache", "ms", "ranks.exposed_ms.recache", "lower", 2,
           "csv log", _EXPOSED, "exposed_recache_ms"),
    Metric("peak_rank", "peak memory of a rank", "GB", "ranks.peak_allocated_gb", "lower", 2, "csv log",
           _PEAK_RANK, "peak_rank_gb"),
    Metric("startup_buffer", "start-up buffer", "ms", "playback.startup_buffer_ms", "lower", 0,
           "csv summary", _BUFFER, "startup_buffer_ms"),
    Metric("stalls", "stalls without a buffer", "", "playback.stalls_at_zero_buffer", "lower", 0, "log",
           _STALLS),
    Metric("deadline_misses", "chunks too late for playback", "%", "playback.deadline_miss_share", "lower", 1,
           "log", _MISSES, scale=100),
    Metric("error_ratio", "error ratio", "", "quality.worst_ratio", "lower", 2, "csv summary card", _RATIO),
    Metric("error_ratio_free", "error ratio, free-running", "", "quality.free_running.error_ratio.all",
           "lower", 2, "comparison log", _RATIO),
    Metric("error_ratio_forced", "error ratio, teacher-forced", "", "quality.error_ratio.all", "lower", 2,
           "comparison ablation log", _RATIO),
    Metric("latent_error_free", "latent error, free-running", "%", "quality.free_running.latent_error.all",
           "lower", 2, "log", _LATENT, scale=100),
    Metric("latent_error_forced", "latent error, teacher-forced", "%", "quality.latent_error.all", "lower", 2,
           "log", _LATENT, scale=100),
    Metric("psnr", "PSNR", "dB", "quality.psnr_db.mean", "higher", 1,
           "csv summary comparison card ablation fidelity",
           f"Peak signal-to-noise ratio {_FRAMES}", "psnr_db", "PSNR"),
    Metric("psnr_decoder", "PSNR of the decoder alone", "dB", "quality.decoder.psnr_db.mean", "higher", 1,
           "comparison log", _DECODER),
    Metric("ssim", "SSIM", "", "quality.ssim.mean", "higher", 4, "csv comparison fidelity",
           f"Structural similarity {_FRAMES}", template="SSIM"),
    Metric("ms_ssim", "MS-SSIM", "", "quality.ms_ssim.mean", "higher", 4, "fidelity log",
           f"Structural similarity over several scales {_FRAMES}"),
    Metric("lpips", "LPIPS", "", "quality.lpips.mean", "lower", 4, "csv fidelity",
           f"Learned perceptual distance (AlexNet) {_FRAMES}", template="LPIPS"),
    Metric("clip_delta", "CLIP delta", "", "quality.clip_delta.mean", "higher", 4, "csv fidelity", _CLIP,
           template="CLIP Delta"),
    Metric("st_lpips", "ST-LPIPS", "", "quality.st_lpips.mean", "lower", 4, "csv fidelity log",
           f"Learned perceptual distance, tolerant of small shifts, {_FRAMES}"),
    Metric("blocks", "blocks", "", "sizes.blocks_measured", "", 0, "csv summary", _SAMPLES),
    Metric("switches", "switches", "", "sizes.switches", "", 0, "csv", _SAMPLES),
    Metric("adherence_before", "adherence before", "", "adherence.adherence_before", "higher", 3,
           "csv adherence",
           _ADHERENCE),
    Metric("adherence_after", "adherence after", "", "adherence.adherence_after", "higher", 3,
           "csv adherence",
           _ADHERENCE),
    Metric("adherence_delay", "switch delay", "blocks", "adherence.delay_blocks", "lower", 1, "csv adherence",
           _ADHERENCE,
           "adherence_delay_blocks"),
    Metric("adherence_never", "switches that never came", "", "adherence.never", "lower", 0, "csv",
           _ADHERENCE),
    Metric("adherence_permanence", "permanence", "", "adherence.permanence", "higher", 3, "csv adherence",
           _ADHERENCE),
    Metric("adherence_drift", "drift of adherence", "", "adherence.drift.change", "higher", 3, "csv",
           _ADHERENCE),
)

TERMS = {
    "Percentile":
        "Linear between order statistics (numpy's default). p99 is given from "
        f"{P99_SAMPLES} samples up; below, the maximum takes its place.",
    "Clocks":
        "The headline is what a viewer feels: the host clock (perf_counter), synchronised at block edges, "
        "when a block's frames are in host memory. Encoding, network and display are not in it. CUDA events "
        "give the stages. Where their sum differs from the block interval by more than "
        f"{CLOCK_THRESHOLD:.0%}, the report says so. A stage's span contains the gaps between its kernels: "
        "clocks that agree say that no time is lost outside the stages, not that the GPU is always busy.",
    "Noise":
        "A/A noise of one preset, run several times in processes of their own in one campaign: (largest - "
        "smallest) / mean of the runs, each over equally many blocks and switches.",
    "Comparison":
        "Changes, noise and decisions compare two runs over equally many steady-state blocks and prompt "
        "switches, the first of each: a stream drifts while the GPU gets warm, and the maximum of more "
        "samples is larger. Memory is that of the whole runs.",
    "Fidelity":
        "Closeness to the truth, not beauty: the baseline in float32 with the same weights, noise and "
        "prompts, over a stream with a prompt switch after the window is full. Teacher-forced: each block "
        "starts from the truth's past, so errors do not add up over blocks. Free-running: the preset's own "
        "past, where they do. Null rows give the scale: the baseline's stream with something taken away "
        "(sink, a quarter of the window, the recache, the switch) or with another seed. A preset's gate "
        "limits its error ratio and must lie below the mildest null row. Results from before "
        "protocol 2 compare with the baseline's own frames, one block at a time.",
    "Set-up":
        "Load, compile and capture seconds, each apart, never part of a latency.",
    "Readings of the GPU":
        "Clock, power and temperature are single readings; NVML's power is an average over up to a second.",
}
"""Terms that are not metrics but need a definition."""


def shown_in(place: str) -> list[Metric]:
    """The metrics of one of `PLACES`, in the catalogue's order."""
    return [metric for metric in METRICS if place in metric.shown_in.split()]


def shown_for(place: str, *results: Mapping[str, Any]) -> list[Metric]:
    """`shown_in` for a table of these results, each metric replaced by its `instead` where only that has
    values.
    """
    return [recorded(metric, *results) for metric in shown_in(place)]


def recorded(metric: Metric, *results: Mapping[str, Any]) -> Metric:
    """The metric, or its `instead` if some of the results has a value of that and none of the metric."""
    def has_values(of: Metric) -> bool:
        return any(of.value(result) is not None for result in results)

    if metric.instead and not has_values(metric) and has_values(other := metric_of(metric.instead)):
        return other
    return metric


def metric_of(key: str) -> Metric:
    """The metric of this key; KeyError if there is none."""
    for metric in METRICS:
        if metric.key == key:
            return metric
    raise KeyError(key)


def of_template(label: str) -> Metric | None:
    """The metric that the log's template calls `label`; None if there is none."""
    return next((metric for metric in METRICS if metric.template and metric.template == label), None)


def glossary(metrics: Iterable[Metric] | None = None) -> dict[str, str]:
    """Name -> definition, metrics of one definition under one name, then the terms."""
    names: dict[str, list[str]] = {}
    for metric in METRICS if metrics is None else metrics:
        names.setdefault(metric.definition, []).append(metric.label)
    return {"; ".join(labels): text for text, labels in names.items()} | TERMS
