"""CONTRIBUTING.md taken at its word: its code, put where it says, gives what works."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n# ([^\n]+)\n(.*?)```", PAGE, re.DOTALL)
TRY = """
from longlive_opt.config import KEYS, ExperimentConfig
from longlive_opt.measurement.catalogue import METRICS, glossary
from longlive_opt.measurement.metrics import latency_metrics, slowest_share
from longlive_opt.optimizations import build_pipeline
from longlive_opt.streaming.timeline import Event

assert KEYS["use_strip_prompts"].group == "optimizations"
pipeline = build_pipeline(ExperimentConfig(use_strip_prompts=True, model_dtype="float32"))
[entry] = pipeline.optimizations
assert (entry["name"], entry["applied"], entry["exactness"]) == ("strip_prompts", True, "bitwise")
one, other = (pipeline.encode_prompt(text) for text in ("a red square", "  a red square "))
assert all((a == b).all() for a, b in zip(one.keys + one.values, other.keys + other.values))
every = dict(use_text_offload=True, use_prompt_cache=True, model_dtype="float32")
stripped = build_pipeline(ExperimentConfig(use_strip_prompts=True, **every)).encode_prompt("  a red square ")
assert all((a == b).all() for a, b in zip(one.keys + one.values, stripped.keys + stripped.values))
assert METRICS[-1].key == "slowest_share" and METRICS[-1].label in "; ".join(glossary())
assert slowest_share([1.0, 3.0]) == 0.75
blocks = enumerate([0.0, 100.0, 400.0])
events = [Event("chunk_ready", ready, 0.0, block, "host") for block, ready in blocks]
assert METRICS[-1].value({"latency": latency_metrics(events, first_measured_block=1)}) == 0.75
"""


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A project of the library alone, with the page's code in it."""
    shutil.copytree(ROOT / "longlive_opt", tmp_path / "longlive_opt",
                    ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "weights").symlink_to(ROOT / "weights")
    for place, code in BLOCKS:
        if place.startswith("new file: "):
            (tmp_path / place.removeprefix("new file: ")).write_text(code, encoding="utf-8")
            continue
        name, how, anchor = re.fullmatch(r"(\S+), (before|in): (.+)", place).groups()
        path = tmp_path / name
        text = path.read_text(encoding="utf-8")
        if how == "before":
            found = re.findall(rf"^[ ]*{re.escape(anchor)}.*$", text, re.MULTILINE)
            assert len(found) == 1, f"{name}: {anchor!r} is not one line"
            text = text.replace(found[0], code + found[0])
        else:  # a tuple at the top level: its last line is a parenthesis of its own
            start = text.index(f"\n{anchor}")
            end = text.index("\n)\n", start) + 1
            text = text[:end] + code + text[end:]
        path.write_text(text, encoding="utf-8")
    return tmp_path


def test_the_documented_steps_are_all(copy: Path) -> None:
    """A step that the page forgot: what a newcomer adds is missing, or fails where the page is silent."""
    env = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", TRY], cwd=copy, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_page_counts_its_files() -> None:
    """More files than the page says: the newcomer's clock has got slower and nobody noticed."""
    places = {re.split(r", (?:before|in): ", place.removeprefix("new file: "))[0] for place, _ in BLOCKS}
    assert places == {
        "longlive_opt/optimizations/strip_prompts.py", "longlive_opt/optimizations/__init__.py",
        "longlive_opt/config.py", "longlive_opt/measurement/metrics.py",
        "longlive_opt/measurement/catalogue.py"}
