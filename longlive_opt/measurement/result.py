"""result.json: one measured run of one preset, schema version 2 (`read_result` upgrades version 1). Plain
JSON, written last and atomically.

Conventions: a unit ends the name (`_ms`, `_s`, `_gb` = 1e9 bytes, `_db`); a frame is a video frame; NaN and
infinity never occur. METRIC below means a number, or `{"value": null, "reason": str, "how_to_fix": str}` from
`na()`.

    schema_version  2                       status      "ok" (nothing else is ever written)
    campaign, preset, title, hypothesis     strings     run         1; 2 for the A/A repeat of the preset
    parameters      {flat preset}           created_utc "2026-01-31T12:00:00Z"
    prompt_schedule {prompts [str], switch_frames [int]}: the video's prompts as used, including those of a
                    prompts_file, and the latent frame at which each later prompt took over; missing in old
                    results (see `decision.schedule_of_result`)
    environment     see `environment.environment`: gpu, driver, cuda, torch, cudnn, triton, python, cpu,
                    attention_backend, git_commit, git_dirty, gpu_power_limit_w, co_scheduled and
                    other_cpu_cores (see `environment.company_of`; missing in old results, whose co_scheduled
                    has no meaning), neighbours, optional, [label of each run at the same time on the same
                    host of a cluster], packages {}, env_vars {}, clocks_before {}, clocks_after {}; unknown
                    values are null, with the reason in `reasons` {field: reason}
    model           {name, parameters: int, ...}
    weights         {kind: "random" | "official" | ..., seed?, files?, sha256?}
    tokenizer       string or null          seed        int
    sizes           {blocks_measured (SS samples), warmup_blocks, switches, frames_per_block, quick, note}
    latency         ss_ms_per_frame    {n, mean, p50, p95, p99: METRIC, max}
                    ss_block_ms        [interval of each SS block]; ss_blocks [its index]
                    ss_over_target     {target_ms, share of SS blocks above it}
                    ss_with_switches   {n, mean, max} per frame, switch blocks included
                    ps_ms              {n, mean, p50, p99, max}, each but n a METRIC
                    ps_ms_all          [one per switch]; ps_blocks [its block]; ps_before_ms_all, optional,
                                       [interval of the previous block]
                    ps_random_ms       optional {n, mean, p95: METRIC}: derived, for a request at any moment
                    ps_by_prompt       {"hit" | "disk" | "miss": {n, mean, p50, p95, p99: METRIC, max}}, by
                                       the prompt cache's outcome; {} without a cache; ps_random_by_prompt,
                                       optional, the same for ps_random_ms
                    ps_breakdown_ms    {text_encode, recache, denoise, decode, other: METRIC}, mean per
                                       switch; copy_to_host too where frames are copied
                    first_frame_ms     METRIC
                    stages_ms          {stage: {n, mean, p50, p95, p99: METRIC, max, clock: "cuda" | "host"}}
                    clock_disagreement {available: bool, share, threshold, flag: bool or null, sentence, ...}
    frames_on       optional: "host" if a chunk is ready when its frames are in page-locked host memory;
                    in results without it, chunks are ready when complete on the device
    fps             number, for the steady stream; fps_with_switches, optional METRIC, for the switch stream
    playback        {fps, startup_buffer_ms, stalls_at_zero_buffer, stall_ms_at_zero_buffer, deadline_ms,
                    deadline_miss_share, sustained: bool, chunks, frames, note} of the SS stream;
                    switch_stream, optional, {the same of a separate switch stream}
    memory_gb       {peak_allocated, peak_reserved, device_used, kv_cache: METRIC; peak_resident: METRIC of
                    runs on the CPU, missing in old results}
    ranks           only on several GPUs: {count, denoising (ranks that share the passes), decoding ("split" |
                    "own", see `vae_ranks`), memory_gb [per rank {kv_cache, and on a GPU peak_allocated,
                    peak_reserved}], peak_allocated_gb: METRIC, of the rank with the most, exposed_ms
                    {denoise, decode, recache: METRIC} or n/a as a whole}
    built_while_measured {captured, compiled}, optional: CUDA graphs and regions built during the measured
                    streams; 0 if the rehearsal built all of them
    interruptions   optional, of both measured streams: {garbage_collections, garbage_ms_max: Python's, of at
                    least 1 ms; on a GPU driver_allocations, driver_frees, allocator_retries}
    gpu_samples     optional, of the steady stream including warm-up: {period_s, t_s [] since it began,
                    sm_mhz [], power_w [], temperature_c [], throttled {reason: share of the readings},
                    switch_stream {the same}}; null for values that the GPU does not report; METRIC as a whole
                    (n/a) if nothing was read
    energy          optional, of the measured part of the steady stream: {joules_per_frame, mean_power_w,
                    joules: METRIC, seconds, frames, switch_stream, optional, {the same}}
    trace           optional: {file: name in the run's folder, blocks [int], switch_block, kernels: int}, what
                    `block_trace` recorded after the measurement
    setup_s         {load, compile, capture, first_block, ...: METRIC}; never part of a latency
    quality         {reference: str or null, label, identical: bool or null, flags [str], frames_compared,
                    frames_total, psnr_db, ssim, ms_ssim, lpips, st_lpips, clip_delta, ...}: teacher-forced
                    frames against those of the truth; psnr_db to st_lpips are n/a or {mean, min, max,
                    per_frame [], worst_frame}; clip_delta is n/a or {mean, ...}. identical: the free-running
                    latents and frames are the bits of the baseline. With protocol 2 (`fidelity`) also
                    {protocol: 2, prompt_schedule {prompts [], blocks, switch_block: int or null},
                    latent_error, error_ratio: n/a or {all, last, worst, worst_block, by_block []},
                    psnr_by_block [], worst_ratio: METRIC, the greater `all` of the two error ratios or, where
                    free_running_counts is false, the teacher-forced one,
                    free_running {psnr_db, ssim, lpips, identical, latent_error, error_ratio, psnr_by_block,
                    ...}}, with another decoder than the truth's decoder {name, reference, psnr_db, ssim,
                    lpips}: its frames of the truth's latents against the truth's frames, and of the
                    campaign's first baseline nulls [{name, title, first_block,
                    free_running {...}, latent_error, error_ratio, worst_ratio: METRIC}]; a null that this
                    baseline cannot have is {name, title, latent_error: n/a}. Without a protocol, or with one
                    in words, the metrics are against the baseline's own frames, and identical frames have
                    null for all of psnr_db
    optimizations           [{name, applied: bool, report {}}]
    events          [[name, start_ms, duration_ms, block or null, "host" | "cuda"], ...] of the SS stream;
                    switch_events, optional, the same for a separate stream that gave the PS metrics
    decision        {keep: bool or null, rule, rationale, gate {}, provisional: true}: the verdict when the
                    run ended. Only the verdict of the whole campaign counts; it is in the campaign's
                    decisions.json (see `report.decisions`)
    adherence       optional: whether the video shows its prompts, if they are of Moving Shapes; otherwise
                    METRIC as a whole (n/a), else {label, adherence_before, adherence_after, delay_blocks,
                    permanence: METRIC, drift, switches, never: int, wrong [str], not_evaluated [str],
                    segments [{}]}; `adherence.evaluate` describes each
    ablations      optional, the preset with one key changed at a time: [{changed {key: value}, latency
                    {ss_ms_per_frame, ps_ms, stages_ms}, fps, memory_gb, sizes, quality {psnr_db, ...},
                    setup_s}]; one that could not run is {changed, failure: METRIC}

The meaning of every metric is in `catalogue`.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError, short
from ..files import atomic_path, printable, read_json, whole_text, without_places

SCHEMA_VERSION = 2
WORKING = (".new", ".replaced")
"""Endings of folders that exist only while --overwrite replaces a finished run: its successor, itself."""
ASIDE = (".aside", ".failed")
"""Endings of folders that hold no run: what was in the way of a run, and a failed --overwrite."""
MEASURED_FILE = "measured.json"  # what was measured, from then on until result.json is there
REFERENCE_FILE = "reference.safetensors"  # the campaign's truth, next to the baseline's result.json

# Kind (see _KINDS) -> dotted paths of required fields, or of optional ones (question mark). Others may exist.
_SCHEMA = {
    "int": "run seed sizes.blocks_measured sizes.warmup_blocks sizes.switches sizes.frames_per_block "
           "latency.ss_ms_per_frame.n latency.ps_ms.n",
    "str": "campaign preset title hypothesis created_utc model.name weights.kind decision.rule "
           "decision.rationale latency.clock_disagreement.sentence",
    "str?": "frames_on? tokenizer environment.gpu environment.torch environment.git_commit",
    "bool": "sizes.quick latency.clock_disagreement.available",
    "bool?": "decision.keep environment.git_dirty quality.identical environment.co_scheduled?",
    "int?": "quality.frames_compared? quality.frames_total?",
    "number?": "environment.other_cpu_cores?",
    "number": "model.sizes.height? model.sizes.width? fps playback.fps latency.ss_ms_per_frame.mean "
              "latency.ss_ms_per_frame.p50 latency.ss_ms_per_frame.p95 latency.ss_ms_per_frame.max "
              "latency.ss_with_switches.max "
              "latency.ss_over_target.target_ms",
    "metric": "latency.ss_ms_per_frame.p99 latency.ps_ms.mean latency.ps_ms.p99 latency.ps_ms.max "
              "latency.first_frame_ms playback.startup_buffer_ms playback.stalls_at_zero_buffer "
              "playback.deadline_miss_share memory_gb.peak_allocated memory_gb.peak_reserved "
              "memory_gb.kv_cache fps_with_switches? latency.ps_random_ms.mean? latency.ps_random_ms.p95? "
              "energy.joules_per_frame? energy.mean_power_w? ranks.peak_allocated_gb?",
    "numbers": "prompt_schedule.switch_frames? latency.ss_block_ms latency.ps_ms_all latency.ss_blocks "
               "latency.ps_blocks latency.ps_before_ms_all?",
    "texts": "quality.flags prompt_schedule.prompts?",
    "rows": "events switch_events?",
    "objects": "optimizations ablations? quality.nulls?",
    "plain": "parameters",
    "counts": "built_while_measured? interruptions?",
    "dict?": "decision.gate?",
    "dict": "prompt_schedule? environment.packages environment.env_vars latency.ps_breakdown_ms "
            "latency.stages_ms setup_s quality.psnr_db quality.ssim quality.ms_ssim quality.lpips "
            "quality.clip_delta",
}

_MISSING = object()


def run_label(preset: str, run: int) -> str:
    """The name of a run's folder in its campaign: the preset, or baseline.repeat2 for a repetition."""
    return preset if run == 1 else f"{preset}.repeat{run}"


def na(reason: str, how_to_fix: str) -> dict[str, Any]:
    """A metric that could not be measured: the reason, and the reader's remedy (both non-empty)."""
    if not reason or not how_to_fix:
        raise ValueError("na() needs a reason and a remedy")
    return {"value": None, "reason": reason, "how_to_fix": how_to_fix}


def is_na(metric: Any) -> bool:
    """True for a value made by `na()`."""
    return isinstance(metric, dict) and isinstance(metric.get("reason"), str) \
        and metric.get("value", 0) is None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_event(row: Any) -> bool:
    return isinstance(row, list) and len(row) == 5 and isinstance(row[0], str) and _is_number(row[1]) \
        and _is_number(row[2]) and (row[3] is None or isinstance(row[3], int)) and row[4] in ("host", "cuda")


def _is_name(key: Any) -> bool:
    return isinstance(key, str) and re.fullmatch(r"\w{1,60}", key) is not None


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str)) or (
        isinstance(value, list) and all(isinstance(item, (bool, int, float, str)) for item in value))


def is_plain_mapping(value: Any) -> bool:
    """Whether `value` is a mapping from names to plain values, as a preset's parameters are."""
    return isinstance(value, dict) and all(map(_is_name, value)) and all(map(_is_plain, value.values()))


_KINDS = {
    "str": ("a string", lambda v: isinstance(v, str)),
    "str?": ("a string or null", lambda v: v is None or isinstance(v, str)),
    "int": ("an integer", lambda v: isinstance(v, int) and not isinstance(v, bool)),
    "bool": ("true or false", lambda v: isinstance(v, bool)),
    "bool?": ("true, false or null", lambda v: v is None or isinstance(v, bool)),
    "number": ("a number", _is_number),
    "number?": ("a number or null", lambda v: v is None or _is_number(v)),
    "metric": ("a number, or null with a reason", lambda v: _is_number(v) or is_na(v)),
    "numbers": ("a list of numbers", lambda v: isinstance(v, list) and all(map(_is_number, v))),
    "int?": ("an integer or null", lambda v: v is None or isinstance(v, int) and not isinstance(v, bool)),
    "texts": ("a list of strings", lambda v: isinstance(v, list) and all(isinstance(t, str) for t in v)),
    "rows": ("a list of events, [name, start, duration, block, clock]",
             lambda v: isinstance(v, list) and all(map(_is_event, v))),
    "objects": ("a list of objects", lambda v: isinstance(v, list) and all(isinstance(o, dict) for o in v)),
    "plain": ("an object with names and plain values", is_plain_mapping),
    "counts": ("an object with names and numbers", lambda v: isinstance(v, dict) and all(map(_is_name, v))
               and all(_is_number(n) or is_na(n) for n in v.values())),
    "dict": ("an object", lambda v: isinstance(v, dict)),
    "dict?": ("an object or null", lambda v: v is None or isinstance(v, dict)),
}


def _check_json(value: Any, where: str) -> None:
    """Refuse values that JSON cannot hold, naming their path: a NaN must not surface first in a chart."""
    if isinstance(value, float) and not math.isfinite(value) or type(value) is int and abs(value) > 2**1000:
        raise UserError(f"{where} is {short(value)}: results hold finite numbers only, store results.na(...)")
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise UserError(f"{where} has the key {key!r} of type {type(key).__name__}: keys are strings")
            whole_text(key, f"{where}, a key", controls=True)
            _check_json(item, f"{where}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _check_json(item, f"{where}[{index}]")
    elif isinstance(value, str):
        whole_text(value, where, controls=True)
    elif value is not None and type(value) not in (int, float, bool):
        raise UserError(f"{where} is a {type(value).__name__}: make it a plain number, string, list or dict")


def validate(result: Any, source: str = "result") -> dict[str, Any]:
    """Return `result` if it follows the schema; else raise UserError: `source`, field, remedy."""
    if not isinstance(result, dict):
        raise UserError(f"{source}: is a {type(result).__name__}, not an object; run the preset again")
    version = result.get("schema_version")
    if version != SCHEMA_VERSION:
        newer = isinstance(version, int) and version > SCHEMA_VERSION
        remedy = "update this package" if newer else "run the preset again"
        raise UserError(f"{source}: schema_version is {version!r}, expected {SCHEMA_VERSION}; {remedy}")
    if result.get("status") != "ok":
        raise UserError(f"{source}: status is {result.get('status')!r}, not 'ok'; run the preset again")
    for kind, paths in _SCHEMA.items():
        words, accepts = _KINDS[kind]
        for path in paths.split():
            optional, path = path.endswith("?"), path.removesuffix("?")
            value: Any = result
            for key in path.split("."):
                value = value.get(key, _MISSING) if isinstance(value, dict) else _MISSING
            if value is _MISSING and not optional:
                raise UserError(f"{source}: the field {path} is missing; run the preset again")
            if value is not _MISSING and not accepts(value):
                raise UserError(f"{source}: {path} is {short(value)}, not {words}; run the preset again")
    _check_json(result, f"{source}: $")
    return result


GIVEN = ("parameters", "prompt_schedule")
"""Sections with the values that a run was given, by which a finished run is recognised."""


def write_result(path: str | Path, result: dict[str, Any]) -> None:
    """Validate and write `result` as JSON, atomically: readers see the old file or the complete new one.

    Each top-level key has one line, so a diff of two runs stays readable. Messages of libraries lose the
    paths of this machine (`without_places`); what the run was given, `GIVEN`, stays as it is. Raises
    UserError (invalid, disk full).
    """
    validate(result, str(path))
    published = {key: value if key in GIVEN else plain_json(value, without_places)
                 for key, value in result.items()}
    lines = (f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False, allow_nan=False)}"
             for key, value in published.items())
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


_RENAMED = {"rooms": "optimizations", "script": "prompt_schedule", "world": "adherence",
            "variations": "ablations"}
_RENAMED_IN_ADHERENCE = {"not_judged": "not_evaluated", "judged_from": "evaluated_from",
                         "judged_frames": "evaluated_frames"}


def upgraded(result: Any) -> Any:
    """Return `result` with the names of schema version 2; anything but a version 1 result is unchanged."""
    if not isinstance(result, dict) or result.get("schema_version") != 1:
        return result
    result = {_RENAMED.get(key, key): value for key, value in result.items()} | {"schema_version": 2}
    if isinstance(applied := result.get("optimizations"), list):
        result["optimizations"] = [_with_exactness(entry) for entry in applied]
    if isinstance(decision := result.get("decision"), dict) and "gate" in decision:
        result["decision"] = decision | {"gate": _with_exactness(decision["gate"])}
    if isinstance(quality := result.get("quality"), dict):
        result["quality"] = {_RENAMED.get(key, key): value for key, value in quality.items()}
    if "adherence" in result:
        result["adherence"] = _renamed_inside(result["adherence"], _RENAMED_IN_ADHERENCE)
    return result


def _with_exactness(entry: Any) -> Any:
    """Rename `level` to `exactness`, and its value `exact` to `bitwise`, in an optimization or a gate."""
    if not isinstance(entry, dict) or "level" not in entry:
        return entry
    value = "bitwise" if entry["level"] == "exact" else entry["level"]
    return {"exactness" if key == "level" else key: value if key == "level" else item
            for key, item in entry.items()}


def _renamed_inside(value: Any, names: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {names.get(key, key): _renamed_inside(item, names) for key, item in value.items()}
    return [_renamed_inside(item, names) for item in value] if isinstance(value, list) else value


def read_result(path: str | Path) -> dict[str, Any]:
    """Read, upgrade and validate one result.json; raise UserError naming the file, the field and the remedy.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"cannot read {path}: it does not exist; run the preset first")
    return validate(upgraded(read_json(path, "delete it and run the preset again")), str(path))


def read_campaign(folder: str | Path) -> tuple[list[dict[str, Any]], list[tuple[Path, str]]]:
    """Read `folder/*/result.json`: (valid results, baseline first, then by folder name; problems as (path,
    reason)).

    One bad file never hides the others. A result counts only in the folder of its own name (`run_label`): a
    copy of a run is not its repetition. A preset folder with an executed notebook but without a result is a
    problem too: that run did not finish. Raises UserError only if `folder` is not a folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"campaign folder {folder} does not exist; run the campaign first, or check its name")
    results: list[dict[str, Any]] = []
    problems: list[tuple[Path, str]] = []
    for preset_folder in sorted(item for item in folder.iterdir() if item.is_dir()):
        if preset_folder.name.endswith((*WORKING, *ASIDE)):
            continue
        path = preset_folder / "result.json"
        if path.exists():
            try:
                results.append(_in_its_folder(read_result(path), path))
            except UserError as error:
                problems.append((path, str(error)))
        elif (preset_folder / "notebook.ipynb").exists() and "summary" not in preset_folder.name:
            problems.append((path, f"{path}: missing although the notebook was executed, so the run did not "
                                   "finish; read the end of the notebook and run the preset again"))
    results.sort(key=lambda result: (result["preset"] != "baseline", result["run"]))
    return results, problems


def _in_its_folder(result: dict[str, Any], path: Path) -> dict[str, Any]:
    label = run_label(result["preset"], result["run"])
    if path.parent.name != label:
        raise UserError(f"{path}: is the result of {label} and counts only in a folder of that name; measure "
                        "a repetition with --repeat, or move a copy out of the campaign")
    return result


def plain_json(value: Any, text: Callable[[str], str] = printable) -> Any:
    """`value` as it is read back: tuples as lists, and texts that a file can hold. A message of a library
    with half a character in it must not cost the measurement.

    Args:
        text: applied to every text.
    """
    if isinstance(value, str):
        return text(value)
    if isinstance(value, Mapping):
        return {plain_json(key, text): plain_json(item, text) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_json(item, text) for item in value]
    return value


def is_finite(value: Any) -> bool:
    """True for a number that can be plotted or compared: no NaN, no infinity, no bool."""
    try:
        return _is_number(value) and math.isfinite(value)
    except OverflowError:  # an integer that no double can hold
        return False


def lookup(result: Any, path: str) -> Any:
    """The value at a dotted path; None if any part of the path is missing."""
    for key in path.split("."):
        result = result.get(key) if isinstance(result, Mapping) else None
    return result


def number(result: Mapping[str, Any], path: str) -> float | None:
    """The finite number at a dotted path; None if it is missing, n/a or something else."""
    value = lookup(result, path)
    return float(value) if is_finite(value) else None


def numbers(result: Mapping[str, Any], path: str) -> list[float]:
    """The finite numbers of the list at a dotted path; empty if it is missing."""
    values = lookup(result, path)
    return [float(value) for value in values if is_finite(value)] if isinstance(values, list) else []


def block_ms(result: Mapping[str, Any]) -> float | None:
    """Mean steady-state block interval; None if it is missing."""
    mean, frames = number(result, "latency.ss_ms_per_frame.mean"), number(result, "sizes.frames_per_block")
    return None if mean is None or frames is None else mean * frames
