"""Complete, valid synthetic results for tests of everything that reads result.json. No GPU, no clock, no
torch."""

import random
from collections.abc import Collection
from typing import Any

from longlive_opt.measurement import catalogue, decision, metrics
from longlive_opt.measurement.result import SCHEMA_VERSION, na
from longlive_opt.streaming.timeline import Event

# ms per block on an H100 (see MEASURED.md), scaled by the caller
_STAGES = {"denoise": 466.0, "decode": 266.0}
_SWITCH = {"text_encode": 25.0, "recache": 305.0}


def example_events(scale: float = 1.0, blocks: int = 308, switch_at: Collection[int] = (),
                   seed: int = 0) -> list[Event]:
    """One stream on both clocks with 1 % jitter, 1.5 ms host overhead and switches at `switch_at`."""
    rng = random.Random(seed)
    events: list[Event] = []
    now = 0.0
    for block in range(blocks):
        stages = (_SWITCH if block in switch_at else {}) | _STAGES
        if block in switch_at:
            events.append(Event("switch_request", now, 0.0, block, "host"))
        events.append(Event("block_start", now, 0.0, block, "host"))
        for name, milliseconds in stages.items():
            duration = milliseconds * scale * rng.gauss(1.0, 0.01)
            events.append(Event(name, now, 2.0, block, "host"))
            events.append(Event(name, now, duration, block, "cuda"))
            now += duration
        now += 1.5
        events.append(Event("chunk_ready", now, 0.0, block, "host"))
    return events


def latent_metric(whole: float, blocks: int = 12) -> dict[str, Any]:
    """An error or a ratio that grows a little over the blocks."""
    by_block = [whole * (0.9 + 0.2 * block / (blocks - 1)) for block in range(blocks)]
    return {"all": whole, "last": by_block[-1], "worst": by_block[-1], "worst_block": blocks - 1,
            "by_block": by_block}


def frame_metric(worst: float, best: float, frames: int = 24) -> dict[str, Any]:
    values = [best + (worst - best) * index / (frames - 1) for index in range(frames)]
    return {"mean": sum(values) / frames, "min": min(values), "max": max(values), "per_frame": values,
            "worst_frame": frames - 1}


def example_quality(preset: str, exact: bool = False, ratio: float = 1.3) -> dict[str, Any]:
    """A section of protocol 2: the baseline's with null rows, or one `ratio` times as far from the truth."""
    ratio = 1.0 if exact or preset == "baseline" else ratio
    psnr = 48.0 - 8.0 * (ratio - 1)

    def errors(scale: float) -> dict[str, Any]:
        return {"latent_error": latent_metric(0.0104 * scale), "error_ratio": latent_metric(scale)}

    def running(scale: float, exactness: float) -> dict[str, Any]:
        return {"psnr_db": frame_metric(exactness - 4, exactness), "ssim": frame_metric(0.93, 0.995),
                "lpips": absent, "psnr_by_block": [exactness] * 12, **errors(scale)}

    absent = na("the AlexNet trunk alexnet-owt-7be5be79.pth was not found", "fetch it, see README")
    section = {
        "reference": "the baseline in float32", "label": "numerical fidelity with random weights",
        "identical": None if preset == "baseline" else exact, "flags": [], "frames_compared": 24,
        "frames_total": 24, "protocol": 2, "ms_ssim": frame_metric(0.96, 0.998),
        "prompt_schedule": {"prompts": ["a fox", "a whale"], "blocks": 12, "switch_block": 6},
        **running(ratio, psnr), "st_lpips": frame_metric(0.004, 0.001), "worst_ratio": ratio,
        "clip_delta": na("random weights: prompt alignment has no meaning", "use official weights"),
        "free_running": running(ratio, psnr - 0.5)}
    if preset == "baseline":
        section["nulls"] = [
            {"name": name, "title": title, "first_block": 4, "worst_ratio": scale,
             "free_running": running(scale, 30.0), **errors(scale)}
            for name, title, scale in (("no_sink", "no sink", 14.0), ("smaller_window", "window 9", 6.0),
                                       ("no_recache", "no recache at the switch", 5.0))]
    return section


def on_several(result: dict[str, Any], gpus: int, decoding: str = "split") -> dict[str, Any]:
    """The result as the runner names and completes it on several GPUs."""
    name = f"{result['preset']}_{gpus}gpus"
    return result | {
        "preset": name, "title": f"{result['title']} on {gpus} GPUs",
        "parameters": result["parameters"] | {"name": name, "gpus": gpus, "vae_ranks": decoding},
        "ranks": {"count": gpus, "denoising": gpus - (decoding == "own"), "decoding": decoding,
                  "memory_gb": [{"kv_cache": 3.45 / gpus, "peak_allocated": 7.5 - rank, "peak_reserved": 8.0}
                                for rank in range(gpus)],
                  "peak_allocated_gb": 7.5, "exposed_ms": {"denoise": 11.25, "decode": 1.5, "recache": 2.75}}}


def _gpu(end_ms: float, frames: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """`gpu_samples` and `energy` of a stream: the clock falls from 1900 to 1700 MHz while it gets warm."""
    times = [index * end_ms / 1e3 / 50 for index in range(51)]
    samples = {"period_s": 0.25, "t_s": times, "sm_mhz": [1900 - 4 * index for index in range(51)],
               "power_w": [600.0 + 2 * index for index in range(51)], "temperature_c": [50] * 51,
               "throttled": {"sw_power_cap": 0.5}}
    energy = {"joules_per_frame": 38.5, "mean_power_w": 650.0, "joules": 38.5 * frames,
              "seconds": 38.5 * frames / 650, "frames": frames}
    return samples, energy


def example_result(preset: str = "baseline", scale: float = 1.0, *, run: int = 1, steady: int = 300,
                   switches: int = 20, exact: bool = False, seed: int = 0,
                   gpu: str | None = "NVIDIA H100 80GB HBM3") -> dict[str, Any]:
    """A complete result; `scale` multiplies every stage's time, `bitwise`: frames equal the baseline's."""
    first = 8
    events = example_events(scale, first + steady, seed=seed + run)
    last = first + 2 * switches
    switch_events = example_events(scale, last, range(first, last, 2), seed + run)
    memory = {"peak_allocated": 9.5 * scale**0.5, "peak_reserved": 11.0 * scale**0.5, "kv_cache": 3.45}
    if gpu is None:
        memory = dict.fromkeys(memory, na("no CUDA device", "run on a GPU"))
    clocks = {"sm_mhz": 1980, "memory_mhz": 2619, "temperature_c": 40, "power_w": 120.0,
              "throttle_reasons": []}
    result: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION, "status": "ok", "campaign": "example", "preset": preset, "run": run,
        "title": preset.replace("_", " ").capitalize(), "hypothesis": "Saves 3.45 GB of copies per pass.",
        "parameters": {"name": preset, "model": "longlive-1.3b", "weights": "random", "device": "cuda",
                       "model_dtype": "bfloat16", "height": 480, "width": 832, "seed": 0,
                       "denoising_steps": [1000, 750, 500, 250], "local_attn_size": 12, "sink_size": 3,
                       "use_cuda_graphs": preset == "cuda_graphs", "use_torch_compile": False,
                       "use_static_kv": preset == "static_kv", "use_quantized_kv": False,
                       "use_async_vae": False, "use_prompt_cache": False, "measure_blocks": steady,
                       "warmup_blocks": first, "num_switches": switches},
        "prompt_schedule": {"prompts": ["a fox", "a whale"], "switch_frames": [9]},
        "environment": {"gpu": gpu, "driver": "580.159", "cuda": "13.0", "torch": "2.11.0+cu130",
                        "cudnn": "91002", "triton": "3.6.0", "python": "3.11.7", "cpu": "Example CPU",
                        "attention_backend": "cudnn", "git_commit": "0123456789abcdef" * 2 + "01234567",
                        "git_dirty": False, "gpu_power_limit_w": 700.0, "co_scheduled": False,
                        "other_cpu_cores": 0.1, "reasons": {},
                        "packages": {"torch": "2.11.0"}, "env_vars": {"CUDA_VISIBLE_DEVICES": "0"},
                        "clocks_before": clocks,
                        "clocks_after": clocks | {"sm_mhz": 1755, "throttle_reasons": ["sw_power_cap"]}},
        "model": {"name": "longlive-1.3b", "parameters": 1418996800},
        "weights": {"kind": "random", "seed": 0}, "tokenizer": None, "seed": 0,
        **metrics.measurements(events, first_measured_block=first, switch_events=switch_events),
        "memory_gb": memory,
        "setup_s": {"load": 12.5, "compile": 0.0, "capture": 0.0, "first_block": 1.9},
        "quality": example_quality(preset, exact),
        "optimizations": [] if preset == "baseline" else [{"name": preset, "applied": True, "report": {}}],
        "events": [event.to_row() for event in events],
        "switch_events": [event.to_row() for event in switch_events],
        "created_utc": "2026-01-31T12:00:00Z",
    }
    for stream in ("events", "switch_events"):
        found = _gpu(result[stream][-1][1], first) if gpu else (na("the run was on cpu", "run on a GPU"),) * 2
        if stream == "events":
            result |= {"frames_on": "host", "gpu_samples": found[0],
                       "energy": found[1] if gpu else dict.fromkeys(("joules_per_frame", "mean_power_w"),
                                                                    found[1])}
        elif gpu:
            result["gpu_samples"]["switch_stream"], result["energy"]["switch_stream"] = found
    gate = {"exactness": "bitwise", "max_error_ratio": 1.1} if exact else {"exactness": "lossy",
                                                                           "max_error_ratio": 1.6}
    baseline = None if preset == "baseline" else example_result(steady=steady, switches=switches, gpu=gpu)
    noise = dict.fromkeys((metric.key for metric in catalogue.shown_in("noise")), 0.004)
    return result | {"decision": decision.decide(result, baseline, noise, gate)}
