"""The floors of the library: who may import whom, and where a new file may go.

The order below is the architecture. A module imports from its own floor and from those under it.
"""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest

import longlive_opt

PACKAGE = Path(longlive_opt.__file__).parent
FLOORS = (
    "errors", "files", "kernels", "ranks", "models", "fetch", "config", "prompts", "streaming",
    "optimizations", "parity", "measurement", "report", "tiny", "workbook", "live", "inside", "runner",
    "__main__",
)


def _modules() -> dict[str, Path]:
    """Path within the package, dotted, to file; a folder's ``__init__`` goes by the folder's name."""
    files = sorted(PACKAGE.rglob("*.py"))
    names = [".".join(file.relative_to(PACKAGE).with_suffix("").parts) for file in files]
    return {name.removesuffix(".__init__"): file
            for name, file in zip(names, files, strict=True) if name != "__init__"}


MODULES = _modules()


def _imported(module: str) -> set[str]:
    """The library's modules that ``module`` imports, at its top or inside a function."""
    file = MODULES[module]
    package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*package[:len(package) - node.level + 1], *(node.module or "").split(".")]
            names = [".".join(part for part in (*base, alias.name) if part) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            name = name.removeprefix("longlive_opt.")
            found.update({name, name.rpartition(".")[0]} & MODULES.keys())
    return found


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_down(module: str) -> None:
    """A lower floor that needs a higher one: neither can then be read or tested without the other."""
    floor = FLOORS.index(module.split(".")[0])
    upward = {name for name in _imported(module) if FLOORS.index(name.split(".")[0]) > floor}
    assert not upward, f"{module} imports from a floor above its own: {sorted(upward)}"


def test_importing_is_seen() -> None:
    """The scan has to find imports, or the test above passes with nothing in its hands."""
    assert "streaming.kv_cache" in _imported("optimizations.ring_cache")
    assert {"config", "errors"} <= _imported("runner.plan")


def test_a_module_name_is_used_once() -> None:
    """Two modules of one name: an import or a traceback does not say which of them is meant."""
    names = Counter(module.split(".")[-1] for module in MODULES if module.split(".")[-1] != "__main__")
    assert [name for name, count in names.items() if count > 1] == []


def test_nothing_new_stands_at_the_top() -> None:
    """A file that fits no folder is a question about the tree, not one more file in the hall."""
    top = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert top == {*FLOORS, "__init__"}
