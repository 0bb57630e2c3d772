"""Check that this machine can build the small Python extensions that compiled kernels need.

Inductor writes C++ for the CPU, and Triton writes C to start its kernels on a GPU; both build and load it at
run time. Some installed compilers cannot do this: Python.h is missing, or programs may not run from the
folder for temporary files. Such failures come late and with hundreds of lines, so these checks build and load
two lines first.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from ..errors import NotAvailable

PROBE = "#include <Python.h>\n{extern}int probe(void) {{ return PY_MAJOR_VERSION; }}\n"
TIMEOUT_S = 60


def check_cpp(key: str) -> None:
    """Check that Inductor can build for the CPU with $CXX, else with g++, or clang++ on macOS.

    Raises:
        NotAvailable: it cannot build; the message begins with the preset's `key`.
    """
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if fault := build_fault(compiler, "c++", os.environ.get("TORCHINDUCTOR_CACHE_DIR")):
        raise NotAvailable(f"{key}: compiling for the CPU needs a C++ compiler and Python's headers; install "
                           f"g++ and python3-dev (here {fault}).")


def check_triton(key: str) -> None:
    """Check that Triton can start kernels on a GPU; it builds with $CC, else with gcc or clang.

    Raises:
        NotAvailable: Triton is missing or cannot build; the message begins with the preset's `key`.
    """
    if importlib.util.find_spec("triton") is None:
        raise NotAvailable(f"{key}: its kernels need Triton, which is not installed here; install the one "
                           f"that belongs to this PyTorch, or switch {key} off.")
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("gcc", "clang")), "gcc")
    if fault := build_fault(compiler, "c", os.environ.get("TRITON_CACHE_DIR")):
        raise NotAvailable(f"{key}: starting Triton's kernels needs a C compiler and Python's headers; "
                           f"install gcc and python3-dev (here {fault}).")


@functools.cache
def build_fault(compiler: str, language: str, folder: str | None = None) -> str | None:
    """Explain why `compiler` cannot build, or Python cannot load, a c or c++ extension; None if both work.

    Args:
        compiler: a command, optionally with arguments.
        folder: the build folder; None: the folder for temporary files.
    """
    command = shlex.split(compiler)
    if not command or shutil.which(command[0]) is None:
        return f"{compiler} is not installed"
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="longlive-build-", dir=folder) as name:
        source, built = Path(name, "probe.src"), Path(name, "probe.so")
        source.write_text(PROBE.format(extern='extern "C" ' if language == "c++" else ""))
        command += ["-x", language, "-shared", "-fPIC", "-I", sysconfig.get_path("include"), str(source),
                    "-o", str(built)]
        try:
            done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                  stderr=subprocess.PIPE, text=True, errors="replace", timeout=TIMEOUT_S)
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"{compiler} does not run: {error}"
        if done.returncode:
            lines = [line.strip() for line in done.stderr.splitlines() if "error" in line] or ["no message"]
            return f"{compiler} says: {lines[0].replace(name + os.sep, '')}"
        try:
            works = ctypes.CDLL(str(built)).probe() == sys.version_info.major
        except (OSError, AttributeError) as error:
            reason = str(error).replace(name + os.sep, "")
            return (f"Python cannot load what {compiler} builds: {reason}; if programs may not run from its "
                    "folder, set TMPDIR to one where they may")
        return None if works else f"what {compiler} builds is not for this Python"
