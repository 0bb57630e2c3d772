"""Arbitrary and damaged input for every reader: what is refused is refused by a UserError, in a message that
can be printed. `READERS` is run with few examples by test_robustness.py and with 10,000 by
scripts/robustness.py.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from example_results import example_result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from longlive_opt.config import KEYS, ExperimentConfig, notebook_parameters
from longlive_opt.errors import UserError
from longlive_opt.files import load_yaml, parse_yaml, project_path
from longlive_opt.live.recording import Recording
from longlive_opt.measurement.fidelity import Truth
from longlive_opt.measurement.result import read_campaign, read_result
from longlive_opt.models.checkpoint import open_checkpoint
from longlive_opt.models.weight_files import check_start
from longlive_opt.optimizations.prompt_cache import EmbeddingStore
from longlive_opt.parity.directory import check_directory
from longlive_opt.prompts import read_schedules
from longlive_opt.report.campaign import load
from longlive_opt.report.log.steps import read_steps
from longlive_opt.report.noise_record import over_campaigns, read_record
from longlive_opt.report.verdicts import read_decisions
from longlive_opt.runner.execute import _Lines, finished_result
from longlive_opt.runner.plan import declared_parameters, parse_settings
from longlive_opt.tiny.training_report.reader import read_check, read_log

# Every character, halves of characters and control characters among them.
_TEXT = st.text(st.characters(codec=None, exclude_categories=()), max_size=30) | st.sampled_from(
    ("\ud83e", "a\0", "\x1b]0;x\x07", "<script>", "{{ 7*7 }}", "`|`", "~nobody-here/x", "n" * 300, "../x",
     ""))
_SCALAR = st.none() | st.booleans() | st.integers() | st.integers(10**400, 10**401) | st.floats() | _TEXT
_VALUE = st.recursive(_SCALAR, lambda inner: st.lists(inner, max_size=4)
                      | st.dictionaries(_TEXT, inner, max_size=4), max_leaves=8)
_WORDS = st.sampled_from(("seed: 0123", "a: &x [1]\nb: *x", "[" * 400, "{" * 400, "!!int x",
                          "!!python/name:os", "? [a]\n: b", "2026-99-99", "9" * 5000,
                          "1_0", ".inf", "--- a\n--- b", "\t", "%YAML 9"))
_RESULT = example_result(steady=3, switches=1, seed=1)
_ABSENT = {"value": None, "reason": "x", "how_to_fix": "y"}
_RESULT["ablations"] = [{"changed": {"seed": 1}, "failure": _ABSENT}]
_BASELINE = example_result(steady=3, switches=1)
_RECORDING = {"schema_version": 1, "prompts": ["a", "b"], "switch_frame_indices": [3], "blocks": 4,
              "frames": 9, "seed": 0, "fps": 16.0, "weights_sha256": {}, "parameters": {"block_frames": 3}}
_ROW = {"campaign": "c", "preset": "baseline", "machine": "m", "torch": "t", "model": "tiny", "commit": "x",
        "date": "d", "runs": 2, "blocks": [1, 2], "switches": [1, 2], "ss_mean": [1.0, 2.0], "ps_mean": [1.0]}
_DECISIONS = {"schema_version": 1, "campaign": "c", "baseline": None, "noise": {}, "decisions": {"speed": {
    "preset": "speed", "run": 1, "created_utc": "x", "verdict": "keep", "keep": True, "rule": "r",
    "rationale": "w", "gate": None, "not_comparable": ""}}, "recommended": {"preset": None, "reasons": ["a"]}}
_STEP = {"date": "2026-01-31", "before": "h100/baseline", "after": "h100/speed[key=1]", "metric": "ss_mean",
         "prediction": "x", "predicted_change": [-3, 1.5], "why": "y"}
_CELL = {"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": ["seed = 3"]}


def _paths(value: Any, path: tuple = ()) -> list[tuple]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] + [found for key, item in list(items)[:12] for found in _paths(item, (*path, key))]


@st.composite
def changed(draw: st.DrawFn, value: Any) -> Any:
    """A copy of a plain `value` with something inside replaced, removed or added."""
    copy = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 2))):
        *parents, last = draw(st.sampled_from(_paths(value)[1:]))
        holder = copy
        try:
            for key in parents:
                holder = holder[key]
            act = draw(st.sampled_from(("set", "set", "set", "remove", "add")))
            if act == "set":
                holder[last] = draw(_VALUE)
            elif act == "remove":
                del holder[last]
            elif isinstance(holder, dict):
                holder[draw(_TEXT)] = draw(_VALUE)
        except (LookupError, TypeError):  # the first change removed the place of the second
            pass
    return copy


def _json(value: Any) -> bytes:
    """JSON as Python writes it, with NaN, infinity and halves of characters."""
    return json.dumps(value).encode("utf-8", "surrogatepass")


def _cut(draw: st.DrawFn, content: bytes) -> bytes:
    """`content` whole, cut off, or with some bytes replaced."""
    act = draw(st.sampled_from(("whole", "whole", "whole", "cut", "bytes")))
    at = draw(st.integers(0, max(0, len(content) - 1)))
    return content if act == "whole" else content[:at] if act == "cut" else \
        content[:at] + draw(st.binary(min_size=1, max_size=8)) + content[at + 4:]


@st.composite
def json_like(draw: st.DrawFn, value: Any) -> bytes:
    """A JSON file near `value`, or one of anything else."""
    kind = draw(st.sampled_from(("near", "near", "near", "value", "binary", "deep")))
    if kind == "near":
        return _cut(draw, _json(draw(changed(value))))
    return _json(draw(_VALUE)) if kind == "value" else draw(st.binary(max_size=60)) if kind == "binary" else \
        draw(st.sampled_from(("[", '{"a":'))).encode() * draw(st.sampled_from((60, 3000)))


@st.composite
def yaml_like(draw: st.DrawFn) -> bytes:
    """A YAML file near a preset, or one of anything else."""
    key = st.sampled_from(tuple(KEYS)) | _TEXT
    kind = draw(st.sampled_from(("preset", "preset", "json", "words", "text", "binary")))
    if kind == "preset":
        content = draw(st.dictionaries(key, _VALUE, min_size=1, max_size=4))
        try:
            return _cut(draw, yaml.dump(content, allow_unicode=True).encode("utf-8", "surrogatepass"))
        except (ValueError, RecursionError):  # what PyYAML cannot write itself
            kind = "json"
    if kind == "json":
        return _json(draw(st.dictionaries(key, _VALUE, max_size=3)))
    if kind == "words":
        return f"{draw(key)}: {draw(_WORDS)}\n".encode("utf-8", "surrogatepass")
    return draw(_TEXT | st.text(" :-[]{}&*!|>'\"%@`#,?\n", max_size=30)).encode("utf-8", "surrogatepass") \
        if kind == "text" else draw(st.binary(max_size=60))


@st.composite
def safetensors_like(draw: st.DrawFn) -> bytes:
    """A safetensors file with a strange header or size."""
    entry = {"dtype": draw(st.sampled_from(("F32", "BF16", "I64", "X", "F8_E4M3"))),
             "shape": draw(st.lists(st.integers(-2, 9), max_size=3) | _VALUE),
             "data_offsets": draw(st.just([0, 8]) | st.lists(st.integers(-9, 99), max_size=3) | _VALUE)}
    facts = draw(st.just("{}") | _TEXT | st.builds(lambda value: json.dumps(value), changed(
        {"protocol": 2, "prompt_schedule": {"prompts": ["a"], "blocks": 2, "switch_block": None}})))
    header = {draw(st.sampled_from(("embedding", "latents", "patch_embedding.weight"))): entry,
              "__metadata__": {"facts": facts}}
    text = json.dumps(draw(st.just(header) | changed(header))).encode("utf-8", "surrogatepass")
    length = draw(st.just(len(text)) | st.integers(0, 2**64 - 1))
    return _cut(draw, struct.pack("<Q", length) + text + draw(st.just(bytes(8)) | st.binary(max_size=20)))


@st.composite
def pickle_like(draw: st.DrawFn) -> bytes:
    """A torch file of either format, damaged."""
    import io

    import torch

    buffer = io.BytesIO()
    torch.save({"model": {"a.weight": torch.zeros(2, 2)}}, buffer,
               _use_new_zipfile_serialization=draw(st.booleans()))
    return _cut(draw, buffer.getvalue()) if draw(st.booleans()) else b"\x80" + draw(st.binary(max_size=60))


def _write(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def _preset(folder: Path, content: bytes) -> None:
    ExperimentConfig.from_mapping(load_yaml(_write(folder, "preset.yaml", content)))


def _setting(folder: Path, content: bytes) -> None:
    ExperimentConfig.from_mapping(parse_settings([content.decode("utf-8", "surrogateescape")]))


def _result(folder: Path, content: bytes) -> None:
    """Through everything that the summary does with a campaign; the other result always stays."""
    _write(folder, "speed/result.json", content)
    _write(folder, "baseline/result.json", _json(_BASELINE))
    read_campaign(folder)
    campaign = load(folder)
    assert any(run["preset"] == "baseline" for run in campaign.results), "one file hides another"
    read_result(folder / "speed/result.json")
    finished_result(folder / "speed")


def _failed(folder: Path, content: bytes) -> None:
    _write(folder, "speed/failed.json", content)
    for failure in load(folder).failures:
        failure.reason.encode("utf-8")


def _noise(folder: Path, content: bytes) -> None:
    over_campaigns(read_record(_write(folder, "noise.json", content)), [_BASELINE])


def _decisions(folder: Path, content: bytes) -> None:
    _write(folder, "decisions.json", content)
    assert read_decisions(folder).keys() >= {"decisions", "noise", "recommended"}


def _parity(folder: Path, content: bytes) -> None:
    list(check_directory(_write(folder, "manifest.json", content).parent))


def _weights(folder: Path, content: bytes, name: str) -> None:
    path = _write(folder, name, content)
    checkpoint = open_checkpoint(path, (None,) if name.endswith("s") else ("model", None))
    for tensor in checkpoint.headers:
        checkpoint.read(tensor)


def _embedding(folder: Path, content: bytes) -> None:
    store = EmbeddingStore(folder, "f", (1, 2))
    store.path("a").write_bytes(content)
    assert store.load("a") is None, "nothing here has the SHA-256 of its content"


def _namespace(folder: Path, content: bytes) -> None:
    """A notebook's variables, with values that are not plain."""
    text = content.decode("utf-8", "surrogateescape")
    ExperimentConfig.from_mapping(notebook_parameters({
        "In": [text, "seed = 3"], "seed": folder if len(text) % 2 else text, "title": text, "i": 3,
        text: [text]}))


READERS: dict[str, tuple[st.SearchStrategy[bytes], Callable[[Path, bytes], Any]]] = {
    "preset or profile (YAML)": (yaml_like(), _preset),
    "--set": (st.builds(lambda key, value: key.encode() + b"=" + value, st.sampled_from(tuple(KEYS)),
                        yaml_like()), _setting),
    "YAML text": (yaml_like(), lambda folder, content:
                  parse_yaml(content.decode("utf-8", "replace"), "text")),
    "path": (st.builds(lambda text: text.encode("utf-8", "surrogatepass"), _TEXT),
             lambda folder, content: project_path(content.decode("utf-8", "surrogatepass"))),
    "variables of a notebook": (yaml_like(), _namespace),
    "prompts .jsonl": (json_like({"prompts": ["a", "b"], "switch_frame_indices": [9]}),
                       lambda folder, content:
                       read_schedules(_write(folder, "p.jsonl", content), None, (6, 3))),
    "prompts .txt": (yaml_like(), lambda folder, content: read_schedules(_write(folder, "p.txt", content))),
    "result.json": (json_like(_RESULT), _result),
    "failed.json": (json_like({"status": "failed", "label": "speed", "meaning": "x",
                               "parameters": {"seed": 0}}), _failed),
    "decisions.json": (json_like(_DECISIONS), _decisions),
    "noise.json": (json_like({"schema_version": 1, "rows": [_ROW, _ROW]}), _noise),
    "steps.yaml": (json_like({"graphs": _STEP}), lambda folder, content:
                   read_steps(_write(folder, "steps.yaml", content))),
    "recording": (json_like(_RECORDING), lambda folder, content:
                  Recording.read(_write(folder, "take.json", content))),
    "notebook": (json_like({"cells": [_CELL]}), lambda folder, content:
                 declared_parameters(_write(folder, "n.ipynb", content))),
    "weights .safetensors": (safetensors_like(), lambda folder, content:
                             _weights(folder, content, "w.safetensors")),
    "weights .pt": (pickle_like(), lambda folder, content: _weights(folder, content, "w.pt")),
    "first bytes of weights": (safetensors_like() | pickle_like(), lambda folder, content:
                               check_start(_write(folder, "w.safetensors", content))),
    "reference.safetensors": (safetensors_like(), lambda folder, content:
                              Truth.load(_write(folder, "reference.safetensors", content))),
    "stored prompt": (safetensors_like(), _embedding),
    "parity manifest": (json_like({"configs": {"dit": {}}}), _parity),
    "training log": (json_like({"stage": "vae", "step": 1, "progress": 0.5, "ms_per_step": 3.0}),
                     lambda folder, content:
                     read_log(_write(folder, "training/log.jsonl", content).parents[1])),
    "training check": (json_like({"plain": {"videos": 3}, "long": {"first": 0.5, "last": 0.4}}),
                       lambda folder, content: read_check(_write(folder, "check.json", content).parent)),
    "output of a run": (st.builds(lambda text: text.encode("utf-8", "surrogatepass"), _TEXT),
                        lambda folder, content: _Lines("x").write(content.decode("utf-8", "surrogatepass"))),
}


def fuzz(reader: str, folder: Path, examples: int) -> dict[str, int]:
    """Give `examples` inputs to one reader. Returns how many it read and how many it refused.

    Raises:
        Exception: the first that is not a UserError, with the input that hypothesis made as small as it can.
        AssertionError: a message that cannot be printed, or is longer than a screen.
    """
    strategy, read = READERS[reader]
    found = {"read": 0, "refused": 0}

    @settings(max_examples=examples, deadline=None, database=None, derandomize=True,
              suppress_health_check=list(HealthCheck))
    @given(strategy)
    def run(content: bytes) -> None:
        try:
            read(folder, content)
        except UserError as error:
            message = str(error)
            message.encode("utf-8")
            assert message and len(message) < 2000, f"{len(message)} characters: {message[:200]}"
            found["refused"] += 1
        else:
            found["read"] += 1

    run()
    return found
