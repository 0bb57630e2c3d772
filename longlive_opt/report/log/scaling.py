"""The log's section on runs with several GPUs."""

from __future__ import annotations

from collections.abc import Mapping

from ...measurement import decision
from ...measurement.catalogue import metric_of
from ...measurement.result import is_na, lookup, number
from ..campaign import Result, gpus_of, one_gpu_preset
from .entry import Run
from .markdown import escape

HEADING = "## Several GPUs"
ABSENT = ("Several GPUs: n/a, no run of this campaign used several. On a host with two, `make campaign-h100 "
          "GPUS=2` adds such runs, in a section of their own.")
_COLUMNS = ("Preset", "GPUs", "SS max, ms per frame", "SS mean, ms per frame", "Efficiency", "PS mean, ms",
            "FPS", "Exposed communication, ms: denoise, decode, recache", "Peak memory by rank, GB")
_EXPOSED = ("exposed_denoise", "exposed_decode", "exposed_recache")


def scaling(runs: Mapping[str, Run]) -> str:
    """The section: a row per run on several GPUs, each below its preset on one; empty if there is none."""
    several = [run for run in runs.values() if not run.failure and gpus_of(run.result) > 1]
    failed = [run for run in runs.values() if run.failure and gpus_of(run.result) > 1]
    lines = [f"- {run.name}: {run.outcome}, {escape(run.failure)}" for run in failed]
    if not several:
        return "\n\n".join([HEADING, *lines]) + "\n" if lines else ""
    rows, shown = [_COLUMNS, ("---",) * len(_COLUMNS)], set()
    for run in several:
        one = runs.get(one_gpu_preset(run.result))
        if one and not one.failure and one.preset not in shown:
            rows.append(_row(one, one))
            shown.add(one.preset)
        rows.append(_row(run, one))
    gpus = sorted({str(lookup(run.result, "environment.gpu") or "CPU processes") for run in several})
    where = escape(" and ".join(gpus))
    lines.insert(0, f"- On {where}. Efficiency: SS mean on one GPU, divided by the GPUs times SS mean on "
                    "them. Exposed communication: per block, of the recache per switch, on rank 0 (see its "
                    "definition).")
    lines += [f"- {run.name} decodes on a GPU of its own, so chunks come one block later." for run in several
              if lookup(run.result, "ranks.decoding") == "own"]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return "\n\n".join([HEADING, table, "\n".join(lines)]) + "\n"


def _row(run: Run, one: Run | None) -> tuple[str, ...]:
    result, count = run.result, gpus_of(run.result)
    cells = [run.name, str(count), *map(run.cell, ("ss_max", "ss_mean"))]
    cells += [efficiency(result, one.result if one and not one.failure else None), run.cell("ps_mean"),
              run.cell("fps")]
    if count == 1:
        return *cells, "none", run.cell("peak_allocated")
    return *cells, ", ".join(metric_of(key).shown(result) for key in _EXPOSED), _memory(result)


def efficiency(result: Result, one: Result | None) -> str:
    """Scaling efficiency in percent, or n/a without a comparable run on one GPU."""
    if one is None:
        return "n/a (no run on one GPU)"
    if decision.unfair(result, one):
        return "n/a (not comparable)"
    ours, alone = (metric_of("ss_mean").value(run) for run in (result, one))
    return f"{100 * alone / (gpus_of(result) * ours):.0f} %"


def _memory(result: Result) -> str:
    ranks = lookup(result, "ranks.memory_gb") or []
    found = [number(rank, "peak_allocated") for rank in ranks]
    if None not in found and found:
        return ", ".join(f"{value:.2f}" for value in found)
    section = lookup(result, "ranks.peak_allocated_gb")
    return f"n/a ({escape(section['reason'])})" if is_na(section) else "n/a"
