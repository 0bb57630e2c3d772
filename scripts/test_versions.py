"""Test the oldest and the newest torch that pyproject.toml allows: python3 scripts/test_versions.py

    python3 scripts/test_versions.py newest                # one of the two
    python3 scripts/test_versions.py 2.13 --keep           # a release; keep its environment
    python3 scripts/test_versions.py --make                # only make what the next call will use
    python3 scripts/test_versions.py oldest -- -x -k gelu  # more arguments for pytest

Each torch gets its own environment in .bootstrap/versions (5 GB, removed after its tests). The second is made
while the first is tested. An environment that is there and was made by the same command is used. Packages
that do not depend on torch have the versions of constraints.txt. The script runs the tests that use internals
of PyTorch and Triton: kernels (also compiled for GPUs), caches, optimizations, and what is compiled or
recorded of the session, the VAE and the training. It skips a torch that the package index does not offer and
says so. Exit status: 0, 1 if a test failed, 2 if an environment could not be made.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Iterator, List, Optional, Tuple

from bootstrap import (
    MIN_PYTHON,
    NEED_FULL,
    ROOT,
    STATE,
    WITH_TORCH,
    check_disk,
    explain,
    read_project,
    stop,
    tested_versions,
    torch_bounds,
)

FOLDER = STATE / "versions"
TESTS = ("test_compile_kernels.py", "test_compilers.py", "test_kernels.py", "test_fused_kernels.py",
         "test_quantized_linears.py", "test_quantized_kv.py", "test_optimizations.py", "test_session.py",
         "test_vae.py", "test_training.py")
# Of these files, only the tests of recorded or compiled code: the rest needs no internals.
PARTS = {"test_training.py": "asks_the_host or compiled_", "test_session.py": "compiled",
         "test_vae.py": "compiles"}
# Leave out combinations of optimizations, which take minutes. Each optimization is also tested by itself.
LONG = ("every_combination", "early_decode_leaves_out", "compiled_with", "together_with_others",
        "can_be_captured", "exact_optimizations_with_it", "stay_near_those", "under_the_interpreter")
# pip's messages if the index does not have the version or does not serve it.
NOT_SERVED = re.compile(r"(No matching distribution found for|satisfies the requirement) torch\b|"
                        r"The user requested \(constraint\) torch\b|HTTP error 40[34]")


def say(text: str) -> None:
    print("test-versions: " + text, flush=True)


def requirement(which: str) -> str:
    """`oldest`, `newest` or a release such as 2.13 -> pip's requirement."""
    bounds, low, _ = torch_bounds()
    if which == "newest":
        return "torch" + bounds
    release = "%d.%d" % low if which == "oldest" else which
    if not re.match(r"\d+\.\d+(\.\d+)?$", release):
        stop("%s is not a release of torch; write oldest, newest or a release such as 2.13" % which)
    return "torch==%s%s" % (release, ".*" if release.count(".") == 1 else "")


def make_environment(folder: Path, torch: str) -> Optional[str]:
    """Make a virtual environment with this torch and the project's dependencies, and return its Python.

    Prints the reason and returns None if the torch is not available.
    """
    python = str(folder / "bin" / "python")
    constraints, made = folder / "constraints.txt", folder / "made.txt"
    pins = "".join("%s==%s\n" % pair for pair in tested_versions().items() if pair[0] not in WITH_TORCH)
    project = read_project()["project"]
    wanted = [torch] + project["dependencies"] + project["optional-dependencies"]["test"]
    # Without --no-compile, pip compiles every module of torch, and the tests import a tenth of them.
    command = [python, "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off",
               "--no-compile",
               "--constraint", str(constraints)] + wanted
    how = " ".join([sys.version] + command) + "\n" + pins
    if made.is_file() and made.read_text(encoding="utf-8") == how:
        return python
    shutil.rmtree(str(folder), ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    constraints.write_text(pins, encoding="utf-8")
    started = time.time()
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8",
                          errors="replace")
    if done.returncode == 0:
        made.write_text(how, encoding="utf-8")
        say("the environment for %s took %.0f s" % (torch, time.time() - started))
        return python
    refused = [line for line in done.stdout.splitlines() if NOT_SERVED.search(line)]
    if refused:
        say("%s is skipped: the package index does not serve it (%s)"
            % (torch, refused[0].strip()[:200]))
        return None
    stop("the environment for %s: %s" % (torch, explain(done.stdout.splitlines()[-30:], None)))


def environments(which: List[str], keep: bool) -> Iterator[Tuple[str, str]]:
    """(which, Python of its environment), one by one. The next environment is made while one is in use."""
    with ThreadPoolExecutor(1) as pool:
        coming = [pool.submit(make_environment, FOLDER / one, requirement(one)) for one in which[:1]]
        for number, one in enumerate(which):
            try:
                python = coming[number].result()
                coming += [pool.submit(make_environment, FOLDER / other, requirement(other))
                           for other in which[number + 1:number + 2]]
                if python:
                    yield one, python
            finally:
                if not keep:
                    shutil.rmtree(str(FOLDER / one), ignore_errors=True)


def describe(python: str) -> str:
    code = "import torch, importlib.util as u; v = 'no Triton'\n" \
           "if u.find_spec('triton'): import triton; v = 'Triton ' + triton.__version__\n" \
           "print('torch', torch.__version__ + ',', v)"
    return subprocess.run([python, "-c", code], stdout=subprocess.PIPE, check=True).stdout.decode().strip()


def run_tests(python: str, more: List[str]) -> bool:
    """Run pytest on our own output. Returns whether all tests passed."""
    names = ["tests/" + name for name in TESTS]
    choose = " and ".join(["not (%s)" % " or ".join(LONG)]
                          + ["(not %s or %s)" % part for part in PARTS.items()])
    workers = ["-n", "2", "--dist", "worksteal"] if (os.cpu_count() or 1) > 1 else []
    command = [python, "-m", "pytest", "-q", "-r", "fE", "-k", choose] + workers + names + more
    return subprocess.call(command, cwd=str(ROOT), env=dict(os.environ, PYTHONPATH=str(ROOT))) == 0


def main() -> int:
    if sys.version_info < MIN_PYTHON:
        stop("this is Python %d.%d, the project needs 3.11 or newer" % sys.version_info[:2])
    given = sys.argv[1:]
    more = given[given.index("--") + 1:] if "--" in given else []
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("which", nargs="*", help="oldest, newest, or a release such as 2.13")
    parser.add_argument("--keep", action="store_true", help="keep the environments in .bootstrap/versions")
    parser.add_argument("--make", action="store_true", help="make the environments, test nothing")
    arguments = parser.parse_args(given[:given.index("--")] if "--" in given else given)
    which = arguments.which or ["oldest", "newest"]
    check_disk(NEED_FULL * min(len(which), 2))
    FOLDER.mkdir(parents=True, exist_ok=True)
    failed = []
    if arguments.make:
        for one in which:
            make_environment(FOLDER / one, requirement(one))
        return 0
    for one, python in environments(which, arguments.keep):
        found, started = describe(python), time.time()
        say("%s is %s" % (one, found))
        if not run_tests(python, more):
            failed.append(found)
        say("the tests with %s took %.0f s" % (found, time.time() - started))
    if failed:
        print("error: tests failed with " + "; ".join(failed), file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        stop("interrupted; run the command again")
