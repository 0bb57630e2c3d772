"""The command `longlive`, also `python -m longlive_opt`: everything that the workbook can do from a terminal.

    longlive generate "a fox in the snow" --seconds 10 -o fox.mp4     a video from prompts
    longlive run --campaign mine --presets baseline balanced          measure presets
    longlive compare outputs/one outputs/other                        did it get faster?
    longlive doctor                                                   what can this machine run?

`longlive COMMAND --help` explains each one.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "generate": ("make a video from prompts", "runner.generate", False),
    "run": ("measure presets, then compare them", "runner.__main__", True),
    "summary": ("compare the finished runs of a campaign again", "runner.__main__", True),
    "compare": ("compare two campaigns, preset by preset", "report.campaign_diff", False),
    "export": ("write a campaign's results for MLflow or as CSV", "report.run_export", False),
    "show": ("show a preset: its keys, what it does, what it ran at", "runner.show", False),
    "list": ("list the presets", "runner.__main__", True),
    "doctor": ("say what this machine can run, and why not the rest", "runner.doctor", False),
    "fetch": ("download official weights", "fetch", False),
    "parity": ("compare recorded tensors of the upstream system with ours", "parity.__main__", False),
    "quantization": ("measure every 8-bit format: error against time", "runner.__main__", True),
    "training": ("report on the training of the tiny model", "runner.__main__", True),
}
"""Command -> what it does, the module whose `main` does it, and whether that wants the command's name too."""


def usage() -> str:
    """The help page: a line per command."""
    lines = "\n".join(f"  {name:13} {words}" for name, (words, _, _) in COMMANDS.items())
    return f"usage: longlive COMMAND ...\n\n{lines}\n\nlonglive COMMAND --help explains each one."


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status, 2 for a command that does not exist."""
    asked = list(sys.argv[1:] if argv is None else argv)
    if not asked or asked[0] in ("-h", "--help"):
        print(usage())
        return 0 if asked else 2
    if asked[0] not in COMMANDS:
        print(f"error: command {asked[0]!r} is unknown; choose one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    _, module, with_name = COMMANDS[asked[0]]
    command = importlib.import_module(f".{module}", __package__)
    return command.main(asked if with_name else asked[1:])


if __name__ == "__main__":
    sys.exit(main())
