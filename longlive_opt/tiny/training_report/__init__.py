"""Report how the tiny model was trained and how well it works, from the files that training writes.

    training/log.jsonl   one line per `log_steps` steps: {stage, step, progress, ms_per_step, losses ...}
    check.json           metrics of videos of held-out prompts, also with parts of the model taken away

Both files are in the weights folder. Reading them needs neither torch nor a GPU.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from IPython.display import HTML

from ...files import project_path
from ...report.charts import Chart
from .compare import compare_conclusions, compare_table
from .curves import loss_chart, stage_table
from .reader import CHECK, LOG, check_command, read_check, read_log, train_command
from .scores import ablation_chart, ablation_table, check_table, conclusions, conditions

__all__ = ["TrainingReport", "ablation_chart", "ablation_table", "compare_conclusions", "compare_table",
           "check_table", "conclusions", "conditions", "loss_chart", "read_check", "read_log", "stage_table"]


@dataclass(frozen=True)
class TrainingReport:
    """The content of the notebook for one weights folder. A missing file becomes a sentence on how to make
    it.
    """

    folder: Path
    name: str  # the folder as given, for commands in messages

    @classmethod
    def open(cls, weights_dir: str) -> TrainingReport:
        """Args: weights_dir: relative to the project's folder."""
        pd.set_option("display.max_colwidth", None)
        return cls(project_path(weights_dir), str(weights_dir))

    def losses(self, stage: str) -> Chart | HTML:
        """Loss curves of one stage: vae, text, teacher or student."""
        if not (self.folder / LOG).is_file():
            return self._train_first()
        rows = [row for row in read_log(self.folder, self.name) if row["stage"] == stage]
        if not rows:
            return _sentence(f"The log in {self.name} has no steps of the stage {stage}.")
        return loss_chart(rows)

    def stages(self) -> pd.DataFrame | HTML:
        """Steps and minutes of each stage."""
        there = (self.folder / LOG).is_file()
        return stage_table(read_log(self.folder, self.name)) if there else self._train_first()

    def about(self) -> HTML:
        """The conditions of the check."""
        return self._of_check(lambda check: _sentence(conditions(check)))

    def check(self) -> pd.DataFrame | HTML:
        """The metrics against their targets."""
        return self._of_check(check_table)

    def ablation(self) -> pd.DataFrame | HTML:
        """The full model compared with the model without single parts."""
        return self._of_check(ablation_table)

    def ablation_figure(self) -> Chart | HTML:
        """The same as bars."""
        return self._of_check(ablation_chart)

    def conclusions(self) -> HTML:
        """The conclusions from the check."""
        return self._of_check(lambda check: _paragraphs(conclusions(check)))

    def compare(self, other_dir: str) -> pd.DataFrame | HTML:
        """Every metric compared with that of another training."""
        return self._of_two(other_dir, compare_table)

    def same(self, other_dir: str) -> HTML:
        """Whether another training confirms the conclusions."""
        return self._of_two(other_dir, lambda *checks: _paragraphs(compare_conclusions(*checks)))

    def _of_two(self, other_dir: str, show: Callable[[dict[str, Any], dict[str, Any]], Any]) -> Any:
        other = project_path(other_dir)
        if not (other / CHECK).is_file():
            return _sentence(f"{other_dir} was not checked; to compare with another training, run: "
                             f"{train_command(other_dir)}; {check_command(other_dir)}")
        return self._of_check(lambda check: show(check, read_check(other, other_dir)))

    def _of_check(self, show: Callable[[dict[str, Any]], Any]) -> Any:
        if (self.folder / CHECK).is_file():
            return show(read_check(self.folder, self.name))
        return _sentence(f"{self.name} was not checked yet; with trained weights there, run: "
                         f"{check_command(self.name)}")

    def _train_first(self) -> HTML:
        return _sentence(f"{self.name} has no training log; train the model, on an H100 in about 25 minutes: "
                         f"{train_command(self.name)}")


def _sentence(text: str) -> HTML:
    return _paragraphs([text])


def _paragraphs(lines: Sequence[str]) -> HTML:
    return HTML("".join(f"<p>{html.escape(line)}</p>" for line in lines))
