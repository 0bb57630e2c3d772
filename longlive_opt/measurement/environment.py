"""Where a number comes from: machine, versions, commit, and settings that change arithmetic.

Nothing here may fail a run: unknown values are null, and `reasons` says why. No host name, no paths.
"""

import contextlib
import importlib.metadata
import os
import platform
import re
import subprocess
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .result import na

if TYPE_CHECKING:
    import torch

_ENV_PREFIXES = ("TORCH_", "PYTORCH_", "TORCHINDUCTOR_", "TRITON_", "CUDA_", "CUBLAS_", "CUDNN_", "OMP_",
                 "GOMP_", "KMP_", "MKL_", "LONGLIVE_OPT_")
_ENV_NAMES = ("NVIDIA_TF32_OVERRIDE",)
_SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|CREDENTIAL|KEY$|URL")
THROTTLE_BITS = {0x4: "sw_power_cap", 0x8: "hw_slowdown", 0x10: "sync_boost", 0x20: "sw_thermal",
                  0x40: "hw_thermal", 0x80: "hw_power_brake"}
FULL_MODEL_GB = 30
"""Memory of a GPU, in 1e9 bytes, for which the full-size model is chosen where nobody chose."""
_CROWDED_CORES = 0.5  # cores kept busy by other processes; above this, a CPU run was not alone
_NOT_WATCHED = {"other_cpu_cores": None, "co_scheduled": None, "reasons": dict.fromkeys(
    ("other_cpu_cores", "co_scheduled"), "not watched in this run")}
# Written by runs: neither an input of a run nor a change of the code.
_WRITTEN = (":(top,exclude)outputs", ":(top,exclude)OPTIMIZATION_LOG.md")
_SHORTEST_S = 0.5  # /proc counts hundredths of a second


def environment(device: "torch.device | str", *, attention_backend: str | None = None,
                company: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The `environment` section of result.json, except clocks_before and clocks_after (see `clocks`).

    `attention_backend`: the backend pinned for this run. `company`: other processes during the run, from
    `company_of`.
    """
    import torch

    device = torch.device(device)
    company = company or _NOT_WATCHED
    reasons: dict[str, str] = dict(company["reasons"])
    found: dict[str, Any] = {
        **machine(device), "driver": None, "gpu_power_limit_w": None, "ecc": None, "mig": None,
        "cuda": torch.version.cuda, "cudnn": None,
        "triton": _version("triton"), "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu_threads": torch.get_num_threads(), "attention_backend": attention_backend,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "co_scheduled": company["co_scheduled"], "other_cpu_cores": company["other_cpu_cores"],
        "packages": packages(), "env_vars": numerics_env_vars(os.environ),
    }
    if device.type == "cuda":
        found["cudnn"] = str(torch.backends.cudnn.version())
        values, reason = _nvidia_smi(device, ("driver_version", "power.limit", "ecc.mode.current",
                                              "mig.mode.current"))
        found["driver"], limit, found["ecc"], found["mig"] = values
        found["gpu_power_limit_w"] = _number(limit)
        reasons |= {key: reason or "not reported by nvidia-smi" for key in ("driver", "gpu_power_limit_w")
                    if found[key] is None}
    else:
        unknown = ("gpu", "driver", "cudnn", "gpu_power_limit_w")
        reasons |= dict.fromkeys(unknown, f"the run was on {device.type}")
    found["git_commit"], found["git_dirty"], reason = git_state(Path(__file__).parent, os.environ)
    if reason:
        reasons["git_commit"] = reason
    return found | {"reasons": reasons}


def machine(device: "torch.device | str") -> dict[str, str | None]:
    """The part of `environment` that two runs must share to be compared: gpu, cpu, torch."""
    import torch

    device = torch.device(device)
    return {"gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
            "cpu": _cpu_model(), "torch": str(torch.__version__)}


def fitting_profile() -> tuple[str, str]:
    """The name of the profile in params/profiles that fits this machine, and a sentence that says so. Asks
    nvidia-smi, so that nothing has to load torch.
    """
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1")
    found = None if hidden else _run("nvidia-smi", "--query-gpu=name,memory.total",
                                     "--format=csv,noheader,nounits")
    name, _, memory = (found or "").partition("\n")[0].rpartition(",")
    mebibytes = _number(memory)
    if mebibytes is None:
        return "laptop", "no GPU here: profile laptop, the tiny model on the CPU, a few blocks"
    gigabytes = mebibytes * 2**20 / 1e9
    if gigabytes < FULL_MODEL_GB:
        return "h100_tiny", (f"{name} with {gigabytes:.0f} GB, {FULL_MODEL_GB} suffice for the full-size "
                             "model: profile h100_tiny, the tiny model on the GPU")
    return "h100", f"{name} with {gigabytes:.0f} GB: profile h100, LongLive-1.3B with random weights"


def clocks(device: "torch.device | str") -> dict[str, Any]:
    """GPU clocks, temperature, power and throttle reasons now; null, with a `reason`, where unknown."""
    import torch

    device = torch.device(device)
    names = ("sm_mhz", "memory_mhz", "temperature_c", "power_w")
    if device.type != "cuda":
        return dict.fromkeys((*names, "throttle_reasons")) | {"reason": f"the run was on {device.type}"}
    values, reason = _nvidia_smi(device, ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw"))
    found: dict[str, Any] = dict(zip(names, map(_number, values), strict=True))
    # The field was renamed; old drivers refuse a query that holds a name they do not know.
    for field in ("clocks_event_reasons.active", "clocks_throttle_reasons.active"):
        (mask,), _ = _nvidia_smi(device, (field,))
        if mask:
            break
    found["throttle_reasons"] = throttle_reasons(mask)
    return found | ({"reason": reason} if reason else {})


def cpu_seconds(proc: Path = Path("/proc")) -> tuple[float, float, float] | None:
    """Three times in seconds: by the clock, the busy time of the CPUs that this process may use, and the CPU
    time of this process and its descendants. None if the system does not report them.
    """
    try:
        usable, ticks = os.sched_getaffinity(0), os.sysconf("SC_CLK_TCK")
        lines = (proc / "stat").read_text(encoding="ascii").splitlines()
    except (OSError, AttributeError):
        return None
    # All but idle and iowait; guest time is already part of user time.
    busy = [sum(int(row[i]) for i in (1, 2, 3, 6, 7, 8)) for row in map(str.split, lines)
            if re.fullmatch(r"cpu\d+", row[0]) and int(row[0][3:]) in usable]
    return time.perf_counter(), sum(busy) / ticks, sum(_family(proc, os.getpid()).values()) / ticks


def company_of(device: "torch.device | str", before: tuple[float, float, float] | None,
               after: tuple[float, float, float] | None) -> dict[str, Any]:
    """Describe other processes during a measurement, from `cpu_seconds` before and after it:
    {other_cpu_cores, co_scheduled, reasons for null values}.

    other_cpu_cores: average number of cores that other processes kept busy. co_scheduled: on the CPU, whether
    this exceeds half a core; on a GPU, whether another process uses it.
    """
    import torch

    device = torch.device(device)
    cores = unknown = None
    if before is None or after is None:
        unknown = "not measured: the system does not report it"
    elif after[0] - before[0] < _SHORTEST_S:
        unknown = f"measured for less than {_SHORTEST_S} s"
    else:
        clock, busy, own = (b - a for a, b in zip(before, after, strict=True))
        cores = max(0.0, (busy - own) / clock)
    shared, why = None if cores is None else cores > _CROWDED_CORES, unknown
    if device.type == "cuda":
        shared, why = _gpu_is_shared(device)
    reasons = {"other_cpu_cores": unknown, "co_scheduled": why}
    return {"other_cpu_cores": cores, "co_scheduled": shared,
            "reasons": {key: reason for key, reason in reasons.items() if reason}}


def memory_gb(device: "torch.device | str", kv_cache_bytes: int | None = None) -> dict[str, Any]:
    """The `memory_gb` section in 1e9 bytes. On a GPU: allocator peaks since `reset_peak_memory`, and GPU
    memory in use now by this process, its CUDA context and all other processes. On the CPU: the peak of the
    process's resident memory since then.
    """
    import torch

    device = torch.device(device)
    cache: Any = na("the cache did not report its size", "give it an nbytes property")
    if kv_cache_bytes is not None:
        cache = kv_cache_bytes / 1e9
    if device.type != "cuda":
        missing = na(f"the allocator is watched on CUDA only; the run was on {device.type}", "run on a GPU")
        figures = ("peak_allocated", "peak_reserved", "device_used")
        return dict.fromkeys(figures, missing) | {"peak_resident": _peak_resident_gb(), "kv_cache": cache}
    free, total = torch.cuda.mem_get_info(device)
    return {"peak_allocated": torch.cuda.max_memory_allocated(device) / 1e9,
            "peak_reserved": torch.cuda.max_memory_reserved(device) / 1e9,
            "device_used": (total - free) / 1e9, "kv_cache": cache}


def reset_peak_memory(device: "torch.device | str") -> None:
    """Let the peaks of `memory_gb` begin now. On the CPU this needs Linux's /proc; without it the peak of the
    process's resident memory keeps what came before.
    """
    import torch

    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # proc(5): resets VmHWM


def _peak_resident_gb() -> Any:
    """The process's largest resident set since `reset_peak_memory`, or n/a."""
    try:
        text = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        text = ""
    found = re.search(r"^VmHWM:\s*(\d+) kB$", text, flags=re.MULTILINE)
    return int(found[1]) * 1024 / 1e9 if found else na("the system does not report it", "run on Linux")


def allocator_counts(device: "torch.device | str") -> dict[str, int]:
    """Count the requests of a GPU's allocator to the driver so far: {driver_allocations, driver_frees} and
    {allocator_retries}, which are requests after memory ran out and the cache was released. Empty on other
    devices.
    """
    import torch

    if torch.device(device).type != "cuda":
        return {}
    counts = torch.cuda.memory_stats(device)
    names = {"driver_allocations": "num_device_alloc", "driver_frees": "num_device_free",
             "allocator_retries": "num_alloc_retries"}
    return {name: counts.get(key, 0) for name, key in names.items()}


def throttle_reasons(mask: str | None) -> list[str] | None:
    """Names of the bits of nvidia-smi's hexadecimal mask, without idle and application clocks."""
    try:
        bits = int(mask or "", 16)
    except ValueError:
        return None
    return [name for bit, name in THROTTLE_BITS.items() if bits & bit]


def packages() -> dict[str, str]:
    """name -> version of every installed distribution, as in `pip freeze` but without paths."""
    found = {dist.metadata["Name"]: dist.version for dist in importlib.metadata.distributions()}
    return {name: found[name] for name in sorted(filter(None, found), key=str.lower) if found[name]}


def numerics_env_vars(variables: "os._Environ[str] | dict[str, str]") -> dict[str, str]:
    """The variables that can change arithmetic, speed or memory, without paths, ids and secrets."""
    found = {}
    for name in sorted(variables):
        if (name.startswith(_ENV_PREFIXES) or name in _ENV_NAMES) and not _SECRET.search(name):
            value = variables[name]
            private = any(sign in value for sign in ("/", "\\", "~")) or value.startswith(("GPU-", "MIG-"))
            found[name] = "(hidden: a path or device id)" if private else value
    return found


def git_state(folder: Path, variables: "os._Environ[str] | dict[str, str]",
              ) -> tuple[str | None, bool | None, str | None]:
    """(commit, uncommitted changes, reason if unknown) of the checkout that holds `folder`. Files that runs
    write (outputs/ and the log) do not count as changes, because they are no input of a run.

    On a GPU host with a copy of the files, LONGLIVE_OPT_GIT_COMMIT and LONGLIVE_OPT_GIT_DIRTY (0 or 1) give
    these values. They take precedence over an existing git history, which knows nothing of the copy.
    """
    given = variables.get("LONGLIVE_OPT_GIT_COMMIT") or None
    commit = None if given else _run("git", "-C", str(folder), "rev-parse", "HEAD")
    if commit:
        changes = _run("git", "-C", str(folder), "status", "--porcelain", "--", ":(top)", *_WRITTEN)
        return commit, None if changes is None else bool(changes), None
    dirty = {"0": False, "false": False, "1": True, "true": True}.get(
        variables.get("LONGLIVE_OPT_GIT_DIRTY", "").lower())
    if given:
        return given, dirty, None
    return None, dirty, _git_trouble(folder)


def _git_trouble(folder: Path) -> str:
    """Why git knows no commit of `folder`."""
    with contextlib.suppress(OSError, subprocess.SubprocessError, UnicodeDecodeError):
        command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False,
                              env={**os.environ, "LC_ALL": "C"})
        if "dubious ownership" in done.stderr:
            return ("git refuses the checkout, which belongs to another user (dubious ownership); in the "
                    "project's folder, run 'git config --global --add safe.directory \"$PWD\"'")
    return "no git history here and LONGLIVE_OPT_GIT_COMMIT is not set"


def code_since(commits: Iterable[str | None]) -> list[str]:
    """Return one sentence for each of the runs' `commits` that differs from this checkout's code, with the
    number of commits in between. Commits that changed only results do not count.
    """
    root, sentences = Path(__file__).parent, []
    ours, dirty, _ = git_state(root, os.environ)
    for commit in sorted({commit or "" for commit in commits}):
        shown = commit[:12] or "unknown"
        count = ours and commit and _run("git", "-C", str(root), "rev-list", "--count", f"{commit}..{ours}",
                                         "--", ":(top)", *_WRITTEN)
        if count == "0" and not dirty:
            continue
        if not count:
            sentences.append(f"Code: the runs' commit is {shown}; it is unknown by how many commits the code "
                             "that wrote this log is newer.")
            continue
        if count == "0":
            sentences.append(f"Code: this log was written by the runs' code, {shown}, with uncommitted "
                             "changes.")
            continue
        changes = ", with uncommitted changes" if dirty else ""
        sentences.append(f"Code: this log was written by code that is {count} commits newer than that of the "
                         f"runs at {shown}{changes}: words and rules are its own, the numbers are the runs'.")
    return sentences


def _run(*command: str) -> str | None:
    """Return stripped standard output, or None if the program is missing, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _family(proc: Path, pid: int) -> dict[int, int]:
    """CPU time, in ticks, of process `pid` and of each descendant, including that of their ended ones."""
    parents, ticks = {}, {}
    for path in proc.glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # the process has ended
            fields = path.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            number = int(path.parent.name)
            parents[number], ticks[number] = int(fields[1]), sum(map(int, fields[11:15]))
    family = {pid}
    while more := {child for child, parent in parents.items() if parent in family} - family:
        family |= more
    return {member: ticks.get(member, 0) for member in family}


def _gpu_is_shared(device: "torch.device") -> tuple[bool | None, str | None]:
    """(whether another process holds the GPU, reason if unknown); this process must already hold it."""
    uuid = gpu_uuid(device)
    listed = _run("nvidia-smi", f"--id={uuid}", "--query-compute-apps=pid", "--format=csv,noheader") or ""
    holders = {int(word) for word in listed.split() if word.isdigit()} if uuid else set()
    # In a container this process may be listed by another number, or no process may be listed. Ranks of this
    # process may be listed on each other's GPUs.
    if len(holders) > 1 or os.getpid() in holders:
        others = holders - set(_family(Path("/proc"), os.getpid()))
        return len(others) > (os.getpid() not in holders), None
    return None, "nvidia-smi does not name this process among those that hold the GPU"


def gpu_uuid(device: "torch.device") -> str | None:
    """The GPU's UUID. nvidia-smi ignores CUDA_VISIBLE_DEVICES, so its indices differ from torch's."""
    import torch

    index = torch.cuda.current_device() if device.index is None else device.index
    uuid = getattr(torch.cuda.get_device_properties(index), "uuid", None)
    return None if uuid is None else f"GPU-{str(uuid).removeprefix('GPU-')}"


def _nvidia_smi(device: "torch.device", fields: tuple[str, ...]) -> tuple[list[str | None], str | None]:
    """(one value or None per field, reason if the query failed)."""
    uuid = gpu_uuid(device)
    if uuid is None:
        return [None] * len(fields), "torch does not report the device's UUID"
    output = _run("nvidia-smi", f"--id={uuid}", f"--query-gpu={','.join(fields)}",
                  "--format=csv,noheader,nounits")
    values = [value.strip() for value in (output or "").split(",")]
    if len(values) != len(fields) or not output:
        return [None] * len(fields), "nvidia-smi is missing or refused the query"
    return [None if "N/A" in value or "Not Supported" in value else value for value in values], None


def _number(text: str | None) -> float | None:
    try:
        return float(text or "")
    except ValueError:
        return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str | None:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or None
    names = re.findall(r"^model name\s*:\s*(.+)$", text, flags=re.MULTILINE)
    return names[0] if names else platform.processor() or None
