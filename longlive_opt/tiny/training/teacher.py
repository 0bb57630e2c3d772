"""Stage 2: train the teacher, transformer and text encoder together, by flow matching with teacher forcing.

The loss is rectified flow (arXiv:2210.02747, arXiv:2209.03003) in LongLive's parametrisation. The network
predicts noise - clean from (1 - sigma) * clean + sigma * noise. Each block draws its own sigma from the table
of `FlowSchedule` (shift 5), and its frames share it. Each noisy block sees the clean blocks before it, as the
cache would hold them at inference (see `teacher_forcing`).

On most clips the clean past is noised a little, without a signal to the network. At inference the student's
cache holds its own imperfect blocks, and a network trained on a perfect past takes their flaws for real and
amplifies them (GameNGen, arXiv:2408.14837; diffusion forcing, arXiv:2407.01392). The target stays clean, so
the flow leads back to clean videos.

Training starts with openings only, as large models see images before videos (Wan 2.1, arXiv:2503.20314):
openings introduce the shapes and letters that later blocks only continue. Openings stay in the mix with the
clips.

One prompt in ten is dropped, for guidance during distillation (arXiv:2207.12598).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Sequence

import torch
from torch import Tensor, nn

from ...models.dit import CausalDiT, TextContext
from ...models.specs import ModelSpec
from ...models.text import END_ID, UMT5Encoder, load_tokenizer
from ...streaming.sampler import FlowSchedule, SamplingPlan
from .attribute_head import AttributeHead, attribute_loss, sample_prompts, text_features
from .clips import EARLY_BLOCKS, OPENING, ClipMaker, ClipRing, Clips, layouts, text_mask
from .graphs import Recorder
from .master_weights import MasterWeights
from .teacher_forcing import ClipLayout, NoisyClips, predict_clips, split_text, window_past

ODD_STEPS = 6
"""One step in this many takes early clips as its clips with a prompt switch."""


@dataclass(frozen=True)
class TeacherSettings:
    """Settings of the teacher. Batch sizes count clips of seven blocks, or openings. Clips start at the share
    `clips_from` of the training. From then on openings have the weight `opening_share` in the loss.
    """

    rate: float = 1.5e-3
    muon_rate: float | None = 6e-3
    clips_from: float = 0.3
    opening_batch: int = 192
    opening_with_clips: int = 96
    opening_share: float = 0.3
    opening_chunk: int = 256
    opening_ring_chunks: int = 64
    opening_first_chunks: int = 24
    opening_refresh_every: int = 50
    plain_batch: int = 32
    switch_batch: int = 12
    context_sigma: float = 0.3
    context_clean_share: float = 0.3
    prompt_dropout: float = 0.1
    attribute_weight: float = 0.05
    ring_chunks: int = 48
    first_chunks: int = 10
    refill_chunks: int | None = 12
    refresh_every: int = 90
    average_decay: float = 0.999


def init_dit_(dit: CausalDiT) -> None:
    """Initialise a diffusion transformer (DiT, arXiv:2212.09748). Gates and output are zero, so that every
    block starts as the identity.
    """
    for module in dit.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(dit.patch_embedding.weight.flatten(1))
    nn.init.zeros_(dit.patch_embedding.bias)
    for linear in (
        dit.time_embedding[0],
        dit.time_embedding[2],
        dit.text_embedding[0],
        dit.text_embedding[2],
    ):
        nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
    nn.init.zeros_(dit.time_projection[1].weight)
    nn.init.zeros_(dit.head.head.weight)


def init_text_(encoder: UMT5Encoder) -> None:
    """Initialise as in T5 (arXiv:1910.10683). Queries are small because T5 does not divide logits by sqrt(D).
    """
    nn.init.normal_(encoder.token_embedding.weight)
    for block in encoder.blocks:
        dim = block.attn.q.in_features
        head = block.attn.q.out_features // block.attn.num_heads
        nn.init.normal_(block.attn.q.weight, std=(dim * head) ** -0.5)
        for linear in (
            block.attn.k,
            block.attn.v,
            block.attn.o,
            block.ffn.gate[0],
            block.ffn.fc1,
            block.ffn.fc2,
        ):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        nn.init.normal_(block.pos_embedding.embedding.weight, std=0.5)


def empty_prompt(like: Tensor) -> Tensor:
    """Ids [1, L] of the empty prompt, from which guidance moves away."""
    ids = torch.zeros_like(like[:1])
    # Assigning a number first creates a tensor on the host (torch 2.14), which a CUDA graph cannot replay.
    ids[:, 0].fill_(END_ID)
    return ids


def repeat_sigma(per_block: Tensor, block_frames: int) -> Tensor:
    """[B, blocks] -> [B, frames, 1, 1, 1]"""
    return per_block.repeat_interleave(block_frames, dim=1)[:, :, None, None, None]


def noise_context(
    latents: Tensor, generator: torch.Generator, strongest: float, clean_share: float
) -> Tensor:
    """Latents [B, F, C, H, W] with noise as a sampler might leave it: one strength per clip, zero for some.
    """
    draws = torch.rand((2, len(latents), 1, 1, 1, 1), generator=generator, device=latents.device)
    sigma = (draws[0] * strongest * (draws[1] >= clean_share)).to(latents.dtype)
    noise = torch.randn(latents.shape, generator=generator, device=latents.device, dtype=latents.dtype)
    return (1 - sigma) * latents + sigma * noise


class TeacherStage:
    """Trains the transformer and the text encoder."""

    name = "teacher"

    def __init__(self, model: ModelSpec, plan: SamplingPlan, maker: ClipMaker, device: torch.device,
                 dtype: torch.dtype, seed: int, settings: TeacherSettings = TeacherSettings(),
                 text_encoder: UMT5Encoder | None = None, attributes: AttributeHead | None = None,
                 graphs: bool = False):
        """Args: text_encoder, attributes: from `ReadingStage`; None starts from random weights. graphs: see
            the module `graphs`.
        """
        self.settings, self.plan, self.device, self.dtype = settings, plan, device, dtype
        torch.manual_seed(seed)
        dit = CausalDiT(model.dit)
        init_dit_(dit)
        if text_encoder is None:
            text_encoder = UMT5Encoder(model.text)
            init_text_(text_encoder)
        attributes = attributes or AttributeHead(model.text.dim)
        modules = {"dit": dit, "text": text_encoder, "attributes": attributes}
        self.masters = MasterWeights(
            {name: module.to(device) for name, module in modules.items()},
            dtype,
            settings.rate,
            average_decay=settings.average_decay,
            muon_rate=settings.muon_rate,
        )
        self.dit: CausalDiT = self.masters.work["dit"]
        self.ring = ClipRing(maker, settings.ring_chunks)
        self.openings = ClipRing(maker.openings(settings.opening_chunk), settings.opening_ring_chunks)
        self.clips_since: int | None = None
        self.layouts = layouts(window_past(plan), plan.block_frames)
        schedule = FlowSchedule(plan.shift)
        self.sigmas, self.timesteps = schedule.sigmas.to(device), schedule.timesteps.to(device)
        self.generator = torch.Generator(device).manual_seed(seed)
        self.recorder = Recorder(list(self.masters.work.parameters()), self.generator, graphs)

    def step(self, step: int, progress: float) -> dict[str, Tensor]:
        settings = self.settings
        self.openings.produce(settings.opening_first_chunks + step // settings.opening_refresh_every)
        if progress < settings.clips_from:
            pools = {OPENING: settings.opening_batch}
        else:
            pools = {OPENING: settings.opening_with_clips} | self._clip_pools(step)
        clips = {pool: (self.openings if pool == OPENING else self.ring).sample(pool, count, self.generator)
                 for pool, count in pools.items()}
        names = ["opening_flow", "flow", "switch_flow"][:len(pools)] + ["reading", "read_right"]
        return dict(zip(names, self.recorder(
            tuple(pools.items()), partial(self._learn, tuple(pools)),
            *(t for batch in clips.values() for t in batch.tensors()))))

    def _learn(self, pools: Sequence[str], *tensors: Tensor) -> list[Tensor]:
        """Compute gradients on clips of `pools`. Returns the flow loss of each pool, the reading loss, and
        the share of attributes read correctly.
        """
        count = len(tensors) // len(pools)
        batches = [Clips(*tensors[i * count:(i + 1) * count]) for i in range(len(pools))]
        texts, features, ids = self._read(batches[0], batches[1:])
        flows = self.flow_losses(
            [(batch, self.layouts[pool], *text) for pool, batch, text in zip(pools, batches, texts)])
        logits = self.masters.work["attributes"](features, text_mask(ids))
        reading, right = attribute_loss(logits, torch.cat([batch.labels for batch in batches]))
        total = self._total(flows, [len(batch) for batch in batches])
        (total + self.settings.attribute_weight * reading).backward()
        return [t.detach() for t in (*flows, reading, right)]

    def _clip_pools(self, step: int) -> dict[str, int]:
        """The number of clips that this step takes from each pool. Makes due chunks first."""
        settings, ring = self.settings, self.ring
        if self.clips_since is None:
            self.clips_since = step
        ring.produce(settings.first_chunks + (step - self.clips_since) // settings.refresh_every)
        pools = {"plain": settings.plain_batch}
        if settings.switch_batch:
            early = f"early{EARLY_BLOCKS[step // ODD_STEPS % len(EARLY_BLOCKS)]}"
            odd = step % ODD_STEPS == ODD_STEPS - 1 and ring.has(early)
            pools[early if odd else "late"] = settings.switch_batch
        return pools

    def _total(self, flows: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
        """The weighted loss: openings by their share, pools of clips by their number of clips."""
        openings, *clips = flows
        if not clips:
            return openings
        mean = sum(flow * count for flow, count in zip(clips, counts[1:])) / sum(counts[1:])
        return torch.lerp(mean, openings, self.settings.opening_share)

    def _read(self, openings: Clips, batches: Sequence[Clips]) -> tuple[
            list[tuple[TextContext, TextContext]], Tensor, Tensor]:
        """The text context of blocks and sink for the openings, then for each batch, with some prompts
        dropped; and the text features and ids of all prompts of blocks. An opening is its own sink.
        """
        ids = torch.cat([clips.ids for clips in (openings, *batches)])
        sink_ids = [clips.sink_ids for clips in batches]
        features = text_features(self.masters.work["text"], torch.cat([ids, *sink_ids, empty_prompt(ids)]))
        dropped = torch.rand((len(ids), 1, 1), generator=self.generator, device=self.device)
        dropped = torch.cat([dropped, dropped[len(openings):]]) < self.settings.prompt_dropout
        text = self.dit.embed_text(torch.where(dropped, features[-1:], features[:-1]))
        sizes = [len(clips) for clips in batches]
        first, *parts = split_text(text, [len(openings), *sizes, *sizes])
        return [(first, first), *zip(parts[:len(sizes)], parts[len(sizes):])], features[:len(ids)], ids

    def flow_losses(
        self, batches: Sequence[tuple[Clips, ClipLayout, TextContext, TextContext]]
    ) -> list[Tensor]:
        """Mean square error of the flow over the blocks with a loss, for each (clips, layout, prompt, prompt
        of the sink).
        """
        settings, tasks, targets = self.settings, [], []
        for clips, layout, text, sink_text in batches:
            past = noise_context(
                clips.latents, self.generator, settings.context_sigma, settings.context_clean_share
            )
            blocks = tuple(range(layout.recached, layout.blocks))  # no loss before the prompt switch
            clean = clips.latents[:, layout.recached * layout.block_frames:]
            level = torch.randint(len(self.sigmas), (len(clips), len(blocks)), generator=self.generator,
                                  device=self.device)
            noise = torch.randn(clean.shape, generator=self.generator, device=self.device, dtype=clean.dtype)
            sigma = repeat_sigma(self.sigmas[level], layout.block_frames).to(clean.dtype)
            timesteps = self.timesteps[level].repeat_interleave(layout.block_frames, dim=1)
            noisy = (1 - sigma) * clean + sigma * noise
            tasks.append(
                NoisyClips(past, clips.positions, noisy, timesteps, sink_text, text, layout, blocks))
            targets.append((noise - clean).float())
        losses = []
        for flow, target, task, (clips, *_) in zip(
                predict_clips(self.dit, tasks, self.plan.context_noise), targets, tasks, batches):
            error = (flow.float() - target).square().unflatten(1, (len(task.blocks), -1))
            weight = clips.loss[:, task.layout.recached:]
            losses.append((error.mean(dim=(2, 3, 4, 5)) * weight).sum() / weight.sum().clamp(min=1))
        return losses

    def state(self) -> dict[str, Any]:
        return {"produced": self.ring.produced, "openings": self.openings.produced,
                "clips_since": self.clips_since}

    def resume(self, state: dict[str, Any]) -> None:
        self.openings.refill(state["openings"], self.settings.opening_first_chunks)
        self.ring.refill(state["produced"], self.settings.refill_chunks)
        self.clips_since = state["clips_since"]

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def restore_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Nothing to do, because `resume` refills the rings."""


class ReadingStage:
    """The warm-up of stage 2: train text encoder and attribute head on prompts alone (see `attribute_head`).
    """

    name = "text"

    def __init__(self, model: ModelSpec, device: torch.device, dtype: torch.dtype, seed: int,
                 rate: float = 2e-3, batch: int = 256, prompts: int = 16384):
        """Args: prompts: number of different prompts; each takes 0.1 ms to make."""
        self.batch = batch
        torch.manual_seed(seed)
        encoder = UMT5Encoder(model.text)
        init_text_(encoder)
        modules = {"text": encoder.to(device), "attributes": AttributeHead(model.text.dim).to(device)}
        self.masters = MasterWeights(modules, dtype, rate, average_decay=0.99)
        tokenizer = load_tokenizer("bytes", model.text.text_len)
        self.ids, self.labels = (t.to(device) for t in sample_prompts(tokenizer, [seed, 2], prompts))
        self.generator = torch.Generator(device).manual_seed(seed)

    def step(self, step: int, progress: float) -> dict[str, Tensor]:
        rows = torch.randint(len(self.ids), (self.batch,), generator=self.generator, device=self.ids.device)
        ids = self.ids[rows]
        features = text_features(self.masters.work["text"], ids)
        loss, right = attribute_loss(
            self.masters.work["attributes"](features, text_mask(ids)), self.labels[rows]
        )
        loss.backward()
        return {"reading": loss, "read_right": right}

    def state(self) -> dict[str, Any]:
        return {}

    def resume(self, state: dict[str, Any]) -> None:
        """Nothing to do, because the stage has no state of its own."""

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def restore_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Nothing to do."""
