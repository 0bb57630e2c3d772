"""What the notebooks call, end to end on the smallest sizes: one run from its parameters to result.json."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import gzip
import json
import shutil
import threading
import types
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from micro import micro_config, micro_model

from longlive_opt import workbook
from longlive_opt.errors import NotAvailable, UserError
from longlive_opt.measurement import block_trace, environment, metrics, protocol, telemetry
from longlive_opt.measurement.protocol import SWITCH_EVERY, switch_blocks
from longlive_opt.measurement.result import is_na, na, read_result
from longlive_opt.prompts import PromptSchedule, schedule_of
from longlive_opt.report import video
from longlive_opt.streaming.decoder import Delivery
from longlive_opt.streaming.timeline import GARBAGE, GARBAGE_MS
from longlive_opt.workbook import RESULT_FILE, Experiment, notebook_parameters

SMALLEST = {"model": "micro", "weights": "random", "model_dtype": "bfloat16", "fidelity_blocks": 6,
            "denoising_steps": [1000, 500], "warmup_blocks": 4, "measure_blocks": 2,
            "num_switches": 1, "video_latent_frames": 6, "prompts": ["a fox", "a whale"]}


@pytest.fixture(autouse=True, scope="module")
def micro():
    with micro_model(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(environment, "cpu_seconds", lambda: None)  # other tests may run beside these
        yield


def open_run(folder: Path, **parameters: Any) -> Experiment:
    return Experiment.from_notebook({**SMALLEST, "campaign": "test", "output_dir": str(folder), **parameters})


def execute(folder: Path, **parameters: Any) -> dict[str, Any]:
    """All cells of a notebook but the figures; returns what was written."""
    run = open_run(folder, **parameters)
    run.build()
    run.measure()
    run.generate_video()
    run.compare()
    run.save()
    return read_result(folder / RESULT_FILE)


@pytest.fixture(scope="module")
def campaign(micro, tmp_path_factory) -> Path:
    """A folder with a baseline and its repetition."""
    folder = tmp_path_factory.mktemp("campaign")
    execute(folder / "baseline")
    execute(folder / "baseline.repeat2", run=2)
    return folder


def test_baseline_from_parameters_to_result(campaign):
    """A key forgotten, a figure of the wrong stream, a reference that later presets do not find."""
    result = read_result(campaign / "baseline" / RESULT_FILE)
    assert [result[key] for key in ("status", "preset", "run", "campaign")] == ["ok", "baseline", 1, "test"]
    assert result["parameters"] == micro_config(**SMALLEST).to_dict()
    assert result["sizes"]["blocks_measured"] == 2 and result["sizes"]["switches"] == 1
    assert result["sizes"]["warmup_blocks"] == 4 and result["sizes"]["frames_per_block"] == 12
    assert len(result["latency"]["ss_block_ms"]) == 2 and len(result["latency"]["ps_ms_all"]) == 1
    assert result["setup_s"].keys() >= {"load", "compile", "capture", "first_block", "rehearsal"}
    assert result["weights"]["kind"] == "random" and result["model"]["name"] == "micro"
    assert result["optimizations"] == [] and result["decision"]["keep"] is None
    assert result["quality"]["identical"] is None and result["quality"]["worst_ratio"] == 1
    assert [row["name"] for row in result["quality"]["nulls"]] == [
        "other_seed", "no_sink", "smaller_window", "no_recache", "no_switch"]
    blocks = [event[3] for event in result["events"] if event[0] == "chunk_ready"]
    assert blocks == [0, 1, 2, 3, 4, 5]
    assert not [event for event in result["events"] if event[0] == "switch_request"]
    assert [event[3] for event in result["switch_events"] if event[0] == "switch_request"] == [4]
    for name in ("video.mp4", "frames.png", "reference.safetensors"):
        assert (campaign / "baseline" / name).stat().st_size > 0
    assert not [path for path in (campaign / "baseline").iterdir() if ".tmp" in path.name]


def test_repetition_is_compared_with_the_first_run(campaign):
    """A repetition that overwrites the reference, or is compared with itself."""
    result = read_result(campaign / "baseline.repeat2" / RESULT_FILE)
    assert result["run"] == 2 and result["quality"]["identical"] is True
    assert result["quality"]["free_running"]["identical"] is True
    assert not (campaign / "baseline.repeat2" / "reference.safetensors").exists()
    assert result["quality"]["error_ratio"]["by_block"] == [1.0] * 6 and "nulls" not in result["quality"]


@pytest.mark.parametrize("name, exactness", [("prompt_cache", "bitwise"), ("static_kv", "rounding"),
                                         ("quantized_kv", "lossy")])
def test_variant_is_compared_and_decided(campaign, name, exactness):
    """The rule must come to a decision where baseline, repetition and quality are there."""
    result = execute(campaign / name, name=name, max_error_ratio=4.0, **{f"use_{name}": True})
    quality, decision = result["quality"], result["decision"]
    assert [optimization["name"] for optimization in result["optimizations"]] == [name]
    assert decision["gate"] == {"exactness": exactness, "objective": "latency", "max_error_ratio": 4.0}
    # Kept, dropped or within the noise of this machine; or its gate is missed, or passes a null row.
    assert any(words in decision["rationale"]
               for words in ("threshold", "the quality gate is missed", "would pass a stream"))
    assert len(quality["latent_error"]["by_block"]) == 6
    if exactness == "bitwise":
        assert quality["identical"] is True and quality["free_running"]["identical"] is True
    assert quality["error_ratio"]["all"] < (4 if name == "quantized_kv" else 1.3)
    json.dumps(result, allow_nan=False)


def test_what_later_steps_need_is_tried_first(campaign, tmp_path, monkeypatch):
    """An hour's measurement that ends at a baseline cut off, a package that is missing, or a black video."""
    shutil.copytree(campaign / "baseline", tmp_path / "baseline")
    reference, result = tmp_path / "baseline/reference.safetensors", tmp_path / "baseline" / RESULT_FILE
    whole = reference.read_bytes()
    reference.write_bytes(whole[:len(whole) // 2])
    with pytest.raises(UserError, match="reference.safetensors: cannot be read .* run the baseline again"):
        open_run(tmp_path / "static_kv", name="static_kv", use_static_kv=True)
    reference.write_bytes(whole)
    result.write_text(result.read_text()[:-9])
    with pytest.raises(UserError, match="result.json: is not JSON"):
        open_run(tmp_path / "static_kv", name="static_kv", use_static_kv=True)
    for name, value, words in (("campaign", "../x", "cannot name a folder"),
                               ("output_dir", 5, "is not a text"),
                               ("my_note", 3, "my_note.*a variable of your own")):
        with pytest.raises(UserError, match=words):
            Experiment.from_notebook({**SMALLEST, "output_dir": str(tmp_path / "x"), name: value})
    run = open_run(tmp_path / "alone" / "baseline")
    run.build()
    chunk = types.SimpleNamespace(latents=torch.tensor(float("nan")), block=3)
    monkeypatch.setattr(run.measurement, "_stream_with_switches", lambda blocks, switches: iter([chunk] * 3))
    with pytest.raises(UserError, match="latents: those of block 3 are not finite"):
        run.measure()
    monkeypatch.setattr(workbook, "NEEDED", {"not_installed": "av"})
    with pytest.raises(UserError, match="av: this package cannot be imported"):
        open_run(tmp_path / "alone" / "baseline")


def test_a_step_that_fails_leaves_what_was_measured(tmp_path, monkeypatch):
    """Latencies of an hour lost, because the video could not be written."""
    run = open_run(tmp_path / "baseline")
    run.build()
    run.measure()
    monkeypatch.setattr(video, "write_mp4", lambda *parts, **more: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.generate_video()
    kept = json.loads((tmp_path / "baseline/measured.json").read_text())
    assert kept["latency"]["ss_block_ms"] == run.measured["latency"]["ss_block_ms"]


def test_judged_video_stands_in_the_result(campaign, monkeypatch):
    """A verdict on prompts that nobody can look up, or frames handed over under the wrong prompt."""
    seen = {}

    def judge(frames: torch.Tensor, frame_prompts: list[str], *, weights_kind: str) -> dict[str, Any]:
        seen.update(frames=len(frames), prompts=frame_prompts, weights=weights_kind)
        return na("a prompt is not of Moving Shapes: 'a fox'", "write another")

    monkeypatch.setattr(workbook.adherence, "evaluate", judge)
    folder = campaign / "evaluated"
    run = open_run(folder, name="evaluated", use_static_kv=True)
    run.build()
    run.measure()
    run.generate_video()
    table = run.check_adherence()
    run.compare()
    run.save()
    assert seen == {"frames": 21, "prompts": ["a fox"] * 9 + ["a whale"] * 12, "weights": "random"}
    assert list(table["prompt"]) == ["a fox", "a whale"]
    assert set(table["adherence"]) == {"n/a: a prompt is not of Moving Shapes: 'a fox'"}
    assert read_result(folder / RESULT_FILE)["adherence"] == run.adherence
    assert "adherence" not in read_result(campaign / "baseline" / RESULT_FILE)
    with pytest.raises(UserError, match="before charts"):
        run.check_adherence()
    run.generate_video()
    assert run.adherence is None, "of another video"


def test_charts_and_difference_use_the_campaigns_baseline(campaign, monkeypatch):
    """A figure that needs a run this notebook has not made."""
    shown = []
    monkeypatch.setattr(workbook, "display", shown.append)
    run = open_run(campaign / "prompt_cache_again", name="prompt_cache", use_prompt_cache=True)
    run.build()
    run.measure()
    run.generate_video()
    table = run.compare()
    assert list(table.index)[:4] == ["this run, free-running", "this run, teacher-forced",
                                     "baseline, free-running", "baseline, teacher-forced"]
    assert {"null: window 9, teacher-forced", "null: another seed, free-running"} <= set(table.index)
    assert table.loc["this run, free-running", "error ratio"] == 1
    assert table.loc["null: no switch, free-running", "error ratio"] > 2
    run.charts()
    assert shown and "left: baseline, middle: Baseline, right: 8 times" in (player := run.difference().data)
    with av.open(str(run.folder / "side_by_side.mp4")) as container:
        width = 3 * run.frames.shape[3] + 8
        assert "data:video/mp4" in player and container.streams.video[0].width == width
    assert "random, so the video is noise by design" in player
    clip = run.generate_video().data
    assert "noise by design" in clip and "0.0 s: a fox; 0.8 s: a whale" in clip
    assert 'poster="data:image/jpeg' in clip and 'class="on-paper"' in clip and "data:image/png" in clip
    assert "Hypothesis" in (text := run.conclusion().data) and "error ratio, free-running" in text
    assert "SS mean; SS p50" in run.definitions().data
    assert not (run.folder / RESULT_FILE).exists(), "only save() may write it"


def test_variant_without_a_baseline_stays_undecided(tmp_path):
    """An absent baseline must not read as 'no gain', nor end a notebook that papermill runs by itself."""
    result = execute(tmp_path / "campaign" / "static_kv", name="static_kv", use_static_kv=True)
    assert result["decision"]["keep"] is None and "no baseline" in result["decision"]["rationale"]
    assert "no truth" in result["quality"]["psnr_db"]["reason"]
    run = open_run(tmp_path / "campaign" / "again", name="static_kv")
    assert "run the baseline first" in run.difference().data


@pytest.mark.parametrize("other", [{"height": 16}, {"video_latent_frames": 9}, {"block_frames": 2},
                                   {"prompts": ["a fox", "a wolf"]}, {"seed": 1}, {"local_attn_size": 9}],
                         ids=str)
def test_what_could_not_be_compared_is_refused_before_anything_is_built(campaign, other):
    """A preset on top of another profile's baseline, or with prompts of its own: an hour's measurement that
    ends in a shape error, or in the PSNR of two different videos."""
    given = {**SMALLEST, "warmup_blocks": 6, **other}
    with pytest.raises(UserError, match="could not be compared with the baseline of test, since") as error:
        open_run(campaign / "other", name="other", **given)
    assert next(iter(other)) in str(error.value) and not (campaign / "other").exists()
    assert open_run(campaign.parent / "elsewhere" / "other", name="other", **given)


@pytest.mark.parametrize("other", [{"video_latent_frames": 9}, {"prompts": ["a fox", "a wolf"]}], ids=str)
def test_a_comparison_that_is_impossible_loses_no_latency(campaign, monkeypatch, other):
    """Hours of measuring thrown away since the comparison that follows cannot be made; or videos of two texts
    compared all the same."""
    with monkeypatch.context() as patch:
        patch.setattr(Experiment, "require_comparable", lambda self: None)  # the baseline came later
        result = execute(campaign / "late", name="late", use_static_kv=True, **{**SMALLEST, **other})
    shutil.rmtree(campaign / "late")
    quality, decided = result["quality"], result["decision"]
    assert quality["identical"] is None and "free_running" not in quality
    for name in ("psnr_db", "ssim", "ms_ssim", "lpips", "clip_delta"):
        assert f"not comparable with the baseline, {next(iter(other))}" in quality[name]["reason"]
    assert result["latency"]["ss_ms_per_frame"]["n"] == 2 and decided["keep"] is None
    assert decided["rationale"].startswith("undecided: ")


def test_a_comparison_that_fails_loses_no_latency(campaign, monkeypatch, capsys):
    """The GPU's memory full in a comparison, and the measurement lost with it."""
    def fail(*args: Any, **keys: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(workbook.fidelity, "measure", fail)
    result = execute(campaign / "failing", name="failing", use_static_kv=True)
    shutil.rmtree(campaign / "failing")
    reason = result["quality"]["ssim"]["reason"]
    assert reason.startswith("the comparison failed: OutOfMemoryError: CUDA out of memory.")
    assert "Warning: the comparison failed, OutOfMemoryError" in capsys.readouterr().out
    assert result["latency"]["ss_ms_per_frame"]["n"] == 2 and result["decision"]["keep"] is not True


def test_a_result_holds_the_prompts_of_a_file(tmp_path):
    """Three default prompts in result.json, beside the name of a file that may be another tomorrow."""
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompts": ["a fox \\ud83e\\udd8a", "a whale"], "switch_frame_indices": [3]}\n')
    result = execute(tmp_path / "mine", name="mine", **{**SMALLEST, "prompts_file": str(path)})
    assert result["prompt_schedule"] == {"prompts": ["a fox \U0001f98a", "a whale"], "switch_frames": [3]}
    assert result["parameters"]["prompts"] == [] and result["parameters"]["prompts_file"] == str(path)
    assert result["decision"]["provisional"] is True


@pytest.mark.parametrize("given, says", [
    ({"use_static_kw": True}, "did you mean 'use_static_kv'"), ({"extra": 3}, "unknown key 'extra'"),
    ({"seed": "0"}, "seed: '0'"), ({"run": 0}, "run: 0"), ({"run": "2"}, "run: '2'"),
    ({"prompts": []}, "prompts:"),
    ({"prompts_file": "absent.txt"}, "prompts_file: cannot read"),
    ({"title": "\ud83e"}, "title: "), ({"campaign": "\ud83e"}, "campaign"),
])
def test_wrong_notebook_parameter_is_refused_before_anything_is_built(tmp_path, given, says):
    """papermill warns about an unknown parameter and goes on."""
    with pytest.raises(UserError) as error:
        open_run(tmp_path / "run", **given)
    assert says in str(error.value)


def test_optimizations_make_no_baseline(tmp_path):
    """`papermill 00_baseline.ipynb -p use_static_kv True`: a reference with which the others agree better."""
    with pytest.raises(UserError, match="^use_static_kv, use_async_vae: true .* -p name mine"):
        open_run(tmp_path / "run", use_static_kv=True, use_async_vae=True)
    assert not (tmp_path / "run").exists()
    assert open_run(tmp_path / "run", use_static_kv=True, name="mine").config.use_static_kv
    for key, value in (("cudnn_benchmark", True), ("vae_channels_last", False), ("vae_chunk_latents", 3)):
        with pytest.raises(UserError, match=f"^{key}: {str(value).lower()} under the name 'baseline'"):
            open_run(tmp_path / "other", **{key: value})
    assert open_run(tmp_path / "same", vae_chunk_latents=1, vae_channels_last=True).config.name == "baseline"


def test_folder_that_cannot_be_made_is_refused(tmp_path):
    """A traceback of mkdir after an hour."""
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="output_dir: cannot make .*file"):
        open_run(tmp_path / "file" / "run")


def test_notebook_parameters_are_the_public_plain_values():
    """IPython's own names, imports and private values are in globals(), too."""
    namespace = {"seed": 1, "prompts": ["a"], "height": None, "_private": 2, "__name__": "__main__",
                 "In": ["x"],
                 "Out": {}, "Experiment": Experiment, "torch": torch, "exit": object(), "get_ipython": len,
                 "quit": types.SimpleNamespace(), "options": {"a": 1}, "title": "t", "flag": True,
                 "rate": 0.5}
    assert notebook_parameters(namespace) == {"seed": 1, "prompts": ["a"], "height": None,
                                              "options": {"a": 1},
                                              "title": "t", "flag": True, "rate": 0.5}


@pytest.mark.parametrize("step", ["build", "measure", "video", "compare"])
def test_no_result_when_a_step_fails(tmp_path, monkeypatch, step):
    """result.json is the only sign of success: a run that failed half-way must leave none."""
    def fail(*args: Any, **keys: Any) -> None:
        raise RuntimeError("broken")

    run = open_run(tmp_path / "run")
    target = {"build": (workbook, "build_pipeline"), "measure": (metrics, "measurements"),
              "video": (video, "write_mp4"), "compare": (workbook.fidelity, "establish")}[step]
    monkeypatch.setattr(*target, fail)
    with pytest.raises(RuntimeError, match="broken"):
        run.build()
        run.measure()
        run.generate_video()
        run.compare()
        run.save()
    with pytest.raises(UserError, match=r"baseline: (nothing|there is no) .* yet; call \w+\(\) first"):
        run.save()
    assert not (tmp_path / "run" / RESULT_FILE).exists()


def test_preset_that_cannot_run_here_says_so(tmp_path):
    """CUDA graphs on a laptop: n/a with the reason, not a failure of the code."""
    run = open_run(tmp_path / "run", name="cuda_graphs", use_cuda_graphs=True)
    with pytest.raises(NotAvailable, match="use_cuda_graphs"):
        run.build()


def test_table_of_parameters_shows_what_differs(tmp_path):
    """Sixty rows in which nobody finds the one that matters."""
    table = open_run(tmp_path / "run", title="T", seed=3).parameters()
    assert {"seed", "title", "model"} <= set(table.index) and "sink_size" not in table.index
    assert (table.loc["seed", "value"], table.loc["seed", "default"]) == (3, 0)


def test_switches_come_after_warm_up_with_blocks_between_them():
    """Two switches in a row, or one while the window fills, measure something else."""
    blocks = switch_blocks(micro_config(warmup_blocks=5, num_switches=4))
    assert blocks[0] == 5 and len(blocks) == 4
    gaps = {b - a for a, b in zip(blocks, blocks[1:])}
    assert gaps == {SWITCH_EVERY} and SWITCH_EVERY >= 2
    assert switch_blocks(micro_config(num_switches=0)) == []


class Kinds:
    """A forward that notes of what kind each pass is: what CUDA graphs and compiled code are made for."""

    def __init__(self, inner: Any):
        self.inner, self.seen = inner, set()

    def __call__(self, latents, timestep, text, cache, *, keys_only=False):
        self.seen.add((cache.signature, tuple(latents.shape), timestep, keys_only))
        return self.inner(latents, timestep, text, cache, keys_only=keys_only)


@pytest.mark.parametrize("keys", [
    {"warmup_blocks": 5}, {"warmup_blocks": 5, "use_static_kv": True, "relative_rope": True},
    {"warmup_blocks": 4, "local_attn_size": 7, "sink_size": 2, "global_sink": False},
    {"warmup_blocks": 4},
], ids=str)
def test_everything_that_is_measured_was_rehearsed(tmp_path, keys):
    """A kind of pass that the measured stream meets first is captured or compiled there."""
    small = {"name": "mine", "height": 16, "width": 16, "num_switches": 3}
    run = open_run(tmp_path / "run", **{**SMALLEST, **small, **keys})
    run.build()
    kinds = Kinds(run.pipeline.sampler.forward)
    run.session.pipeline = dataclasses.replace(
        run.pipeline, sampler=run.pipeline.sampler.with_forward(kinds))
    run.measurement.rehearse()
    rehearsed = set(kinds.seen)
    run.measure()
    assert kinds.seen == rehearsed


def test_hits_and_misses_of_the_prompt_cache_are_told_apart(tmp_path):
    """An ablation that the rehearsal asked for already is no miss; nothing is built in what is measured."""
    run = open_run(tmp_path / "run", name="mine", **{**SMALLEST, "num_switches": 4, "use_prompt_cache": True})
    run.build()
    run.measure()
    by_prompt = run.measured["latency"]["ps_by_prompt"]
    assert {outcome: times["n"] for outcome, times in by_prompt.items()} == {"hit": 2, "miss": 2}
    assert run.measured["built_while_measured"] == {"captured": 0, "compiled": 0}


def test_what_interrupts_a_stream_is_recorded_and_what_came_before_is_not(tmp_path, monkeypatch):
    """A pause of the host in a slow block; garbage of loading and compiling that one of the streams pays for.
    """
    run = open_run(tmp_path / "run", **SMALLEST)
    run.build()
    collect, order, stream = gc.collect, [], run.session.stream
    monkeypatch.setattr(gc, "collect", lambda: order.append("collect") or collect())

    def streamed(*arguments):
        order.append("stream")
        for chunk in stream(*arguments):
            if chunk.block == 4:
                kept = [[] for _ in range(300_000)]
                collect()
                del kept
            yield chunk

    run.measurement.rehearse()
    monkeypatch.setattr(run.session, "stream", streamed)
    measured, *_ = run.measurement.run()
    assert order == ["collect", "stream"] * 2
    assert measured["interruptions"]["garbage_collections"] >= 2
    assert measured["interruptions"]["garbage_ms_max"] >= GARBAGE_MS
    assert any(row[0] == GARBAGE for row in measured["events"])


class EvenPower(telemetry.Telemetry):
    """A GPU that draws 1000 W all the time."""

    def __init__(self, device: torch.device):
        super().__init__(device)
        self.missing = None

    @contextlib.contextmanager
    def recording(self, now_ms):
        samples = telemetry.Samples(0.25)
        reading = dict.fromkeys(telemetry.FIELDS, 1)
        samples.add(now_ms(), reading | {"energy_j": now_ms()})
        yield samples
        samples.add(now_ms(), reading | {"energy_j": now_ms()})


def test_energy_is_that_of_the_measured_blocks_of_each_stream(tmp_path, monkeypatch):
    """Warm-up in the energy per frame, the other stream's frames, the block that async decoding adds."""
    monkeypatch.setattr(protocol, "Telemetry", EvenPower)
    run = open_run(tmp_path / "run", name="mine", **{**SMALLEST, "use_async_vae": True})
    run.build()
    run.measure()
    measured, switched = run.measured, run.measured["energy"]["switch_stream"]
    frames = measured["sizes"]["frames_per_block"]
    assert measured["energy"]["frames"] == 2 * frames == switched["frames"]
    assert measured["energy"]["mean_power_w"] == pytest.approx(1000, rel=1e-2)
    per_frame = 1e3 / measured["fps"]
    assert measured["energy"]["joules_per_frame"] == pytest.approx(per_frame, rel=1e-2)
    assert switched["joules_per_frame"] == pytest.approx(1e3 / measured["fps_with_switches"], rel=1e-2)
    assert len(measured["gpu_samples"]["switch_stream"]["t_s"]) == 2


def test_frames_come_to_host_memory_while_they_are_measured_and_only_then(tmp_path, monkeypatch):
    """Latencies that end on the GPU; a video whose first chunks are overwritten by its last ones."""
    wanted = []
    monkeypatch.setattr(Delivery, "__call__", lambda self, frames: wanted.append(self.to_host) or frames)
    monkeypatch.setattr(Delivery, "copies", property(lambda self: True))
    run = open_run(tmp_path / "run", **SMALLEST)
    run.build()
    headline = run.measure()
    blocks = run.config.warmup_blocks
    assert wanted == [True] * (blocks + 4 + blocks + 2 + blocks + 2)
    assert run.measured["frames_on"] == "host" and not run.session.host_frames
    assert is_na(run.measured["gpu_samples"]) and "mean_power_w" in run.measured["energy"]
    assert run.measured["latency"]["stages_ms"]["copy_to_host"]["n"] == 2
    assert run.measured["latency"]["ps_random_ms"]["n"] == 1
    assert headline.loc["PS mean at a random moment, ms", "value"] > headline.loc["PS mean, ms", "value"]
    del wanted[:]
    run.generate_video()
    assert wanted == [False, False]


def test_what_others_of_this_process_compiled_is_not_counted(tmp_path, monkeypatch, capsys):
    """A rehearsal of 3.4 s, "of it compiling 7.7 s": those of the preset that was measured before."""
    spent = iter([7.0, 7.5])
    monkeypatch.setattr(protocol, "compile_seconds", lambda: next(spent))
    run = open_run(tmp_path / "run")
    run.build()
    run.measure()
    assert run.pipeline.setup_s["compile"] == 0.5 and run.pipeline.setup_s["capture"] == 0
    assert "of it compiling 0.5 s" in capsys.readouterr().out


def test_crowded_machine_is_named(tmp_path, monkeypatch, capsys):
    """Latencies of a machine that somebody else used as well, with nothing said."""
    clocks = iter([(0.0, 0.0, 0.0), (10.0, 18.0, 9.0)])
    monkeypatch.setattr(environment, "cpu_seconds", lambda: next(clocks))
    run = open_run(tmp_path / "run", name="mine", target_ms_per_frame=0.001)
    run.build()
    headline = run.measure()
    assert "Warning: other processes kept 0.9 CPU cores busy" in capsys.readouterr().out
    assert headline.loc["SS blocks over the target, %", "value"] == 100
    run.generate_video()
    run.compare()
    assert run.result["environment"]["co_scheduled"] is True


@pytest.mark.parametrize("asynchronous", [False, True])
def test_last_block_of_an_asynchronous_stream_does_not_count(tmp_path, asynchronous):
    """Nothing competes with its decoding: 13 instead of 53 ms, which a mean of 100 blocks shows."""
    run = open_run(tmp_path / "run", name="mine", **{**SMALLEST, "use_async_vae": asynchronous})
    run.build()
    run.measure()
    counted = {"steady": run.config.warmup_blocks + run.config.measure_blocks,
               "switched": run.config.warmup_blocks + SWITCH_EVERY * run.config.num_switches}
    events = {"steady": run.measured["events"], "switched": run.measured["switch_events"]}
    for stream, rows in events.items():
        ready = [block for name, _, _, block, _ in rows if name == "chunk_ready"]
        assert ready == list(range(counted[stream]))
    assert run.session.next_block == counted["switched"] + asynchronous


def test_script_of_a_preset(tmp_path):
    """Prompts spread over the video, as given, or from a file; never a switch past the end."""
    def schedule(**keys: Any) -> PromptSchedule:
        return schedule_of(micro_config(**keys))

    assert schedule(prompts=["a", "b", "c"], video_latent_frames=18) == PromptSchedule(("a", "b", "c"),
                                                                                       (6, 12))
    assert schedule(prompts=["a", "b", "c"], video_latent_frames=6) == PromptSchedule(("a", "b"), (3,))
    assert schedule(prompts=["a"], video_latent_frames=9) == PromptSchedule(("a",), ())
    given = schedule(prompts=["a", "b"], switch_frame_indices=[4], video_latent_frames=9)
    assert given == PromptSchedule(("a", "b"), (4,))
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompts": ["x", "y"]}\n')
    assert schedule(prompts_file=str(path), switch_frame_indices=[3]) == PromptSchedule(("x", "y"), (3,))
    with pytest.raises(UserError, match="switch_frame_indices: 9 takes effect .* past the end"):
        schedule(prompts_file=str(path), switch_frame_indices=[9], video_latent_frames=9)


def test_variations_are_measured_beside_the_preset(campaign, monkeypatch):
    """The preset's own figures must stay, and an ablation that cannot run must not take the others along."""
    folder = campaign / "ablated"
    run = open_run(folder, name="ablated", use_static_kv=True)
    run.build()
    run.measure()
    run.generate_video()
    run.compare()
    run.save()
    alone = read_result(folder / RESULT_FILE)
    threads = []
    measure = Experiment.measure
    monkeypatch.setattr(Experiment, "measure",
                        lambda self: threads.append(threading.get_ident()) or measure(self))
    table = run.ablate({"local_attn_size": [9, 2], "denoising_steps": [[1000]], "use_static_kv": [False]},
                     together=[{"sink_size": 0, "vae_chunk_latents": 3}])
    assert threading.get_ident() not in threads, "cuDNN remembers the kernels of a shape per thread"
    result = read_result(folder / RESULT_FILE)
    assert {key: value for key, value in result.items() if key != "ablations"} == alone
    nine, two, one_step, rolling, both = result["ablations"]
    assert both["changed"] == {"sink_size": 0, "vae_chunk_latents": 3} and "failure" not in both
    assert nine["changed"] == {"local_attn_size": 9} and one_step["changed"] == {"denoising_steps": [1000]}
    assert nine["memory_gb"]["kv_cache"] == pytest.approx(0.75 * alone["memory_gb"]["kv_cache"])
    assert nine["sizes"]["blocks_measured"] == alone["sizes"]["blocks_measured"]
    assert "local_attn_size: 2" in two["failure"]["reason"]
    assert "other noise" in one_step["quality"]["psnr_db"]["reason"]
    assert nine["quality"]["error_ratio"]["all"] > 1.5  # against the same truth
    assert rolling["quality"]["identical"] is True  # the reference cache again
    assert list(table.index) == ["as is", "local_attn_size: 9", "local_attn_size: 2",
                                 "denoising_steps: [1000]", "use_static_kv: false",
                                 "sink_size: 0, vae_chunk_latents: 3"]
    assert table.loc["use_static_kv: false", "error ratio, teacher-forced"] == 1
    assert table.loc["local_attn_size: 2", "FPS"].startswith("n/a: local_attn_size")


def test_wrong_order_names_the_missing_step(tmp_path):
    """An AttributeError about the inside of a class where a sentence would say what to call first."""
    experiment = open_run(tmp_path / "early")
    assert "done: nothing yet" in repr(experiment)
    for verb in ("generate_video", "measure", "check_adherence", "save"):
        with pytest.raises(UserError, match=r"call (build|generate_video)\(\) first"):
            getattr(experiment, verb)()
    with pytest.raises(AttributeError, match="nonsense"):
        _ = experiment.nonsense
    experiment.build()
    assert "done: build" in repr(experiment)
    with pytest.raises(UserError, match=r"call measure\(\) first"):
        experiment.save()


# ---- a preset in one line


@pytest.fixture(scope="module")
def smallest(tmp_path_factory) -> Path:
    """A profile with the smallest sizes."""
    path = tmp_path_factory.mktemp("profile") / "micro.yaml"
    path.write_text(json.dumps(SMALLEST))
    return path


def one_line(folder: Path, profile: Path, preset: str = "static_kv", **keys: Any) -> Experiment:
    return Experiment.preset(preset, profile=str(profile), output_dir=str(folder / preset), **keys)


def test_a_preset_in_two_lines_with_a_baseline_on_demand(tmp_path, smallest, capsys):
    """Opening a preset's notebook is not running the preset: without a baseline it says n/a all over."""
    run = one_line(tmp_path / "mine", smallest)
    assert run.config.use_static_kv and run.config.model == "micro" and run.config.measure_blocks == 2
    table = run.measure_baseline()
    assert table.loc["SS mean, ms per frame", "value"] > 0
    saved = read_result(tmp_path / "mine" / "baseline" / RESULT_FILE)
    assert saved["optimizations"] == [] and saved["parameters"]["prompts"] == ["a fox", "a whale"]
    capsys.readouterr()
    assert run.measure_baseline().equals(table) and "is there, of" in capsys.readouterr().out
    run.build()
    with pytest.raises(UserError, match=r"call it before build\(\)"):
        run.measure_baseline()
    run.measure()
    run.generate_video()
    run.compare()
    run.save()
    assert run.result["quality"]["worst_ratio"] < 1.3 and run.result["decision"]["gate"]
    capsys.readouterr()
    one_line(tmp_path / "mine", smallest)
    assert "mine/static_kv holds a result; save() replaces it" in capsys.readouterr().out
    with pytest.raises(UserError, match="this run is the baseline"):
        one_line(tmp_path / "other", smallest, "baseline").measure_baseline()


def test_a_preset_or_a_profile_that_is_not_there(tmp_path, smallest):
    """A traceback about a file where the names of the presets would help."""
    with pytest.raises(UserError, match="preset: 'balancd' is unknown; .* choose one of .*speed"):
        Experiment.preset("balancd")
    with pytest.raises(UserError, match="profiles/gameboy.yaml.*No such file"):
        Experiment.preset("static_kv", profile="gameboy")
    with pytest.raises(UserError, match="did you mean 'seed'"):
        one_line(tmp_path, smallest, sed=1)


def test_without_a_profile_the_machine_chooses(monkeypatch, capsys):
    """300 blocks of a 1.3B model on a laptop, because nobody said otherwise."""
    opened = {}
    monkeypatch.setattr(Experiment, "from_notebook",
                        classmethod(lambda cls, given, **more: opened.update(given)))
    monkeypatch.setattr(environment, "_run", lambda *command: None)
    Experiment.preset("static_kv")
    assert (opened["model"], opened["device"], opened["measure_blocks"]) == ("tiny", "cpu", 4)
    assert "no GPU here: profile laptop" in capsys.readouterr().out
    for memory, profile in (("24564", "h100_tiny"), ("81559", "h100")):
        monkeypatch.setattr(environment, "_run", lambda *command, memory=memory: f"NVIDIA X, {memory}\nB, 1")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        assert environment.fitting_profile()[0] == profile
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        assert environment.fitting_profile()[0] == "laptop"


def test_a_baseline_of_another_campaign(campaign, tmp_path, smallest):
    """A comparison with last week's campaign needs a copy of its folder, or is made between unequal runs."""
    run = one_line(tmp_path / "mine", smallest, compare_with=str(campaign))
    assert run.baseline()["campaign"] == "test" and run.reference is not None
    run.build()
    run.measure()
    run.generate_video()
    run.compare()
    assert run.quality["worst_ratio"] < 1.3
    assert "SS mean" in run._repr_html_() and campaign.name in run._repr_html_()
    with pytest.raises(UserError, match="is compared with the baseline of"):
        one_line(tmp_path / "mine", smallest, compare_with=str(campaign)).measure_baseline()
    with pytest.raises(UserError, match=r"compare_with: .* since seed is 1 against 0"):
        one_line(tmp_path / "mine", smallest, compare_with=str(campaign), seed=1)
    with pytest.raises(UserError, match="has no finished baseline"):
        one_line(tmp_path / "mine", smallest, compare_with="last_week")
    with pytest.raises(UserError, match="compared with nothing"):
        one_line(tmp_path / "mine", smallest, "baseline", compare_with=str(campaign))


def test_a_baseline_of_another_machine_is_refused(campaign, tmp_path, smallest, monkeypatch):
    """A gain that is another CPU's."""
    monkeypatch.setattr(environment, "machine", lambda device: {"gpu": None, "cpu": "Abacus", "torch": "2"})
    with pytest.raises(UserError, match="compare_with: .* since environment.cpu is 'Abacus' against"):
        one_line(tmp_path / "mine", smallest, compare_with=str(campaign))


def test_only_the_parameters_cell_is_read(tmp_path, capsys):
    """`my_note = 3` in a notebook that was made for exploring, and nothing works any more."""
    parameters = "campaign: str = 'test'\nrun = 1\noutput_dir = ''\nseed = 4"
    cells = ["", parameters, "%matplotlib inline", "# Parameters\nwarmup_blocks = 5\n",
             "my_note = 3\nmeasure_blocks = 9", "from longlive_opt.workbook import Experiment"]
    values = {"campaign": "test", "run": 1, "output_dir": str(tmp_path), "seed": 4, "warmup_blocks": 5,
              "my_note": 3, "measure_blocks": 9}
    read = {name: values[name] for name in ("campaign", "run", "output_dir", "seed", "warmup_blocks")}
    assert notebook_parameters({"In": cells, **values}) == read
    run = Experiment.from_notebook({"In": cells, **values})
    assert run.config.seed == 4 and run.config.measure_blocks == 4
    assert "not read, since it is no plain value of the parameters cell: measure_blocks" in \
        capsys.readouterr().out
    cells[1] = parameters.replace("seed", "sed")
    with pytest.raises(UserError, match="did you mean 'seed'"):
        Experiment.from_notebook({"In": cells, **values, "sed": 4})


def test_a_repeated_step_is_in_the_result(campaign):
    """A video or a measurement that was made again, and a result.json that still has the old one."""
    run = open_run(campaign / "again", name="again", use_static_kv=True)
    run.build()
    run.measure()
    run.generate_video()
    run.compare()
    first = run.result["latency"]["ss_block_ms"]
    run.measure()
    assert run.result["latency"]["ss_block_ms"] != first


def test_trace_is_recorded_after_the_measurement_and_linked(tmp_path, monkeypatch):
    """A profiler that slows the measured blocks; a trace that no reader of the report finds."""
    order = []
    for owner, name in ((metrics, "measurements"), (block_trace, "record")):
        inner = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *arguments, inner=inner, name=name, **keys: (
            order.append(name), inner(*arguments, **keys))[1])
    result = execute(tmp_path / "traced", name="mine", trace=True)
    assert order == ["measurements", "record"]
    assert result["trace"]["blocks"] == [4, 5, 6] and result["trace"]["switch_block"] == 7
    assert not {"denoise_pass", "clean_pass"} & {row[0] for row in result["events"] + result["switch_events"]}
    with gzip.open(tmp_path / "traced" / result["trace"]["file"], "rt", encoding="utf-8") as file:
        trace = json.load(file)
    assert trace["otherData"]["torch"] == torch.__version__ and trace["otherData"]["preset"] == "mine"
    link = workbook.trace_link(result)
    assert f'href="{result["trace"]["file"]}"' in link and "://" not in link
    assert workbook.trace_link({}) == ""


def test_a_trace_that_fails_leaves_the_measurement(tmp_path, monkeypatch, capsys):
    """An hour of measuring lost to a profiler that is not permitted here."""
    def fail(*arguments: Any, **keys: Any) -> None:
        raise RuntimeError("no permission\nmore")

    monkeypatch.setattr(block_trace, "record", fail)
    run = open_run(tmp_path / "run", trace=True)
    run.build()
    assert "SS mean, ms per frame" in run.measure().index
    assert "Warning: the trace failed, RuntimeError: no permission\n" in capsys.readouterr().out
    assert is_na(run.trace) and "n/a: the trace failed" in workbook.trace_link({"trace": run.trace})


def test_a_trace_past_the_last_position_is_refused_before_the_run():
    """A stream that ends at position 1023 after everything was measured."""
    micro_config(warmup_blocks=337, measure_blocks=2, num_switches=1)
    with pytest.raises(UserError, match="warmup_blocks: 338 makes a stream of 342 blocks"):
        micro_config(warmup_blocks=338, measure_blocks=2, num_switches=1, trace=True)
