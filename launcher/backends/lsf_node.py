"""An LSF job seen from within: which run is mine, when it ends, who else takes part, and how to be started again."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from contract import rundir
from launcher import NotQueued, Unavailable
from launcher.manifest import folders

NODE, ATTEMPT = "SIGHTLINE_NODE", "SIGHTLINE_JOB_ATTEMPT"  # told to the supervisors of the other hosts
PASSED = ("LSB_JOBID", "LSB_JOBINDEX", "LSB_MCPU_HOSTS", "CUDA_VISIBLE_DEVICES", "PYTHONPATH", "PATH")


@dataclass(frozen=True)
class Job:
    folders: list[Path]  # of the runs, done one after another
    id: str  # as people and bkill say it: 12[3]
    node: int
    nodes: int
    attempt: str  # the same on every host, another one whenever it starts
    address: str | None  # where the hosts of this job meet
    hosts: list[str]
    manifest: Path
    limit: float | None  # when LSF's -W ends it, in the clock of this host
    pack: int  # how many of its runs it does side by side

    def ends(self) -> float | None:
        return self.limit

    def start_others(self) -> list[subprocess.Popen[bytes]]:
        """LSF starts the first host only; it starts the others, with what ``blaunch`` would not pass on."""
        if self.node or self.nodes == 1:
            return []
        started = []
        for node, host in enumerate(self.hosts[1:], 1):
            told = {name: os.environ[name] for name in PASSED if name in os.environ}
            told |= {NODE: str(node), ATTEMPT: self.attempt}
            environment = [f"{name}={value}" for name, value in told.items()]
            words = ["env", "-C", str(Path.cwd()), *environment, sys.executable, "-m", "launcher.supervisor"]
            started.append(subprocess.Popen(["blaunch", "-z", host, *words, "--manifest", str(self.manifest)]))
        return started

    def again(self, wanted: bool, code: int) -> int:
        """The exit code. LSF queues an element again by the code alone: one that a person ended must not have it."""
        return code if wanted else KILLED

    def hold(self, arrays: Sequence[str]) -> None:
        """What still waits of these stays in the queue and does not start. LSF stops what runs as well: an element that
        was just being started goes on, and sees for itself."""
        from launcher.backends import lsf_calls

        try:
            lsf_calls.hold([int(array) for array in arrays])
        except (NotQueued, Unavailable) as error:
            print(error, file=sys.stderr)

    def torchrun(self) -> list[str]:
        """What torchrun must know to find the other hosts."""
        return [
            f"--nnodes={self.nodes}",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={self.address}",
            f"--rdzv-id={self.attempt}",
            f"--rdzv-conf=is_host={int(self.node == 0)}",
        ]


KILLED = 130


def this_job(manifest: Path) -> Job:
    """From the environment of a job, and what was submitted. Raises RunDirError."""
    env = os.environ
    try:
        number, index = int(env["LSB_JOBID"]), env["LSB_JOBINDEX"]
    except (KeyError, ValueError) as error:
        raise rundir.RunDirError(f"{manifest}: not within an LSF job ({error})") from None
    told = rundir.read_json(manifest)
    mine = folders(manifest, index)
    pairs = env.get("LSB_MCPU_HOSTS", "").split()  # host slots host slots; LSB_HOSTS repeats a host for every slot
    hosts = pairs[::2] or ["localhost"]
    address = f"{hosts[0]}:{20000 + (number * 37 + int(index)) % 20000}" if len(hosts) > 1 else None
    minutes = told.get("minutes")
    return Job(
        folders=mine,
        id=f"{number}[{index}]",
        node=int(env.get(NODE, "0")),
        nodes=len(hosts),
        attempt=env.get(ATTEMPT) or f"lsf-{number}-{index}-{uuid.uuid4().hex[:8]}",  # nothing tells a second start
        address=address,
        hosts=hosts,
        manifest=manifest,
        limit=time.time() + float(minutes) * 60 if minutes else None,
        pack=int(told.get("pack", 1)),
    )
