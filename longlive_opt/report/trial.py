"""A trial of results: can their pages be made? One strange result must not hide all others."""

from __future__ import annotations

from collections.abc import Sequence

from .campaign import Result, baseline_of, decided, verdict_of
from .conclusion import card_html
from .log.document import render_log
from .noise_record import rows_of
from .tables import adherence_table, noise_table, numbers_table, summary_table


def try_pages(results: Sequence[Result]) -> str:
    """Make the tables, cards and log of `results`. Returns why that failed, or an empty string."""
    try:
        runs = decided(results)
        baseline = baseline_of(runs)
        for run in runs:
            found = run["decision"]
            card_html(run, baseline, {**found, "verdict": verdict_of(run)}, "trial")
        for table in (summary_table, numbers_table, noise_table, adherence_table):
            table(runs)
        rows_of(runs, "")
        render_log(results)
    except Exception as error:
        return f"its pages cannot be made ({type(error).__name__}: {str(error)[:120]})"
    return ""
