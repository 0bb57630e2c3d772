"""What was played: its pictures on disk while it plays, then an mp4 and the script that plays it again.

A script is JSON. Its `prompts` and `switch_frame_indices` are those of a LongLive prompt file; the seed, the
length and the preset's parameters come with them. With the same weights on the same kind of device it gives
the same frames.
"""

from __future__ import annotations

import io
import json
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from ..config import check_switches, check_switches_fit, parse_switch_frames
from ..errors import UserError, short
from ..files import atomic_path, check_texts, read_json
from ..prompts import PromptSchedule
from ..report.video import write_pictures
from ..streaming.pipeline import Pipeline

SCHEMA_VERSION = 1
JPEG_QUALITY = 90
# A script that was played with others of these shows something else.
SAME = ("model", "height", "width", "block_frames", "local_attn_size", "sink_size", "global_sink",
        "relative_rope", "denoising_steps", "timestep_shift", "context_noise")


def parameters_of(pipeline: Pipeline) -> dict[str, Any]:
    """The keys of a pipeline's preset, JSON-ready, with the model's own size where the preset gives none."""
    return pipeline.config.to_dict() | {"height": pipeline.model.height, "width": pipeline.model.width}


def encode_picture(frame: Tensor) -> bytes:
    """One frame, uint8 [3, H, W] in host memory, as a JPEG with its full colour resolution."""
    data = io.BytesIO()
    picture = Image.fromarray(np.ascontiguousarray(frame.numpy().transpose(1, 2, 0)))
    picture.save(data, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return data.getvalue()


class Reel:
    """The encoded pictures that were shown, in a temporary file without a name; safe to use from several
    threads. Memory stays constant but for 16 bytes or so per picture.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="longlive-reel-")
        self._ends = [0]
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._ends) - 1

    def append(self, picture: bytes) -> None:
        """Keep one more picture.

        Raises:
            UserError: the disk with the temporary files is full.
        """
        with self._lock:
            try:
                self._file.seek(self._ends[-1])
                self._file.write(picture)
            except OSError as error:
                raise UserError(f"recording: cannot keep more pictures in {tempfile.gettempdir()}: "
                                f"{error.strerror}; free space there, or set TMPDIR.") from error
            self._ends.append(self._ends[-1] + len(picture))

    def pictures(self, count: int) -> Iterator[bytes]:
        """The first `count` pictures, as they were encoded."""
        for begin, end in zip(self._ends[:count], self._ends[1:count + 1]):
            with self._lock:
                self._file.seek(begin)
                yield self._file.read(end - begin)

    def clear(self) -> None:
        """Forget every picture."""
        with self._lock:
            self._ends = [0]
            self._file.seek(0)
            self._file.truncate()


@dataclass(frozen=True)
class Recording:
    """A video that was played, without its pictures.

    `script` has its switches in latent frames; `blocks` were begun and `frames` of them shown; `fps` is the
    pace at which its mp4 plays; `parameters` are those of the preset, `weights` the SHA-256 of each file.
    """

    script: PromptSchedule
    blocks: int
    frames: int
    seed: int
    fps: float
    parameters: Mapping[str, Any]
    weights: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready values: what `write` writes."""
        return {"schema_version": SCHEMA_VERSION, "prompts": list(self.script.prompts),
                "switch_frame_indices": list(self.script.switch_frames), "blocks": self.blocks,
                "frames": self.frames, "seed": self.seed, "fps": self.fps,
                "weights_sha256": dict(self.weights), "parameters": dict(self.parameters)}

    @classmethod
    def from_dict(cls, entry: Any, where: str) -> Recording:
        """Inverse of `to_dict`.

        Raises:
            UserError: naming `where` and what is missing or wrong.
        """
        if not isinstance(entry, dict) or entry.get("schema_version") != SCHEMA_VERSION:
            raise UserError(f"{where}: this is no script of a player (schema_version {SCHEMA_VERSION}); name "
                            "a .json file that save() wrote.")
        entry = check_texts(entry, where)
        kinds: dict[str, Any] = {"prompts": list, "blocks": int, "frames": int, "seed": int,
                                 "fps": (int, float), "parameters": dict, "weights_sha256": dict}
        for key, kind in kinds.items():
            if not isinstance(entry.get(key), kind) or isinstance(entry[key], bool):
                raise UserError(f"{where}, {key}: {short(entry.get(key))} is not what save() writes there; "
                                "save the video again.")
        prompts = entry["prompts"]
        if not prompts or not all(isinstance(prompt, str) and prompt.strip() for prompt in prompts):
            raise UserError(f"{where}, prompts: they must be a list of texts that are not empty.")
        switches = parse_switch_frames(entry.get("switch_frame_indices"), f"{where}, switch_frame_indices")
        script = PromptSchedule(tuple(prompts), switches or ())
        check_switches(script.switch_frames, len(prompts), f"{where}, switch_frame_indices")
        if entry["blocks"] < 1 or entry["fps"] <= 0:
            raise UserError(f"{where}: blocks and fps must be greater than 0.")
        block_frames = entry["parameters"].get("block_frames")
        if type(block_frames) is not int or block_frames < 1:
            raise UserError(f"{where}, parameters: block_frames is missing; save the video again.")
        check_switches_fit(script.switch_frames, entry["blocks"], block_frames,
                           f"{where}, switch_frame_indices", "blocks")
        return cls(script, entry["blocks"], entry["frames"], entry["seed"], float(entry["fps"]),
                   entry["parameters"], entry["weights_sha256"])

    @classmethod
    def read(cls, path: str | Path) -> Recording:
        """The script in `path`.

        Raises:
            UserError: the file cannot be read, or is no script.
        """
        entry = read_json(Path(path), "name a .json file that save() wrote")
        return cls.from_dict(entry, f"script {path}")

    def write(self, path: str | Path) -> None:
        """Write the script, atomically."""
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n",
                                 encoding="utf-8")

    def check_fits(self, pipeline: Pipeline) -> None:
        """Refuse to play again on what would show another video. Other optimizations may change frames
        within their rounding, and are allowed.

        Raises:
            UserError: the first difference.
        """
        here = parameters_of(pipeline)
        for key in SAME:
            if self.parameters.get(key) != here[key]:
                raise UserError(f"script: it was played with {key}: {self.parameters.get(key)!r}, and this "
                                f"session has {here[key]!r}; open the player with the script's.")
        digests = pipeline.weights["sha256"]
        if dict(self.weights) != dict(digests):
            raise UserError("script: it was played with other weights than this session's "
                            f"({here['weights']}); open the player with weights: "
                            f"{self.parameters.get('weights')}.")


def save(path: str | Path, recording: Recording, reel: Reel) -> tuple[Path, Path]:
    """Write the pictures as `path`.mp4 and the script as `path`.json, each atomically; returns both paths.

    A suffix .mp4 or .json of `path` is left out.

    Raises:
        UserError: nothing was shown yet, or a file cannot be written.
    """
    if not recording.frames:
        raise UserError("save: nothing was shown yet; play() comes first.")
    path = Path(path)
    base = path.with_suffix("") if path.suffix in (".mp4", ".json") else path
    video, script = base.with_name(base.name + ".mp4"), base.with_name(base.name + ".json")
    pictures = (np.asarray(Image.open(io.BytesIO(data))) for data in reel.pictures(recording.frames))
    write_pictures(video, pictures, recording.fps)
    recording.write(script)
    return video, script
