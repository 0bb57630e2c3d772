"""The VAE's convolutions in 8 bit: the order of work against PyTorch's convolutions in float64, on numbers
that e4m3 can hold; rounding, scales and history; the decoder, whole. On a GPU, the kernels.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, Callable

import pytest
import torch
import torch.nn.functional as F
from micro import micro_config, micro_model, micro_pipeline
from test_fused_vae import Case, draw
from torch import Tensor

from longlive_opt.errors import UserError
from longlive_opt.files import load_yaml
from longlive_opt.kernels import conv3d
from longlive_opt.measurement import fidelity
from longlive_opt.measurement.fidelity import FidelitySchedule
from longlive_opt.models.specs import VAEConfig
from longlive_opt.models.vae import ResidualBlock, StreamingDecoder, WanVAE
from longlive_opt.optimizations.fused_vae import FusedDecoder, FusedDecoders, FusedResidual, fused_stages
from longlive_opt.optimizations.quantized_vae import QuantizedResidual, quantized_stages
from longlive_opt.prompts import schedule_of
from longlive_opt.streaming.session import StreamingSession


@pytest.fixture(autouse=True, scope="module")
def known_models():
    with micro_model():
        yield


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def draw8(*shape: int, device: str = "cpu", dtype: torch.dtype = torch.float64) -> Tensor:
    """Random values of e4m3 with outliers, channels last."""
    x = torch.randn(*shape, device=device)
    x.view(-1)[::97] *= 50
    return conv3d.to_e4m3(x).to(dtype).contiguous(memory_format=torch.channels_last_3d)


def causal8(inputs: int, outputs: int, size: tuple[int, int, int], added: str = "", unit: float = 16.0,
            device: str = "cpu") -> Case:
    """As `test_fused_vae.causal`. The weights are small integers, times a power of two per output."""
    cuda = device == "cuda"
    narrow, wide = (conv3d.E4M3, torch.bfloat16) if cuda else (torch.float64, torch.float64)
    x, past = (draw8(1, inputs, frames, *size[1:], device=device, dtype=narrow) for frames in (size[0], 2))
    powers = 2.0**torch.randint(-9, -4, (outputs,), device=device)
    weight = torch.randint(-8, 9, (outputs, inputs, 3, 3, 3), device=device) * powers.view(-1, 1, 1, 1, 1)
    bias, other, more = draw(outputs, device=device).float(), None, {}
    if added == "residual":
        other, more = draw(1, outputs, *size, device=device, dtype=wide), {"residual": True}
    elif added == "shortcut":
        other = draw(1, inputs, *size, device=device, dtype=wide)
        more = {"shortcut": draw(outputs, inputs, device=device).float() / 16,
                "shortcut_bias": draw(outputs, device=device).float()}

    def exact() -> Tensor:
        whole = torch.cat([past.double(), x.double()], 2) / unit
        y = F.conv3d(whole, weight.double(), bias.double(), padding=(0, 1, 1))
        if added == "residual":
            y += other
        elif added == "shortcut":
            y += F.conv3d(other.double(), more["shortcut"].double()[..., None, None, None],
                          more["shortcut_bias"].double())
        return y

    return Case(conv3d.causal_plan(weight, bias, unit=unit, **more), x, past, other, exact)


CASES: dict[str, Callable[..., Case]] = {
    "96": lambda **form: causal8(96, 96, (4, 9, 17), **form),
    "96, odd frames, residual": lambda **form: causal8(96, 96, (5, 9, 17), "residual", **form),
    "96, one frame, residual": lambda **form: causal8(96, 96, (1, 16, 16), "residual", **form),
    "192": lambda **form: causal8(192, 192, (3, 8, 33), **form),
    "192, residual": lambda **form: causal8(192, 192, (2, 5, 3), "residual", unit=0.5, **form),
    "192 to 384": lambda **form: causal8(192, 384, (2, 7, 18), **form),
    "192 to 384, shortcut": lambda **form: causal8(192, 384, (2, 7, 18), "shortcut", **form),
    "384, residual": lambda **form: causal8(384, 384, (1, 9, 7), "residual", **form),
    "384, many tiles, residual": lambda **form: causal8(384, 384, (3, 30, 52), "residual", **form),
}


@pytest.mark.parametrize("name", [name for name in CASES if "many" not in name])
def test_the_order_of_work_makes_the_convolution(name):
    """A scale that is missing in the bias, the residual or the shortcut; a step of a tail that one consumer
    computes too little or too often; channels past the last one.
    """
    torch.manual_seed(0)
    case = CASES[name]()
    assert case.plan.weight.dtype == conv3d.E4M3 and (case.plan.tail is None) == (case.other is None)
    exact = case.exact()
    assert (case.run() - exact).abs().max() < 1e-6 * exact.abs().max()  # a bias in units is float32


def test_weights_use_the_upper_octave_of_their_format():
    """A scale that is no power of two, that overflows, or that wastes a bit of e4m3."""
    weight = torch.randn(64, 7, 3, 3, 3) * torch.logspace(-6, 3, 64).view(-1, 1, 1, 1, 1)
    weight[0], weight[1], weight[2] = 0, 448 / 2**20, 449 / 2**20
    scale = conv3d.weight_scale(weight)
    largest = weight.flatten(1).abs().amax(1) / scale
    assert torch.equal(torch.frexp(scale)[0], torch.full((64,), 0.5)) and scale[0] == 1
    assert ((largest[1:] > 224) & (largest[1:] <= 448)).all()
    rounded = conv3d.rounded_weight(weight)
    assert ((rounded - weight).abs() <= weight.abs() / 16 + scale.view(-1, 1, 1, 1, 1) * 2**-10).all()
    assert torch.equal(conv3d.rounded_weight(rounded), rounded)
    assert torch.equal(conv3d.rounded_weight(rounded.bfloat16()).float(), rounded), "not exact in bf16"


@pytest.mark.parametrize("size", [1e-4, 1.0, 30.0])
def test_no_input_makes_a_norm_overflow(size):
    """NaN where a pixel has all of its norm in one channel, or numbers too small for e4m3."""
    gamma, x = torch.full((96,), size), torch.zeros(1, 96, 1, 2, 2)
    gamma[3] *= 2
    x[:, 3], x[:, :, :, 0, 0] = 1e4, torch.randn(1, 96, 1)
    unit = conv3d.norm_unit(gamma)
    y, _ = conv3d.norm_silu(x, gamma, torch.zeros(1, 96, 2, 2, 2).to(conv3d.E4M3), unit)
    exact = conv3d.norm_silu_reference(x.double(), gamma)
    assert 100 < y.float().max() <= 448
    assert ((y.double() / unit - exact).abs() <= exact.abs() / 16 + 2**-10 / unit).all()
    assert conv3d.to_e4m3(torch.tensor([1e9, -1e9])).float().tolist() == [448, -448]
    assert conv3d.norm_unit(torch.zeros(96)) == 1


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_history_is_in_8_bit_and_that_of_the_result(frames):
    x, past = draw(2, 96, frames, 3, 4, dtype=torch.float32), draw8(2, 96, 2, 3, 4).to(conv3d.E4M3)
    y, new_past = conv3d.norm_silu(x, torch.randn(96), past, 16.0)
    assert y.dtype == new_past.dtype == conv3d.E4M3 and new_past.stride() == past.stride()
    assert torch.equal(new_past.float(), torch.cat([past.float(), y.float()], 2)[:, :, -2:])


def test_operators_know_the_form_of_their_results():
    """A wrong dtype, shape or stride under torch.compile."""
    for name in ("96, odd frames, residual", "192"):
        case = CASES[name]()
        plan = case.plan
        numbers = [plan.channels, plan.step, plan.frames, plan.dense, plan.apart, plan.own, int(plan.adds)]
        inputs = (case.x.to(conv3d.E4M3), case.past.to(conv3d.E4M3),
                  None if case.other is None else case.other.bfloat16())
        found = conv3d.convolve(plan, *inputs)
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.double(), case.exact(), rtol=2**-8, atol=1e-2)
        torch.library.opcheck(torch.ops.longlive.vae_conv, (
            *inputs, plan.weight, plan.bias, plan.steps, plan.pieces, plan.kind, numbers, plan.tail),
            test_utils="test_faketensor")  # the others compare in e4m3, which PyTorch cannot


def block(inputs: int, outputs: int) -> ResidualBlock:
    stage = ResidualBlock(inputs, outputs)
    for parameter in stage.parameters():
        parameter.data = torch.randn_like(parameter).mul(0.05) + (parameter.dim() == 4)
    return stage.to(torch.bfloat16)


@pytest.mark.parametrize("inputs, outputs", [(96, 96), (192, 384)])
def test_emulation_equals_the_plan_past_the_first_call(inputs, outputs):
    """A CPU run that rounds otherwise than the kernels, or a history that a call of one frame spoils."""
    torch.manual_seed(1)
    stage = block(inputs, outputs)
    planned, emulated, fused = (QuantizedResidual(stage, True), QuantizedResidual(stage, False),
                                FusedResidual(stage, False))
    histories = [tuple(draw(1, c, 2, 4, 6).zero_().to(dtype) for c in stage.history_channels)
                 for dtype in (conv3d.E4M3, conv3d.E4M3, torch.bfloat16)]
    for first, frames in ((True, 1), (False, 3), (False, 1), (False, 2)):
        x = draw(1, inputs, frames, 4, 6, dtype=torch.bfloat16)
        found = []
        for i, own in enumerate((planned, emulated, fused)):
            y, histories[i] = own(x, histories[i], first)
            found.append((y - (x if inputs == outputs else 0)).float())
        size = found[2].norm()
        # Rounding to bf16 between the two convolutions tips an 8-bit number over, now and then.
        assert (found[0] - found[1]).norm() < 0.02 * size
        assert 0.01 * size < (found[1] - found[2]).norm() < 0.08 * size
        assert all(h.dtype == conv3d.E4M3 for history in histories[:2] for h in history)
        assert torch.equal(histories[0][0].float(), histories[1][0].float())


def micro_decoders(chunk: int) -> tuple[StreamingDecoder, FusedDecoder]:
    torch.manual_seed(0)
    vae = WanVAE(VAEConfig(dim=4)).use_channels_last()
    stages = quantized_stages(fused_stages(vae.decoder, planned=False), vae.decoder, planned=False)
    return StreamingDecoder(vae, 1, 3, 5), FusedDecoders(stages, vae, 3, 5, chunk)()


def test_a_video_is_close_to_the_plain_decoder_however_it_is_cut():
    """History that another number of latents per call reads differently, or in another dtype."""
    (plain, whole), (_, single) = micro_decoders(3), micro_decoders(1)
    for latents in (3, 3, 1, 2):
        z = torch.randn(1, latents, 16, 3, 5)
        exact, found, other = (decoder.push(z)[0] for decoder in (plain, whole, single))
        assert 1e-3 < (found - exact).norm() / exact.norm() < 0.1  # 4 channels average little
        # Another order of sums tips an 8-bit number over, now and then.
        assert (found - other).norm() < 0.4 * (found - exact).norm()
        assert {h.dtype for h in whole.history} == {torch.float32, conv3d.E4M3}
    before = [h.dtype for h in whole.history]
    whole.reset()
    assert [h.dtype for h in whole.history] == before and not any(h.float().any() for h in whole.history)


def test_which_layers_are_in_8_bit():
    """A block at the latents' size, the enlargements or the head in 8 bit."""
    decoder = WanVAE(VAEConfig(dim=4)).decoder
    stages = quantized_stages(fused_stages(decoder, planned=False), decoder, planned=False)
    kinds = [type(stage).__name__ for stage in stages]
    blocks = [kind for kind, _ in itertools.groupby(kinds)]
    assert kinds.count("QuantizedResidual") == 9
    assert blocks == ["CausalConv3d", "FusedResidual", "AttentionBlock", "FusedResidual", "FusedUpsample",
                      *["QuantizedResidual", "FusedUpsample"] * 2, "QuantizedResidual", "FusedHead"]


@pytest.mark.parametrize("keys", [
    {}, {"use_vae_offload": True}, {"use_async_vae": True, "vae_chunk_latents": 2},
    {"use_early_frames": True}], ids=str)
def test_a_pipeline_with_it(keys):
    """Another optimization that puts its own decoder in place of this one's, or its own history."""
    size = {"height": 16, "width": 16}
    pipeline, plain = (micro_pipeline(use_fused_vae=True, use_quantized_vae=wanted, **keys, **size)
                       for wanted in (True, False))
    decoder, exact = pipeline.make_vae_decoder(), plain.make_vae_decoder()
    assert isinstance(decoder, FusedDecoder)
    for _ in range(2):
        z = torch.randn(1, 3, *pipeline.latent_shape)
        found, expected = decoder.push(z)[0], exact.push(z)[0]
        assert 1e-4 < (found - expected).norm() / expected.norm() < 0.1
    assert conv3d.E4M3 in {h.dtype for h in decoder.history}
    entry, = (entry for entry in pipeline.optimizations if entry["name"] == "quantized_vae")
    assert entry["exactness"] == "lossy" and "12 convolutions" in entry["report"]["done"]
    assert "fused_vae" in [entry["name"] for entry in pipeline.optimizations]


def test_its_frames_have_an_error_of_their_own(monkeypatch):
    """A gate on latents that seems to speak of the frames, which are another decoder's."""
    monkeypatch.setattr(fidelity.quality, "METRICS", ("psnr_db",))
    monkeypatch.setattr(fidelity, "FREE_METRICS", ("psnr_db",))
    keys = {"fidelity_blocks": 2, "height": 16, "width": 16}
    baseline = micro_pipeline(**keys)
    schedule = FidelitySchedule.of(baseline.config, schedule_of(baseline.config))
    shown = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    truth, section = fidelity.establish(baseline, schedule, shown)
    eight_bit = micro_pipeline(**keys, use_fused_vae=True, use_quantized_vae=True)
    found = fidelity.measure(eight_bit, StreamingSession(eight_bit), schedule, truth)
    assert found["latent_error"] == section["latent_error"]
    assert found["decoder"]["name"] == "the Wan VAE in 8 bit"
    assert 15 < found["decoder"]["psnr_db"]["mean"] < 60


# ---- what is refused


@pytest.mark.parametrize("keys, says", [
    ({}, "use_quantized_vae: .* switch on use_fused_vae as well"),
    ({"vae": "taew2_1"}, "use_quantized_vae: .* 'taew2_1' decodes instead; switch it off"),
], ids=str)
def test_impossible_presets_are_refused(keys, says):
    with pytest.raises(UserError, match=says):
        micro_config(use_quantized_vae=True, **keys)


def test_the_preset_is_record_with_one_key():
    own, record = (load_yaml(Path(__file__).parents[1] / "params" / f"{name}.yaml")
                   for name in ("fp8_vae", "record"))
    named = {"name", "title", "hypothesis"}
    assert {key for key in own.keys() | record.keys() if own.get(key) != record.get(key)} - named == {
        "use_quantized_vae"}


# ---- on a GPU

CUDA: dict[str, Any] = {"device": "cuda"}


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_gpu_kernel_equals_float64(name, monkeypatch):
    """An output that nothing writes, a race, a box at the edge: results over memory that held NaN."""
    torch.manual_seed(0)
    case = CASES[name](**CUDA)
    exact, plain = case.exact(), conv3d._result
    monkeypatch.setattr(conv3d, "_result", lambda *args: plain(*args).fill_(float("nan")))
    found = [case.run() for _ in range(3)]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    # All operands are exact. The sums keep some 14 bits and are cut, not rounded, at each of up to 324
    # products of 32 channels, that is by 2^-14 of the sum at most 324 times. One missing product of 32
    # channels would be 1 / 18 of the result.
    assert (found[0].double() - exact).norm() < 2e-2 * exact.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in CASES if "residual" in name])
def test_gpu_residual_is_not_rounded(name):
    """A residual that loses bits to the scale or to the sums of 8-bit products."""
    case = CASES[name](**CUDA)
    size = case.plan.bias.shape[1]
    silent = case.plan._replace(bias=torch.stack([torch.zeros(size, device="cuda"), case.plan.bias[1]]))
    zeros = [torch.zeros_like(t.float()).to(conv3d.E4M3) for t in (case.x, case.past)]
    assert torch.equal(conv3d.convolve(silent, *zeros, case.other), case.other)


@pytest.mark.gpu
@pytest.mark.parametrize("channels, frames", [(96, 5), (192, 2), (384, 1)])
def test_gpu_norm_equals_float64(channels, frames):
    """Another rounding than to the nearest, infinity or NaN instead of 448, a history of something else."""
    form = {"device": "cuda", "dtype": torch.bfloat16}
    x, gamma = draw(2, channels, frames, 7, 9, **form), draw(channels, **form)
    past = draw8(2, channels, 2, 7, 9, device="cuda", dtype=conv3d.E4M3)
    x[:, :, :, 0, 0] = 0
    unit = conv3d.norm_unit(gamma)
    y, new_past = conv3d.norm_silu(x, gamma, past, unit)
    exact = conv3d.norm_silu_reference(x.double(), gamma)
    assert y.dtype == conv3d.E4M3 and y.is_contiguous(memory_format=torch.channels_last_3d)
    assert ((y.double() / unit - exact).abs() <= 1.01 * (exact.abs() / 16).clamp(min=2**-10 / unit)).all()
    assert torch.equal(new_past.float(), torch.cat([past.float(), y.float()], 2)[:, :, -2:])
    large, _ = conv3d.norm_silu(x, gamma, past, 2.0**12)
    assert large.float().isfinite().all() and large.float().max() == 448


@pytest.mark.gpu
def test_gpu_decoder_is_as_close_to_float32_as_its_emulation(monkeypatch):
    """Full width, a small picture, three blocks: history that is wrong from the second block on."""
    torch.manual_seed(0)
    vae = WanVAE(VAEConfig()).to("cuda", torch.bfloat16).use_channels_last()
    wide = WanVAE(VAEConfig()).cuda().use_channels_last()
    wide.load_state_dict({name: value.float() for name, value in vae.state_dict().items()})
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    decoders = [StreamingDecoder(wide, 1, 7, 9), *(
        FusedDecoders(quantized_stages(fused_stages(own.decoder, planned), own.decoder, planned), own, 7, 9,
                      3)() for own, planned in ((wide, False), (vae, True)))]
    for _ in range(3):
        z = torch.randn(1, 3, 16, 7, 9, device="cuda").bfloat16()
        exact, emulated, found = (decoder.push(z.to(decoder.dtype))[0] for decoder in decoders)
        assert found.isfinite().all()
        assert (found - exact).norm() < 1.25 * (emulated - exact).norm()


@pytest.mark.gpu
def test_gpu_stages_can_be_captured():
    """An allocation or a read on the host inside: a CUDA graph of the decoder replays other numbers."""
    case = CASES["96, odd frames, residual"](**CUDA)
    expected = case.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = case.run()
    found.zero_()
    graph.replay()
    assert torch.equal(found, expected)
