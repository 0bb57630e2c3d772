"""The inside of a preset: errors by layer, slots of the cache, attention by frame, and their notebook."""

from __future__ import annotations

import dataclasses
import gzip
import json
from pathlib import Path

import nbformat
import pytest
import torch
from micro import micro_config, micro_model, micro_pipeline

from longlive_opt import config as presets
from longlive_opt.errors import UserError
from longlive_opt.inside import Inspector, attention_mass, layer_errors
from longlive_opt.inside.attention_mass import frame_mass
from longlive_opt.inside.cache_slots import cache_slots, stored_rows, without_decoding
from longlive_opt.live import opening
from longlive_opt.prompts import PromptSchedule
from longlive_opt.report.charts.heatmaps import error_by_layer
from longlive_opt.runner.plan import Layout
from longlive_opt.streaming.session import StreamingSession

ROOT = Path(__file__).resolve().parent.parent
SWITCHED = PromptSchedule(("a fox", "a whale"), (18,))
CACHES = {"rolling": {}, "static": {"use_static_kv": True}, "8-bit": {"use_quantized_kv": True}}
# Frames in the slots after each block, by hand: window 12, sink 3, blocks of 3.
FILLING = ["0 1 2 - - - - - - - - -", "0 1 2 3 4 5 - - - - - -", "0 1 2 3 4 5 6 7 8 - - -",
           "0 1 2 3 4 5 6 7 8 9 10 11"]
ROLLING = [*FILLING, "0 1 2 6 7 8 9 10 11 12 13 14", "0 1 2 9 10 11 12 13 14 15 16 17",
           "0 1 2 12 13 14 15 16 17 18 19 20", "0 1 2 15 16 17 18 19 20 21 22 23"]
RING = [*FILLING, "0 1 2 12 13 14 6 7 8 9 10 11", "0 1 2 12 13 14 15 16 17 9 10 11",
        "0 1 2 12 13 14 15 16 17 18 19 20", "0 1 2 21 22 23 15 16 17 18 19 20"]


@pytest.fixture(autouse=True, scope="module")
def micro():
    with micro_model():
        yield


def shown(found) -> list[str]:
    return [" ".join("-" if slot is None else str(slot.frame) for slot in row.slots) for row in found.rows]


@pytest.mark.parametrize("cache", CACHES)
def test_slots_past_the_wrap_around_and_a_switch(cache):
    """A figure of the plan instead of the memory, frames in wrong slots, a recache that is not shown."""
    found = cache_slots(micro_pipeline(**CACHES[cache]), SWITCHED, 8)
    assert shown(found) == (ROLLING if cache == "rolling" else RING)
    before, switch, after = found.rows[5:8]
    assert [row.switched for row in found.rows] == [False] * 6 + [True, False]
    assert {slot.prompt for slot in before.slots} == {0}
    by_frame = {slot.frame: slot for slot in switch.slots}
    assert all((by_frame[frame].prompt, by_frame[frame].kind) == (0, "clean") for frame in range(3))
    assert all((by_frame[frame].prompt, by_frame[frame].kind) == (1, "recache") for frame in range(12, 18))
    assert all((by_frame[frame].prompt, by_frame[frame].kind) == (1, "clean") for frame in range(18, 21))
    roles = [after.role(slot, found.sink) for slot in range(12)]
    assert roles[:3] == ["sink"] * 3 and roles.count("present") == 3 and roles.count("past") == 6


def test_slots_of_an_unprotected_sink_and_of_late_clean_passes():
    """A sink that a recache overwrites, or a block before its clean pass, shown as if it were not."""
    pipeline = micro_pipeline(use_static_kv=True, use_early_decode=True, global_sink=False)
    rows = cache_slots(pipeline, PromptSchedule(("a", "b"), (6,)), 4).rows
    assert {slot.kind for slot in rows[1].slots if slot and slot.frame >= 3} == {"denoising"}
    assert {slot.kind for slot in rows[1].slots if slot and slot.frame < 3} == {"clean"}
    assert {(slot.kind, slot.prompt) for slot in rows[2].slots[:3]} == {("recache", 1)}


@pytest.mark.parametrize("keys", [{"use_static_kv": True}, {"use_static_kv": True, "use_fused_kernels": True},
                                  {"use_quantized_kv": True}], ids=str)
def test_a_stream_of_values_changes_the_slots_that_the_labels_name(keys):
    """Labels that take another way through the cache than keys and values do."""
    pipeline = micro_pipeline(**keys)
    expected = cache_slots(pipeline, SWITCHED, 8).rows
    session = StreamingSession(without_decoding(pipeline))
    tokens, before = session.cache.geometry.tokens_per_frame, None
    for chunk in session.play(SWITCHED, 8):
        _, values = stored_rows(session.cache.layers[-1], 12 * tokens)
        now = values.clone().unflatten(1, (12, tokens))
        if before is not None:
            changed = {slot for slot in range(12) if not torch.equal(now[:, slot], before[:, slot])}
            row, last = expected[chunk.block], expected[chunk.block - 1]
            assert changed == {slot for slot in range(12) if row.slots[slot] != last.slots[slot]}
        before = now


def test_mass_is_that_of_a_softmax():
    """A scale, a head or a group of keys that is wrong: the figure would look just as plausible."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, tokens, 2, 8, generator=generator, dtype=torch.float64) for tokens in (6, 12))
    scores = torch.einsum("bqnd,bknd->bnqk", q, k) / 8**0.5
    expected = scores.softmax(-1).unflatten(-1, (4, 3)).sum(-1).mean((0, 1, 2))
    assert torch.allclose(frame_mass(q.float(), k.float(), 3).double(), expected, atol=1e-6)
    k[:, 3:6] = 40 * q[:, :1]
    assert frame_mass(q[:, :1].float(), k.float(), 3)[1] == pytest.approx(1)


def test_mass_is_of_the_real_attention_and_equal_on_every_cache(monkeypatch):
    """Frames under wrong columns where a ring has turned; a watched stream that differs from a plain one."""
    found = {}
    for cache, keys in {**CACHES, "fused": {"use_static_kv": True, "use_fused_kernels": True}}.items():
        pipeline = micro_pipeline(**keys, height=64)
        found[cache] = attention_mass.attention_mass(pipeline, SWITCHED, 6)
        assert found[cache].frames == (0, 1, 2, *range(12, 21))
        assert found[cache].roles == ("sink",) * 3 + ("past",) * 6 + ("present",) * 3
        assert found[cache].mass.shape == (4, 2, 12)
        assert torch.allclose(found[cache].mass.sum(-1), torch.ones(4, 2), atol=1e-5)
        assert sum(found[cache].by_role().values()) == pytest.approx(1)
    spread = found["rolling"].mass.std(-1).min()
    assert spread > 1e-3, "all frames get the same: the columns could be in any order"
    for cache, limit in {"static": 1e-5, "fused": 1e-5, "8-bit": 0.03}.items():
        assert (found[cache].mass - found["rolling"].mass).abs().max() < limit


def test_empty_slots_of_a_large_sink_are_named():
    """Keys of zero that take attention away, drawn as a frame."""
    found = attention_mass.attention_mass(micro_pipeline(sink_size=6), PromptSchedule(("a",)), 0)
    assert found.frames == (0, 1, 2, None, None, None) and found.roles == ("present",) * 3 + ("empty",) * 3


def test_the_reference_has_the_error_of_its_dtype_and_no_other():
    """A truth that is not the reference, inputs that are not equal, or a float32 that is rounded."""
    own = layer_errors.layer_errors(micro_pipeline(model_dtype="bfloat16"), "a fox", 5)
    assert own.errors.shape == (4, 2) and torch.equal(own.errors, own.reference)
    assert (own.errors > 1e-3).all() and (own.errors < 2e-2).all() and own.dtype == "bfloat16"
    wide = layer_errors.layer_errors(micro_pipeline(), "a fox", 5)
    assert wide.reference is None and not wide.errors.any()
    assert "bit for bit" in error_by_layer("baseline", wide.timesteps, wide.errors.tolist()).alt


def test_the_layer_that_is_wrong_is_found():
    """A figure that shows an error somewhere else than it is made."""
    pipeline = micro_pipeline(use_static_kv=True)
    with torch.no_grad():
        pipeline.dit.blocks[1].ffn[2].bias += 0.5
    errors = layer_errors.layer_errors(pipeline, "a fox", 4).errors
    assert (errors[:, 0] < 1e-4).all() and (errors[:, 1] > 0.05).all()


@pytest.mark.parametrize("keys, least, most", [
    ({"use_static_kv": True, "use_fused_kernels": True}, 0, 1e-5), ({"use_quantized_kv": True}, 1e-4, 0.1),
    ({"use_static_kv": True, "use_torch_compile": True}, 0, 1e-5)], ids=str)
def test_layers_of_every_kind_of_pass_are_watched(keys, least, most, cheap_compile):
    """A preset whose layers cannot be seen, or are seen twice."""
    errors = layer_errors.layer_errors(micro_pipeline(**keys), "a fox", 4).errors
    assert errors.shape == (4, 2) and (errors >= least).all() and (errors < most).all()


def test_wrong_order_and_wrong_words_are_refused():
    """An AttributeError where a sentence would name the missing call."""
    look = Inspector(micro_config(use_static_kv=True))
    for name in ("layer_errors", "cache_slots", "attention_mass"):
        with pytest.raises(UserError, match=r"call build\(\) first"):
            getattr(look, name)()
    with pytest.raises(UserError, match=r"slots: there is none yet; call cache_slots\(\) first"):
        _ = look.slots
    with pytest.raises(AttributeError, match="nonsense"):
        _ = look.nonsense
    look.build()
    with pytest.raises(UserError, match="cache: 'paged' is unknown; choose one of rolling, static, 8-bit"):
        look.cache_slots("paged")
    with pytest.raises(UserError, match="does not end in .json.gz"):
        look.trace_blocks("trace.txt")
    with pytest.raises(UserError, match="block: -1 is negative"):
        look.layer_errors(-1)
    with pytest.raises(UserError, match="preset: 'nonsense' is unknown"):
        Inspector.preset("nonsense")
    assert "done: build" in repr(look)


def test_notebook_shows_all_four(tmp_path, monkeypatch):
    """A cell that fails, a figure without words, a trace that is not where the notebook says."""
    monkeypatch.setattr(opening, "MODELS", presets.MODELS)
    cells = nbformat.read(ROOT / "notebooks/21_inside.ipynb", as_version=4).cells
    names: dict[str, object] = {}
    charts = []
    for cell in (cell for cell in cells if cell.cell_type == "code"):
        source, last = cell.source, None
        if "look." in source and "build" not in source:
            last = eval(source, names)
            charts.append(last)
        else:
            exec(source, names)
        if "parameters" in cell.metadata.get("tags", []):
            names |= {"model": "micro", "weights": "random", "height": 32, "width": 48,
                      "output_dir": str(tmp_path)}
    assert len(charts) == 6 and all(len(chart.alt) > 60 for chart in charts)
    assert not [chart.alt for chart in charts if "Not drawn" in chart.alt]
    with gzip.open(tmp_path / "trace.json.gz", "rt", encoding="utf-8") as file:
        assert json.load(file)["otherData"]["preset"] == "static_kv"


def test_no_campaign_runs_the_notebook():
    """`--presets all` with a preset that is none."""
    assert {"inside", "roofline", "live"}.isdisjoint(Layout(ROOT).presets())
    assert dataclasses.is_dataclass(layer_errors.LayerErrors)
