"""Fidelity protocol 2: the truth, errors against it, and the null rows that say what a ratio is worth."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from micro import micro_config, micro_model, micro_pipeline
from safetensors.torch import save_file

from longlive_opt.config import ExperimentConfig
from longlive_opt.errors import UserError
from longlive_opt.measurement import fidelity
from longlive_opt.measurement.fidelity import FidelitySchedule, Truth, error_ratios, latent_errors
from longlive_opt.measurement.result import is_na, plain_json
from longlive_opt.prompts import PromptSchedule, schedule_of
from longlive_opt.report.tables import fidelity_table
from longlive_opt.streaming.pipeline import _components, float32_twin
from longlive_opt.streaming.session import StreamingSession

KEYS = {"model_dtype": "bfloat16", "denoising_steps": [1000, 500], "fidelity_blocks": 8,
        "prompts": ["a red fox walks", "some blue whale"]}
VIDEO = torch.zeros(4, 3, 32, 48, dtype=torch.uint8)


@pytest.fixture(autouse=True, scope="module")
def micro():
    with micro_model():
        yield


@pytest.fixture(scope="module")
def schedule(micro) -> FidelitySchedule:
    config = micro_config(**KEYS)
    return FidelitySchedule.of(config, schedule_of(config))


@pytest.fixture(scope="module")
def baseline(micro, schedule):
    """(pipeline, truth, quality section) of the campaign's first baseline."""
    pipeline = micro_pipeline(**KEYS)
    return pipeline, *fidelity.establish(pipeline, schedule, VIDEO)


def measured(truth, schedule, **keys):
    pipeline = micro_pipeline(**KEYS | keys)
    return fidelity.measure(pipeline, StreamingSession(pipeline), schedule, truth)


@pytest.mark.parametrize("blocks, window, switch", [(12, 12, 6), (8, 12, 5), (6, 12, 5), (5, 12, None),
                                                    (12, 9, 6), (6, 9, 4), (20, 12, 10)])
def test_the_switch_comes_when_the_window_is_full(blocks, window, switch):
    """A switch before a frame was dropped never meets a recache that leaves frames out."""
    config = ExperimentConfig(fidelity_blocks=blocks, local_attn_size=window, warmup_blocks=5)
    schedule = FidelitySchedule.of(config, PromptSchedule(("a", "b", "c"), (3, 6)))
    assert (schedule.prompts, schedule.blocks, schedule.switch_block) == (("a", "b"), blocks, switch)
    assert schedule.played(3) == (PromptSchedule(("a", "b"), (3 * switch,)) if switch
                                  else PromptSchedule(("a",)))
    counts = [9] + [12] * (blocks - 1)
    assert schedule.frame_prompts(counts).count("b") == (12 * (blocks - switch) if switch else 0)


def test_prompts_are_those_that_the_video_shows():
    """LongLive never uses a first prompt that is switched away at frame 0; a single prompt has no second."""
    config = ExperimentConfig()
    assert FidelitySchedule.of(config, PromptSchedule(("a", "b", "c"), (0, 6))).prompts == ("b", "c")
    alone = FidelitySchedule.of(config, PromptSchedule(("a",)))
    assert alone.prompts == ("a", fidelity.OTHER_PROMPT + "a") and alone == FidelitySchedule.of(
        config, PromptSchedule(("a",)))


def test_the_truth_is_a_float32_run_on_the_baselines_noise(baseline, schedule):
    """A twin with other weights, its own noise, or a switch elsewhere: then every error is large."""
    pipeline, truth, _ = baseline
    twin = float32_twin(pipeline)
    assert twin.dit.dtype == torch.float32 and twin.optimizations == ()
    assert twin.text_encoder is pipeline.text_encoder

    class Widened:
        def next_block(self):
            return tuple(noise.float() for noise in next(self.blocks))

        def reset(self):
            self.blocks = fidelity._noise(pipeline)

    noise = Widened()
    noise.reset()
    chunks = list(StreamingSession(twin, noise=noise).play(schedule.played(3), schedule.blocks))
    assert truth.latents.dtype == torch.float32 and truth.frames.dtype == torch.uint8
    torch.testing.assert_close(truth.latents, torch.stack([chunk.latents for chunk in chunks]), rtol=1e-4,
                               atol=1e-4)
    assert chunks[schedule.switch_block].switched and chunks[schedule.switch_block].start_frame > 12


def test_the_baseline_is_measured_against_the_truth(baseline):
    """The unit of every ratio: an error of 0 or of another sample would make all presets look alike."""
    _, truth, section = baseline
    own = truth.facts["baseline"]
    for found in (section, section["free_running"]):
        assert found["error_ratio"] == {"all": 1, "last": 1, "worst": 1, "worst_block": 0,
                                        "by_block": [1] * 8}
        assert found["identical"] is None and len(found["psnr_by_block"]) == 8
        assert all(0.001 < error < 0.03 for error in found["latent_error"]["by_block"])
    assert section["latent_error"] == own["forced"] and section["reference"] == "the baseline in float32"
    assert section["psnr_db"]["min"] < section["psnr_db"]["mean"] and section["protocol"] == 2


def test_null_rows_are_much_farther_away_than_rounding(baseline):
    """A stream from which something was taken away and that is as near as the baseline: no gate sees it."""
    _, _, section = baseline
    rows = {row["name"]: row for row in section["nulls"]}
    assert list(rows) == ["other_seed", "no_sink", "smaller_window", "no_recache", "no_switch"]
    assert rows["smaller_window"]["title"] == "window 9"
    assert all(row["worst_ratio"] > 1.5 for row in rows.values())
    for name, first in (("no_sink", 4), ("smaller_window", 3), ("no_recache", 5), ("no_switch", 5)):
        for row in (rows[name], rows[name]["free_running"]):
            before, after = row["error_ratio"]["by_block"][:first], row["error_ratio"]["by_block"][first:]
            assert before == [1] * first and after[0] > 2, name
        assert rows[name]["first_block"] == first
    assert min(rows["other_seed"]["free_running"]["error_ratio"]["by_block"]) > 20
    assert is_na(rows["other_seed"]["latent_error"])
    assert all("psnr_db" in row["free_running"] for row in rows.values())


@pytest.mark.parametrize("name, keys", [
    ("no_sink", {"sink_size": 0}), ("smaller_window", {"local_attn_size": 9}), ("other_seed", {"seed": 1})])
def test_a_null_row_is_a_whole_run_with_that_key(baseline, schedule, name, keys):
    """Only the blocks that can differ are computed: a fork from the wrong state, or a decoder that remembers
    another past."""
    pipeline, truth, section = baseline
    row = next(row for row in section["nulls"] if row["name"] == name)
    # Another seed would also draw other weights.
    config = replace(pipeline.config, **keys)
    parts = _components(config, pipeline.model, pipeline.attention_backend, pipeline.dit, pipeline.vae,
                        pipeline.text_encoder)
    variant = replace(pipeline, config=config, **parts)
    session = StreamingSession(variant)
    chunks = list(session.play(schedule.played(3), schedule.blocks))
    error = latent_errors(torch.stack([chunk.latents for chunk in chunks]), truth.latents)
    assert row["free_running"]["latent_error"]["by_block"] == pytest.approx(error["by_block"], rel=1e-3)
    frames = torch.cat([chunk.frames[0] for chunk in chunks])
    psnr = fidelity.quality.compare(truth.frames, frames, weights_kind="random", metrics=("psnr_db",))
    assert row["free_running"]["psnr_db"]["mean"] == pytest.approx(psnr["psnr_db"]["mean"], abs=0.05)
    if name != "other_seed":
        session.reset()
        forced = fidelity._forced(variant, session.cache, truth)
        assert row["latent_error"]["by_block"] == pytest.approx(
            latent_errors(forced.latents, truth.latents)["by_block"], rel=1e-3)


def test_null_rows_that_a_baseline_cannot_have_say_why():
    """A row of zeros for a stream that was too short, or a window smaller than a block."""
    def found(**keys):
        config = ExperimentConfig(warmup_blocks=8, **keys)
        nulls, absent = fidelity.nulls_of(config, FidelitySchedule.of(config, PromptSchedule(("a", "b"))))
        return [null.name for null in nulls], {row["name"]: row["latent_error"]["reason"] for row in absent}

    assert found() == (["other_seed", "no_sink", "smaller_window", "no_recache", "no_switch"], {})
    names, reasons = found(fidelity_blocks=4)
    assert names == ["other_seed"] and "too short" in reasons["no_recache"] and "full" in reasons["no_sink"]
    assert found(local_attn_size=6)[1] == {"smaller_window": "its window is the smallest there is"}
    assert "no sink" in found(sink_size=0)[1]["no_sink"]


def test_what_has_the_baselines_bits_is_identical(baseline, schedule):
    """An exact preset whose bits are held against the truth's, or one bit that nobody notices."""
    pipeline, truth, _ = baseline
    section = measured(truth, schedule, use_prompt_cache=True, use_async_vae=True)
    assert section["identical"] is True and section["free_running"]["identical"] is True
    assert section["worst_ratio"] == 1 and section["psnr_db"]["mean"] is not None
    facts = plain_json(truth.facts)
    facts["digests"]["free_running"] = "another"
    assert measured(replace(truth, facts=facts), schedule)["identical"] is False


@pytest.mark.parametrize("other, says", [
    ({"seed": 3}, "seed 0"), ({"prompts": ["a red fox walks", "an owl"]}, "prompts"),
    ({"fidelity_blocks": 9}, "blocks 8 and this run 9"), ({"height": 16}, "latents"),
    ({"timestep_shift": 3.0}, "timestep_shift 5.0 and this run 3.0")], ids=str)
def test_the_truth_of_something_else_gives_no_number(baseline, other, says):
    """A shape error deep in a convolution; or PSNR 14 for other prompts, without a word."""
    _, truth, _ = baseline
    pipeline = micro_pipeline(**KEYS | other)
    own = FidelitySchedule.of(pipeline.config, schedule_of(pipeline.config))
    found = fidelity.measure(pipeline, StreamingSession(pipeline), own, truth)
    assert says in found["psnr_db"]["reason"] and found["identical"] is None
    table = fidelity_table(found, truth.facts)
    assert says in table.loc["this run, teacher-forced", "PSNR, dB"]
    assert table.loc["null: no switch, free-running", "error ratio"] > 2


def test_a_lossy_preset_is_between_rounding_and_the_null_rows(baseline, schedule):
    """Free-running or teacher-forced from the wrong past, where both would be as far away as a null row."""
    _, truth, section = baseline
    found = measured(truth, schedule, use_quantized_kv=True)
    mildest = min(row["worst_ratio"] for row in section["nulls"])
    assert found["identical"] is False and 0.9 < found["worst_ratio"] < mildest
    assert found["worst_ratio"] == max(found["error_ratio"]["all"],
                                       found["free_running"]["error_ratio"]["all"])
    assert len(found["latent_error"]["by_block"]) == len(found["free_running"]["psnr_by_block"]) == 8


def test_errors_of_one_block_stay_in_it_when_forced(baseline, schedule, monkeypatch):
    """A block that is put into the cache or the decoder's history instead of the truth's."""
    _, truth, _ = baseline
    pipeline = micro_pipeline(**KEYS)
    denoise = type(pipeline.sampler).denoise

    def broken(self, cache, text, start, *noise):
        estimates = denoise(self, cache, text, start, *noise)
        return [estimate + (start == 9) for estimate in estimates]

    monkeypatch.setattr(type(pipeline.sampler), "denoise", broken)
    found = fidelity.measure(pipeline, StreamingSession(pipeline), schedule, truth)
    forced, free = found["error_ratio"]["by_block"], found["free_running"]["error_ratio"]["by_block"]
    assert forced[3] > 20 and forced[:3] == free[:3] == [1] * 3
    assert forced[4:] == pytest.approx([1] * 4, abs=0.02) and min(free[3:5]) > 5
    assert found["error_ratio"]["worst_block"] == 3
    assert found["psnr_by_block"][3] < min(found["psnr_by_block"][4:]) - 6


def test_output_that_is_not_finite_is_flagged(baseline, schedule, monkeypatch):
    """NaN that passes as a number, or ends the run without a result."""
    _, truth, _ = baseline
    pipeline = micro_pipeline(**KEYS)
    denoise = type(pipeline.sampler).denoise
    monkeypatch.setattr(type(pipeline.sampler), "denoise", lambda self, *given: [
        estimate * float("nan") for estimate in denoise(self, *given)])
    found = fidelity.measure(pipeline, StreamingSession(pipeline), schedule, truth)
    assert any("block 0 are not finite" in flag for flag in found["flags"])
    assert is_na(found["latent_error"]) and is_na(found["error_ratio"]) and is_na(found["worst_ratio"])


def test_a_truth_comes_back_from_its_file(baseline, tmp_path):
    """Facts lost on the way, or a file of an older protocol taken for a truth."""
    _, truth, _ = baseline
    truth.save(tmp_path / "truth.safetensors")
    again = Truth.load(tmp_path / "truth.safetensors")
    assert again.facts == truth.facts and again.schedule == truth.schedule
    for name in ("latents", "frames", "frames_per_block", "video"):
        assert torch.equal(getattr(again, name), getattr(truth, name))
    save_file({"latents": truth.latents}, tmp_path / "old.safetensors")
    assert Truth.load(tmp_path / "old.safetensors") is None
    (tmp_path / "broken.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match="run the baseline again"):
        Truth.load(tmp_path / "broken.safetensors")


def test_variations_are_held_against_the_same_truth(baseline, schedule):
    """A smaller window compared with itself; fewer steps, whose noise is another, compared at all."""
    _, truth, section = baseline
    row = next(row for row in section["nulls"] if row["name"] == "smaller_window")

    def fidelity_of(**keys):
        pipeline = micro_pipeline(**KEYS | keys)
        return fidelity.ablation_fidelity(pipeline, StreamingSession(pipeline), schedule, truth)

    smaller = fidelity_of(local_attn_size=9)
    assert smaller["error_ratio"]["all"] == pytest.approx(row["error_ratio"]["all"], rel=1e-3)
    assert smaller["identical"] is False and fidelity_of(use_prompt_cache=True)["identical"] is True
    assert "other noise" in fidelity_of(denoising_steps=[1000])["psnr_db"]["reason"]
    assert "denoising_steps" in fidelity_of(denoising_steps=[1000, 400])["psnr_db"]["reason"]
    pipeline = micro_pipeline(**KEYS)
    assert is_na(fidelity.ablation_fidelity(pipeline, StreamingSession(pipeline), schedule, None)["psnr_db"])


def test_errors_are_relative_and_over_all_blocks():
    """A mean of the blocks' errors in place of the error of all latents, or one divided by the wrong side."""
    truth = torch.stack([torch.full((1, 2), 3.0), torch.full((1, 2), 4.0)])
    error = latent_errors((truth + torch.tensor([0.3, 0.8])[:, None, None]).bfloat16().float(), truth)
    assert error["by_block"] == pytest.approx([0.1, 0.2], rel=0.03) and error["worst_block"] == 1
    assert error["all"] == pytest.approx(((0.3**2 + 0.8**2) / 25)**0.5, rel=0.03)
    own = {"all": 0.1, "by_block": [0.05, 0.2]}
    ratio = error_ratios(error, own)
    assert ratio["by_block"] == pytest.approx([2, 1], rel=0.03) and ratio["worst_block"] == 0
    assert is_na(error_ratios(error, {"all": 0.0, "by_block": [0.0, 0.0]}))
    assert is_na(latent_errors(truth * float("inf"), truth))


def test_luck_does_not_decide_where_rounding_is_magnified():
    """With trained weights bfloat16's own stream drifts from float32 by eight times its error: the drift of a
    preset is then a matter of luck, and a stream without recache drifts no further."""
    calm = {"forced": {"all": 0.010}, "free_running": {"all": 0.011}}
    wild = {"forced": {"all": 0.010}, "free_running": {"all": 0.080}}
    assert fidelity._worst(calm, {"all": 1.0}, {"all": 1.4}) == 1.4
    assert fidelity._worst(wild, {"all": 1.0}, {"all": 1.4}) == 1.0
    absent = fidelity.na("no past", "see the other")
    assert fidelity._worst(wild, absent, {"all": 9.0}) == 9.0 and is_na(fidelity._worst(calm, absent, absent))


def test_float32_means_float32_everywhere():
    """TF32 in the convolutions, which PyTorch allows by default: the truth would be as far off as bf16."""
    torch.set_float32_matmul_precision("high")
    try:
        with fidelity.full_float32():
            assert torch.get_float32_matmul_precision() == "highest"
            assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cudnn.benchmark
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
