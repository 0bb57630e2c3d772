"""Figures: pure functions from result.json dictionaries to matplotlib figures, redrawable without a GPU.

Every function takes one result or several and draws what is there; a missing or n/a part becomes a sentence
in the figure, never an exception. A preset has the same colour in every chart, names have the colour of
their lines, n is printed. Nothing touches pyplot, so neither a backend nor a display is needed.
"""

from .chart import Chart
from .facts import first_runs, target_of, targets_of
from .fidelity import pareto
from .latency import latency_boxes, latency_by_block, latency_ecdf
from .palette import PRESET_COLOURS, colour_of
from .playback import buffer_words
from .sets import campaign_figures, run_figures
from .stages import stage_bars, waterfall

__all__ = ["Chart", "PRESET_COLOURS", "buffer_words", "campaign_figures", "colour_of",
           "first_runs", "latency_boxes", "latency_by_block", "latency_ecdf", "pareto", "run_figures",
           "stage_bars", "target_of", "targets_of", "waterfall"]
