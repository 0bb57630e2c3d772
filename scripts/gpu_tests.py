"""Run the tests that need a GPU and record their output together with the facts of the machine.

    python scripts/gpu_tests.py outputs/h100/gpu_tests.txt [more arguments for pytest]

An interrupted run (Ctrl-C, SIGTERM) also leaves a record, whose last line says so. Exit status: that of
pytest, 2 without a GPU, 130 if interrupted.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import torch

from longlive_opt.files import atomic_path
from longlive_opt.measurement import environment

FACTS = ("gpu", "driver", "cuda", "torch", "cudnn", "triton", "python", "git_commit", "git_dirty")


def main(record: str, *arguments: str) -> int:
    if not torch.cuda.is_available():
        print(f"error: PyTorch {torch.__version__} sees no CUDA GPU here; run this on a machine with one.",
              file=sys.stderr)
        return 2
    machine = environment.environment(torch.device("cuda"), attention_backend=None)
    lines = [json.dumps({fact: machine[fact] for fact in FACTS}, indent=1)]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "--color=no", *arguments]
    status = 130
    try:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as tests:
            for line in tests.stdout:
                print(line, end="", flush=True)
                lines.append(line.rstrip().replace(str(Path.cwd()), "."))  # keep the machine's paths out
        status = tests.returncode
    except KeyboardInterrupt:
        tests.kill()
        lines.append("interrupted: the remaining tests were not run")
    Path(record).parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(record) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return status


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `timeout` sends SIGTERM
    sys.exit(main(*sys.argv[1:]))
