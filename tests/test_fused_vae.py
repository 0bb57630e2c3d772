"""The VAE's own convolutions: the order of work that the kernels follow, against PyTorch's convolutions in
float64; the fused stages against the plain ones, over a video; what is refused. On a GPU, the kernels.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Callable, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from micro import micro_config, micro_model, micro_pipeline
from torch import Tensor, nn

from longlive_opt.errors import NotAvailable, UserError
from longlive_opt.kernels import compilers, conv3d
from longlive_opt.models.specs import VAEConfig
from longlive_opt.models.vae import Head, ResidualBlock, StreamingDecoder, Upsample, WanVAE
from longlive_opt.optimizations import fused_vae
from longlive_opt.optimizations.fused_vae import FusedDecoder, FusedHead, FusedResidual, FusedUpsample


@pytest.fixture(autouse=True, scope="module")
def known_models():
    with micro_model():
        yield


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


class Case(NamedTuple):
    """A convolution of `size` (frames, height, width) and all that it reads, values that bf16 can hold."""

    plan: conv3d.Plan | conv3d.HeadPlan
    x: Tensor
    past: Tensor | None
    other: Tensor | None
    exact: Callable[[], Tensor]

    def run(self) -> Tensor:
        if isinstance(self.plan, conv3d.HeadPlan):
            return conv3d.convolve_head(self.plan, self.x, self.past)
        return conv3d.convolve(self.plan, self.x, self.past, self.other)


def draw(*shape: int, device: str = "cpu", dtype: torch.dtype = torch.float64) -> Tensor:
    """Random values of bf16, channels last."""
    x = torch.randn(*shape, device=device).bfloat16().to(dtype)
    return x.contiguous(memory_format=torch.channels_last_3d) if len(shape) == 5 else x


def causal(inputs: int, outputs: int, size: tuple[int, int, int], added: str = "", **form: Any) -> Case:
    x, past = draw(1, inputs, *size, **form), draw(1, inputs, 2, *size[1:], **form)
    weight, bias = draw(outputs, inputs, 3, 3, 3, **form) / 64, draw(outputs, **form)
    other, more = None, {}
    if added == "residual":
        other, more = draw(1, outputs, *size, **form), {"residual": True}
    elif added == "shortcut":
        other = draw(1, inputs, *size, **form)
        more = {"shortcut": draw(outputs, inputs, **form) / 16, "shortcut_bias": draw(outputs, **form)}

    def exact() -> Tensor:
        y = F.conv3d(torch.cat([past, x], 2).double(), weight.double(), bias.double(), padding=(0, 1, 1))
        if added == "residual":
            y += other
        elif added == "shortcut":
            y += F.conv3d(other.double(), more["shortcut"].double()[..., None, None, None],
                          more["shortcut_bias"].double())
        return y

    return Case(conv3d.causal_plan(weight, bias, **more), x, past, other, exact)


def doubling(channels: int, size: tuple[int, int, int], **form: Any) -> Case:
    x, past = draw(1, channels, *size, **form), draw(1, channels, 2, *size[1:], **form)
    weight, bias = draw(2 * channels, channels, 3, 1, 1, **form) / 16, draw(2 * channels, **form)

    def exact() -> Tensor:
        y = F.conv3d(torch.cat([past, x], 2).double(), weight.double(), bias.double())
        return torch.stack(y.chunk(2, 1), 3).flatten(2, 3)

    return Case(conv3d.frames_plan(weight, bias), x, past, None, exact)


def enlarging(inputs: int, outputs: int, size: tuple[int, int, int], **form: Any) -> Case:
    x, bias = draw(1, inputs, *size, **form), draw(outputs, **form)
    # Multiples of 1/64 up to 1/2: sums of four are values of bf16, too.
    weight = torch.randint(-32, 33, (outputs, inputs, 3, 3), device=x.device).to(x.dtype) / 64

    def exact() -> Tensor:
        big = [F.interpolate(frame.double(), scale_factor=2) for frame in x.unbind(2)]
        return torch.stack([F.conv2d(frame, weight.double(), bias.double(), padding=1) for frame in big], 2)

    return Case(conv3d.picture_plan(weight, bias), x, None, None, exact)


def colours(size: tuple[int, int, int], **form: Any) -> Case:
    x, past = draw(1, 96, *size, **form), draw(1, 96, 2, *size[1:], **form)
    weight, bias = draw(3, 96, 3, 3, 3, **form) / 64, draw(3, **form)
    return Case(conv3d.head_plan(weight, bias), x, past, None, lambda: F.conv3d(
        torch.cat([past, x], 2).double(), weight.double(), bias.double(), padding=(0, 1, 1)))


CASES: dict[str, Callable[..., Case]] = {
    "96": lambda **form: causal(96, 96, (4, 9, 17), **form),
    "96, odd frames, residual": lambda **form: causal(96, 96, (5, 9, 17), "residual", **form),
    "96, one frame, residual": lambda **form: causal(96, 96, (1, 16, 16), "residual", **form),
    "192": lambda **form: causal(192, 192, (3, 8, 33), **form),
    "192, residual": lambda **form: causal(192, 192, (2, 5, 3), "residual", **form),
    "192 to 384, shortcut": lambda **form: causal(192, 384, (2, 7, 18), "shortcut", **form),
    "384, residual": lambda **form: causal(384, 384, (1, 9, 7), "residual", **form),
    "frames": lambda **form: doubling(384, (3, 5, 7), **form),
    "picture, 384 to 192": lambda **form: enlarging(384, 192, (2, 5, 17), **form),
    "picture, 192 to 96": lambda **form: enlarging(192, 96, (3, 9, 7), **form),
    "colours": lambda **form: colours((6, 8, 70), **form),
    "colours, one frame": lambda **form: colours((1, 12, 9), **form),
}


@pytest.mark.parametrize("name", CASES)
def test_the_order_of_work_makes_the_convolution(name):
    """A tap, frame, channel or pixel in the wrong place, rows that are passed over and needed, an output that
    nothing writes: the tables that kernel and twin both follow.
    """
    torch.manual_seed(0)
    case = CASES[name]()
    assert (case.run() - case.exact()).abs().max() < 1e-11


def test_a_later_frame_changes_no_earlier_one():
    """Two frames of 96 channels share products; the first must not see the second."""
    case = causal(96, 96, (4, 5, 6))
    before, changed = case.run(), case.x.clone(memory_format=torch.preserve_format)
    changed[:, :, 1] += 1
    after = conv3d.convolve(case.plan, changed, case.past)
    assert torch.equal(before[:, :, 0], after[:, :, 0])
    assert all(not torch.equal(before[:, :, t], after[:, :, t]) for t in (1, 2, 3))


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_norm_leaves_the_result_and_the_history(frames):
    norm = Head(96, 3)[0]
    norm.gamma.data.normal_()
    x, past = draw(2, 96, frames, 3, 4, dtype=torch.float32), draw(2, 96, 2, 3, 4, dtype=torch.float32)
    y, new_past = conv3d.norm_silu(x, norm.gamma.view(-1), past)
    torch.testing.assert_close(y, F.silu(norm(x)))
    assert torch.equal(new_past, torch.cat([past, y], 2)[:, :, -2:])
    assert new_past.stride() == past.stride()


def test_operators_know_the_form_of_their_results():
    """A wrong shape, stride or alias under torch.compile."""
    for case in (CASES["192, residual"](), CASES["picture, 192 to 96"](), CASES["frames"]()):
        plan = case.plan
        numbers = [plan.channels, plan.step, plan.frames, plan.dense, plan.apart, plan.own, int(plan.adds)]
        torch.library.opcheck(torch.ops.longlive.vae_conv, (
            case.x.bfloat16(), None if case.past is None else case.past.bfloat16(),
            None if case.other is None else case.other.bfloat16(), plan.weight, plan.bias, plan.steps,
            plan.pieces, plan.kind, numbers))
    head = CASES["colours"]()
    torch.library.opcheck(torch.ops.longlive.vae_head, (head.x, head.past, *head.plan))
    torch.library.opcheck(torch.ops.longlive.vae_norm_silu, (head.x, torch.ones(96), head.past))


@pytest.mark.parametrize("stage, fused, channels, planned", [
    (ResidualBlock(192, 384), FusedResidual, 192, True), (ResidualBlock(96, 96), FusedResidual, 96, True),
    (Upsample(384, True), FusedUpsample, 384, True), (Upsample(192, False), FusedUpsample, 192, True),
    (Head(96, 3), FusedHead, 96, True), (ResidualBlock(8, 4), FusedResidual, 8, False),
    (Upsample(4, True), FusedUpsample, 4, False)],
    ids=["shortcut", "residual", "frames", "picture", "head", "unplanned", "unplanned frames"])
def test_stages_equal_the_plain_ones_past_the_first_call(stage, fused, channels, planned):
    """History from the wrong tensor, a first latent that is doubled in time, a residual of the normed
    input.
    """
    torch.manual_seed(1)
    for parameter in stage.parameters():
        parameter.data = torch.randn_like(parameter).mul(0.05).bfloat16().float() + (parameter.dim() == 4)
    for module in stage.modules():
        if isinstance(module, nn.Conv2d):  # summed weights that bf16 can hold
            module.weight.data = torch.randint(-8, 9, module.weight.shape).float() / 64
    history = tuple(draw(1, c, 2, 4, 6, dtype=torch.float32).zero_() for c in stage.history_channels)
    own, ours = fused(stage, planned), history
    assert own.history_channels == stage.history_channels
    for first, frames in ((True, 1), (False, 3), (False, 1), (False, 2)):
        x = draw(1, channels, frames, 4, 6, dtype=torch.float32)
        expected, history = stage(x, history, first)
        found, ours = own(x, ours, first)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
        for a, b in zip(ours, history, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item() + 1e-6)


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_a_video_equals_the_plain_decoder(chunk):
    torch.manual_seed(0)
    vae = WanVAE(VAEConfig(dim=4)).use_channels_last()
    decoders = (StreamingDecoder(vae, 1, 3, 5, chunk),
                FusedDecoder(fused_vae.fused_stages(vae.decoder, planned=False), vae, 1, 3, 5, chunk))
    for latents in (3, 3, 1, 2):
        z = torch.randn(1, latents, 16, 3, 5)
        (plain,), (fused,) = (decoder.push(z) for decoder in decoders)
        torch.testing.assert_close(fused, plain, rtol=0, atol=1e-4)
    for a, b in zip(decoders[1].history, decoders[0].history, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("keys", [
    {}, {"use_vae_offload": True}, {"use_async_vae": True, "vae_chunk_latents": 2},
    {"use_static_kv": True, "use_fused_kernels": True, "use_torch_compile": True}], ids=str)
def test_a_pipeline_with_it(keys, cheap_compile):
    """Another optimization that puts its own decoder in place of this one's."""
    size = {"height": 16, "width": 16}
    pipeline, plain = micro_pipeline(use_fused_vae=True, **keys, **size), micro_pipeline(**size)
    decoder = pipeline.make_vae_decoder()
    assert isinstance(decoder, FusedDecoder) and decoder.chunk_latents == keys.get("vae_chunk_latents", 3)
    z = torch.randn(1, 3, *pipeline.latent_shape)
    torch.testing.assert_close(decoder.push(z)[0], plain.make_vae_decoder().push(z)[0], rtol=0, atol=1e-4)
    entry, = (entry for entry in pipeline.optimizations if entry["name"] == "fused_vae")
    assert entry["exactness"] == "rounding" and entry["report"]["packed_weight_bytes"] == 0


# ---- what is refused


def test_what_the_kernels_would_misread_is_refused():
    case = CASES["192, residual"]()
    with pytest.raises(ValueError, match="adds another tensor"):
        conv3d.convolve(case.plan, case.x, case.past)
    with pytest.raises(ValueError, match="two frames of its size"):
        conv3d.convolve(case.plan, case.x, case.past[:, :, :1], case.other)
    with pytest.raises(ValueError, match="channels last"):
        conv3d.convolve(case.plan, case.x.contiguous(), case.past, case.other)
    with pytest.raises(ValueError, match="other is"):
        conv3d.convolve(case.plan, case.x, case.past, case.other[:, :, :1])
    for outputs, inputs in ((96, 64), (64, 96), (288, 96), (96, 288)):
        assert not conv3d.supported(inputs, outputs)
        with pytest.raises(ValueError, match="the kernel takes"):
            conv3d.causal_plan(torch.zeros(outputs, inputs, 3, 3, 3), torch.zeros(outputs))
    with pytest.raises(ValueError, match="shortcut"):
        conv3d.causal_plan(torch.zeros(96, 192, 3, 3, 3), torch.zeros(96), shortcut=torch.zeros(96, 192))
    with pytest.raises(ValueError, match="multiple of 4"):
        colours((1, 6, 5)).run()


@pytest.mark.parametrize("keys, says", [
    ({"vae_channels_last": False}, "vae_channels_last.*channels last"),
    ({"device": "cuda", "model_dtype": "float32"}, "use_fused_vae.*bfloat16"),
], ids=str)
def test_impossible_presets_are_refused(keys, says):
    with pytest.raises(UserError, match=says):
        micro_config(use_fused_vae=True, **keys)


def test_a_gpu_that_is_not_hopper_is_refused(monkeypatch):
    monkeypatch.setattr(compilers, "check_triton", lambda key: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(NotAvailable, match="use_fused_vae.*Hopper.*A100.*switch use_fused_vae off"):
        fused_vae.check_device(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    fused_vae.check_device(torch.device("cuda"))


def test_other_networks_are_refused():
    with torch.device("meta"):
        wan, small = WanVAE(VAEConfig()).decoder, WanVAE(VAEConfig(dim=16)).decoder
    fused_vae.check_network(wan, torch.bfloat16)
    with pytest.raises(UserError, match="bfloat16"):
        fused_vae.check_network(wan, torch.float32)
    with pytest.raises(UserError, match="from 64 to 64 channels"):
        fused_vae.check_network(small, torch.bfloat16)


def test_small_convolutions_are_left_to_cudnn(monkeypatch):
    """On 132 multiprocessors: a latent's own size fills a half of two rounds, the next ones all of theirs."""
    monkeypatch.setattr(torch.cuda, "get_device_properties",
                        lambda device: SimpleNamespace(multi_processor_count=132))
    with torch.device("meta"):
        plan = conv3d.causal_plan(torch.zeros(384, 384, 3, 3, 3), torch.zeros(384))
        shares = [fused_vae.filled(plan, torch.zeros(1, 384, t, h, w))
                  for t, h, w in ((3, 60, 104), (6, 120, 208), (12, 240, 416))]
    assert shares[0] < 0.6 and min(shares[1:]) > 0.95


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_gpu_kernel_equals_float64(name, monkeypatch):
    """An output that nothing writes, a race, a box at the edge: results over memory that held NaN."""
    case = CASES[name](device="cuda", dtype=torch.bfloat16)
    exact = case.exact()
    for make in ("_result", "_head_result"):
        plain = getattr(conv3d, make)
        monkeypatch.setattr(conv3d, make, lambda *args, plain=plain: plain(*args).fill_(float("nan")))
    found = [case.run() for _ in range(3)]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    # Half a step of bf16 is 2^-8 of a value, its RMS 0.17 % of it; the kernel's sums are in float32.
    assert (found[0].double() - exact).norm() < 2e-3 * exact.norm()
    assert ((found[0].double() - exact).abs() <= 2**-8 * exact.abs() + 1e-3).all()


@pytest.mark.gpu
@pytest.mark.parametrize("channels, frames", [(96, 5), (192, 2), (384, 1)])
def test_gpu_norm_equals_float64(channels, frames):
    form = {"device": "cuda", "dtype": torch.bfloat16}
    x, past, gamma = draw(2, channels, frames, 7, 9, **form), draw(2, channels, 2, 7, 9, **form), draw(
        channels, **form)
    x[:, :, :, 0, 0] = 0
    y, new_past = conv3d.norm_silu(x, gamma, past)
    exact = conv3d.norm_silu_reference(x.double(), gamma)
    assert (y.double() - exact).norm() < 2e-3 * exact.norm()
    assert torch.equal(new_past, torch.cat([past, y], 2)[:, :, -2:])


@pytest.mark.gpu
def test_gpu_decoder_is_as_close_to_float32_as_cudnn(monkeypatch):
    """Full width, a small picture, three blocks: history that is wrong from the second block on. The own
    kernels do also what would be left to cuDNN.
    """
    torch.manual_seed(0)
    vae = WanVAE(VAEConfig()).to("cuda", torch.bfloat16).use_channels_last()
    wide = WanVAE(VAEConfig()).cuda()
    wide.load_state_dict({name: value.float() for name, value in vae.state_dict().items()})
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(fused_vae, "LEAST_FILLED", 0)
    decoders = [StreamingDecoder(wide, 1, 7, 9), StreamingDecoder(vae, 1, 7, 9, 3),
                FusedDecoder(fused_vae.fused_stages(vae.decoder, planned=True), vae, 1, 7, 9, 3)]
    for _ in range(3):
        z = torch.randn(1, 3, 16, 7, 9, device="cuda").bfloat16()
        exact, plain, fused = (decoder.push(z.to(decoder.dtype))[0] for decoder in decoders)
        assert (fused - exact).norm() < 1.1 * (plain - exact).norm()


@pytest.mark.gpu
def test_gpu_stages_can_be_captured():
    """An allocation or a read on the host inside: a CUDA graph of the decoder replays other numbers."""
    case = CASES["96, odd frames, residual"](device="cuda", dtype=torch.bfloat16)
    expected = case.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = case.run()
    found.zero_()
    graph.replay()
    assert torch.equal(found, expected)
