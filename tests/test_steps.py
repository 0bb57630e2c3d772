"""The log's table of steps: what was predicted, what was measured, why; and a step that lost stays."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from example_results import example_result

from longlive_opt import report
from longlive_opt.errors import UserError
from longlive_opt.files import parse_yaml
from longlive_opt.measurement import decision
from longlive_opt.measurement.result import na, read_result, run_label, write_result
from longlive_opt.report.log import steps
from longlive_opt.report.log.steps import Outcome, Records, evaluate, read_steps
from longlive_opt.runner.plan import Layout, plan_summary

ROOT = Path(__file__).resolve().parent.parent
COMMITTED = ROOT / steps.STEPS_FILE
STEP = {"date": "2026-01-31", "before": "c/baseline", "after": "c/speed", "metric": "ss_mean",
        "prediction": "launch gaps", "predicted_percent": -20, "why": "The GPU was busy."}


def make(preset: str, scale: float, **more: Any) -> dict[str, Any]:
    return example_result(preset, scale, **{"steady": 20, "switches": 4, **more})


def campaign(folder: Path, *results: dict[str, Any]) -> Path:
    for result in results:
        write_result(folder / run_label(result["preset"], result["run"]) / "result.json", result)
    return folder


def stated(folder: Path, **entries: dict[str, Any]) -> Path:
    """steps.yaml in `folder`. JSON is YAML, and quotes every text."""
    path = folder / "steps.yaml"
    path.write_text(json.dumps(entries), encoding="utf-8")
    return path


def one(folder: Path, **changed: Any) -> Outcome:
    """The outcome of STEP with `changed` fields; None leaves a field out."""
    entry = {key: value for key, value in (STEP | changed).items() if value is not None}
    step, = read_steps(stated(folder, graphs=entry))
    return evaluate(step, Records(folder))


# ---- the file


@pytest.mark.parametrize("changed, words", [
    ({"befor": "c/baseline"}, "steps.yaml, graphs: the field 'befor' is unknown; use date, before"),
    ({"why": None}, "steps.yaml, graphs: the field why is missing; write date"),
    ({"why": 3}, "why 3 is no text; write words"), ({"why": " "}, "why ' ' is no text"),
    ({"date": "31.1.2026"}, "date '31.1.2026' is no day; write it as YYYY-MM-DD, in quotes"),
    ({"date": "2026-02-30"}, "date '2026-02-30' is no day"), ({"date": "2026-W05-6"}, "is no day"),
    ({"before": "baseline"}, "before 'baseline' is no recorded run; write campaign/run, for example"),
    ({"after": "../h100/speed"}, "after '../h100/speed' is no recorded run"),
    ({"after": "c/../speed"}, "is no recorded run"), ({"after": "c/.."}, "is no recorded run"),
    ({"after": "c/speed[key]"}, "is no recorded run"),
    ({"metric": "ss_means"}, "metric 'ss_means' is unknown or has no better end; use a key of measurement"),
    ({"metric": "blocks"}, "metric 'blocks' is unknown"),
    ({"predicted_percent": "fast"}, "predicted_percent 'fast' is neither a number nor the two ends"),
    ({"predicted_percent": [1]}, "is neither a number"), ({"predicted_percent": [1, 2, 3]}, "is neither"),
    ({"predicted_percent": [2, 2]}, "is neither"), ({"predicted_percent": True}, "is neither a number"),
    ({"predicted_change": -1}, "predicted_change and predicted_percent both state the prediction; keep one"),
    ({"prediction": None}, "predicted_percent -20 has no prediction; write down in prediction"),
])
def test_a_wrong_entry_is_refused_with_field_value_and_remedy(
        tmp_path: Path, changed: dict[str, Any], words: str) -> None:
    """A row that is silently left out, a typing error taken for a missing campaign, or a traceback."""
    with pytest.raises(UserError, match=re.escape(words)):
        one(tmp_path, **changed)


@pytest.mark.parametrize("text, words", [
    ("[1, 2]", "expected keys and values"), ("3: {}", "3 is no name of a step; write a few words"),
    ("graphs: fast", "graphs: 'fast' is no entry; write the fields date"),
    ("a: {date: 2026-01-31}", "put quotes around it"),
    ("a: {}\na: {}", "occurs twice"),
])
def test_a_wrong_file_is_refused(tmp_path: Path, text: str, words: str) -> None:
    """A file that YAML reads as something else than its author meant."""
    (tmp_path / "steps.yaml").write_text(text)
    with pytest.raises(UserError, match=re.escape(words)):
        read_steps(tmp_path / "steps.yaml")


def test_a_wrong_file_is_refused_before_a_campaign(tmp_path: Path) -> None:
    """Hours of measurement, and then no summary for a typing error."""
    (tmp_path / "outputs").mkdir()
    stated(tmp_path / "outputs", graphs=STEP | {"metric": "x"})
    (tmp_path / "notebooks").symlink_to(ROOT / "notebooks")
    with pytest.raises(UserError, match="metric 'x' is unknown"):
        plan_summary(Layout(tmp_path), "mine")


# ---- what came out


def test_the_numbers_are_those_of_the_runs(tmp_path: Path) -> None:
    """A result that was typed, a change with the wrong sign, a share of another prediction."""
    campaign(tmp_path / "c", make("baseline", 1.0), make("speed", 0.8))
    found = one(tmp_path)
    ours, theirs = (read_result(tmp_path / "c" / run / "result.json")["latency"]["ss_ms_per_frame"]["mean"]
                    for run in ("speed", "baseline"))
    assert (found.before, found.after, found.verdict) == (theirs, ours, "faster")
    change = ours - theirs
    assert found.result_text() == (f"SS mean {theirs:.2f} to {ours:.2f} ms per frame, {change:+.2f} "
                                   f"({100 * change / theirs:+.1f}%)")
    assert found.shares == pytest.approx((change / (-0.2 * theirs),))
    assert found.share_text() == f"{change / (-0.2 * theirs):.0%}"
    assert found.prediction_text() == "launch gaps (SS mean -20 %)"
    value = one(tmp_path, predicted_percent=None, predicted_value=theirs - 24.5)
    assert value.shares == pytest.approx((change / -24.5,))
    both = one(tmp_path, predicted_percent=None, predicted_change=[-30, -10])
    assert both.shares == pytest.approx((change / -30, change / -10))
    assert both.prediction_text() == "launch gaps (SS mean -30 to -10 ms per frame)"
    nothing = one(tmp_path, predicted_percent=0)
    assert nothing.share_text() == "n/a" and nothing.verdict == "faster"
    unstated = one(tmp_path, prediction=None, predicted_percent=None)
    assert unstated.prediction_text() == "none written down" and unstated.share_text() == "n/a"
    assert one(tmp_path, predicted_percent=None).prediction_text() == "launch gaps (no number)"


def test_verdicts(tmp_path: Path) -> None:
    """Noise called a gain, more FPS called slower, or memory called faster."""
    campaign(tmp_path / "c", make("baseline", 1.0), make("speed", 1.2), make("quality", 1.001, seed=4))
    assert one(tmp_path).verdict == "slower"
    assert one(tmp_path, after="c/quality").verdict == "noise"
    assert one(tmp_path, metric="fps").verdict == "slower"
    assert one(tmp_path, metric="peak_allocated").verdict == "worse"
    assert one(tmp_path, metric="stage_decode", before="c/speed", after="c/baseline").verdict == "faster"
    # Twice the baseline, 30 % apart: 20 % are noise then.
    campaign(tmp_path / "c", make("baseline", 1.3, run=2))
    assert one(tmp_path).verdict == "noise"


def test_runs_that_cannot_be_compared_give_the_reason(tmp_path: Path) -> None:
    """A log that fails, or numbers of different work side by side."""
    other = make("speed", 0.8) | {"seed": 7}
    other_gpu = make("balanced", 0.8, gpu="NVIDIA H200")
    without = make("quality", 0.8)
    without["latency"]["first_frame_ms"] = na("nobody looked", "look")
    campaign(tmp_path / "c", make("baseline", 1.0), other, other_gpu, without)
    (tmp_path / "c" / "exact").mkdir()
    (tmp_path / "c" / "exact" / "failed.json").write_text(json.dumps(
        {"status": "failed", "meaning": "Out of memory. Tried to allocate <2 GiB>.", "parameters": {}}))
    (tmp_path / "c" / "broken").mkdir()
    (tmp_path / "c" / "broken" / "result.json").write_text("{")
    reasons = {"speed": "not comparable, seed is 7 against 0", "exact": "c/exact has failed: Out of memory",
               "balanced": "not comparable, environment.gpu is 'NVIDIA H200' against 'NVIDIA H100 80GB HBM3'",
               "nowhere": "c/nowhere has no result in outputs", "broken": "c/broken/result.json: is not JSON",
               "baseline[use_x=true]": "c/baseline has no part with use_x=true"}
    for run, reason in reasons.items():
        found = one(tmp_path, after=f"c/{run}")
        assert found.verdict == "n/a" and found.result_text().startswith(f"n/a: {reason}"), found
        assert found.share_text() == found.verdict_text() == "n/a"
    assert one(tmp_path, before="gone/baseline").reason == "gone/baseline has no result in outputs"
    absent = one(tmp_path, after="c/quality", metric="first_frame")
    assert absent.result_text() == "n/a: first frame of quality: nobody looked"
    unrecorded = one(tmp_path, after="c/quality", metric="exposed_denoise")
    assert unrecorded.reason == "exposed communication, denoise of baseline: it is not recorded"


def test_disturbed_runs_get_no_verdict(tmp_path: Path) -> None:
    """A step that looks slow because something else ran on the machine."""
    busy = make("speed", 1.5)
    busy["environment"]["co_scheduled"] = True
    campaign(tmp_path / "c", make("baseline", 1.0), busy)
    found = one(tmp_path)
    assert found.verdict_text() == "undecided: something else ran on the machine during speed"
    assert found.change > 0


def test_equally_many_blocks(tmp_path: Path) -> None:
    """A longer run compared with the warm end of its stream."""
    campaign(tmp_path / "c", make("baseline", 1.0, steady=60, switches=10), make("speed", 0.8))
    found = one(tmp_path)
    runs = [read_result(tmp_path / "c" / run / "result.json") for run in ("baseline", "speed")]
    ours, theirs = (run["latency"]["ss_ms_per_frame"]["mean"] for run in decision.matched(*runs))
    assert (found.before, found.after) == (ours, theirs)
    assert found.before != runs[0]["latency"]["ss_ms_per_frame"]["mean"]


def test_a_part_of_a_study(tmp_path: Path) -> None:
    """Numbers of the study's own run taken for those of a part, or a part with another window compared."""
    study, part = make("ablation", 1.0), make("ablation", 1.4)
    kept = {key: part[key] for key in ("latency", "fps", "memory_gb", "sizes", "quality", "setup_s")}
    study["ablations"] = [{"changed": {"kv_read_path": "dequantize"}, **kept},
                          {"changed": {"local_attn_size": 9}, **kept},
                          {"changed": {"denoising_steps": [1000, 500]}, **kept},
                          {"changed": {"use_async_vae": True}, "failure": na("it broke. Badly.", "mend it")}]
    campaign(tmp_path / "c", study, make("baseline", 1.0, steady=40))
    found = one(tmp_path, before="c/ablation", after="c/ablation[kv_read_path=dequantize]")
    assert found.verdict == "slower" and found.after == part["latency"]["ss_ms_per_frame"]["mean"]
    assert found.before == study["latency"]["ss_ms_per_frame"]["mean"]
    for after, reason in (("local_attn_size=9", "not comparable, local_attn_size is 9 against 12"),
                          ("denoising_steps=[1000, 500]", "not comparable, denoising_steps is"),
                          ("use_async_vae=true", "c/ablation[use_async_vae=true] has failed: it broke")):
        found = one(tmp_path, before="c/ablation", after=f"c/ablation[{after}]")
        assert found.reason.startswith(reason), found.reason
    found = one(tmp_path, after="c/ablation[kv_read_path=dequantize]")
    assert "keeps no events" in found.reason


# ---- log and notebook


def test_the_log_keeps_a_step_that_lost(tmp_path: Path) -> None:
    """A log of successes only; a foreign campaign's steps in it; markup from a text."""
    folder = campaign(tmp_path / "c", make("baseline", 1.0), make("speed", 0.8), make("balanced", 1.3))
    campaign(tmp_path / "d", make("baseline", 1.0), make("speed", 0.9))
    stated(tmp_path, first=STEP, second=STEP | {"after": "c/balanced", "why": "<b>It | lost</b>."},
           third=STEP | {"before": "d/baseline", "after": "d/speed"}, fourth=STEP | {"after": "c/gone"})
    loaded = report.load(folder)
    own = report.write_campaign_log(loaded).read_text()
    whole = report.write_campaign_log(loaded, tmp_path / "LOG.md").read_text()
    section = own[own.index("## Steps"):own.index("\n---\n", own.index("## Steps"))]
    assert "3 steps: 1 faster, 1 slower, 1 n/a." in section and "| slower | &lt;b&gt;It \\| lost" in section
    assert "| third, " not in own and "| third, " in whole
    assert "4 steps: 2 faster, 1 slower, 1 n/a." in whole
    assert own.index("## Sweet Spot") < own.index("## Steps") < own.index("## Notes & Observations")
    table = report.steps_table(loaded)
    assert list(table.index) == ["first, 2026-01-31", "second, 2026-01-31", "fourth, 2026-01-31"]
    assert list(table["Verdict"]) == ["faster", "slower", "n/a"]
    (tmp_path / "steps.yaml").unlink()
    assert report.steps_table(loaded) is None
    assert "## Steps" not in report.write_campaign_log(loaded).read_text()


# ---- the committed steps


def test_committed_steps_are_of_recorded_runs() -> None:
    """A step whose run was renamed or deleted, or one that was predicted after it was measured."""
    found = read_steps(COMMITTED)
    assert len(found) >= 20
    for step in found:
        for reference in (step.before, step.after):
            folder = COMMITTED.parent / reference.campaign / reference.run
            assert (folder / "result.json").exists() or (folder / "failed.json").exists(), reference
            run = Records(COMMITTED.parent).find(reference)
            assert not isinstance(run, str) or "failed" in run, run
        if not isinstance(run, str) and "created_utc" in run:
            assert step.date <= run["created_utc"][:10], step.name


def test_the_committed_log_has_the_committed_steps() -> None:
    """A log that was not written again after a step or a run was added; a losing step left out."""
    text = (ROOT / "OPTIMIZATION_LOG.md").read_text(encoding="utf-8")
    records = Records(COMMITTED.parent)
    found = [evaluate(step, records) for step in read_steps(COMMITTED)]
    assert steps.steps_section(found) in text
    verdicts = {outcome.verdict for outcome in found}
    assert {"faster", "slower", "noise", "n/a"} <= verdicts
    for outcome in found:
        metric = outcome.step.metric
        if outcome.change is not None and "[" not in str(outcome.step.before) + str(outcome.step.after):
            pair = [read_result(COMMITTED.parent / reference.campaign / reference.run / "result.json")
                    for reference in (outcome.step.before, outcome.step.after)]
            before, after = (metric.value(run) for run in decision.matched(*pair))
            assert f"{metric.label} {metric.text(before)} to {metric.text(after)} {metric.unit}, " in text


def test_the_example_in_contributing_is_a_step(tmp_path: Path) -> None:
    """An example that the reader of CONTRIBUTING.md copies, and that is refused."""
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    text = re.search(r"(?s)## Record a step.*?```yaml\n(.*?)```", page)[1]
    step, = read_steps(stated(tmp_path, **parse_yaml(text, "example")))
    assert step.prediction and step.kind
