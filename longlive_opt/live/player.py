"""The widget of a live stream: a canvas, a prompt, buttons and gauges. Its buttons are also methods, and may
be called from any cell while the video plays.

    player = Player.preset("static_kv", device="cpu")     # or Player(session)
    player                                                # shows it
    player.play("a small red circle moves left, on a dotted grey ground")
    player.ask("a small red circle moves right, on a dotted grey ground")
    player.wait()                                         # until both are on the screen
    player.stop()
    player.save("outputs/live/take")                      # take.mp4 and take.json
    player.replay("outputs/live/take.json")

Frames go to the browser as JPEGs in binary messages. Where no browser says that it has drawn them, the stream
pauses after `UNSEEN_FRAMES`: a closed tab keeps no GPU busy.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anywidget
import pandas as pd
import traitlets

from ..config import ExperimentConfig
from ..errors import UserError
from ..files import project_path
from ..prompts import schedule_of
from ..streaming.session import StreamingSession
from ..tiny.shapes.captions import strange
from .engine import Engine, Frame, Request
from .opening import default_weights, live_config, model_names, open_session, preset_names, require_here
from .recording import Recording, save

UNSEEN_FRAMES = 400
"""Frames that are sent before a browser must have drawn one: 25 s at 16 FPS."""
STATUS_SECONDS = 0.15
TAKES = "outputs/live"


class Player(anywidget.AnyWidget):
    """Plays one session; see the module. The session belongs to the player's own thread from then on."""

    _esm = (Path(__file__).parent / "player.js").read_text(encoding="utf-8")
    _css = (Path(__file__).parent / "player.css").read_text(encoding="utf-8")
    status = traitlets.Dict().tag(sync=True)
    choices = traitlets.Dict().tag(sync=True)

    _opened: Player | None = None

    def __init__(self, session: StreamingSession | None = None, *, fps: float | None = None,
                 buffer_blocks: int = 1):
        """Args:
            session: what to play; nobody else may use it meanwhile. None: `load` comes later.
            fps: video frames per second; None: as fast as the stream makes them.
            buffer_blocks: blocks that may wait to be shown.
        """
        self._notice = ""
        self._seen = self._sent = -1
        self._keys: dict[str, Any] = {}
        self._news = threading.Event()
        self.engine = Engine(self._show, self._news.set, fps=fps, buffer_blocks=buffer_blocks)
        super().__init__(status=self.engine.status() | {"notice": ""})
        self.on_msg(self._on_message)
        if session is not None:
            self._offer(session.pipeline.config, [session.pipeline.config.name],
                        [session.pipeline.config.model])
            self.engine.load(lambda: session)
        self.engine.start_thread("live-status", self._publish)

    @classmethod
    def preset(cls, preset: str = "static_kv", *, fps: float | None = None, buffer_blocks: int = 1,
               **keys: Any) -> Player:
        """A player with a preset by name, which offers the others too. It closes the one that was opened like
        this before, so that a cell may run again. The model loads in the background.

        Args:
            keys: of a preset, such as `model`, `weights`, `device`, `seed` or `height` (`live_config`).

        Raises:
            UserError: an unknown preset, keys that cannot be, or a device or weights that are not here.
        """
        require_here(live_config(preset, keys))
        if Player._opened is not None:
            Player._opened.close()
        player = cls(fps=fps, buffer_blocks=buffer_blocks)
        Player._opened = player
        player._keys = dict(keys)
        player.load(preset)
        return player

    def __repr__(self) -> str:
        if "engine" not in self.__dict__:
            return "Player()"
        status = self.engine.status()
        at = "" if status["block"] is None else f", block {status['block']}"
        why = f": {status['message']}" if status["message"] else ""
        return f"Player({status['state']}{why}{at}, {status['about'] or 'no session'})"

    # ---- verbs

    def load(self, preset: str, model: str | None = None) -> None:
        """Let go of the session and open `preset`, with the keys that `Player.preset` was given.

        Raises:
            UserError: an unknown preset, or one that cannot be on this model and device.
        """
        keys = dict(self._keys)
        if model is not None and model != keys.get("model", "tiny"):
            keys |= {"model": model, "weights": default_weights(model)}
        config = live_config(preset, keys)
        require_here(config)
        self._keys = keys
        models = model_names(config.device)
        self._offer(config, preset_names(), models if config.model in models else [*models, config.model])
        self.engine.load(functools.partial(open_session, config))

    def play(self, prompt: str = "", seed: int | None = None) -> None:
        """Go on if paused, else start a video: with `prompt`, or the preset's own first one. It begins as
        soon as the model is loaded and warm.

        Raises:
            UserError: an empty prompt, no such seed, a video that plays already, or a model that could not be
                loaded.
        """
        self.engine.play(self.choices.get("prompt", "") if prompt in ("", None) else prompt, seed)

    def ask(self, prompt: str) -> Request:
        """Let `prompt` take over at the next block; what is returned says what became of it. The first block
        of a video keeps the prompt that it began with.

        Raises:
            UserError: an empty prompt, no video that plays or is about to, or a model that could not be
                loaded.
        """
        return self.engine.ask(prompt)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until what was asked for is on the screen: the model is loaded, a video that was to play shows
        its first frame, and each new prompt too. False after `timeout` seconds.

        Raises:
            UserError: with the reason why it will not come: loading or playing failed, the player is paused
                and holds a prompt back, or it is closed.
        """
        settled = self.engine.wait(Engine.is_settled, timeout)
        self.engine.require_carried_out()
        return settled

    def pause(self) -> None:
        """Hold the video; `play` goes on."""
        self.engine.pause()

    def stop(self) -> None:
        """End the video; it can still be saved."""
        self.engine.stop()

    def reset(self, seed: int | None = None) -> None:
        """End the video and forget it; `seed` is for those to come."""
        self.engine.reset(seed)
        self.send({"kind": "clear"})

    @property
    def fps(self) -> float | None:
        """Video frames per second; None: as fast as the stream makes them."""
        return self.engine.fps

    @fps.setter
    def fps(self, fps: float | None) -> None:
        self.engine.fps = fps
        self._news.set()

    def save(self, path: str | Path | None = None) -> tuple[Path, Path]:
        """Write what was shown as mp4 and its script as JSON; returns both paths. What was asked for before
        comes first, as in `wait`. Relative paths begin at the project's folder; None takes the time as the
        name.

        Raises:
            UserError: nothing was shown yet, or a file cannot be written.
        """
        self.engine.wait(Engine.is_settled)
        return self._save(path)

    def _save(self, path: str | Path | None = None) -> tuple[Path, Path]:
        name = path if path is not None else f"{TAKES}/{time.strftime('%Y%m%d-%H%M%S')}"
        return save(project_path(name), self.engine.recording(), self.engine.reel)

    def replay(self, path: str | Path) -> None:
        """Play a script that `save` wrote: with the same seed and switches come the same frames. A video that
        plays ends. While the model loads, the script waits for it, and what does not fit is said then.

        Raises:
            UserError: no such script, one that was played with other weights or another window, or a model
                that could not be loaded.
        """
        self.engine.replay(Recording.read(project_path(path)))

    def requests(self) -> pd.DataFrame:
        """What became of each new prompt: the block at which it took over, and ms to its first pixels."""
        rows = self.engine.status()["requests"]
        return pd.DataFrame(rows, columns=["prompt", "block", "latency_ms"])

    def close(self) -> None:
        """End the video, free the session and take the widget away."""
        if "engine" not in self.__dict__:  # refused while it was made, and nothing is there to close
            return
        self.engine.close()
        self._news.set()
        if Player._opened is self:
            Player._opened = None
        super().close()

    # ---- the browser

    def _offer(self, config: ExperimentConfig, presets: list[str], models: list[str]) -> None:
        self.choices = {"presets": presets, "models": models, "preset": config.name, "model": config.model,
                        "prompt": schedule_of(config).prompts[0]}

    def _show(self, frame: Frame) -> None:
        if frame.number == 0:
            self._seen = -1
        if frame.number - self._seen > UNSEEN_FRAMES:
            self._notice = (f"Paused: no browser has drawn the last {UNSEEN_FRAMES} frames. Play goes on; a "
                            "cell that runs can hold back its receipts.")
            self._seen = frame.number
            self.engine.pause()
        self.send({"kind": "frame", "number": frame.number, "block": frame.block, "index": frame.index,
                   "count": frame.count, "first_of": frame.first_of}, [frame.picture])
        self._news.set()

    def _publish(self) -> None:
        """Send the status whenever it changed, and not more often than it can be read."""
        while self.engine.state != "closed":
            self._news.wait()
            self._news.clear()
            self.status = self.engine.status() | {"notice": self._notice}
            time.sleep(STATUS_SECONDS)

    def _on_message(self, _: Any, content: dict[str, Any], buffers: Any) -> None:
        verbs: dict[str, Callable[[dict[str, Any]], None]] = {
            "seen": self._on_seen, "play": self._on_play, "ask": self._on_ask, "fps": self._on_fps,
            "pause": lambda _: self.pause(), "stop": lambda _: self.stop(), "save": self._on_save,
            "reset": lambda it: self.reset(_whole(it.get("seed"), "seed")),
            "load": lambda it: self.load(it["preset"], it["model"]),
        }
        verb = verbs.get(content.get("kind", ""))
        if verb is None:
            return
        if content["kind"] != "seen":
            self._notice = ""
        try:
            verb(content)
        except UserError as error:
            self._notice = str(error)
        self._news.set()

    def _on_seen(self, content: dict[str, Any]) -> None:
        self._seen = max(self._seen, int(content["frame"]))

    def _on_play(self, content: dict[str, Any]) -> None:
        self._warn(content["prompt"])
        self.play(content["prompt"], _whole(content.get("seed"), "seed"))

    def _on_ask(self, content: dict[str, Any]) -> None:
        self._warn(content["prompt"])
        request = self.ask(content["prompt"])
        self.send({"kind": "asked", "number": request.number, "token": content.get("token")})

    def _on_fps(self, content: dict[str, Any]) -> None:
        self.fps = float(content["fps"]) if content["fps"] else None

    def _on_save(self, _: dict[str, Any]) -> None:
        video, script = self._save()
        self._notice = f"Saved {video.name} and {script.name} in {TAKES}."

    def _warn(self, prompt: str) -> None:
        """The tiny model draws something for every prompt, and knows few."""
        if self.choices.get("model") == "tiny" and (words := strange(prompt)):
            self._notice = words


def _whole(value: Any, key: str) -> int | None:
    """A whole number from a field of the browser; None if it was left empty."""
    if value in (None, ""):
        return None
    try:
        return int(value)
    except (TypeError, ValueError):
        raise UserError(f"{key}: {value!r} is no whole number; write one, such as 0.") from None
