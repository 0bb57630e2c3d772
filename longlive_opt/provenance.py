"""Where a number came from: machine, versions, commit, settings that change arithmetic.

Nothing here may fail a run: what cannot be found is null, and `reasons` says why. No host name, no paths.
"""

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longlive_opt.results import na

if TYPE_CHECKING:
    import torch

_ENV_PREFIXES = ("TORCH_", "PYTORCH_", "TORCHINDUCTOR_", "TRITON_", "CUDA_", "CUBLAS_", "CUDNN_", "OMP_",
                 "MKL_", "LONGLIVE_OPT_")
_ENV_NAMES = ("NVIDIA_TF32_OVERRIDE",)
_SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|CREDENTIAL|KEY$|URL")
_THROTTLE_BITS = {0x4: "sw_power_cap", 0x8: "hw_slowdown", 0x10: "sync_boost", 0x20: "sw_thermal",
                  0x40: "hw_thermal", 0x80: "hw_power_brake"}


def environment(device: "torch.device | str", *, attention_backend: str | None = None,
                co_scheduled: bool = False) -> dict[str, Any]:
    """The `environment` section of result.json, except clocks_before and clocks_after (see `clocks`).

    `attention_backend`: what was pinned for this run. `co_scheduled`: something else ran beside it.
    """
    import torch

    device = torch.device(device)
    reasons: dict[str, str] = {}
    found: dict[str, Any] = {
        "gpu": None, "driver": None, "gpu_power_limit_w": None, "ecc": None, "mig": None,
        "cuda": torch.version.cuda, "torch": str(torch.__version__), "cudnn": None,
        "triton": _version("triton"), "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}", "cpu": _cpu_model(),
        "cpu_threads": torch.get_num_threads(), "attention_backend": attention_backend,
        "float32_matmul_precision": torch.get_float32_matmul_precision(), "co_scheduled": co_scheduled,
        "packages": packages(), "env_vars": numerics_env_vars(os.environ),
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
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


def memory_gb(device: "torch.device | str", kv_cache_bytes: int | None = None) -> dict[str, Any]:
    """The `memory_gb` section, in 1e9 bytes: allocator peaks since `torch.cuda.reset_peak_memory_stats`, and
    what is taken of the GPU now, by this process, its CUDA context and everybody else.
    """
    import torch

    device = torch.device(device)
    cache: Any = na("the cache did not report its size", "give it an nbytes property")
    if kv_cache_bytes is not None:
        cache = kv_cache_bytes / 1e9
    if device.type != "cuda":
        missing = na(f"the allocator is watched on CUDA only; the run was on {device.type}", "run on a GPU")
        figures = ("peak_allocated", "peak_reserved", "device_used")
        return dict.fromkeys(figures, missing) | {"kv_cache": cache}
    free, total = torch.cuda.mem_get_info(device)
    return {"peak_allocated": torch.cuda.max_memory_allocated(device) / 1e9,
            "peak_reserved": torch.cuda.max_memory_reserved(device) / 1e9,
            "device_used": (total - free) / 1e9, "kv_cache": cache}


def throttle_reasons(mask: str | None) -> list[str] | None:
    """Names of the bits of nvidia-smi's hexadecimal mask; idle and application clocks are no throttling."""
    try:
        bits = int(mask or "", 16)
    except ValueError:
        return None
    return [name for bit, name in _THROTTLE_BITS.items() if bits & bit]


def packages() -> dict[str, str]:
    """name -> version of every installed distribution: what `pip freeze` knows, without its paths."""
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
    """(commit, uncommitted changes, reason if unknown) of the checkout that holds `folder`. What runs write,
    outputs/ and the log, does not count as a change: it is no input of a run.

    Without git history, as on a GPU host that got a copy of the files, LONGLIVE_OPT_GIT_COMMIT and
    LONGLIVE_OPT_GIT_DIRTY (0 or 1) say it.
    """
    commit = _run("git", "-C", str(folder), "rev-parse", "HEAD")
    if commit:
        written = (":(top,exclude)outputs", ":(top,exclude)OPTIMIZATION_LOG.md")
        changes = _run("git", "-C", str(folder), "status", "--porcelain", "--", ":(top)", *written)
        return commit, None if changes is None else bool(changes), None
    commit = variables.get("LONGLIVE_OPT_GIT_COMMIT") or None
    dirty = {"0": False, "false": False, "1": True, "true": True}.get(
        variables.get("LONGLIVE_OPT_GIT_DIRTY", "").lower())
    return commit, dirty, None if commit else "no git history here and LONGLIVE_OPT_GIT_COMMIT is not set"


def _run(*command: str) -> str | None:
    """Stripped standard output, or None if the program is missing, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _nvidia_smi(device: "torch.device", fields: tuple[str, ...]) -> tuple[list[str | None], str | None]:
    """(one value or None per field, reason if the query failed)."""
    import torch

    index = torch.cuda.current_device() if device.index is None else device.index
    # By UUID: nvidia-smi does not follow CUDA_VISIBLE_DEVICES, its indices are others than torch's.
    uuid = getattr(torch.cuda.get_device_properties(index), "uuid", None)
    if uuid is None:
        return [None] * len(fields), "torch does not report the device's UUID"
    output = _run("nvidia-smi", f"--id=GPU-{str(uuid).removeprefix('GPU-')}",
                  f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits")
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
