"""Charts: pure functions from result.json dictionaries to matplotlib figures, and the sets of charts that a
summary and a run show. No GPU is needed to redraw them.

Every function takes one or several results and draws the parts that exist. A missing or n/a part becomes a
sentence in the figure, never an exception. A preset has the same colour in every chart, a name has the colour
of its line, and n is printed. No function uses pyplot, so neither a backend nor a display is needed.
"""

from collections.abc import Sequence

from ...measurement.result import lookup
from .changes import change_intervals
from .chart import PRESET_COLOURS, Chart, Result, colour_of, first_runs, preset_of, target_of, targets_of
from .clocks import gpu_load
from .deviation import error_by_block, pareto, quality_by_frame
from .gpus import latency_by_gpus
from .latency import buffer_words, latency_boxes, latency_by_block, latency_ecdf, playback_buffer
from .stages import block_timeline, stage_bars, stage_blocks, switch_bars, switch_timeline, waterfall

__all__ = ["Chart", "PRESET_COLOURS", "buffer_words", "campaign_figures", "change_intervals", "colour_of",
           "first_runs", "latency_boxes", "latency_by_block", "latency_ecdf", "pareto", "run_figures",
           "stage_bars", "target_of", "targets_of", "waterfall"]


def campaign_figures(results: Sequence[Result]) -> dict[str, Chart]:
    """The figures of the summary by name, from the first run of each preset."""
    kept = first_runs(results)
    functions = (latency_ecdf, latency_boxes, latency_by_block, stage_bars, switch_bars, playback_buffer,
                 pareto, waterfall)
    if any(lookup(result, "ranks.count") for result in kept):
        functions = (*functions, latency_by_gpus)
    reference = next((r for r in kept if preset_of(r) == "baseline"), kept[0] if kept else {"preset": "none"})
    return {function.__name__: function(kept) for function in functions} | {
        "block_timeline": block_timeline(reference), "switch_timeline": switch_timeline(reference)}


def run_figures(result: Result, baseline: Result | None = None) -> dict[str, Chart]:
    """The figures of one run by name. With `baseline`, those of latency and stages show both runs."""
    alone = baseline is None or preset_of(baseline) == preset_of(result)
    pair = [result] if alone else [baseline, result]
    functions = (latency_ecdf, latency_by_block, stage_bars, switch_bars, playback_buffer, gpu_load)
    own = (stage_blocks, block_timeline, switch_timeline, quality_by_frame)
    return {function.__name__: function(pair) for function in functions} | {
        function.__name__: function(result) for function in own} | {
        "error_by_block": error_by_block(result, baseline)}
