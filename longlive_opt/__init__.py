"""longlive_opt: LongLive-1.3B, its inference optimizations one by one and together, and what each does."""

import os

__version__ = "0.1.0"

# An OpenMP thread that waits for the next loop spins on its core by default. Where another process wants that
# core, a block of the tiny model takes several times as long. torch reads this when it is loaded, and the
# kernels that the runner starts inherit it. What the user has set stays.
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & os.environ.keys():
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
