"""How the tiny model was trained and what it can do: tables and figures from the files that training leaves.

    training/log.jsonl   a line every so many steps: {stage, step, progress, ms_per_step, losses ...}
    check.json           held-out prompts evaluated by the evaluator of the world; the same with parts taken
    away

Both lie in the folder of the weights. Reading them needs neither torch nor a GPU.
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
from .compare import beside_conclusions, beside_table
from .curves import loss_chart, stage_table
from .reader import CHECK, LOG, check_command, read_check, read_log, train_command
from .scores import ablation_chart, ablation_table, check_table, conclusions, conditions

__all__ = ["TrainingReport", "ablation_chart", "ablation_table", "beside_conclusions", "beside_table",
           "check_table", "conclusions", "conditions", "loss_chart", "read_check", "read_log", "stage_table"]


@dataclass(frozen=True)
class TrainingReport:
    """What the notebook shows of one weights folder; what is not there becomes a sentence that says how to
    make it.
    """

    folder: Path
    name: str  # as it was given: what a command shall read

    @classmethod
    def open(cls, weights_dir: str) -> TrainingReport:
        """Args: weights_dir: seen from the project's folder."""
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
        """Steps and minutes of every stage."""
        there = (self.folder / LOG).is_file()
        return stage_table(read_log(self.folder, self.name)) if there else self._train_first()

    def about(self) -> HTML:
        """On what the check was made."""
        return self._of_check(lambda check: _sentence(conditions(check)))

    def check(self) -> pd.DataFrame | HTML:
        """The figures against their targets."""
        return self._of_check(check_table)

    def ablation(self) -> pd.DataFrame | HTML:
        """The model with parts taken away, beside the full one."""
        return self._of_check(ablation_table)

    def ablation_figure(self) -> Chart | HTML:
        """The same as bars."""
        return self._of_check(ablation_chart)

    def conclusions(self) -> HTML:
        """What the check says in the end."""
        return self._of_check(lambda check: _paragraphs(conclusions(check)))

    def beside(self, other_dir: str) -> pd.DataFrame | HTML:
        """Every figure beside that of another training."""
        return self._of_two(other_dir, beside_table)

    def same(self, other_dir: str) -> HTML:
        """Whether another training led to the same."""
        return self._of_two(other_dir, lambda *checks: _paragraphs(beside_conclusions(*checks)))

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
