"""The report fills the log's template without changing its form, and draws whatever a result holds."""

import copy
import csv
import io
import itertools
import json
import re
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
import yaml
from example_results import example_quality, example_result
from PIL import Image

from longlive_opt import report
from longlive_opt.config import ExperimentConfig, keys_of
from longlive_opt.errors import UserError
from longlive_opt.files import without_places
from longlive_opt.measurement import decision
from longlive_opt.measurement.result import na, read_result, run_label, validate, write_result
from longlive_opt.report import charts
from longlive_opt.report.__main__ import main
from longlive_opt.report.charts.chart import STAGE_COLOURS
from longlive_opt.report.charts.labels import along, spread
from longlive_opt.report.conclusion import conclusion_html
from longlive_opt.report.html_export import export_html
from longlive_opt.report.log import outside
from longlive_opt.report.log.markdown import sentence
from longlive_opt.report.noise_record import read_record
from longlive_opt.report.trial import try_pages
from longlive_opt.report.verdicts import write_decisions
from longlive_opt.runner.execute import write_failure

ROOT = Path(report.__file__).resolve().parents[2]
TEMPLATE = (ROOT / "longlive_opt" / "report" / "log" / "template.md").read_text(encoding="utf-8")
SCALES = {"baseline": 1.0, "cuda_graphs": 0.97, "static_kv": 0.9, "async_vae": 1.02, "quality": 0.85,
          "balanced": 0.63, "speed": 0.45}
EXACT = {"cuda_graphs", "static_kv", "async_vae", "quality"}


def make(preset: str, scale: float | None = None, **more: Any) -> dict[str, Any]:
    options = {"steady": 12, "switches": 2, "exact": preset in EXACT, **more}
    return example_result(preset, SCALES.get(preset, 0.8) if scale is None else scale, **options)


@pytest.fixture(scope="module")
def seven() -> list[dict[str, Any]]:
    results = [make(preset, steady=300 if preset == "baseline" else 12) for preset in SCALES]
    for result in results[4:]:
        # The example's parameters are no preset's; these three sections print a configuration of their own.
        result["parameters"]["use_prompt_cache"] = True
    return results


def section(text: str, heading: str) -> str:
    """What stands between a heading and the next one of the same or a higher exactness."""
    start = text.index(heading) + len(heading)
    return re.split(rf"(?m)^(?:{heading.split()[0]}|##) ", text[start:])[0]


def headings(text: str) -> list[str]:
    return re.findall(r"(?m)^#+ .*$", text)


def test_log_without_results_is_the_template():
    """Would catch a changed heading, table or blank: the template is the contract."""
    text = report.render_log([])
    assert text.startswith(TEMPLATE.rstrip("\n"))
    assert text.count("___") == TEMPLATE.count("___")
    assert "generated" in text[len(TEMPLATE):]


def test_seven_presets_leave_no_blank_and_keep_every_other_line(seven):
    """Would catch a blank that was overlooked, and a template line that was reworded, moved or lost."""
    text = report.render_log(seven)
    assert "___" not in text
    assert headings(text) == headings(TEMPLATE)
    lines = iter(text.split("\n"))
    for line in TEMPLATE.split("\n"):
        if "___" not in line and "[ ]" not in line and line != "-" and not line.startswith("| GPU |"):
            assert line in lines, line  # an iterator: also the order


def test_only_the_baseline_leaves_the_experiments_blank():
    """Would catch a recommendation drawn from a baseline alone, or baseline numbers in blank experiments."""
    text = report.render_log([make("baseline")])
    assert text[text.index("## Optimization Experiments"):text.index("## Summary Table")] == \
        TEMPLATE[TEMPLATE.index("## Optimization Experiments"):TEMPLATE.index("## Summary Table")]
    assert "**Preset**: ___" in text and "\n-\n-\n-\n" in text and "- Quality: ___" in text
    assert "___" not in section(text, "## Baseline Measurement")
    assert "| Baseline | 6" in text and "| Quality | ___ms | ___ | ___GB | ___ | [ ] |" in text
    assert "random, seed 0" in text and "580.159" in text


def test_not_run_experiments_keep_exactly_their_blanks(seven):
    """Would catch blanks of an experiment that was not run being filled, or counted wrongly."""
    text = report.render_log([result for result in seven if result["preset"] not in ("speed", "static_kv")])
    for heading in ("### Experiment 2: Static KV Cache Only", "### Experiment 6: Speed Preset (Aggressive)"):
        assert section(text, heading) == section(TEMPLATE, heading)
    assert "| Speed | ___ms | ___ | ___GB | ___ | [ ] |" in text and "- Speed: ___" in text
    assert len(re.findall("___", text)) == 12 + 19 + 4 + 1


def test_numbers_changes_and_ticks(seven):
    """Would catch a wrong column, sign or unit, and a tick that contradicts the decision or the target."""
    baseline, speed = make("baseline"), copy.deepcopy(seven[6])
    for result, mean, worst in ((baseline, 50.0, 60.0), (speed, 40.0, 40.0)):
        result["latency"]["ss_ms_per_frame"] |= {"mean": mean, "max": worst}
    speed["decision"] = {"keep": True, "rule": "a rule", "rationale": "because"}
    text = report.render_log([baseline, speed])
    part = section(text, "### Experiment 6")
    assert "| SS Mean | 50.0 ms | 40.0 ms | -20.0% |" in part
    assert "| SS Max | 60.0 ms | 40.0 ms | -33.3% |" in part
    assert "**Decision**: [x] Keep  [ ] Drop\nBecause.\n" in part and text.count("A rule.") == 1
    assert "- Decision rule of speed: A rule." in section(text, "## Notes & Observations")
    assert re.search(r"\| Speed \| 40.0ms \| .* \| \[x\] \|", text)  # exactly 40 ms meets the target
    assert re.search(r"\| Baseline \| 60.0ms \| .* \| Reference \| \[ \] \|", text)
    assert "**Preset**: Speed" in text
    speed["decision"]["keep"] = False
    text = report.render_log([baseline, speed])
    assert "[ ] Keep  [x] Drop" in text and "**Preset**: none" in text


def test_says_when_to_take_another_preset():
    """Would catch presets beyond the template left without a word, and one recommended that another beats."""
    runs = [make("baseline", steady=30)]
    for name, scale, ratio in (("balanced", 0.5, 1.05), ("speed", 0.45, 1.5), ("realtime", 0.4, 1.5),
                              ("static_kv", 0.9, 1.05), ("low_memory", 1.0, 1.6)):
        run = make(name, scale, exact=False, steady=30)
        run["quality"] = example_quality(name, ratio=ratio)
        objective = "memory" if name == "low_memory" else "latency"
        run["memory_gb"] |= {"peak_allocated": 3.0 if objective == "memory" else 9.0}
        run["decision"] |= {"gate": {"exactness": "lossy", "max_error_ratio": 2.0, "objective": objective}}
        runs.append(run)
    text = report.render_log([*runs, make("baseline", run=2, steady=30)])
    part = text[text.index("**When to use"):text.index("## Notes")]
    assert "**Preset**: Realtime" in text and "- Quality: ___" in part
    assert "- Speed: dominated by Realtime, no faster in the worst case" in part
    assert "- Balanced: where fidelity counts more than latency (SS max" in part
    assert "- Low memory: where memory counts most (peak memory 3.00 GB, SS max" in part
    assert "Static" not in part
    assert re.search(r"The GPU throttled its clock \(lower of two .*\) in baseline \(1755 MHz\), ", text)


def test_a_preset_is_not_advised_where_another_beats_it():
    """Would catch 'where fidelity counts more' of quality, which static KV equals in fidelity and beats in
    latency; and 'no reason' for speed, where it is the more faithful one.
    """
    runs = [make("baseline", steady=30)]
    for name, scale, ratio in (("static_kv", 0.8, 1.05), ("quality", 0.85, 1.05), ("speed", 0.5, 1.4),
                              ("realtime", 0.4, 1.5)):
        run = make(name, scale, exact=False, steady=30)
        run["quality"] = example_quality(name, ratio=ratio)
        run["decision"] |= {"gate": {"exactness": "lossy", "max_error_ratio": 2.0}}
        runs.append(run)
    text = report.render_log([*runs, make("baseline", run=2, steady=30)])
    assert "- Quality: dominated by Static" in text
    assert "- Speed: where fidelity counts more than latency" in text
    assert "The gates were passed with random weights." in text


def test_the_recommended_one_is_the_fastest_over_equally_many_blocks():
    """Would catch the largest of 300 blocks held against the largest of 30."""
    runs = [make("baseline", steady=30), make("speed", 0.4, exact=False, steady=60),
            make("realtime", 0.42, exact=False, steady=30)]
    late = runs[1]["latency"]
    late["ss_block_ms"][50] *= 1.3
    late["ss_ms_per_frame"] |= {"max": max(late["ss_block_ms"]) / 12}
    assert late["ss_ms_per_frame"]["max"] > runs[2]["latency"]["ss_ms_per_frame"]["max"]
    for run in runs[1:]:
        run["decision"] |= {"keep": True}
    text = report.render_log(runs)
    assert "**Preset**: Speed" in text and "over the first 30 blocks of each" in text


def test_what_a_kept_preset_makes_worse_stands_beside_the_verdict():
    """Would catch Keep for a gain of 7 % in one figure and not a word of 49 % lost in another."""
    base, again = make("baseline", steady=30), make("baseline", run=2, steady=30)
    run = make("quality", 0.9, steady=30)
    run["latency"]["ps_ms"] |= {"mean": base["latency"]["ps_ms"]["mean"] * 1.5}
    run["memory_gb"]["peak_allocated"] = base["memory_gb"]["peak_allocated"] * 1.01
    run["decision"] |= {"gate": {"exactness": "bitwise"}}
    part = section(report.render_log([base, run, again]), "### Experiment 4")
    assert re.search(r"\[x\] Keep .*\n.* Drawbacks: PS Mean \+50\.0%\.\n", part)
    run["latency"]["ss_ms_per_frame"] |= {"mean": base["latency"]["ss_ms_per_frame"]["mean"]}
    assert "Drawbacks" not in section(report.render_log([base, run, again]), "### Experiment 4")


def test_where_the_templates_words_do_not_fit_the_run_says_so(seven):
    """Would catch 'torch.compile handles dynamic shapes better' beside 1873 replayed graphs."""
    seven = copy.deepcopy(seven)
    seven[5]["optimizations"][0]["report"] = {"done": "compiled", "stats": {"captured": 22, "replayed": 1873}}
    part = section(report.render_log(seven), "### Experiment 5")
    assert "the compile_mode captures graphs itself" in part and "The heading comes from the template" in part
    assert "There is no quality_eval.py" in section(report.render_log(seven), "### Experiment 4")


def test_the_fall_of_psnr_within_a_block_is_told():
    """Would catch a mean of 40 dB that hides 34 at the end of every block, in a result of the old kind."""
    run = make("speed", exact=False)
    run["quality"] |= {"protocol": "one block from the baseline's own past", "frames_compared": 33,
                       "frames_total": 33}
    run["quality"]["psnr_db"]["per_frame"] = [30.0] * 9 + [46.0, *[40.0] * 10, 34.0] * 2
    text = report.render_log([make("baseline"), run])
    assert "33 of 33 frames against those of the baseline in float32. PSNR goes " \
        "from 46.0 dB in a block's first frame to 34.0 in its last." in text
    run["quality"]["frames_total"] = 40
    assert "PSNR goes from" not in report.render_log([make("baseline"), run])


def test_fidelity_is_told_with_its_scale():
    """Would catch a ratio without the free-running one or the worst block, null rows told below every preset
    or nowhere, and a template line that stays blank."""
    text = report.render_log([make("baseline"), make("speed"), make("static_kv")])
    part = section(text, "### Experiment 6")
    assert "- PSNR: 43.6 dB (worst frame 41.6 dB)" in part
    assert ("Error ratio free-running 1.3 (worst block 1.43; latent error 1.35 %), teacher-forced 1.3 (worst "
            "block 1.43; latent error 1.35 %). Measured over 12 blocks with a prompt switch at block 6, "
            "against the baseline in float32.") in part
    assert text.count("Error ratios of the null rows: ") == 1
    assert "no recache at the switch 5 (PSNR 28.0 dB, worst frame 26.0)" in section(text, "## Baseline")
    exact = section(text, "### Experiment 2")
    assert "Exact: latents and frames are bit-identical to the baseline's. Error ratio" \
        " free-running 1 (" in exact


def test_errors_by_block_are_drawn_beside_the_null_rows():
    """Would catch an error without its scale, or a chart that a result of the old kind ends."""
    baseline, speed = make("baseline"), make("speed")
    chart = charts.run_figures(speed, baseline)["error_by_block"]
    for name in ("free-running 1.5", "teacher-forced 1.5", "baseline 1.1", "null: window 9 6.9"):
        assert name in chart.alt
    assert "null: no sink" in charts.run_figures(baseline)["error_by_block"].alt
    speed["quality"] = {"psnr_db": na("no truth", "run the baseline"), "identical": None, "flags": []}
    assert "no truth" in charts.run_figures(speed, baseline)["error_by_block"].alt


def test_a_figure_that_is_missing_everywhere_is_explained_once(seven):
    """Would catch a command of a line's length below each of eight presets."""
    text = report.render_log(seven)
    assert text.count("LPIPS is n/a:") == 1 and "LPIPS is n/a:" in section(text, "## Notes & Observations")


def test_an_entry_opens_with_its_result(seven):
    """Would catch a hypothesis, a number or a verdict that a reader has to dig out of the details, and a rule
    or a caveat repeated in every entry."""
    text = report.render_log(seven)
    part = section(text, "### Experiment 6: Speed Preset (Aggressive)\n")
    lines = part.strip().split("\n")
    opening = [re.match(r"- \*\*(\w+)\*\*: \S", line)[1] for line in lines[:3]]
    assert opening == ["Expected", "Measured", "Why"]
    assert lines[3:6] == ["", "<details><summary>Measurement details</summary>", ""]
    assert lines[6] == "**Configuration**:" and part.rstrip("\n-").endswith("</details>")
    assert re.search(r"SS max [\d.]+ ms per frame \(-\d+\.\d%\); .*error ratio 1\.30 \(", lines[1])
    assert "PSNR 43.6 dB (-2.4 dB)" in lines[1]
    assert lines[2].startswith("- **Why**: Keep: SS mean") and "Per block -" in lines[2]
    assert text.count("<details>") == text.count("</details>") == 8
    notes = section(text, "## Notes & Observations")
    assert text.count("not how good the frames look") == notes.count("not how good the frames look") == 1
    assert text.lower().count("keep if ss mean") == notes.count("Decision rule of ") == 2


def test_a_report_opens_with_its_numbers(tmp_path):
    """Would catch a card without a number, a change against another stream's blocks, the baseline held
    against itself, and a recommendation that nobody finds."""
    runs = {"baseline": make("baseline", steady=30), "speed": make("speed"), "quality": make("quality"),
            "baseline.repeat2": make("baseline", run=2)}
    for label, run in runs.items():
        run["decision"]["gate"] = {"exactness": "lossy", "max_error_ratio": 2.0}
        write_result(tmp_path / label / "result.json", run)
    campaign = report.load(tmp_path)
    report.write_campaign_log(campaign)
    cards = report.cards(tmp_path)
    ours, theirs = decision.matched(runs["speed"], runs["baseline"])
    change = ours["latency"]["ss_ms_per_frame"]["max"] / theirs["latency"]["ss_ms_per_frame"]["max"] - 1
    worst = ours["latency"]["ss_ms_per_frame"]["max"]
    assert f"SS max<br><b>{worst:.2f} ms per frame</b><br>{change:+.1%}" in cards["speed"]
    faster = theirs["latency"]["ss_ms_per_frame"]["mean"] / ours["latency"]["ss_ms_per_frame"]["mean"]
    assert f"speed-up<br><b>{faster:.2f}x</b><br>by SS mean" in cards["speed"]
    order = [cards["speed"].index(f"{label}<br>") for label in ("SS max", "speed-up", "FPS", "PS mean",
                                                                "peak memory", "error ratio")]
    assert order == sorted(order) and "speed-up" not in cards["baseline"]
    for label in ("SS mean", "PS mean", "FPS", "peak memory", "error ratio", "PSNR"):
        assert f"{label}<br>" in cards["speed"], label
    assert "error ratio<br><b>identical</b>" in cards["quality"]
    assert "%" not in cards["baseline"].partition("</table>")[0]
    advice = report.recommendation(campaign)
    assert "Which preset to take: Speed" in advice and advice._repr_html_() == str(advice)
    order = report.numbers_table(campaign.results)["preset"].tolist()
    assert order == ["baseline", "baseline", "quality", "speed"]
    assert "Which preset to take: none" in report.recommendation(report.Campaign(tmp_path / "x", [], [], []))


def test_verdicts_stand_in_one_place(tmp_path):
    """Would catch a result.json that says undecided where the log says keep, a report that has neither, or a
    verdict that breaks its HTML.
    """
    runs = {"baseline": make("baseline"), "speed": make("speed"), "baseline.repeat2": make("baseline", run=2),
            "speed.repeat2": make("speed", run=2), "ablation": make("ablation")}
    for label in ("speed", "speed.repeat2", "ablation"):
        runs[label]["decision"] = {"keep": None, "rule": "r", "rationale": "undecided: no A/A noise",
                                   "gate": {"exactness": "lossy", "max_error_ratio": 2.0}}
    for label, run in runs.items():
        write_result(tmp_path / label / "result.json", run)
    text = report.write_campaign_log(report.load(tmp_path)).read_text()
    found = report.read_decisions(tmp_path)
    assert {label: entry["verdict"] for label, entry in found["decisions"].items()} == {
        "baseline": "reference", "baseline.repeat2": "repetition", "speed": "keep",
        "speed.repeat2": "repetition", "ablation": "study"}
    entry = found["decisions"]["speed"]
    assert entry["keep"] is True and sentence(entry["rationale"]) in section(text, "### Experiment 6")
    assert found["recommended"]["preset"] == "speed" and "**Preset**: Speed" in text
    assert found["noise"]["speed"]["runs"] == 2 and len(found["noise"]["baseline"]["values"]["ss_max"]) == 2
    cards = report.cards(tmp_path)
    assert "Verdict: keep" in cards["speed"] and "The log recommends this preset" in cards["speed"]
    assert "Verdict: study" in cards["ablation"] and "recommends" not in cards["speed.repeat2"]
    found["decisions"]["speed"]["rationale"] = "a < b"
    write_decisions(tmp_path, found)
    assert "A &lt; b." in report.cards(tmp_path)["speed"]
    write_result(tmp_path / "speed" / "result.json", runs["speed"] | {"created_utc": "2026-12-31T00:00:00Z"})
    assert "speed" not in report.cards(tmp_path), "run again, and not decided again"
    (tmp_path / "decisions.json").write_text("{")
    assert report.cards(tmp_path) == {}


def test_runs_that_are_not_alike_have_no_fidelity_anywhere():
    """Would catch the PSNR of two different videos told as what an optimization costs: in the log, the table
    for readers or the CSV."""
    base, other = make("baseline"), make("speed")
    other["seed"] = 1
    other["quality"]["free_running"] = {"psnr_db": {"mean": 14.1}, "identical": False}
    other["decision"] |= {"gate": {"exactness": "lossy", "max_error_ratio": 2.0}}
    text = report.render_log([base, other, make("baseline", run=2)])
    part = section(text, "### Experiment 6")
    assert "- PSNR: n/a (not comparable with the baseline, seed is 1 against 0)" in part
    assert not re.search(r"(?m)^- (PSNR|SSIM|LPIPS|CLIP Delta): [\d.]", part) and "Free-running" not in part
    assert "Undecided: not comparable with the baseline, seed is 1 against 0." in part
    assert "frames differ" not in part
    assert re.search(r"\| SS Mean \| [\d.]+ ms \| [\d.]+ ms \| n/a \|", part), "latency stays"
    results = report.decided([base, other])
    row = report.summary_table(results).set_index("preset").loc["speed"]
    assert row["not_comparable"] == "seed is 1 against 0" and row[["psnr_db", "ssim"]].isna().all()
    assert row["verdict"] == "undecided" and row["ss_mean_ms"] > 0
    assert report.numbers_table(results).set_index("preset").loc["speed", "PSNR, dB"] == "n/a"


def test_repeated_presets_show_their_range():
    """Would catch the luckiest of three runs printed as the worst case."""
    runs = [make("baseline"), make("baseline", run=2), make("baseline", run=3), make("speed")]
    worst = [60.0, 54.0, 70.5]
    for run, value in zip(runs, worst):
        run["latency"]["ss_ms_per_frame"]["max"] = value
    text = report.render_log(runs)
    assert "| SS Max | 60.0 ms (54.0 to 70.5 over 3 runs) |" in section(text, "## Baseline Measurement")
    part = section(text, "### Experiment 6")
    row = r"\| SS Max \| 60\.0 ms \(54\.0 to 70\.5 over 3 runs\) \| [\d.]+ ms \| -[\d.]+% \|"
    assert re.search(row, part)
    assert "| Baseline | 60.0ms (54.0 to 70.5 over 3 runs) |" in text
    assert "baseline run 3 times, over 12 blocks and 2 prompt switches)" in text
    assert "the SS max of each 54.0 to 70.5 ms" in text
    table = report.noise_table(runs)
    assert table.loc[0, "SS max, ms per frame"] == "54.00 to 70.50" and table.loc[0, "runs"] == 3


@pytest.mark.parametrize(("path", "value"), [
    ("events", [["chunk_ready", 1.0, 2.0]]), ("decision.gate", "x"), ("adherence", "x"), ("ablations", ["x"]),
    ("interruptions", 1), ("quality.lpips", {"value": None, "reason": ["x"], "how_to_fix": "y"}),
    ("built_while_measured", {"<img src=x>": 1}), ("quality.ssim.mean", 10**400),
    ("parameters", {"a": {"b": 1}}),
    ("quality.frames_compared", "<b>"), ("adherence", {"adherence_before": "x"}), ("quality.nulls", [{}])])
def test_one_strange_result_hides_no_other(tmp_path, path, value):
    """A result that passes the schema and ends summary and log of the whole campaign in a traceback."""
    for label in ("baseline", "speed"):
        result = make(label)
        *parents, last = path.split(".")
        holder = result
        for key in parents if label == "speed" else ():
            holder = holder[key]
        if label == "speed":
            holder[last] = value
        (tmp_path / label).mkdir()
        (tmp_path / label / "result.json").write_text(json.dumps(result))
    campaign = report.load(tmp_path)
    assert [run["preset"] for run in campaign.results] in (["baseline"], ["baseline", "speed"])
    if len(campaign.results) == 1:
        (place, reason), = campaign.problems
        assert place == "speed/result.json" and "run the preset again" in reason
    assert "<img" not in report.write_campaign_log(campaign).read_text()


STRANGE = "<img src=x>\n# Heading"


def places(value: Any, at: tuple = ()) -> list[tuple]:
    """The path of every value in `value`; of a list only the first."""
    items = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) \
        else ()
    return [at] * bool(at) + [place for key, item in items for place in places(item, (*at, key))]


def with_strange(result: dict[str, Any], place: tuple, as_key: bool) -> dict[str, Any]:
    result = json.loads(json.dumps(result))
    holder = result
    for key in place[:-1]:
        holder = holder[key]
    if as_key and isinstance(holder, dict):
        holder[STRANGE] = holder.pop(place[-1])
    else:
        holder[place[-1]] = STRANGE
    return result


def test_no_value_or_name_of_a_result_is_markup_in_the_log():
    """Would catch raw HTML, or a line of its own, from any field of a stranger's result.json."""
    shipped = read_result(ROOT / "outputs/h200_two/tiny_vae/result.json")
    run = make("speed", steady=4, switches=1) | {
        key: shipped[key] for key in ("interruptions", "adherence", "optimizations") if key in shipped}
    run["latency"]["ps_by_prompt"] = shipped["latency"]["ps_by_prompt"]
    rendered = 0
    for place, as_key in itertools.product(places(run), (False, True)):
        changed = with_strange(run, place, as_key)
        try:
            validate(changed)
        except UserError:
            continue
        if try_pages([changed]):
            continue
        rendered += 1
        text = re.sub(r"(?ms)^```yaml$.*?^```$", "", report.render_log([changed]))
        assert "<img" not in text and "\n# Heading" not in text, (place, as_key)
    assert rendered > 200
    run["parameters"]["compile_mode"] = "a\n```\n<img src=x>"
    text = re.sub(r"(?ms)^```yaml$.*?^```$", "", report.render_log([make("baseline"), run | {
        "preset": "other"}]))
    assert "<img" not in text


def test_a_copy_is_no_repetition(tmp_path):
    """`cp -r speed speed.bak`: noise of 0 % among two runs, and verdicts that are decided with it."""
    for folder in ("baseline", "speed", "speed.bak", "speed.repeat2"):
        write_result(tmp_path / folder / "result.json", make(folder.partition(".")[0]))
    campaign = report.load(tmp_path)
    assert [run["preset"] for run in campaign.results] == ["baseline", "speed"]
    assert [place for place, _ in campaign.problems] == ["speed.bak/result.json", "speed.repeat2/result.json"]
    assert "is the result of speed and counts only in a folder of that name" in campaign.problems[0][1]
    assert report.noise_table(campaign.results).empty


def test_the_log_of_a_folder_without_a_campaign_is_refused(tmp_path, capsys):
    """`python -m longlive_opt.report .` replaces the published log by an empty one."""
    (tmp_path / "OPTIMIZATION_LOG.md").write_text("published")
    assert main([str(tmp_path)]) == 2
    assert "holds no result.json" in capsys.readouterr().err
    assert (tmp_path / "OPTIMIZATION_LOG.md").read_text() == "published"


def test_noise_of_earlier_campaigns_is_kept_and_told(tmp_path):
    """Would catch the noise of the quietest campaign told as that of the machine, a run counted twice, and
    another machine's among them."""
    first, later = tmp_path / "c", tmp_path / "d"
    for folder, scale, date in ((first, 1.3, "2026-01-01T00:00:00Z"), (later, 1.0, "2026-02-01T00:00:00Z")):
        for run in (1, 2):
            result = make("baseline", scale, run=run) | {"created_utc": date}
            write_result(folder / run_label("baseline", run) / "result.json", result)
    path = tmp_path / "noise.json"
    for folder in (first, later, later):
        assert report.record_noise(report.load(folder), path) == 1
    rows = read_record(path)
    assert [(row["campaign"], row["runs"]) for row in rows] == [("c", 2), ("d", 2)]
    assert len(rows[0]["ss_max"]) == 2 and rows[0]["ss_max"][0] > rows[1]["ss_max"][0]
    text = report.write_campaign_log(report.load(later)).read_text()
    most, least = max(rows[0]["ss_max"]), min(rows[1]["ss_max"])
    assert "Over 2 campaigns on this kind of machine, 4 runs at several commits (outputs/noise.json): base" \
        in text and f"SS max {least:.1f} to {most:.1f} ms" in text
    rows[0]["machine"] = "another"
    assert "Over " not in report.render_log(report.load(later).results, record=rows)
    with pytest.raises(UserError, match="not a noise record"):
        read_record(write_decisions(tmp_path, {"schema_version": 9}))


def test_committed_record_holds_the_campaigns_of_the_history():
    """Would catch the record of noise emptied, or written by hand: four baselines, SS max 55.4 to 70.5."""
    rows = [row for row in read_record(ROOT / report.NOISE_FILE) if row["preset"] == "baseline"]
    worst = [round(row["ss_max"][0], 1) for row in rows]
    assert [55.4, 62.3, 62.6, 70.5] == sorted(worst)[:4] if len(worst) == 4 else {55.4, 62.3, 62.6,
                                                                                  70.5} <= set(worst)


def test_targets_are_those_of_the_runs():
    """Would catch another target_ms_per_frame ignored by tick, advice, table and chart."""
    runs = [make("baseline"), make("baseline", run=2), make("quality", 0.9)]
    for run in runs:
        run["latency"]["ss_over_target"] |= {"target_ms": 62.5}
    runs[2]["decision"] |= {"gate": {"exactness": "bitwise"}}
    text = report.render_log(runs)
    assert re.search(r"\| Quality \| .* \| \[x\] \|", text) and "meets the 62.5 ms target" in text
    assert "**Preset**: Quality" in text and "stay within 62.5 ms per video frame" in text
    assert "Target: 62.5 ms per video frame" in text and "40 ms target" not in text
    table = report.summary_table(runs)
    assert set(table["target_ms"]) == {62.5} and bool(table["within_target"][2])
    chart = charts.latency_boxes(runs)
    assert "62.5 ms target" in [text.get_text() for text in chart.axes[0].texts]
    assert "Target: " not in report.render_log([make("baseline")])


def test_extra_preset_shows_every_optimization():
    """Would catch a new key of the catalogue missing from the block of a preset beyond the template."""
    keys = {"use_static_kv": True, "use_prompt_cache": True, "video_crf": 30, "linear_quantization": "fp8"}
    base, extra = make("baseline"), make("realtime", 0.5)
    base["parameters"] = ExperimentConfig().to_dict()
    extra["parameters"] = {**base["parameters"], "name": "realtime", **keys}
    text = report.render_log([base, extra])
    block = yaml.safe_load(re.search(r"(?s)```yaml\n(.*?)\n```", text[text.index("Experiment 7: "):])[1])
    shown = {key for key in keys_of("optimizations") if extra["parameters"][key] is not None}
    assert {key: block[key] for key in keys} == keys and shown <= block.keys()
    assert "hypothesis" not in block and "vae_chunk_latents" not in block


def test_studies_and_what_is_not_kept_are_never_advised():
    """Would catch the ablation of the recommended preset recommended itself, and 'where fidelity counts more'
    of a preset that was dropped for its fidelity."""
    runs = [make("baseline"), make("baseline", run=2), make("realtime", 0.5), make("ablation", 0.45),
            make("speed", 0.4)]
    for run, limit in zip(runs[2:], (2.0, 2.0, 1.2)):
        run["decision"] |= {"gate": {"exactness": "lossy", "max_error_ratio": limit}}
    text = report.render_log(runs)
    assert "**Preset**: Realtime" in text and "Not Ablation, SS max" in text
    assert "studies other presets" in text
    part = text[text.index("**When to use"):text.index("## Notes")]
    assert "Ablation" not in part and "- Speed: not recommended (SS max" in part and "dropped)" in part
    ablated = make("realtime", 0.5) | {"ablations": [{"changed": {"sink_size": 0}, "failure": na("a", "b")}]}
    ablated["decision"] |= {"keep": True}
    assert "**Preset**: none" in report.render_log([make("baseline"), ablated])


def test_what_this_machine_lacks_is_no_failure():
    """Would catch 'Failed:' of a preset that needs a GPU, on a laptop."""
    parameters = {**make("baseline")["parameters"], "prompts": ["a fox", "a whale"]}
    missing = report.Failure("cuda_graphs", "use_cuda_graphs needs CUDA", parameters, "not available")
    part = section(report.render_log([make("baseline")], failures=[missing]), "### Experiment 1")
    assert "Not available: Use_cuda_graphs" in part or "Not available: use_cuda_graphs" in part
    assert "Failed:" not in part
    assert re.search(r"\| SS Mean \| [\d.]+ ms \| n/a \(not available\) \| n/a \|", part)


def test_unknown_state_of_the_tree_is_told():
    """Would catch a bare commit where nobody knows whether the code was that commit's."""
    for dirty, words in ((None, " (state of the tree unknown), run"), (True, " with uncommitted changes, "),
                         (False, "0123456789ab, run of")):
        run = make("baseline")
        run["environment"]["git_dirty"] = dirty
        assert words in section(report.render_log([run]), "## Baseline Measurement")


def test_half_a_character_in_a_failure_does_not_stop_the_log(tmp_path):
    """Would catch a campaign without a log, since a prompt that was refused stands in failed.json."""
    folder = campaign_of(tmp_path / "c")
    (folder / "speed" / "failed.json").write_text(
        '{"label": "speed", "meaning": "prompt \\ud83e", "parameters": {"title": "T \\ud83e"}}')
    campaign = report.load(folder)
    assert "prompt \\ud83e" in report.runs_table(campaign)["detail"].tolist()
    assert "Failed: Prompt" in report.write_campaign_log(campaign).read_text()


def test_nothing_that_is_published_names_a_place_of_this_machine(tmp_path, monkeypatch):
    """Would catch home folder, environment or user of whoever measured in a result, a log, an index or a
    report, in whichever message of a library they came. What the run was given must stay as it is.
    """
    home = "/".join(("", "home", "somebody"))
    monkeypatch.setenv("HOME", home)
    message = f"no {ROOT}/outputs/c/x of {ROOT}, ~ {home}/data ({home}), " \
              f"{home}/env/lib/python3.12/site-packages/torch/x.py:3, '/opt/lib/python3.12/ast.py', " \
              "/tmp/ipykernel_12/34.py:1: W, /tmp/torchinductor_somebody/ab/c.py, a/b 1/2 https://x.org/y"
    clean = "no outputs/c/x of ., ~ ~/data (~), torch/x.py:3, 'ast.py', cell:1: W, torchinductor/ab/c.py, " \
            "a/b 1/2 https://x.org/y"
    assert without_places(message) == clean
    baseline = make("baseline")
    baseline["quality"]["lpips"] = na(message, "x")
    baseline["parameters"]["weights"] = f"{ROOT}/weights/tiny"
    folder = tmp_path / "c"
    for label in ("baseline", "speed"):
        (folder / label).mkdir(parents=True)
    write_result(folder / "baseline" / "result.json", baseline)
    (folder / "speed" / "failed.json").write_text(json.dumps({"meaning": message}))  # of an older version
    campaign = report.load(folder)
    assert campaign.results[0]["quality"]["lpips"]["reason"] == clean
    assert campaign.results[0]["parameters"]["weights"] == f"{ROOT}/weights/tiny"
    cell = nbformat.v4.new_code_cell("1", outputs=[
        nbformat.v4.new_output("stream", name="stderr", text=message),
        nbformat.v4.new_output("error", ename="E", evalue=message, traceback=[f"\x1b[31m{message}\x1b[0m"])])
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "notebook.ipynb")
    export_html(tmp_path / "notebook.ipynb", tmp_path / "report.html", title="x")
    write_failure(folder / "balanced", {"meaning": message, "stderr_tail": [message], "parameters": {}})
    published = [report.write_campaign_log(campaign), report.write_index(campaign), tmp_path / "report.html",
                 folder / "balanced" / "failed.json"]
    for path in published:
        text = path.read_text()
        assert "~/data" in text and "somebody" not in text and "site-packages" not in text, path
        assert str(ROOT) not in text, path


def test_a_kept_preset_that_misses_the_target_is_better_than_the_baseline():
    """Would catch 'no reason to prefer it to Baseline' of a preset that is kept for its gain, and a passed
    gate told as the reason against it."""
    quality = make("quality", 0.9, exact=False)
    quality["decision"] |= {"gate": {"exactness": "lossy", "max_error_ratio": 2.0}}
    runs = [make("baseline"), make("baseline", run=2), quality]
    text = report.render_log(runs)
    assert re.search(r"Not Quality, SS max [\d.]+ ms: it misses the 40 ms", text)
    assert "**Preset**: none" in text
    assert "- Quality: where the mean counts more than the worst case (SS max" in text
    runs[0]["environment"] |= {"co_scheduled": True}
    text = report.render_log(runs)
    assert "dB, undecided)" in text and "Not fit for comparison, because something else ran on the " \
        "machine: baseline." in text


def test_undecided_ticks_neither_box_and_is_not_recommended(seven):
    """Would catch a fast preset recommended although nobody could judge its quality."""
    speed = copy.deepcopy(seven[6])
    speed["decision"] = {"keep": None, "rule": "r", "rationale": "undecided: no A/A noise"}
    text = report.render_log([seven[0], speed])
    assert "[ ] Keep  [ ] Drop\nUndecided: no A/A noise." in text
    assert "**Preset**: none" in text and "Not Speed" in text


def test_the_shorter_run_sets_what_is_compared(seven):
    """Would catch a table in which the two columns are of different parts of a stream that drifts."""
    part = section(report.render_log(seven), "### Experiment 2")
    of_both, _ = decision.matched(seven[0], seven[2])
    mean, worst = (of_both["latency"]["ss_ms_per_frame"][key] for key in ("mean", "max"))
    assert f"| SS Mean | {mean:.1f} ms |" in part and f"| SS Max | {worst:.1f} ms |" in part
    assert "- The tables compare the first 12 steady-state blocks and 2 prompt switches of both runs. All " \
        "300 blocks of Baseline: SS mean" in part
    assert "The tables compare" not in report.render_log([make("baseline"), seven[2]])
    ours = seven[2]["latency"]["ss_ms_per_frame"]["mean"]
    table = report.summary_table(seven).set_index("preset")
    assert table.loc["static_kv", "change_ss_mean_pct"] == pytest.approx(100 * (ours / mean - 1))
    slow = make("speed", 0.6, steady=30)
    slow["latency"]["ss_ms_per_frame"]["max"] = 56.1  # in a block that is not compared
    text = report.render_log([make("baseline"), slow])
    assert "the slowest block (56.1 ms per frame) misses the 40 ms target" in text


def test_outcome_tells_where_the_time_went():
    """Would catch stages whose changes do not add up to that of the block, and switches or memory that got
    worse without a word."""
    base, run = make("baseline"), make("async_vae", 0.9)
    run["environment"] |= {"git_commit": "f" * 40}
    run["memory_gb"] |= {"device_used": 12.0}
    part = section(report.render_log([base, run]), "### Experiment 3")
    found = re.search(r"PS mean [\d.]+ ms \((-[\d.]+)%\); .*; peak memory [\d.]+ GB \(-5.1%\)[^\n]*\n.*"
                      r"Per block (-[\d.]+) ms: denoise (-[\d.]+) ms, decode (-[\d.]+) ms, overlap of "
                      r"stages and time outside them ([+-][\d.]+) ms\.", part)
    assert found and float(found[1]) == pytest.approx(-10, abs=1)
    assert sum(map(float, found.groups()[2:])) == pytest.approx(float(found[2]), abs=0.2)
    assert "Run and baseline were not measured together: commit ffffffffffff" in part
    assert "| reserved memory, GB | 11.00 | 10.44 | -5.1% |" in part
    assert "| KV cache, GB | 3.45 | 3.45 | +0.0% |" in part
    assert "| memory in use on the GPU, GB | n/a | 12.00 | n/a |" in part
    assert "GPU clock: 1980 MHz at 120 W before the streams, 1755 MHz at 120 W after, throttled by " in part


@pytest.mark.parametrize("changed", [{"vae": "taew2_1"}, {"use_quantized_vae": True}])
def test_other_frames_are_not_recommended_for_the_error_of_their_latents(changed: dict[str, Any]):
    """Would catch a decoder that the gate does not see recommended, or said to dominate its own latents."""
    runs = [make("baseline", steady=30), make("record", 0.4, exact=False, steady=30),
            make("tiny_vae", 0.3, exact=False, steady=30)]
    runs[2]["parameters"] |= changed
    for run in runs[1:]:
        run["decision"] |= {"keep": True}
    text = report.render_log(runs)
    assert "**Result**: Record is recommended" in text
    assert "- Not Tiny vae" in text and "judge them by eye" in text
    assert "dominated by Tiny" not in text and "- Tiny vae: where latency counts more" in text


def test_the_small_model_recommends_nothing_for_the_large():
    """Would catch a laptop's figures evaluated by what was expected of an H100."""
    runs = [make("baseline"), make("speed", 0.01)]
    text = report.render_log(runs)
    assert "the model tiny" not in text and "meets the 40 ms target" in text
    for result in runs:
        result["model"] = {"name": "tiny"}
    text = report.render_log(runs)
    assert "**Expected**: (for LongLive-1.3B on an H100; this run used the model tiny) Saves" in text
    assert "recommend nothing for LongLive-1.3B" in text and "meets the 40 ms" not in text


def test_decision_is_made_anew_once_the_noise_is_known():
    """Would catch verdicts that stay undecided because the baseline's repeat ran after the preset."""
    baseline, again, speed = make("baseline"), make("baseline", run=2), make("speed", 0.9)
    speed["decision"] = {"keep": None, "rule": "r", "rationale": "undecided",
                         "gate": {"exactness": "lossy", "max_error_ratio": 2.0}}
    assert report.decided([baseline, speed])[1]["decision"]["keep"] is None
    assert report.decided([baseline, again, speed])[2]["decision"]["keep"] is True
    text = report.render_log([baseline, again, speed])
    assert "baseline run twice, over 12 blocks and 2 prompt switches): SS mean" in text


def test_p99_only_with_enough_samples(seven):
    """Would catch the largest of a few samples being sold as a 99th percentile."""
    assert re.search(r"\| SS P99 \| [\d.]+ ms \|", report.render_log(seven[:1]))
    few = make("baseline", steady=100)
    text = report.render_log([few])
    assert re.search(r"\| SS P99 \| n/a: n too small \(n=100\), max [\d.]+ ms \|", text)
    assert "- SS P99 is n/a: n too small for p99" in text


def test_missing_values_say_why():
    """Would catch a null printed as None or 0, and an n/a whose reason and remedy are nowhere."""
    result = make("quality", gpu=None)
    result["quality"]["ssim"] = na("frames differ in size (<b>8x8</b>)", "set `___` | *size*")
    part = section(report.render_log([make("baseline", gpu=None), result]), "### Experiment 4")
    assert "| Memory | n/a (no CUDA device) | n/a (no CUDA device) | n/a |" in part
    assert "- SSIM: n/a (frames differ in size)" in part and "- PSNR: 46.0 dB (worst" in part
    assert r"Frames differ in size (&lt;b&gt;8x8&lt;/b&gt;); set \`\_\_\_\` \| \*size\*." in part
    assert "None" not in part and "___" not in part


def test_what_a_room_did_is_told_in_words():
    """Would catch Python's or JSON's notation in a log for readers, and the same fact told twice."""
    run = make("static_kv")
    run["optimizations"][0]["report"] = {"done": "captured once", "kernel": "captured", "options": {},
                                         "exact": True,
                                 "stats": {"replayed": 12, "capture_s": 1.65653, "memory_bytes": 1965031424}}
    assert "- Optimization static_kv: Captured once; exact on; stats: replayed 12, capture_s 1.66, " \
        "memory_bytes 1.97e9." in report.render_log([run])


def test_what_the_gpu_did_is_told(seven):
    """Would catch: watts and joules in result.json alone; n/a without its reason; a long stream that slows
    down without a word."""
    part = section(report.render_log([make("baseline", steady=50)]), "## Baseline Measurement")
    assert "- GPU during the steady stream, 51 readings: 1800 MHz (1700 to 1900), 650 W (up to 700), up to " \
        "50 C, throttled by sw_power_cap in 50% of the readings. Energy: 38.5 J per video frame, 650 W on " \
        "average, by the GPU's own counter; 38.5 J where every second block is a switch." in part
    assert re.search(r"- Drift: SS mean 6\d\.\d\d ms in the first fifth of the 50 blocks, 6\d\.\d\d in "
                     r"the last \([+-]\d\.\d%\); GPU clock 18\d\d and 17\d\d MHz\.", part)
    unknown = make("baseline")
    unknown["gpu_samples"] = na("the package nvidia-ml-py is not installed", "pip install nvidia-ml-py")
    text = report.render_log([unknown])
    assert "GPU during the streams: n/a, the package nvidia-ml-py is not installed" in text
    assert "Drift:" not in text, "twelve blocks tell none"
    csv = report.summary_table([make("baseline"), unknown])
    assert csv["joules_per_frame"][0] == 38.5 and csv["mean_power_w"][0] == 650.0
    assert report.numbers_table(seven)["energy, J per frame"].tolist() == ["38.5"] * 7


def test_switches_are_told_at_the_edge_and_at_a_random_moment():
    """Would catch: the best case of a request for what a user waits, hits and misses in one."""
    run = make("baseline")
    run["latency"] |= {"ps_by_prompt": {"hit": {"mean": 350.0, "n": 1}, "miss": {"mean": 416.0, "n": 1}},
                       "ps_random_by_prompt": {"hit": {"mean": 500.0, "n": 1}}}
    run["latency"]["ps_ms"] |= {"mean": 383.0}
    run["latency"]["ps_random_ms"] |= {"mean": 534.0, "p95": 690.0}
    text = report.render_log([run])
    assert "- PS mean and PS mean at a random moment by prompt cache: hit 350.0 and 500.0 ms (n=1), miss " \
        "416.0 ms (n=1)." in text and "PS mean 383.0 ms;" in text
    assert "| PS mean at a random moment, ms | 534.0 |" in text
    assert "| PS p95 at a random moment, ms | 690.0 |" in text
    assert re.search(r"With a switch at every second block: \d+\.\d FPS, mean", text)


def test_results_from_before_the_new_figures_are_read(tmp_path):
    """Would catch: the shipped campaign unreadable, or told as if its frames had come to the host."""
    old = make("baseline")
    for key in ("frames_on", "gpu_samples", "energy", "fps_with_switches"):
        del old[key]
    for key in ("ps_random_ms", "ps_before_ms_all"):
        del old["latency"][key]
    write_result(tmp_path / "c" / "baseline" / "result.json", old)
    campaign = report.load(tmp_path / "c")
    assert not campaign.problems
    text = report.render_log(campaign.results)
    assert "frames complete on the device, not in host memory" in text
    assert "at a random moment, derived" not in text
    assert "not yet in host memory" not in report.render_log([make("baseline")])
    assert re.search(r"With a switch at every second block: \d+\.\d FPS, mean", text)
    assert report.summary_table(campaign.results)["joules_per_frame"].isna().all()
    assert charts.run_figures(old)["gpu_load"].alt.endswith("Not drawn: no readings in these results.")
    assert "energy" not in conclusion_html(old, None)


def test_what_others_measured_is_in_log_and_readme():
    """Would catch: gains against an own re-implementation only, and two homes for one fact."""
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    for measured in outside.MEASURED:
        assert measured.sentence() in readme
    text = report.render_log([make("baseline")])
    assert "20.7 FPS (apparently without the VAE)" in text and "491 + 278 ms per block" in text
    assert "536 + 276" in text and "519 ms per block without the VAE" in text
    small = make("baseline")
    small["model"]["name"] = "tiny"
    assert "20.7 FPS" not in report.render_log([small])


def test_the_gpus_chart_takes_what_is_there(seven):
    """Would catch: a chart that needs every reading, or that two presets share a lane unnamed."""
    silent, none = copy.deepcopy(seven[1]), copy.deepcopy(seven[2])
    silent["gpu_samples"]["sm_mhz"] = [None] * 51
    none["gpu_samples"] = na("the run was on cpu", "run on a GPU")
    chart = charts.run_figures(silent, seven[0])["gpu_load"]
    assert chart.alt.endswith("baseline 1800, 650, 38.5; cuda_graphs n/a, 650, 38.5.")
    clock, power = chart.axes
    assert len([text for text in clock.texts if text.arrow_patch]) == 1
    assert len([text for text in power.texts if text.arrow_patch]) == 2
    assert "dashed: the limit of 700 W" in power.get_xlabel()
    assert "the run was on cpu" in charts.run_figures(none)["gpu_load"].alt


def test_incomparable_runs_have_no_change():
    """Would catch percentages between two machines."""
    text = report.render_log([make("baseline"), make("static_kv", gpu="NVIDIA H200")])
    assert re.search(r"\| SS Mean \| [\d.]+ ms \| [\d.]+ ms \| n/a \|", text)
    assert "not comparable with the baseline, environment.gpu" in text


def test_differing_configuration_is_named():
    """Would catch a run of other parameters hiding behind the template's configuration block."""
    result = make("async_vae")
    result["parameters"]["use_async_vae"] = False
    assert "run with use_async_vae false, not true" in report.render_log([result])


def test_extra_presets_get_sections_and_rows():
    """Would catch an ablation that was measured but does not appear, or that breaks the numbering."""
    extra = make("low_memory")
    extra["title"] = "Low | memory <i>"
    extra["parameters"]["local_attn_size"] = 9
    extra["notes"] = ["an oddity"]
    text = report.render_log([make("baseline"), extra])
    part = section(text, "### Experiment 7: Low \\| memory &lt;i&gt;")
    assert "local_attn_size: 9" in part and "- An oddity." in part and "___" not in part
    assert text.index("### Experiment 6") < text.index("### Experiment 7") < text.index("## Summary Table")
    assert re.search(r"(?m)^\| Low \\\| memory &lt;i&gt; \| [\d.]+ms \|", text)
    assert headings(text[:text.index("### Experiment 7")]) == headings(TEMPLATE)[:10]


def test_variations_are_told_with_their_figures():
    """An ablation that stands in result.json alone is not read by anybody."""
    parts = ("latency", "fps", "memory_gb", "quality")
    result = make("realtime")
    nine = {key: make("realtime", 0.7)[key] for key in parts} | {"changed": {"local_attn_size": 9}}
    failed = {"changed": {"denoising_steps": [1000]}, "failure": na("out of memory", "take a larger GPU")}
    text = report.render_log([make("baseline"), result | {"ablations": [nine, failed]}])
    part = section(text, "### Experiment 7: Realtime")
    mean = nine["latency"]["ss_ms_per_frame"]["mean"]
    assert re.search(rf"  - local_attn_size: 9: SS mean {mean:.1f} ms per frame; SS max .*; "
                     r"peak memory 7.9\d* GB", part)
    assert "  - denoising_steps: \\[1000\\]: SS mean n/a (out of memory);" in part
    assert "one key changed" not in report.render_log([make("baseline"), result])


ADHERENCE = {"label": "read from the frames", "adherence_before": 0.975, "adherence_after": 0.75,
         "delay_blocks": 1.5, "switches": 3, "never": 1, "permanence": 1.0, "wrong": ["red circle: motion"],
         "not_evaluated": ["blue star: letter"], "segments": []}


def test_world_is_told_per_run_and_tabled():
    """Would catch a prompt that a preset breaks standing in result.json alone, and a number where one could
    not evaluate."""
    evaluated, other = make("quality") | {"adherence": ADHERENCE}, make("speed")
    other["adherence"] = na("a prompt is not of Moving Shapes: 'a_fox'", "write another")
    other["model"] = {"name": "tiny"}
    large = make("static_kv") | {"adherence": other["adherence"]}
    never = make("balanced") | {"adherence": ADHERENCE | {"delay_blocks": na("never came", "look"),
                                                          "never": 3}}
    runs = [make("baseline"), evaluated, never, other, large]
    text = report.render_log(runs)
    part = section(text, "### Experiment 4")
    assert ("Moving Shapes: prompt adherence 0.975 before a prompt switch and 0.750 from the second block "
            "after it on, switch delay in blocks 1.5 (1 of 3 switches never came), object permanence 1.000"
            ) in part
    assert "Wrong: red circle: motion. Not evaluated: blue star: letter." in part
    assert "switch delay in blocks n/a (never came) (3 of 3" in section(text, "### Experiment 5")
    why = "- Moving Shapes: n/a, a prompt is not of .*; write another\\."
    assert re.search(why, section(text, "### Experiment 6"))
    assert "Moving Shapes" not in section(text, "### Experiment 2")
    assert "Moving Shapes" not in section(text, "## Baseline Measurement")
    assert headings(text) == headings(TEMPLATE)
    numbers = report.summary_table(runs).set_index("preset")
    assert numbers.loc["quality", "adherence_after"] == 0.75 and numbers.loc["quality",
                                                                             "adherence_never"] == 1
    assert numbers.loc[["baseline", "speed"], "adherence_after"].isna().all()
    table = report.adherence_table(runs).set_index("preset")
    assert table.loc["quality", "switch delay, blocks"] == "1.5, 1 of 3 never"
    assert table.loc["speed", "permanence"].startswith("n/a (a prompt is not of")
    assert table.loc["baseline", "adherence after"] == "n/a (not evaluated)"


def test_without_a_judged_run_there_is_no_world(seven):
    """Would catch empty columns in every campaign of the large model."""
    results = [*seven, make("speed", run=2) | {"adherence": na("not of Moving Shapes", "nothing")}]
    assert report.adherence_table(results) is None and report.adherence_table([]) is None
    assert not [name for name in report.summary_table(results) if "adherence" in name]


def test_user_text_cannot_change_the_log():
    """Would catch HTML, markup, table cells or new lines from a preset's hypothesis."""
    result = make("baseline")
    result["hypothesis"] = "<script>x</script>\n## Heading | ___ [a](http://b) use_static_kv"
    text = report.render_log([result])
    assert "<script>" not in text and headings(text) == headings(TEMPLATE)
    assert r"&lt;script&gt;x&lt;/script&gt; ## Heading \| \_\_\_ \[a\](http://b) use_static_kv" in text


def campaign_of(folder: Path) -> Path:
    write_result(folder / "baseline" / "result.json", make("baseline"))
    write_result(folder / "balanced" / "result.json", make("balanced"))
    (folder / "truncated").mkdir()
    (folder / "truncated" / "result.json").write_text('{"schema_version": 1, "sta')
    (folder / "old").mkdir()
    (folder / "old" / "result.json").write_text('{"schema_version": 0, "status": "ok"}')
    for place, label in (("speed", "speed"), ("balanced.failed", "balanced"), ("summary", "summary")):
        (folder / place).mkdir()
        (folder / place / "notebook.ipynb").touch()
        (folder / place / "failed.json").write_text(json.dumps(
            {"label": label, "meaning": "out of memory <b>", "parameters": {"name": label, "title": "T"}}))
    return folder


def test_campaign_lists_failures_and_problems(tmp_path):
    """Would catch one bad file stopping the report, a failed preset passing for one not run, and paths of the
    machine in a log that is published."""
    campaign = report.load(campaign_of(tmp_path / "c"))
    assert [result["preset"] for result in campaign.results] == ["baseline", "balanced"]
    assert [failure.label for failure in campaign.failures] == ["balanced", "speed"]
    assert {place for place, _ in campaign.problems} == {"truncated/result.json", "old/result.json"}
    text = report.write_campaign_log(campaign).read_text()
    part = section(text, "### Experiment 6")
    assert "| SS Mean | 61." in part and "n/a (failed) | n/a |" in part and "___" not in part
    assert "Failed: Out of memory &lt;b&gt;." in part
    assert "| Speed | n/a (failed) |" in text and re.search(r"\| Balanced \| [\d.]+ms", text)
    assert "Not usable: truncated/result.json: Is not JSON" in text and str(tmp_path) not in text
    assert list(report.runs_table(campaign)["status"]) == ["ok"] * 2 + ["failed"] * 2 + ["not usable"] * 2


def test_a_campaign_shows_its_table(tmp_path):
    """Pages of raw JSON where a notebook shows a campaign."""
    campaign = report.load(campaign_of(tmp_path / "c"))
    assert repr(campaign) == "Campaign(c: baseline, balanced; 2 failed; 2 not usable)"
    html = campaign._repr_html_()
    assert "SS mean" in html and "out of memory &lt;b&gt;" in html and len(html) < 6000


def test_command_line_writes_log_table_and_figures(tmp_path, capsys):
    """Would catch a command that needs the notebook, and a log that differs from run to run."""
    folder = campaign_of(tmp_path / "c")
    assert main([str(folder)]) == 0
    first = (folder / report.LOG_NAME).read_bytes()
    again = report.write_campaign_log(report.load(folder), tmp_path / "x" / "LOG.md")
    assert again.read_bytes() == first.replace(b"report c`", b"report c --log LOG.md`") != first
    assert {path.stem for path in (folder / "summary").glob("*.png")} == set(charts.campaign_figures([]))
    header = (folder / "summary" / "summary.csv").read_text().splitlines()[0]
    assert header.startswith("preset,run,ss_mean_ms,")
    assert main([str(tmp_path / "nowhere")]) == 2 and "nowhere" in capsys.readouterr().err
    with pytest.raises(UserError):
        report.load(tmp_path / "nowhere")


def test_tables(seven):
    """Would catch an n/a that becomes a number, and a repeat mistaken for a preset of its own."""
    table = report.summary_table([*seven, make("baseline", run=2)])
    assert len(table) == 8 and table["change_ss_mean_pct"][0] == 0
    assert table["ss_p99_ms"].notna().sum() == 1 and table["lpips"].isna().all()
    assert list(report.noise_table([*seven, make("baseline", run=2)])["preset"]) == ["baseline"]
    assert report.noise_table(seven).empty and report.summary_table([]).empty


def test_csv_has_no_buffer_where_playback_is_not_sustained(tmp_path):
    """Would catch the length of a stream that is too slow sold as a start-up buffer."""
    results = [make("baseline"), make("speed"), make("quality")]
    results[2]["playback"] = na("no chunk times", "run it again")
    assert results[0]["playback"]["startup_buffer_ms"] > 1000
    with report.to_csv(results, tmp_path / "summary.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["sustained"] for row in rows] == ["False", "True", ""]
    assert rows[0]["startup_buffer_ms"] == rows[2]["startup_buffer_ms"] == ""
    assert float(rows[1]["startup_buffer_ms"]) == results[1]["playback"]["startup_buffer_ms"]


def test_numbers_for_readers_say_what_is_no_number(seven):
    """Would catch nan and None in the table, frames that look identical and are not, and a start-up buffer
    that only tells how long the stream was."""
    slow = make("static_kv", exact=True)
    slow["playback"] |= {"sustained": False, "startup_buffer_ms": 13760.4}
    slow["playback"]["switch_stream"] = dict(slow["playback"])
    near = make("speed", scale=0.1)
    old = make("cuda_graphs", exact=True)
    old["quality"] |= {"protocol": "one block"}
    near["playback"] |= {"sustained": True, "startup_buffer_ms": 0.0,
                         "switch_stream": {"sustained": True, "startup_buffer_ms": 271.0}}
    table = report.numbers_table([seven[0], slow, near, old]).set_index("preset")
    assert table.loc["static_kv", ["error ratio", "PSNR, dB", "start-up buffer"]].tolist() == \
        ["identical", "46.0", "too slow"]
    assert table.loc["speed", ["error ratio", "PSNR, dB"]].tolist() == ["1.30", "43.6"]
    assert table.loc["cuda_graphs", "PSNR, dB"] == "identical"
    assert table.loc["speed", "start-up buffer"] == "0 s / 0.27 s"
    assert table.loc["baseline", ["error ratio", "PSNR, dB"]].tolist() == ["reference", "46.0"]
    assert table.shape[1] <= 13
    assert not table.map(str).isin(["nan", "None"]).any(axis=None)
    assert report.numbers_table([]).set_index(["preset", "run"]).empty


def test_figures_take_any_number_of_presets(seven):
    """Would catch a chart that needs the baseline, a second preset or a known name."""
    strange = make("costs $5 and $")
    for results in ([], [*seven, strange, make("fp8"), make("low_memory")]):
        for name, chart in charts.campaign_figures(results).items():
            picture, metadata = chart._repr_png_()
            assert picture.startswith(b"\x89PNG"), name
            assert metadata["alt"].endswith(".") and ". " in metadata["alt"].replace("? ", ". "), name
    assert len({charts.colour_of(preset) for preset in SCALES}) == len(SCALES)


def test_every_preset_keeps_its_colour():
    """Would catch a palette that gives a thin line the colour of another preset, presets without a colour of
    their own, and colours of presets that are gone."""
    presets = [path.stem for path in (ROOT / "params").glob("*.yaml") if path.stem != "smoke"]
    assert set(charts.PRESET_COLOURS) == set(presets)
    results = [make(preset, scale=0.94**index) for index, preset in enumerate(presets)]
    for draw in (charts.latency_ecdf, charts.pareto, charts.latency_by_block):
        picture = Image.open(io.BytesIO(draw(results)._repr_png_()[0]))
        found = {colour for _, colour in picture.convert("RGB").getcolors(1 << 24)}
        assert {tuple(bytes.fromhex(colour[1:])) for colour in charts.PRESET_COLOURS.values()} <= found


# Machado, Oliveira and Fernandes, "A physiologically-based model for simulation of color vision deficiency"
# (2009), severity 1, in linear sRGB; the last is normal sight.
SIGHT = {"deuteranopia": [[.367322, .860646, -.227968], [.280085, .672501, .047413],
                          [-.011820, .042940, .968881]],
         "protanopia": [[.152286, 1.052583, -.204868], [.114503, .786281, .099216],
                        [-.003882, -.048116, 1.051998]],
         "normal": np.eye(3).tolist()}


def cielab(colour: str, sight: str) -> np.ndarray:
    """(L, a, b) under D65 of a colour as the eye of `sight` has it."""
    srgb = np.array(list(bytes.fromhex(colour[1:]))) / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055)**2.4)
    seen = np.clip(np.array(SIGHT[sight]) @ linear, 0, 1)
    xyz = np.array([[.4124564, .3575761, .1804375], [.2126729, .7151522, .0721750],
                    [.0193339, .1191920, .9503041]]) @ seen / (0.95047, 1, 1.08883)
    f = np.where(xyz > (6 / 29)**3, np.cbrt(xyz), xyz / (3 * (6 / 29)**2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("sight", SIGHT)
@pytest.mark.parametrize("palette", [charts.PRESET_COLOURS, STAGE_COLOURS], ids=["presets", "stages"])
def test_colours_differ_for_every_eye(palette, sight):
    """Would catch two presets, or two stages of a bar, that one reader in twenty cannot tell from each other.
    A difference of 2.3 (CIE 1976) is just noticeable; 12 is five times that."""
    seen = {name: cielab(colour, sight) for name, colour in palette.items()}
    near = {(a, b): round(float(np.linalg.norm(seen[a] - seen[b])), 1)
            for a, b in itertools.combinations(seen, 2)}
    assert {pair: distance for pair, distance in near.items() if distance < 12} == {}


def test_a_preset_on_several_gpus_is_a_darker_one_of_its_own():
    """Would catch two presets on two GPUs in one colour."""
    colours = {name: charts.colour_of(name) for preset in charts.PRESET_COLOURS
               for name in (preset, f"{preset}_2gpus", f"{preset}_4gpus")}
    assert len(set(colours.values())) == len(colours)
    for preset in charts.PRESET_COLOURS:
        one, two, four = (cielab(colours[preset + end], "normal")[0] for end in ("", "_2gpus", "_4gpus"))
        assert four < two < one


def test_presets_names_can_be_read_on_white():
    """Would catch a name in the colour of its line that fades into the paper (WCAG: 3 to 1)."""
    for preset, colour in charts.PRESET_COLOURS.items():
        lightness = cielab(colour, "normal")[0]
        luminance = ((lightness + 16) / 116)**3
        assert 1.05 / (luminance + 0.05) >= 3, preset


def test_stages_that_overlap_stay_within_the_interval():
    """Would catch bars longer than the block they are part of."""
    result = make("async_vae")
    result["latency"]["ss_block_ms"] = [500.0] * 300
    bars = charts.stage_bars([make("baseline"), result]).axes[0].patches
    decode = [bar for bar in bars if bar.get_height() < 0.5]
    assert len(decode) == 1 and decode[0].get_x() + decode[0].get_width() == pytest.approx(500)


@pytest.mark.parametrize(("preset", "stages"), [("speed", {"denoise": 450.0, "decode": 550.0}),
                                                ("baseline", {"denoise": 900.0, "decode": 900.0})])
def test_waterfall_shows_every_level(preset, stages):
    """Would catch bars cut off where stages that overlap lead above both ends or below 0."""
    results = [make("baseline"), make("speed")]
    for name, mean in stages.items():
        results[preset == "speed"]["latency"]["stages_ms"][name]["mean"] = mean
    figure = charts.waterfall(results)
    figure.draw_without_rendering()
    ax = figure.axes[0]
    (low, high), inside = ax.get_ylim(), ax.get_window_extent()
    reached = [edge for bar in ax.patches for edge in (bar.get_y(), bar.get_y() + bar.get_height())]
    assert min(reached) < 0 or max(reached) > 1.2 * ax.patches[0].get_height()  # the case is there
    assert low <= min(reached) and max(reached) < high
    assert all(text.get_window_extent().y1 < inside.y1 for text in ax.texts)


def test_names_of_points_keep_off_lines_and_one_another():
    """Would catch a name under a line that joins the points."""
    results = [make("baseline"), make("speed", scale=0.5), make("quality", scale=0.8)]
    figure = charts.pareto(results)
    ax = figure.axes[0]
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in ax.texts if "target" not in text.get_text()]
    front = np.concatenate([along(line) for line in ax.get_lines()])
    assert len(boxes) == 3 and not any(box.contains(*point) for box in boxes for point in front)
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def test_names_of_curves_keep_off_them():
    """Would catch a name across another preset's curve or the target, names in no order, and a name that a
    legend leaves out for its underscore."""
    results = [make("speed", scale=0.51), make("baseline"), make("realtime", scale=0.41, steady=300),
               make("_balanced", scale=0.54), make("quality", scale=0.68), make("low_memory", scale=0.8)]
    figure = charts.latency_ecdf(results)
    figure.draw_without_rendering()
    ax, names = figure.axes[0], [text for legend in figure.legends for text in legend.get_texts()]
    boxes = [text.get_window_extent() for text in (*ax.texts, *names)]
    lines = np.concatenate([along(line) for line in ax.get_lines()])
    assert len(boxes) == len(ax.get_lines()) == len(results) + 1  # the target as well
    assert not any(box.contains(*point) for box in boxes for point in lines)
    assert [text.get_text().split()[1] for text in names] == \
        ["realtime", "speed", "_balanced", "quality", "low_memory", "baseline"]


def test_playback_compares_streams_of_unequal_length():
    """Would catch the fastest preset named below a slower one whose stream was longer."""
    slower, fastest = make("speed", scale=0.5, steady=60), make("realtime", scale=0.4, steady=20, switches=1)
    chart = charts.campaign_figures([slower, fastest])["playback_buffer"]
    ax = chart.axes[0]
    chunks = [(line.get_linestyle(), len(line.get_xdata())) for line in ax.get_lines()[:4]]
    assert chunks == [("-", 21)] * 2 + [("--", 3)] * 2
    above, below = sorted((text for text in ax.texts if "buffer" in text.get_text()),
                          key=lambda text: -text.get_position()[1])
    assert above.get_text().startswith("realtime") and below.get_text().startswith("speed")
    assert "first 20 blocks of each stream" in ax.get_xlabel() and "first 2 blocks" in ax.get_xlabel()
    assert "first 20 blocks of each stream" in chart.alt


def test_leaders_begin_beside_their_name():
    """Would catch a leader that starts in the middle of its name and strikes the names above and below."""
    results = [make("baseline"), make("speed", scale=0.99), make("quality", scale=0.98)]
    chart = charts.latency_by_block(results)
    named = [text for text in chart.axes[0].texts if text.arrow_patch]
    assert len(named) >= 3 and all(text._arrow_relpos == (0, 0.5) for text in named)


@pytest.mark.parametrize("path", [
    "events", "switch_events", "latency", "latency.ss_block_ms", "latency.ss_blocks", "latency.stages_ms",
    "gpu_samples", "gpu_samples.sm_mhz", "gpu_samples.t_s", "energy", "latency.ps_ms", "playback",
    "quality.psnr_db", "sizes"])
def test_figures_survive_missing_parts(seven, path):
    """Would catch a figure that takes the report down with it because one field is null or absent."""
    *parents, last = path.split(".")
    whole, null = seven[6], copy.deepcopy(seven[6])
    place = null
    for key in parents:
        place = place[key]
    place[last] = None
    absent = copy.deepcopy(null)
    place = absent
    for key in parents:
        place = place[key]
    del place[last]
    assert charts.run_figures(null).keys() == charts.run_figures(whole).keys()
    for draw in (charts.pareto, charts.latency_boxes, charts.waterfall):
        assert isinstance(draw([seven[0], absent]), charts.Chart)


def test_names_of_lines_never_overlap():
    """Would catch names printed on top of each other where lines end close together."""
    moved = spread([0.1, 0.1, 0.11, 0.5, 0.98, 0.99], 0.05)
    assert all(b - a >= 0.05 - 1e-9 for a, b in zip(moved, moved[1:], strict=False))
    assert moved[3] == 0.5


def test_summary_notebook_is_thin_and_clean():
    """Would catch outputs, code that belongs into the library, or a parameters cell that papermill misses."""
    notebook = nbformat.read(ROOT / "notebooks" / "99_summary.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    tagged = [cell for cell in code if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1 and tagged[0].source.startswith('campaign_dir = "outputs/demo"')
    for cell in code:
        assert not cell.outputs and cell.execution_count is None
        assert len(cell.source.split("\n")) <= 5
        assert not re.search(r"(?m)^\s*(def|class|for|while|with)\b|Path\(", cell.source)


def test_summary_notebook_runs(tmp_path, monkeypatch):
    """Would catch a cell that calls what the library does not have; runs the cells without a kernel."""
    folder = campaign_of(tmp_path / "c")
    notebook = nbformat.read(ROOT / "notebooks" / "99_summary.ipynb", as_version=4)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            exec(cell.source, names)
            if "parameters" in cell.metadata.get("tags", []):
                names["campaign_dir"] = str(folder)
    assert (folder / report.LOG_NAME).is_file() and (folder / "summary" / "pareto.png").is_file()
