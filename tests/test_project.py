"""The house: packaging, set-up, and the rules that every notebook and tracked file keeps."""

import ast
import importlib
import json
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import nbformat
import papermill
import pytest
import torch
import yaml
from packaging.requirements import Requirement

import longlive_opt
from longlive_opt.config import KEYS, RUN_KEYS, ExperimentConfig, notebook_parameters
from longlive_opt.errors import NotAvailable, UserError
from longlive_opt.files import load_yaml, read_json
from longlive_opt.kernels import attention_bf16
from longlive_opt.measurement.result import read_result
from longlive_opt.optimizations import fused_vae, quantized_kv_cache, quantized_linears
from longlive_opt.report.campaign import load
from longlive_opt.report.conclusion import provenance_html
from longlive_opt.report.html_export import drop_unused_styles, export_html, network_references
from longlive_opt.report.readme import ROBUSTNESS_FILE, page_with_results, page_with_robustness
from longlive_opt.report.stylesheet import REPORT
from longlive_opt.runner import parameters
from longlive_opt.runner.__main__ import QUICK
from longlive_opt.runner.plan import Layout, plan, plan_quantization, plan_summary, plan_training
from longlive_opt.tiny.shapes.captions import strange

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PROFILES = sorted((ROOT / "params/profiles").glob("*.yaml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REQUIREMENTS = PROJECT["dependencies"] + sum(PROJECT["optional-dependencies"].values(), [])
# What the project takes the insides of, or draws and reports with.
CLOSE = {"torch", "torchvision", "papermill", "nbconvert", "pandas", "matplotlib", "transformers",
         "torchmetrics", "numpy", "ipykernel", "jupyterlab", "huggingface-hub", "av", "pillow",
         "ipywidgets", "anywidget", "traitlets", "playwright"}

# Import name -> package, where they differ.
PACKAGES = {"yaml": "pyyaml", "PIL": "pillow", "pynvml": "nvidia-ml-py", "mlflow": "mlflow-skinny"}
# Declared, but not imported: torchvision is for lpips, ipykernel for papermill, ipywidgets for anywidget,
# playwright for tests, the rest are commands.
NOT_IMPORTED = {"torchvision", "ipykernel", "jupyterlab", "pytest", "pytest-xdist", "hypothesis", "ruff",
                "ipywidgets", "playwright"}
# Imported only where they are there, or brought by what is declared: by torch, nbconvert and ipykernel.
NOT_DECLARED = {"triton", "jinja2", "tinycss2", "IPython", "flash_attn", "cutlass", "quack"}
MACHINE_PATH = re.compile(r"(?<![\w.~}>-])/(?:home|root|work|farm|Users|mnt)/[\w.]")
REGISTRY = re.compile(r"pypi\.org|pythonhosted\.org|registry\.npmjs|conda\.anaconda|deb\.debian", re.I)
FORBIDDEN = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda, ast.For, ast.While)


def name_of(requirement: str) -> str:
    return re.split(r"[<>=!~\[; ]", requirement)[0].lower().replace("_", "-")


# ---- packaging


def test_conda_and_pip_ask_for_the_same() -> None:
    """The conda way lacks the project itself, or an extra, or installs versions that nobody tested."""
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    pip = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    conda = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    # A tracker is a choice, and Ray is large and of use only to those who have a cluster.
    extras = ",".join(name for name in PROJECT["optional-dependencies"] if name not in ("mlflow", "ray"))
    assert pip == [["-c constraints.txt", f"-e .[{extras}]"]]
    assert conda == ["python" + PROJECT["requires-python"], "pip"]


def test_close_dependencies_have_both_bounds() -> None:
    """The next release of one of them breaks every fresh clone, as torch 2.14 and Triton 3.8 did."""
    bounds = {name_of(one): one for one in REQUIREMENTS}
    assert CLOSE <= bounds.keys()
    open_ended = [bounds[name] for name in CLOSE if not re.search(r">=[\d.]+,<[\d.]+$", bounds[name])]
    assert not open_ended


def test_tested_versions_are_allowed_ones(bootstrap: ModuleType) -> None:
    """Constraints that pip cannot meet, or that leave a dependency to what was released last night."""
    pins = bootstrap.tested_versions()
    for requirement in map(Requirement, REQUIREMENTS):
        assert requirement.specifier.contains(pins[name_of(requirement.name)]), requirement
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    assert len(lines) == len(pins) and all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)


def test_imports_are_declared() -> None:
    """A package that is there on the developer's machine by chance, or a dependency that nothing uses."""
    imported = set()
    for path in (ROOT / "longlive_opt").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.split(".")[0])
    imported -= {*sys.stdlib_module_names, *NOT_DECLARED, "longlive_opt"}
    used = {PACKAGES.get(name, name).replace("_", "-") for name in imported}
    declared = {name_of(requirement) for requirement in REQUIREMENTS}
    assert used - declared == set(), "add these to pyproject.toml and environment.yml"
    assert declared - used - NOT_IMPORTED == set(), "nothing imports these"


def test_make_help_names_every_target() -> None:
    """A target that nobody finds."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z0-9-]+):", makefile, re.MULTILINE))
    assert targets == set(re.search(r"\.PHONY: (.*)", makefile).group(1).split())
    assert targets == set(re.findall(r"^([a-z0-9-]+):.* ## ", makefile, re.MULTILINE))


# ---- notebooks


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook_is_clean(path: Path) -> None:
    """Outputs or the author's kernel in the repository; logic in a notebook where no test reaches it."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert notebook.metadata.language_info == {"name": "python", "file_extension": ".py",
                                               "mimetype": "text/x-python", "nbconvert_exporter": "python"}
    named = [cell.id for cell in notebook.cells]
    assert all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name) for name in named), "ids that say what they are"
    assert not [name for name in named if re.fullmatch(r"[0-9a-f]{8}", name)], "give the cells ids by hand"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not [cell for cell in code if cell.outputs or cell.execution_count is not None], "strip outputs"
    tagged = [cell for cell in code if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    for cell in code:
        tree = ast.parse(cell.source)
        found = [type(node).__name__ for node in ast.walk(tree) if isinstance(node, FORBIDDEN)]
        assert found == [], f"this belongs into longlive_opt: {cell.source}"
        assert not re.search(r"sys\.path|chdir|https?://|['\"]/", cell.source), cell.source
    for statement in ast.parse(tagged[0].source).body:
        ast.literal_eval(statement.value)


def test_a_notebook_as_a_script_ends_in_py() -> None:
    """`jupyter nbconvert --to script`, which writes a .txt for a notebook that does not name its suffix."""
    from nbconvert import ScriptExporter

    _, resources = ScriptExporter().from_notebook_node(nbformat.read(NOTEBOOKS[0], as_version=4))
    assert resources["output_extension"] == ".py"


@pytest.mark.parametrize("preset", Layout(ROOT).presets())
def test_parameters_cell_is_the_presets(preset: str) -> None:
    """A notebook that shows other values than its preset has, or words that the catalogue does not know; a
    cell of 60 lines that hides what the experiment is about.
    """
    source = parameters_source(Layout(ROOT).presets()[preset])
    found = {node.target.id if isinstance(node, ast.AnnAssign) else node.targets[0].id:
             ast.literal_eval(node.value) for node in ast.parse(source).body}
    own, laptop = (load_yaml(ROOT / f"params/{name}.yaml") for name in (preset, "profiles/laptop"))
    expected = {key: default for key, (default, _) in RUN_KEYS.items()}
    expected |= {key: ExperimentConfig().to_dict()[key] for key in parameters.READER_KEYS}
    expected |= {key: laptop.get(key, value) for key, value in own.items() if key != "hypothesis"}
    if own.get("use_cuda_graphs"):
        expected["device"] = "cuda"
    assert found == expected
    comments = {name: comment for name, (_, comment) in RUN_KEYS.items()}
    comments |= {name: entry.comment for name, entry in KEYS.items()}
    for line in source.splitlines():
        name = "prompts" if line.startswith("]") else re.match(r"\w*", line)[0]
        assert len(line) <= 110 and (not name or name == "prompts" and line.endswith("[")
                                     or line.endswith(f"  # {comments[name]}")), line


def parameters_source(notebook: Path) -> str:
    cells = nbformat.read(notebook, as_version=4).cells
    return next(cell.source for cell in cells if "parameters" in cell.metadata.get("tags", []))


@pytest.mark.parametrize("profile", [None, *PROFILES], ids=lambda path: path.name if path else "no profile")
def test_what_is_planned_reaches_the_notebook(profile: Path | None, tmp_path: Path,
                                              caplog: pytest.LogCaptureFixture) -> None:
    """A key that the cell does not state lost on its way, a value of the cell that nobody asked for, or
    dozens of papermill's warnings. papermill's own injection, without a kernel.
    """
    (tmp_path / "p.txt").write_text("a\nb\n")
    settings = {"kv_read_path": "dequantize", "num_switches": 3, "linear_layers": ["up"], "seed": 4,
                "prompts_file": str(tmp_path / "p.txt"), "switch_frame_indices": None, "height": 64,
                "global_sink": False, "video_width": None}
    for job in plan(Layout(ROOT), "house", profile=profile, settings=settings, repeats=1):
        caplog.clear()
        notebook = papermill.execute_notebook(job.notebook, None, dict(job.parameters), prepare_only=True,
                                              progress_bar=False)
        names: dict[str, object] = {}
        for cell in notebook.cells:
            if {"parameters", "injected-parameters"} & {*cell.metadata.get("tags", [])}:
                exec(cell.source, names)
        given = notebook_parameters(names)
        assert {given.pop(key) for key in RUN_KEYS} == {job.parameters[key] for key in RUN_KEYS}
        assert ExperimentConfig.from_mapping(given).to_dict() == job.known["parameters"]
        warned = [message for message in caplog.messages if "unknown parameter" in message]
        assert len(warned) <= 12, warned
        assert not [key for key in ("warmup_blocks", "playback_fps") if key in job.parameters]


@pytest.mark.parametrize("profile", PROFILES, ids=lambda path: path.name)
def test_notebooks_presets_and_profiles_fit(profile: Path) -> None:
    """A preset without a notebook, or a key that a notebook does not take, found on the GPU host."""
    layout = Layout(ROOT)
    jobs = plan(layout, "house", profile=profile, settings=QUICK, repeats=1)
    presets = {path.stem for path in layout.params.glob("*.yaml")}
    # Smoke is for tests, which build it without a notebook.
    assert presets - {"smoke"} == {job.label for job in jobs} - {"baseline.repeat2"}
    plan_summary(layout, "house")
    plan_training(layout)
    plan_quantization(layout, profile)


# ---- tracked files


def tracked_files() -> list[Path]:
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [path for name in done.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def test_no_path_of_one_machine_and_no_registry() -> None:
    """Text that is true on the author's machine only."""
    found = []
    for path in tracked_files():
        content = path.read_bytes()
        if b"\0" in content[:8192]:
            continue
        for number, line in enumerate(content.decode("utf-8", errors="replace").splitlines(), 1):
            hit = MACHINE_PATH.search(line) or REGISTRY.search(line)
            if hit:
                found.append(f"{path.relative_to(ROOT)}:{number}: {hit.group()}")
    assert found == []


def test_gitignore() -> None:
    """An environment of 6 GB in a commit, or the measured campaign left out of it."""
    tracked_files()
    candidates = {
        ".venv/bin/python": True, "wheelhouse/a.whl": True, ".bootstrap/stamp.json": True,
        "outputs/demo/baseline/result.json": True, "outputs/.sha256.json": True,
        "outputs/noise.json": False, "outputs/robustness.json": False, "outputs/steps.yaml": False,
        "outputs/h100/baseline.aside/notes.md": True, "outputs/h100/baseline.replaced/result.json": True,
        "outputs/h100/decisions.json": False,
        "longlive_opt/__pycache__/a.pyc": True,
        "notebooks/.ipynb_checkpoints/a.ipynb": True, "checkpoints/a.pt": True,
        "outputs/h100/baseline.failed/notebook.ipynb": True, "outputs/h100/.locks/baseline": True,
        "outputs/h100/baseline/result.json": False, "outputs/h100/baseline/video.mp4": True,
        "outputs/h100/baseline/report.html": False, "outputs/h100/summary/waterfall.png": False,
        "outputs/h200/speed/result.json": True,
        "outputs/h100_tiny/speed/result.json": False, "outputs/h100_tiny/speed/frames.png": True,
        "outputs/h200_long/realtime/result.json": False, "outputs/h200_fused_vae/faithful/result.json": False,
        "outputs/h200_two/record_2gpus/result.json": False,
        "outputs/h200_tiny/speed/result.json": False,
        "outputs/h100_tiny/baseline/reference.safetensors": True,
        "outputs/h100_extras/ablation/result.json": False, "outputs/h100/baseline/notebook.ipynb": True,
        "notebooks/01_baseline.ipynb": False, "params/profiles/h100.yaml": False,
    }
    command = ["git", "check-ignore", "--no-index", *candidates]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert set(done.stdout.splitlines()) == {path for path, ignored in candidates.items() if ignored}


# ---- set-up


@pytest.fixture
def bootstrap(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """scripts/bootstrap.py with its state in a folder of the test."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    module = importlib.import_module("bootstrap")
    monkeypatch.setattr(module, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(module, "STATE", tmp_path / ".bootstrap")
    return module


def stopped(capsys: pytest.CaptureFixture, function: object, *arguments: object) -> str:
    """The one line with which the set-up ends in `function`."""
    with pytest.raises(SystemExit) as caught:
        function(*arguments)
    lines = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2
    return lines[-1]


def test_old_python_can_read_the_set_up() -> None:
    """A SyntaxError where the message should say which Python is needed."""
    for path in (ROOT / "scripts").glob("*.py"):
        ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 6))


def test_too_old_python(bootstrap: ModuleType, capsys: pytest.CaptureFixture,
                        monkeypatch: pytest.MonkeyPatch) -> None:
    """Minutes of installation that end in an error of some package."""
    old = SimpleNamespace(version_info=(3, 9), exit=sys.exit, stderr=sys.stderr)
    monkeypatch.setattr(bootstrap, "sys", old)
    assert "Python 3.9, the project needs 3.11" in stopped(capsys, bootstrap.main)


def put_package(folder: Path, name: str, version: str, code: str = "") -> None:
    """A package that pip takes to be installed in `folder`."""
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(code)
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


@pytest.mark.parametrize(("version", "reused"), [
    ("2.11.0+cu130", True), ("2.10.0", True), ("2.12.0a0+git1", True), ("2.14.1", True),
    ("2.10.0a0+nv25", False), ("2.9.1", False), ("2.15.0", False), ("2.15.0.dev20261101+cu130", False),
    ("3.0.0", False),
])
def test_only_a_torch_within_the_bounds_is_reused(bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch,
                                                  tmp_path: Path, version: str, reused: bool) -> None:
    """A torch that nobody tested is kept, or a good one of 3 GB is installed again."""
    put_package(tmp_path, "torch", version)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert bootstrap.brought_torch(sys.executable) == version
    assert bootstrap.is_allowed(version) == reused
    specifier = Requirement("torch" + bootstrap.torch_bounds()[0]).specifier
    assert specifier.contains(version, prereleases=True) == reused


def test_a_torch_outside_the_bounds_is_named(bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch,
                                             capsys: pytest.CaptureFixture) -> None:
    """The torch of the GPU host is left aside without a word, and 3 GB come down."""
    monkeypatch.setattr(bootstrap, "brought_torch", lambda python: "2.9.1")
    made = []
    monkeypatch.setattr(bootstrap, "make_venv", lambda python, torch: made.append(torch))
    assert bootstrap.choose_environment(offline=False) == str(bootstrap.VENV / "bin/python")
    assert made == [None]
    assert re.search(r"torch 2.9.1 of .* is not used: .* torch>=2.10,<2.15", capsys.readouterr().err)
    assert "torch>=2.10,<2.15" in stopped(capsys, bootstrap.choose_environment, True)


def test_broken_torch_is_not_reused(bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch,
                                    tmp_path: Path) -> None:
    """A torch whose libraries are missing: everything is installed around it and nothing runs."""
    put_package(tmp_path, "torch", "2.11.0", "raise OSError('libcudnn.so.9: cannot open shared object')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert bootstrap.brought_torch(sys.executable) is None


def test_what_the_set_up_installed_is_not_brought(bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch,
                                                  tmp_path: Path) -> None:
    """`make test` after `make install NEWEST=1` keeps the newest torch, as if it were the GPU host's own."""
    put_package(bootstrap.VENV / "lib", "torch", "2.14.77")
    put_package(tmp_path / "system", "numpy", "2.1.0")
    monkeypatch.setenv("PYTHONPATH", f"{bootstrap.VENV / 'lib'}:{tmp_path / 'system'}")
    brought = bootstrap.brought_packages(sys.executable)
    assert brought["numpy"] == "2.1.0" and brought.get("torch") != "2.14.77"


def test_stamp(bootstrap: ModuleType, tmp_path: Path) -> None:
    """Installing on every make, or not even after the dependencies changed or the environment went away."""
    bootstrap.STATE.mkdir()
    stamp = {"digest": "a", "root": str(bootstrap.ROOT), "python": sys.executable}
    path = bootstrap.STATE / "stamp.json"
    path.write_text(json.dumps(stamp))
    assert bootstrap.finished_python("a") == sys.executable
    assert bootstrap.finished_python("b") is None
    path.write_text(json.dumps(stamp | {"python": str(tmp_path / "gone")}))
    assert bootstrap.finished_python("a") is None
    path.write_text(json.dumps(stamp | {"root": str(tmp_path / "moved")}))
    assert bootstrap.finished_python("a") is None
    path.write_text('{"dig')
    assert bootstrap.finished_python("a") is None


def test_installation_never_changes_torch(bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch,
                                          tmp_path: Path) -> None:
    """pip upgrades the GPU host's torch because the newest torchvision asks for it."""
    commands = []

    def popen(command: list[str], **kwargs: object) -> SimpleNamespace:
        commands.append(command)
        return SimpleNamespace(stdout=[], wait=lambda: 0)

    monkeypatch.setattr(bootstrap.subprocess, "Popen", popen)
    monkeypatch.setattr(bootstrap, "brought_packages", lambda python: {"torch": "2.12.1"})
    bootstrap.STATE.mkdir()
    bootstrap.install("python", "2.12.1", tmp_path)
    held = (bootstrap.STATE / "constraints.txt").read_text().splitlines()
    assert [line for line in held if line.startswith(("torch", "triton"))] == [
        "torch==2.12.1", f"torchmetrics=={bootstrap.tested_versions()['torchmetrics']}"]
    assert commands[0][commands[0].index("--constraint") + 1] == str(bootstrap.STATE / "constraints.txt")
    assert {"--no-index", "--find-links", str(tmp_path)} < set(commands[0]) and "--upgrade" not in commands[0]
    bootstrap.install("python", "2.12.1", None, newest=True)
    assert (bootstrap.STATE / "constraints.txt").read_text() == "torch==2.12.1\n"
    assert "--upgrade" not in commands[1], "it is not the set-up's own environment"


def test_fresh_machine_gets_the_tested_versions(bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch,
                                                tmp_path: Path) -> None:
    """What was released last night decides whether the README's two commands work."""
    path, pins = tmp_path / "held.txt", bootstrap.tested_versions()

    def held(*arguments: object) -> dict[str, str]:
        bootstrap.write_constraints(path, *arguments)
        return dict(line.split("==") for line in path.read_text().splitlines())

    assert held({}, None, False) == pins
    assert held({}, None, True) == {}
    # What an environment brings stays, and what goes with the tested torch goes with no other.
    beside = held({"numpy": "2.1.0", "torch": "2.12.0"}, "2.12.0", False)
    assert beside["torch"] == "2.12.0"
    assert beside.keys() == pins.keys() - {"numpy", *bootstrap.WITH_TORCH} | {"torch"}
    assert held({"torch": "2.11.0"}, "2.11.0+cu126", False)["torchvision"] == pins["torchvision"]
    # One that is not allowed is replaced by the tested one.
    assert held({"torch": "2.15.0", "torchvision": "0.30.0"}, None, False) == pins


def test_without_cuda_torch_comes_from_its_own_index(bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch,
                                                     capsys: pytest.CaptureFixture) -> None:
    """15 wheels of CUDA on a laptop without a GPU; or pip that takes them all the same; or a choice that the
    next make forgets.
    """
    calls, pins = [], bootstrap.tested_versions()

    def popen(command: list[str], **kwargs: object) -> SimpleNamespace:
        calls.append(command)
        return SimpleNamespace(stdout=[], wait=lambda: 0)

    monkeypatch.setattr(bootstrap.subprocess, "Popen", popen)
    monkeypatch.setattr(bootstrap, "brought_packages", lambda python: {})
    monkeypatch.setattr(bootstrap, "brought_torch", lambda python: None)
    monkeypatch.setattr(bootstrap, "choose_environment", lambda offline: sys.executable)
    monkeypatch.setattr(bootstrap, "check_torchvision", lambda python: None)
    monkeypatch.setattr(bootstrap.sys, "argv", ["bootstrap.py", "--cpu"])
    assert bootstrap.main() == 0
    assert calls[0][calls[0].index("--extra-index-url") + 1] == bootstrap.CPU_INDEX
    held = (bootstrap.STATE / "constraints.txt").read_text().splitlines()
    assert f"torch=={pins['torch']}+cpu" in held and f"torchvision=={pins['torchvision']}+cpu" in held
    monkeypatch.setattr(bootstrap.sys, "argv", ["bootstrap.py"])
    assert bootstrap.main() == 0 and len(calls) == 1, "it is set up, and stays without CUDA"
    monkeypatch.setattr(bootstrap.sys, "argv", ["bootstrap.py", "--no-cpu"])
    assert bootstrap.main() == 0 and len(calls) == 2 and "--extra-index-url" not in calls[1]
    assert f"torch=={pins['torch']}\n" in (bootstrap.STATE / "constraints.txt").read_text()
    # A torch of the environment stays as it is, and torchvision is of its build.
    for torch_, has_index in (("2.11.0", False), ("2.11.0+cpu", True)):
        (bootstrap.STATE / "stamp.json").unlink()
        monkeypatch.setattr(bootstrap, "brought_torch", lambda python: torch_)
        monkeypatch.setattr(bootstrap.sys, "argv", ["bootstrap.py", "--cpu"])
        assert bootstrap.main() == 0 and ("--extra-index-url" in calls[-1]) == has_index
        assert f"torch {torch_} stays" in capsys.readouterr().err


def test_torchvision_of_another_build_ends_the_set_up(bootstrap: ModuleType, tmp_path: Path,
                                                      capsys: pytest.CaptureFixture) -> None:
    """"done", and then `operator torchvision::nms does not exist` in the middle of a notebook."""
    bootstrap.STATE.mkdir(exist_ok=True)
    (bootstrap.STATE / "torchvision.py").write_text("raise RuntimeError('operator nms does not exist')")
    says = stopped(capsys, bootstrap.check_torchvision, sys.executable)
    assert "(RuntimeError: operator nms does not exist): install the one" in says


def test_constraints_and_mode_make_the_set_up_anew(bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch,
                                                   tmp_path: Path) -> None:
    """A changed constraints file, or NEWEST=1, that leaves the old environment as it is."""
    digests = [bootstrap.dependency_digest(newest) for newest in (False, True)]
    changed = tmp_path / "constraints.txt"
    changed.write_text(bootstrap.CONSTRAINTS.read_text() + "one-more==1\n")
    monkeypatch.setattr(bootstrap, "CONSTRAINTS", changed)
    assert len({*digests, bootstrap.dependency_digest(False)}) == 3


@pytest.mark.parametrize(("line", "words"), [
    ("NewConnectionError: [Errno 101] Network is unreachable", "PIP_INDEX_URL"),
    ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "TMPDIR"),
    ("python: No module named pip", "ensurepip"),
    ("ERROR: No matching distribution found for nonsense", "nonsense"),
])
def test_pip_failures_in_one_sentence(bootstrap: ModuleType, line: str, words: str) -> None:
    """Two screens of pip where one sentence with the remedy would do."""
    assert words in bootstrap.explain(["Collecting torch", line], None)
    assert "\n" not in bootstrap.explain(["Collecting torch", line], None)


@pytest.mark.parametrize(("lost", "says"), [
    (["/whl/cpu/torch/"], "/whl/cpu, cannot be reached from here; name a mirror of it in LONGLIVE_OPT_"),
    ([], "/whl/cpu, has no torch of this version for this Python; name a mirror"),
    (["/simple/setuptools/", "/whl/cpu/torch/"], "no package index reachable; set a proxy"),
    (["/simple/setuptools/"], "no package index reachable"),
], ids=["index of torch", "wheel", "both", "other index"])
def test_a_missing_index_is_no_conflict_of_versions(bootstrap: ModuleType, lost: list[str],
                                                    says: str) -> None:
    """pip's "conflicting dependencies" for an index that did not answer, many lines before."""
    retry = "WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError(...)': "
    lines = [*(retry + path for path in lost),
             "ERROR: Cannot install torch==2.11.0+cpu because these package versions have conflicting "
             "dependencies.", "ERROR: ResolutionImpossible: for help visit https://pip.pypa.io"]
    words = bootstrap.explain(lines, None, cpu=True)
    assert says in words and "conflicting" not in words and "\n" not in words
    assert ("make install CPU=0" in words) == ("no package index" not in words)


def test_missing_ensurepip_and_full_disk(bootstrap: ModuleType, capsys: pytest.CaptureFixture,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    """Debian's python3 without python3-venv, and a disk that fills up in the middle of the installation."""
    monkeypatch.setitem(sys.modules, "ensurepip", None)
    assert "python3-venv" in stopped(capsys, bootstrap.make_venv, "python", None)
    monkeypatch.setattr(bootstrap.shutil, "disk_usage", lambda path: SimpleNamespace(free=2**30))
    assert "needs 8 GB" in stopped(capsys, bootstrap.check_disk, bootstrap.NEED_FULL)


@pytest.fixture
def versions(bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """scripts/test_versions.py, which makes no environment and runs nothing."""
    module = importlib.import_module("test_versions")
    monkeypatch.setattr(module, "FOLDER", tmp_path / "versions")
    monkeypatch.setattr(module, "check_disk", lambda need: None)
    monkeypatch.setattr(module, "describe", lambda python: "torch of a test")
    return module


def test_tests_of_versions_are_there(versions: ModuleType) -> None:
    """A test file that was renamed, or a name of -k that leaves nothing out any more."""
    sources = [(ROOT / "tests" / name).read_text(encoding="utf-8") for name in versions.TESTS]
    for part in versions.LONG:
        assert any(re.search(rf"def test_\w*{part}", source) for source in sources), part
    for name, parts in versions.PARTS.items():
        for part in parts.split(" or "):
            assert re.search(rf"def test_\w*{part}", sources[versions.TESTS.index(name)]), part
    assert [versions.requirement(which) for which in ("oldest", "newest", "2.13", "2.12.1")] == [
        "torch==2.10.*", "torch>=2.10,<2.15", "torch==2.13.*", "torch==2.12.1"]


@pytest.mark.parametrize(("pip_says", "passed", "status"), [
    ("ERROR: No matching distribution found for torch==2.10.*", True, 0),
    ("    The user requested (constraint) torch<=2.9", True, 0),
    ("NewConnectionError: Network is unreachable", True, 2),
    (None, True, 0),
    (None, False, 1),
])
def test_what_becomes_of_a_version(versions: ModuleType, monkeypatch: pytest.MonkeyPatch,
                                   capsys: pytest.CaptureFixture, pip_says: str | None, passed: bool,
                                   status: int) -> None:
    """CI is red because an index has no old torch, or green though a test failed or nothing was installed."""
    def run(command: list[str], **options: object) -> SimpleNamespace:
        if "venv" in command:
            Path(command[-1]).mkdir()
        return SimpleNamespace(returncode=int("pip" in command and pip_says is not None), stdout=pip_says)

    monkeypatch.setattr(versions.subprocess, "run", run)
    monkeypatch.setattr(versions, "run_tests", lambda python, more: passed)
    monkeypatch.setattr(sys, "argv", ["test_versions.py", "oldest"])
    try:
        found = versions.main()
    except SystemExit as caught:
        found = caught.code
    assert found == status
    skipped = "is skipped: the package index" in capsys.readouterr().out
    assert skipped == (pip_says is not None and not status)
    assert not list(versions.FOLDER.iterdir()), "5 GB are left behind"


def test_a_made_environment_is_used(versions: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """CI makes the environments while other tests run, and then a second time; or tests what is left of an
    installation that was interrupted, or of other requirements.
    """
    done = []

    def run(command: list[str], **options: object) -> SimpleNamespace:
        done.append("venv" if "venv" in command else next(part for part in command if "torch" in part))
        if "venv" in command:
            Path(command[-1]).mkdir(parents=True)
        return SimpleNamespace(returncode=0, stdout="")

    monkeypatch.setattr(versions.subprocess, "run", run)
    monkeypatch.setattr(versions, "run_tests", lambda python, more: True)
    for arguments in (["2.13", "--make"], ["2.13", "--make"]):
        monkeypatch.setattr(sys, "argv", ["test_versions.py", *arguments])
        assert versions.main() == 0
    assert done == ["venv", "torch==2.13.*"]
    folder = versions.FOLDER / "2.13"
    (folder / "made.txt").write_text("other requirements")
    versions.make_environment(folder, "torch==2.13.*")
    assert done == ["venv", "torch==2.13.*"] * 2
    monkeypatch.setattr(sys, "argv", ["test_versions.py", "2.13"])
    assert versions.main() == 0
    assert done == ["venv", "torch==2.13.*"] * 2 and not folder.exists()


def test_stand_ins_hold_the_versions_of_the_host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """pip does not accept the stand-in, and the wheelhouse grows by torch and 3 GB of CUDA libraries."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    wheelhouse = importlib.import_module("wheelhouse")
    listed = "torch==2.11.0+cu130\nTyping.Extensions==4.15.0\nlonglive_opt==0.1.0\n"
    (tmp_path / "have.txt").write_text(listed)
    have = wheelhouse.read_have(tmp_path / "have.txt")
    assert have == {"torch": "2.11.0+cu130", "typing_extensions": "4.15.0"}
    constraints = [wheelhouse.write_stand_in(tmp_path, *item) for item in have.items()]
    assert constraints == ["torch==2.11.0+cu130\n", "typing_extensions==4.15.0+host\n"]
    (tmp_path / "constraints.txt").write_text("".join(constraints))
    command = [sys.executable, "-m", "pip", "download", "--no-index", "--find-links", ".", "--dest", "out",
               "--constraint", "constraints.txt", "torch>=2.10", "typing-extensions>=4"]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    assert len(list((tmp_path / "out").glob("*.whl"))) == 2
    for name, version in wheelhouse.ASSUMED.items():
        requirement = next(one for one in map(Requirement, REQUIREMENTS) if one.name == name)
        assert requirement.specifier.contains(f"{version}+host"), "a host with an allowed torch is assumed"
    with zipfile.ZipFile(next((tmp_path / "out").glob("torch-*.whl"))) as wheel:
        assert not any(name.endswith(".py") for name in wheel.namelist())


# ---- reports


def write_notebook(path: Path, prose: str) -> None:
    v4 = nbformat.v4
    data = {"text/html": "<video src='data:video/mp4;base64,AAAA'></video>"}
    video = v4.new_output("display_data", data=data)
    cells = [v4.new_markdown_cell(prose), v4.new_code_cell("cell_code", outputs=[video])]
    nbformat.write(v4.new_notebook(cells=cells), path)


def test_report_is_self_contained(tmp_path: Path) -> None:
    """nbconvert's templates load three scripts from the internet: offline, a report hangs or looks broken."""
    notebook, report = tmp_path / "notebook.ipynb", tmp_path / "report.html"
    write_notebook(notebook, "# Title\n\n[a link](https://example.org) is no reference")
    export_html(notebook, report, title="<b>bold</b> & co")
    html = report.read_text(encoding="utf-8")
    assert network_references(html) == []
    assert "data:video/mp4;base64,AAAA" in html and "cell_code" in html
    assert "<title>&lt;b&gt;bold&lt;/b&gt; &amp; co</title>" in html
    export_html(notebook, report, title="x", hide_code=True)
    assert "cell_code" not in report.read_text(encoding="utf-8")


def test_report_opens_with_its_card(tmp_path: Path) -> None:
    """A verdict below ten screens of charts, or one that is patched into finished HTML."""
    notebook, report = tmp_path / "notebook.ipynb", tmp_path / "report.html"
    write_notebook(notebook, "# Heading of the notebook")
    export_html(notebook, report, title="x", card='<section id="verdict">a &lt; b</section>')
    html = report.read_text(encoding="utf-8")
    assert 0 < html.index('<section id="verdict">a &lt; b</section>') < html.index("Heading of the notebook")
    export_html(notebook, report, title="x")
    assert 'id="verdict"' not in report.read_text(encoding="utf-8")


def test_parameters_and_code_are_folded(tmp_path: Path) -> None:
    """A report whose first two screens are parameters and code, or one that lacks them."""
    notebook, report = tmp_path / "notebook.ipynb", tmp_path / "report.html"
    v4 = nbformat.v4
    tagged = [v4.new_code_cell(f"{tag}_cell", metadata={"tags": [tag]})
              for tag in ("parameters", "injected-parameters")]
    shown = v4.new_code_cell("experiment.parameters()",
                             outputs=[v4.new_output("display_data", data={"text/plain": "seed_and_size"})])
    nbformat.write(v4.new_notebook(cells=[*tagged, v4.new_code_cell("own_cell"), shown]), notebook)
    export_html(notebook, report, title="x")
    page = report.read_text(encoding="utf-8")
    assert page.index("<summary>Parameters that are not the defaults") < page.index("seed_and_size")
    folded = re.findall(r"(?s)<details.*?</details>", report.read_text(encoding="utf-8"))
    assert len(folded) == 5 and "Parameters of this run" in folded[1]
    assert "parameters_cell" in folded[0] and "Code" in folded[2] and "own_cell" in folded[2]


def test_what_came_out_is_first_and_where_it_comes_from_last(tmp_path: Path) -> None:
    """An answer eight screens down; a page that cannot be traced to its machine and commit."""
    v4 = nbformat.v4
    names = ["question", "parameters", "build", "measure", "looking", "video", "conclusion", "charts", "foot"]
    cells = [(v4.new_markdown_cell if name in ("question", "looking", "foot") else v4.new_code_cell)(
        f"cell_{name}_", id=name) for name in names]
    nbformat.write(v4.new_notebook(cells=cells), tmp_path / "notebook.ipynb")
    export_html(tmp_path / "notebook.ipynb", tmp_path / "report.html", title="x", card="the_card",
                foot=provenance_html([read_result(ROOT / "outputs/h200_long/realtime/result.json")]))
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    shown = [f"cell_{name}_" for name in ("question", "looking", "video", "conclusion", "charts",
                                          "parameters", "build", "measure", "foot")]
    order = [page.index(words) for words in ("the_card", *shown, "on NVIDIA H200", "torch 2.11")]
    assert order == sorted(order)
    assert re.search(r"Commit [0-9a-f]{12}", page) and "run of 2026-" in page
    assert "In&nbsp;[" not in page


def test_a_report_has_styles_for_paper_phone_and_the_dark(tmp_path: Path) -> None:
    """Rules that the export takes for unused and drops: tests/browser looks at what they do."""
    write_notebook(tmp_path / "notebook.ipynb", "# Title")
    export_html(tmp_path / "notebook.ipynb", tmp_path / "report.html", title="x")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for rule in ("@media (prefers-color-scheme: dark)", "@media print", "size: A4", "(max-width: 600px)",
                 "--jp-layout-color0: #16181c", ".on-paper"):
        assert rule in page and rule in REPORT, rule


def test_only_styles_that_nothing_asks_for_are_dropped() -> None:
    """A report that looks different, or carries 240 KB of JupyterLab's icons."""
    html = """<style>:root { --seen: red; --by-seen: 1px; --seen2: var(--by-seen); --icon: url(data:x) }
        p { color: var(--seen) } .here, .gone { top: var(--seen2) } .gone .here { top: 2px }
        .here:not(.gone) { top: 3px } .gone { background: var(--icon) } @media print { .gone { top: 4px } }
        </style><p class="other here">.gone {}</p>"""
    slim = drop_unused_styles(html)
    assert slim.endswith('<p class="other here">.gone {}</p>')
    kept = "--seen: --by-seen: --seen2: .here, .here:not(.gone) 3px 4px".split()
    assert all(part in slim for part in kept)
    assert not any(part in slim for part in ("--icon", "2px", "data:x", ".gone {background"))
    assert drop_unused_styles(slim) == slim


@pytest.mark.parametrize("text", ["null", "[]", '{"cells": null}', "{", "",
                                  '{"nbformat": 4, "cells": [{"outputs": null}]}'])
def test_what_is_no_notebook_is_refused(tmp_path: Path, text: str) -> None:
    """An AttributeError for a notebook that was cut off or edited by hand."""
    (tmp_path / "notebook.ipynb").write_text(text)
    with pytest.raises(UserError, match="not a readable notebook"):
        export_html(tmp_path / "notebook.ipynb", tmp_path / "report.html", title="x")


def test_remote_picture_is_refused(tmp_path: Path) -> None:
    """A report that tells a server who reads it, and shows a hole without a network."""
    write_notebook(tmp_path / "notebook.ipynb", '<img src="//example.org/a.png">')
    with pytest.raises(UserError, match="example.org/a.png"):
        export_html(tmp_path / "notebook.ipynb", tmp_path / "report.html", title="x")
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("html", [
    '<script src="https://h/a.js"></script>', '<link rel="stylesheet" href="http://h/a.css">',
    "<img src='//h/a.png'>", '<img srcset="a.png 1x, https://h/b.png 2x">', '<video poster="https://h/a">',
    "<style>a { background: url(https://h/a.png) }</style>", '<style>@import "https://h/a.css"</style>',
    '<iframe srcdoc="<img src=https://h/a.png>">', '<meta http-equiv="refresh" content="0; url=https://h/">',
    '<form action="https://h/">', "<style>a { background: image-set('https://h/a.png' 1x) }</style>",
    '<img src="http:\\\\h/a.png">', '<img src="ht\ttp://h/a.png">',
    '<p style="background: url(//h/a.png)">', "<script>import a from 'https://h/a.js'</script>",
    "<script>fetch('https://h/a')</script>", '<svg><image href="https://h/a.png"/></svg>',
])
def test_references_are_found(html: str) -> None:
    """A kind of reference that the check of the reports does not see."""
    assert len(network_references(html)) == 1


def test_generated_files_are_current() -> None:
    """A key, a preset or a profile that was changed, and the page or a notebook that still has the old one:
    run `make parameters`.
    """
    stale = [path.name for path, text in parameters.generated(Layout(ROOT)).items()
             if path.read_text(encoding="utf-8") != text]
    assert stale == []


def test_readme_shows_the_campaigns_results():
    """A headline that is not that of the log; two homes for one number."""
    campaign = load(ROOT / "outputs/h100")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert page_with_results(text, campaign) == text, "run make readme"
    with pytest.raises(UserError, match="end of results"):
        page_with_results("no marks", campaign)


def test_readme_shows_what_the_checks_of_robustness_found():
    """A claim that outlived its check, or a check that failed and is not said to."""
    text, record = (ROOT / "README.md").read_text(encoding="utf-8"), ROOT / ROBUSTNESS_FILE
    assert page_with_robustness(text, record) == text, "run make readme"
    checks = read_json(record, "")["checks"]
    assert "<!-- end of robustness -->" in text and all(check["claim"] in text for check in checks.values())
    assert all(check["passed"] and not check["dirty"] and check["commit"] for check in checks.values())
    for check in checks.values():
        assert {"command", "figure", "n", "seconds", "machine", "torch", "commit"} <= check.keys()


def test_readmes_prompts_are_of_the_tiny_models_world():
    """An example that is copied and answered by a notice that the model knows nothing of it."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in readme.splitlines() if line.startswith('{"prompts"')]
    assert lines and not any(strange(prompt) for line in lines for prompt in line["prompts"])


def test_readme_states_what_the_committed_runs_say():
    """A figure that was typed once and outlived its run."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    long = read_result(ROOT / "outputs/h200_long/realtime/result.json")
    blocks = [ms / long["sizes"]["frames_per_block"] for ms in long["latency"]["ss_block_ms"]]
    fifth = len(blocks) // 5
    first, last = (sum(part) / fifth for part in (blocks[:fifth], blocks[-fifth:]))
    assert (f"{first:.2f} ms per frame in the first fifth of {len(blocks)} blocks, {last:.2f} in the last, "
            f"worst {max(blocks):.2f}") in readme
    faithful = read_result(ROOT / "outputs/h200_fused_vae/faithful/result.json")["latency"]
    assert f"SS max {faithful['ss_ms_per_frame']['max']:.1f} ms per frame" in readme
    for suffix in ("", "_2gpus"):
        found = {preset: read_result(ROOT / f"outputs/h200_two/{preset}{suffix}/result.json")["latency"]
                 for preset in ("exact", "record", "tiny_vae")}
        assert ", ".join(f"{preset} {latency['ss_ms_per_frame']['max']:.1f} ({latency['ps_ms']['mean']:.0f})"
                         for preset, latency in found.items()) in readme
    eight_bit = read_result(ROOT / "outputs/h200_two/fp8_vae/result.json")["latency"]
    assert (f"fp8_vae {eight_bit['ss_ms_per_frame']['max']:.1f} ({eight_bit['ps_ms']['mean']:.0f})" in readme)
    nulls = read_result(ROOT / "outputs/h100/baseline/result.json")["quality"]["nulls"]
    no_sink = next(null["worst_ratio"] for null in nulls if null["name"] == "no_sink")
    assert re.search(rf"without\nthe attention sink \(.*\) the ratio is {no_sink:.0f}\.", readme)
    passed = re.search(r"(\d+) passed", (ROOT / "outputs/h100/gpu_tests.txt").read_text(encoding="utf-8"))[1]
    assert f"(outputs/h100/gpu_tests.txt): {passed} passed" in readme


def test_readme_says_what_other_gpus_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table that was right for older presets: a B200 that is promised all and refuses the fastest."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]*\(\d+\.\d\)[^|]*) \| (.*) \| (.*) \|$", readme, re.MULTILINE)
    presets = {path.stem: load_yaml(path) for path in (ROOT / "params").glob("*.yaml")}
    seen = set()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "another GPU")
    for cards, keys, names in rows:
        for major, minor in re.findall(r"\((\d+)\.(\d)\)", cards):
            capability = int(major), int(minor)
            seen.add(capability)
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
            refused = {key: value for key, value, check in (
                ("attention_backend", "gluon",
                 lambda: attention_bf16.check_gpu(torch.device("cuda"), torch.bfloat16, 128)),
                ("use_fused_vae", True, lambda: fused_vae.check_device(torch.device("cuda"))),
                ("use_quantized_kv", True, lambda: quantized_kv_cache.check_kernels(128, capability)),
                ("use_quantized_linears", True,
                 lambda: quantized_linears.check_linears("int8", 1536, 8960, capability)))
                if refuses(check)}
            assert {words.partition(":")[0] for words in re.findall(r"`([^`]*)`", keys)} == refused.keys()
            assert names.split(", ") == sorted(
                name for name, preset in presets.items()
                if any(preset.get(key) == value for key, value in refused.items()))
    assert seen == {(8, 0), (8, 9), (10, 0), (12, 0)}


def refuses(check: Callable[[], None]) -> bool:
    try:
        check()
    except NotAvailable:
        return True
    return False


def test_readme_is_in_the_order_of_a_visitor() -> None:
    """An explanation of sinks before the command that makes a video; a section that was lost in a merge."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    order = ["# longlive_opt", "notebooks/pictures/switch.webp", "<!-- results:", "## Two commands",
             "## A video in one line", "## Live", "## On an H100", "## With official weights",
             "## Run your own", "CONTRIBUTING.md", "## How it works", "## Supported systems", "## Questions",
             "## Licence and citation"]
    places = [readme.index(words) for words in order]
    assert places == sorted(places)
    for link in re.findall(r"\]\(([^)#:]+)\)", readme):
        assert (ROOT / link).exists(), link


def test_citation_is_that_of_this_version() -> None:
    """A file that no reference manager reads, or that names another release."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["version"] == longlive_opt.__version__
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for source in citation["references"]:
        assert source["identifiers"][0]["value"] in readme and source["authors"]


def test_page_lists_every_key_preset_and_profile() -> None:
    """A key that a refused preset's author cannot look up where the message sends him."""
    page = (ROOT / "params/README.md").read_text(encoding="utf-8")
    assert not [key for key, entry in KEYS.items()
                if not re.search(rf"\| `{key}` \|.*{re.escape(entry.doc)}", page)]
    assert not [path for path in (ROOT / "params").rglob("*.yaml") if f"[{path.stem}](" not in page]
    assert "params/README.md" in (ROOT / "README.md").read_text(encoding="utf-8")
