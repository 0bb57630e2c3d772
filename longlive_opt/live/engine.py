"""The engine of a player: one thread runs the session, another shows frames at their time. It knows no
notebook; what it shows goes to a callable.

    engine = Engine(show)                    # show(frame) is called for each frame when it is due
    engine.load(lambda: session)             # in the engine's thread, so that kernels chosen there stay
    engine.play("a red fox")
    engine.ask("a blue whale")               # asked, applied at block n, first pixels after x ms
    engine.stop()

A call that comes while the session loads or warms up is kept, and carried out as soon as that is done.

The worker stays at most `buffer_blocks` blocks ahead of what is shown: a deeper buffer hides a slow block,
and a new prompt waits until the frames in it were shown.
"""

from __future__ import annotations

import contextvars
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..prompts import PromptSchedule
from ..streaming.session import MAX_SEED, Chunk, StreamingSession, checked_prompt
from .at_exit import end_at_exit
from .recording import Recording, Reel, encode_picture, parameters_of

logger = logging.getLogger(__name__)

HISTORY = 32
"""Blocks and requests that a status lists."""
PACE_BLOCKS = 4
"""The stream's own pace is that of so many blocks: a single slow one does not show."""
MAX_FPS = 240.0
IDLE = ("empty", "ready", "stopped", "ended", "failed", "closed")


@dataclass(frozen=True)
class Frame:
    """One frame that is due: its `picture` is a JPEG, `number` counts from 0 in the video, `index` in its
    block of `count` frames, and `first_of` is the number of the request whose first frame it is, None for
    another.
    """

    number: int
    block: int
    index: int
    count: int
    prompt: str
    picture: bytes
    first_of: int | None


@dataclass
class Request:
    """A new prompt while a video plays. `block` is that at which it took over, `latency_ms` the time from the
    request to its first frame being shown, what was still in the buffer included; None: not yet. A request
    that came before the video's first block counts from that block.
    """

    number: int
    prompt: str
    asked_at: float
    block: int | None = None
    latency_ms: float | None = None

    def sentence(self) -> str:
        """What became of it."""
        if self.block is None:
            return "asked"
        if self.latency_ms is None:
            return f"applied at block {self.block}"
        return f"applied at block {self.block}, first pixels after {self.latency_ms:.0f} ms"


@dataclass(frozen=True)
class _Made:
    """A block in host memory, with the time that it took."""

    block: int
    frames: Tensor
    prompt: str
    switched: bool
    ms: float
    request: Request | None


class _Abandoned(Exception):
    """The video that was being prepared is no longer wanted."""


class Engine:
    """Plays one session. Every method may be called from any thread.

    States: empty, loading, ready, warming up, playing, paused, stopped, ended (a script has an end), failed
    and closed.
    """

    def __init__(self, show: Callable[[Frame], None], changed: Callable[[], None] = lambda: None, *,
                 fps: float | None = None, buffer_blocks: int = 1):
        """Args:
            show: takes each frame when it is due, in the thread that shows.
            changed: called after anything that `status` tells has changed, from various threads.
            fps: video frames per second; None: as fast as the stream makes them.
            buffer_blocks: blocks that may wait to be shown, at least 1.
        """
        if type(buffer_blocks) is not int or buffer_blocks < 1:
            raise UserError(f"buffer_blocks: {buffer_blocks!r} is no number of blocks; write 1 or more.")
        self.fps = fps
        self.buffer_blocks = buffer_blocks
        self.reel = Reel()
        self._show, self._changed = show, changed
        self._turn = threading.Condition()
        self._commands: deque[Callable[[], None]] = deque()
        self._session: StreamingSession | None = None
        self._warm = False
        self._state, self._message = "empty", ""
        self._seed: int | None = None
        self._video = 0
        self._asked = 0
        self._forget()
        context = contextvars.copy_context()  # settings of torch's compiler belong to a context
        self._threads: list[threading.Thread] = []
        end_at_exit(self)
        self.start_thread("live-session", partial(context.run, self._work))
        self.start_thread("live-frames", self._present)

    def _forget(self) -> None:
        """Nothing is made, waits or was shown; the lock is held, but for the first time."""
        self._video += 1
        self._chunks: Iterator[Chunk] | None = None
        self._exhausted = False
        self._waiting: deque[_Made] = deque()
        self._showing: deque[int] = deque()
        self._block: _Made | None = None
        self._made: deque[_Made] = deque(maxlen=PACE_BLOCKS)
        self._history: deque[dict[str, Any]] = deque(maxlen=HISTORY)
        self._next: Callable[[], None] | None = None  # until the session is loaded
        self._early: deque[Request] = deque()  # until the first block is made
        self._pending: deque[Request] = deque()
        self._requests: deque[Request] = deque(maxlen=HISTORY)
        self._prompts: list[str] = []
        self._switch_blocks: list[int] = []
        self._shown = self._stalls = 0
        self._shown_block = -1
        self._due = self._paused_at = 0.0

    def start_thread(self, name: str, work: Callable[[], None]) -> None:
        """Start a thread that `close` waits for; `work` returns after a change of the state to closed."""
        thread = threading.Thread(target=work, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    # ---- what is asked of it

    @property
    def fps(self) -> float | None:
        """Video frames per second; None: as fast as the stream makes them."""
        return self._fps

    @fps.setter
    def fps(self, fps: float | None) -> None:
        if fps is not None and (isinstance(fps, bool) or not isinstance(fps, (int, float))
                                or not 0 < fps <= MAX_FPS):
            raise UserError(f"fps: {fps!r} is no pace; write a number of frames per second up to "
                            f"{MAX_FPS:.0f}, or None for the stream's own.")
        self._fps = fps

    @property
    def state(self) -> str:
        return self._state

    @property
    def session(self) -> StreamingSession | None:
        """The session, None before one is loaded. It is the engine's: only `switch_prompt` may be called."""
        return self._session

    def load(self, make_session: Callable[[], StreamingSession]) -> None:
        """Let go of the session and make another one, in the engine's thread."""
        with self._turn:
            self._require_open()
            self._leave("loading")
            self._commands.clear()
            self._commands.append(partial(self._load, make_session, self._video))
            self._turn.notify_all()
        self._changed()

    def play(self, prompt: str = "", seed: int | None = None) -> None:
        """Go on if paused, else start a video with `prompt`, after a warm-up the first time. While a session
        loads, the video waits for it.

        Raises:
            UserError: no session, an empty prompt, no such seed, or a video that plays already.
        """
        with self._turn:
            if self._state == "paused":
                now = time.perf_counter()
                for request in self._requests:  # the pause is no latency
                    if request.latency_ms is None:
                        request.asked_at = now - max(0.0, self._paused_at - request.asked_at)
                self._set("playing")
                self._due = 0.0
                self._turn.notify_all()
            else:
                self._require_session("play")
                if self._next or self._state in ("playing", "warming up"):
                    raise UserError("play: a video plays already; stop() comes first, or ask() for a new "
                                    "prompt.")
                script = PromptSchedule((checked_prompt(prompt),))
                self._seed = self._seed if seed is None else _checked_seed(seed)
                self._begin_when_loaded(partial(self._begin, script, None))
        self._changed()

    def replay(self, recording: Recording) -> None:
        """Play a script that was played before, with its seed and its switches. A video that plays ends.
        While a session loads, the script waits for it, and is refused then if that would show another video.

        Raises:
            UserError: no session, or one that would show another video.
        """
        def begin() -> None:
            recording.check_fits(self._session.pipeline)
            self._seed = _checked_seed(recording.seed)
            self._begin(recording.script, recording.blocks)

        with self._turn:
            self._require_session("replay")
            self._drop_what_waits()
            self._begin_when_loaded(begin)
        self._changed()

    def ask(self, prompt: str) -> Request:
        """Let `prompt` take over at the next block boundary; the first block of a video keeps its own prompt.

        Raises:
            UserError: no video plays or waits to be played, or an empty prompt.
        """
        with self._turn:
            self._require_no_failure("switch")
            if not self._next and self._state not in ("playing", "paused", "warming up"):
                raise UserError(f"switch: no video plays (the player is {self._state}); play() comes first.")
            if self._exhausted:
                raise UserError("switch: the script is at its end; play() starts a video that goes on.")
            request = Request(self._asked, checked_prompt(prompt), time.perf_counter())
            if self._made:
                self._hand_on(request)
            else:
                self._early.append(request)
            self._asked += 1
            self._requests.append(request)
        self._changed()
        return request

    def pause(self) -> None:
        """Hold the video; the block that is being made is finished. Nothing happens unless one plays."""
        with self._turn:
            if self._state == "playing":
                self._paused_at = time.perf_counter()
                self._set("paused")
                self._turn.notify_all()
        self._changed()

    def stop(self) -> None:
        """End the video. What was shown can be saved until the next one begins."""
        with self._turn:
            self._drop_what_waits()
            if self._state in ("playing", "paused", "warming up"):
                self._end("stopped")
        self._changed()

    def reset(self, seed: int | None = None) -> None:
        """End the video and forget what was shown; `seed` is for the videos to come.

        Raises:
            UserError: no such seed.
        """
        with self._turn:
            if seed is not None:
                self._seed = _checked_seed(seed)
            self._drop_what_waits()
            if self._state not in ("empty", "loading", "closed"):
                self._leave("ready")
        self._changed()

    def close(self) -> None:
        """End the video, let go of the session and end the threads."""
        with self._turn:
            if self._state != "closed":
                self._leave("closed")
            self._turn.notify_all()
        self._changed()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()
        self._session = None
        self._changed()

    end_threads = close

    def wait(self, done: Callable[[Engine], bool] = lambda engine: engine.state in IDLE,
             timeout: float | None = None) -> bool:
        """Wait until `done` holds, by default until the engine is idle; False after `timeout` seconds."""
        with self._turn:
            return self._turn.wait_for(lambda: done(self), timeout)

    def is_settled(self) -> bool:
        """Whether nothing that was asked for is still to come: no session that loads, no warm-up, no video or
        prompt without a frame on the screen. Nothing comes while the player is paused.
        """
        with self._turn:
            if self._state != "playing":
                return self._state not in ("loading", "warming up")
            return bool(self._shown) and all(request.latency_ms is not None for request in self._requests)

    def require_carried_out(self) -> None:
        """Refuse to go on after what failed, or while a pause holds back a request.

        Raises:
            UserError: with the reason.
        """
        with self._turn:
            self._require_open()
            if self._state == "failed":
                raise self._failure("wait")
            if self._state == "paused" and any(request.latency_ms is None for request in self._requests):
                raise UserError("wait: the player is paused, and holds a prompt back; play() goes on.")

    def status(self) -> dict[str, Any]:
        """Everything that a player displays, JSON-ready. Times are in ms, memory in 1e9 bytes, None is
        unknown; `blocks` are the last ones made, each with the place of a block that took over a request.
        """
        with self._turn:
            session, block = self._session, self._block
            waiting = len(self._showing) + sum(len(made.frames) for made in self._waiting)
            interval = self._interval()
            latencies = [request.latency_ms for request in self._requests if request.latency_ms is not None]
            return {
                "state": self._state, "message": self._message,
                "prompt": block.prompt if block else (self._prompts or [""])[-1],
                "seed": self.next_seed, "fps": self._fps,
                "pace_fps": 1 / interval if interval else None,
                "ms_per_frame": self._made[-1].ms / len(self._made[-1].frames) if self._made else None,
                "ps_ms": latencies[-1] if latencies else None,
                "memory_gb": memory_gb(session.pipeline.device if session else None),
                "buffer_frames": waiting, "buffer_ms": waiting * interval * 1e3 if interval else None,
                "frames": self._shown, "stalls": self._stalls, "block": block.block if block else None,
                "blocks": [dict(entry) for entry in self._history],
                "requests": [{"number": request.number, "prompt": request.prompt, "block": request.block,
                              "latency_ms": request.latency_ms, "sentence": request.sentence()}
                             for request in self._requests],
                "about": repr(session.pipeline) if session else "",
            }

    @property
    def next_seed(self) -> int | None:
        """The seed of the next video; None before a session is loaded and none was set."""
        return self._seed if self._seed is not None else self._session.seed if self._session else None

    def recording(self) -> Recording:
        """What was shown so far, without its pictures.

        Raises:
            UserError: nothing was shown.
        """
        with self._turn:
            if self._session is None or not self._shown:
                if self._state == "failed":
                    raise self._failure("save")
                raise UserError("save: nothing was shown yet; play() comes first.")
            pipeline, plan = self._session.pipeline, self._session.plan
            switches = [block for block in self._switch_blocks if block <= self._shown_block]
            script = PromptSchedule(tuple(self._prompts[:len(switches) + 1]),
                            tuple(block * plan.block_frames for block in switches))
            return Recording(script, self._shown_block + 1, self._shown, self._session.seed,
                             float(self._fps or pipeline.model.fps), parameters_of(pipeline),
                             pipeline.weights["sha256"])

    # ---- states; the lock is held

    def _require_open(self) -> None:
        if self._state == "closed":
            raise UserError("player: it is closed; open another one.")

    def _set(self, state: str, message: str = "") -> None:
        self._state, self._message = state, message

    def _require_session(self, verb: str) -> None:
        """Refuse a call for which no session is there or on its way."""
        self._require_no_failure(verb)
        if self._state == "empty":
            raise UserError(f"{verb}: the player has no session; load() comes first.")

    def _require_no_failure(self, verb: str) -> None:
        """Refuse a call after a session could not be loaded."""
        self._require_open()
        if self._session is None and self._state == "failed":
            raise self._failure(verb)

    def _failure(self, verb: str) -> UserError:
        return UserError(f"{verb}: the player failed: {self._message}")

    def _begin_when_loaded(self, begin: Callable[[], None]) -> None:
        if self._state == "loading":
            self._next = begin
            self._set("loading", "a video follows")
        else:
            begin()

    def _drop_what_waits(self) -> None:
        """Forget the calls that came while the session loads."""
        if self._next:
            self._next = None
            self._early.clear()
            self._requests.clear()
            self._set("loading")

    def _begin_what_waited(self) -> None:
        """Carry out the calls that came while the session was loaded."""
        begin, early = self._next, self._early
        self._next = None
        if begin is None:
            return
        try:
            begin()
        except UserError as error:  # a script of something else; nobody is there to catch it
            self._end("failed", str(error))
            return
        self._early = early
        self._requests.extend(early)

    def _begin(self, script: PromptSchedule, blocks: int | None) -> None:
        self._forget()
        self.reel.clear()
        self._set("warming up")
        self._prompts = [script.prompts[0]]
        self._commands.append(partial(self._start, script, blocks, self._video))
        self._turn.notify_all()

    def _hand_on(self, request: Request) -> None:
        self._session.switch_prompt(request.prompt)
        self._pending.append(request)

    def _end(self, state: str, message: str = "") -> None:
        """Make and show no more; what was shown stays."""
        self._video += 1
        self._chunks = None
        self._waiting.clear()
        self._showing.clear()
        self._next = None
        self._early.clear()
        self._pending.clear()
        self._set(state, message)
        self._turn.notify_all()

    def _leave(self, state: str) -> None:
        """Forget the video, its pictures too."""
        self._forget()
        self.reel.clear()
        self._set(state)
        self._turn.notify_all()

    # ---- the thread that owns the session

    def _work(self) -> None:
        while True:
            with self._turn:
                self._turn.wait_for(lambda: self._state == "closed" or self._commands or self._may_make())
                if self._state == "closed":
                    return
                command = self._commands.popleft() if self._commands else self._make_block
                video = self._video
            try:
                command()
            except _Abandoned:
                pass
            except Exception as error:
                if not isinstance(error, UserError) and self._state != "closed":
                    logger.exception("the player's stream failed")
                self._fail(error, video)
            del command  # it may hold a session
            self._changed()

    def _may_make(self) -> bool:
        return (self._state == "playing" and self._chunks is not None
                and len(self._waiting) < self.buffer_blocks)

    def _fail(self, error: Exception, video: int) -> None:
        words = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        with self._turn:
            if video == self._video and self._state != "closed":
                self._end("failed", words.strip().split("\n")[0])

    def _load(self, make_session: Callable[[], StreamingSession], video: int) -> None:
        with self._turn:
            old, self._session, self._warm = self._session, None, False
        if old is not None:
            old.reset()
            del old
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._changed()
        session = make_session()
        session.host_frames = True
        with self._turn:
            if video != self._video and self._state in ("loading", "closed"):
                return  # another one is asked for
            self._session = session
            self._set("ready")
            self._begin_what_waited()
            self._turn.notify_all()

    def _start(self, script: PromptSchedule, blocks: int | None, video: int) -> None:
        session = self._session

        def note(done: int, count: int) -> None:
            with self._turn:
                if video != self._video:
                    raise _Abandoned
                self._message = f"block {done} of {count}"
                self._turn.notify_all()
            self._changed()

        session.reset(self._seed)
        if not self._warm:
            session.warm_up(note)
            self._warm = True
        chunks = session.stream(script.prompts[0]) if blocks is None else session.play(script, blocks)
        with self._turn:
            if video != self._video:
                return
            self._chunks = chunks
            self._set("playing")
            self._turn.notify_all()

    def _make_block(self) -> None:
        with self._turn:
            chunks, video = self._chunks, self._video
        if chunks is None:
            return
        started = time.perf_counter()
        chunk = next(chunks, None)
        if chunk is None:
            with self._turn:
                if video == self._video:
                    self._chunks, self._exhausted = None, True
                    self._turn.notify_all()
            return
        frames = chunk.frames[0].to("cpu", copy=True)  # the session uses its memory again
        ms = (time.perf_counter() - started) * 1e3
        with self._turn:
            if video != self._video:
                return
            request = None
            if chunk.block == 0:
                self._prompts = [chunk.prompt]
            elif chunk.switched:
                self._prompts.append(chunk.prompt)
                self._switch_blocks.append(chunk.block)
            # In a script that is played again, a switch may be the script's.
            if chunk.switched and self._pending and self._pending[0].prompt == chunk.prompt:
                request = self._pending.popleft()
                request.block = chunk.block
            made = _Made(chunk.block, frames, chunk.prompt, chunk.switched, ms, request)
            self._waiting.append(made)
            self._made.append(made)
            self._history.append({"block": chunk.block, "ms": ms, "frames": len(frames),
                                  "switched": chunk.switched})
            while self._early:
                self._early[0].asked_at = time.perf_counter()
                self._hand_on(self._early.popleft())
            self._turn.notify_all()

    # ---- the thread that shows

    def _present(self) -> None:
        while True:
            with self._turn:
                if self._may_show() and not self._has_frame() and self._shown and self._fps:
                    self._stalls += 1
                self._turn.wait_for(lambda: self._state == "closed"
                                    or self._may_show() and (self._has_frame() or self._exhausted))
                if self._state == "closed":
                    return
                ended = not self._has_frame()
                if ended:
                    self._end("ended")
                else:
                    video = self._video
                    if not self._showing:
                        self._block = self._waiting.popleft()
                        self._showing = deque(range(len(self._block.frames)))
                        self._turn.notify_all()
                    made, index = self._block, self._showing[0]
            if ended:
                self._changed()
                continue
            picture = encode_picture(made.frames[index])
            frame = self._take(made, index, video, picture)
            if frame is not None:
                self._hand_over(frame, made.request if index == 0 else None)

    def _may_show(self) -> bool:
        return self._state == "playing"

    def _has_frame(self) -> bool:
        return bool(self._showing or self._waiting)

    def _interval(self) -> float | None:
        """Seconds from frame to frame; None before a block was made and without a set pace."""
        if self._fps:
            return 1 / self._fps
        frames = sum(len(made.frames) for made in self._made)
        return sum(made.ms for made in self._made) / 1e3 / frames if frames else None

    def _take(self, made: _Made, index: int, video: int, picture: bytes) -> Frame | None:
        """The frame once it is due; None if the video was paused or ended meanwhile."""
        with self._turn:
            while self._may_show() and video == self._video:
                left = self._due - time.perf_counter()
                if left <= 0:
                    break
                self._turn.wait(left)
            if not self._may_show() or video != self._video:
                return None
            self._showing.popleft()
            interval, now = self._interval(), time.perf_counter()
            # At most one frame is made up for: a viewer sees a short hold better than a rush.
            self._due = max(self._due, now - interval) + interval
            frame = Frame(self._shown, made.block, index, len(made.frames), made.prompt, picture,
                          made.request.number if made.request and index == 0 else None)
            try:
                self.reel.append(picture)
            except UserError as error:
                self._end("failed", str(error))
                return None
            self._shown += 1
            self._shown_block = made.block
            return frame

    def _hand_over(self, frame: Frame, request: Request | None) -> None:
        try:
            self._show(frame)
        except Exception:  # whoever shows it; the stream goes on
            logger.exception("a frame could not be shown")
        if request is not None:
            request.latency_ms = (time.perf_counter() - request.asked_at) * 1e3
        with self._turn:
            self._turn.notify_all()
        if request is not None:
            self._changed()


def memory_gb(device: torch.device | None) -> float | None:
    """What PyTorch holds of the GPU, else what this process holds of the host's memory, in 1e9 bytes; None
    where the system does not say.
    """
    if device is not None and device.type == "cuda":
        return torch.cuda.memory_reserved(device) / 1e9
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e9
    except (OSError, ValueError):
        return None


def _checked_seed(seed: Any) -> int:
    if type(seed) is not int or not 0 <= seed <= MAX_SEED:
        raise UserError(f"seed: {seed!r} is no seed; write a whole number from 0 to {MAX_SEED}.")
    return seed
