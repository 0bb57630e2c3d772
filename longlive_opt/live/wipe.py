"""Two presets on one prompt, seed and noise: a picture that is one preset's left of a slider and the other's
right of it, or both side by side.

    Comparison("baseline", "static_kv", blocks=6)

One is made after the other, with one model in memory at a time; `together` keeps both and makes a block of
each in turn, so that both can be watched from the first block on.
"""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anywidget
import torch
import traitlets

from ..config import ExperimentConfig
from ..errors import UserError
from ..prompts import schedule_of
from ..streaming.session import StreamingSession, whole_blocks
from .at_exit import end_at_exit
from .opening import live_config, open_session
from .recording import encode_picture

logger = logging.getLogger(__name__)

MAX_BLOCKS = 120
"""The browser keeps the pictures of both clips: at 832x480 some 60 KB each."""


class _Unwanted(Exception):
    """The clips were stopped."""


class Comparison(anywidget.AnyWidget):
    """Makes a clip with each of two presets, in a thread of its own, and shows them against each other."""

    _esm = (Path(__file__).parent / "wipe.js").read_text(encoding="utf-8")
    _css = (Path(__file__).parent / "player.css").read_text(encoding="utf-8")
    status = traitlets.Dict().tag(sync=True)

    def __init__(self, left: str = "baseline", right: str = "static_kv", *, prompt: str = "", blocks: int = 6,
                 together: bool = False, **keys: Any):
        """Args:
            prompt: of both; empty takes the preset's own first one.
            blocks: of each clip, at most `MAX_BLOCKS`.
            together: keep both in memory and make them block by block in turn.
            keys: of both presets, such as `model`, `device` or `seed`.

        Raises:
            UserError: an unknown preset, keys that cannot be, or a length that cannot be.
        """
        self._unwanted = threading.Event()
        if type(blocks) is not int or not 1 <= blocks <= MAX_BLOCKS:
            raise UserError(f"blocks: {blocks!r} is no length of a clip; write 1 to {MAX_BLOCKS}.")
        self._configs = [live_config(preset, keys) for preset in (left, right)]
        self._prompt = prompt or schedule_of(self._configs[0]).prompts[0]
        self._blocks, self._together = blocks, together
        self._thread: threading.Thread | None = None
        titles = [config.title for config in self._configs]
        super().__init__(status={"state": "ready", "message": "", "titles": titles, "prompt": self._prompt,
                                 "ms_per_frame": [None, None],
                                 "fps": self._configs[0].model_config().fps})
        self.on_msg(self._on_message)
        end_at_exit(self)

    def __repr__(self) -> str:
        return f"Comparison({' against '.join(self.status['titles'])}, {self.status['state']})"

    def run(self) -> None:
        """Make both clips, in the background.

        Raises:
            UserError: they are being made already.
        """
        if self._thread is not None and self._thread.is_alive():
            raise UserError("compare: the clips are being made already; stop() comes first.")
        self._unwanted.clear()
        self.send({"kind": "clear"})
        self._thread = threading.Thread(target=self._make, name="live-comparison", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Leave the clips as they are after the block that is being made."""
        self._unwanted.set()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until both clips are there, or failed; False after `timeout` seconds."""
        if self._thread is not None:
            self._thread.join(timeout)
        return self._thread is None or not self._thread.is_alive()

    def close(self) -> None:
        """Stop, and take the widget away."""
        self.stop()
        super().close()

    def end_threads(self) -> None:
        """Stop, and wait for it."""
        self.stop()
        self.wait()

    def _make(self) -> None:
        try:
            sides = self._in_turn() if self._together else self._one_after_the_other()
            for _ in sides:
                if self._unwanted.is_set():
                    break
            self._tell("stopped" if self._unwanted.is_set() else "done")
        except _Unwanted:
            self._tell("stopped")
        except Exception as error:
            if not isinstance(error, UserError):
                logger.exception("the comparison failed")
            self._tell("failed", str(error).strip().split("\n")[0])

    def _one_after_the_other(self) -> Iterator[None]:
        for side, config in enumerate(self._configs):
            session = self._open(side, config)
            yield from self._clip(side, session)
            del session
            _free()

    def _in_turn(self) -> Iterator[None]:
        first = self._open(0, self._configs[0])
        _require_room_for_another(first)
        clips = [self._clip(0, first), self._clip(1, self._open(1, self._configs[1]))]
        for _ in range(self._blocks):
            for clip in clips:
                yield next(clip, None)

    def _open(self, side: int, config: ExperimentConfig) -> StreamingSession:
        self._tell("working", f"opening {config.title}")
        session = open_session(config)
        self._tell("working", f"{config.title}: warming up")
        session.warm_up(self._go_on)
        return session

    def _go_on(self, done: int, count: int) -> None:
        if self._unwanted.is_set():
            raise _Unwanted

    def _clip(self, side: int, session: StreamingSession) -> Iterator[None]:
        """Send the frames of one clip, a block per step."""
        number, chunks = 0, whole_blocks(session.stream(self._prompt, self._blocks))
        while True:
            started = time.perf_counter()
            chunk = next(chunks, None)
            if chunk is None:
                return
            frames = chunk.frames[0].cpu()
            speeds = list(self.status["ms_per_frame"])
            speeds[side] = (time.perf_counter() - started) * 1e3 / len(frames)
            for frame in frames:
                self.send({"kind": "picture", "side": side, "number": number}, [encode_picture(frame)])
                number += 1
            self.status = {**self.status, "ms_per_frame": speeds}
            self._tell("working", f"{self._configs[side].title}: block {chunk.block + 1} of {self._blocks}")
            yield

    def _tell(self, state: str, message: str = "") -> None:
        self.status = {**self.status, "state": state, "message": message}

    def _on_message(self, _: Any, content: dict[str, Any], buffers: Any) -> None:
        try:
            if content.get("kind") == "run":
                self.run()
            elif content.get("kind") == "stop":
                self.stop()
        except UserError as error:
            self._tell(self.status["state"], str(error))


def _require_room_for_another(session: StreamingSession) -> None:
    """Refuse a second model where the GPU has less memory left than the first took.

    Raises:
        UserError: naming both.
    """
    device = session.pipeline.device
    if device.type != "cuda":
        return
    took, free = torch.cuda.max_memory_allocated(device), torch.cuda.mem_get_info(device)[0]
    if took > free:
        raise UserError(f"together: one model takes {took / 1e9:.1f} GB and {free / 1e9:.1f} GB are left; "
                        "leave it out, and one clip is made after the other.")


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
