"""The transformer, its rotary embedding and its attention."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from longlive_opt.errors import UserError
from longlive_opt.models.attention import make_attention, resolve_backend
from longlive_opt.models.dit import CausalDiT, RMSNorm, TextContext, add_gated, modulate
from longlive_opt.models.rope import Rotary, check_positions, rope_angles
from longlive_opt.models.specs import MODELS, ROPE_POSITIONS, DiTConfig
from longlive_opt.parity.comparison import TARGET
from longlive_opt.parity.transformer import build_dit, make_rolling_cache
from longlive_opt.streaming.kv_cache import CacheGeometry, RollingKVCache

GOLDEN = Path(__file__).parent / "golden"
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CONFIG = DiTConfig(dim=32, num_heads=2, num_layers=2, ffn_dim=48, freq_dim=16, text_dim=12, text_len=6)
ROWS, COLUMNS = 2, 3


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def random_dit(config: DiTConfig = CONFIG, seed: int = 0) -> CausalDiT:
    """Every parameter random, none left at 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    dit = CausalDiT(config)
    for name, parameter in dit.named_parameters():
        scale = 0.1 if parameter.ndim == 1 or "modulation" in name else parameter[0].numel()**-0.5
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale + ("norm" in name))
    return dit


def make_cache(dit: CausalDiT, batch: int = 1, window: int = 6, sink: int = 2) -> RollingKVCache:
    sizes = dit.config
    geometry = CacheGeometry(sizes.num_layers, sizes.num_heads, sizes.head_dim, ROWS, COLUMNS, window, sink)
    return RollingKVCache(geometry, make_attention("cpu"), batch, dit.device, dit.dtype)


def run(dit: CausalDiT, cache: RollingKVCache, x: Tensor, t: Tensor, text: TextContext, start: int) -> Tensor:
    cache.begin(start, x.shape[2])
    flow = dit(x, t, text, cache.layers)
    cache.end()
    return flow


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative_rms(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.fixture(scope="module")
def recorded() -> dict[str, Tensor]:
    return load_file(GOLDEN / "dit_forward.safetensors")


def golden_flow(recorded: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """The flow of the second recorded call."""
    config = json.loads((GOLDEN / "manifest.json").read_text())["configs"]["dit"]
    dit = build_dit(config, load_file(GOLDEN / "stream_weights.safetensors")).to(dtype)
    text, cache = dit.embed_text(recorded["context"]), make_rolling_cache(dit, config, 1)
    for call in (0, 1):
        x, t = recorded[f"call{call}.x"].to(dtype), recorded[f"call{call}.t"]
        flow = run(dit, cache, x, t, text, 3 * call)
    return flow


def test_bfloat16_is_within_two_percent(recorded):
    """A norm, a sinusoid or a rotation computed in bf16, not wider: the recording itself is 0.8 % off."""
    flow = golden_flow(recorded, torch.bfloat16)
    assert flow.dtype == torch.bfloat16
    assert relative_rms(flow, recorded["call1.flow"]) < 0.02
    assert relative_rms(flow, recorded["call1.flow_bf16"]) < 0.02
    assert relative_rms(recorded["call1.flow_bf16"], recorded["call1.flow"]) < 0.01


def test_float32_with_a_timestep_per_frame_matches_the_recording(recorded):
    """One timestep for all frames of a call, or frames and samples exchanged."""
    assert (golden_flow(recorded, torch.float32) - recorded["call1.flow"]).abs().max() <= TARGET


def test_key_of_a_128_wide_head_matches_the_recording():
    """Rotary groups of 22, 21, 21 pairs (equal thirds in smaller heads hide a mistake), the norm before the
    split, the weight after rounding.
    """
    golden = load_file(GOLDEN / "rope_head128.safetensors")
    norm = RMSNorm(128, 1e-6)
    norm.weight.copy_(golden["norm_k.weight"])
    key = norm(golden["input"] @ golden["k.weight"].T + golden["k.bias"])[:, :, None]
    rotary = Rotary(rope_angles(128, torch.arange(1, 6), 3, 2))
    assert (rotary(key) - golden["key"]).abs().max() <= TARGET


@pytest.mark.parametrize("head_dim", [12, 16, 48, 128])
def test_angles_follow_the_formula(head_dim):
    """Tokens ordered column before row, a group whose frequencies go on where the last one's ended."""
    angles = rope_angles(head_dim, torch.tensor([5, 700]), ROWS, COLUMNS)
    pairs = head_dim // 2
    groups = (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3)
    expected = [[at * 10000 ** (-j / n) for at, n in zip((frame, row, column), groups) for j in range(n)]
                for frame in (5, 700) for row in range(ROWS) for column in range(COLUMNS)]
    assert angles.dtype == torch.float64
    torch.testing.assert_close(angles, torch.tensor(expected, dtype=torch.float64), atol=1e-10, rtol=0)
    assert {128: (22, 21, 21)}.get(head_dim, groups) == groups


def test_rotation_turns_interleaved_pairs_and_keeps_the_dtype():
    """Halves instead of pairs, or a rotation rounded to bf16 before the product."""
    angles = torch.tensor([[math.pi / 2, 0.0]], dtype=torch.float64)
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])[None, None, None]
    assert Rotary(angles)(x).flatten().tolist() == pytest.approx([-2.0, 1.0, 3.0, 4.0], abs=1e-6)
    far = Rotary(rope_angles(16, torch.tensor([1023]), ROWS, COLUMNS))
    x = draw(1, ROWS * COLUMNS, 2, 16).bfloat16()
    assert torch.equal(far(x), far(x.double()).bfloat16())


def test_scores_depend_on_distance_alone():
    """Relative positions (the infinity variant, the ring) stand on this."""
    q, k = draw(2, 1, ROWS * COLUMNS, 2, 16).double()

    def scores(query_frame: int, key_frame: int) -> Tensor:
        def at(frame: int) -> Rotary:
            return Rotary(rope_angles(16, torch.tensor([frame]), ROWS, COLUMNS))

        return at(query_frame)(q).flatten() @ at(key_frame)(k).flatten()

    torch.testing.assert_close(scores(7, 3), scores(1007, 1003), atol=1e-9, rtol=0)
    assert (scores(7, 3) - scores(8, 3)).abs() > 1e-3


def test_positions_end_at_1023():
    """LongLive's tables end there and its slices run short; silence would repeat or drop positions."""
    check_positions(ROPE_POSITIONS - 1)
    with pytest.raises(UserError, match="1023.*frame 1024.*relative_rope: true"):
        check_positions(ROPE_POSITIONS)


def test_unpatchify_has_the_channel_fastest():
    """Index ((pt * 2 + ph) * 2 + pw) * 16 + c: any other order shuffles pixels and channels."""
    dit, frames = random_dit(), 2
    patches = torch.arange(2 * frames * ROWS * COLUMNS * 64.0).view(2, -1, 64)
    x = dit.unpatchify(patches, 2 * ROWS, 2 * COLUMNS)
    assert x.shape == (2, 16, frames, 2 * ROWS, 2 * COLUMNS)
    for b, c, f, row, column in ((0, 0, 0, 0, 0), (1, 3, 1, 2, 5), (0, 15, 1, 3, 0)):
        token = (f * ROWS + row // 2) * COLUMNS + column // 2
        assert x[b, c, f, row, column] == patches[b, token, ((row % 2) * 2 + column % 2) * 16 + c]


def test_tokens_are_ordered_frame_row_column():
    """The rotary table and the cache count on it."""
    dit, x = random_dit(), draw(1, 16, 2, 2 * ROWS, 2 * COLUMNS)
    tokens = dit.patchify(x)
    assert tokens.shape == (1, 2 * ROWS * COLUMNS, CONFIG.dim)
    alone = dit.patchify(x[:, :, 1:, 2:4, 4:6])
    torch.testing.assert_close(tokens[:, (1 * ROWS + 1) * COLUMNS + 2], alone[:, 0])


def test_modulation_is_per_frame():
    """A shift of frame 0 that reaches frame 1."""
    x, shift, scale = draw(1, 6, 4), draw(1, 2, 1, 4, seed=2), draw(1, 2, 1, 4, seed=3)
    modulated, gated = modulate(x, shift, scale), add_gated(x, 2 * x, scale)
    for token in range(6):
        frame = token // 3
        torch.testing.assert_close(modulated[0, token],
                                   x[0, token] * (1 + scale[0, frame, 0]) + shift[0, frame, 0])
        torch.testing.assert_close(gated[0, token], x[0, token] * (1 + 2 * scale[0, frame, 0]))


def test_samples_of_a_batch_do_not_mix():
    """Batch and frames folded together come back exchanged."""
    dit = random_dit()
    x, t = draw(2, 16, 2, 2 * ROWS, 2 * COLUMNS), torch.tensor([[1000.0, 3.0], [250.0, 0.0]])
    prompt = draw(2, 4, CONFIG.text_dim, seed=2)
    together = run(dit, make_cache(dit, batch=2), x, t, dit.embed_text(prompt), 0)
    for b in range(2):
        alone = run(dit, make_cache(dit), x[b:b + 1], t[b:b + 1], dit.embed_text(prompt[b:b + 1]), 0)
        torch.testing.assert_close(together[b:b + 1], alone, atol=1e-5, rtol=0)


def test_missing_prompt_rows_are_zero_padded_and_attended():
    """LongLive has no mask: an embedding cut at the prompt's end must give what the padded one gives, and not
    what a model without the padding would.
    """
    dit, prompt = random_dit(), draw(1, 4, CONFIG.text_dim)
    padded = torch.cat([prompt, torch.zeros(1, 2, CONFIG.text_dim)], dim=1)
    short, whole = dit.embed_text(prompt), dit.embed_text(padded)
    for a, b in zip((*short.keys, *short.values), (*whole.keys, *whole.values), strict=True):
        assert torch.equal(a, b) and a.shape == (1, CONFIG.text_len, CONFIG.num_heads, CONFIG.head_dim)
        assert a[:, -1].abs().sum() > 0
    assert short.nbytes == 2 * CONFIG.num_layers * CONFIG.text_len * CONFIG.dim * 4


@pytest.mark.parametrize("shape", [(1, 7, 12), (1, 4, 11)])
def test_prompt_of_another_size_is_refused(shape):
    """Negative padding cuts rows off without a word."""
    with pytest.raises(ValueError, match="prompt embedding has shape"):
        random_dit().embed_text(torch.zeros(shape))


def test_time_embedding_has_cosines_first_in_float64():
    """Sines first, or float32 angles at t = 1000, where float32 has four digits after the point left."""
    dit = random_dit()
    seen = []
    dit.time_embedding.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    dit.embed_time(torch.tensor([[937.5, 0.0]]))
    half = CONFIG.freq_dim // 2
    angles = [937.5 * 10000 ** (-i / half) for i in range(half)]
    expected = [*map(math.cos, angles), *map(math.sin, angles)]
    assert seen[0][0, 0].tolist() == pytest.approx(expected, abs=1e-7)
    assert seen[0][0, 1].tolist() == [1.0] * half + [0.0] * half


def test_number_of_layers_and_caches_must_agree():
    """zip() would leave layers out silently."""
    dit = random_dit()
    cache = make_cache(dit)
    cache.begin(0, 1)
    with pytest.raises(ValueError, match="shorter"):
        dit(draw(1, 16, 1, 2 * ROWS, 2 * COLUMNS), torch.zeros(1, 1),
            dit.embed_text(draw(1, 1, CONFIG.text_dim)),
            cache.layers[:1])


def test_attention_is_plain_softmax_attention():
    """A scale by the wrong dimension, heads and tokens exchanged, a mask."""
    q, k, v = draw(1, 3, 2, 4), draw(1, 5, 2, 4, seed=2), draw(1, 5, 2, 4, seed=3)
    weights = (torch.einsum("bqnd,bknd->bnqk", q, k) / 2).softmax(-1)
    expected = torch.einsum("bnqk,bknd->bqnd", weights, v)
    for backend in ("cpu", "math"):
        torch.testing.assert_close(make_attention(backend)(q, k, v), expected)


@pytest.mark.parametrize("name, device, dtype, expected", [
    ("auto", CPU, torch.bfloat16, "cpu"), ("math", CPU, torch.float32, "math"),
    ("auto", CUDA, torch.bfloat16, "cudnn"),
    ("auto", CUDA, torch.float32, "efficient"), ("flash", CUDA, torch.bfloat16, "flash"),
    ("efficient", CUDA, torch.float32, "efficient"),
])
def test_attention_backend_is_named(name, device, dtype, expected):
    """`auto` in a result would not say which kernel was measured."""
    assert resolve_backend(name, device, dtype) == expected


def test_full_size_model_has_the_official_parameters():
    """A layer too many, a bias missing: 825 tensors, 1,418,996,800 parameters."""
    with torch.device("meta"):
        dit = CausalDiT(MODELS["longlive-1.3b"].dit)
    assert len(dit.state_dict()) == 825
    assert sum(parameter.numel() for parameter in dit.parameters()) == 1_418_996_800
