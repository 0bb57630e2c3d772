"""The live player's engine: who runs the session, what is shown when, and that a script plays again."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from micro import micro_config, micro_model, micro_pipeline
from PIL import Image

from longlive_opt.config import STUDIES, TEST_PRESET, ExperimentConfig, preset_files
from longlive_opt.errors import UserError
from longlive_opt.live.engine import Engine, Frame
from longlive_opt.live.opening import live_config, model_names, preset_names
from longlive_opt.live.recording import SAME, Recording, Reel, encode_picture, parameters_of, save
from longlive_opt.optimizations import build_pipeline
from longlive_opt.prompts import PromptSchedule
from longlive_opt.runner.plan import Layout
from longlive_opt.streaming.pipeline import Pipeline
from longlive_opt.streaming.session import StreamingSession

ROOT = Path(__file__).parent.parent
POINT = {"height": 16, "width": 16}  # one token a frame
SOON = 60.0


@pytest.fixture(autouse=True, scope="module")
def micro() -> Iterator[None]:
    with micro_model():
        yield


@pytest.fixture(scope="module")
def pipeline(micro: None) -> Pipeline:
    return micro_pipeline(**POINT, use_static_kv=True, name="micro")


class Screen:
    """Keeps what an engine shows."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.times: list[float] = []

    def __call__(self, frame: Frame) -> None:
        self.frames.append(frame)
        self.times.append(time.perf_counter())


@pytest.fixture
def screen() -> Screen:
    return Screen()


@pytest.fixture
def engine(pipeline: Pipeline, screen: Screen) -> Iterator[Engine]:
    """An engine with a session that needs no warm-up."""
    engine = Engine(screen)
    engine.load(lambda: StreamingSession(pipeline))
    assert engine.wait(lambda it: it.state == "ready", SOON)
    engine._warm = True
    yield engine
    engine.close()


def blocks_shown(count: int):
    """Whether so many blocks have begun to be shown."""
    return lambda engine: engine.status()["block"] is not None and engine.status()["block"] >= count - 1


def play_some(engine: Engine) -> Recording:
    """Four blocks and more, with a switch, then stopped."""
    engine.play("a fox", seed=5)
    assert engine.wait(blocks_shown(2), SOON)
    request = engine.ask("a whale")
    assert engine.wait(lambda _: request.latency_ms is not None, SOON)
    shown = engine.status()["block"]
    assert engine.wait(blocks_shown(shown + 3), SOON)
    engine.stop()
    return engine.recording()


def test_frames_come_in_order_and_as_the_session_made_them(engine, screen, pipeline):
    """A frame twice, left out, or drawn from memory that the session used again."""
    recording = play_some(engine)
    session = StreamingSession(pipeline)
    session.reset(5)
    chunks = list(session.play(recording.script, recording.blocks))
    expected = [encode_picture(frame) for chunk in chunks for frame in chunk.frames[0]]
    assert [frame.number for frame in screen.frames] == list(range(recording.frames))
    assert [frame.picture for frame in screen.frames] == expected[:recording.frames]
    assert [frame.prompt for frame in screen.frames] == [
        chunk.prompt for chunk in chunks for _ in chunk.frames[0]][:recording.frames]


def test_a_script_plays_again(engine, screen, tmp_path):
    """A saved script that shows another video: its seed, a switch or the length was lost on the way."""
    recording = play_some(engine)
    video, script = save(tmp_path / "take.mp4", recording, engine.reel)
    assert video.stat().st_size > 500 and not list(tmp_path.glob(".*"))
    first = [frame.picture for frame in screen.frames]
    screen.frames.clear()
    engine.reset(seed=1)
    again = Recording.read(script)
    assert again == dataclasses.replace(recording, parameters=json.loads(script.read_text())["parameters"])
    engine.replay(again)
    assert engine.wait(lambda it: it.state == "ended", SOON)
    assert [frame.picture for frame in screen.frames[:len(first)]] == first
    assert engine.recording().script == recording.script and engine.recording().seed == 5


def test_a_take_fits_the_player_that_made_it(pipeline):
    """A value that the preset leaves to the model, saved as the model's and compared with the preset's None:
    every take refused. Keys that say None to `ExperimentConfig` are the ones to look at.
    """
    parameters = {"model": "micro", "weights": "random", "model_dtype": "float32", "warmup_blocks": 16}
    left_open = dataclasses.replace(pipeline, config=ExperimentConfig.from_mapping(parameters))
    left_open = dataclasses.replace(left_open, model=left_open.config.model_config())
    saved = json.loads(json.dumps(parameters_of(left_open)))
    assert None not in [saved[key] for key in SAME]
    take = Recording(PromptSchedule(("a fox",)), 1, 9, 0, 16.0, saved, left_open.weights["sha256"])
    take.check_fits(left_open)
    for key in ("height", "width", "local_attn_size"):
        with pytest.raises(UserError, match=f"played with {key}: 160"):
            dataclasses.replace(take, parameters=saved | {key: 160}).check_fits(left_open)


def test_what_becomes_of_a_request(engine, screen):
    """A latency that leaves out what waits in the buffer, or a request that is taken for another one."""
    engine.play("a fox")
    assert engine.wait(blocks_shown(1), SOON)
    requests = [engine.ask("a whale"), engine.ask("a bear")]
    assert requests[0].sentence() == "asked" or requests[0].block
    assert engine.wait(lambda _: requests[1].latency_ms is not None, SOON)
    engine.stop()
    assert requests[1].block == requests[0].block + 1 and requests[0].latency_ms < requests[1].latency_ms
    assert requests[0].sentence().startswith(f"applied at block {requests[0].block}, first pixels after")
    first = {frame.first_of: frame for frame in screen.frames if frame.first_of is not None}
    assert [first[request.number].prompt for request in requests] == ["a whale", "a bear"]
    assert [first[request.number].block for request in requests] == [request.block for request in requests]
    status = engine.status()
    assert status["ps_ms"] == requests[1].latency_ms and status["ms_per_frame"] > 0
    switched = [entry["block"] for entry in status["blocks"] if entry["switched"]]
    assert switched == [request.block for request in requests]
    json.dumps(status)


def test_set_pace_is_kept(engine, screen):
    """Frames in bursts, one block at a time, or a stream that runs ahead of its viewer without an end."""
    engine.fps = 50
    engine.play("a fox")
    assert engine.wait(lambda _: len(screen.frames) > 40, SOON)
    most = engine.status()["buffer_frames"]
    engine.stop()
    spent = screen.times[40] - screen.times[0]
    assert 0.75 <= spent <= 3 and most <= 24
    gaps = sorted(b - a for a, b in zip(screen.times, screen.times[1:]))
    assert 0.01 < gaps[len(gaps) // 2] < 0.04


def test_pause_holds_and_goes_on(engine, screen):
    """Frames that still arrive in a pause, or that are lost by it; a pause that counts as latency."""
    engine.play("a fox")
    assert engine.wait(blocks_shown(1), SOON)
    engine.pause()
    time.sleep(0.05)
    shown = len(screen.frames)
    request = engine.ask("a whale")
    time.sleep(0.3)
    assert len(screen.frames) == shown and engine.status()["state"] == "paused"
    resumed = time.perf_counter()
    engine.play()
    assert engine.wait(lambda _: request.latency_ms is not None, SOON)
    assert request.latency_ms <= (time.perf_counter() - resumed) * 1e3
    engine.stop()
    assert [frame.number for frame in screen.frames] == list(range(len(screen.frames)))


def test_reset_forgets_and_a_seed_makes_another_video(engine, screen):
    """The pictures of one video in the file of the next, or a seed that changes nothing."""
    first = {}
    for seed in (1, 2, 1):
        screen.frames.clear()
        engine.reset(seed)
        with pytest.raises(UserError, match="play\\(\\) comes first"):
            engine.recording()
        assert len(engine.reel) == 0
        engine.play("a fox")
        assert engine.wait(lambda _: len(screen.frames) > 9, SOON)
        engine.stop()
        pictures = [frame.picture for frame in screen.frames[:9]]
        assert first.setdefault(seed, pictures) == pictures
    assert first[1] != first[2]


def test_wrong_order_names_the_missing_step(screen, pipeline):
    """An AttributeError about None where one sentence would say what to do."""
    engine = Engine(screen)
    try:
        for call, words in ((lambda: engine.play("a fox"), "load"), (lambda: engine.ask("a fox"), "play"),
                            (engine.recording, "play")):
            with pytest.raises(UserError, match=rf"{words}\(\) comes first"):
                call()
        engine.load(lambda: StreamingSession(pipeline))
        assert engine.wait(lambda it: it.state == "ready", SOON)
        with pytest.raises(UserError, match="is empty"):
            engine.play(" ")
        with pytest.raises(UserError, match="prompt: 5 is not a text"):
            engine.play(5)
        with pytest.raises(UserError, match="no pace"):
            engine.fps = 0
        with pytest.raises(UserError, match="no seed"):
            engine.reset(-1)
    finally:
        engine.close()
    with pytest.raises(UserError, match="closed"):
        engine.play("a fox")


class Door:
    """A session that loads when it is let in."""

    def __init__(self, pipeline: Pipeline):
        self.pipeline, self.opens = pipeline, threading.Event()

    def __call__(self) -> StreamingSession:
        assert self.opens.wait(SOON)
        return StreamingSession(self.pipeline)


def test_calls_wait_for_the_model_and_its_warm_up(pipeline, screen):
    """A script that calls one verb after the other, told that there is no session or that no video plays; a
    prompt that is lost, or that takes the place of the first one before anybody saw it.
    """
    engine, door = Engine(screen), Door(pipeline)
    try:
        engine.load(door)
        with pytest.raises(UserError, match=r"no video plays.*loading"):
            engine.ask("a whale")
        engine.play("a fox", seed=5)
        assert engine.state == "loading" and engine.next_seed == 5 and not engine.is_settled()
        with pytest.raises(UserError, match="plays already"):
            engine.play("a bear")
        with pytest.raises(UserError, match="is empty"):
            engine.ask(" ")
        early = engine.ask("a whale")
        assert not engine.wait(Engine.is_settled, 0.05)
        door.opens.set()
        assert engine.wait(lambda it: it.state == "warming up", SOON)
        late = engine.ask("a bear")
        assert engine.wait(Engine.is_settled, SOON)
        engine.require_carried_out()
        engine.stop()
        assert [screen.frames[0].prompt, early.block, late.block] == ["a fox", 1, 2]
        assert [entry["prompt"] for entry in engine.status()["requests"]] == ["a whale", "a bear"]
        assert engine.recording().seed == 5
    finally:
        door.opens.set()
        engine.close()


def test_a_script_waits_for_the_model_too(engine, pipeline, tmp_path):
    """A replay that is refused while the model loads, that is played although it does not fit, or that
    nothing says so of.
    """
    take = play_some(engine)
    other = dataclasses.replace(take, parameters=dict(take.parameters) | {"block_frames": 4})
    for recording, words in ((take, None), (other, "script: it was played with block_frames: 4")):
        door = Door(pipeline)
        engine.load(door)
        engine.play("a bear")
        engine.ask("a wolf")
        engine.replay(recording)
        door.opens.set()
        if words is None:
            assert engine.wait(lambda it: it.state == "ended", SOON)
            assert engine.recording().script == take.script and not engine.status()["requests"]
        else:
            assert engine.wait(Engine.is_settled, SOON)
            with pytest.raises(UserError, match=words):
                engine.require_carried_out()


def test_calls_that_wait_can_be_taken_back(engine, pipeline, screen):
    """A video that plays after it was stopped, or with another model than the one that it was for."""
    for take_back in (engine.stop, engine.reset, lambda: engine.load(lambda: StreamingSession(pipeline))):
        door = Door(pipeline)
        engine.load(door)
        engine.play("a bear")
        engine.ask("a wolf")
        take_back()
        assert not engine.status()["requests"] and engine.status()["message"] == ""
        door.opens.set()
        assert engine.wait(Engine.is_settled, SOON)
        assert engine.state == "ready" and not screen.frames


def test_why_the_model_did_not_load_is_said_to_every_call(pipeline, screen):
    """A wait without an end, or "load() comes first" to someone who did."""
    engine, door = Engine(screen), Door(pipeline)
    try:
        engine.load(lambda: (door(), micro_pipeline(model="nonsense")))
        engine.play("a fox")
        door.opens.set()
        assert engine.wait(Engine.is_settled, SOON)
        recording = Recording(PromptSchedule(("a",)), 1, 9, 0, 16.0, {}, {})
        for call in (engine.require_carried_out, lambda: engine.play("a fox"), lambda: engine.ask("a fox"),
                     lambda: engine.replay(recording), engine.recording):
            with pytest.raises(UserError, match="the player failed: model: 'nonsense' is unknown"):
                call()
        assert engine.status()["message"].startswith("model: 'nonsense'")
        engine.load(lambda: StreamingSession(pipeline))
        assert engine.wait(lambda it: it.state == "ready", SOON)
    finally:
        door.opens.set()
        engine.close()


def test_a_pause_that_holds_a_prompt_back_is_said(engine):
    """A wait without an end for what comes only after Play."""
    engine.play("a fox")
    assert engine.wait(blocks_shown(1), SOON)
    engine.pause()
    engine.require_carried_out()
    engine.ask("a whale")
    assert engine.wait(Engine.is_settled, SOON)
    with pytest.raises(UserError, match="is paused"):
        engine.require_carried_out()


EXIT = """
import atexit, sys, threading, time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from types import SimpleNamespace
from longlive_opt.errors import UserError
from longlive_opt.live.engine import Engine

started = threading.Event()

def make_session():
    pool = ThreadPoolExecutor(1)
    started.set()
    time.sleep(0.5)
    print("compiled", pool.submit(int).result(), flush=True)
    return SimpleNamespace()

engine = Engine(print)
engine.load(make_session)
started.wait()
atexit.register(lambda: print(engine.state, [it.name for it in threading.enumerate() if "live" in it.name]))
raise UserError("a mistake")
"""


def test_a_script_that_raises_ends_while_the_player_works():
    """A process that ends with "terminate called" and 134, or a compiler whose pool is gone: the interpreter
    ended before the player's threads.
    """
    done = subprocess.run([sys.executable, "-c", EXIT], capture_output=True, text=True, timeout=120,
                          cwd=ROOT)
    assert done.returncode == 1
    assert done.stdout.splitlines() == ["compiled 0", "closed []"]
    assert done.stderr.strip().endswith("UserError: a mistake")


@pytest.mark.parametrize(("error", "words"), [
    (RuntimeError("out of luck\nand more"), "RuntimeError: out of luck"),
    (UserError("absolute positions ended"), "absolute positions ended")])
def test_failure_is_said_and_leaves_the_player_usable(engine, screen, monkeypatch, error, words):
    """A thread that dies without a word: a picture that is still, and buttons that do nothing."""
    def broken(self: object, latents: object, urgent: bool) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(type(engine.session._decoder), "push", broken)
        engine.play("a fox")
        assert engine.wait(lambda it: it.state == "failed", SOON)
    assert engine.status()["message"] == words
    engine.play("a fox")
    assert engine.wait(lambda _: len(screen.frames) > 3, SOON)
    engine.load(lambda: micro_pipeline(model="nonsense"))
    assert engine.wait(lambda it: it.state == "failed", SOON)
    assert "model" in engine.status()["message"]


def test_warm_up_comes_before_the_first_video_and_can_be_stopped(pipeline, screen):
    """A viewer who waits for a compiler in the middle, or who cannot get out of the warm-up."""
    engine = Engine(screen)
    try:
        engine.load(lambda: StreamingSession(pipeline))
        assert engine.wait(lambda it: it.state == "ready", SOON)
        engine.play("a fox")
        assert engine.wait(lambda it: it.status()["message"].startswith("block"), SOON)
        engine.stop()
        assert engine.wait(timeout=SOON) and not screen.frames
        engine.play("a fox")
        assert engine.wait(lambda _: len(screen.frames) > 3, SOON)
        engine.stop()
        assert engine.wait(timeout=SOON)
        assert screen.frames[0].prompt == "a fox"
    finally:
        engine.close()


def test_a_script_of_something_else_is_refused(engine, tmp_path):
    """A video that differs from the one that was saved, without a word."""
    recording = play_some(engine)
    other = dict(recording.parameters) | {"block_frames": 4}
    for change, words in (({"parameters": other}, "block_frames"), ({"weights": {"dit": "0"}}, "weights")):
        with pytest.raises(UserError, match=words):
            engine.replay(dataclasses.replace(recording, **change))
    path = tmp_path / "script.json"
    recording.write(path)
    good = json.loads(path.read_text())
    for key, value in (("prompts", []), ("blocks", "3"), ("schema_version", 9), ("seed", None),
                       ("switch_frame_indices", [4000]), ("fps", 0), ("parameters", {})):
        path.write_text(json.dumps(good | {key: value}))
        with pytest.raises(UserError, match="script|switch_frame_indices: 4000"):
            Recording.read(path)
    path.write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        Recording.read(path)
    with pytest.raises(UserError, match="cannot be read"):
        Recording.read(tmp_path / "nothing.json")


def test_nothing_shown_cannot_be_saved(tmp_path):
    """An mp4 without a frame."""
    empty = Recording(PromptSchedule(("a",)), 1, 0, 0, 16.0, {}, {})
    with pytest.raises(UserError, match="play\\(\\) comes first"):
        save(tmp_path / "x", empty, Reel())
    assert not list(tmp_path.iterdir())


def test_reel_gives_back_what_it_took():
    """Pictures that run into each other."""
    reel = Reel()
    for picture in (b"one", b"", b"three"):
        reel.append(picture)
    assert list(reel.pictures(3)) == [b"one", b"", b"three"] and list(reel.pictures(1)) == [b"one"]
    reel.clear()
    reel.append(b"four")
    assert list(reel.pictures(len(reel))) == [b"four"]


def test_engine_needs_no_widgets():
    """An engine that cannot be tested, or used on a server, without Jupyter."""
    blocked = "import sys; sys.modules |= dict.fromkeys(['ipywidgets', 'anywidget', 'IPython'])"
    subprocess.run([sys.executable, "-c", f"{blocked}; import longlive_opt.live.engine"], check=True,
                   cwd=ROOT)


def test_picture_keeps_its_colours():
    """Channels in the wrong order."""
    frame = torch.zeros(3, 16, 16, dtype=torch.uint8)
    frame[0] = 255
    red = Image.open(io.BytesIO(encode_picture(frame))).getpixel((8, 8))
    assert red[0] > 240 and max(red[1:]) < 20


class Browser:
    """What a player sends, in place of a comm."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, widget: type):
        self.sent: list[tuple[dict, list]] = []
        monkeypatch.setattr(widget, "send",
                            lambda _, content, buffers=(): self.sent.append((content, buffers)))

    def kinds(self, kind: str) -> list[tuple[dict, list]]:
        return [(content, buffers) for content, buffers in self.sent if content["kind"] == kind]


def test_player_does_what_its_browser_asks(pipeline, monkeypatch, tmp_path):
    """A button without effect, a mistake that ends in a traceback nobody sees, frames that are not JPEGs."""
    pytest.importorskip("anywidget", reason="the widget needs anywidget: make install brings it")
    from longlive_opt.live import Player

    browser = Browser(monkeypatch, Player)
    player = Player(StreamingSession(pipeline))
    engine = player.engine

    def click(kind: str, **content: object) -> None:
        player._on_message(player, {"kind": kind, **content}, [])

    try:
        assert engine.wait(lambda it: it.state == "ready", SOON)
        engine._warm = True
        click("play", prompt=" ", seed="x")
        assert "seed: 'x'" in player._notice
        click("save")
        assert "play() comes first" in player._notice
        click("fps", fps="200")
        assert player.fps == 200 and player._notice == ""
        click("play", prompt="a fox", seed="7")
        assert engine.wait(blocks_shown(1), SOON)
        click("ask", prompt="a whale", token="mine")
        asked, = browser.kinds("asked")
        assert asked[0] == {"kind": "asked", "number": 0, "token": "mine"}
        assert engine.wait(lambda it: it.status()["ps_ms"] is not None, SOON)
        click("stop")
        frames = browser.kinds("frame")
        assert [content["number"] for content, _ in frames] == list(range(len(frames)))
        assert all(buffers[0][:2] == b"\xff\xd8" for _, buffers in frames)
        assert [content["first_of"] for content, _ in frames].count(0) == 1
        assert list(player.requests()["prompt"]) == ["a whale"]
        assert repr(player).startswith("Player(stopped, block ") and len(repr(player)) < 300
        video, script = player.save(tmp_path / "take")
        assert video.is_file() and Recording.read(script).seed == 7
        click("reset", seed="3")
        assert browser.kinds("clear") and engine.next_seed == 3 and engine.state == "ready"
        player.replay(script)
        assert engine.wait(lambda it: it.state == "ended", SOON)
    finally:
        player.close()
    assert engine.state == "closed"


def test_another_preset_takes_the_place_of_the_first(micro, monkeypatch):
    """Two models in memory after a cell ran twice, or a preset that cannot be and leaves nothing to play."""
    pytest.importorskip("anywidget", reason="the widget needs anywidget: make install brings it")
    from longlive_opt.live import Player
    from longlive_opt.live import player as module

    browser = Browser(monkeypatch, Player)
    opened = []
    monkeypatch.setattr(module, "open_session", lambda config: opened.append(config.name) or StreamingSession(
        micro_pipeline(**POINT, use_static_kv=config.use_static_kv, name=config.name)))
    first = Player.preset("static_kv", seed=4)
    second = Player.preset("static_kv", seed=4)
    try:
        assert first.engine.state == "closed" and first.engine.session is None
        assert second.engine.wait(lambda it: it.state == "ready", SOON)
        assert "baseline" in second.choices["presets"] and second.choices["prompt"]
        for click in ({"preset": "nonsense"}, {"preset": "cuda_graphs"}, {"preset": "baseline"}):
            second._on_message(second, {"kind": "load", "model": "tiny", **click}, [])
            assert ("nonsense" in second._notice) is (click["preset"] == "nonsense")
            assert second.engine.wait(lambda it: it.state == "ready", SOON)
        assert opened[-1] == "baseline" and second.engine.session.pipeline.config.name == "baseline"
        second._on_message(second, {"kind": "play", "prompt": "a unicorn", "seed": ""}, [])
        assert "small world" in second._notice and not browser.kinds("asked")
    finally:
        second.close()
    with pytest.raises(UserError, match="unknown"):
        Player.preset("nonsense")


def readme_block(mark: str) -> str:
    """The block of Python in README that has `mark`."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    return next(block for block in blocks if mark in block)


def test_readme_plays_as_it_is_written(micro, monkeypatch, tmp_path):
    """A newcomer's first lines, in one cell or as a script, that end with a refusal."""
    pytest.importorskip("anywidget", reason="the widget needs anywidget: make install brings it")
    from longlive_opt.live import Player
    from longlive_opt.live import player as module

    browser = Browser(monkeypatch, Player)
    monkeypatch.setattr(module, "project_path", lambda path: tmp_path / path)
    monkeypatch.setattr(module, "open_session", lambda config: StreamingSession(build_pipeline(
        micro_config(use_static_kv=True))))
    names: dict = {}
    try:
        exec(readme_block("Player.preset"), names)
        player = names["player"]
        take = Recording.read(tmp_path / "outputs/live/take.json")
        assert ["left" in prompt for prompt in take.script.prompts] == [True, False]
        assert player.engine.wait(lambda it: it.state == "ended", SOON)
        assert player.engine.recording().script == take.script
        shown = [(content["number"], buffers[0]) for content, buffers in browser.kinds("frame")]
        begin = [number for number, _ in shown].index(0, 1)
        assert shown[begin:][:take.frames] == shown[:take.frames]
    finally:
        if "player" in names:
            names["player"].close()


def test_a_player_says_at_once_what_cannot_be(micro, monkeypatch):
    """A player that seems to load, fails seconds later and does not say why; the one before it is gone."""
    pytest.importorskip("anywidget", reason="the widget needs anywidget: make install brings it")
    from longlive_opt.live import Player
    from longlive_opt.live import player as module

    Browser(monkeypatch, Player)
    monkeypatch.setattr(module, "open_session", lambda config: micro_pipeline(model="nonsense"))
    player = Player.preset("static_kv")
    try:
        for keys, words in (({"device": "cuda:99"}, "device: 'cuda:99' was requested"),
                            ({"weights": "nowhere"}, "weights: "), ({"height": 7}, "height")):
            with pytest.raises(UserError, match=words):
                Player.preset("static_kv", **keys)
        with pytest.raises(UserError, match="use_cuda_graphs: CUDA graphs need device: cuda"):
            Player.preset("cuda_graphs")
        with pytest.raises(UserError, match="the player failed: model: 'nonsense' is unknown"):
            player.wait()
        assert repr(player).startswith("Player(failed: model: 'nonsense' is unknown")
        assert player.engine.status()["message"].startswith("model: 'nonsense'")
        with pytest.raises(UserError, match="save: the player failed: model"):
            player.save()
    finally:
        player.close()
    with pytest.raises(UserError, match="closed"):
        player.wait()


def test_nobody_watches(pipeline, monkeypatch, tmp_path):
    """A GPU that works for ever for a tab that was closed."""
    pytest.importorskip("anywidget", reason="the widget needs anywidget: make install brings it")
    from longlive_opt.live import Player
    from longlive_opt.live import player as module

    Browser(monkeypatch, Player)
    monkeypatch.setattr(module, "UNSEEN_FRAMES", 20)
    player = Player(StreamingSession(pipeline))
    try:
        assert player.engine.wait(lambda it: it.state == "ready", SOON)
        player.engine._warm = True
        player.play("a fox")
        assert player.engine.wait(lambda it: it.state == "paused", SOON)
        assert "no browser" in player._notice
        player.ask("a whale")
        with pytest.raises(UserError, match="is paused"):
            player.wait()
        assert player.save(tmp_path / "take")[0].is_file()
    finally:
        player.close()


def test_comparison_makes_both_clips(micro, monkeypatch):
    """One preset on both sides, a second clip from other noise, or one that ends early because its blocks
    came in parts.
    """
    pytest.importorskip("anywidget", reason="the widget needs anywidget: make install brings it")
    from longlive_opt.live import Comparison, wipe

    browser = Browser(monkeypatch, Comparison)
    monkeypatch.setattr(wipe, "open_session", lambda config: StreamingSession(micro_pipeline(
        **POINT, use_static_kv=(fast := config.use_static_kv), use_early_frames=fast, name=config.name)))
    pictures = {}
    for together in (False, True):
        browser.sent.clear()
        comparison = Comparison("baseline", "static_kv", prompt="a fox", blocks=2, together=together)
        comparison.run()
        assert comparison.wait(SOON) and comparison.status["state"] == "done"
        assert None not in comparison.status["ms_per_frame"]
        order = [(content["side"], content["number"]) for content, _ in browser.kinds("picture")]
        assert sorted(order) == [(side, number) for side in (0, 1) for number in range(21)]
        assert (order == sorted(order)) is not together
        pictures[together] = [buffers[0] for _, buffers in sorted(
            browser.kinds("picture"), key=lambda it: (it[0]["side"], it[0]["number"]))]
        comparison.close()
    assert pictures[False] == pictures[True]
    with pytest.raises(UserError, match="length of a clip"):
        Comparison(blocks=0)


def test_presets_that_a_player_opens():
    """A preset in the list that cannot be opened, or a model that a laptop would wait for all day."""
    names = preset_names()
    runner = Layout(ROOT).presets()
    assert {*names, *STUDIES} >= runner.keys() == preset_files().keys()
    assert "static_kv" in names and not {TEST_PRESET, *STUDIES} & set(names)
    for name in names:
        config = live_config(name, {})
        half = config.attention_backend == "gluon"
        assert (config.model, config.device) == ("tiny", "cpu")
        assert config.model_dtype == ("bfloat16" if half else "float32")
        assert config.max_blocks is None
    assert live_config("realtime", {"model": "longlive-1.3b", "device": "cuda"}).model_dtype == "bfloat16"
    assert model_names("cpu") == ["tiny"] and "longlive-1.3b" in model_names("cuda:1")
    with pytest.raises(UserError, match="'realtim' is unknown; did you mean 'realtime'. choose one of"):
        live_config("realtim", {})
    with pytest.raises(UserError, match="'ablation' is a study, which is measured and not played"):
        live_config("ablation", {})
