"""The tiny VAE: its structure against plain functions, streaming in chunks of any size, static memory, its
files, and the presets that may use it.
"""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from micro import micro_config, micro_model, micro_pipeline
from safetensors.torch import save_file
from test_fetch import DictHub
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from longlive_opt.config import ExperimentConfig, check_baseline
from longlive_opt.errors import UserError
from longlive_opt.fetch import fetch, main, plan
from longlive_opt.files import load_yaml
from longlive_opt.measurement import decision, fidelity
from longlive_opt.measurement.fidelity import FidelitySchedule
from longlive_opt.models.specs import TINY_VAES
from longlive_opt.models.taehv import TAEHV, Grow, TAEHVDecoder, encoder_shapes
from longlive_opt.models.vae import LATENT_MEAN, LATENT_STD
from longlive_opt.models.weight_files import TINY_WEIGHTS, tiny_vae_file
from longlive_opt.models.weights import load_tiny_vae
from longlive_opt.optimizations.tiny_vae import TinyVAE
from longlive_opt.prompts import schedule_of
from longlive_opt.report.log.notes import decoder_text
from longlive_opt.report.tables import fidelity_table
from longlive_opt.streaming.session import StreamingSession

CPU = torch.device("cpu")
TAEW, LIGHT = TINY_VAES["taew2_1"], TINY_VAES["lighttaew2_1"]


@pytest.fixture(autouse=True, scope="module")
def known_models():
    with micro_model(), torch.no_grad():
        yield


@pytest.fixture(scope="module")
def vae() -> TAEHV:
    return load_tiny_vae(TAEW, None, CPU, torch.float32, seed=3)[0]


def published(state: dict[str, Tensor], latents: Tensor) -> Tensor:
    """Frames [B, T, 3, H, W] of a whole video of latents [B, T, 16, h, w], by the published list of layers in
    its order, one frame after the other: an independent form of the decoder.
    """
    kinds = {0: "clamp", 2: "relu", 21: "relu"} | dict.fromkeys((1, 8, 14, 20, 22), "conv")
    kinds |= dict.fromkeys((6, 12, 18), "up") | dict.fromkeys((7, 13, 19), "grow")

    def layer(frames: list[Tensor], index: int) -> list[Tensor]:
        def weights(part: str) -> tuple[Tensor, Tensor | None]:
            name = f"decoder.{index}.{part}"
            return state[f"{name}weight"], state.get(f"{name}bias")

        made, memory = [], torch.zeros_like(frames[0])
        for x in frames:
            match kinds.get(index, "memory"):
                case "clamp":
                    made.append(3 * torch.tanh(x / 3))
                case "relu":
                    made.append(x.clamp(min=0))
                case "conv":
                    made.append(F.conv2d(x, *weights(""), padding=1))
                case "up":
                    made.append(x.repeat_interleave(2, -1).repeat_interleave(2, -2))
                case "grow":
                    made += F.conv2d(x, *weights("conv.")).split(x.shape[1], dim=1)
                case "memory":
                    y = F.conv2d(torch.cat([x, memory], 1), *weights("conv.0."), padding=1)
                    y = F.conv2d(y.clamp(min=0), *weights("conv.2."), padding=1)
                    y = F.conv2d(y.clamp(min=0), *weights("conv.4."), padding=1)
                    made.append((y + x).clamp(min=0))
                    memory = x
        return made

    frames = list(latents.unbind(1))
    for index in range(23):
        frames = layer(frames, index)
    return torch.stack(frames[3:], 1).clamp(0, 1)


def stream(vae: TAEHV, latents: Tensor, blocks: list[int], chunk: int) -> tuple[Tensor, list[int]]:
    decoder = TAEHVDecoder(vae, len(latents), *latents.shape[-2:], chunk)
    frames = [part for block in latents.split(blocks, 1) for part in decoder.push(block)]
    return torch.cat(frames, 1), [part.shape[1] for part in frames]


@pytest.mark.parametrize("batch", [1, 2])
def test_the_structure_is_the_published_one(vae, batch):
    """A layer in the wrong place, a memory of the output, frames of two videos mixed, four frames for one."""
    latents = 2 * torch.randn(batch, 4, 16, 3, 2)
    expected = published(vae.state_dict(), latents)
    found, counts = stream(vae, latents, [3, 1], 3)
    assert counts == [9, 4] and found.shape == (batch, 13, 3, 24, 16)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert expected.std() > 0.05, "random weights that show nothing would hide every fault"


@pytest.mark.parametrize("blocks, chunk", [([3] * 4, 3), ([3] * 4, 1), ([3] * 4, 2), ([1] * 12, 1),
                                           ([12], 12), ([2, 4, 6], 5)], ids=str)
def test_chunks_of_any_size_make_the_same_video(vae, blocks, chunk):
    """A memory that is lost, or a frame too old, between chunks: past several of them."""
    latents = torch.randn(1, 12, 16, 2, 3, generator=torch.Generator().manual_seed(5))
    whole = vae(latents.transpose(1, 2), *vae.init_history(1, 2, 3, CPU, torch.float32))
    found, counts = stream(vae, latents, blocks, chunk)
    assert counts[0] == 4 * blocks[0] - 3 and counts[1:] == [4 * block for block in blocks[1:]]
    torch.testing.assert_close(found, whole[:, :, 3:].transpose(1, 2).clamp(0, 1), rtol=0, atol=1e-5)


def test_memory_keeps_its_addresses(vae):
    """A graph that was captured over memory which a later call, a reset or a continued video replaces."""
    def addresses(decoder):
        return [memory.data_ptr() for memory in decoder.history]

    decoder, other = TAEHVDecoder(vae, 1, 2, 3, 3), TAEHVDecoder(vae, 1, 2, 3, 3)
    first, second = torch.randn(2, 1, 3, 16, 2, 3)
    before, (opening,) = addresses(decoder), decoder.push(first)
    (expected,) = decoder.push(second)
    assert addresses(decoder) == before
    decoder.reset()
    assert addresses(decoder) == before and all(not memory.any() for memory in decoder.history)
    assert torch.equal(decoder.push(first)[0], opening)
    other.push(second)
    kept = addresses(other)
    other.continue_from(decoder)
    assert addresses(other) == kept and not set(kept) & set(before)
    assert torch.equal(other.push(second)[0], expected) and torch.equal(decoder.push(second)[0], expected)
    assert all(memory.is_contiguous(memory_format=torch.channels_last) for memory in decoder.history)


def test_each_call_leaves_all_state_in_its_memory(vae):
    """State that a replay of a captured call would not see: the same arguments must make the same frames."""
    z = torch.randn(1, 16, 3, 2, 3)
    memory = vae.init_history(1, 2, 3, CPU, torch.float32)
    vae(z, *memory)
    copies = [one.clone() for one in memory]
    expected = vae(z, *memory)
    vae(torch.randn(1, 16, 3, 2, 3), *vae.init_history(1, 2, 3, CPU, torch.float32))
    assert torch.equal(vae(z, *copies), expected)
    assert all(torch.equal(a, b) for a, b in zip(memory, copies, strict=True))


def test_activations_stay_channels_last(vae):
    """A reshape that makes the frames channels first: a copy in front of every convolution of the GPU."""
    found, hooks = [], []
    for layer in vae.modules():
        if isinstance(layer, (torch.nn.Conv2d, Grow)):
            hooks.append(layer.register_forward_hook(lambda layer, given, out: found.append(
                out.is_contiguous(memory_format=torch.channels_last))))
    vae(torch.randn(1, 16, 3, 2, 3), *vae.init_history(1, 2, 3, CPU, torch.float32))
    for hook in hooks:
        hook.remove()
    assert found == [True] * 38


def test_the_light_one_reads_unscaled_latents(vae):
    """Weights of the right shapes with latents of the wrong scale: pictures that look like a bad model."""
    light = load_tiny_vae(LIGHT, None, CPU, torch.float32, seed=3)[0]
    latents = torch.randn(1, 3, 16, 2, 3)
    scaled = latents * torch.tensor(LATENT_STD).view(16, 1, 1) + torch.tensor(LATENT_MEAN).view(16, 1, 1)
    found, _ = stream(light, latents, [3], 3)
    torch.testing.assert_close(found, published(vae.state_dict(), scaled), rtol=0, atol=1e-5)


def test_work_and_size():
    """Another structure of the right behaviour on small inputs. 544 GFLOP per latent frame as published, less
    three quarters of the 1x1 convolutions, which run before the enlargements here: 1.63 and 1.58 TFLOP per
    block.
    """
    with torch.device("meta"):
        module = TAEHV(TAEW)
    memory = module.init_history(1, 60, 104, "meta", torch.bfloat16)
    with FlopCounterMode(display=False) as counter:
        made = module(torch.empty(1, 16, 3, 60, 104, device="meta"),
                      *(one.float() for one in memory))
    enlarged = 2 * 60 * 104 * (4 * 256 * 256 + 16 * 128 * 256 + 2 * 64 * 64 * 128)
    assert made.shape == (1, 3, 12, 480, 832)
    assert (counter.get_total_flops() / 3 + 0.75 * enlarged) / 1e9 == pytest.approx(544, abs=0.5)
    assert counter.get_total_flops() == pytest.approx(1.58e12, rel=0.001)
    assert sum(parameter.numel() for parameter in module.parameters()) == 9_844_611
    assert sum(torch.Size(shape).numel() for shape in encoder_shapes().values()) == 1_470_928
    assert sum(one.nbytes for one in memory) / 1e6 == pytest.approx(67, abs=0.5)


# ---- files


@pytest.fixture(scope="module")
def state(vae) -> dict[str, Tensor]:
    """A file's tensors under the published names, written out here: LANDSCAPE 4b."""
    found = {f"decoder.{name}": 0 for name in ("1.weight", "1.bias", "22.weight", "22.bias", "8.weight",
                                               "14.weight", "20.weight", "7.conv.weight", "13.conv.weight",
                                               "19.conv.weight")}
    found |= {f"encoder.{name}": 0 for name in ("0.weight", "0.bias", "17.weight", "17.bias", "3.weight",
                                                "8.weight", "13.weight", "2.conv.weight", "7.conv.weight",
                                                "12.conv.weight")}
    for coder, blocks in (("decoder", (3, 4, 5, 9, 10, 11, 15, 16, 17)),
                          ("encoder", (4, 5, 6, 9, 10, 11, 14, 15, 16))):
        found |= {f"{coder}.{block}.conv.{layer}.{kind}": 0
                  for block in blocks for layer in (0, 2, 4) for kind in ("weight", "bias")}
    shapes = {name: tuple(value.shape) for name, value in vae.state_dict().items()} | encoder_shapes()
    assert shapes.keys() == found.keys()
    return {name: torch.randn(shape).half() for name, shape in shapes.items()}


@pytest.mark.parametrize("spec, suffix", [(TAEW, ".pth"), (LIGHT, ".pth"), (LIGHT, ".safetensors")],
                         ids=lambda value: getattr(value, "name", value))
def test_published_files_are_read(tmp_path, state, spec, suffix):
    """A prefix, a container or a dtype that the loader does not expect; an encoder taken for a stranger."""
    path = tmp_path / f"{spec.name}{suffix}"
    torch.save(state, path) if suffix == ".pth" else save_file(state, path)
    for place in (str(path), str(tmp_path)):
        assert tiny_vae_file(spec.name, place, "random") == path
    assert tiny_vae_file(spec.name, None, str(tmp_path)) == path
    module, report = load_tiny_vae(spec, path, CPU, torch.bfloat16)
    assert all(torch.equal(value, state[name].bfloat16()) for name, value in module.state_dict().items())
    assert report["kind"] == "files" and report["files"]["tiny_vae"]["name"] == path.name
    assert report["parameters"] == 9_844_611 and report["seed"] is None


def test_of_a_layer_with_more_frames_the_last_are_kept(tmp_path, state):
    """The first ones instead: frames that are three too old."""
    longer = torch.randn(512, 256, 1, 1)
    torch.save(state | {"decoder.7.conv.weight": longer}, tmp_path / "taew2_1.pth")
    module, _ = load_tiny_vae(TAEW, tmp_path / "taew2_1.pth", CPU, torch.float32)
    assert torch.equal(module.state_dict()["decoder.7.conv.weight"], longer[256:])


@pytest.mark.parametrize("change, says", [
    ({"decoder.3.conv.0.weight": None}, "1 missing: decoder.3.conv.0.weight"),
    ({"decoder.3.skip.weight": torch.zeros(4)}, "1 unexpected: decoder.3.skip.weight"),
    ({"decoder.1.weight": torch.zeros(256, 48, 3, 3)}, r"decoder.1.weight \[256, 48, 3, 3\] instead"),
    ({"encoder.0.weight": torch.zeros(64, 12, 3, 3)}, "1 unexpected: encoder.0.weight"),
    ({"decoder.7.conv.weight": torch.zeros(300, 256, 1, 1)}, r"decoder.7.conv.weight \[300, 256, 1, 1\]"),
    ({"decoder.22.bias": torch.zeros(3, dtype=torch.int8)}, "unusable dtype: decoder.22.bias"),
    ({"decoder.22.bias": torch.tensor([0, float("nan"), 0])}, "NaN or infinity in decoder.22.bias"),
], ids=["missing", "stranger", "other latents", "other encoder", "odd", "dtype", "nan"])
def test_files_that_do_not_fit_are_refused(tmp_path, state, change, says):
    """Weights of another TAEHV (48 channels, pixels in patches) that are loaded as far as they go."""
    path = tmp_path / "taew2_1.pth"
    torch.save({name: value for name, value in (state | change).items() if value is not None}, path)
    with pytest.raises(UserError, match=says) as error:
        load_tiny_vae(TAEW, path, CPU, torch.float32)
    assert "nan" in str(error.value).lower() or "Name taew2_1.pth as `vae_weights`" in str(error.value)


def test_the_wrong_file_is_named(tmp_path):
    """An error deep in torch.load, or the other VAE's weights, which have the same names and shapes."""
    with pytest.raises(UserError, match="'taew2_1' needs taew2_1.pth.*--what tiny_vae.*vae_weights: random"):
        tiny_vae_file("taew2_1", None, str(tmp_path))
    with pytest.raises(UserError, match="is no such file"):
        tiny_vae_file("taew2_1", str(tmp_path / "none.pth"), "random")
    for name in ("lighttaew2_1.pth", "taew2_1.pth"):
        (tmp_path / name).write_bytes(b"<html>not found")
    with pytest.raises(UserError, match="latents of another scale; set vae: lighttaew2_1"):
        tiny_vae_file("taew2_1", str(tmp_path / "lighttaew2_1.pth"), "random")
    with pytest.raises(UserError, match="is a web page, not weights; run '.*--what tiny_vae'"):
        tiny_vae_file("taew2_1", None, str(tmp_path))
    for given in ((None, "random"), ("random", str(tmp_path)), (None, TINY_WEIGHTS)):
        assert tiny_vae_file("taew2_1", *given) is None
    with pytest.raises(UserError, match="'weights/tiny' is no such file or folder that holds it"):
        tiny_vae_file("taew2_1", TINY_WEIGHTS, TINY_WEIGHTS)


def test_both_are_fetched_when_asked_for(tmp_path, caplog):
    """Fetched to where nobody looks for them, or 20 GB that come along."""
    hub = DictHub()
    for spec in TINY_VAES.values():
        hub.contents.setdefault(spec.source.repo, {})[spec.source.path] = b"\x80 weights"
    fetch(tmp_path, hub, plan(hub, "tiny_vae"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fetched.json", "lighttaew2_1.pth",
                                                                  "taew2_1.pth"]
    assert tiny_vae_file("lighttaew2_1", None, tmp_path) == tmp_path / "lighttaew2_1.pth"
    caplog.set_level(logging.INFO)
    assert main([str(tmp_path), "--what", "tiny_vae", "--dry-run"], hub) == 0 and "present" in caplog.text


# ---- presets


@pytest.mark.parametrize("keys, says", [
    ({"use_fused_vae": True}, "use_fused_vae: its kernels are those of the Wan VAE"),
    ({"use_vae_offload": True}, "use_vae_offload: it moves the Wan VAE's history"),
    ({"vae_channels_last": False}, "vae_channels_last: vae: 'taew2_1' has its channels last"),
    ({"vae": "taew2_2"}, "vae: 'taew2_2' is unknown; choose one of wan, taew2_1, lighttaew2_1"),
], ids=str)
def test_impossible_presets_are_refused(keys, says):
    with pytest.raises(UserError, match=says):
        micro_config(**{"vae": "taew2_1"} | keys)


def test_the_baseline_has_the_wan_vae():
    """A campaign whose truth was decoded by one VAE and whose baseline by another."""
    with pytest.raises(UserError, match='vae: "taew2_1" under the name'):
        check_baseline(ExperimentConfig(vae="taew2_1"))


@pytest.mark.parametrize("keys", [
    {}, {"use_async_vae": True}, {"use_early_decode": True, "use_prompt_cache": True},
    {"vae_chunk_latents": 2}, {"use_static_kv": True, "use_torch_compile": True}], ids=str)
def test_a_session_with_it(keys, cheap_compile):
    """Another optimization that puts its own decoder in place of this one's, or a video that depends on which
    of them are on: the latents are the baseline's, the frames those of the network at once.
    """
    size = {"height": 16, "width": 16}
    pipeline = micro_pipeline(vae="taew2_1", **keys, **size)
    session = StreamingSession(pipeline)
    for _ in range(2):
        chunks = list(session.stream("a red fox", 3))
        session.reset()
        latents = torch.cat([chunk.latents for chunk in chunks], 1)
        expected = published(pipeline.vae.state_dict(), latents)
        found = torch.cat([chunk.frames for chunk in chunks], 1)
        assert [chunk.frames.shape[1] for chunk in chunks] == [9, 12, 12]
        assert (found.float() - (255 * expected).floor()).abs().max() <= 1
    plain = StreamingSession(micro_pipeline(**size)).stream("a red fox", 3)
    plain = torch.cat([chunk.latents for chunk in plain], 1)
    torch.testing.assert_close(latents, plain, rtol=1e-3, atol=1e-3)
    entry, = (entry for entry in pipeline.optimizations if entry["name"] == TinyVAE.name)
    assert entry["exactness"] == "lossy" and "random weights, seed 0" in entry["report"]["done"]
    assert entry["report"]["weights"]["kind"] == "random" and isinstance(pipeline.vae, TAEHV)


def test_the_preset_works_without_graphs():
    """A key of the preset that another one of it undoes, up to a prompt switch past the first window."""
    own = load_yaml(Path(__file__).parents[1] / "params" / "tiny_vae.yaml")
    record = load_yaml(Path(__file__).parents[1] / "params" / "record.yaml")
    named = {"name", "title", "hypothesis"}
    assert {key for key in own.keys() | record.keys() if own.get(key) != record.get(key)} - named == {
        "vae", "use_fused_vae"}
    keys = {key: value for key, value in own.items() if key.startswith(("use_", "kv_", "linear_", "vae"))}
    pipeline = micro_pipeline(**keys | {"use_cuda_graphs": False, "height": 16, "width": 16})
    session, chunks = StreamingSession(pipeline), []
    for chunk in session.stream("a red fox", 6):
        chunks.append(chunk)
        if chunk.block == 4:
            session.switch_prompt("a blue whale")
    expected = published(pipeline.vae.state_dict(), torch.cat([chunk.latents for chunk in chunks], 1))
    found = torch.cat([chunk.frames for chunk in chunks], 1)
    assert any(chunk.switched for chunk in chunks[-2:])
    assert (found.float() - (255 * expected).floor()).abs().max() <= 1


def test_latents_and_frames_have_errors_of_their_own(monkeypatch):
    """One number for both: a gate on latents that seems to speak of frames, or frames of two decoders that
    are called a deviation from the baseline.
    """
    monkeypatch.setattr(fidelity.quality, "METRICS", ("psnr_db",))  # the others' packages take seconds
    monkeypatch.setattr(fidelity, "FREE_METRICS", ("psnr_db",))
    keys = {"fidelity_blocks": 2, "height": 16, "width": 16}
    baseline = micro_pipeline(**keys)
    schedule = FidelitySchedule.of(baseline.config, schedule_of(baseline.config))
    shown = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    truth, section = fidelity.establish(baseline, schedule, shown)
    assert "decoder" not in section
    tiny = micro_pipeline(vae="taew2_1", **keys)
    found = fidelity.measure(tiny, StreamingSession(tiny), schedule, truth)
    assert found["latent_error"] == section["latent_error"] and found["identical"] is False
    alone = found["decoder"]
    assert (alone["name"], alone["reference"]) == ("taew2_1", "wan")
    decoder = tiny.make_vae_decoder()
    frames = torch.cat([(255 * part).to(torch.uint8) for latents in truth.latents
                        for part in decoder.push(latents)[0]])
    mse = (frames.float() - truth.frames.float()).square().flatten(1).mean(1)
    assert alone["psnr_db"]["mean"] == pytest.approx((10 * (255**2 / mse).log10()).mean().item(), abs=0.01)
    table = fidelity_table(found, truth.facts)
    row = table.loc["decoder differs: taew2_1 on the truth's latents"]
    assert row["PSNR, dB"] == round(alone["psnr_db"]["mean"], 3) and row["latent error, %"] == ""
    assert "frames of taew2_1 are compared with those of the Wan VAE" in decoder_text(found)
    assert decoder_text(section) == ""
    rows = [{"worst_ratio": 3.0, "title": "no sink"}]
    ratios = {"flags": [], "worst_ratio": 1.0, "free_running_counts": False, "error_ratio": {"worst": 1.0}}
    passed, why = decision._passes(found | ratios, 1.6, {"quality": {"nulls": rows}})
    assert passed is True and "of the latents only, since taew2_1 makes other frames" in why


# ---- on a GPU


@pytest.mark.gpu
def test_gpu_frames_are_those_of_float32():
    """bfloat16 that loses more than its rounding, at the full width: three chunks."""
    latents = torch.randn(1, 9, 16, 30, 52, device="cuda")
    wide = load_tiny_vae(TAEW, None, "cuda", torch.float32)[0]
    narrow = load_tiny_vae(TAEW, None, "cuda", torch.bfloat16)[0]
    with fidelity.full_float32():
        expected, _ = stream(wide, latents, [3] * 3, 3)
    found, _ = stream(narrow, latents.bfloat16(), [3] * 3, 3)
    assert (found - expected).square().mean().sqrt() < 0.03 * expected.std()  # 0.013 on a CPU


@pytest.mark.gpu
def test_gpu_a_captured_call_carries_its_memory_on():
    """A replay that starts from the capture's memory, an allocation or a read on the host inside."""
    vae = load_tiny_vae(TAEW, None, "cuda", torch.bfloat16)[0]
    blocks = torch.randn(4, 1, 16, 3, 30, 52, device="cuda").bfloat16()
    memory = vae.init_history(1, 30, 52, blocks.device, torch.bfloat16)
    expected = [vae(z, *memory).clone() for z in blocks]
    for one in memory:
        one.zero_()
    given, graph = blocks[0].clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = vae(given, *memory)
    for z, frames in zip(blocks, expected, strict=True):
        given.copy_(z)
        graph.replay()
        assert torch.equal(made, frames)
