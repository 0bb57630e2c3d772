"""The GPU's clock, power, temperature, throttling and energy during a stream, read from NVML (NVIDIA's
management library).

    telemetry = Telemetry([device])
    with telemetry.recording(timeline.now_ms) as samples:
        ...                                   # the stream
    section, energy = samples.section(), samples.energy(begin_ms, end_ms, video_frames)

A separate thread reads four times per second. Each reading is a few calls of NVML's library, which do not
block Python. NVML comes with the driver, its bindings with the optional package `nvidia-ml-py`. Without it,
or without a GPU, both sections are n/a with a reason. Nothing here may fail a run.
"""

from __future__ import annotations

import bisect
import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .environment import THROTTLE_BITS, gpu_uuid
from .result import is_na, na

if TYPE_CHECKING:
    import torch

PERIOD_S = 0.25
"""Time between two readings."""
FIELDS = ("sm_mhz", "power_w", "temperature_c", "throttle", "energy_j")


class Telemetry:
    """Reads the first of some GPUs, and the energy of all. If that is impossible, `missing` is the n/a of
    both sections, else None.
    """

    def __init__(self, devices: Sequence[torch.device], period_s: float = PERIOD_S):
        self.period_s = period_s
        self.missing: dict[str, Any] | None = None
        self._nvml: Any = None
        self._handles: list[Any] = []
        if devices[0].type != "cuda":
            self.missing = na(f"the run was on {devices[0].type}", "run on an NVIDIA GPU")
            return
        try:
            import pynvml
        except ImportError:
            self.missing = na("the package nvidia-ml-py is not installed", "pip install nvidia-ml-py")
            return
        # NVML ignores CUDA_VISIBLE_DEVICES, so its indices differ from torch's.
        uuids = [gpu_uuid(device) for device in devices]
        if None in uuids:
            self.missing = na("torch does not report the GPU's UUID", "update PyTorch")
            return
        try:
            pynvml.nvmlInit()
            self._handles = [pynvml.nvmlDeviceGetHandleByUUID(uuid) for uuid in uuids]
            self._nvml = pynvml
        except pynvml.NVMLError as error:
            self.missing = na(f"NVML cannot access this GPU: {error}", "check whether nvidia-smi works")

    @contextlib.contextmanager
    def recording(self, now_ms: Callable[[], float]) -> Iterator[Samples]:
        """Read while the body runs: at once, then once per period, and at the end.

        Args:
            now_ms: the clock for the readings, the same as the stream's timeline.
        """
        samples = Samples(self.period_s, self.missing)
        if self.missing is not None:
            yield samples
            return
        ended = threading.Event()

        def read() -> None:
            while True:
                samples.add(now_ms(), self.read())
                if ended.is_set():
                    return
                ended.wait(self.period_s)

        thread = threading.Thread(target=read, name="telemetry", daemon=True)
        thread.start()
        try:
            yield samples
        finally:
            ended.set()
            thread.join()

    def read(self) -> dict[str, float | int | None]:
        """Take one reading of `FIELDS`, null for values that are not reported; `throttle` is a mask."""
        nvml = self._nvml
        # NVML renamed this query; old drivers and old bindings know only one name.
        masks = (self._ask(getattr(nvml, f"nvmlDeviceGetCurrentClocks{name}Reasons", None))
                 for name in ("Event", "Throttle"))
        energies = [self._ask(nvml.nvmlDeviceGetTotalEnergyConsumption, of=handle)
                    for handle in self._handles]
        return {"sm_mhz": self._ask(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_SM),
                "power_w": _scaled(self._ask(nvml.nvmlDeviceGetPowerUsage)),
                "temperature_c": self._ask(nvml.nvmlDeviceGetTemperature, nvml.NVML_TEMPERATURE_GPU),
                "throttle": next((mask for mask in masks if mask is not None), None),
                "energy_j": None if None in energies else _scaled(sum(energies))}

    def _ask(self, question: Callable[..., int] | None, *arguments: int, of: Any = None) -> int | None:
        """Args: of: a GPU's handle; None: the first."""
        try:
            return question(self._handles[0] if of is None else of, *arguments) if question else None
        except self._nvml.NVMLError:
            return None


class Samples:
    """The readings of one stream."""

    def __init__(self, period_s: float, missing: Mapping[str, Any] | None = None):
        self.period_s = period_s
        self._missing = missing
        self._at_ms: list[float] = []
        self._rows: list[Mapping[str, Any]] = []

    def add(self, at_ms: float, reading: Mapping[str, Any]) -> None:
        self._at_ms.append(at_ms)
        self._rows.append(reading)

    def section(self) -> dict[str, Any]:
        """Return {period_s, t_s [], sm_mhz [], power_w [], temperature_c [], throttled {reason: share of
        readings}} with times since the stream's beginning and null for values that the GPU does not report;
        or n/a.
        """
        if self._missing is not None or not self._rows:
            return dict(self._missing or na("nothing was read", "measure more blocks"))
        lists = {name: [row[name] for row in self._rows] for name in ("sm_mhz", "power_w", "temperature_c")}
        masks = [row["throttle"] for row in self._rows if row["throttle"] is not None]
        shares = {reason: sum(bool(mask & bit) for mask in masks) / len(masks)
                  for bit, reason in THROTTLE_BITS.items()} if masks else {}
        return {"period_s": self.period_s, "t_s": [round(at / 1e3, 3) for at in self._at_ms], **lists,
                "throttled": {reason: share for reason, share in shares.items() if share}}

    def energy(self, begin_ms: float, end_ms: float, video_frames: int) -> dict[str, Any]:
        """Return {joules_per_frame, mean_power_w, joules: METRIC, seconds, frames} for the part of the stream
        from `begin_ms` to `end_ms`.
        """
        seconds = (end_ms - begin_ms) / 1e3
        joules = self._joules(begin_ms, end_ms)
        known = not is_na(joules)
        return {"joules_per_frame": joules / video_frames if known else joules,
                "mean_power_w": joules / seconds if known else joules,
                "joules": joules, "seconds": seconds, "frames": video_frames}

    def _joules(self, begin_ms: float, end_ms: float) -> Any:
        if self._missing is not None:
            return dict(self._missing)
        counted = [(at, row["energy_j"]) for at, row in zip(self._at_ms, self._rows, strict=True)
                   if row["energy_j"] is not None]
        if len(counted) < 2:
            return na("this GPU does not count its energy", "measure on one that does (Volta or newer)")
        times, values = zip(*counted)
        begun, ended = (_between(times, values, at) for at in (begin_ms, end_ms))
        return ended - begun


def _between(times: Sequence[float], values: Sequence[float], at: float) -> float:
    """Interpolate linearly between the readings around `at`."""
    after = min(max(1, bisect.bisect_left(times, at)), len(times) - 1)
    (t0, t1), (v0, v1) = times[after - 1:after + 1], values[after - 1:after + 1]
    return v0 + (v1 - v0) * (at - t0) / (t1 - t0) if t1 > t0 else v1


def _scaled(thousandths: int | None) -> float | None:
    return None if thousandths is None else thousandths / 1e3
