"""Collect the wheels that an offline Linux x86-64 host with torch is missing: scripts/wheelhouse.py FOLDER

Run it on a machine with a network, copy FOLDER into the clone on the host, and run `make install-offline`
there. The script assumes that the host has torch and torchvision, or with `--have LIST` the packages in LIST
(the output of `pip list --format=freeze` on the host). The resolver sees an empty stand-in wheel for each of
them, so it keeps their versions and downloads none of them. Other packages come in the versions of
constraints.txt.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Dict, List

from bootstrap import (
    MIN_PYTHON,
    WITH_TORCH,
    is_allowed,
    normal,
    read_project,
    stop,
    tested_versions,
    torch_bounds,
)

# pip takes a platform tag literally, so manylinux_2_28 does not include the older tags.
OLDEST_GLIBC, OLD_TAGS = 5, ("manylinux2014", "manylinux2010", "manylinux1")
# pip's --python-version and --platform choose wheels, but pip evaluates conditions such as
# `python_version == "3.12"` for the running Python and has no option for it. This starts pip with the host's
# values.
PIP_FOR_HOST = """
import sys
from pip._internal.cli.main import main
from pip._vendor.packaging import markers
version = sys.argv.pop(1)
here = markers.default_environment()
host = dict(python_version=version, python_full_version=version + ".0", implementation_version=version + ".0",
            sys_platform="linux", platform_system="Linux", platform_machine="x86_64", os_name="posix")
markers.default_environment = lambda: {**here, **host}
sys.exit(main(sys.argv[1:]))
"""
# Stand-ins for a host that is only known to have a torch and torchvision that pyproject.toml allows.
ASSUMED = {"torch": "2.14.999", "torchvision": "0.29.999"}
# Packages that are not kept: the project itself, and packages that the set-up installs or every Python has.
NOT_KEPT = ("longlive_opt", "pip", "setuptools", "wheel")


def read_have(path: Path) -> Dict[str, str]:
    """Name -> version of the packages in the output of `pip list --format=freeze`."""
    try:
        lines = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        stop(f"{path}: {error}; make it on the host: python3 -m pip list --format=freeze > {path.name}")
    pairs = [line.split("==") for line in lines if line.count("==") == 1]
    have = {re.sub(r"[-_.]+", "_", name).lower(): version for name, version in pairs}
    if not is_allowed(have.get("torch", "")):
        stop(f"{path} names {'torch ' + have['torch'] if 'torch' in have else 'no torch'}; the host needs "
             f"torch{torch_bounds()[0]}, wheels for it are not collected")
    return {name: version for name, version in have.items() if name not in NOT_KEPT}


def write_stand_in(folder: Path, name: str, version: str) -> str:
    """Write an empty wheel and return the constraint that selects it. No index has its local version."""
    version = version if "+" in version else f"{version}+host"
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return f"{name}=={version}\n"


def requirements() -> List[str]:
    """The requirements of an offline set-up: the dependencies, the test tools and the build tools."""
    content = read_project()
    project, build = content["project"], content["build-system"]
    return project["dependencies"] + project["optional-dependencies"]["test"] + build["requires"]


def download(folder: Path, python: str, glibc: int, have: Dict[str, str]) -> None:
    """Fill `folder` with the missing wheels for CPython `python` and glibc 2.`glibc`."""
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in range(glibc, OLDEST_GLIBC - 1, -1)]
    platforms += [f"{tag}_x86_64" for tag in OLD_TAGS]
    folder.mkdir(parents=True, exist_ok=True)
    for wheel in folder.glob("*.whl"):
        wheel.unlink()
    with tempfile.TemporaryDirectory() as temporary:
        stand_ins = Path(temporary)
        constraints = stand_ins / "constraints.txt"
        lines = [write_stand_in(stand_ins, *item) for item in have.items()]
        missing = set(tested_versions()) - set(map(normal, have)) - set(WITH_TORCH)
        lines += [f"{name}=={tested_versions()[name]}\n" for name in sorted(missing)]
        constraints.write_text("".join(lines), "utf-8")
        command = [sys.executable, "-c", PIP_FOR_HOST, python, "download", "--quiet"]
        command += ["--only-binary", ":all:", "--implementation", "cp", "--python-version", python]
        command += [option for platform in platforms for option in ("--platform", platform)]
        command += ["--find-links", temporary, "--constraint", str(constraints), "--dest", str(folder)]
        if subprocess.call(command + requirements()):
            stop("pip download failed, see above; where it names a conflict with a +host version, the host's "
                 "package is too old: remove its line from the --have list")
        for stand_in in stand_ins.glob("*.whl"):
            (folder / stand_in.name).unlink(missing_ok=True)


def main() -> int:
    if sys.version_info < MIN_PYTHON:
        stop("this is Python %d.%d, the project needs 3.11 or newer" % sys.version_info[:2])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder for the wheels; existing wheels are replaced")
    parser.add_argument("--python", default="3.12", help="Python version of the host (default: 3.12)")
    parser.add_argument("--glibc", type=int, default=28, metavar="N", help="its glibc is 2.N (default: 28)")
    parser.add_argument("--have", type=Path, metavar="LIST", help="the host's 'pip list --format=freeze'")
    arguments = parser.parse_args()
    have = read_have(arguments.have) if arguments.have else ASSUMED
    download(arguments.folder, arguments.python, arguments.glibc, have)
    wheels = list(arguments.folder.glob("*.whl"))
    megabytes = sum(wheel.stat().st_size for wheel in wheels) / 1e6
    print(f"{len(wheels)} wheels, {megabytes:.0f} MB in {arguments.folder}; copy the folder into the clone "
          "on the host and run there: make install-offline")
    return 0


if __name__ == "__main__":
    sys.exit(main())
