"""Wan VAE against upstream's own numbers (a tiny VAE of dim 6, float32), and against itself fed differently.

`golden/vae.safetensors` holds decoder weights, latents, what upstream decodes from them, some module outputs.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from longlive_opt.errors import UserError
from longlive_opt.models.specs import VAEConfig
from longlive_opt.models.vae import (
    LATENT_MEAN,
    LATENT_STD,
    Downsample,
    StreamingDecoder,
    WanVAE,
    decode_chunked,
    frames_to_uint8,
    latent_statistics,
    pixels_to_frames,
)

GOLDEN = Path(__file__).parent / "golden"
ENCODER_GOLDEN = GOLDEN / "vae_encoder.safetensors"
CPU = torch.device("cpu")
HEIGHT, WIDTH = 4, 6
TOLERANCE = 2e-5


def max_error(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item()


def make_vae(weights: dict[str, torch.Tensor], config: VAEConfig = VAEConfig(dim=6)) -> WanVAE:
    """A VAE with random weights, the same each time, overwritten by the given ones."""
    torch.manual_seed(0)
    vae = WanVAE(config).requires_grad_(False)
    unknown = vae.load_state_dict(weights, strict=False).unexpected_keys
    assert not unknown
    return vae


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "vae.safetensors")


@pytest.fixture
def vae(golden) -> WanVAE:
    prefix = "weights."
    return make_vae({k.removeprefix(prefix): v for k, v in golden.items() if k.startswith(prefix)})


@pytest.fixture(scope="module")
def latents(golden) -> torch.Tensor:
    return golden["latents"]


def stream(vae: WanVAE, latents: torch.Tensor, parts: list[int],
           chunk_latents: int = 1) -> list[torch.Tensor]:
    decoder = StreamingDecoder(vae, len(latents), HEIGHT, WIDTH, chunk_latents)
    return [frames for part in latents.split(parts, dim=1) for frames in decoder.push(part)]


def test_names_and_shapes_are_those_of_the_checkpoint():
    """A renamed or misshapen parameter, or a constant in the state dict, breaks loading of Wan2.1_VAE.pth."""
    with torch.device("meta"):
        vae = WanVAE(VAEConfig())
    shapes = {name: list(tensor.shape) for name, tensor in vae.state_dict().items()}
    assert shapes == json.loads((GOLDEN / "keys_vae.json").read_text())
    assert sum(parameter.numel() for parameter in vae.parameters()) == 126_892_531


def test_latent_statistics(golden):
    """A mistyped constant tints every video; 1/std taken from the unrounded std differs in a bf16 run."""
    assert max_error(torch.tensor(LATENT_MEAN), golden["mean"]) == 0
    assert max_error(torch.tensor(LATENT_STD), golden["std"]) == 0
    mean, inverse_std = latent_statistics(CPU, torch.bfloat16)
    assert torch.equal(mean.flatten(), golden["mean"].bfloat16())
    assert torch.equal(inverse_std.flatten(), 1 / golden["std"].bfloat16())


def test_decoder_matches_upstream_module_by_module(vae, golden, latents):
    """A wrong norm, order of halves, or first-latent rule shows at the module that has it."""
    outputs = {}
    for name, module in vae.decoder.named_modules():
        if f"decoder.{name}.latent0" in golden:
            module.register_forward_hook(lambda _, __, result, name=name: outputs.update({name: result[0]}))
    mean, inverse_std = latent_statistics(CPU, torch.float32)
    z = latents.transpose(1, 2) / inverse_std + mean
    history, pixels, checked = vae.init_history(1, HEIGHT, WIDTH, CPU, torch.float32), [], 0
    for index in range(z.shape[2]):
        y, history = vae.decode(z[:, :, index:index + 1], history, first=index == 0)
        pixels.append(y)
        for name, output in outputs.items():
            if (expected := golden.get(f"decoder.{name}.latent{index}")) is not None:
                assert max_error(output, expected) <= TOLERANCE, (name, index)
                checked += 1
    assert checked == sum(".latent" in name for name in golden) - 1  # upsamples.4: second latent only
    assert max_error(torch.cat(pixels, dim=2), golden["decode_raw"]) <= TOLERANCE


def test_stream_in_blocks_is_bitwise_the_stream_in_one_go(vae, golden, latents):
    """History lost, or counted twice, at the edge of a block; a slip in unscaling or clamping."""
    whole, = stream(vae, latents, [7])
    parts = stream(vae, latents, [3, 3, 1])
    assert [part.shape[1] for part in parts] == [9, 12, 4]
    assert torch.equal(torch.cat(parts, dim=1), whole)
    assert max_error(whole, pixels_to_frames(golden["decode_raw"])) <= TOLERANCE
    assert max_error(whole[:, -3:], golden["decode_pixel.tail"]) <= TOLERANCE


@pytest.mark.parametrize("parts, chunk_latents", [([3, 3, 1], 3), ([7], 3), ([7], 6), ([1, 2, 4], 2)])
def test_several_latents_a_call_decode_the_same(vae, latents, parts, chunk_latents):
    """Two temporal upsamplers in a row put frames of neighbouring latents in the wrong order."""
    whole, = stream(vae, latents, [7])
    assert max_error(torch.cat(stream(vae, latents, parts, chunk_latents), dim=1), whole) <= TOLERANCE


def test_samples_of_a_batch_do_not_mix(vae, latents):
    """Frames folded into the batch come back with batch and time exchanged."""
    batch = torch.cat([latents[:, :4], latents[:, 3:]])
    together, = stream(vae, batch, [4], chunk_latents=3)
    for sample, frames in zip(batch.split(1), together.split(1)):
        alone, = stream(vae, sample, [4], chunk_latents=3)
        assert max_error(frames, alone) <= TOLERANCE


def test_decode_chunked_forgets_the_past_as_upstream_does(vae, golden, latents):
    """The infinity quirk: history kept across chunks, or four frames from the first latent of a chunk."""
    frames = decode_chunked(vae, latents, chunk=3)
    expected = torch.cat([pixels_to_frames(golden["decode_raw"][:, :, :9]),
                          golden["decode_chunked3_pixel.from9"]], dim=1)
    assert max_error(frames, expected) <= TOLERANCE


@pytest.mark.parametrize("channels_last", [False, True])
def test_history_is_constant_in_shape_strides_and_memory(vae, latents, channels_last):
    """A history that grows, changes its layout, or keeps a whole input alive breaks graphs and memory."""
    vae = vae.bfloat16()
    if channels_last:
        vae.use_channels_last()
    decoder = StreamingDecoder(vae, 1, HEIGHT, WIDTH, chunk_latents=3)
    layout = [(h.shape, h.stride()) for h in decoder.history]
    assert len(layout) == 32
    for part in latents.bfloat16().split([1, 3, 2, 1], dim=1):
        decoder.push(part)
        assert [(h.shape, h.stride()) for h in decoder.history] == layout
        assert all(h.untyped_storage().nbytes() == h.nbytes for h in decoder.history)
        if channels_last:
            assert all(h.is_contiguous(memory_format=torch.channels_last_3d) for h in decoder.history)


def test_channels_last_gives_the_same_frames(vae, latents):
    """A reshape that is right in one memory layout only."""
    whole, = stream(vae, latents, [7])
    parts = stream(vae.use_channels_last(), latents, [3, 4], chunk_latents=3)
    assert max_error(torch.cat(parts, dim=1), whole) <= TOLERANCE


def test_reset_starts_a_new_video(vae, latents):
    """History or the first-latent rule left over from the last video."""
    decoder = StreamingDecoder(vae, 1, HEIGHT, WIDTH)
    before, = decoder.push(latents[:, :3])
    assert decoder.flush() == []
    decoder.reset()
    after, = decoder.push(latents[:, :3])
    assert torch.equal(before, after)


def test_history_is_handed_over(vae, latents):
    """Old and new history side by side: 1.9 GB more at full size. A history that was not given away stays."""
    history = vae.init_history(1, HEIGHT, WIDTH, CPU, torch.float32)
    given, z = list(history), latents[:, :1].transpose(1, 2)
    expected, _ = vae.decode(z, history, first=True)
    found, _ = vae.decode(z, given, first=True)
    assert torch.equal(found, expected) and given == [] and len(history) == 32


def test_decoder_continues_from_another(vae, latents):
    """A fork that shares memory with the decoder it came from, or that starts a new video."""
    first, second = (StreamingDecoder(vae, 1, HEIGHT, WIDTH) for _ in range(2))
    first.push(latents[:, :3])
    second.continue_from(first)
    expected, = second.push(latents[:, 3:6])
    assert expected.shape[1] == 12
    found, = first.push(latents[:, 3:6])
    assert torch.equal(found, expected)


def test_failed_push_is_not_continued(vae, latents):
    """Frames from an empty history, as if a new video had begun."""
    decoder = StreamingDecoder(vae, 1, HEIGHT, WIDTH)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(vae, "decode", raise_memory_error)
        decoder.push(latents[:, :3])
    with pytest.raises(RuntimeError, match="reset"):
        decoder.push(latents[:, :3])
    decoder.reset()
    assert decoder.push(latents[:, :3])[0].shape[1] == 9


def raise_memory_error(*_) -> None:
    raise MemoryError


def test_bfloat16_stays_close_to_float32(vae, latents):
    """A float32 constant that does not follow the model's dtype, or a norm that overflows in bf16."""
    whole, = stream(vae, latents, [7])
    rounded, = stream(vae.bfloat16(), latents.bfloat16(), [7])
    assert rounded.dtype == torch.float32
    assert (rounded - whole).norm() / whole.norm() < 0.03


def test_decode_compiles_without_a_graph_break():
    """Hidden state or data-dependent control flow in the decoder's hot path."""
    vae = make_vae({}, VAEConfig(dim=2, num_res_blocks=1))
    compiled = torch.compile(vae.decode, fullgraph=True, backend="eager")
    z = torch.randn(1, 16, 4, 2, 2)
    history = expected_history = vae.init_history(1, 2, 2, CPU, torch.float32)
    for part, first in ((z[:, :, :1], True), (z[:, :, 1:], False)):
        expected, expected_history = vae.decode(part, expected_history, first)
        pixels, history = compiled(part, history, first)
        assert torch.equal(pixels, expected)
        assert all(map(torch.equal, history, expected_history))


def encode_whole(vae: WanVAE, video: torch.Tensor) -> torch.Tensor:
    """The whole-sequence form: causal convolutions over all frames, frame 0 untouched by temporal strides."""
    x, zeros = video, list(vae.encoder.init_history(len(video), *video.shape[-2:], CPU, video.dtype,
                                                    torch.contiguous_format))
    for stage in vae.encoder.stages():
        history = tuple(zeros.pop(0) for _ in stage.history_channels)
        x, _ = stage(x, history, first=True)  # `first`: a temporal Downsample halves the space only
        if isinstance(stage, Downsample) and stage.time_conv is not None and x.shape[2] > 1:
            x = torch.cat([x[:, :, :1], stage.time_conv(x)], dim=2)
    mean, std = (torch.tensor(values).view(-1, 1, 1, 1) for values in (LATENT_MEAN, LATENT_STD))
    return ((vae.conv1(x)[:, :16] - mean) / std).transpose(1, 2)


@pytest.mark.parametrize("frames, kept", [(1, 1), (4, 1), (5, 5), (15, 13)])
def test_encode_in_calls_equals_the_whole_sequence(frames, kept):
    """The wrong frame of the past in a temporal stride, or the wrong frames dropped at the end."""
    vae = make_vae({}, VAEConfig(dim=4))
    video = torch.rand(2, 3, frames, 16, 24) * 2 - 1
    assert max_error(vae.encode(video), encode_whole(vae, video[:, :, :kept])) <= TOLERANCE


@pytest.mark.skipif(not ENCODER_GOLDEN.exists(), reason=f"{ENCODER_GOLDEN.name} (1.1 MB) is not committed")
def test_encode_matches_upstream():
    """Padding on the wrong side, log variance taken for the mean, or scaling the wrong way round."""
    golden = load_file(ENCODER_GOLDEN)
    prefix = "weights."
    vae = make_vae({k.removeprefix(prefix): v for k, v in golden.items() if k.startswith(prefix)})
    assert max_error(vae.encode(golden["clip"]), golden["encode"]) <= TOLERANCE


def test_frames_are_truncated_to_uint8():
    """Rounding instead of truncating shifts half of all pixels by one."""
    frames = torch.tensor([0.0, 0.999 / 255, 0.9999, 1.0])
    assert frames_to_uint8(frames).tolist() == [0, 0, 254, 255]


def test_wrong_inputs_are_refused_at_the_door(vae, latents):
    """A wrong shape that broadcasts or fails deep inside a convolution."""
    decoder = StreamingDecoder(vae, 1, HEIGHT, WIDTH)
    for wrong in (latents[0], latents[:, :0], latents[:, :, :15], latents[..., :5], latents.transpose(1, 2)):
        with pytest.raises(ValueError, match="latents: expected"):
            decoder.push(wrong)
    with pytest.raises(ValueError, match="bfloat16"):
        decoder.push(latents.bfloat16())
    with pytest.raises(ValueError, match="decoded alone"):
        vae.decode(latents.transpose(1, 2), decoder.history, first=True)
    with pytest.raises(UserError, match="multiples of 8"):
        vae.encode(torch.zeros(1, 3, 1, 16, 20))
    with pytest.raises(UserError, match="video: expected"):
        vae.encode(torch.zeros(1, 4, 1, 16, 16))
    with pytest.raises(UserError, match="chunk_latents"):
        StreamingDecoder(vae, 1, HEIGHT, WIDTH, chunk_latents=0)
    with pytest.raises(UserError, match="chunk: 0"):
        decode_chunked(vae, latents, chunk=0)
    with pytest.raises(ValueError, match="VAEConfig"):
        WanVAE(VAEConfig(dim=4, dim_mult=(1, 2, 4), temporal_downsample=(True, True)))
