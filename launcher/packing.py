"""Several runs side by side in one allocation: a supervisor each, below one that starts them all.

Each run has its own directory, fence, attempts and end; they share the allocation's cores, memory and GPUs.
"""

from __future__ import annotations

import ctypes
import dataclasses
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from contract import rundir
from launcher.supervisor import AGAIN, FAILED, FINISHED, POLL_S, Supervisor

if TYPE_CHECKING:
    from launcher.supervisor import Job

LEFT = 130  # exit code of a run's supervisor: stopped, and whoever stopped it does not want it started again


def one_of_several(job: Job, identity: str) -> int:
    """In the process of one run: its exit code, by which the process above asks for another attempt or not."""
    (folder,) = (f for f in job.folders if f.name == identity)
    supervisor = Supervisor(folder, job=dataclasses.replace(job, folders=[folder]))
    code = supervisor.run()
    return code if code != AGAIN or supervisor.queue_again(code) else LEFT


class Pack:
    def __init__(self, manifest: Path, job: Job):
        self.manifest, self.job = manifest, job
        self.waiting = list(job.folders)
        self.active: list[subprocess.Popen[bytes]] = []
        self.codes: list[int] = []
        self.heard: list[int] = []
        for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._hear)

    def _hear(self, number: int, _frame: object) -> None:
        self.heard.append(number)

    def run(self) -> int:
        passed_on = 0
        while self.active or (self.waiting and not self.heard):
            for number in self.heard[passed_on:]:  # a scheduler may not reach the processes below
                passed_on += 1
                for each in self.active:
                    each.send_signal(number)
            while self.waiting and len(self.active) < self.job.pack and not self.heard:
                self._start(self.waiting.pop(0))
            for each in [each for each in self.active if each.poll() is not None]:
                self.active.remove(each)
                self.codes.append(each.returncode)
            time.sleep(POLL_S)
        return self._end()

    def _start(self, folder: Path) -> None:
        if rundir.ended_in(folder, self.job.id):  # before the job was queued again
            self.codes.append(FAILED)
            return

        def before_exec() -> None:
            ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG: no run without this process

        words = [sys.executable, "-m", "launcher.supervisor", "--manifest", str(self.manifest), "--only", folder.name]
        self.active.append(subprocess.Popen(words, preexec_fn=before_exec))  # noqa: PLW1509  # one thread

    def _end(self) -> int:
        wanted = AGAIN in self.codes or (bool(self.waiting) and not self._for_good(self.heard))
        if wanted or LEFT in self.codes or self.waiting:
            return self.job.again(wanted, AGAIN)
        return FINISHED if FINISHED in self.codes else self.codes[0]

    @staticmethod
    def _for_good(heard: Iterable[int]) -> bool:
        return bool({signal.SIGTERM, signal.SIGINT} & {*heard})
