"""Claims about the frame metrics: the traps are silent broadcasts, data ranges, infinities and black
frames."""

import hashlib
import json
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from longlive_opt.errors import UserError
from longlive_opt.measurement import quality
from longlive_opt.measurement.result import is_na
from longlive_opt.report import video


@pytest.fixture
def clip():
    """uint8 [5,3,40,48]: smooth and not constant."""
    generator = torch.Generator().manual_seed(0)
    small = torch.rand(5, 3, 5, 6, generator=generator)
    return (torch.nn.functional.interpolate(small, scale_factor=8, mode="bilinear") * 255).to(torch.uint8)


@pytest.fixture(autouse=True)
def no_local_weights(monkeypatch, tmp_path):
    """No test may depend on what lies in this machine's caches."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hf"))


def noisy(clip, amount, seed=1):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(clip.shape, generator=generator) * amount
    return (clip.float() + noise).clamp(0, 255).to(torch.uint8)


def compare(reference, variant, **options):
    return quality.compare(reference, variant, **({"weights_kind": "random"} | options))


def test_values_are_those_of_torchmetrics_frame_by_frame(clip):
    """Would catch: a video taken for a volume, one average over frames, or a missing data_range."""
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    variant = noisy(clip, 8) // 2
    found = compare(clip, variant)
    for index in range(5):
        a, b = clip[index:index + 1].float() / 255, variant[index:index + 1].float() / 255
        assert found["psnr_db"]["per_frame"][index] == pytest.approx(
            peak_signal_noise_ratio(b, a, data_range=1.0).item(), rel=1e-4)
        assert found["ssim"]["per_frame"][index] == pytest.approx(
            structural_similarity_index_measure(b, a, data_range=1.0).item(), rel=1e-4)
    assert found["ssim"]["mean"] == pytest.approx(np.mean(found["ssim"]["per_frame"]))
    json.dumps(found, allow_nan=False)


def test_identical_clips_have_no_psnr_and_perfect_scores(clip):
    """Would catch: Infinity in result.json."""
    found = compare(clip, clip.clone())
    assert found["identical"] is True and found["psnr_db"]["mean"] is None
    assert found["psnr_db"]["per_frame"] == [None] * 5
    assert found["ssim"]["mean"] == found["ssim"]["min"] == 1.0
    assert found["flags"] == []
    json.dumps(found, allow_nan=False)


def test_one_equal_frame_does_not_make_the_mean_infinite(clip):
    """Would catch: a first block that is exact and drowns the rest."""
    variant = noisy(clip, 8)
    variant[0] = clip[0]
    found = compare(clip, variant)
    assert found["identical"] is False and found["psnr_db"]["per_frame"][0] is None
    assert found["psnr_db"]["mean"] == pytest.approx(np.mean(found["psnr_db"]["per_frame"][1:]))


def test_the_worst_frame_is_named(clip):
    """Would catch: one broken frame hidden in a good mean, or named by its place in the sample."""
    variant = noisy(clip, 2)
    variant[4] = noisy(clip, 60)[4]
    assert compare(clip, variant)["psnr_db"]["worst_frame"] == 4
    found = compare(clip, variant, max_frames=3)
    assert found["frame_indices"] == [0, 2, 4] and found["ssim"]["worst_frame"] == 4
    assert (found["frames_compared"], found["frames_total"]) == (3, 5)
    assert compare(clip, variant, max_frames=1)["frame_indices"] == [0]


def test_identity_is_judged_on_all_frames(clip):
    """Would catch: "bit-exact" from a sample that skips the frame that differs."""
    variant = clip.clone()
    variant[1, 0, 0, 0] ^= 1
    found = compare(clip, variant, max_frames=2)
    assert found["identical"] is False and found["psnr_db"]["mean"] is None
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("change", [lambda c: c[:1], lambda c: c[:, :, :20], lambda c: c.float() / 255,
                                    lambda c: c[:, :1], lambda c: c.unsqueeze(0), lambda c: c[:0],
                                    lambda c: c.to(torch.int64)])
def test_clips_that_do_not_match_are_refused(clip, change):
    """Would catch: 2 frames against 1, which broadcasts to a plausible 7.77 dB."""
    with pytest.raises(UserError):
        compare(clip, change(clip))


@pytest.mark.parametrize(("value", "words"), [
    (float("nan"), "frame 3 .*not finite"), (float("inf"), "not finite"), (-0.9, "0..1")])
def test_broken_values_are_an_error(clip, value, words):
    """Would catch: NaN frames whose uint8 merely looks black; frames in -1..1 taken for 0..1."""
    reference = clip.float() / 255
    variant = reference.clone()
    variant[3, 0, 5, 5] = value
    with pytest.raises(UserError, match=words):
        compare(reference, variant)


def test_black_frames_are_flagged_even_when_identical(clip):
    """Would catch: a broken decoder on both sides, SSIM 1.0."""
    black = torch.zeros_like(clip)
    assert len(compare(black, black.clone())["flags"]) == 2
    flags = compare(clip, black)["flags"]
    assert len(flags) == 1 and "5 of 5 variant frames are constant" in flags[0]


def test_bfloat16_frames_are_scored_in_float32(clip):
    """Would catch: SSIM computed in bfloat16 (0.996 for 0.998)."""
    reference, variant = ((c.float() / 255).bfloat16() for c in (clip, noisy(clip, 4)))
    found = compare(reference, variant)
    assert found["ssim"]["mean"] == pytest.approx(compare(reference.float(), variant.float())["ssim"]["mean"])


def test_numpy_clips_are_welcome(clip):
    """Would catch: a metric that works on the session's tensors but not on frames read from disk."""
    variant = noisy(clip, 4)
    assert compare(clip.numpy(), variant.numpy()) == compare(clip, variant)


def test_small_frames_have_reasons(clip):
    """Would catch: an exception of MS-SSIM for the tiny demo model."""
    found = compare(clip, noisy(clip, 4))
    assert is_na(found["ms_ssim"]) and "176" in found["ms_ssim"]["how_to_fix"]
    tiny = compare(clip[..., :8, :8], noisy(clip, 4)[..., :8, :8])
    assert is_na(tiny["ssim"]) and is_na(tiny["lpips"]) and not is_na(tiny["psnr_db"])


def test_ms_ssim_where_it_fits():
    """Would catch: the size limit off by one scale."""
    clip = (torch.rand(1, 3, 176, 176, generator=torch.Generator().manual_seed(0)) * 255).to(torch.uint8)
    assert 0 < compare(clip, noisy(clip, 20))["ms_ssim"]["mean"] < 1


def test_random_weights_are_labelled(clip):
    """Would catch: a PSNR of noise presented as video quality."""
    assert compare(clip, clip)["label"] == "numerical fidelity with random weights"
    assert "random weights" in compare(clip, clip, prompts="a fox")["clip_delta"]["reason"]
    assert compare(clip, clip, weights_kind="official")["label"] == "deviation from the baseline"


def test_lpips_without_its_trunk_is_na_with_a_command(clip):
    """Would catch: a download in the middle of a measured run, or a score from a random trunk."""
    missing = compare(clip, noisy(clip, 4))["lpips"]
    assert is_na(missing) and "not on this machine" in missing["reason"]
    assert "python -c" in missing["how_to_fix"]


def random_trunk(folder, monkeypatch, name=None):
    """A random AlexNet file under the name that its own hash gives it, or under `name`."""
    from torchvision.models import alexnet

    torch.manual_seed(0)
    layers = {f"features.{key}": value for key, value in alexnet(weights=None).features.state_dict().items()}
    path = folder / "trunk.pth"
    torch.save(layers, path)
    name = name or f"alexnet-owt-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}.pth"
    path.rename(folder / name)
    monkeypatch.setattr(quality, "LPIPS_TRUNK", name)


def test_lpips_checks_the_hash_of_a_cached_file(clip, monkeypatch, tmp_path):
    """Would catch: a file with the right name and other weights, which torchvision loads without a look."""
    random_trunk(tmp_path, monkeypatch, name="alexnet-owt-7be5be79.pth")
    found = compare(clip, noisy(clip, 4), lpips_folder=tmp_path)["lpips"]
    assert is_na(found) and "SHA-256" in found["reason"]


def test_lpips_uses_the_trunk_it_verified(clip, monkeypatch, tmp_path):
    """Would catch: the verified file ignored for lpips' own download or random trunk, or layers mixed up."""
    import lpips

    random_trunk(tmp_path, monkeypatch)
    variant = noisy(clip, 20)
    found = compare(clip, variant, lpips_folder=tmp_path)["lpips"]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)  # the same seed draws the same trunk
    expected = theirs(variant.float() / 255, clip.float() / 255, normalize=True).flatten().tolist()
    assert found["per_frame"] == pytest.approx(expected, rel=1e-4)
    assert found["worst_frame"] == int(np.argmax(expected))
    assert compare(clip, clip, lpips_folder=tmp_path)["lpips"]["mean"] == 0.0


def test_clip_is_local_only_and_whitelisted(clip):
    """Would catch: remote code behind a model name, or a download."""
    missing = compare(clip, clip, weights_kind="official", prompts="a fox")["clip_delta"]
    assert is_na(missing) and "hf download openai/" in missing["how_to_fix"]
    assert "no prompt" in compare(clip, clip, weights_kind="official")["clip_delta"]["reason"]
    with pytest.raises(UserError, match="clip_model"):
        compare(clip, clip, clip_model="someone/clip")
    with pytest.raises(UserError, match="prompts: 2 for 5 frames"):
        compare(clip, clip, weights_kind="official", prompts=["a", "b"])


def test_clip_delta_is_variant_minus_reference(clip, monkeypatch):
    """Would catch: a sign turned round, or prompts shifted against their frames after a switch."""
    seen = []

    class Inputs(dict):
        def to(self, device):
            return self

    def processor(text, images, **options):
        seen.append(text[0])
        return Inputs(score=images[0].float().mean() / 255)

    def model(score):
        return SimpleNamespace(image_embeds=torch.tensor([[score, (1 - score**2) ** 0.5]]),
                               text_embeds=torch.tensor([[1.0, 0.0]]))

    model.device = "cpu"
    monkeypatch.setattr(quality, "_load_clip", lambda name, device: (model, processor))
    found = compare(clip, clip // 2, weights_kind="official", prompts=list("abcde"), max_frames=3)
    found = found["clip_delta"]
    assert seen == ["a", "c", "e"] * 2
    assert found["mean"] == pytest.approx(found["variant"] - found["reference"]) and found["mean"] < 0


def test_clip_score_runs_on_a_real_clip_model(clip):
    """Would catch: an interface of transformers that moved (get_image_features did in version 5)."""
    from transformers import CLIPConfig, CLIPModel

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(text_config=small | {"vocab_size": 9, "bos_token_id": 0, "eos_token_id": 1},
                        vision_config=small | {"image_size": 32, "patch_size": 16}, projection_dim=8)
    torch.manual_seed(0)

    class Inputs(dict):
        def to(self, device):
            return self

    def processor(text, images, **options):
        return Inputs(input_ids=torch.tensor([[0, 5, 1]]), attention_mask=torch.ones(1, 3, dtype=torch.long),
                      pixel_values=images[0][None, :, :32, :32].float() / 255)

    score = quality._clip_score((CLIPModel(config).eval(), processor), clip, ["a"] * 5)
    assert 0 <= score <= 100


def test_nothing_to_compare_with_gives_reasons():
    """Would catch: a bare None where a table wants a number or a reason."""
    found = quality.not_compared("no truth", "run the baseline first", "random")
    assert all(is_na(found[name]) for name in quality.METRICS) and found["identical"] is None


def test_st_lpips_is_that_of_its_package(clip, monkeypatch):
    """Would catch: another scale of the input, layers mixed up, or weights that were not loaded."""
    pytest.importorskip("stlpips_pytorch")
    monkeypatch.setitem(sys.modules, "torchsummary", SimpleNamespace(summary=None))  # imported and not used
    from stlpips_pytorch import stlpips

    variant = noisy(clip, 20)
    found = compare(clip, variant)["st_lpips"]
    theirs = stlpips.LPIPS(net="alex", variant="shift_tolerant", verbose=False)
    with torch.no_grad():
        expected = theirs(variant.float() / 255, clip.float() / 255, normalize=True).flatten().tolist()
    assert found["per_frame"] == pytest.approx(expected, rel=1e-4)
    assert found["worst_frame"] == int(np.argmax(expected)) and found["max"] == max(found["per_frame"])
    assert compare(clip, clip)["st_lpips"]["mean"] == 0.0


def test_st_lpips_without_its_package_is_na_with_a_command(clip, monkeypatch):
    """Would catch: a run that ends because an optional package is missing."""
    monkeypatch.setitem(sys.modules, "stlpips_pytorch", None)
    missing = compare(clip, noisy(clip, 4))["st_lpips"]
    assert is_na(missing) and "pip install stlpips_pytorch" in missing["how_to_fix"]


def test_st_lpips_unpickles_nothing(clip, monkeypatch):
    """Would catch: weights read the way the package reads them, which runs whatever the file says."""
    pytest.importorskip("stlpips_pytorch")
    load, seen = torch.load, []
    monkeypatch.setattr(torch, "load",
                        lambda *given, **keys: seen.append(keys["weights_only"]) or load(*given, **keys))
    compare(clip, noisy(clip, 4), metrics=("st_lpips",))
    assert seen == [True]


def test_pictures_show_where_clips_differ(clip):
    """Would catch: a heat map scaled by its own maximum, so that every preset looks equally bad."""
    variant = clip.clone()
    variant[:, :, 10:20, 10:20] = 255 - variant[:, :, 10:20, 10:20]
    heat = video.difference_heatmap(clip, variant)
    assert heat.shape == (40, 48, 3) and heat.dtype == np.uint8
    assert heat[10:20, 10:20].mean() > heat[25:, 25:].mean()
    assert (video.difference_heatmap(clip, clip) == video.difference_heatmap(clip, clip)[0, 0]).all()
    assert video.difference_heatmap(clip, variant, full_scale=100.0).sum() < heat.sum()
    pair = video.side_by_side(clip, variant)
    assert pair.shape == (5, 40, 152, 3) and (pair[:, :, :48] == clip.permute(0, 2, 3, 1).numpy()).all()
    assert (pair[:, 25:, 104:] == 128).all() and pair[:, 10:20, 114:124].std() > 50
    with pytest.raises(UserError, match="differ"):
        video.side_by_side(clip, clip[:3])


def test_a_package_that_cannot_be_loaded_is_not_available(monkeypatch):
    """Would catch: a run or the doctor ended by a torchvision of another build than torch."""
    class Broken:
        def find_spec(self, name, *_):
            if name == "stlpips_pytorch":
                raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.delitem(sys.modules, "stlpips_pytorch", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    found = quality.perceptual_metrics()["ST-LPIPS"]
    assert "cannot be loaded" in found and "nms" in found and "belongs to this PyTorch" in found
