"""An attempt that hangs: noticed by the signs of life that its worker no longer gives, its ranks asked where they are.

The sign is ``beat.ATTEMPT``, which rank 0 touches when all ranks have agreed to go on, and within evaluations. The log
and the metrics say nothing: a long evaluation is silent, and a rank that waits for a dead one may still write.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from pathlib import Path

from contract import rundir
from contract.settings.env import Env
from launcher.processes import listeners

ANSWER_S, FAR_S = 10.0, 60.0  # for the ranks to write their stacks, here and on other nodes
SETTLE_S = 0.5  # without a new line a file is whole
FRAME = re.compile(r'^  File "(.+)", line (\d+) in (.+)$')


class Watchdog:
    """One for an attempt, on every node. It wakes with the attempt's first sign of life: how long a start takes
    (a listing of ImageNet on a cold disk, a cache that is built once) nobody knows, and ranks that do not find each
    other have torch's own time-out."""

    def __init__(self, folder: Path, attempt: str, env: Env):
        self.folder, self.attempt, self.env = folder, attempt, env
        self.seen: int | None = None
        self.looked, self.silent_s = time.monotonic(), 0.0

    def stalled(self) -> bool:
        """To be asked every HEARTBEAT_S. Clocks of two hosts are never compared, and the time in which this process,
        too, was suspended does not count."""
        if self.env.stall_min is None:
            return False
        now, beat = time.monotonic(), _touched(rundir.beat_file(self.folder, self.attempt))
        passed, self.looked = min(now - self.looked, 2 * rundir.HEARTBEAT_S), now
        self.silent_s = self.silent_s + passed if beat == self.seen else 0.0
        self.seen = beat
        if self.env.nodes > 1 and any(self._answers().values()):
            return True  # another node saw it first
        return beat is not None and self.silent_s > self.env.stall_min * 60

    def ask(self, pid: int, capsule: Path) -> str:
        """Have every rank below ``pid`` write its stacks. Gives what there is to say: a line, then one for each rank of
        all nodes."""
        asked = listeners(pid, signal.SIGUSR1)
        for each in asked:
            with contextlib.suppress(ProcessLookupError):
                os.kill(each, signal.SIGUSR1)
        patience = (FAR_S if self.env.nodes > 1 else ANSWER_S) if asked else 0.0
        end = time.monotonic() + patience
        before: dict[int, int] = {}
        answers = self._answers()
        while time.monotonic() < end and (before != answers or not all(answers.values())):
            time.sleep(SETTLE_S)
            before, answers = answers, self._answers()
        step = int((rundir.last_record(self.folder / rundir.METRICS) or {}).get("step") or 0)
        files = rundir.stacks_file(self.folder, self.attempt, 0).name.replace(".0.", ".*.")
        head = f"no sign of life for {self.env.stall_min:g} min (env.stall_min), after step {step} or later"
        lines = [f"error: stalled: {head}; stacks in {files}"]
        for rank, size in answers.items():
            text = rundir.stacks_file(self.folder, self.attempt, rank).read_text(errors="replace") if size else ""
            lines.append(f"rank {rank}: {place(text, capsule) if text else 'no answer'}")
        return "\n".join(lines)

    def _answers(self) -> dict[int, int]:
        """How much every rank has written so far."""
        files = {rank: rundir.stacks_file(self.folder, self.attempt, rank) for rank in range(self.env.processes)}
        return {rank: path.stat().st_size if path.exists() else 0 for rank, path in files.items()}


def _touched(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def place(stacks: str, capsule: Path) -> str:
    """Where a rank was: the innermost frame of our code, and what it had called. ``stacks``: faulthandler's words, the
    newest thread first, so that the last one with our code is the main one."""
    found = "not in our code"
    for thread in re.split(r"\n(?=Thread |Current thread )", stacks):
        frames = [frame.groups() for line in thread.splitlines() if (frame := FRAME.match(line))]
        for file, line, name in frames:
            if file.startswith(f"{capsule}/"):
                found = f"{file.removeprefix(f'{capsule}/')}:{line} in {name}"
                inner = frames[0]
                if inner != (file, line, name):
                    found += f", which had called {Path(inner[0]).name}:{inner[1]} in {inner[2]}"
                break
    return found


def clear(folder: Path, but: str | None = None) -> None:
    """Take away what attempts leave: signs of life, and stacks that nobody asked for. Not those of attempt ``but``."""
    for path in [*folder.glob("beat.*"), *folder.glob("stacks.*")]:
        mine = but is not None and path.name.split(".")[1] == but
        if not mine and (path.name.startswith("beat.") or not path.stat().st_size):
            path.unlink(missing_ok=True)
