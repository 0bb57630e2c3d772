"""Roofline of a preset: the kernels of a steady block against ceilings measured in the same run.

`work` counts what a block has to compute, `ceilings` times every operator alone, and `block_trace` records
what ran. The floor of a kind of operator is the sum of its operators at their ceilings, one after the other;
that of norms is the time to move their bytes at the speed of a copy. A block cannot be faster than the sum
without fewer operations, smaller formats, faster kernels or several GPUs.

A kernel belongs to the stage whose span contains it, and to a kind by its name. On the CPU, kernels are
PyTorch's operators with the time that they spend outside of other recorded operators.

    study = Roofline.from_notebook(globals())
    study.build()
    study.measure()     # ceilings, then a traced and a timed stream
    study.kinds_table(), study.kernels_table(), study.ceilings_table()
"""

from __future__ import annotations

import gc
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from ..config import TRACED_BLOCKS, ExperimentConfig, notebook_parameters, preset_files, unknown_preset
from ..errors import UserError
from ..files import load_yaml, project_path
from ..models.specs import VAE_TEMPORAL_STRIDE
from ..optimizations import build_pipeline
from ..optimizations.cuda_graphs import GraphedForward
from ..streaming.pipeline import Pipeline
from ..streaming.sampler import EagerForward
from ..streaming.session import StreamingSession
from ..streaming.timeline import Event, Timeline
from . import block_trace, environment
from .block_trace import BlockTrace, Kernel
from .ceilings import Ceiling, copy_gb_per_s, measure_ceilings
from .metrics import CHUNK_READY, COPY, marks
from .result import read_campaign
from .work import DECODE, Operator, block_work

KIND_OF_WORK = {"linear": "linear layers", "self-attention": "attention", "cross-attention": "attention",
                "convolution": "convolutions", "VAE attention": "VAE attention", "norm": "norms and the rest"}
"""Kind of an operator -> kind of the kernels that run it."""
COPIES, GAPS = "copies", "no kernel"
KINDS = (*dict.fromkeys(KIND_OF_WORK.values()), COPIES, GAPS)
_TRANSFORMER = (("norms and the rest", r"^triton_|norm|rope|rows_kernel|write_"),
                ("attention", r"attention|sdpa|flash|fmha|merge_kernel"),
                ("linear layers", r"gemm|nvjet|cutlass|cublas|linear|addmm|::mm|::bmm|matmul|splitk|"
                                  r"scaled_mm|conv|fprop"))
_VAE = (("norms and the rest", r"^triton_|norm|silu"),
        ("VAE attention", r"attention|sdpa|flash|fmha"),
        ("convolutions", r"conv|fprop|implicit|xmma|gemm|nvjet|cutlass|winograd|head_kernel|addmm|matmul|"
                         r"linear"))
_COPY = re.compile(r"memcpy|memset|aten::copy_|aten::cat\b|aten::clone|aten::contiguous|catarray", re.I)
_MADE_BY = {"pipeline": "build", "trace": "measure", "ceilings": "measure", "copy": "measure",
            "block_ms": "measure"}


@dataclass(frozen=True)
class KindRow:
    """One kind of kernels: measured and least ms per block, and the work of a block in FLOP and bytes."""

    kind: str
    ms: float
    floor_ms: float
    flops: float
    bytes: float


def kind_of(name: str, stage: str) -> str:
    """The kind of a kernel by its name and stage."""
    if stage == COPY or _COPY.search(name):
        return COPIES
    for kind, pattern in _VAE if stage == DECODE else _TRANSFORMER:
        if re.search(pattern, name, re.I):
            return kind
    return "norms and the rest"


def stages_of(kernels: Sequence[Kernel], spans: Sequence[Event]) -> list[str]:
    """The stage of each kernel: the one whose span contains its begin. Where stages overlap, the one that the
    other kernels of its stream have most often; outside of all spans, "".
    """
    ordered = sorted(spans, key=lambda span: span.start_ms)
    options: list[set[str]] = []
    for kernel in kernels:
        options.append({span.name for span in ordered
                        if span.start_ms <= kernel.start_ms < span.start_ms + span.duration_ms})
    counts: dict[int, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for kernel, names in zip(kernels, options, strict=True):
        if len(names) == 1:
            counts[kernel.stream][next(iter(names))] += 1
    return [max(sorted(names), key=lambda name: counts[kernel.stream][name], default="")
            for kernel, names in zip(kernels, options, strict=True)]


def own_times(kernels: Sequence[Kernel]) -> list[float]:
    """ms of each kernel without the recorded kernels inside it, in the order of `kernels`, which is by start.
    On a GPU nothing is inside.
    """
    own = [kernel.duration_ms for kernel in kernels]
    open_by_stream: dict[int, list[int]] = defaultdict(list)
    for index, kernel in enumerate(kernels):
        stack = open_by_stream[kernel.stream]
        while stack and kernels[stack[-1]].start_ms + kernels[stack[-1]].duration_ms <= kernel.start_ms:
            stack.pop()
        if stack and kernel.start_ms + kernel.duration_ms <= (
                kernels[stack[-1]].start_ms + kernels[stack[-1]].duration_ms + 1e-3):
            own[stack[-1]] -= kernel.duration_ms
        stack.append(index)
    return [max(0.0, value) for value in own]


class Roofline:
    """The steps of the notebook, in order: `from_notebook`, `build`, `measure`, tables."""

    def __init__(self, config: ExperimentConfig, campaign_dir: str = ""):
        self.config, self.campaign_dir = config, campaign_dir

    @classmethod
    def from_notebook(cls, namespace: Mapping[str, Any]) -> Roofline:
        """Open the preset `preset` with the other parameters on top; None leaves a key to the preset.

        Raises:
            UserError: an unknown preset, or keys that cannot be.
        """
        given = notebook_parameters(namespace)
        preset = given.pop("preset", "baseline")
        campaign_dir = given.pop("campaign_dir", "")
        known = preset_files()
        if preset not in known:
            raise unknown_preset(preset, known)
        keys = {key: value for key, value in given.items() if value is not None}
        return cls(ExperimentConfig.from_mapping({**load_yaml(known[preset]), **keys}), campaign_dir)

    def __getattr__(self, name: str) -> Any:
        if (verb := _MADE_BY.get(name)) is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        raise UserError(f"{name}: there is none yet; call {verb}() first.")

    def build(self) -> Pipeline:
        """Load the model and apply the preset's optimizations."""
        self.pipeline = build_pipeline(self.config)
        return self.pipeline

    def measure(self) -> str:
        """Measure the ceilings, then stream: a traced stream for the kernels and one without the profiler for
        the block's time. Returns a sentence with the distance to the floor.
        """
        pipeline, device = self.pipeline, self.pipeline.device
        ceilings = measure_ceilings(self.work, device, pipeline.dtype)
        copy = copy_gb_per_s(device)
        gc.collect()
        session = StreamingSession(pipeline, timeline=Timeline(device))
        if self.config.use_torch_compile or device.type == "cuda":
            session.warm_up()
        first, prompts = self.config.window_blocks + 1, list(self.config.prompts[:1] or ["a fox"])
        trace = block_trace.record(session, prompts, first_block=first)
        self.block_ms = _block_ms(session, prompts[0], first)
        self.ceilings, self.copy, self.trace = ceilings, copy, trace
        return self.conclusion()

    @property
    def work(self) -> list[Operator]:
        """Every operator of a block of this preset."""
        forward = self.pipeline.sampler.forward
        while isinstance(forward, GraphedForward):
            forward = forward.inner
        return block_work(self.config, keys_only=not isinstance(forward, EagerForward))

    @property
    def rows(self) -> list[KindRow]:
        """Measured and least time of each kind, with the time in which no kernel ran."""
        return kind_rows(self.trace, self.work, self.ceilings, self.copy, self.block_ms)

    @property
    def floor_ms(self) -> float:
        """The least ms per block: the sum of all floors."""
        return sum(row.floor_ms for row in self.rows)

    def conclusion(self) -> str:
        """The distance to the floor, in a sentence."""
        frames = self.config.block_frames * VAE_TEMPORAL_STRIDE
        floor = self.floor_ms
        return (f"{self.config.name}: {self.block_ms:.1f} ms per block, {self.block_ms / frames:.2f} ms per "
                f"video frame. Floor: {floor:.1f} ms, {floor / frames:.2f} per frame. The block takes "
                f"{self.block_ms / floor:.2f} times its floor.")

    def kinds_table(self) -> pd.DataFrame:
        """One row per kind: measured, floor, work, and speeds in TFLOP/s."""
        table = []
        for row in self.rows:
            work = row.flops / 1e12
            table.append({"kind": row.kind, "ms per block": row.ms, "share, %": 100 * row.ms / self.block_ms,
                          "floor, ms": row.floor_ms, "TFLOP per block": work, "GB per block": row.bytes / 1e9,
                          "TFLOP/s": 1e3 * work / row.ms if work and row.ms else None,
                          "ceiling, TFLOP/s": 1e3 * work / row.floor_ms if work else None,
                          "measured / floor": row.ms / row.floor_ms if row.floor_ms and row.ms else None})
        return pd.DataFrame(table).set_index("kind").astype(float).map(_digits)

    def kernels_table(self, most: int = 15) -> pd.DataFrame:
        """The kernels with the most time per block."""
        found: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
        for kernel, kind, own in classified(self.trace):
            entry = found[kernel.name[:90], kind]
            entry[0] += own / len(self.trace.blocks)
            entry[1] += 1 / len(self.trace.blocks)
        rows = sorted(found.items(), key=lambda item: -item[1][0])[:most]
        return pd.DataFrame([{"kernel": name, "kind": kind, "ms per block": round(ms, 3),
                              "calls per block": round(calls, 1), "us per call": round(1e3 * ms / calls, 1),
                              "share, %": round(100 * ms / self.block_ms, 1)}
                             for (name, kind), (ms, calls) in rows])

    def ceilings_table(self) -> pd.DataFrame:
        """Every operator alone: shape, fastest kernel, ms, TFLOP/s and GB/s; last, the copy."""
        rows, seen = [], set()
        for operator in self.work:
            ceiling = self.ceilings.get(operator.key)
            if ceiling is None or operator.key in seen:
                continue
            seen.add(operator.key)
            rows.append({"kind": operator.kind, "operator": operator.name,
                         "shape": " x ".join(map(str, operator.shape)), "kernel": ceiling.kernel,
                         "ms": _digits(ceiling.ms),
                         "TFLOP/s": _digits(operator.flops / ceiling.ms / 1e9),
                         "GB/s": _digits(operator.bytes / ceiling.ms / 1e6)})
        rows.append({"kind": "copy", "operator": "copy", "shape": "", "kernel": "PyTorch", "ms": "",
                     "TFLOP/s": "", "GB/s": _digits(self.copy)})
        return pd.DataFrame(rows)

    def points(self) -> list[dict[str, Any]]:
        """Of each operator, FLOP per byte and its ceiling in TFLOP/s; for the chart."""
        return [{"kind": KIND_OF_WORK[operator.kind], "intensity": operator.flops / operator.bytes,
                 "tflops": operator.flops / self.ceilings[operator.key].ms / 1e9}
                for operator in self.work if operator.key in self.ceilings]

    def campaign(self) -> tuple[list[dict[str, Any]], str]:
        """The finished runs in the notebook's `campaign_dir`, and why they cannot be held against this floor
        (empty if they can).
        """
        folder = project_path(self.campaign_dir)
        results = read_campaign(folder)[0] if self.campaign_dir and folder.is_dir() else []
        if not results:
            return [], f"there is no finished run in {self.campaign_dir or 'a campaign'}"
        return results, self.comparable(results[0])

    def facts(self) -> dict[str, Any]:
        """Where the numbers come from: machine, versions, commit, model."""
        machine = environment.environment(self.pipeline.device,
                                          attention_backend=self.pipeline.attention_backend)
        model, shown = self.pipeline.model, ("gpu", "cpu", "cpu_threads", "torch", "cuda", "cudnn", "triton",
                                             "driver", "gpu_power_limit_w", "git_commit", "git_dirty")
        return {"model": f"{model.name} {model.width}x{model.height}, {self.config.model_dtype}, weights: "
                         f"{self.pipeline.weights['kind']}", **{key: machine[key] for key in shown}}

    def provenance(self) -> str:
        """The facts, one per line."""
        facts = self.facts().items()
        return "\n".join(f"{name}: {'n/a' if value is None else value}" for name, value in facts)

    def comparable(self, result: Mapping[str, Any]) -> str:
        """Why a campaign's run cannot be held against this floor; empty if it can."""
        theirs, facts = result.get("environment", {}), self.facts()
        ours, other = (machine.get("gpu") or machine.get("cpu") for machine in (facts, theirs))
        if ours != other:
            return f"the campaign ran on {other}, and these ceilings are of {ours}"
        model, sizes = self.pipeline.model, result.get("model", {})
        size = [sizes.get("sizes", {}).get(key) for key in ("height", "width")]
        if (sizes.get("name"), *size) != (model.name, model.height, model.width):
            return "the campaign has another model or picture size"
        return ""


def _digits(value: float) -> str:
    """Four significant digits; empty for NaN."""
    return "" if value != value else f"{value:.4g}"


def _block_ms(session: StreamingSession, prompt: str, first: int) -> float:
    """Median interval of steady blocks in a stream of its own, on the host clock."""
    session.timeline.clear()
    session.host_frames = True
    for _ in session.stream(prompt, first + TRACED_BLOCKS + session.pipeline.config.overlaps_decoding):
        pass
    ready = marks(session.timeline.resolve(), CHUNK_READY)
    session.reset()
    session.host_frames = False
    return statistics.median(ready[block] - ready[block - 1] for block in range(first, first + TRACED_BLOCKS))


def classified(trace: BlockTrace) -> list[tuple[Kernel, str, float]]:
    """(kernel, kind, own ms) of the steady blocks."""
    kernels = trace.steady_kernels()
    named = stages_of(kernels, [span for span in trace.stages() if span.name != "block"])
    return [(kernel, kind_of(kernel.name, stage), own)
            for kernel, stage, own in zip(kernels, named, own_times(kernels), strict=True)]


def kind_rows(trace: BlockTrace, work: Iterable[Operator],
              ceilings: Mapping[tuple[str, tuple[int, ...], str], Ceiling], copy_gb_per_s: float,
              block_ms: float) -> list[KindRow]:
    """One row per kind that has work or kernels. The last one is the rest of the block, in which no kernel
    ran; kernels that overlap leave none.
    """
    measured: dict[str, float] = defaultdict(float)
    for _, kind, own in classified(trace):
        measured[kind] += own / len(trace.blocks)
    rows = {kind: KindRow(kind, measured.get(kind, 0.0), 0.0, 0.0, 0.0) for kind in KINDS}
    for operator in work:
        kind = KIND_OF_WORK[operator.kind]
        ceiling = ceilings.get(operator.key)
        least = operator.bytes / copy_gb_per_s / 1e6 if ceiling is None else ceiling.ms
        row = rows[kind]
        rows[kind] = replace(row, floor_ms=row.floor_ms + operator.count * least,
                             flops=row.flops + operator.count * operator.flops,
                             bytes=row.bytes + operator.count * operator.bytes)
    rows[GAPS] = replace(rows[GAPS], ms=max(0.0, block_ms - sum(measured.values())))
    return [row for row in rows.values() if row.ms or row.floor_ms]

