"""Claims about result.json: complete or absent, never half, never NaN; and about what a campaign folder may
hold."""

import errno
import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from example_results import example_result

from longlive_opt.errors import UserError
from longlive_opt.measurement import environment, telemetry
from longlive_opt.measurement.result import (
    is_na,
    na,
    read_campaign,
    read_result,
    upgraded,
    validate,
    write_result,
)


@pytest.fixture(scope="module")
def example():
    return example_result(steady=20, switches=2)


def changed(result, path, value):
    """A copy with the dotted `path` set to `value`, or deleted for `...`."""
    copy = json.loads(json.dumps(result))
    *parents, last = path.split(".")
    holder = copy
    for key in parents:
        holder = holder[key]
    if value is ...:
        del holder[last]
    else:
        holder[last] = value
    return copy


def test_written_results_come_back_equal(example, tmp_path):
    """Would catch: a value that JSON changes (tuple keys, rounded floats, lost unicode)."""
    example = changed(example, "title", "Füchse <script> 🦊")
    path = tmp_path / "campaign" / "baseline" / "result.json"
    write_result(path, example)
    assert read_result(path) == example
    assert os.listdir(path.parent) == ["result.json"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float64("nan")])
def test_nan_is_refused_by_place(example, tmp_path, value):
    """Would catch: `NaN` in a file that only Python calls JSON."""
    broken = changed(example, "latency.stages_ms", {"decode": {"mean": [1.0, float(value)]}})
    with pytest.raises(UserError, match=r"\$\.latency\.stages_ms\.decode\.mean\[1\] is -?(nan|inf)"):
        write_result(tmp_path / "result.json", broken)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("value", [np.float32(1.0), {1: 2}, object(), b"x", {"a": {1, 2}}])
def test_what_json_cannot_hold_is_refused_by_place(example, tmp_path, value):
    """Would catch: an hour of measuring ended by a bare TypeError for a numpy scalar; an int key made str."""
    example = dict(example, weights={"kind": "random", "extra": value})
    with pytest.raises(UserError, match=r"\$\.weights\.extra"):
        write_result(tmp_path / "result.json", example)


def test_half_a_character_is_refused_by_place(example, tmp_path):
    """Would catch: an hour of measuring ended by UnicodeEncodeError, and half a file."""
    broken = changed(example, "title", "a \ud83e")
    with pytest.raises(UserError, match=r"\$\.title: 'a \\ud83e' holds"):
        write_result(tmp_path / "result.json", broken)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("path", ["schema_version", "latency", "latency.ss_ms_per_frame.p99", "decision.keep",
                                  "quality.lpips", "environment.gpu", "setup_s"])
def test_missing_fields_are_named(example, path):
    """Would catch: a KeyError in the summary notebook instead of one sentence."""
    with pytest.raises(UserError, match=path):
        validate(changed(example, path, ...))


@pytest.mark.parametrize(("path", "value"), [
    ("fps", "fast"), ("fps", True), ("fps", None), ("decision.keep", "yes"), ("preset", 3),
    ("latency.ps_ms.mean", None), ("memory_gb.kv_cache", {"value": None}), ("optimizations", {}),
    ("latency.ss_block_ms", [1.0, "2"]), ("sizes.blocks_measured", 3.0)])
def test_wrong_types_are_named(example, path, value):
    """Would catch: a bare null where a reason is due, or true passing for 1."""
    with pytest.raises(UserError, match=f"{path} is .*, not"):
        validate(changed(example, path, value))


def test_na_is_a_metric(example):
    """Would catch: an honest "n/a" refused, which would push people to write 0."""
    missing = na("no CUDA device", "run on a GPU")
    assert is_na(missing) and not is_na({"mean": 1.0}) and not is_na(None)
    validate(changed(example, "memory_gb.peak_allocated", missing))
    with pytest.raises(ValueError, match="reason"):
        na("", "x")


@pytest.mark.parametrize(("text", "words"), [
    ("", "is not JSON"), ('{"schema_version": 1, "status"', "truncated"), ("[1]", "not an object"),
    ('{"schema_version": 0}', "run the preset again"), ('{"schema_version": 3}', "update this package"),
    ('{"fps": NaN}', "contains NaN"), ('{"schema_version": 1, "status": "running"}', "'running'"),
    ("[" * 9999, "levels"), ("[" * 99 + "]" * 99, "levels"), ('{"fps": 1e999}', "too large"),
    ('{"fps": ' + "9" * 5000 + "}", "too long"), ('{"fps": 1, "fps": 2}', "'fps' occurs twice"),
    ('{"title": "\\ud83e"}', "half of a character")])
def test_bad_files_are_one_sentence_with_the_file_in_it(tmp_path, text, words):
    """Would catch: a traceback from the summary for a file that a killed run left behind."""
    path = tmp_path / "result.json"
    path.write_text(text)
    with pytest.raises(UserError, match=words) as caught:
        read_result(path)
    assert str(path) in str(caught.value)


def test_binary_and_missing_files(tmp_path):
    """Would catch: UnicodeDecodeError or FileNotFoundError reaching the user."""
    path = tmp_path / "result.json"
    with pytest.raises(UserError, match="run the preset first"):
        read_result(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8 text"):
        read_result(path)


def test_a_full_disk_leaves_the_old_file_and_no_half_one(example, tmp_path, monkeypatch):
    """Would catch: result.json emptied by a failed overwrite, then read as a finished run."""
    path = tmp_path / "result.json"
    write_result(path, example)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device.*free space"):
        write_result(path, changed(example, "title", "new"))
    assert os.listdir(tmp_path) == ["result.json"]
    assert read_result(path) == example


def test_an_output_folder_that_is_a_file(example, tmp_path):
    """Would catch: NotADirectoryError with a traceback."""
    (tmp_path / "outputs").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        write_result(tmp_path / "outputs" / "result.json", example)


def test_a_campaign_reads_past_its_bad_files(example, tmp_path):
    """Would catch: one truncated file that takes the whole summary with it."""
    for preset in ("zeta", "baseline", "alpha"):
        write_result(tmp_path / preset / "result.json", changed(example, "preset", preset))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "result.json").write_text("{")
    (tmp_path / "died").mkdir()
    (tmp_path / "died" / "notebook.ipynb").write_text("{}")
    (tmp_path / "summary").mkdir()
    (tmp_path / "summary" / "notebook.ipynb").write_text("{}")
    (tmp_path / "notes.txt").write_text("hello")
    found, problems = read_campaign(tmp_path)
    assert [result["preset"] for result in found] == ["baseline", "alpha", "zeta"]
    assert [(path.parent.name, path.name) for path, _ in problems] == [("broken", "result.json"),
                                                                      ("died", "result.json")]
    assert "truncated" in problems[0][1] and "did not finish" in problems[1][1]
    with pytest.raises(UserError, match="does not exist"):
        read_campaign(tmp_path / "nowhere")


def test_environment_fits_the_schema_and_names_no_place(example, monkeypatch, tmp_path):
    """Would catch: a home folder, host name or token in a report that is shared."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("TORCH_API_TOKEN", "sesame")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1234")
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    found = environment.environment("cpu") | {"clocks_before": environment.clocks("cpu")}
    text = json.dumps(found)
    assert found["env_vars"]["NVIDIA_TF32_OVERRIDE"] == "0"
    assert found["env_vars"]["TORCH_HOME"].startswith("(hidden")
    private = (str(tmp_path), "sesame", "GPU-1234", os.uname().nodename, os.getcwd())
    assert not any(word in text for word in private)
    assert found["gpu"] is None and "cpu" in found["reasons"]["gpu"]
    assert found["co_scheduled"] is None and found["reasons"]["co_scheduled"]
    validate(dict(example, environment=found))


def write_proc(proc, cpus, processes):
    """A /proc of CPUs [user, nice, system, idle, iowait, irq, softirq, steal, guest] and processes
    {pid: (parent, user, system, children's user, children's system)}.
    """
    rows = [f"cpu{index} {' '.join(map(str, row))} 0" for index, row in enumerate(cpus)]
    proc.mkdir(exist_ok=True)
    (proc / "stat").write_text("\n".join(["cpu  9 9 9 9 9 9 9 9 9 9", *rows, "intr 1 2 3", ""]))
    for pid, (parent, *ticks) in processes.items():
        (proc / str(pid)).mkdir(exist_ok=True)
        fields = ["S", parent, *[7] * 9, *ticks, 20, 0]
        (proc / str(pid) / "stat").write_text(f"{pid} (a) b (c)) {' '.join(map(str, fields))}\n")


def test_only_the_load_of_others_counts(monkeypatch, tmp_path):
    """Would catch: own compile workers taken for company, idle time for load, or a CPU of another job."""
    monkeypatch.setattr(environment.os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    monkeypatch.setattr(environment.os, "sysconf", lambda name: 100)
    monkeypatch.setattr(environment.os, "getpid", lambda: 50)
    monkeypatch.setattr(environment.time, "perf_counter", lambda: 5.0)
    idle = [0, 0, 0, 100, 50, 0, 0, 0, 0]
    tasks = {50: (1, 10, 0, 0, 0), 51: (50, 0, 0, 0, 0), 52: (51, 0, 0, 0, 0), 60: (1, 30, 0, 0, 0)}
    write_proc(tmp_path / "proc", [idle, idle, idle], tasks)
    assert environment.cpu_seconds(tmp_path / "proc") == (5.0, 0.0, 0.1)
    loaded, other_job = [600, 20, 30, 400, 90, 1, 2, 47, 600], [900, 0, 0, 100, 50, 0, 0, 0, 0]
    tasks = {50: (1, 210, 20, 30, 40), 51: (50, 5, 5, 0, 0), 52: (51, 100, 0, 0, 0), 60: (1, 330, 0, 0, 0)}
    write_proc(tmp_path / "proc", [loaded, idle, other_job], tasks)
    assert environment.cpu_seconds(tmp_path / "proc") == (5.0, 7.0, 4.1)
    assert environment.cpu_seconds(tmp_path / "absent") is None


@pytest.mark.parametrize(("after", "cores", "shared"), [
    ((10.0, 17.0, 14.0), 0.3, False), ((10.0, 17.0, 11.0), 0.6, True), ((10.0, 12.0, 12.1), 0.0, False),
    ((0.4, 0.4, 0.0), None, None), (None, None, None)])
def test_company_is_told_or_unknown_with_a_reason(after, cores, shared):
    """Would catch: `false` where nobody looked, or a verdict from a few ticks of the clock."""
    company = environment.company_of("cpu", (0.0, 0.0, 0.0), after)
    assert company["other_cpu_cores"] == pytest.approx(cores) and company["co_scheduled"] is shared
    assert set(company["reasons"]) == (set() if cores is not None else {"other_cpu_cores", "co_scheduled"})


@pytest.mark.parametrize(("listed", "shared"), [
    ("50\n", False), ("50\n77\n", True), ("71\n77\n", True), ("71\n", None), (None, None), ("", None)])
def test_who_holds_the_gpu(monkeypatch, listed, shared):
    """Would catch: 'alone' in a container, where nvidia-smi lists nobody or other numbers."""
    monkeypatch.setattr(environment.os, "getpid", lambda: 50)
    monkeypatch.setattr(environment, "gpu_uuid", lambda device: "GPU-1")
    monkeypatch.setattr(environment, "_run", lambda *command: listed)
    company = environment.company_of("cuda", (0.0, 0.0, 0.0), (10.0, 90.0, 9.0))
    assert company["co_scheduled"] is shared and company["other_cpu_cores"] == pytest.approx(8.1)
    assert ("co_scheduled" in company["reasons"]) == (shared is None)


def test_what_old_results_lack_is_checked_where_it_is_there(example):
    """Would catch: the H100 campaign unreadable for a new field, or a new field that nothing checks."""
    validate(changed(changed(example, "environment.other_cpu_cores", ...),
                             "environment.co_scheduled", ...))
    validate(changed(example, "environment.other_cpu_cores", None))
    with pytest.raises(UserError, match="environment.other_cpu_cores is 'many', not a number or null"):
        validate(changed(example, "environment.other_cpu_cores", "many"))
    with pytest.raises(UserError, match="environment.co_scheduled is 0.6, not true, false or null"):
        validate(changed(example, "environment.co_scheduled", 0.6))


def test_commit_without_git_comes_from_the_variables(tmp_path):
    """Would catch: results from a GPU host without history that cannot be traced to a commit."""
    told = {"LONGLIVE_OPT_GIT_COMMIT": "abc", "LONGLIVE_OPT_GIT_DIRTY": "1"}
    assert environment.git_state(tmp_path, told) == ("abc", True, None)
    commit, dirty, reason = environment.git_state(tmp_path, {})
    assert commit is None and dirty is None and "LONGLIVE_OPT_GIT_COMMIT" in reason


def test_a_machine_without_nvidia_smi_loses_no_run(monkeypatch):
    """Would catch: a measured hour thrown away because a tool is missing, fails or hangs."""
    monkeypatch.setenv("PATH", "")
    assert environment._run("nvidia-smi") is None
    assert environment.throttle_reasons("0x0000000000000024") == ["sw_power_cap", "sw_thermal"]
    assert environment.throttle_reasons("0x0000000000000001") == []
    assert environment.throttle_reasons(None) is None and environment.throttle_reasons("[N/A]") is None


class FakeNvml:
    """NVML's bindings for two GPUs; the second one draws 500 W, which its counter adds up, and the first one
    100 W.
    """

    NVML_CLOCK_SM, NVML_TEMPERATURE_GPU = 1, 0

    class NVMLError(Exception):
        pass

    def __init__(self, refused: tuple[str, ...] = ()):
        self.refused, self.now_ms, self.used = refused, 0.0, {1}
        self.answers = {"ClockInfo": lambda handle, kind: 1755, "Temperature": lambda handle, kind: 64,
                        "PowerUsage": lambda handle: 500_000,
                        "CurrentClocksEventReasons": lambda handle: 0x4 if self.now_ms > 50 else 0x1,
                        "TotalEnergyConsumption": lambda handle: int(
                            7e6 + (500 if handle else 100) * self.now_ms)}

    def nvmlInit(self):
        if "Init" in self.refused:
            raise self.NVMLError("Driver Not Loaded")

    def nvmlDeviceGetHandleByUUID(self, uuid):
        return {"GPU-a": 0, "GPU-b": 1}[uuid]

    def __getattr__(self, name):
        asked = name.removeprefix("nvmlDeviceGet")
        if asked not in self.answers:
            raise AttributeError(name)

        def answer(handle, *kind):
            assert handle in self.used, "another GPU than torch's"
            if asked in self.refused:
                raise self.NVMLError("Not Supported")
            return self.answers[asked](handle, *kind)

        return answer


@pytest.fixture
def nvml(monkeypatch):
    """Make bindings and take `cuda` for the second GPU, as with CUDA_VISIBLE_DEVICES=1."""
    def make(*refused: str) -> FakeNvml:
        fake = FakeNvml(refused)
        monkeypatch.setitem(sys.modules, "pynvml", fake)
        monkeypatch.setattr(telemetry, "gpu_uuid", lambda device: "GPU-b")
        return fake

    return make


def until(come: Callable[[], object]) -> None:
    """Wait for another thread."""
    while not come():
        time.sleep(0.001)


def recorded(fake: FakeNvml, period_s: float = 3600.0) -> telemetry.Samples:
    """A stream of 100 ms of which both ends are read."""
    watch = telemetry.Telemetry([torch.device("cuda")], period_s)
    assert watch.missing is None
    with watch.recording(lambda: fake.now_ms) as samples:
        until(lambda: samples.section().get("t_s"))
        fake.now_ms = 100.0
    return samples


def test_energy_and_clocks_are_those_of_torchs_gpu(nvml):
    """Would catch: the first GPU's power in a run on the second, energy of warm-up, watts for joules."""
    samples = recorded(nvml())
    section, energy = samples.section(), samples.energy(20.0, 80.0, 12)
    assert section["sm_mhz"] == [1755, 1755] and section["power_w"] == [500.0, 500.0]
    assert section["t_s"] == [0.0, 0.1] and section["temperature_c"] == [64, 64]
    assert section["throttled"] == {"sw_power_cap": 0.5}
    assert energy["joules"] == pytest.approx(30.0) and energy["frames"] == 12
    assert energy["mean_power_w"] == pytest.approx(500.0)
    assert energy["joules_per_frame"] == pytest.approx(2.5)
    json.dumps([section, energy], allow_nan=False)


def test_energy_is_that_of_all_gpus_of_a_stream(nvml, monkeypatch):
    """Would catch: half of the joules, or the power of another GPU than the one that is watched."""
    fake = nvml()
    fake.used = {0, 1}
    monkeypatch.setattr(telemetry, "gpu_uuid", lambda device: "GPU-a" if device.index else "GPU-b")
    with telemetry.Telemetry([torch.device("cuda", i) for i in (0, 1)], 3600.0).recording(
            lambda: fake.now_ms) as samples:
        until(lambda: samples.section().get("t_s"))
        fake.now_ms = 100.0
    assert samples.energy(20.0, 80.0, 12)["joules"] == pytest.approx(36.0)
    assert samples.section()["power_w"] == [500.0, 500.0]


def test_readings_come_every_period_and_end_with_the_stream(nvml):
    """Would catch: one reading per stream, and a thread that goes on reading after it or after an error."""
    nvml()
    watch = telemetry.Telemetry([torch.device("cuda")], 0.001)
    with pytest.raises(KeyError), watch.recording(lambda: 0.0) as samples:
        until(lambda: len(samples.section().get("t_s", ())) >= 5)
        raise KeyError
    assert not [thread for thread in threading.enumerate() if thread.name == "telemetry"]


@pytest.mark.parametrize("refused", [("TotalEnergyConsumption",),
                                     ("ClockInfo", "CurrentClocksEventReasons")])
def test_what_a_gpu_does_not_tell_is_null_and_the_rest_is_there(nvml, refused):
    """Would catch: a measured hour lost to a question that this GPU does not answer."""
    samples = recorded(nvml(*refused))
    section, energy = samples.section(), samples.energy(0.0, 100.0, 12)
    assert section["power_w"] == [500.0, 500.0]
    assert is_na(energy["joules_per_frame"]) == ("TotalEnergyConsumption" in refused)
    if "ClockInfo" in refused:
        assert section["sm_mhz"] == [None, None] and section["throttled"] == {}


@pytest.mark.parametrize(("kind", "says"), [("cpu", "the run was on cpu"), ("no package", "nvidia-ml-py"),
                                            ("no driver", "Driver Not Loaded"), ("no uuid", "UUID")])
def test_without_readings_both_sections_say_why(nvml, monkeypatch, kind, says):
    """Would catch: 0 J per frame, or a failed run, on a machine without GPU, driver or bindings."""
    nvml(*("Init",) if kind == "no driver" else ())
    if kind == "no package":
        monkeypatch.setitem(sys.modules, "pynvml", None)
    if kind == "no uuid":
        monkeypatch.setattr(telemetry, "gpu_uuid", lambda device: None)
    watch = telemetry.Telemetry([torch.device("cpu" if kind == "cpu" else "cuda")])
    with watch.recording(lambda: 0.0) as samples:
        pass
    energy = samples.energy(0.0, 10.0, 12)
    for metric in (samples.section(), energy["joules_per_frame"], energy["mean_power_w"]):
        assert is_na(metric) and says in metric["reason"] + metric["how_to_fix"]


def test_memory_of_a_cpu_is_its_resident_set():
    """Would catch: 0 GB or n/a as the memory of a CPU run, and a peak that is that of the loading."""
    before = bytearray(300_000_000)
    before[::4096] = bytes(len(before[::4096]))
    high = environment.memory_gb("cpu")["peak_resident"]
    del before
    environment.reset_peak_memory("cpu")
    memory = environment.memory_gb("cpu", 3_450_000_000)
    assert 0 < memory["peak_resident"] < high - 0.2
    assert is_na(memory["peak_allocated"]) and memory["kv_cache"] == 3.45
    assert is_na(environment.memory_gb("cpu")["kv_cache"])


def test_results_of_version_1_are_read_with_the_names_of_version_2(example, tmp_path):
    """Would catch: the campaigns that come with the project unreadable, or half of a result under old names.
    """
    rows = [{"name": "a", "applied": True, "level": "exact", "report": {}},
            {"name": "b", "applied": True, "level": "lossy", "report": {}}]
    segments = [{"judged_from": 0, "judged_frames": 9, "not_judged": []}]
    new = example | {"schema_version": 2, "adherence": {"segments": [], "not_evaluated": ["shape"]}}
    old = {"optimizations": "rooms", "prompt_schedule": "script", "adherence": "world"}
    old = {old.get(key, key): value for key, value in new.items()} | {
        "schema_version": 1, "rooms": rows, "world": {"segments": segments, "not_judged": ["shape"]}}
    old["quality"] = {"script" if key == "prompt_schedule" else key: value
                      for key, value in old["quality"].items()}
    old["decision"] = old["decision"] | {"gate": {"level": "exact", "max_error_ratio": 1.1}}
    path = tmp_path / "result.json"
    path.write_text(json.dumps(old))
    read = read_result(path)
    assert [row["exactness"] for row in read["optimizations"]] == ["bitwise", "lossy"]
    assert read["prompt_schedule"] == example["prompt_schedule"] and read["quality"] == example["quality"]
    assert read["decision"]["gate"] == {"exactness": "bitwise", "max_error_ratio": 1.1}
    assert read["adherence"] == {"segments": [{"evaluated_from": 0, "evaluated_frames": 9,
                                               "not_evaluated": []}],
                                 "not_evaluated": ["shape"]}
    assert upgraded(read) is read and upgraded([1]) == [1]


def test_a_checkout_of_another_user_is_named(tmp_path, monkeypatch):
    """'No git history here', for a container that mounts the clone of its host."""
    git(tmp_path, "init", "-q")
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    commit, _, reason = environment.git_state(tmp_path, {})
    assert commit is None and "dubious ownership" in reason and "safe.directory" in reason
    assert str(tmp_path) not in reason


def git(folder, *words):
    user = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    command = ["git", "-C", str(folder), *user, *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_code_that_is_newer_than_the_runs_is_counted(monkeypatch, tmp_path):
    """Would catch: a log of old runs that reads as if today's code had been measured, and one that calls
    itself newer for the commit that holds it."""
    package = tmp_path / "longlive_opt"
    package.mkdir()
    git(tmp_path, "init", "-q")
    monkeypatch.setattr(environment, "__file__", str(package / "provenance.py"))
    commits = []
    for path in ("longlive_opt/a.py", "longlive_opt/b.py", "outputs/h100/result.json", "longlive_opt/c.py"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(path)
        git(tmp_path, "add", "-A")
        git(tmp_path, "commit", "-qm", path)
        commits.append(git(tmp_path, "rev-parse", "HEAD"))
    sentence, = environment.code_since([commits[0], commits[0]])
    assert "is 2 commits newer than that of the runs at " + commits[0][:12] in sentence
    assert environment.code_since([commits[3]]) == []
    (package / "a.py").write_text("changed")
    sentence, = environment.code_since([commits[3]])
    assert f"the runs' code, {commits[3][:12]}, with uncommitted changes" in sentence
    unknown = environment.code_since([None, "f" * 40])
    assert len(unknown) == 2 and all("it is unknown by how many commits" in sentence for sentence in unknown)
