"""Work of a steady-state block: floating-point operations and bytes of every operator, from the sizes alone.

A multiplication with its addition counts as two operations. Bytes are those that have to move at least once:
inputs, weights and output of each operator. A convolution counts its zero padding, as PyTorch's counter does
(`torch.utils.flop_counter`), and its history. Norms are counted as one kernel per gap between two linear
layers or convolutions that reads and writes its activations once: the least without fusion into a product.

The window is full, and the block has no prompt switch: `len(steps)` denoising passes and a clean pass over
`block_frames` latent frames, and their decoding. The reference also computes what nobody reads of the clean
pass; a pass that only fills the cache (`keys_only`) ends with the last layer's keys and values. Left out is
what runs once per timestep or prompt: the time embedding and the prompt's keys and values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..config import ExperimentConfig
from ..models.specs import ModelSpec
from ..models.vae import HISTORY_FRAMES, IMAGE_CHANNELS

KINDS = ("linear", "self-attention", "cross-attention", "convolution", "VAE attention", "norm")
DENOISE, CLEAN, DECODE = "denoise", "clean_pass", "decode"


@dataclass(frozen=True)
class Operator:
    """`count` equal operators per block.

    `shape` is (rows, inputs, outputs) of a linear layer, (queries, keys, heads, head dim) of attention,
    (channels in, channels out, frames, height, width, kernel in time, kernel in space) of a convolution, and
    () of norms. `flops` and `bytes` are of one. `stored` names the format of keys and values, or of a linear
    layer's operands: "" is the model's dtype.
    """

    stage: str
    kind: str
    name: str
    count: int
    shape: tuple[int, ...]
    flops: float
    bytes: float
    stored: str = ""

    @property
    def key(self) -> tuple[str, tuple[int, ...], str]:
        """What a ceiling is measured for."""
        return self.kind, self.shape, self.stored


def block_work(config: ExperimentConfig, *, keys_only: bool) -> list[Operator]:
    """Every operator of a steady-state block.

    Args:
        keys_only: whether the clean pass ends with the last layer's keys and values.
    """
    model = config.model_config()
    size = 2 if config.model_dtype == "bfloat16" else 4
    found = list(_pass(config, model, size, DENOISE, len(config.denoising_steps), whole=True))
    found += _pass(config, model, size, CLEAN, 1, whole=not keys_only)
    return found + list(_decoding(config, model, size))


def _pass(config: ExperimentConfig, model: ModelSpec, size: int, stage: str, passes: int, *, whole: bool
          ) -> Iterator[Operator]:
    """The transformer over a block, `passes` times."""
    dit, tokens = model.dit, config.block_frames * model.tokens_per_frame
    layers, dim, ffn = dit.num_layers, dit.dim, dit.ffn_dim
    full = layers if whole else layers - 1
    eight = config.use_quantized_linears
    quantized = set(config.linear_layers) if eight else set()

    def linear(name: str, count: int, inputs: int, outputs: int, key: str = "") -> Operator:
        stored = config.linear_quantization if key in quantized else ""
        moved = (tokens + outputs) * inputs * (1 if stored else size) + tokens * outputs * size
        return Operator(stage, "linear", name, passes * count, (tokens, inputs, outputs),
                        2.0 * tokens * inputs * outputs, moved, stored)

    _, height, width = dit.patch_size
    patch = dit.in_channels * height * width
    yield linear("patch embedding", 1, patch, dim)
    yield linear("q, k, v", layers, dim, 3 * dim, "qkv")
    yield linear("output of self-attention", full, dim, dim)
    yield linear("query of cross-attention", full, dim, dim, "query")
    yield linear("output of cross-attention", full, dim, dim)
    yield linear("feed-forward, up", full, dim, ffn, "up")
    yield linear("feed-forward, down", full, ffn, dim, "down")
    if whole:
        yield linear("head", 1, dim, patch)
    keys = config.local_attn_size * model.tokens_per_frame
    stored = config.kv_quantization if config.use_quantized_kv and config.kv_read_path == "fused" else ""
    yield _attention(stage, "self-attention", passes * full, tokens, keys, dit.num_heads, dit.head_dim, size,
                     stored)
    yield _attention(stage, "cross-attention", passes * full, tokens, dit.text_len, dit.num_heads,
                     dit.head_dim, size)
    # Read and written per layer, in activations of [tokens, dim]: 3 + 3 around rotation and cache write, 2 of
    # the cross-attention's query, and 2 + 2 at each of the three additions to the residual stream.
    yield Operator(stage, "norm", "norms, rotation, residuals", passes * full, (), 0.0,
                   20.0 * tokens * dim * size)


def _attention(stage: str, kind: str, count: int, queries: int, keys: int, heads: int, head_dim: int,
               size: int, stored: str = "") -> Operator:
    moved = 2.0 * heads * head_dim * (queries * size + keys * (1 if stored else size))
    return Operator(stage, kind, kind, count, (queries, keys, heads, head_dim),
                    4.0 * queries * keys * heads * head_dim, moved, stored)


def _decoding(config: ExperimentConfig, model: ModelSpec, size: int) -> Iterator[Operator]:
    """The VAE's decoder over the block's latents, in calls of `latents_per_vae_call`."""
    chunk, left = config.latents_per_vae_call, config.block_frames
    sizes: dict[int, int] = {}
    while left > 0:
        frames = min(chunk, left)
        sizes[frames] = sizes.get(frames, 0) + 1
        left -= frames
    for frames, calls in sizes.items():
        yield from _vae_call(model, size, frames, calls)


def _vae_call(model: ModelSpec, size: int, frames: int, calls: int) -> Iterator[Operator]:
    """One call of the decoder on `frames` latents, `calls` times (`models.vae.Decoder` has the stages)."""
    vae = model.vae
    height, width = model.latent_height, model.latent_width

    def conv(name: str, inputs: int, outputs: int, time: int = HISTORY_FRAMES + 1, space: int = 3,
             count: int = 1) -> Operator:
        pixels = frames * height * width
        past = (time - 1) * height * width * inputs
        moved = (pixels * inputs + past + pixels * outputs + inputs * outputs * time * space**2) * size
        return Operator(DECODE, "convolution", name, calls * count,
                        (inputs, outputs, frames, height, width, time, space),
                        2.0 * pixels * inputs * outputs * time * space**2, moved)

    def norm(channels: int, count: int) -> Operator:
        return Operator(DECODE, "norm", "norm and SiLU", calls * count, (), 0.0,
                        2.0 * frames * height * width * channels * size)

    def residual(inputs: int, outputs: int, count: int = 1) -> Iterator[Operator]:
        name = f"residual block, {outputs} channels"
        yield conv(name, inputs, outputs, count=count)
        yield conv(name, outputs, outputs, count=count)
        yield norm(inputs, count)
        yield norm(outputs, count)
        if inputs != outputs:
            yield conv(f"shortcut, {outputs} channels", inputs, outputs, time=1, space=1, count=count)

    channels = vae.dim * vae.dim_mult[-1]
    yield conv("latents", vae.z_dim, vae.z_dim, time=1, space=1)
    yield conv("first convolution", vae.z_dim, channels)
    yield from residual(channels, channels, count=2)
    yield norm(channels, 1)
    yield conv("q, k, v of the VAE", channels, 3 * channels, time=1, space=1)
    yield conv("output of the VAE's attention", channels, channels, time=1, space=1)
    places = height * width
    yield Operator(DECODE, "VAE attention", "VAE attention", calls * frames, (places, places, 1, channels),
                   4.0 * places * places * channels, 4.0 * places * channels * size)
    temporal = vae.temporal_downsample[::-1]
    for level, mult in enumerate(reversed(vae.dim_mult)):
        for _ in range(vae.num_res_blocks + 1):
            yield from residual(channels, vae.dim * mult)
            channels = vae.dim * mult
        if level < len(temporal):
            if temporal[level]:
                yield conv(f"doubling of frames, {channels} channels", channels, 2 * channels, space=1)
                frames *= 2
            height, width = 2 * height, 2 * width
            yield conv(f"enlarging, {channels} channels", channels, channels // 2, time=1)
            channels //= 2
    yield norm(channels, 1)
    yield conv("head of the VAE", channels, IMAGE_CHANNELS)
