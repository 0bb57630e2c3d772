"""Turn a campaign's results into tables, figures and OPTIMIZATION_LOG.md. Needs neither a GPU nor torch.

    python -m longlive_opt.report outputs/demo [--log OPTIMIZATION_LOG.md]

The log fills the blanks of `log/template.md` and keeps its headings, tables and configuration blocks. An
experiment that was not run keeps its blanks. In one that was run, a missing value reads `n/a (reason)`. Words
come from presets, numbers from result.json, and verdicts from rules that the log states. decisions.json holds
the verdicts. The same results give the same bytes.
"""

from .campaign import Campaign, Failure, decided, load
from .conclusion import definitions_html
from .index_page import INDEX_NAME, write_index
from .log.document import LOG_NAME, render_log, save_figures, write_campaign_log, write_log
from .noise_record import NOISE_FILE, record_noise
from .tables import (
    adherence_table,
    noise_table,
    numbers_table,
    runs_table,
    steps_table,
    summary_table,
    to_csv,
)
from .verdicts import DECISIONS_FILE, cards, read_decisions, recommendation

__all__ = ["DECISIONS_FILE", "INDEX_NAME", "LOG_NAME", "NOISE_FILE", "Campaign", "Failure",
           "adherence_table", "cards", "decided", "definitions_html", "load", "noise_table", "numbers_table",
           "read_decisions", "recommendation", "record_noise", "render_log", "runs_table", "save_figures",
           "steps_table", "summary_table", "to_csv", "write_campaign_log", "write_index", "write_log"]
