"""Set up the environment once and print its Python: python3 scripts/bootstrap.py [--newest | --cpu]

Uses only the standard library. Messages go to stderr, so that `py="$(python3 scripts/bootstrap.py)"` works.
The place of the installation:

1. If the calling Python is a virtual environment with a torch that pyproject.toml allows (GPU hosts), that
   environment.
2. Otherwise .venv. It sees the caller's packages if they include such a torch (containers, conda).

The versions are those of constraints.txt, or with --newest the newest that pyproject.toml allows. Packages of
the existing environment keep their allowed versions. Its torch never changes, because pip gets the constraint
torch==<its version>. (Without it `pip install lpips` upgrades torch, because the newest torchvision needs the
newest torch.) Packages that the set-up itself installed into .venv follow constraints.txt.

With --cpu torch comes from PyTorch's own index of CPU-only wheels: 0.2 GB instead of 3 GB with the CUDA
libraries. Later calls keep this choice; --no-cpu ends it.

A second call finds .bootstrap/stamp.json and does nothing until the dependencies in pyproject.toml, the
constraints or the mode change. The syntax is that of Python 3.6, so that an old Python can read this file and
report that it is too old.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List, NoReturn, Optional, Tuple

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STATE = ROOT / ".bootstrap"
CONSTRAINTS = ROOT / "constraints.txt"
MIN_PYTHON = (3, 11)
# Packages that must fit the existing torch. Their tested versions do not apply if it is another version.
WITH_TORCH = ("torch", "torchvision", "triton", "cuda-bindings", "cuda-pathfinder")
GIB = 2**30
# Required free disk space: with torch and its CUDA libraries to install, with torch alone, and without.
NEED_FULL, NEED_CPU, NEED_REST = 8 * GIB, 3 * GIB, 1 * GIB
CPU_INDEX = os.environ.get("LONGLIVE_OPT_CPU_INDEX") or "https://download.pytorch.org/whl/cpu"
# Packages of that index; their versions end in +cpu there, which keeps pip from taking those with CUDA.
ON_CPU_INDEX = ("torch", "torchvision")
NETWORK_SIGNS = (
    "NewConnectionError", "NameResolutionError", "ConnectTimeout", "ReadTimeout", "ProxyError",
    "getaddrinfo failed", "Name or service not known", "nodename nor servname", "Network is unreachable",
    "Temporary failure in name resolution", "Connection refused", "CERTIFICATE_VERIFY_FAILED",
)


def say(text: str) -> None:
    print("set-up: " + text, file=sys.stderr, flush=True)


def stop(text: str) -> NoReturn:
    print("error: " + text, file=sys.stderr, flush=True)
    sys.exit(2)


def read_project() -> Dict[str, Any]:
    """The content of pyproject.toml."""
    import tomllib

    with open(str(ROOT / "pyproject.toml"), "rb") as file:
        return tomllib.load(file)


def dependency_digest(newest: bool, cpu: bool = False) -> str:
    """A hash of the requested installation. It changes whenever the environment must change."""
    content = read_project()
    project = content["project"]
    wanted = [content["build-system"], project["dependencies"], project["optional-dependencies"],
              "newest" if newest else CONSTRAINTS.read_text(encoding="utf-8")] + ["cpu"] * cpu
    return hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()


def torch_bounds() -> Tuple[str, Tuple[int, int], Tuple[int, int]]:
    """The torch that pyproject.toml allows: its requirement, the first release, and the first too new one."""
    for requirement in read_project()["project"]["dependencies"]:
        found = re.match(r"torch(>=(\d+)\.(\d+),<(\d+)\.(\d+))$", requirement)
        if found:
            low, high = found.group(2, 3), found.group(4, 5)
            return found.group(1), (int(low[0]), int(low[1])), (int(high[0]), int(high[1]))
    stop("pyproject.toml has no line torch>=A.B,<C.D")


def tested_versions() -> Dict[str, str]:
    """Name -> version from constraints.txt, with names as pip normalises them."""
    lines = CONSTRAINTS.read_text(encoding="utf-8").split("\n")
    pairs = [line.split("==") for line in lines if "==" in line and not line.startswith("#")]
    return {normal(name): version.strip() for name, version in pairs}


def normal(name: str) -> str:
    """The name of a package as pip normalises it."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def finished_python(digest: str) -> Optional[str]:
    """The Python of a complete and current set-up, or None."""
    try:
        stamp = json.loads((STATE / "stamp.json").read_text(encoding="utf-8"))
        current = stamp["digest"] == digest and stamp["root"] == str(ROOT)
        return stamp["python"] if current and os.access(stamp["python"], os.X_OK) else None
    except (OSError, ValueError, KeyError):
        return None


def chose_cpu() -> bool:
    """Whether the last set-up was told to do without CUDA."""
    try:
        return bool(json.loads((STATE / "stamp.json").read_text(encoding="utf-8")).get("cpu"))
    except (OSError, ValueError, AttributeError):
        return False


def brought_packages(python: str) -> Dict[str, str]:
    """Name -> version of the packages that `python` sees and that the set-up did not install into .venv."""
    code = """if True:
        import importlib.metadata, json, sys
        print(json.dumps([(one.metadata["Name"], one.version, str(one.locate_file("")))
                          for one in importlib.metadata.distributions() if one.metadata["Name"]]))
    """
    done = subprocess.run([python, "-P", "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    found = json.loads(done.stdout.decode()) if not done.returncode else []
    own = VENV.resolve()
    # Python imports the first package of a name.
    return {normal(name): version for name, version, place in reversed(found)
            if own not in Path(place).resolve().parents}


def brought_torch(python: str) -> Optional[str]:
    """pip's version of a torch that `python` can import and that the set-up did not install, or None.

    It comes from the package's metadata, because `torch.__version__` may be 2.11.0+cu130 where pip has
    2.11.0.
    """
    version = brought_packages(python).get("torch")
    if version is None or subprocess.call([python, "-P", "-c", "import torch"], stdout=subprocess.DEVNULL,
                                          stderr=subprocess.DEVNULL):
        return None
    return version


def is_allowed(torch: str) -> bool:
    """Whether pyproject.toml allows this version of torch. As for pip, 2.10.0a0 sorts before 2.10."""
    _, low, high = torch_bounds()
    found = re.match(r"(\d+)\.(\d+)(\.\d+)*(a|b|rc|\.dev)?", torch)
    if not found:
        return False
    release = (int(found.group(1)), int(found.group(2)))
    return low <= release < high and not (release == low and found.group(4))


def choose_environment(offline: bool) -> str:
    """Decide where to install, create .venv if necessary, and return the environment's Python."""
    own = str(VENV / "bin" / "python")
    is_venv = sys.prefix != sys.base_prefix
    if is_venv and Path(sys.prefix).resolve() == VENV.resolve():
        return own
    torch = brought_torch(sys.executable)
    if torch and not is_allowed(torch):
        say("torch %s of %s is not used: the project needs torch%s, so .venv gets its own"
            % (torch, sys.prefix, torch_bounds()[0]))
        torch = None
    if torch and is_venv:
        say("torch %s found; installing the rest into the active environment %s" % (torch, sys.prefix))
        return sys.executable
    if offline and not torch:
        stop("no torch%s in %s; offline set-up adds the rest to a Python that has torch: name it with "
             "PYTHON=/path/to/python" % (torch_bounds()[0], sys.executable))
    if os.path.exists(own) and has_pip(own):
        return own
    make_venv(own, torch)
    return own


def has_pip(python: str) -> bool:
    command = [python, "-m", "pip", "--version"]
    return subprocess.call(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) == 0


def make_venv(python: str, torch: Optional[str]) -> None:
    """Create a new .venv. It sees the caller's packages if they include `torch`."""
    package = "install the package python3-venv (Debian, Ubuntu: apt install python%d.%d-venv) and run the " \
              "command again" % sys.version_info[:2]
    try:
        import ensurepip  # noqa: F401
    except ImportError:
        stop("this Python cannot create virtual environments; " + package)
    reuse = ", which has torch " + torch if torch else ""
    say("creating .venv with Python %d.%d" % sys.version_info[:2] + reuse)
    shutil.rmtree(str(VENV), ignore_errors=True)
    options = ["--system-site-packages"] if torch else []
    done = subprocess.run([sys.executable, "-m", "venv"] + options + [str(VENV)], stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True)
    if done.returncode or not os.path.exists(python):
        shutil.rmtree(str(VENV), ignore_errors=True)
        reason = (done.stdout.strip().splitlines() or ["no message"])[-1]
        stop("python -m venv failed (%s); %s" % (reason, package))


def check_disk(need: int) -> None:
    free = shutil.disk_usage(str(ROOT)).free
    if free < need:
        stop("%.1f GB free on the disk that holds %s, the set-up needs %d GB; free some space or clone the "
             "project elsewhere" % (free / GIB, ROOT.name, need // GIB))


def write_constraints(path: Path, brought: Dict[str, str], torch: Optional[str], newest: bool,
                      cpu: bool = False) -> None:
    """Write pip's constraints: the existing torch and, unless `newest`, the tested version of every package
    that the environment does not bring; of a new torch the one without CUDA if `cpu`.
    """
    pins = {} if newest else tested_versions()
    fits = not torch or torch.split("+")[0] == pins.get("torch")
    there = set(brought) if torch else set(brought) - set(WITH_TORCH)
    kept = {name: version for name, version in pins.items()
            if name not in there and (fits or name not in WITH_TORCH)}
    if torch:
        kept["torch"] = torch
    elif cpu:
        kept.update({name: kept[name] + "+cpu" for name in ON_CPU_INDEX})
    path.write_text("".join("%s==%s\n" % pair for pair in sorted(kept.items())), encoding="utf-8")


def install(python: str, torch: Optional[str], wheels: Optional[Path], newest: bool = False,
            cpu: bool = False) -> None:
    """Install the project and its dependencies with pip, under one constraints file.

    Args:
        torch: version of the environment's own torch, which stays.
        cpu: install a new torch without CUDA.
    """
    without_cuda = torch.endswith("+cpu") if torch else cpu  # then torchvision has to be without it, too
    constraints = STATE / "constraints.txt"
    write_constraints(constraints, brought_packages(python), torch, newest, cpu)
    # An offline host runs and tests the project. JupyterLab and ruff would add half the size again.
    extras = "test" if wheels else "lab,test,lint"
    options = ["--no-index", "--find-links", str(wheels)] if wheels else []
    if without_cuda and not wheels:
        options += ["--extra-index-url", CPU_INDEX]
    if newest and not torch:
        options += ["--upgrade", "--upgrade-strategy", "eager"]
    command = [python, "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off"]
    command += options + ["--constraint", str(constraints), "--editable", ".[%s]" % extras]
    tail, lost = [], []  # type: List[str], List[str]
    with open(str(STATE / "pip.log"), "w", encoding="utf-8") as log:
        pip = subprocess.Popen(command, cwd=str(ROOT), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               encoding="utf-8", errors="replace")
        for line in pip.stdout:
            log.write(line)
            tail = tail[-30:] + [line.strip()]
            if len(lost) < 30 and any(sign in line for sign in NETWORK_SIGNS):
                lost.append(line.strip())  # of an index; what pip says at the end is about versions
            if re.match(r"\s*Downloading .* [MG]B\)", line):
                say(line.strip())
            elif line.startswith("Installing collected"):
                say("installing %d packages" % (line.count(",") + 1))
    if pip.wait():
        reason = explain(lost + tail, wheels, cpu and not torch)
        stop(reason + "; all of pip's output is in .bootstrap/pip.log")


def check_torchvision(python: str) -> None:
    """Stop if torchvision cannot be imported. It must be of the same build as torch, which pip does not know,
    and metrics, reports and the tiny model's training fail without it.
    """
    done = subprocess.run([python, "-c", "import torch, torchvision"], cwd=str(STATE), stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, encoding="utf-8", errors="replace")
    if done.returncode:
        lines = done.stdout.strip().splitlines() or ["no message"]
        stop("torchvision does not work with the torch of this environment (%s): install the one of the same "
             "build, or deactivate the environment, so that 'make install' makes .venv" % lines[-1][:200])


def explain(tail: List[str], wheels: Optional[Path], cpu: bool = False) -> str:
    """The reason for pip's failure in one sentence, from its last lines and those on lost indexes.

    Args:
        cpu: torch was to come from the index of CPU-only wheels.
    """
    text = "\n".join(tail)
    if "No module named pip" in text:
        return "the active environment has no pip: run 'python -m ensurepip' in it"
    if "No space left" in text:
        return "the disk is full (pip also needs space in the folder for temporary files, TMPDIR)"
    error = ([line for line in tail if line.startswith("ERROR:")] or tail[-1:] or ["no message"])[0][:300]
    if wheels:
        return "pip could not install from %s (%s); collect the wheels again for this host's Python, see " \
               "'make wheelhouse'" % (wheels.name, error)
    lost = [line for line in tail if any(sign in line for sign in NETWORK_SIGNS)]
    place = re.sub(r"^\w+://[^/]*", "", CPU_INDEX).rstrip("/") + "/"
    on_cpu_index = [line for line in lost if cpu and place in line]
    if cpu and len(on_cpu_index) == len(lost) and (lost or "+cpu" in text):
        state = "cannot be reached from here" if lost else "has no torch of this version for this Python"
        return "PyTorch's index of wheels without CUDA, %s, %s; name a mirror of it in " \
               "LONGLIVE_OPT_CPU_INDEX, or take torch with CUDA (3 GB) from the usual index: make install " \
               "CPU=0" % (CPU_INDEX, state)
    if lost:
        return "no package index reachable; set a proxy (HTTPS_PROXY) or a mirror (PIP_INDEX_URL), or " \
               "copy the wheels here: 'make wheelhouse' on another machine, then 'make install-offline'"
    return "pip failed (%s)" % error


def main() -> int:
    if sys.version_info < MIN_PYTHON:
        stop("this is Python %d.%d, the project needs 3.11 or newer; name one, for example PYTHON=python3.12"
             % sys.version_info[:2])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--offline", type=Path, metavar="WHEELS", help="install from these wheels")
    which.add_argument("--newest", action="store_true",
                       help="install the newest versions that pyproject.toml allows")
    which.add_argument("--cpu", action="store_true",
                       help="install a torch without CUDA, for a machine without a GPU")
    which.add_argument("--no-cpu", action="store_true", help="no longer, after an earlier --cpu")
    arguments = parser.parse_args()
    wheels, newest = arguments.offline, arguments.newest
    cpu = arguments.cpu or not (wheels or newest or arguments.no_cpu) and chose_cpu()
    if cpu and sys.platform != "linux":
        say("only Linux has a torch with CUDA; CPU=1 changes nothing here")
        cpu = False
    digest = dependency_digest(newest, cpu)
    python = finished_python(digest)
    if python is None:
        if wheels and not list(wheels.glob("*.whl")):
            stop("%s holds no wheels; run 'make wheelhouse' where there is a network and copy the folder here"
                 % wheels)
        python = choose_environment(offline=bool(wheels))
        torch = brought_torch(python)
        if torch and not is_allowed(torch):
            torch = None
        check_disk(NEED_REST if torch else NEED_CPU if cpu else NEED_FULL)
        if torch and cpu:
            say("torch %s stays, whether it has CUDA or not" % torch)
        elif cpu:
            say("torch comes without CUDA")
        elif not torch:
            say("if .venv lacks torch, this downloads 3 GB and takes 6 GB of disk and 2 to 3 minutes (CPU=1 "
                "leaves the CUDA libraries out)")
        STATE.mkdir(exist_ok=True)
        install(python, torch, wheels.resolve() if wheels else None, newest, cpu)
        check_torchvision(python)
        stamp = json.dumps({"digest": digest, "root": str(ROOT), "python": python, "cpu": cpu})
        (STATE / "stamp.json").write_text(stamp, encoding="utf-8")
        say("done")
    print(python)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        stop("interrupted; run the command again to continue")
