"""Which figures a summary and a run show."""

from collections.abc import Sequence

from .chart import Chart
from .facts import Result, first_runs, preset_of
from .fidelity import error_by_block, pareto, quality_by_frame
from .gpu import gpu_load
from .latency import latency_boxes, latency_by_block, latency_ecdf
from .playback import playback_buffer
from .stages import stage_bars, stage_blocks, switch_bars, waterfall
from .timelines import block_timeline, switch_timeline


def campaign_figures(results: Sequence[Result]) -> dict[str, Chart]:
    """Every figure of the summary by name, from the first run of each preset."""
    kept = first_runs(results)
    functions = (latency_ecdf, latency_boxes, latency_by_block, stage_bars, switch_bars, playback_buffer,
                 pareto, waterfall)
    reference = next((r for r in kept if preset_of(r) == "baseline"), kept[0] if kept else {"preset": "none"})
    return {function.__name__: function(kept) for function in functions} | {
        "block_timeline": block_timeline(reference), "switch_timeline": switch_timeline(reference)}


def run_figures(result: Result, baseline: Result | None = None) -> dict[str, Chart]:
    """Every figure of one run by name; with `baseline`, latency and stages are drawn beside it."""
    alone = baseline is None or preset_of(baseline) == preset_of(result)
    pair = [result] if alone else [baseline, result]
    functions = (latency_ecdf, latency_by_block, stage_bars, switch_bars, playback_buffer, gpu_load)
    own = (stage_blocks, block_timeline, switch_timeline, quality_by_frame)
    return {function.__name__: function(pair) for function in functions} | {
        function.__name__: function(result) for function in own} | {
        "error_by_block": error_by_block(result, baseline)}
