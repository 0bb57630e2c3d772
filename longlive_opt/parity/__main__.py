"""Compare this implementation with recorded tensors: `python -m longlive_opt.parity DIR`.

DIR holds safetensors files and a `manifest.json` whose `configs` give every size, window and switch frame.
Each file found is checked; the output has one line per case with its largest absolute error.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..errors import UserError
from .comparison import LIMIT
from .directory import check_directory


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m longlive_opt.parity", description=__doc__)
    parser.add_argument("directory", type=Path, help="folder with manifest.json and recorded tensors")
    arguments = parser.parse_args(argv)
    try:
        cases = []
        for case in check_directory(arguments.directory):
            print(case, flush=True)
            cases.append(case)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    failed = [case.name for case in cases if not case.passed]
    print(
        f"{len(cases) - len(failed)} of {len(cases)} cases within {LIMIT:g}"
        + (f"; failed: {failed}" if failed else "")
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
