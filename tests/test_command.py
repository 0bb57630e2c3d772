"""The command `longlive`: a video in one line, what a preset is, what a machine can, what changed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import numpy as np
import pytest
from example_results import example_result
from micro import MICRO, micro_config, micro_model

from longlive_opt import __main__ as command
from longlive_opt.config import ExperimentConfig
from longlive_opt.errors import UserError
from longlive_opt.measurement.result import write_result
from longlive_opt.report import campaign_diff
from longlive_opt.report.campaign import load
from longlive_opt.runner import doctor, generate, plan, show
from longlive_opt.runner.plan import Layout

ROOT = Path(__file__).parent.parent


# ---- the command itself


def test_every_command_is_listed_and_has_help(capsys: pytest.CaptureFixture) -> None:
    """A command that the help page names and that cannot be started."""
    assert command.main(["--help"]) == 0
    page = capsys.readouterr().out
    for name in command.COMMANDS:
        assert f"\n  {name} " in page
        with pytest.raises(SystemExit) as ended:
            command.main([name, "--help"])
        assert ended.value.code == 0 and "usage" in capsys.readouterr().out
    assert command.main(["film"]) == 2 and "choose one of generate" in capsys.readouterr().err
    assert command.main([]) == 2


def test_the_command_starts_without_torch() -> None:
    """Help that takes seconds to appear."""
    code = "import sys; from longlive_opt.__main__ import usage; usage(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("given, wanted", [({}, "OMP_WAIT_POLICY = 'PASSIVE'"),
                                           ({"OMP_WAIT_POLICY": "ACTIVE"}, "OMP_WAIT_POLICY = 'ACTIVE'"),
                                           ({"GOMP_SPINCOUNT": "77"}, "GOMP_SPINCOUNT = '77'")], ids=str)
def test_waiting_threads_do_not_spin(given: dict[str, str], wanted: str) -> None:
    """A machine that is also used for something else: blocks take several times as long. Or a setting of the
    user that is replaced. OpenMP itself says what it took, when torch loads it.
    """
    unset = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    kept = {name: value for name, value in os.environ.items() if name not in unset}
    done = subprocess.run([sys.executable, "-c", "import longlive_opt.config, torch"], capture_output=True,
                          text=True, env={**kept, **given, "OMP_DISPLAY_ENV": "VERBOSE"})
    assert wanted in done.stderr


# ---- generate


@pytest.fixture
def micro(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Videos of the smallest model, with random weights."""
    def config_of(preset: str, profile: Path | None, given: dict) -> tuple[ExperimentConfig, str]:
        return micro_config(**given), "micro"

    monkeypatch.setattr(generate, "config_of", config_of)
    with micro_model():
        yield


def test_a_video_in_one_line(micro: None, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Frames that are lost on their way, or a video of another length than asked for."""
    import av

    path = tmp_path / "a.mp4"
    assert generate.main(["a fox", "a whale", "--blocks", "3", "-o", str(path)]) == 0
    with av.open(str(path)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 9 + 12 + 12
    shown = capsys.readouterr()
    assert "block 3 of 3" in shown.err and shown.out.strip() == str(path)
    assert generate.main(["a fox", "--blocks", "1", "-o", str(tmp_path / "frames")]) == 0
    assert len(list((tmp_path / "frames").glob("*.png"))) == 9


def test_a_prompt_beyond_the_tiny_model_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                                                 capsys: pytest.CaptureFixture) -> None:
    """A red fox asked for, a red square drawn, and no word on it."""
    monkeypatch.setattr(generate, "config_of", lambda *asked: (ExperimentConfig(), "tiny"))
    monkeypatch.setattr(generate, "build_pipeline", lambda config: None)
    monkeypatch.setattr(generate, "StreamingSession", lambda *_, **__: SimpleNamespace(reset=lambda: None))
    monkeypatch.setattr(generate, "write", lambda *_: None)
    known = "a large red square spins, on a dotted grey ground"
    assert generate.main([known, "a red fox", "--blocks", "4"]) == 0
    assert capsys.readouterr().err.count("knows only its small world") == 1
    assert generate.main([known, "--blocks", "1"]) == 0
    assert "small world" not in capsys.readouterr().err


def test_a_prompt_file_gives_a_video_per_line(micro: None, tmp_path: Path) -> None:
    """Only the first line of a file used: the others are dropped in silence."""
    file = tmp_path / "prompts.txt"
    file.write_text("a fox\na whale\n")
    assert generate.main(["--prompts-file", str(file), "--blocks", "1", "-o", str(tmp_path / "v.mp4")]) == 0
    assert sorted(path.name for path in tmp_path.glob("*.mp4")) == ["v_000.mp4", "v_001.mp4"]


def test_an_earlier_video_is_kept(micro: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                  capsys: pytest.CaptureFixture) -> None:
    """The video of an hour written over by the next one, since neither was given a name."""
    monkeypatch.chdir(tmp_path)
    for name, said in (("video.mp4", False), ("video-2.mp4", True), ("video-3.mp4", True)):
        assert generate.main(["a fox", "--blocks", "1"]) == 0
        shown = capsys.readouterr()
        assert shown.out.strip() == name and (f"already; the output is {name}" in shown.err) is said
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    (tmp_path / "p.txt").write_text("a fox\na whale\n")
    for number in ("", "-2"):
        (tmp_path / f"video{number}_001.mp4").touch()
    assert generate.main(["--prompts-file", "p.txt", "--blocks", "1"]) == 0
    assert capsys.readouterr().out.split() == ["video-3_000.mp4", "video-3_001.mp4"]
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())


@pytest.mark.parametrize("line, arguments, says", [
    ({"switch_frame_indices": [3]}, ["--switch-at", "1"],
     "--switch-at: p.jsonl line 2 has switch_frame_indices of its own; leave one of the two out."),
    ({"switch_frame_indices": [90]}, [],
     "p.jsonl line 2, switch_frame_indices: 90 takes effect at latent frame 90, past the end of the video "
     "(18 latent frames); switch earlier or make the video longer (--seconds or --blocks)."),
])
def test_the_switches_of_a_file_are_kept_or_refused(
        line: dict, arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture,
        monkeypatch: pytest.MonkeyPatch) -> None:
    """A time on the command line that changes nothing, or a refusal that names no line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(generate, "build_pipeline", lambda config: pytest.fail("built"))
    lines = [{"prompts": ["a", "b"]} | ({} if arguments else {"switch_frame_indices": [3]}),
             {"prompts": ["c", "d"]} | line]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert generate.main(["--prompts-file", "p.jsonl", "--blocks", "6", *arguments]) == 2
    assert capsys.readouterr().err == f"error: {says}\n"


@pytest.mark.parametrize("arguments, says", [
    ([], "prompt: give one or more"), (["a", "--seconds", "0"], "--seconds: 0.0 must be greater"),
    (["a", "--seconds", "nan"], "--seconds: nan must be greater"),
    (["a", "--seconds", "1e9"], "at most 86400, a day"),
    (["a", "--seconds", "2", "--blocks", "2"], "--seconds: it and --blocks both give the length"),
    (["a", "--blocks", "0"], "--blocks: 0 is too small"), (["a", "-o", "v.gif"],
                                                           "--output: 'v.gif' is neither"),
    (["a", "-o", "README.md"], "neither an mp4"), (["a", "-o", "Makefile"], "is a file; name a folder"),
    (["a", "-o", "Makefile/v.mp4"], "cannot be written (Not a directory)"), (["a", "-o", ""], "neither"),
    (["a", "--set", "use_prompt_cache=true", "prompt_cache_dir=Makefile"], "prompt_cache_dir: "),
    (["a", "b", "--blocks", "4", "--switch-at", "60"], "--switch-at: 60 s takes effect past the end of the "
                                                        "video (2.8 s); switch earlier"),
    (["a", "b", "c", "--blocks", "2", "--switch-at", "0.6", "0.7"], "--switch-at: 0.7 s takes effect past"),
    (["a", "b", "--switch-at", "1", "2"], "--switch-at: 2 times for 2 prompts; 2 prompts need 1"),
    (["a", "b", "c", "--switch-at", "2", "1"], "--switch-at: 2 1 must be seconds that rise"),
    (["a", "b", "--switch-at", "nan"], "--switch-at: nan must be seconds"),
    (["--prompts-file", "p.txt", "--switch-at", "1"], "--switch-at: p.txt has one prompt per video"),
    (["a", "--set", "seed=0123"], "--set 'seed': YAML reads 0123 as 83: write 83 or 123, or put quotes"),
    (["a", "--set", "seed=1", "seed=2"], "--set 'seed': it is given twice; leave one out"),
    (["a", "b", "c", "--blocks", "2"], "3 prompts do not fit into 2 blocks"),
    (["a", "--blocks", "999"], "add --set relative_rope=true"), (["a", "--set", "sed=1"],
                                                                 "did you mean 'seed'"),
    (["a", "--set", "use_statickv=true"], "--set: unknown key 'use_statickv' (did you mean 'use_static_kv'"),
    ([""], "error: prompt: it is empty"), (["a", " "], "error: prompt: it is empty"),
    (["a", "--set", "device=cuda:99"], "error: device: 'cuda:99' was requested"),
    (["a", "--set", "prompts=[b]"], "--set prompts: prompts and switches are arguments"),
])
def test_wrong_input_is_one_sentence(arguments: list[str], says: str, capsys: pytest.CaptureFixture,
                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is loaded before the arguments are looked at, or a traceback."""
    monkeypatch.setattr(generate, "build_pipeline", lambda config: pytest.fail("built"))
    monkeypatch.setattr(generate, "live_config", lambda preset, keys: ExperimentConfig.from_mapping(keys))
    assert generate.main(arguments) == 2
    error = capsys.readouterr().err
    assert says in error and error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.parametrize("seconds, blocks", [(0.1, 1), (9 / 16, 1), (0.6, 2), (21 / 16, 2), (10, 14)])
def test_seconds_are_rounded_up_to_blocks(seconds: float, blocks: int) -> None:
    """A video that is shorter than asked for: the first block has 9 frames, the others 12, at 16 a second."""
    assert generate.blocks_of(ExperimentConfig(), seconds, None) == blocks


# ---- show and doctor


def test_show_says_keys_optimizations_and_results(capsys: pytest.CaptureFixture) -> None:
    """A preset that has to be put together from a YAML file, the defaults and a report."""
    assert show.main(["realtime"]) == 0
    page = capsys.readouterr().out
    assert "use_early_decode       True" in page and "quantized_linears      lossy" in page
    assert "outputs/h100, longlive-1.3b on NVIDIA H100" in page and "SS max" in page
    assert "seed " not in page
    assert show.main(["realtime", "--all"]) == 0 and "seed " in capsys.readouterr().out
    assert show.main(["realtim"]) == 2 and "did you mean 'realtime'" in capsys.readouterr().err


def test_doctor_says_why_not(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """"ready" for a preset that is refused as soon as it is run."""
    monkeypatch.setattr("longlive_opt.config.MODELS", {"tiny": MICRO, "longlive-1.3b": MICRO})
    monkeypatch.setattr(doctor.Layout, "presets", lambda layout: dict.fromkeys(("baseline", "cuda_graphs")))
    rows = dict(doctor.try_presets(Layout(ROOT), "cpu"))
    assert rows["baseline"] == "ready" and rows["cuda_graphs"].startswith("no: use_cuda_graphs")
    assert doctor.main(["--device", "cpu"]) == 0
    page = capsys.readouterr().out
    assert "This machine" in page and "free disk" in page and "ST-LPIPS" in page
    assert doctor.main(["--device", "tpu"]) == 2


# ---- compare


def campaign(folder: Path, *runs: dict) -> campaign_diff.Campaign:
    for run in runs:
        label = run["preset"] + (f".repeat{run['run']}" if run["run"] > 1 else "")
        (folder / label).mkdir(parents=True)
        write_result(folder / label / "result.json", run)
    return load(folder)


def scaled(result: dict, factor: float, spread: float = 0.01, seed: int = 0) -> dict:
    """The result with block intervals of `factor` times its own, and noise on them."""
    noise = np.random.default_rng(seed).normal(1, spread, len(result["latency"]["ss_block_ms"]))
    latency = result["latency"] | {
        "ss_block_ms": [ms * factor * float(n) for ms, n in zip(result["latency"]["ss_block_ms"], noise)]}
    return json.loads(json.dumps(result | {"latency": latency}))


def test_changes_and_their_intervals(tmp_path: Path) -> None:
    """A change that is noise called a gain, a gain called noise, or an interval that leaves the truth out."""
    make = [example_result(preset, 1.0, steady=40, switches=4)
            for preset in ("baseline", "speed", "balanced")]
    before = campaign(tmp_path / "a", *(scaled(run, 1) for run in make))
    after = campaign(tmp_path / "b", scaled(make[0], 1.0, seed=1), scaled(make[1], 0.8, seed=2),
                     scaled(make[2], 1.1, seed=3))
    found = {one.preset: one for one in campaign_diff.compare(before, after) if one.metric.startswith("SS")}
    assert {name: one.verdict for name, one in found.items()} == {
        "baseline": "noise", "speed": "faster", "balanced": "slower"}
    for name, truth in (("baseline", 0.0), ("speed", -0.2), ("balanced", 0.1)):
        assert found[name].low - 0.005 < truth < found[name].high + 0.005
    assert found["speed"].high - found["speed"].low < 0.02


def test_a_spread_between_runs_widens_the_interval(tmp_path: Path) -> None:
    """Three runs pooled as one: a difference that comes from run to run is taken for a change."""
    run = example_result("baseline", 1.0, steady=40, switches=4)
    runs = [scaled(run, factor, seed=i) | {"run": i + 1} for i, factor in enumerate((1.0, 1.1, 0.95))]
    before = campaign(tmp_path / "a", *runs)
    after = campaign(tmp_path / "b", scaled(run, 1.03, seed=7))
    one, *_ = campaign_diff.compare(before, after)
    assert one.verdict == "noise" and one.high - one.low > 0.05


def test_other_prompts_are_not_compared(tmp_path: Path) -> None:
    """Two campaigns that did different work, compared as if one had got faster."""
    run = example_result("baseline", 1.0, steady=12, switches=2)
    other = run | {"prompt_schedule": {"prompts": ["a fox", "a wolf"], "switch_frames": [9]}}
    first, *_ = campaign_diff.compare(campaign(tmp_path / "a", run), campaign(tmp_path / "b", other))
    assert first.verdict == "n/a" and "prompts[1] is 'a whale' against 'a wolf'" in first.reason


def test_disturbed_runs_get_no_verdict(tmp_path: Path) -> None:
    """A regression reported, and a job failed, because something else ran on the machine."""
    run = example_result("baseline", 1.0, steady=40, switches=4)
    slow = scaled(run, 1.5)
    slow["environment"]["co_scheduled"] = True
    before, after = campaign(tmp_path / "a", run), campaign(tmp_path / "b", slow)
    first, *_ = campaign_diff.compare(before, after)
    assert first.verdict == "undecided" and first.change > 0.4 and "something else ran" in first.reason
    assert campaign_diff.main([str(tmp_path / "a"), str(tmp_path / "b")]) == 0


def test_compare_ends_with_a_status_and_a_page(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A job that goes on after a regression; a page that cannot be opened alone."""
    run = example_result("baseline", 1.0, steady=40, switches=4)
    campaign(tmp_path / "a", run)
    campaign(tmp_path / "b", scaled(run, 1.5))
    (tmp_path / "empty").mkdir()
    page = tmp_path / "c.html"
    assert campaign_diff.main([str(tmp_path / "a"), str(tmp_path / "b"), "--html", str(page)]) == 1
    assert "slower" in capsys.readouterr().out and "slower" in page.read_text()
    assert campaign_diff.main([str(tmp_path / "b"), str(tmp_path / "a")]) == 0
    assert campaign_diff.main([str(tmp_path / "a"), str(tmp_path / "empty")]) == 2
    assert "no finished run" in capsys.readouterr().err
    with pytest.raises(UserError):
        load(tmp_path / "nowhere")


def test_the_notebook_of_a_comparison_runs(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A cell that calls what the library does not have; a campaign that would run the notebook as a preset.
    The cells run without a kernel, first on the committed campaigns that they name.
    """
    path = ROOT / "notebooks" / plan.COMPARE_NOTEBOOK
    assert path not in Layout(ROOT).presets().values()
    make = [example_result(preset, 1.0, steady=40, switches=4) for preset in ("baseline", "speed")]
    campaign(tmp_path / "a", *make)
    campaign(tmp_path / "b", scaled(make[0], 1.0, seed=1), scaled(make[1], 1.3, seed=2))
    for given in ({}, {"campaign_a": str(tmp_path / "a"), "campaign_b": str(tmp_path / "b")}):
        names: dict[str, Any] = {}
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type == "code":
                exec(cell.source, names)
                if "parameters" in cell.metadata.get("tags", []):
                    names.update(given)
        chart = names["comparison"].chart()
        assert chart._repr_png_()[0].startswith(b"\x89PNG") and "95% interval" in chart.alt
        shown = capsys.readouterr().out
        assert "before: " in shown and "commit " in shown
    assert "speed, SS mean, ms per frame: +" in chart.alt and "Slower: speed (SS mean +" in shown
    assert "The machines differ" not in shown


def test_campaigns_are_named_or_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path that has to be typed for what is in outputs/, or a folder of the user that is not found."""
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    assert campaign_diff.campaign_folder("h100") == ROOT / "outputs" / "h100"
    assert campaign_diff.campaign_folder("outputs/h100") == ROOT / "outputs" / "h100"
    assert campaign_diff.campaign_folder("mine") == tmp_path / "mine"
    assert campaign_diff.campaign_folder(str(tmp_path / "mine")) == tmp_path / "mine"
    with pytest.raises(UserError, match="nope: neither a campaign in outputs/ nor a folder; .* has h100, "):
        campaign_diff.campaign_folder("nope")


# ---- outside of a clone


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as pip installs it from a wheel, without a clone around it."""
    folder = tmp_path_factory.mktemp("installed")
    build = folder / "source"
    tracked = subprocess.run(["git", "ls-files", "-z", "longlive_opt", "params", "notebooks", "weights",
                              "pyproject.toml"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("no git history here")
    for name in filter(None, tracked.stdout.split("\0")):
        (build / name).parent.mkdir(parents=True, exist_ok=True)
        (build / name).symlink_to(ROOT / name)
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    made = subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(build)],
                          capture_output=True, text=True)
    if "setuptools" in made.stderr and made.returncode:
        pytest.skip("setuptools is too old or missing here, and there is no network to get it")
    assert made.returncode == 0, made.stderr
    wheel = next(folder.glob("*.whl"))
    subprocess.run([*pip, "install", "--no-deps", "--target", str(folder / "site"), str(wheel)], check=True)
    return folder / "site"


def run_installed(site: Path, folder: Path, *words: str) -> subprocess.CompletedProcess:
    code = f"import sys; sys.path.insert(0, {str(site)!r}); from longlive_opt.__main__ import main; " \
           "sys.exit(main(sys.argv[1:]))"
    return subprocess.run([sys.executable, "-c", code, *words], cwd=folder, capture_output=True, text=True)


def test_presets_and_the_tiny_model_come_along(installed: Path, tmp_path: Path) -> None:
    """`pip install .` in an environment of one's own: presets, notebooks and weights that stay in the clone.
    """
    listed = run_installed(installed, tmp_path, "list")
    assert listed.returncode == 0 and "realtime" in listed.stdout, listed.stderr
    shown = run_installed(installed, tmp_path, "show", "balanced")
    assert "torch_compile" in shown.stdout and "nothing yet" in shown.stdout, shown.stderr
    made = run_installed(installed, tmp_path, "generate", "a red circle", "--blocks", "1", "-o", "a.mp4")
    assert made.returncode == 0, made.stderr
    assert (tmp_path / "a.mp4").stat().st_size > 1000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4"]
