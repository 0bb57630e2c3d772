"""The report on the training: what it makes of a log and a check, and what it says where they are missing."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import pytest
from IPython.display import HTML

from longlive_opt.errors import UserError
from longlive_opt.report.charts import Chart
from longlive_opt.tiny import training_report
from longlive_opt.tiny.training_report import (
    TrainingReport,
    ablation_chart,
    ablation_table,
    check_table,
    compare_conclusions,
    compare_table,
    conclusions,
    conditions,
    loss_chart,
    read_check,
    read_log,
    stage_table,
)

ROOT = Path(training_report.__file__).resolve().parents[3]
CURVES = {"vae": {"loss": 1.0, "l1": 0.6, "kl": 2.0}, "text": {"reading": 1.5, "read_right": 0.3},
          "teacher": {"flow": 2.0, "switch_flow": 2.1, "read_right": 0.5},
          "student": {"true": 0.05, "stream": 0.09}}


def row(stage: str, step: int, share: float, **more: Any) -> dict[str, Any]:
    """A line as `training.loop.run_stage` writes it, its curves at `share` of their start."""
    curves = {key: value * share for key, value in CURVES[stage].items()}
    return {"stage": stage, **curves, "gradient": 1.0, "step": float(step), "progress": step / 1000,
            "ms_per_step": 60.0, **more}


def part(after: float, last: float, videos: int = 12) -> dict[str, Any]:
    return {"switch": {"videos": videos, "adherence": after, "later_adherence": after, "delay_blocks": 1.5,
                       "permanence": 0.98, "old_left": round(1 - after, 2)},
            "long": {"videos": videos // 4, "first": 0.95, "last": last, "permanence": 0.97,
                     "in_place": last}}


def checked(**more: Any) -> dict[str, Any]:
    """A check as `evaluate.check_weights` writes it."""
    variants = {"no_sink": part(0.88, 0.4), "no_recache": part(0.5, 0.94), "window_6": part(0.85, 0.8)}
    return {"weights": "tiny", "device": "cuda", "model": "tiny", "dtype": "bfloat16", "seed": 0,
            "sizes": {"plain": 32}, "plain": {"videos": 32, "adherence": 0.93, "permanence": 1.0},
            **part(0.84, 0.9, 24), "variants": variants, **more}


def write(folder: Path, rows: list[dict[str, Any]] | str = "", check: Any = None) -> Path:
    (folder / "training").mkdir(parents=True, exist_ok=True)
    if rows:
        lines = rows if isinstance(rows, str) else "".join(json.dumps(one) + "\n" for one in rows)
        (folder / "training" / "log.jsonl").write_text(lines)
    if check is not None:
        (folder / "check.json").write_text(check if isinstance(check, str) else json.dumps(check))
    return folder


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    rows = [row(stage, step, 1.0 - 0.9 * step / 1000) for stage in CURVES for step in range(50, 1001, 50)]
    return write(tmp_path / "tiny", rows, checked())


def test_stages_and_their_cost(trained: Path) -> None:
    """Minutes counted per line instead of per step, or the first value taken for the last."""
    table = stage_table(read_log(trained))
    assert list(table.index) == ["VAE", "text encoder alone", "teacher", "student"]
    assert set(table["steps"]) == {1000} and set(table["minutes"]) == {1.0}
    assert set(table["ms per step"]) == {60.0} and set(table["progress"]) == {1.0}
    assert "pixels, L1 0.573 to 0.0735" in table.loc["VAE", "from, to"]


def test_steps_made_twice_count_once(tmp_path: Path) -> None:
    """A stage that was cut off and resumed from an older checkpoint: minutes too many, a curve that goes
    back."""
    rows = [row("vae", step, 1.0) for step in (50, 100, 150)]
    again = [row("vae", step, 0.5) for step in (100, 150, 200)]
    kept = read_log(write(tmp_path, rows + again))
    assert [(one["step"], one["loss"]) for one in kept] == [(50, 1.0), (100, 0.5), (150, 0.5), (200, 0.5)]
    assert stage_table(kept).loc["VAE", "minutes"] == 0.2


def test_a_resumption_costs_what_it_took(tmp_path: Path) -> None:
    """The slow first steps after a resumption counted for all steps since the line before it."""
    rows = [row("vae", step, 1.0) for step in range(50, 1001, 50)]
    rows[10]["ms_per_step"] = 4000.0
    assert stage_table(read_log(write(tmp_path, rows))).loc["VAE", "minutes"] == 1.0


def test_figures_against_targets(trained: Path) -> None:
    """A target that is met the wrong way round, or that n/a meets."""
    table = check_table(read_check(trained)).set_index("metric")
    met = {name: value for name, value in table["met"].items() if value}
    assert list(met.values()) == ["yes", "no", "yes"]
    assert list(table["target"][:3]) == [">= 0.90", ">= 0.85", "<= 0.05"]
    assert table.loc["adherence lost over 60 s (first 5 s minus last 5 s)", "value"] == "0.050 ± 0.19"
    assert table.loc["switches whose new scene never came", "value"] == "0 of 24"
    assert list(table["videos"][:3]) == [32, 24, 6]


def test_what_was_not_measured_meets_no_target(tmp_path: Path) -> None:
    """A quick check without long videos passes for a model without drift."""
    quick = checked(long=None, switch={"videos": 1, "adherence": 0.1, "later_adherence": 0.1,
                                       "delay_blocks": None, "delay_blocks_never": 1, "permanence": 0.9})
    table = check_table(read_check(write(tmp_path, check=quick))).set_index("metric")
    assert table.loc["adherence lost over 60 s (first 5 s minus last 5 s)", "met"] == "not measured"
    assert table.loc["switch delay in blocks, where the new scene came", "value"] == "none came"


def test_ablation_beside_the_full_model(trained: Path) -> None:
    """A variant under another's name, or a comparison that hides how few videos it rests on."""
    check = read_check(trained)
    table = ablation_table(check)
    assert list(table.index) == ["full model", "no sink", "no recache", "window of 6 latent frames"]
    assert list(table["videos"]) == ["24", "12", "12", "12"]
    assert table.loc["no recache", "second block after a switch"] == "0.500 ± 0.13"
    assert table.loc["no sink", "lost over 60 s"].startswith("0.550 ±")
    assert table.loc["no sink", "in place"].startswith("0.400 ±")
    assert table.loc["no recache", "old prompt left"].startswith("0.500 ±")
    assert table.loc["no recache", "delay, blocks"] == "1.5" and table.loc["no recache", "never"] == "0 of 12"
    same = checked(variants={"full": part(0.9, 0.9), "window_6": part(0.85, 0.8)})
    assert list(ablation_table(same).index)[1:] == ["full model, on the videos of the windows",
                                                    "window of 6 latent frames"]
    alone = ablation_table(read_check(write(trained, check=checked(variants={}, long=None))))
    assert list(alone.index) == ["full model"] and alone.loc["full model", "lost over 60 s"] == ""
    assert conditions(check) == "Checked: tiny; device cuda, model tiny, dtype bfloat16, seed 0."
    machine = {"gpu": "H100", "cpu": None, "git_commit": "a1b2", "packages": {"a": "1"}}
    measured = check | {"environment": machine}
    assert conditions(measured).endswith(" seed 0, gpu H100, git commit a1b2.")


def test_conclusions_name_what_exceeds_its_error() -> None:
    """A difference of few videos, or two switches against none, told as a finding; a target met by less
    than the error told as reached."""
    check = checked(variants={"no_recache": part(0.3, 0.9, 36), "window_6": part(0.8, 0.8, 12),
                              "full": part(0.3, 0.9, 12)})
    check["switch"] |= {"delay_blocks_never": 2}
    for one in (check, *check["variants"].values()):
        one["long"]["lost"] = round(one["long"]["first"] - one["long"]["last"], 4)
    lines = conclusions(check)
    assert len(lines) == 5
    assert "is met, by less than the error: 0.930 ± 0.05." in lines[0]
    assert "is missed, by less than the error" in lines[1]
    assert "second block after a switch 0.300 ± 0.08 against 0.840" in lines[3] and "never" not in lines[3]
    assert "against 0.300" in lines[4], "the windows were compared with other videos"
    check["switch"] |= {"adherence_se": 0.3, "delay_blocks_se": 0.01}
    check["variants"]["no_recache"]["switch"] |= {"delay_blocks": 2.5, "delay_blocks_se": 0.1}
    line = conclusions(check)[3]
    assert "second block" not in line and "delay, blocks 2.500 ± 0.10 against" in line
    untold = conclusions(checked(long=None, variants={}))
    assert untold[2].endswith("was not measured.")


def test_few_videos_conclude_nothing() -> None:
    """Three videos that happen to agree, told as what a window of 6 does, as a target reached, or as what
    another training does differently.
    """
    few = part(0.8, 0.8)
    few["switch"] |= {"delay_blocks_never": 3}
    few["long"] |= {"lost": -0.083, "lost_change": -0.083, "lost_change_se": 0.0096}
    full = part(0.8, 0.8)
    full["long"]["lost"] = 0.0
    check = checked(variants={"window_6": few, "full": full}, plain={"videos": 9, "adherence": 0.93})
    line = conclusions(check)[-1]
    found, left = line.split(" Fewer than 10 videos, too few to say: ")
    assert found.endswith(": nothing.")
    assert left == "delay, blocks; first 5 s; last 5 s; lost over 60 s; in place."
    assert conclusions(check)[0].endswith(", on 9 videos, too few to say: 0.930 ± 0.11.")
    few["long"]["videos"] = full["long"]["videos"] = 10
    assert "lost over 60 s -0.083" in conclusions(check)[-1]
    other = checked(plain={"videos": 32, "adherence": 0.2, "adherence_se": 0.01})
    assert "0.200 ± 0.01" not in compare_conclusions(check, other)[0]
    other["plain"]["videos"] = check["plain"]["videos"] = 10
    assert "0.200 ± 0.01" in compare_conclusions(check, other)[0]


def test_a_curve_that_begins_later_names_its_step(trained: Path) -> None:
    """A question mark where a first value was."""
    rows = [one for one in read_log(trained) if one["stage"] == "teacher"]
    for one in rows[:5]:
        del one["switch_flow"]
    assert "flow after a switch 1.53 to 0.2" in (words := stage_table(rows).loc["teacher", "from, to"])
    assert "(from step 300)" in words and "?" not in words


def test_curves_are_logarithmic_where_they_fall_far(trained: Path) -> None:
    """A loss that looks flat after its first tenth; a share near one on a logarithmic scale."""
    rows = read_log(trained)
    vae, right = loss_chart([one for one in rows if one["stage"] == "vae"]), \
        loss_chart([one | {"read_right": 0.9} for one in rows if one["stage"] == "text"])
    assert [ax.get_yscale() for ax in vae.axes] == ["log", "linear"]
    assert [ax.get_title(loc="left") for ax in right.axes] == \
        ["text encoder alone: losses", "norm of the gradient", "share read correctly"]
    assert right.axes[2].get_yscale() == "linear"
    for chart in (vae, right, ablation_chart(read_check(trained)), loss_chart([row("vae", 50, 0.0)])):
        picture, metadata = chart._repr_png_()
        assert picture.startswith(b"\x89PNG") and metadata["alt"].endswith(".")


@pytest.mark.parametrize("line", ['{"stage": "vae", "lo', "[]", '{"stage": "vae"}', "", "NaN",
                                  '{"stage": "vae", "step": 1, "progress": 0, "ms_per_step": 1, "l1": NaN}',
                                  '{"stage": "vae", "step": 1, "progress": 0, "ms_per_step": 1, "l1": "x"}'])
def test_damaged_log_names_its_line(tmp_path: Path, line: str) -> None:
    """A line that was cut off by a kill: a traceback, or a curve that silently lacks it."""
    write(tmp_path / "w", json.dumps(row("vae", 50, 1.0)) + f"\n{line}\n" + json.dumps(row("vae", 100, 1.0)))
    with pytest.raises(UserError, match=r"log.jsonl: line 2 is damaged.*longlive_opt.tiny.training --out w "):
        read_log(tmp_path / "w", "w")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"plain": {"videos": 2', '{"variants": {"no_sink": 3}}'])
def test_damaged_check_names_its_command(tmp_path: Path, text: str) -> None:
    """An empty table that looks like a check in which nothing was measured."""
    (tmp_path / "check.json").write_text(text)
    with pytest.raises(UserError, match=r"check.json: is damaged.*--out w --device cuda --stage check"):
        read_check(tmp_path, "w")


def test_changes_of_the_same_videos_decide() -> None:
    """A difference that every video shows, lost in the spread of the scenes; one that is none, told."""
    check = checked(variants={"no_recache": part(0.83, 0.9, 24)})
    less = check["variants"]["no_recache"]["switch"]
    assert not any("second block" in line for line in conclusions(check)[3:])
    less |= {"adherence_change": -0.01, "adherence_change_se": 0.002, "old_left_change": 0.1,
             "old_left_change_se": 0.1}
    line = conclusions(check)[-1]
    assert "second block after a switch 0.830 ± 0.08 against 0.840 ± 0.08 (video by video -0.010 ± 0.002)" \
        in line
    assert "old prompt left" not in line


def test_two_trainings_beside_each_other(trained: Path) -> None:
    """Figures of the one under the other's name, a difference that is noise told as one, or the reverse; more
    differences than chance makes, told as what chance makes.
    """
    other = checked(plain={"videos": 32, "adherence": 0.5, "adherence_se": 0.05, "permanence": 1.0},
                    variants={"no_sink": part(0.88, 0.4, 24), "window_6": part(0.1, 0.1)})
    check = checked(variants={"no_sink": part(0.88, 0.4, 24), "window_6": part(0.9, 0.9)})
    table = compare_table(check, other)
    row = table.loc["prompt adherence, 5 s of one held-out prompt"]
    assert list(row[:2]) == ["0.930 ± 0.05", "0.500 ± 0.05"] and float(row.iloc[2]) < -5
    assert table.loc["no sink: in place", "difference in errors"] == "+0.0"
    assert not any("window" in name for name in table.index)
    first, *alone = compare_conclusions(check, other)
    assert first.startswith("Of 12 metrics 1 differ from the other training's by more than twice the error")
    assert first.endswith("; by chance alone, one in twenty, 0.6 would: prompt adherence, 5 s of one "
                          "held-out prompt 0.930 ± 0.05 here, 0.500 ± 0.05 there.")
    alone = [line for line in alone if line.startswith("The other")]
    assert alone[0].startswith("The other training alone: target >= 0.90") and "is missed" in alone[0]
    assert "w was not checked" in TrainingReport.open(str(trained)).same("w").data


def test_an_effect_of_half_the_size_is_not_confirmed() -> None:
    """What the sink does told as found again, because its direction was; an effect that one training alone
    shows, that turns round or that three videos show, told as confirmed.
    """
    def training(in_place: float, later: float, adherence: float, old_left: float) -> dict[str, Any]:
        less = part(0.8, 0.9, 48)
        less["switch"] |= {"later_adherence_change": later, "later_adherence_change_se": 0.02,
                           "adherence_change": adherence, "adherence_change_se": 0.02,
                           "old_left_change": old_left, "old_left_change_se": 0.02}
        less["long"] |= {"in_place": 1 + in_place, "in_place_change": in_place, "in_place_change_se": 0.14}
        few = part(0.84, 0.9)
        few["long"] |= {"in_place_change": -0.9, "in_place_change_se": 0.01}
        return checked(**part(0.84, 1.0, 48), variants={"no_sink": less, "window_6": few})

    here, there = training(-0.62, -0.06, -0.03, 0.1), training(-0.32, -0.05, -0.05, -0.1)
    told = [line for line in compare_conclusions(here, there) if "here and in the other" in line]
    assert told == [
        "No sink, here and in the other training. Same direction, beyond twice the error only there: second "
        "block after a switch 0.84 to 0.8 here (-0.030 ± 0.020), 0.84 to 0.8 there (-0.050 ± 0.020). "
        "Confirmed: later 0.84 to 0.8 here (-0.060 ± 0.020), 0.84 to 0.8 there (-0.050 ± 0.020). "
        "Direction not confirmed: old prompt left 0.16 to 0.2 here (+0.100 ± 0.020), 0.16 to 0.2 there "
        "(-0.100 ± 0.020). Direction confirmed, size not (0.5 times as large there, 1.5 errors of the "
        "difference apart): in place 1 to 0.38 here (-0.620 ± 0.140), 1 to 0.68 there (-0.320 ± 0.140)."]
    del there["variants"]["no_sink"]["switch"]["later_adherence_change"]
    assert "only here: later 0.84 to 0.8 here (-0.060 ± 0.020), 0.84 to 0.8 there (-0.040 ± 0.0" in \
        compare_conclusions(here, there)[1], "of a check that kept no changes the figures' difference counts"
    del there["variants"]["no_sink"]
    assert not any("here and in the other" in line for line in compare_conclusions(here, there))


def test_missing_files_name_the_command_that_makes_them(tmp_path: Path) -> None:
    """A FileNotFoundError where a command would help; a notebook that stops there."""
    with pytest.raises(UserError, match=r"longlive_opt.tiny.training --out w --device cuda$"):
        read_log(tmp_path, "w")
    with pytest.raises(UserError, match="--stage check"):
        read_check(tmp_path, "w")
    (write(tmp_path / "empty") / "training" / "log.jsonl").touch()
    with pytest.raises(UserError, match="is empty; train the model"):
        read_log(tmp_path / "empty")
    report = TrainingReport.open(str(tmp_path / "absent"))
    shown = [report.losses("vae"), report.stages(), report.about(), report.check(), report.ablation(),
             report.ablation_figure(), report.conclusions()]
    assert all(isinstance(one, HTML) for one in shown)
    assert "python -m longlive_opt.tiny.training --out" in shown[0].data and "--stage check" in shown[3].data


def test_the_notebook_runs(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cell that calls what the library does not have; runs the cells without a kernel, the pictures of
    scenes apart."""
    notebook = nbformat.read(ROOT / "notebooks" / "98_training.ipynb", as_version=4)
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    names: dict[str, Any] = {"weights_dir": str(trained), "other_dir": str(trained), "seed": 0}
    exec(next(source for source in cells if "import" in source), names)
    shown = {source: eval(source, names) for source in cells if source.startswith("training.")}
    assert len(shown) == 12
    kinds = {type(value) for value in shown.values()}
    assert kinds == {Chart, pd.DataFrame, HTML}
    assert [source for source, value in shown.items() if isinstance(value, HTML)] == \
        ["training.about()", "training.conclusions()", "training.same(other_dir)"]
    assert {f'training.losses("{stage}")' for stage in CURVES} < set(shown)


def test_importing_needs_no_torch() -> None:
    """Seconds of waiting, and gigabytes, to look at a table."""
    code = "import sys, longlive_opt.tiny.training_report; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "False"
