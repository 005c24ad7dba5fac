"""A Slurm job seen from within: which run is mine, when it ends, who else takes part, and how to be started again."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from contract import rundir
from launcher.manifest import folders, pack

TIMEOUT_S = 60


@dataclass(frozen=True)
class Job:
    folders: list[Path]  # of the runs, done one after another
    id: str  # as people and scancel say it: 12_3
    node: int
    nodes: int
    attempt: str  # the same on every node, another one after every requeue
    address: str | None  # where the nodes of this job meet
    pack: int  # how many of its runs it does side by side

    def ends(self) -> float | None:
        """When the time limit comes, in the clock of this node; None if there is none or nobody says."""
        if said := os.environ.get("SLURM_JOB_END_TIME"):
            return float(said)
        left = _ask("squeue", "-h", "-j", os.environ["SLURM_JOB_ID"], "-o", "%L")
        return time.time() + rest if (rest := seconds(left)) is not None else None

    def start_others(self) -> list[subprocess.Popen[bytes]]:
        """srun has started a supervisor on every node."""
        return []

    def again(self, wanted: bool, code: int) -> int:
        """The exit code, after asking for another start. Slurm may have done so already, and then refuses."""
        if wanted:
            _ask("scontrol", "requeue", self.id)
        return code

    def hold(self, arrays: Sequence[str]) -> None:
        """What still waits of these stays in the queue and does not start."""
        _ask("scontrol", "uhold", ",".join(arrays))

    def torchrun(self) -> list[str]:
        """What torchrun must know to find the other nodes."""
        return [
            f"--nnodes={self.nodes}",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={self.address}",
            f"--rdzv-id={self.attempt}",
            f"--rdzv-conf=is_host={int(self.node == 0)}",
        ]


def this_job(manifest: Path) -> Job:
    """From the environment of a job, and what was submitted. Raises RunDirError."""
    env = os.environ
    try:
        mine = folders(manifest, env["SLURM_ARRAY_TASK_ID"])
        number = int(env["SLURM_JOB_ID"])
        name = f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    except KeyError as error:
        raise rundir.RunDirError(f"{manifest}: has no run for this job ({error})") from None
    nodes = int(env.get("SLURM_JOB_NUM_NODES", "1"))
    attempt = f"slurm-{number}-{env.get('SLURM_RESTART_COUNT', '0')}"
    address = None
    if nodes > 1:
        first = env.get("SIGHTLINE_FIRST_NODE") or _ask("scontrol", "show", "hostnames", env["SLURM_JOB_NODELIST"])
        if not first:
            raise rundir.RunDirError(f"{name}: scontrol does not say which nodes these are")
        address = f"{first.split()[0]}:{12000 + number % 8000}"
    return Job(mine, name, int(env.get("SLURM_NODEID", "0")), nodes, attempt, address, pack(manifest))


def _ask(*words: str) -> str:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        print(f"{words[0]}: {error}", file=sys.stderr)
        return ""
    if done.returncode:
        print(f"{' '.join(words)}: {done.stderr.strip()}", file=sys.stderr)
    return done.stdout.strip()


def seconds(left: str) -> float | None:
    """Slurm's 1-02:03:04, 02:03:04 or 03:04."""
    days, dash, rest = left.rpartition("-")
    try:
        parts = [int(part) for part in rest.split(":")]
        total = 0
        for part in parts:
            total = total * 60 + part
        return total + 86400 * int(days) if dash else total
    except ValueError:  # UNLIMITED, INVALID, nothing
        return None
