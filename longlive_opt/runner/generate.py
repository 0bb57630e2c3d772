"""`longlive generate "a prompt" ...`: a video from prompts, written while it is made.

Several prompts follow one another in one video; a prompt file gives a video for each of its lines. Frames go
to an mp4, or to a folder as PNG files if the output has no suffix.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..config import KEYS, ExperimentConfig, unknown_key
from ..errors import UserError
from ..files import atomic_path, load_yaml, project_path, require_writable
from ..live.opening import default_weights, live_config, require_here
from ..measurement.environment import FULL_MODEL_GB
from ..models.specs import LONGLIVE, VAE_TEMPORAL_STRIDE
from ..optimizations import build_pipeline
from ..prompts import PromptSchedule, read_schedules, spread_evenly
from ..report.video import write_pictures
from ..streaming.session import StreamingSession, checked_prompt
from ..tiny.shapes.captions import strange
from .plan import parse_settings

MOST_SECONDS = 86400


def machine_keys() -> tuple[dict[str, Any], str]:
    """Model, weights and device that fit this machine, and a sentence that says so."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        memory = torch.cuda.get_device_properties(0).total_memory / 1e9
        model = LONGLIVE if memory >= FULL_MODEL_GB else "tiny"
        name = f"{torch.cuda.get_device_name(0)}, {memory:.0f} GB"
    else:
        model, name = "tiny", "no GPU"
    keys = {"model": model, "weights": default_weights(model), "device": device}
    noise = "; random weights make noise, 'longlive fetch checkpoints' gets the official ones" \
        if keys["weights"] == "random" else ""
    return keys, f"{name}: model {model}, weights {keys['weights']}{noise}"


def blocks_of(config: ExperimentConfig, seconds: float | None, blocks: int | None) -> int:
    """How many blocks the video has. The first has 3 frames fewer than the others; `seconds` is rounded up.

    Raises:
        UserError: a length that is not positive, or beyond what absolute positions allow.
    """
    per_block = VAE_TEMPORAL_STRIDE * config.block_frames
    if seconds is not None:
        if blocks is not None:
            raise UserError("--seconds: it and --blocks both give the length; leave one out.")
        if not 0 < seconds <= MOST_SECONDS:
            raise UserError(f"--seconds: {seconds} must be greater than 0 and at most {MOST_SECONDS}, a day.")
        frames = seconds * config.model_config().fps + VAE_TEMPORAL_STRIDE - 1
        blocks = max(1, int(-(-frames // per_block)))
    elif blocks is None:
        blocks = config.video_blocks
    if blocks < 1:
        raise UserError(f"--blocks: {blocks} is too small; it must be at least 1.")
    if config.max_blocks is not None and blocks > config.max_blocks:
        raise UserError(f"--blocks: {blocks} is more than the {config.max_blocks} that absolute positions "
                        "allow; add --set relative_rope=true.")
    return blocks


def schedules_of(config: ExperimentConfig, prompts: Sequence[str], file: Path | None,
                 switch_at: Sequence[float] | None, blocks: int) -> list[PromptSchedule]:
    """One schedule per video: of a prompt file one for each line, else one of all `prompts`. `switch_at` are
    seconds into the video, rounded up to a block's edge; without them prompts are spread evenly.

    Raises:
        UserError: no prompt, an empty one, or two sources of them; switches that do not rise or do not fit,
            or come from two sources.
    """
    if bool(prompts) == (file is not None):
        raise UserError("prompt: give one or more, or --prompts-file, and not both.")
    if file is not None and switch_at is not None and file.suffix != ".jsonl":
        raise UserError(f"--switch-at: {file} has one prompt per video; use a .jsonl file to switch prompts.")
    prompts = [checked_prompt(prompt) for prompt in prompts]
    frames = None if switch_at is None else _latent_frames(config, switch_at, blocks)
    if file is not None:
        schedules = read_schedules(file, frames, (blocks, config.block_frames))
        for schedule in schedules:
            if frames is not None and schedule.switch_frames != tuple(frames):
                raise UserError(f"--switch-at: {schedule.source} has switch_frame_indices of its own; leave "
                                "one of the two out.")
    elif frames is None:
        schedules = [spread_evenly(prompts, blocks, config.block_frames)]
        if len(schedules[0].prompts) < len(prompts):
            raise UserError(f"prompt: {len(prompts)} prompts do not fit into {blocks} blocks; make the video "
                            "longer (--seconds).")
    else:
        if len(frames) != len(prompts) - 1:
            raise UserError(f"--switch-at: {len(frames)} times for {len(prompts)} prompts; {len(prompts)} "
                            f"prompts need {len(prompts) - 1}.")
        schedules = [PromptSchedule(tuple(prompts), tuple(frames))]
    for schedule in schedules:
        schedule.check_fits(blocks, config.block_frames, "--seconds or --blocks")
    return schedules


def _latent_frames(config: ExperimentConfig, seconds: Sequence[float], blocks: int) -> list[int]:
    """The first latent frame of the block at which each switch takes effect; a block takes one at most.

    Raises:
        UserError: the seconds do not rise, or one is past the end of the video.
    """
    fps, block = config.model_config().fps, config.block_frames
    if not all(0 <= second <= MOST_SECONDS for second in seconds) or any(
            a >= b for a, b in zip(seconds, seconds[1:])):
        given = " ".join(f"{second:g}" for second in seconds)
        raise UserError(f"--switch-at: {given} must be seconds that rise, from 0 on.")
    starts: list[int] = []
    for second in seconds:
        asked = -(-round(second * fps / VAE_TEMPORAL_STRIDE) // block)
        starts.append(max(asked, starts[-1] + 1 if starts else 0))
        if starts[-1] >= blocks:
            length = (VAE_TEMPORAL_STRIDE * (blocks * block - 1) + 1) / fps
            raise UserError(f"--switch-at: {second:g} s takes effect past the end of the video ({length:.1f} "
                            "s); switch earlier, or make the video longer (--seconds).")
    return [start * block for start in starts]


def numbered(output: Path, videos: int) -> list[Path]:
    """`output` for one video, and as many names with a number for several."""
    if videos == 1:
        return [output]
    return [output.with_name(f"{output.stem}_{number:03}{output.suffix}") for number in range(videos)]


def outputs_of(asked: Path | None, videos: int) -> list[Path]:
    """The output of each video: as asked, or numbered if there are several. None takes the first of
    video.mp4, video-2.mp4 and so on that is free.

    Raises:
        UserError: one of them could not be written.
    """
    if asked is None:
        names = (Path(f"video-{number}.mp4" if number > 1 else "video.mp4") for number in count(1))
        asked = next(name for name in names if not any(map(os.path.lexists, numbered(name, videos))))
    output = project_path(asked) if str(asked).startswith("~") else asked
    if output.suffix not in ("", ".mp4") or not output.name:
        raise UserError(f"--output: {str(asked)!r} is neither an mp4 nor a folder; end it in .mp4 or "
                        "leave the suffix out.")
    outputs = numbered(output, videos)
    for path in outputs:
        require_writable(path, "--output", folder=not path.suffix)
    return outputs


def pictures(session: StreamingSession, schedule: PromptSchedule, blocks: int) -> Iterator[np.ndarray]:
    """The frames of one video, uint8 [H, W, 3] each; says after each block how far it is."""
    started = time.perf_counter()
    for chunk in session.play(schedule, blocks):
        yield from chunk.frames[0].permute(0, 2, 3, 1).cpu().numpy()
        done = chunk.block + 1
        left = (time.perf_counter() - started) / done * (blocks - done)
        print(f"\rblock {done} of {blocks}, {left:.0f} s left ", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)


def write(output: Path, frames: Iterator[np.ndarray], fps: int) -> None:
    """Write an mp4, or into a folder one PNG per frame.

    Raises:
        UserError: the output cannot be written.
    """
    if output.suffix:
        write_pictures(output, frames, fps)
        return
    from PIL import Image

    for number, frame in enumerate(frames):
        with atomic_path(output / f"{number:05}.png") as temporary:
            Image.fromarray(frame).save(temporary)


def require_known(keys: Iterable[str], where: str) -> None:
    """Refuse a key that no preset has.

    Raises:
        UserError: naming `where` and the key.
    """
    if unknown := [key for key in keys if key not in KEYS]:
        raise UserError(f"{where}: {unknown_key(str(unknown[0]), list(KEYS))}.")


def config_of(preset: str, profile: Path | None, given: Mapping[str, Any]) -> tuple[ExperimentConfig, str]:
    """The preset on the profile, or on what fits this machine, and a sentence about that choice."""
    if profile is not None:
        machine = load_yaml(profile)
        require_known(machine, f"--profile {profile}")
        return live_config(preset, machine | given), f"profile {profile.name}"
    keys, words = machine_keys()
    return live_config(preset, keys | given), words


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="longlive generate", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="what to show, one after the other")
    parser.add_argument("--prompts-file", type=Path, metavar="FILE", help=".txt or .jsonl, a video per line")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE",
                        help="an mp4, or a folder for frames; what is there is written over (default: the "
                             "first of video.mp4, video-2.mp4 and so on that is free)")
    parser.add_argument("--seconds", type=float, metavar="N", help="length of the video")
    parser.add_argument("--blocks", type=int, metavar="N", help="length in blocks of 12 frames")
    parser.add_argument("--switch-at", type=float, nargs="+", metavar="SECOND",
                        help="when each prompt but the first takes over (default: what the file says, or "
                             "evenly spread)")
    parser.add_argument("--preset", default="static_kv", metavar="NAME",
                        help="any but the studies and the test preset (default: %(default)s)")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="model and machine (default: what fits)")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
                        help="keys of a preset, over both")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the noise (default: 0)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns 0, 2 for wrong input, 130 interrupted."""
    arguments = _parser().parse_args(argv)
    try:
        given = {"seed": arguments.seed, **parse_settings(arguments.set)}
        require_known(given, "--set")
        if twice := sorted({"prompts", "prompts_file", "switch_frame_indices"} & given.keys()):
            raise UserError(f"--set {twice[0]}: prompts and switches are arguments here; use PROMPT, "
                            "--prompts-file and --switch-at.")
        config, words = config_of(arguments.preset, arguments.profile, given)
        blocks = blocks_of(config, arguments.seconds, arguments.blocks)
        schedules = schedules_of(config, arguments.prompts, arguments.prompts_file, arguments.switch_at,
                                 blocks)
        outputs = outputs_of(arguments.output, len(schedules))
        config.check_places()
        require_here(config)
        print(words, file=sys.stderr)
        if arguments.output is None and outputs[0].stem.startswith("video-"):
            print(f"video.mp4 is there already; the output is {outputs[0]}", file=sys.stderr)
        if config.model == "tiny":
            asked = dict.fromkeys(prompt for schedule in schedules for prompt in schedule.prompts)
            for sentence in filter(None, map(strange, asked)):
                print(f"{sentence} weights/tiny/README.md has its words.", file=sys.stderr)
        session = StreamingSession(build_pipeline(config), host_frames=True)
        for schedule, output in zip(schedules, outputs):
            write(output, pictures(session, schedule, blocks), config.model_config().fps)
            session.reset()
            print(output)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; no half video was left behind", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
