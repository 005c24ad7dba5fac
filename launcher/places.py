"""Where a drill's run is started, and signalled as its scheduler does it: here, or in a queue."""

from __future__ import annotations

import dataclasses
import subprocess
import time
from typing import Protocol

from launcher import backends, queues, rundirs, show
from launcher.backends import local
from launcher.plan import Plan, visible_gpus
from launcher.rundirs import Submission

WARNING, KILL = "USR2", "KILL"


class Place(Protocol):
    enough_s: float  # how long a training must take to be met in the middle
    look_s: float  # between two looks at its files
    late_s: float  # how much later than its end a file may be seen
    queues_again: bool  # what was warned, saved and left

    def start(self) -> None: ...
    def alive(self) -> bool:
        """Whether the run goes on, or will, without anything being done."""

    def signal(self, name: str) -> None:
        """As the scheduler does: to every process of the job."""

    def stop(self) -> None: ...


class Here:
    """A supervisor, started as the launcher starts one."""

    enough_s, look_s, late_s, queues_again = 3.0, 0.02, 0.0, False

    def __init__(self, submission: Submission, plan: Plan, commit: str | None):
        rundirs.write(submission, plan, commit)
        self.submission = submission
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        (run,) = self.submission.runs
        gpus = visible_gpus()[: run.settings.env.ngpu or 0]
        self.process = local.begin(run.folder, self.submission.capsule, gpus, subprocess.DEVNULL)

    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def signal(self, name: str) -> None:
        if self.process is not None and self.alive():
            local.Backend().signal([str(self.process.pid)], name)
            if name == KILL:
                self.process.wait()

    def stop(self) -> None:
        self.signal(KILL)


class InQueue:
    """A job of a scheduler, sent as any other."""

    enough_s, look_s, late_s, queues_again = 30.0, 0.2, 20.0, True
    ask_s = 3.0  # between two questions to the scheduler

    def __init__(self, submission: Submission, plan: Plan, commit: str | None):
        self.submission, self.plan, self.commit = submission, plan, commit
        (self.run,) = submission.runs
        self.backend = backends.load(self.run.settings.env.scheduler)
        self.asked, self.job = 0.0, ""

    def start(self) -> None:
        output_dir = self.submission.output_dir
        sent = dataclasses.replace(self.submission, folder=rundirs.new_folder(output_dir, self.submission.name))
        rundirs.write(sent, self.plan, self.commit)
        queues.send(sent, self.backend, show.Watch(1, quiet=True))
        self.asked = 0.0

    def alive(self) -> bool:
        """What the queue said some seconds ago will do."""
        if time.monotonic() - self.asked > self.ask_s:
            queued = self.backend.query(self.submission.output_dir).get(self.run.identity)
            self.job, self.asked = queued.job if queued else "", time.monotonic()
        return bool(self.job)

    def signal(self, name: str) -> None:
        self.asked = 0.0
        if self.alive():
            self.backend.signal([self.job], name)
            self.asked = 0.0

    def stop(self) -> None:
        self.asked = 0.0
        if self.alive():
            self.backend.cancel([self.job])
