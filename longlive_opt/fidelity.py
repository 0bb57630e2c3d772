"""How far a preset's frames are from the baseline's, when both start from the same past."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Mapping, Sequence

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import quality, video
from .errors import UserError
from .figures import Chart
from .inputs import Script
from .models.vae import frames_to_uint8
from .noise import StreamNoise
from .pipeline import Pipeline
from .results import atomic_path, na
from .session import Chunk, StreamingSession

FIELDS = ("latents", "frames", "frames_per_block", "segments")


@dataclass(frozen=True)
class Reference:
    """A baseline's video: `latents` [blocks, B, F, C, h, w], `frames` uint8 [T, 3, H, W], and per block its
    number of frames and the number of prompt switches up to it.
    """

    latents: Tensor
    frames: Tensor
    frames_per_block: Tensor
    segments: Tensor

    @classmethod
    def of(cls, chunks: Sequence[Chunk]) -> Reference:
        """The reference that these chunks (on the CPU) make; the first segment is 0."""
        switched = torch.tensor([chunk.switched for chunk in chunks])
        return cls(torch.stack([chunk.latents for chunk in chunks]),
                   torch.cat([chunk.frames[0] for chunk in chunks]),
                   torch.tensor([chunk.frames.shape[1] for chunk in chunks]), switched.cumsum(0))

    def save(self, path: Path) -> None:
        with atomic_path(path) as temporary:
            save_file({name: getattr(self, name).contiguous() for name in FIELDS}, temporary)

    @classmethod
    def load(cls, path: Path) -> Reference:
        stored = load_file(path)
        return cls(**{name: stored[name] for name in FIELDS})

    def frame_prompts(self, prompts: Sequence[str]) -> list[str]:
        """The prompt of every frame."""
        return [
            prompts[segment]
            for segment, count in zip(self.segments.tolist(), self.frames_per_block.tolist())
            for _ in range(count)
        ]


@torch.no_grad()
def compare_blocks(pipeline: Pipeline, session: StreamingSession, script: Script, reference: Reference,
                   weights_kind: str, metrics: Sequence[str] = quality.METRICS) -> dict[str, Any]:
    """The `quality` section by the one-block protocol, with these `metrics`.

    For every block: the preset denoises it with the baseline's noise from a cache that it filled with the
    baseline's clean latents, and decodes it with a history of the baseline's latents. Then the baseline's
    block takes its place. Errors of one block are seen alone; they cannot add up over blocks.
    """
    check_sizes(pipeline, reference)
    session.reset()
    sampler, cache, plan = pipeline.sampler, session.cache, pipeline.sampler.plan
    noise_source = StreamNoise(
        plan, pipeline.latent_shape, pipeline.config.seed, pipeline.device, pipeline.dtype
    )
    history_decoder, block_decoder = pipeline.make_vae_decoder(), pipeline.make_vae_decoder()
    latents = reference.latents.to(pipeline.device, pipeline.dtype)
    prompts = script.prompts[1:] if script.switch_frames[:1] == (0,) else script.prompts
    text, segment, frames, latent_errors = pipeline.encode_prompt(prompts[0]), 0, [], []
    for block, clean in enumerate(latents):
        start = block * plan.block_frames
        if reference.segments[block] != segment:
            segment = int(reference.segments[block])
            text = pipeline.encode_prompt(prompts[segment])
            sampler.recache(cache, text, start, torch.cat(tuple(latents[:block]), dim=1)[:, -plan.window:])
        made = sampler.denoise_block(cache, text, start, *noise_source.next_block())
        latent_errors.append(_relative_error(made, clean))
        block_decoder.continue_from(history_decoder)
        frames += [frames_to_uint8(part[0]) for part in block_decoder.push(made)]
        sampler.clean_pass(cache, text, start, clean)
        history_decoder.push(clean)
    compared = quality.compare(
        reference.frames.to(pipeline.device),
        torch.cat(frames),
        weights_kind=weights_kind,
        prompts=reference.frame_prompts(prompts),
        metrics=metrics,
    )
    return compared | {
        "protocol": "one block from the baseline's own past",
        "latent_relative_error": latent_errors,
    }


def variation_fidelity(pipeline: Pipeline, session: StreamingSession, script: Script,
                       reference: Reference | None, baseline: Mapping[str, Any] | None) -> dict[str, Any]:
    """PSNR by the one-block protocol, n/a where the campaign has no `reference` video or no `baseline`
    result, or where noise is drawn in other steps.
    """
    if reference is None or baseline is None:
        return {"psnr_db": na("the campaign has no baseline video", "run the baseline first")}
    if len(pipeline.config.denoising_steps) != len(baseline["parameters"]["denoising_steps"]):
        return {"psnr_db": na("another number of denoising steps draws other noise", "look at the videos")}
    return compare_blocks(pipeline, session, script, reference, pipeline.weights["kind"], ("psnr_db",))


def check_sizes(pipeline: Pipeline, reference: Reference) -> None:
    """Check that the baseline's video can be compared with one of this preset.

    Raises:
        UserError: another length, picture or block size.
    """
    config, theirs = pipeline.config, tuple(reference.latents.shape)
    ours = (config.video_blocks, 1, config.block_frames, *pipeline.latent_shape)
    if theirs != ours:
        raise UserError(
            f"campaign: the baseline's video has latents {theirs}, this preset's {ours} (blocks, 1, frames, "
            "channels, height, width); run both with the same video_latent_frames, block_frames and size."
        )


def _relative_error(made: Tensor, clean: Tensor) -> float:
    """|made - clean| / |clean| in float32."""
    return ((made.float() - clean.float()).norm() / clean.float().norm()).item()


def difference_chart(reference: Tensor, variant: Tensor) -> Chart:
    """The last frame of each of two clips, uint8 [T, 3, H, W], and the mean absolute difference of all
    frames.
    """
    chart = Chart(figsize=(9, 2.6), layout="constrained")
    pictures = {"baseline, last frame": video.as_images(reference[-1:])[0],
                "this run, last frame": video.as_images(variant[-1:])[0],
                "mean difference (white: 10 % and more)": quality.difference_heatmap(reference, variant)}
    for ax, (title, picture) in zip(chart.subplots(1, 3), pictures.items()):
        ax.imshow(picture)
        ax.set_title(title, fontsize=9, loc="left")
        ax.set_axis_off()
    return chart
