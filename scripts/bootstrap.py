"""Set up the environment once and print its Python: python3 scripts/bootstrap.py [--offline WHEELS]

Standard library only. Messages go to stderr, so that `py="$(python3 scripts/bootstrap.py)"` works. Where to:

1. the calling Python is a virtual environment with torch >= 2.10 (GPU hosts): into that environment;
2. otherwise into .venv, which sees the caller's packages if the caller has torch >= 2.10 (containers, conda).

A torch that is there is never changed: pip gets the constraint torch==<its version>. (Without it `pip install
lpips` upgrades torch, because the newest torchvision wants the newest torch.) A second call finds
.bootstrap/stamp.json and does nothing until the dependencies in pyproject.toml change. The syntax is that of
Python 3.6, so that an old Python can read this file and say that it is too old.
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
from typing import List, NoReturn, Optional

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STATE = ROOT / ".bootstrap"
MIN_PYTHON = (3, 11)
MIN_TORCH = (2, 10)
GIB = 2**30
# Free disk space asked for: with torch and its CUDA libraries to install, and without.
NEED_FULL, NEED_REST = 8 * GIB, 1 * GIB
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


def dependency_digest() -> str:
    """A hash of what pyproject.toml asks to be installed; it changes when the environment has to."""
    import tomllib

    with open(str(ROOT / "pyproject.toml"), "rb") as file:
        content = tomllib.load(file)
    project = content["project"]
    wanted = [content["build-system"], project["dependencies"], project["optional-dependencies"]]
    return hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()


def finished_python(digest: str) -> Optional[str]:
    """The Python of a set-up that is complete and current, or None."""
    try:
        stamp = json.loads((STATE / "stamp.json").read_text(encoding="utf-8"))
        current = stamp["digest"] == digest and stamp["root"] == str(ROOT)
        return stamp["python"] if current and os.access(stamp["python"], os.X_OK) else None
    except (OSError, ValueError, KeyError):
        return None


def installed_torch(python: str) -> Optional[str]:
    """The version, as pip knows it, of a torch >= 2.10 that `python` can import, or None.

    It is read from the package's metadata: `torch.__version__` may say 2.11.0+cu130 where pip says 2.11.0.
    """
    code = "import importlib.metadata as m; v = m.version('torch'); import torch; print(v)"
    done = subprocess.run([python, "-P", "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    version = done.stdout.decode().strip()
    found = re.match(r"(\d+)\.(\d+)(\.\d+)*(a|b|rc|\.dev)?", version)
    if done.returncode or not found:
        return None
    release = (int(found.group(1)), int(found.group(2)))
    # 2.10.0a0 sorts before 2.10, so pip would not accept it.
    return version if release > MIN_TORCH or (release == MIN_TORCH and not found.group(4)) else None


def choose_environment(offline: bool) -> str:
    """Decide where to install, make .venv if that is the place, and return the environment's Python."""
    own = str(VENV / "bin" / "python")
    is_venv = sys.prefix != sys.base_prefix
    if is_venv and Path(sys.prefix).resolve() == VENV:
        return own
    torch = installed_torch(sys.executable)
    if torch and is_venv:
        say("torch %s found; installing the rest into the active environment %s" % (torch, sys.prefix))
        return sys.executable
    if offline and not torch:
        stop("no torch >= 2.10 in %s; offline set-up adds the rest to a Python that has torch: name it with "
             "PYTHON=/path/to/python" % sys.executable)
    if os.path.exists(own) and has_pip(own):
        return own
    make_venv(own, torch)
    return own


def has_pip(python: str) -> bool:
    command = [python, "-m", "pip", "--version"]
    return subprocess.call(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) == 0


def make_venv(python: str, torch: Optional[str]) -> None:
    """Create .venv anew; it sees the caller's packages where these have `torch`."""
    package = "install the package python3-venv (Debian, Ubuntu: apt install python%d.%d-venv) and run the " \
              "command again" % sys.version_info[:2]
    try:
        import ensurepip  # noqa: F401
    except ImportError:
        stop("this Python cannot make virtual environments; " + package)
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


def install(python: str, torch: Optional[str], wheels: Optional[Path]) -> None:
    """Install the project and its dependencies with pip, under one constraints file."""
    constraints = STATE / "constraints.txt"
    constraints.write_text("torch==%s\n" % torch if torch else "", encoding="utf-8")
    # An offline host runs and tests; JupyterLab and ruff would add half again to what is carried there.
    extras = "test" if wheels else "lab,test,lint"
    options = ["--no-index", "--find-links", str(wheels)] if wheels else []
    command = [python, "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off"]
    command += options + ["--constraint", str(constraints), "--editable", ".[%s]" % extras]
    tail = []  # type: List[str]
    with open(str(STATE / "pip.log"), "w", encoding="utf-8") as log:
        pip = subprocess.Popen(command, cwd=str(ROOT), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               encoding="utf-8", errors="replace")
        for line in pip.stdout:
            log.write(line)
            tail = tail[-30:] + [line.strip()]
            if re.match(r"\s*Downloading .* [MG]B\)", line):
                say(line.strip())
            elif line.startswith("Installing collected"):
                say("installing %d packages" % (line.count(",") + 1))
    if pip.wait():
        stop(explain(tail, wheels) + "; all of pip's output is in .bootstrap/pip.log")


def explain(tail: List[str], wheels: Optional[Path]) -> str:
    """One sentence on why pip failed, from the last lines of its output."""
    text = "\n".join(tail)
    if "No module named pip" in text:
        return "the active environment has no pip: run 'python -m ensurepip' in it"
    if "No space left" in text:
        return "the disk is full (pip also needs room in the folder for temporary files, TMPDIR)"
    error = ([line for line in tail if line.startswith("ERROR:")] or tail[-1:] or ["no message"])[0][:300]
    if wheels:
        return "pip could not install from %s (%s); make it anew for this host's Python, see " \
               "'make wheelhouse'" % (wheels.name, error)
    if any(sign in text for sign in NETWORK_SIGNS):
        return "no package index reachable; set a proxy (HTTPS_PROXY) or a mirror (PIP_INDEX_URL), or " \
               "carry the wheels here: 'make wheelhouse' on another machine, then 'make install-offline'"
    return "pip failed (%s)" % error


def main() -> int:
    if sys.version_info < MIN_PYTHON:
        stop("this is Python %d.%d, the project needs 3.11 or newer; name one, such as PYTHON=python3.12"
             % sys.version_info[:2])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--offline", type=Path, metavar="WHEELS", help="install from these wheels")
    wheels = parser.parse_args().offline
    digest = dependency_digest()
    python = finished_python(digest)
    if python is None:
        if wheels and not list(wheels.glob("*.whl")):
            stop("%s holds no wheels; run 'make wheelhouse' where there is a network and copy the folder here"
                 % wheels)
        python = choose_environment(offline=bool(wheels))
        torch = installed_torch(python)
        check_disk(NEED_REST if torch else NEED_FULL)
        if not torch:
            say("the first set-up downloads several GB, takes about 6 GB of disk and 2 to 3 minutes")
        STATE.mkdir(exist_ok=True)
        install(python, torch, wheels.resolve() if wheels else None)
        stamp = json.dumps({"digest": digest, "root": str(ROOT), "python": python})
        (STATE / "stamp.json").write_text(stamp, encoding="utf-8")
        say("done")
    print(python)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        stop("interrupted; run the command again to go on")
