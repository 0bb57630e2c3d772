"""How exact a preset is: protocol 2, errors against the baseline in float32.

The truth is the reference pipeline in float32 with the weights of the campaign's baseline and TF32 off. All
runs get the baseline's noise and the prompt embeddings of its text encoder; for the truth, both are widened.
The stream has `fidelity_blocks` blocks and one prompt switch at a block with a full window, so a ring cache
has turned and a recache may skip frames (`FidelitySchedule`).

Each run processes the stream twice:

- *free-running*: each block starts from the run's own past, as for a viewer. Errors may accumulate.
- *teacher-forced*: each block starts from the truth's past. The run fills its cache with the truth's clean
  latents and decodes with a history of the truth's latents. Errors do not accumulate across blocks.

An error is the root mean square of the difference of the latents, divided by that of the truth's latents. The
*error ratio* divides it by the baseline's own error in its own dtype: 1 is as exact as bfloat16. PSNR (peak
signal-to-noise ratio) and related metrics compare the uint8 frames with the truth's, teacher-forced unless
called free-running.

The greater of the two ratios over all blocks decides about a preset. Some weights magnify their own rounding:
the baseline's free-running error is more than twice its teacher-forced one. Then chance decides how far a
stream drifts, so only the teacher-forced ratio counts, for presets and null rows alike.

The *null rows* show what a ratio is worth. They are streams of the baseline with something removed (no sink,
a smaller window, no recache or no switch), and one with the noise of another seed. A gate must be below the
mildest of them (`decision`).

A preset with a tiny VAE, or with the Wan VAE in 8 bit, makes other frames from the same latents. Errors of
latents are measured as ever; errors of frames then contain the difference of the decoders. `decoder` in the
result names both and has the errors of the decoder alone: the run's decoder on the truth's latents against
the truth's frames.

The campaign's first baseline run makes the truth, its own rows and the null rows once, and stores the data
that other presets need in `reference.safetensors`. All of this happens after the measurement.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..config import ExperimentConfig
from ..errors import UserError
from ..files import parse_json
from ..models.attention import make_attention
from ..models.checkpoint import save_tensors
from ..models.dit import TextContext
from ..models.specs import WAN_VAE
from ..models.vae import StreamingDecoder, frames_to_uint8
from ..prompts import PromptSchedule
from ..streaming.kv_cache import KVCache, RollingKVCache
from ..streaming.pipeline import Pipeline, cache_geometry, float32_twin
from ..streaming.sampler import Sampler, StreamNoise
from ..streaming.session import StreamingSession, whole_blocks
from . import quality
from .result import is_na, na, plain_json

PROTOCOL = 2
REFERENCE_NAME = "the baseline in float32"
FREE_METRICS = ("psnr_db", "ssim", "lpips")
OTHER_PROMPT = "Detection at night and from far away: "
_TENSORS = ("latents", "frames", "frames_per_block", "video")
MAGNIFIED = 2.0
"""Free-running ratios count only up to this ratio of the baseline's free-running error to its teacher-forced
one.
"""
_NOTHING = "the baseline has no error: it runs in float32, like the truth"

Noise = Iterator[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class FidelitySchedule:
    """The stream of the protocol: its prompts, its blocks, and the block at which the second prompt takes
    over (None if the stream is too short for a switch with a full window).
    """

    prompts: tuple[str, str]
    blocks: int
    switch_block: int | None

    @classmethod
    def of(cls, config: ExperimentConfig, schedule: PromptSchedule) -> FidelitySchedule:
        """Use the first two prompts of the preset's video; for a single prompt, the second is `OTHER_PROMPT`
        followed by it. The switch is halfway, but at least one block after the window is full.
        """
        shown = schedule.prompts[1:] if schedule.switch_frames[:1] == (0,) else schedule.prompts
        prompts = (shown[0], shown[1] if len(shown) > 1 else OTHER_PROMPT + shown[0])
        switch = max(config.window_blocks + 1, config.fidelity_blocks // 2)
        return cls(prompts, config.fidelity_blocks, switch if switch < config.fidelity_blocks else None)

    def played(self, block_frames: int) -> PromptSchedule:
        """Convert to the schedule that a session plays."""
        if self.switch_block is None:
            return PromptSchedule(self.prompts[:1])
        return PromptSchedule(self.prompts, (self.switch_block * block_frames,))

    def frame_prompts(self, frames_per_block: Sequence[int]) -> list[str]:
        """Return the prompt of every frame."""
        switch = self.blocks if self.switch_block is None else self.switch_block
        return [self.prompts[block >= switch] for block, count in enumerate(frames_per_block)
                for _ in range(count)]

    def to_dict(self) -> dict[str, Any]:
        return {"prompts": list(self.prompts), "blocks": self.blocks, "switch_block": self.switch_block}


@dataclass(frozen=True)
class Stream:
    """A run's output for the schedule, on the CPU: `latents` [blocks, B, F, C, h, w] in its dtype, `frames`
    uint8 [T, 3, H, W], and the number of frames in each block.
    """

    latents: Tensor
    frames: Tensor
    frames_per_block: tuple[int, ...]


@dataclass(frozen=True)
class Truth:
    """The data that the campaign's baseline run stores for the other runs: the truth's float32 `latents`
    [blocks, B, F, C, h, w], its uint8 `frames` [T, 3, H, W] with the number per block, and the baseline's own
    `video` [T, 3, H, W] for viewing.

    `facts` describes what it is the truth of (`made_of`). It also has the `prompt_schedule`, the rows
    `baseline` and `nulls`, and digests of the baseline's own streams.
    """

    latents: Tensor
    frames: Tensor
    frames_per_block: Tensor
    video: Tensor
    facts: Mapping[str, Any]

    @property
    def schedule(self) -> FidelitySchedule:
        schedule = self.facts["prompt_schedule"]
        return FidelitySchedule(tuple(schedule["prompts"]), schedule["blocks"], schedule["switch_block"])

    def save(self, path: Path) -> None:
        save_tensors(path, {name: getattr(self, name) for name in _TENSORS},
                     {"facts": json.dumps(self.facts)})

    @classmethod
    def load(cls, path: Path) -> Truth | None:
        """Return None if the file has no truth of this protocol.

        Raises:
            UserError: the file is damaged.
        """
        try:
            with safe_open(path, "pt") as file:
                facts = parse_json((file.metadata() or {}).get("facts", "{}"), f"{path}, facts",
                                   "run the baseline again")
                if not isinstance(facts, dict) or not set(_TENSORS) <= set(file.keys()):
                    return None
                if "script" in facts:  # of a campaign with results of schema version 1
                    facts["prompt_schedule"] = facts.pop("script")
                if facts.get("protocol") != PROTOCOL:
                    return None
                truth = cls(**{name: file.get_tensor(name) for name in _TENSORS}, facts=facts)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: cannot be read ({error}); run the baseline again.") from error
        truth.check(path)
        return truth

    def check(self, path: Path) -> None:
        """Refuse what `measure` could not compare with.

        Raises:
            UserError: naming `path`.
        """
        try:
            blocks, counts = self.schedule.blocks, self.frames_per_block
            whole = (all(isinstance(self.facts[name], dict) for name in ("made_of", "baseline", "digests"))
                     and len(self.schedule.prompts) > 0 and type(blocks) is int and counts.shape == (blocks,)
                     and not counts.is_floating_point() and self.latents.shape[:1] == (blocks,)
                     and self.latents.ndim == 6 and bool(self.latents.isfinite().all())
                     and int(counts.sum()) == len(self.frames) and self.frames.ndim == 4
                     and self.frames.shape[1:] == self.video.shape[1:]
                     and self.frames.dtype == self.video.dtype == torch.uint8)
        except (LookupError, TypeError, ValueError, RuntimeError):
            whole = False
        if not whole:
            raise UserError(f"{path}: its tensors do not fit together or its facts are damaged; run the "
                            "baseline again.")


@dataclass(frozen=True)
class Null:
    """The baseline's stream with something removed; `first` is the first block that this can change."""

    name: str
    title: str
    first: int
    keys: Mapping[str, Any]
    recache: bool = True
    switch: bool = True
    forced: bool = True


def nulls_of(config: ExperimentConfig, schedule: FidelitySchedule) -> tuple[list[Null], list[dict[str, Any]]]:
    """Return the null rows that a baseline of this config can have, and rows that explain missing ones."""
    window, sink, block = config.local_attn_size, config.sink_size, config.block_frames
    switch = schedule.switch_block
    found = [Null("other_seed", "another seed", 0, {"seed": config.seed ^ 1}, forced=False)]
    absent = []

    def add(null: Null, reason: str) -> None:
        if reason:
            absent.append({"name": null.name, "title": null.title, "latent_error": na(
                reason, "run more fidelity_blocks, or with LongLive's window and sink")})
        else:
            found.append(null)

    # Without a sink, the first block that drops a frame drops a different one. A sink larger than a block is
    # attended even while it is empty.
    rolls = window // block if sink <= block else 0
    short = "the stream ends before the window is full" if window // block >= schedule.blocks else ""
    add(Null("no_sink", "no sink", rolls, {"sink_size": 0}), "" if sink and not short else
        short or "the baseline has no sink")
    smaller = window - block
    add(Null("smaller_window", f"window {smaller}", smaller // block, {"local_attn_size": smaller}),
        short or ("" if smaller >= sink + block else "its window is the smallest there is"))
    none = "" if switch is not None else "the stream is too short for a switch with a full window"
    add(Null("no_recache", "no recache at the switch", switch or 0, {}, recache=False), none)
    add(Null("no_switch", "no switch", switch or 0, {}, switch=False), none)
    return found, absent


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Use float32 arithmetic without TF32 in matrix products and convolutions."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


@torch.no_grad()
def make_truth(pipeline: Pipeline, schedule: FidelitySchedule) -> Stream:
    """Make the stream of the baseline `pipeline`'s float32 twin, which is built and released here."""
    twin = float32_twin(pipeline)
    try:
        with full_float32():
            noise = ((noise.float(), steps.float()) for noise, steps in _noise(pipeline))
            decoder = twin.make_vae_decoder()
            return _stream(twin, twin.sampler, twin.make_cache(), schedule, noise, decoder)
    finally:
        del twin
        release(pipeline.device)


def establish(pipeline: Pipeline, schedule: FidelitySchedule, shown: Tensor) -> tuple[Truth, dict[str, Any]]:
    """Make a campaign's truth from its baseline, and measure the baseline itself and the null rows.

    Args:
        shown: the baseline's video, uint8 [T, 3, H, W], stored for viewing.

    Returns:
        The truth, and the `quality` section of the baseline, with `nulls`.
    """
    made = make_truth(pipeline, schedule)
    truth = Truth(made.latents, made.frames, torch.tensor(made.frames_per_block), shown,
                  {"protocol": PROTOCOL, "prompt_schedule": schedule.to_dict(),
                   "made_of": _made_of(pipeline)})
    forks = sorted({null.first for null in nulls_of(pipeline.config, schedule)[0]})
    decoders: dict[int, StreamingDecoder] = {}
    decoder = pipeline.make_vae_decoder()

    def fork(block: int) -> None:
        if block in forks:
            decoders[block] = pipeline.make_vae_decoder()
            decoders[block].continue_from(decoder)

    free = _stream(pipeline, pipeline.sampler, pipeline.make_cache(), schedule, _noise(pipeline), decoder,
                   fork)
    forced = _forced(pipeline, pipeline.make_cache(), truth)
    own = {"forced": latent_errors(forced.latents, truth.latents),
           "free_running": latent_errors(free.latents, truth.latents)}
    truth = replace(truth, facts=plain_json(
        {**truth.facts, "baseline": own, "digests": {"forced": _digest(forced.latents),
                                                     "free_running": _digest(free.latents, free.frames)}}))
    section = _section(pipeline, truth, free, forced)
    section["identical"] = section["free_running"]["identical"] = None  # other runs are compared with it
    section["nulls"] = _null_rows(pipeline, truth, free, decoders)
    decoders.clear()
    release(pipeline.device)
    return replace(truth, facts=plain_json({**truth.facts, "nulls": section["nulls"]})), section


@torch.no_grad()
def measure(pipeline: Pipeline, session: StreamingSession, schedule: FidelitySchedule,
            truth: Truth) -> dict[str, Any]:
    """Return the `quality` section of a run against the campaign's truth; n/a as a whole if the truth belongs
    to different settings.
    """
    if different := _difference(pipeline, schedule, truth):
        return quality.not_compared(f"the campaign's baseline has {different}",
                                    "run both with the same, in one campaign", pipeline.weights["kind"])
    session.reset()
    played = whole_blocks(session.play(schedule.played(pipeline.config.block_frames), schedule.blocks))
    latents, frames = zip(*((chunk.latents.cpu(), chunk.frames[0].cpu()) for chunk in played))
    free = Stream(torch.stack(latents), torch.cat(frames), tuple(map(len, frames)))
    session.reset()
    forced = _forced(pipeline, session.cache, truth)
    session.reset()
    section = _section(pipeline, truth, free, forced) | _decoder_alone(pipeline, truth)
    release(pipeline.device)
    return section


def ablation_fidelity(pipeline: Pipeline, session: StreamingSession, schedule: FidelitySchedule,
                       truth: Truth | None) -> dict[str, Any]:
    """Return the teacher-forced error, its ratio and the PSNR of an ablation, whose window may differ from
    the truth's; n/a if the campaign has no truth, or if the noise is drawn in other steps.
    """
    if truth is None:
        return {"psnr_db": na("the campaign has no truth to compare with", "run the baseline first")}
    if len(pipeline.config.denoising_steps) != len(truth.facts["made_of"]["denoising_steps"]):
        return {"psnr_db": na("another number of denoising steps draws other noise", "look at the videos")}
    if different := _difference(pipeline, truth.schedule, truth):
        return {"psnr_db": na(f"the campaign's baseline has {different}", "run both with the same")}
    session.reset()
    forced = _forced(pipeline, session.cache, truth)
    session.reset()
    release(pipeline.device)
    section = _frames_section(pipeline, truth, forced, ("psnr_db",))
    return section | {"identical": _digest(forced.latents) == truth.facts["digests"]["forced"]}


def latent_errors(made: Tensor, truth: Tensor) -> dict[str, Any]:
    """{all, last, worst, worst_block, by_block}: the relative root mean square error of latents [blocks, ...]
    over the whole stream and by block; n/a if one is not finite.
    """
    wide, true = made.double().flatten(1), truth.double().flatten(1)
    difference, size = (wide - true).square().sum(1), true.square().sum(1)
    by_block = (difference / size).sqrt().tolist()
    if not all(map(math.isfinite, by_block)):
        block = next(block for block, error in enumerate(by_block) if not math.isfinite(error))
        return na(f"the latents of block {block} are not finite", "a kernel is broken: run the tests")
    return _over_blocks((difference.sum() / size.sum()).sqrt().item(), by_block)


def error_ratios(error: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """`latent_errors` divided by the baseline's `own`: {all, last, worst, worst_block, by_block}, where worst
    is the greatest ratio of a block; n/a without anything to divide.
    """
    if is_na(error):
        return dict(error)
    if not all(own["by_block"]):
        return na(_NOTHING, "run the baseline with model_dtype: bfloat16")
    by_block = [ours / theirs for ours, theirs in zip(error["by_block"], own["by_block"], strict=True)]
    return _over_blocks(error["all"] / own["all"], by_block)


def _over_blocks(whole: float, by_block: list[float]) -> dict[str, Any]:
    return {"all": whole, "last": by_block[-1], "worst": max(by_block),
            "worst_block": by_block.index(max(by_block)), "by_block": by_block}


def release(device: torch.device) -> None:
    """Return unused memory to the driver."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _noise(pipeline: Pipeline, seed: int | None = None) -> Noise:
    """The noise of consecutive blocks, as a run of this dtype draws it."""
    source = StreamNoise(pipeline.sampler.plan, pipeline.latent_shape,
                         pipeline.config.seed if seed is None else seed, pipeline.device, pipeline.dtype)
    while True:
        yield source.next_block()


def _passes(pipeline: Pipeline, sampler: Sampler, cache: KVCache, schedule: FidelitySchedule, noise: Noise,
            past: Sequence[Tensor], first: int, null: Null | None = None,
            forced: bool = False) -> Iterator[Tensor]:
    """Yield the latents of consecutive blocks from `first` on.

    `past`: clean latents of the blocks before `first`, which fill the cache. With `forced`, `past` has the
    latents of all blocks, and each one replaces the block that was made.
    """
    plan, latents = sampler.plan, list(past[:first])
    text: TextContext = pipeline.encode_prompt(schedule.prompts[0])
    for block in range(schedule.blocks):
        start = block * plan.block_frames
        drawn = next(noise)
        if block == schedule.switch_block and (null is None or null.switch):
            text = pipeline.encode_prompt(schedule.prompts[1])
            if null is None or null.recache:
                window = torch.cat(latents[-plan.window:], dim=1)[:, -plan.window:]
                sampler.recache(cache, text, start, window)
        if block < first:
            sampler.clean_pass(cache, text, start, latents[block])
            continue
        made = sampler.denoise(cache, text, start, *drawn)[-1]
        latents.append(past[block] if forced else made)
        sampler.clean_pass(cache, text, start, latents[-1])
        yield made


@torch.no_grad()
def _stream(pipeline: Pipeline, sampler: Sampler, cache: KVCache, schedule: FidelitySchedule, noise: Noise,
            decoder: StreamingDecoder, before: Any = lambda block: None, past: Sequence[Tensor] = (),
            null: Null | None = None) -> Stream:
    """Run freely from block `len(past)` on; `decoder` has already decoded the blocks before. `before` is
    called with each block before it is decoded.
    """
    latents, frames = [], []
    for block, made in enumerate(_passes(pipeline, sampler, cache, schedule, noise, past, len(past), null),
                                 len(past)):
        before(block)
        latents.append(made.cpu())
        frames.append(_decoded(decoder, made))
    return Stream(torch.stack(latents), torch.cat(frames), tuple(map(len, frames)))


@torch.no_grad()
def _forced(pipeline: Pipeline, cache: KVCache, truth: Truth) -> Stream:
    """Run every block from the truth's past, with the pipeline's own sampler, cache and decoders."""
    true = list(truth.latents.to(pipeline.device, pipeline.dtype))
    history, decoder = pipeline.make_vae_decoder(), pipeline.make_vae_decoder()
    latents, frames = [], []
    for block, made in enumerate(_passes(pipeline, pipeline.sampler, cache, truth.schedule, _noise(pipeline),
                                         true, 0, forced=True)):
        decoder.continue_from(history)
        frames.append(_decoded(decoder, made))
        latents.append(made.cpu())
        if block + 1 < len(true):
            history.push(true[block])
    return Stream(torch.stack(latents), torch.cat(frames), tuple(map(len, frames)))


def _decoded(decoder: StreamingDecoder, latents: Tensor) -> Tensor:
    """Decode one block of latents to uint8 [T, 3, H, W] on the CPU."""
    return torch.cat([frames_to_uint8(part[0]) for part in decoder.push(latents)]).cpu()


def _null_rows(pipeline: Pipeline, truth: Truth, free: Stream,
               decoders: Mapping[int, StreamingDecoder]) -> list[dict[str, Any]]:
    """Return one row per null. It equals the baseline before its first block, so only the rest runs."""
    schedule, own = truth.schedule, truth.facts["baseline"]
    nulls, absent = nulls_of(pipeline.config, schedule)
    return [_null_row(pipeline, truth, free, decoders, null, own) for null in nulls] + absent


@torch.no_grad()
def _null_row(pipeline: Pipeline, truth: Truth, free: Stream, decoders: Mapping[int, StreamingDecoder],
              null: Null, own: Mapping[str, Any]) -> dict[str, Any]:
    config = replace(pipeline.config, **null.keys)
    plan = replace(pipeline.sampler.plan, window=config.local_attn_size, sink=config.sink_size)
    sampler, geometry = replace(pipeline.sampler, plan=plan), cache_geometry(config, pipeline.model)
    attention = make_attention(pipeline.attention_backend)
    first, schedule = null.first, truth.schedule
    cache = RollingKVCache(geometry, attention, 1, pipeline.device, pipeline.dtype)
    decoder = pipeline.make_vae_decoder()
    decoder.continue_from(decoders[first])
    before = [latents.to(pipeline.device) for latents in free.latents[:first]]
    made = _stream(pipeline, sampler, cache, schedule, _noise(pipeline, config.seed), decoder, past=before,
                   null=null)
    kept = sum(free.frames_per_block[:first])
    whole = Stream(torch.cat([free.latents[:first], made.latents]),
                   torch.cat([free.frames[:kept], made.frames]), free.frames_per_block)
    row: dict[str, Any] = {"name": null.name, "title": null.title, "first_block": first}
    running = _frames_section(pipeline, truth, whole, FREE_METRICS, "free_running")
    row["free_running"] = {key: running[key] for key in (*FREE_METRICS, "psnr_by_block", "latent_error",
                                                         "error_ratio")}
    if null.forced:
        cache.reset()
        true = list(truth.latents.to(pipeline.device, pipeline.dtype))
        changed = torch.stack([latents.cpu() for latents in _passes(
            pipeline, sampler, cache, schedule, _noise(pipeline), true, first, null, forced=True)])
        error = latent_errors(changed, truth.latents[first:])
        row["latent_error"] = error if is_na(error) else _joined(
            [*own["forced"]["by_block"][:first], *error["by_block"]], truth.latents)
        row["error_ratio"] = error_ratios(row["latent_error"], own["forced"])
    else:
        row["latent_error"] = row["error_ratio"] = na(
            "every block is another sample: its past does not matter", "read the free-running metrics")
    row["worst_ratio"] = _worst(own, row["error_ratio"], row["free_running"]["error_ratio"])
    return row


def _joined(by_block: list[float], truth: Tensor) -> dict[str, Any]:
    """`latent_errors` from the errors of the blocks."""
    sizes = truth.double().flatten(1).square().sum(1).tolist()
    whole = math.fsum(error**2 * size for error, size in zip(by_block, sizes, strict=True)) / math.fsum(sizes)
    return _over_blocks(math.sqrt(whole), by_block)


def _section(pipeline: Pipeline, truth: Truth, free: Stream, forced: Stream) -> dict[str, Any]:
    """Return the `quality` section of a run: teacher-forced, with `free_running` inside."""
    section = _frames_section(pipeline, truth, forced, quality.METRICS)
    running = _frames_section(pipeline, truth, free, FREE_METRICS, "free_running")
    digests = truth.facts["digests"]
    same = _digest(free.latents, free.frames) == digests["free_running"]
    running["identical"] = same
    own = truth.facts["baseline"]
    return section | {"identical": same, "protocol": PROTOCOL, "prompt_schedule": truth.schedule.to_dict(),
                      "free_running": running, "free_running_counts": not _magnified(own),
                      "worst_ratio": _worst(own, section["error_ratio"], running["error_ratio"])}


def _frames_section(pipeline: Pipeline, truth: Truth, made: Stream, metrics: Sequence[str],
                    kind: str = "forced") -> dict[str, Any]:
    """Compare a stream's frames with the truth's by `quality.compare`, and add the errors of its latents."""
    counts = truth.frames_per_block.tolist()
    section = quality.compare(truth.frames, made.frames, weights_kind=pipeline.weights["kind"],
                              reference_name=REFERENCE_NAME, prompts=truth.schedule.frame_prompts(counts),
                              metrics=metrics, device=pipeline.device)
    error = latent_errors(made.latents, truth.latents)
    if is_na(error):
        section["flags"].append(error["reason"])
    return section | {"latent_error": error,
                      "error_ratio": error_ratios(error, truth.facts["baseline"][kind]),
                      "psnr_by_block": _by_block(section["psnr_db"]["per_frame"], counts)}


@torch.no_grad()
def _decoder_alone(pipeline: Pipeline, truth: Truth) -> dict[str, Any]:
    """The entry `decoder` of a run whose decoder is not the truth's; empty for every other run."""
    decoder, own = pipeline.make_vae_decoder(), pipeline.config.other_decoder
    if not own:
        return {}
    frames = torch.cat([_decoded(decoder, latents)
                        for latents in truth.latents.to(pipeline.device, pipeline.dtype)])
    section = quality.compare(truth.frames, frames, weights_kind=pipeline.weights["kind"],
                              reference_name=WAN_VAE, metrics=FREE_METRICS, device=pipeline.device)
    return {"decoder": {"name": own, **{key: section[key] for key in ("reference", *FREE_METRICS)}}}


def _by_block(per_frame: Sequence[float | None], counts: Sequence[int]) -> list[float | None]:
    """Return the mean over each block's frames; None if all equal the truth's."""
    means, start = [], 0
    for count in counts:
        values = [value for value in per_frame[start:start + count] if value is not None]
        means.append(math.fsum(values) / len(values) if values else None)
        start += count
    return means


def _magnified(own: Mapping[str, Any]) -> bool:
    """Whether the baseline's `own` rounding errors grow on its own past."""
    return own["free_running"]["all"] > MAGNIFIED * own["forced"]["all"]


def _worst(own: Mapping[str, Any], forced: Mapping[str, Any], free: Mapping[str, Any]) -> Any:
    """Return the greater of the two ratios over all blocks, or the teacher-forced one if free-running ratios
    do not count; n/a if it is unknown.
    """
    counted = [forced] if _magnified(own) and not is_na(forced) else [forced, free]
    known = [ratio["all"] for ratio in counted if not is_na(ratio)]
    return max(known) if known else dict(forced)


def _made_of(pipeline: Pipeline) -> dict[str, Any]:
    """Everything that a truth depends on, by the names of the config."""
    config, weights = pipeline.config, pipeline.weights
    found = {key: getattr(config, key) for key in ("seed", "denoising_steps", "timestep_shift",
                                                   "context_noise", "block_frames")}
    return plain_json(found | {"model": pipeline.model.name, "latents": pipeline.latent_shape,
                               "weights": weights["sha256"] or f"random, seed {weights['seed']}",
                               "lora_alpha": config.lora_alpha if weights["sha256"] else None,
                               "device": pipeline.device.type})


def _difference(pipeline: Pipeline, schedule: FidelitySchedule, truth: Truth) -> str:
    """Describe the first setting in which the truth differs from this run; empty if there is none."""
    ours = _made_of(pipeline) | schedule.to_dict()
    theirs = {**truth.facts["made_of"], **truth.facts["prompt_schedule"]}
    return next((f"{key} {theirs[key]!r} and this run {ours[key]!r}"
                 for key in ours if ours[key] != theirs[key]), "")


def _digest(*tensors: Tensor) -> str:
    """SHA-256 of the tensors' bytes."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()
