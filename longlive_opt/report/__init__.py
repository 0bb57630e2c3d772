"""A campaign's results -> tables, figures and OPTIMIZATION_LOG.md. No GPU, no torch.

    python -m longlive_opt.report outputs/demo [--log OPTIMIZATION_LOG.md]

The log has the form of `log_template.md`: headings, tables and configuration blocks stay, blanks are filled.
An experiment that was not run keeps its blanks; one that was run keeps none: what could not be measured reads
`n/a (reason)`. Words come from presets, numbers from result.json, verdicts from rules that the log states.
The same results give the same bytes.
"""

from .campaign import Campaign, Failure, decided, load
from .optimization_log import LOG_NAME, render_log, save_figures, write_campaign_log, write_log
from .tables import noise_table, numbers_table, runs_table, summary_table, to_csv, world_table
from .verdicts import settle_reports

__all__ = ["LOG_NAME", "Campaign", "Failure", "decided", "load", "noise_table", "numbers_table", "render_log",
           "runs_table", "save_figures", "settle_reports", "summary_table", "to_csv", "world_table",
           "write_campaign_log", "write_log"]
