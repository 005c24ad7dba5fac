"""No scheduler: run here, now. Independent runs side by side, each below a supervisor of its own."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from contract import rundir
from launcher import breaker
from launcher.backends import Report
from launcher.plan import Queued, Run, visible_gpus
from launcher.processes import signal_tree
from launcher.rundirs import Submission
from launcher.supervisor import AGAIN, FINISHED, IN_JOB, POLL_S, command

INTERRUPTED = 130


def slots(runs: Sequence[Run]) -> int:
    """How many runs side by side: as said, else as many as the GPUs, or the cores, hold."""
    said = [r.settings.env.max_parallel for r in runs if r.settings.env.max_parallel]
    if said:
        return max(said)
    if ngpu := max(r.settings.env.ngpu or 0 for r in runs):
        return max(1, len(visible_gpus()) // ngpu)
    cores = len(os.sched_getaffinity(0))
    return max(1, min(len(runs), cores // max(r.processes for r in runs)))


class Backend:
    def ready(self) -> None:
        """Always."""

    def render(self, submission: Submission) -> str:
        lines = [
            "#!/bin/sh",
            f"# {len(submission.runs)} runs, {submission.slots} at a time; the launch makes these directories.",
            f"cd {shlex.quote(str(submission.capsule))}",
            "export PYTHONPATH=.",
        ]
        stage = None
        for run in submission.runs:
            if run.stage != stage:
                stage = run.stage
                runs = shlex.join(command(run.settings, run.folder)).replace(
                    "\n", "?"
                )  # a line end would end the comment
                lines.append(f"# {stage}: each supervisor runs  {runs}")
            lines.append(shlex.join(supervise(run.folder)))
        return "\n".join(lines) + "\n"

    def prepare(self, submission: Submission) -> None:
        """Nothing but the run directories."""

    def submit(self, submission: Submission, report: Report) -> int:
        return _Session(submission, report).run()

    def query(self, output_dir: Path) -> dict[str, Queued]:
        return {}

    def cancel(self, jobs: Sequence[str]) -> None:
        """Nothing waits in a queue."""

    def signal(self, jobs: Sequence[str], name: str) -> None:
        """A job is the number of its supervisor's process."""
        for job in jobs:
            signal_tree(int(job), signal.Signals[f"SIG{name}"])


def supervise(folder: Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", "launcher.supervisor", str(folder), *flags]


def begin(folder: Path, capsule: Path, gpus: Sequence[str], said: IO[bytes] | int) -> subprocess.Popen[bytes]:
    """A supervisor, which leaves when this process is gone."""
    return subprocess.Popen(
        supervise(folder, "--parent", str(os.getpid())),
        cwd=capsule,
        env={**os.environ, "PYTHONPATH": str(capsule)} | ({"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {}),
        stdin=subprocess.DEVNULL,
        stdout=said,
        stderr=said,
        start_new_session=True,  # a Ctrl-C reaches this process only, which passes it on
    )


@dataclass(frozen=True)
class _Active:
    run: Run
    process: subprocess.Popen[bytes]
    said: IO[bytes]  # what the supervisor had to say
    gpus: list[str]


class _Session:
    def __init__(self, submission: Submission, report: Report):
        self.submission, self.report = submission, report
        self.waiting = list(submission.runs)
        self.active: list[_Active] = []
        self.elsewhere: list[Run] = []  # another launcher runs them
        self.ends: dict[str, rundir.State | None] = {}  # None: not started, because of a parent
        self.gpu_use: Counter[str] = Counter(dict.fromkeys(visible_gpus(), 0))
        self.interrupts = self.passed_on = 0

    def run(self) -> int:
        signals = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
        if IN_JOB & os.environ.keys():
            signals.append(signal.SIGUSR2)  # a queue's warning, to this launch within its job
        before = [signal.signal(number, self._interrupt) for number in signals]
        try:
            while self.waiting or self.active or self.elsewhere:
                if self.interrupts > self.passed_on:
                    self._pass_on()
                self._start()
                self._reap()
                self._look_elsewhere()
                for each in self.active:
                    self.report.moved(each.run.folder, _name(each.run))
                time.sleep(POLL_S)
        finally:
            for each in self.active:  # only after an error of ours
                each.process.terminate()
            for number, handler in zip(signals, before, strict=True):
                signal.signal(number, handler)
        if self.interrupts:
            return INTERRUPTED
        ends = set(self.ends.values())
        for states, code in (({"failed", None}, 100), ({"stopped", "waiting"}, 101), ({"cancelled"}, 103)):
            if ends & states:
                return code
        return 0

    def _interrupt(self, _number: int, _frame: object) -> None:
        self.interrupts += 1

    def _pass_on(self) -> None:
        """The first request: save and leave. The second: leave now. The third does not ask."""
        self.passed_on = self.interrupts
        self.waiting, self.elsewhere = [], []
        for each in self.active:
            each.process.send_signal(signal.SIGKILL if self.interrupts > 2 else signal.SIGTERM)

    def _start(self) -> None:
        for run in list(self.waiting):
            if len(self.active) >= self.submission.slots:
                return
            if run not in self.waiting:  # held with another
                continue
            match self._parents(run):
                case "finished":
                    self.waiting.remove(run)
                    if breaker.holds(run.folder, rundir.read_run(run.folder)):
                        self._hold(run)
                    elif rundir.state(run.folder) == "running":
                        self._leave_to_another(run)
                    else:
                        self._start_one(run)
                case "failed":
                    self.waiting.remove(run)
                    self._end(run, None, f"not started: it needs {', '.join(self._needs(run))}, which did not finish")

    def _needs(self, run: Run) -> tuple[str, ...]:
        canary = self.submission.canary
        return run.parents if run.identity in canary else (*run.parents, *canary)

    def _hold(self, run: Run) -> None:
        """This stage is held, and all of it that waits."""
        others = [each for each in self.waiting if each.stage == run.stage]
        self.waiting = [each for each in self.waiting if each not in others]
        self.ends |= {each.identity: None for each in others}
        self._end(run, None, f"held, and {len(others)} more: those before ended alike; python launcher.py status")

    def _parents(self, run: Run) -> rundir.State:
        pending = {r.identity for r in [*self.waiting, *self.elsewhere, *(a.run for a in self.active)]}
        for parent in self._needs(run):
            if parent in pending:
                return "waiting"
            if self.ends.get(parent) != "finished":
                folders = list(self.submission.output_dir.glob(f"*/{parent}"))
                state = rundir.state(folders[0]) if folders else "failed"
                if state != "finished":
                    return "waiting" if state == "running" else "failed"
        return "finished"

    def _start_one(self, run: Run) -> None:
        gpus = sorted(self.gpu_use, key=lambda d: self.gpu_use[d])[: run.settings.env.ngpu or 0]
        self.gpu_use.update(gpus)
        said = tempfile.TemporaryFile()  # noqa: SIM115  # closed when the process has ended
        process = begin(run.folder, self.submission.capsule, gpus, said)
        self.active.append(_Active(run, process, said, gpus))
        self.report.started(run.folder, _name(run))

    def _reap(self) -> None:
        for each in list(self.active):
            code = each.process.poll()
            if code is None:
                continue
            self.active.remove(each)
            self.gpu_use.subtract(each.gpus)
            each.said.seek(0)
            said = each.said.read().decode(errors="replace").strip()
            each.said.close()
            state = rundir.state(each.run.folder)
            if code == AGAIN and state == "running" and not self.interrupts:
                self._leave_to_another(each.run)
            else:
                self._end(each.run, "failed" if code != FINISHED and state == "waiting" else state, said)

    def _leave_to_another(self, run: Run) -> None:
        self.elsewhere.append(run)
        self.report.elsewhere(run.folder, _name(run))

    def _look_elsewhere(self) -> None:
        for run in list(self.elsewhere):
            if (state := rundir.state(run.folder)) != "running":
                self.elsewhere.remove(run)
                if state in ("finished", "failed", "cancelled"):
                    self._end(run, state, "")
                else:  # it was let go there, so it is ours
                    self.waiting.append(run)

    def _end(self, run: Run, state: rundir.State | None, why: str) -> None:
        self.ends[run.identity] = state
        self.report.ended(run.folder, _name(run), state, why)


def _name(run: Run) -> str:
    return f"{run.name} {run.identity[:8]} seed={run.settings.seed}"
