"""Stage 3: distil the teacher into the student, with four steps per block and with the student's own past.

The student is the function that `Sampler` runs. At each of the sampler's noise levels it predicts the clean
block, and the sampler adds fresh noise for the next level. Its target is the end point of the teacher's
probability-flow ODE (ordinary differential equation) from the same noisy block, as in consistency models
(arXiv:2303.01469: one function for all levels, multistep sampling with fresh noise). The ODE is guided by the
prompt (arXiv:2207.12598), so that inference needs no guidance. Euler steps of the averaged teacher compute
the end points during training.

One third of the work uses true clips as the past. Another third uses the student's own videos (`Streams`).
The student generates them with its sampler, and they continue from step to step for minutes, through prompt
switches, as in Self Forcing (arXiv:2506.08009) and LongLive (arXiv:2509.22622). So it learns to handle its
own flaws. The noisy blocks are those of the rollout. The teacher, trained with a noised past, shows how a
video with such a past should continue. The last third is openings, the first blocks of videos, as the student
generates them.

The loss is a regression instead of distribution matching (CausVid, arXiv:2412.07772), because a regression
needs no critic and cannot collapse within a few minutes of training. The drawback is a softer picture. It is
small where the past determines the block, and largest in openings.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Sequence

import torch
from torch import Tensor

from ...models.dit import CausalDiT, TextContext
from ...models.specs import ModelSpec
from ...models.text import UMT5Encoder, load_tokenizer
from ...streaming.sampler import FlowSchedule, SamplingPlan
from .attribute_head import sample_prompts, text_features
from .clips import EARLY_BLOCKS, LATE_BLOCK, OPENING, ClipMaker, ClipRing, layouts
from .graphs import Recorder
from .master_weights import MasterWeights
from .rollouts import Streams
from .teacher import empty_prompt, noise_context, repeat_sigma
from .teacher_forcing import (
    ClipLayout,
    Context,
    Denoiser,
    NoisyClips,
    encode_context,
    extend_context,
    predict_clips,
    split_text,
    take_blocks,
    window_past,
)

UNUSED = {"plain": (1, 2)}
"""Blocks of true clips that are left out, because most clips of the pool lack a proper past for them."""
JOBS = ("start", "go on", "go on", "switch", "go on", "go on")
"""The actions of the student's own streams, one per step."""


@dataclass(frozen=True)
class StudentSettings:
    """Settings of the student. Each step takes `true_batch` clips, `stream_batch` streams (`birth_batch` if
    they start) and `opening_batch` openings.
    """

    rate: float = 3e-4
    muon_rate: float | None = 8e-4
    true_batch: int = 16
    stream_batch: int = 32
    birth_batch: int = 8
    opening_batch: int = 48
    opening_prompts: int = 16384
    streams: int = 64
    ode_steps: int = 10
    guidance: float = 2.0
    guidance_from: float = 0.7
    context_sigma: float = 0.2
    ring_chunks: int = 32
    first_chunks: int = 8
    refill_chunks: int | None = 8
    refresh_every: int = 100
    average_decay: float = 0.998


@dataclass(frozen=True)
class Prompt:
    """A transformer's text contexts for a batch: of its sinks, and of all other blocks."""

    sink: TextContext
    now: TextContext


@dataclass(frozen=True)
class Task:
    """The input of teacher and student: noisy blocks of a batch of clips with their clean past.

    `latents` [B, F, C, H, W] are all blocks of the clips. `noisy` are the blocks listed in `blocks`, each at
    the sampler's step `level` [B, len(blocks)] and with the loss weight `weight`. `sink_ids` [B, L] are the
    prompts of the sinks, `ids` those of all other blocks.
    """

    latents: Tensor
    positions: Tensor
    layout: ClipLayout
    blocks: tuple[int, ...]
    noisy: Tensor
    level: Tensor
    weight: Tensor
    sink_ids: Tensor
    ids: Tensor

    @property
    def places(self) -> Tensor:
        """Positions of the noisy frames."""
        return take_blocks(self.positions, self.blocks, self.layout.block_frames)

    @property
    def kind(self) -> tuple[ClipLayout, tuple[int, ...]]:
        """The fields that are not tensors."""
        return self.layout, self.blocks

    @property
    def tensors(self) -> list[Tensor]:
        return [getattr(self, name) for name in TASK_TENSORS]

    @classmethod
    def of(cls, kind: tuple[ClipLayout, tuple[int, ...]], tensors: Sequence[Tensor]) -> Task:
        """The task with this `kind` and these `tensors`."""
        return cls(layout=kind[0], blocks=kind[1], **dict(zip(TASK_TENSORS, tensors)))


TASK_TENSORS = ("latents", "positions", "noisy", "level", "weight", "sink_ids", "ids")


def _shifted(sigma: Tensor, shift: float) -> Tensor:
    """The noise level `sigma` after the timestep shift."""
    return shift * sigma / (1 + (shift - 1) * sigma)


class StudentStage:
    """Trains the student's transformer. Text encoder and teacher are frozen."""

    name = "student"

    def __init__(self, model: ModelSpec, plan: SamplingPlan, maker: ClipMaker, teacher: CausalDiT,
                 text_encoder: UMT5Encoder, device: torch.device, dtype: torch.dtype, seed: int,
                 settings: StudentSettings = StudentSettings(), graphs: bool = False):
        """Args: teacher, text_encoder: averaged, in `dtype`, on `device`; the student starts as the teacher.
            graphs: see the module `graphs`.
        """
        self.settings, self.plan, self.device, self.dtype = settings, plan, device, dtype
        self.teacher = teacher.requires_grad_(False)
        self.text_encoder = text_encoder.requires_grad_(False)
        student = CausalDiT(model.dit).to(device)
        student.load_state_dict(teacher.state_dict())
        self.masters = MasterWeights({"dit": student}, dtype, settings.rate,
                                     average_decay=settings.average_decay,
                               muon_rate=settings.muon_rate)
        self.dit: CausalDiT = self.masters.work["dit"]
        self.ring = ClipRing(maker, settings.ring_chunks)
        self.layouts = layouts(window_past(plan), plan.block_frames)
        tokenizer = load_tokenizer("bytes", model.text.text_len)
        prompts, _ = sample_prompts(tokenizer, [seed, 3], settings.opening_prompts)
        self.prompts = prompts.to(device)
        schedule = FlowSchedule(plan.shift)
        self.timesteps = torch.tensor(schedule.warped_steps(plan.denoising_steps))
        self.sigmas = schedule.sigma(self.timesteps)
        self._on_device = self.timesteps.to(device), self.sigmas.to(device)
        self.steps = tuple(zip(self.timesteps.tolist(), self.sigmas.tolist()))
        self.generator = torch.Generator(device).manual_seed(seed)
        self.recorder = Recorder(list(self.masters.work.parameters()), self.generator, graphs)
        shape = (model.vae.z_dim, model.latent_height, model.latent_width)
        self._restored = False
        self.streams = Streams(settings.streams, plan.block_frames, shape, model.text.text_len, device, dtype)

    def step(self, step: int, progress: float) -> dict[str, Tensor]:
        settings, ring = self.settings, self.ring
        ring.produce(settings.first_chunks + step // settings.refresh_every)
        job = JOBS[step % len(JOBS)] if self.streams.born >= settings.streams else "start"
        tasks = {"true": self._true_clips(step),
                 "stream": self._start() if job == "start" else self._go_on(job == "switch"),
                 "opening": self._open()}
        kinds = tuple(task.kind for task in tasks.values())
        sizes = tuple(len(task.ids) for task in tasks.values())
        losses = self.recorder((kinds, sizes), partial(self._learn, kinds),
                               *(tensor for task in tasks.values() for tensor in task.tensors))
        return dict(zip(tasks, losses))

    def _true_clips(self, step: int) -> Task:
        """Blocks of true clips with the sampler's noise."""
        pool = "plain"
        if step % 4 == 3:
            early = f"early{EARLY_BLOCKS[step // 16 % len(EARLY_BLOCKS)]}"
            pool = early if step % 16 == 15 and self.ring.has(early) else "late"
        clips = self.ring.sample(pool, self.settings.true_batch, self.generator)
        layout = self.layouts[pool]
        blocks = tuple(b for b in range(layout.recached, layout.blocks) if b not in UNUSED.get(pool, ()))
        clean = take_blocks(clips.latents, blocks, layout.block_frames)
        level = self._levels(len(clips), len(blocks))
        sigma = repeat_sigma(self._on_device[1][level], layout.block_frames).to(clean.dtype)
        noisy = (1 - sigma) * clean + sigma * self._noise(clean.shape)
        past = noise_context(clips.latents, self.generator, self.settings.context_sigma, 0.5)
        return Task(past, clips.positions, layout, blocks, noisy, level, clips.loss[:, list(blocks)],
                    clips.sink_ids, clips.ids)

    def _start(self) -> Task:
        """New videos from their first block on, which become streams."""
        clips = self.ring.sample("late", self.settings.birth_batch, self.generator)
        task = self._roll_out("plain", clips.sink_ids, clips.sink_ids)
        self.streams.begin(task.latents, clips.sink_ids, clips.ids)
        return task

    def _open(self) -> Task:
        """First blocks of videos that are not continued."""
        rows = torch.randint(len(self.prompts), (self.settings.opening_batch,), generator=self.generator,
                             device=self.device)
        return self._roll_out(OPENING, self.prompts[rows], self.prompts[rows])

    def _go_on(self, switch: bool) -> Task:
        """Streams that continue, with `switch` under another prompt."""
        rows = torch.randperm(len(self.streams), generator=self.generator, device=self.device)
        rows = rows[:self.settings.stream_batch]
        name = "late" if switch else "plain"
        layout = self.layouts[name]
        clips = self.streams.take(rows, (layout.blocks - LATE_BLOCK) * layout.block_frames, switch)
        known = clips.latents[:, :LATE_BLOCK * layout.block_frames]
        task = self._roll_out(name, clips.sink_ids, clips.ids, clips.positions, known)
        self.streams.give(rows, task.latents)
        return task

    def _roll_out(self, name: str, sink_ids: Tensor, ids: Tensor, positions: Tensor | None = None,
                  known: Tensor | None = None) -> Task:
        """A task from the blocks that the student generates after the `known` ones, or for new videos if none
        are known.
        """
        layout = self.layouts[name]
        if positions is None:
            positions = torch.arange(layout.blocks * layout.block_frames, device=self.device)
            positions = positions.expand(len(ids), -1)
        first = 0 if known is None else known.shape[1] // layout.block_frames
        inputs = [sink_ids, ids, positions] + ([] if known is None else [known])
        latents, noisy, level = self.recorder(
            (name, first, len(ids)), partial(self._rollout, layout), *inputs)
        weight = torch.ones(level.shape, device=self.device)
        return Task(latents, positions, layout, tuple(range(first, layout.blocks)), noisy, level, weight,
                    sink_ids, ids)

    @torch.no_grad()
    def _rollout(self, layout: ClipLayout, sink_ids: Tensor, ids: Tensor, positions: Tensor,
                 known: Tensor | None = None) -> list[Tensor]:
        """Let the student generate the blocks after the known ones, as `Sampler` does. Returns all latents
        and, for each generated block, one of its noisy versions and the step of that version.
        """
        size, batch = layout.block_frames, len(positions)
        prompt = self._prompt(self.dit, sink_ids, ids)
        made, context = [], Context.empty(len(self.dit.blocks))
        if known is not None:
            made.append(known)
            context = encode_context(
                self.dit,
                known,
                positions[:, :known.shape[1]],
                prompt.sink,
                prompt.now,
                layout,
                known.shape[1] // size,
                self.plan.context_noise,
            )
        blocks = tuple(range(context.blocks, layout.blocks))
        level, kept = self._levels(batch, len(blocks)), []
        for column, block in enumerate(blocks):
            place = positions[:, block * size:(block + 1) * size]
            noisy = self._noise((batch, size, *self.streams.shape))
            met, denoise = [], Denoiser(self.dit, [(place, prompt.now, context, layout, (block,))])
            for i, (timestep, sigma) in enumerate(self.steps):
                if i:
                    noisy = (1 - sigma) * clean + sigma * self._noise(noisy.shape)  # noqa: F821
                met.append(noisy)
                timesteps = torch.full((batch, size), timestep, device=self.device)
                flow, = denoise([noisy], [timesteps])
                clean = noisy - sigma * flow
            choice = level[:, column]
            kept.append(torch.stack(met, dim=1)[torch.arange(batch, device=self.device), choice])
            made.append(clean)
            if block + 1 < layout.blocks:
                extend_context(self.dit, clean, place, prompt.now, context, layout, self.plan.context_noise)
        return [torch.cat(made, dim=1), torch.cat(kept, dim=1), level]

    def _learn(self, kinds: Sequence[tuple[ClipLayout, tuple[int, ...]]], *tensors: Tensor) -> list[Tensor]:
        """Compute gradients of the mean loss of the student's predictions against the teacher's end points.
        """
        count = len(TASK_TENSORS)
        tasks = [Task.of(kind, tensors[i * count:(i + 1) * count]) for i, kind in enumerate(kinds)]
        targets, clips, sigmas = self.end_points(tasks), [], []
        for task in tasks:
            prompt = self._prompt(self.dit, task.sink_ids, task.ids)
            timesteps, sigma = (
                repeat_sigma(table[task.level], task.layout.block_frames) for table in self._on_device
            )
            clips.append(NoisyClips(task.latents, task.positions, task.noisy, timesteps[..., 0, 0, 0],
                                    prompt.sink, prompt.now, task.layout, task.blocks))
            sigmas.append(sigma)
        flows, losses = predict_clips(self.dit, clips, self.plan.context_noise), []
        for task, flow, sigma, target in zip(tasks, flows, sigmas, targets):
            clean = task.noisy.float() - sigma * flow.float()
            error = (clean - target).square().unflatten(1, (len(task.blocks), -1)).mean(dim=(2, 3, 4, 5))
            losses.append((error * task.weight).sum() / task.weight.sum().clamp(min=1))
        torch.stack(losses).mean().backward()
        return [loss.detach() for loss in losses]

    @torch.no_grad()
    def end_points(self, tasks: Sequence[Task]) -> list[Tensor]:
        """Clean blocks, float32, at the end of the guided teacher's ODE from the noisy blocks. Euler steps
        are evenly spaced in the unshifted noise level. Guidance only acts at high noise, which determines the
        content (arXiv:2404.07724). At low noise it would add contrast, block after block.
        """
        teacher, shift, count = self.teacher, self.plan.shift, self.settings.ode_steps
        batches, unshifted = [], []
        for task in tasks:
            nothing = empty_prompt(task.ids).expand_as(task.ids)
            # One batch holds every clip with its prompt and without.
            prompt = self._prompt(
                teacher, torch.cat([task.sink_ids, nothing]), torch.cat([task.ids, nothing]))
            context = encode_context(
                teacher, torch.cat([task.latents] * 2), torch.cat([task.positions] * 2), prompt.sink,
                prompt.now, task.layout, task.blocks[-1], self.plan.context_noise)
            batches.append((torch.cat([task.places] * 2), prompt.now, context, task.layout, task.blocks))
            start = repeat_sigma(self._on_device[1][task.level], task.layout.block_frames)
            unshifted.append(start / (shift - (shift - 1) * start))
        denoise, points = Denoiser(teacher, batches), [task.noisy.float() for task in tasks]
        for i in range(count):
            here, after = ([_shifted(u * (1 - j / count), shift) for u in unshifted] for j in (i, i + 1))
            flows = denoise([torch.cat([x.to(self.dtype)] * 2) for x in points],
                            [torch.cat([1000 * sigma[..., 0, 0, 0]] * 2) for sigma in here])
            for row, (flow, sigma, then) in enumerate(zip(flows, here, after)):
                with_prompt, without = flow.float().chunk(2)
                weight = torch.where(sigma >= self.settings.guidance_from, self.settings.guidance, 1.0)
                flow = without + weight * (with_prompt - without)
                points[row] = points[row] + (then - sigma) * flow
        return points

    def _prompt(self, dit: CausalDiT, sink_ids: Tensor, ids: Tensor) -> Prompt:
        with torch.no_grad():
            features = text_features(self.text_encoder, torch.cat([sink_ids, ids]))
        return Prompt(*split_text(dit.embed_text(features), [len(ids)] * 2))

    def _levels(self, batch: int, blocks: int) -> Tensor:
        return torch.randint(len(self.sigmas), (batch, blocks), generator=self.generator, device=self.device)

    def _noise(self, shape: Sequence[int]) -> Tensor:
        return torch.randn(tuple(shape), generator=self.generator, device=self.device, dtype=self.dtype)

    def state(self) -> dict[str, Any]:
        return {"produced": self.ring.produced, "born": self.streams.born}

    def resume(self, state: dict[str, Any]) -> None:
        self.ring.refill(state["produced"], self.settings.refill_chunks)
        # Packed checkpoints lack the tensors of the streams, so the streams start again.
        self.streams.born = state["born"] if self._restored else 0

    def tensors(self) -> dict[str, Tensor]:
        return self.streams.tensors()

    def restore_tensors(self, tensors: dict[str, Tensor]) -> None:
        self.streams.restore(tensors)
        self._restored = True
