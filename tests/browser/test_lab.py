"""The live notebook in a real JupyterLab, driven by a headless Chromium: `make test-browser`."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest

pytestmark = pytest.mark.browser
ROOT = Path(__file__).resolve().parent.parent.parent
NOTEBOOK = "20_live.ipynb"
# So small that a block takes well under a second on a laptop.
SETTINGS = {"height": 32, "width": 32, "compare_blocks": 1}
RED = "a large red square moves left, on a dotted grey ground"
BLUE = "a large blue circle moves right, on a striped teal ground"
CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PLAYER = ".ll-player:not(.ll-comparison)"
READY_MS, PLAYING_MS, STEP_MS = 180_000, 300_000, 120_000
# What JupyterLab itself says without a network or before its first save.
NOT_OURS = re.compile(r"favicon|/api/news|/lsp/status|extensions?-manager|/lab/api/|api/contents/.*404", re.I)


def small_notebook(folder: Path, settings: dict[str, Any]) -> Path:
    """A copy of the notebook with other parameters."""
    notebook = nbformat.read(ROOT / "notebooks" / NOTEBOOK, as_version=4)
    parameters = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    parameters.source += "".join(f"\n{key} = {value!r}" for key, value in settings.items())
    nbformat.write(notebook, folder / NOTEBOOK)
    return folder / NOTEBOOK


def start_lab(folder: Path) -> tuple[subprocess.Popen, str]:
    """JupyterLab on `folder` and its address; it ends with `stop_lab`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}",
               "--ServerApp.ip=127.0.0.1", "--IdentityProvider.token=", "--ServerApp.password=",
               "--ServerApp.port_retries=0", f"--ServerApp.root_dir={folder}", "--expose-app-in-browser",
               "--LabApp.news_url=None", "--LabApp.extension_manager=readonly"]
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    log = open(folder / "lab.log", "w")
    server = subprocess.Popen(command, cwd=folder, env={**os.environ, **threads, "PYTHONPATH": path},
                              stdout=log, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    for _ in range(240):
        if server.poll() is not None:
            raise RuntimeError(f"JupyterLab did not start: {(folder / 'lab.log').read_text()[-2000:]}")
        try:
            urllib.request.urlopen(f"{address}/api/status", timeout=5)
            return server, address
        except OSError:
            time.sleep(0.5)
    stop_lab(server)
    raise RuntimeError("JupyterLab did not answer within two minutes")


def stop_lab(server: subprocess.Popen) -> None:
    """End JupyterLab; it ends its kernels."""
    server.terminate()
    try:
        server.wait(30)
    except subprocess.TimeoutExpired:
        server.kill()


def chromium() -> str | None:
    """The system's Chromium, None for playwright's own."""
    return next(filter(None, map(shutil.which, CHROMIUM)), None)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("lab")
    small_notebook(folder, SETTINGS)
    server, address = start_lab(folder)
    yield address
    stop_lab(server)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        yield browser
        browser.close()


class Lab:
    """The notebook in one page, and what the page's console said."""

    def __init__(self, page: Any, address: str):
        self.page, self.errors = page, []
        page.on("console", lambda it: it.type == "error" and self.errors.append(f"{it.text} {it.location}"))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.goto(f"{address}/lab/tree/{NOTEBOOK}?reset", timeout=STEP_MS)
        page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=STEP_MS)
        self.player = page.locator(PLAYER)
        self.kernel_idle()

    def execute(self, command: str) -> None:
        """One of JupyterLab's commands; it is not waited for."""
        self.page.evaluate("command => void window.jupyterapp.commands.execute(command)", command)

    def kernel_idle(self) -> None:
        """Wait for the kernel; JupyterLab may ask which one."""
        dialog, idle = self.page.locator(".jp-Dialog .jp-mod-accept"), self.page.get_by_text("| Idle")
        dialog.or_(idle).first.wait_for(timeout=STEP_MS)
        self.page.wait_for_timeout(1500)
        if dialog.is_visible():
            dialog.click()
        idle.wait_for(timeout=STEP_MS)

    def state(self, *states: str, timeout: int = STEP_MS) -> None:
        """Wait until the player is in one of `states`."""
        self.page.wait_for_selector(
            ", ".join(f'{PLAYER}[data-state="{state}"]' for state in states), timeout=timeout)

    def run_all(self) -> None:
        self.execute("notebook:run-all-cells")
        self.state("ready", timeout=READY_MS)

    def frame(self) -> int:
        """Number of the frame on the canvas, -1 for none."""
        return int(self.player.locator(".ll-screen").get_attribute("data-frame") or -1)

    def picture(self) -> str:
        """The canvas as a data URL."""
        return self.player.locator(".ll-screen").evaluate("canvas => canvas.toDataURL()")

    def say(self, prompt: str) -> None:
        field = self.player.locator(".ll-prompt")
        field.fill(prompt)
        field.press("Enter")

    def frames_change(self) -> None:
        """Wait until later frames are on the canvas, with another picture; for a few frames of so small a
        picture nothing may move.
        """
        self.page.wait_for_function(
            """([selector, number, picture]) => {
                const canvas = document.querySelector(selector);
                return +(canvas.dataset.frame ?? -1) > number + 2 && canvas.toDataURL() !== picture }""",
            arg=[f"{PLAYER} .ll-screen", self.frame(), self.picture()], timeout=STEP_MS)


@pytest.fixture
def lab(browser: Any, address: str) -> Iterator[Lab]:
    page = browser.new_page(viewport={"width": 1280, "height": 1400})
    yield Lab(page, address)
    page.close()


def test_play_switch_stop_interrupt_restart(lab: Lab) -> None:
    """A canvas that stays black, a prompt that goes nowhere, a player that a restart leaves dead."""
    lab.run_all()
    lab.say(RED)
    lab.state("playing", timeout=PLAYING_MS)
    lab.frames_change()

    lab.say(BLUE)
    requests = lab.player.locator(".ll-requests")
    words = r"applied at block \d+, first pixels after \d+ ms \(\d+ ms in this browser\)"
    requests.get_by_text(re.compile(words)).wait_for(timeout=STEP_MS)
    lab.frames_change()
    for gauge in ("speed", "ps", "memory", "buffer", "pace"):
        assert re.match(r"[\d.]+ ", lab.player.locator(f".ll-gauge-{gauge} b").inner_text()), gauge

    lab.player.locator(".ll-pause").click()
    lab.state("paused")
    lab.page.wait_for_timeout(500)
    held = lab.frame()
    lab.page.wait_for_timeout(1500)
    assert lab.frame() == held
    lab.player.locator(".ll-play").click()
    lab.frames_change()
    lab.player.locator(".ll-stop").click()
    lab.state("stopped")

    lab.say("a unicorn reads the news")
    lab.player.locator(".ll-notice").get_by_text("knows only its small world").wait_for(timeout=STEP_MS)
    lab.state("playing")
    lab.execute("notebook:interrupt-kernel")
    lab.frames_change()
    lab.player.locator(".ll-reset").click()
    lab.state("ready")
    lab.page.wait_for_timeout(500)
    assert lab.frame() == -1

    lab.execute("notebook:restart-kernel")
    lab.page.locator(".jp-Dialog .jp-mod-accept").click(timeout=STEP_MS)
    lab.page.wait_for_timeout(3000)
    lab.kernel_idle()
    lab.execute("notebook:clear-all-cell-outputs")
    lab.page.wait_for_timeout(500)
    lab.run_all()
    lab.say(RED)
    lab.state("playing", timeout=PLAYING_MS)
    lab.frames_change()
    lab.player.locator(".ll-stop").click()
    lab.state("stopped")

    errors = [error for error in lab.errors if not NOT_OURS.search(error)]
    assert errors == []


def test_comparison(lab: Lab) -> None:
    """A slider that moves and shows the same picture, or a second clip that never comes."""
    lab.run_all()
    comparison = lab.page.locator(".ll-comparison")
    comparison.scroll_into_view_if_needed()
    comparison.locator(".ll-run").click()
    lab.page.wait_for_selector('.ll-comparison[data-state="done"]', timeout=PLAYING_MS)
    canvas = comparison.locator(".ll-screen")
    lab.page.wait_for_timeout(500)
    width = canvas.evaluate("canvas => canvas.width")
    assert width % SETTINGS["width"] == 0
    comparison.locator(".ll-both").check()
    lab.page.wait_for_function(
        "width => document.querySelector('.ll-comparison .ll-screen').width > 2 * width", arg=width,
        timeout=STEP_MS)
    assert re.search(r"left: Baseline, [\d.]+ ms per frame; right: Static KV, [\d.]+ ms per frame",
                     comparison.inner_text())
    assert [error for error in lab.errors if not NOT_OURS.search(error)] == []
