"""Prompt schedules, and LongLive's prompt file formats: a text file with one prompt per line, or JSONL with
one list of prompts per line, where each list is one video.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Sequence

from .config import ExperimentConfig, check_switches, check_switches_fit, parse_switch_frames
from .errors import UserError, short
from .files import check_texts, parse_json, project_path, whole_text

logger = logging.getLogger(__name__)

LINE_KEYS = ("prompts", "switch_frame_indices")
"""The keys of a line of JSONL."""


@dataclass(frozen=True)
class PromptSchedule:
    """One video: its prompts in order, and the latent frame at which each later prompt takes over. `source`
    is the file and line that gave it, if one did.
    """

    prompts: tuple[str, ...]
    switch_frames: tuple[int, ...] = ()
    source: str = field(default="", compare=False, repr=False)

    def to_dict(self) -> dict[str, list[Any]]:
        """Return plain JSON-ready values: the `prompt_schedule` section of a result."""
        return {"prompts": list(self.prompts), "switch_frames": list(self.switch_frames)}

    def check_fits(self, blocks: int, block_frames: int, longer: str = "video_latent_frames") -> None:
        """Check that every switch takes effect within `blocks` blocks; `longer` is what makes a video longer.

        Raises:
            UserError: naming the source and the first latent frame that is too late.
        """
        check_switches_fit(self.switch_frames, blocks, block_frames,
                           f"{self.source}, switch_frame_indices" if self.source else "switch_frame_indices",
                           longer)


def read_schedules(
    path: str | Path, switch_frame_indices: int | str | Sequence[int] | None = None,
    video: tuple[int, int] | None = None
) -> list[PromptSchedule]:
    """Read `*.txt` (one prompt per line, each its own video) or `*.jsonl` (one {"prompts": [...]} per line,
    each its own video).

    A JSONL line may have its own `switch_frame_indices`. Otherwise the argument applies to all lines; it is a
    number, a list or LongLive's comma-separated text. Without either, prompts are spread evenly over `video`,
    its blocks and the latent frames per block.

    Raises:
        UserError: naming the file, the line, the value and the remedy.
    """
    path = project_path(path) if str(path).startswith("~") else Path(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise UserError(
            f"prompts_file: cannot read {path}: {error.strerror or error}; name an existing .txt or .jsonl "
            "file."
        ) from error
    except ValueError as error:
        raise UserError(f"prompts_file: {path} is not UTF-8 text; save it as UTF-8.") from error
    numbered = [(f"{path} line {i}", line.rstrip()) for i, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise UserError(f"prompts_file: {path} contains no prompt; write one prompt per line.")
    if path.suffix == ".jsonl":
        shared = parse_switch_frames(switch_frame_indices, "switch_frame_indices")
        schedules = [_schedule(where, line, shared, video) for where, line in numbered]
        counts = {len(schedule.prompts) for schedule in schedules}
        if len(counts) > 1:
            raise UserError(
                f"prompts_file: the lines of {path} have {sorted(counts)} prompts; every line needs the same "
                "number."
            )
        return schedules
    if switch_frame_indices is not None:
        raise UserError(
            f"switch_frame_indices: {path} has one prompt per video; use a .jsonl file to switch prompts."
        )
    if path.suffix != ".txt":
        raise UserError(f"prompts_file: {path} ends in {path.suffix or 'nothing'!r}; use .txt or .jsonl.")
    return [PromptSchedule((whole_text(line, f"prompts_file: {where}"),), source=where)
            for where, line in numbered]


def _schedule(where: str, line: str, shared: tuple[int, ...] | None, video: tuple[int, int] | None
              ) -> PromptSchedule:
    entry = check_texts(parse_json(line, f"prompts_file: {where}", 'write {"prompts": ["..."]}'),
                        f"prompts_file: {where}")
    prompts = entry.get("prompts") if isinstance(entry, dict) else None
    if (
        not isinstance(prompts, list)
        or not prompts
        or not all(isinstance(p, str) and p.strip() for p in prompts)
    ):
        raise UserError(
            f'prompts_file: {where} has no list \'prompts\' of non-empty texts; write {{"prompts": ["..."]}}.'
        )
    if unknown := [key for key in entry if key not in LINE_KEYS]:
        raise UserError(f"prompts_file: {where} has the unknown key {short(unknown[0])}; use "
                        f"{' and '.join(LINE_KEYS)}.")
    own = parse_switch_frames(entry.get("switch_frame_indices"), f"{where}, switch_frame_indices")
    switches = own if own is not None else shared
    if switches is None and len(prompts) > 1:
        if video is None or len(prompts) > video[0]:
            raise UserError(
                f"prompts_file: {where} has {len(prompts)} prompts and no switch_frame_indices; add "
                f"{len(prompts) - 1} of them, in latent frames, to the line or the preset."
            )
        return replace(spread_evenly(prompts, *video), source=where)
    check_switches(switches or (), len(prompts), f"{where}, switch_frame_indices")
    return PromptSchedule(tuple(prompts), switches or (), where)


def schedule_of(config: ExperimentConfig) -> PromptSchedule:
    """Return a preset's prompts with their switch frames: as given, or evenly spaced.

    Raises:
        UserError: the prompt file cannot be read, or the switches do not fit.
    """
    if config.prompts_file is not None:
        schedule, *others = read_schedules(project_path(config.prompts_file), config.switch_frame_indices,
                                           (config.video_blocks, config.block_frames))
        if others:
            logger.warning("prompts_file: %d videos; this run uses the first", len(others) + 1)
        schedule.check_fits(config.video_blocks, config.block_frames)
        return schedule
    if config.switch_frame_indices is not None:
        return PromptSchedule(config.prompts, config.switch_frame_indices)
    return spread_evenly(config.prompts, config.video_blocks, config.block_frames)


def spread_evenly(prompts: Sequence[str], blocks: int, block_frames: int) -> PromptSchedule:
    """Spread the first `blocks` of `prompts` evenly over a video of `blocks` blocks."""
    used = tuple(prompts[:blocks])
    starts = [blocks * i // len(used) for i in range(1, len(used))]
    return PromptSchedule(used, tuple(start * block_frames for start in starts))
