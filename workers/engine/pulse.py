"""Signs of life. The supervisor ends an attempt that gave none for ``env.stall_min`` minutes (``launcher/stall.py``).

Training gives one whenever all ranks have agreed to go on, which they cannot while one of them hangs. What else may
take minutes calls ``beat`` in its loop; the loaders of evaluations do so for every batch.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import time
from pathlib import Path

from contract import rundir

EVERY_S = 5.0  # at most so often is the file touched

_file: Path | None = None  # on rank 0 of an attempt that a supervisor watches
_last = -EVERY_S


def start(folder: Path, attempt: str) -> None:
    """From here on ``beat`` counts, and SIGUSR1 has the stacks of all threads written down, even of one that is stuck
    in C and will never return to Python."""
    global _file
    rank = int(os.environ.get("RANK", "0"))  # before the ranks have met: they may hang in that
    faulthandler.register(signal.SIGUSR1, rundir.stacks_file(folder, attempt, rank).open("w"), all_threads=True)
    if rank == 0:
        _file = rundir.beat_file(folder, attempt)


def beat() -> None:
    """Something went on. As cheap as a look at the clock."""
    global _last
    now = time.monotonic()
    if _file is not None and now - _last >= EVERY_S:
        _last = now
        with contextlib.suppress(OSError):  # a full disk is for others to find
            _file.touch()
