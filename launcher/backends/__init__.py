"""One file per scheduler: ``env.scheduler=lsf`` is ``launcher/backends/lsf.py``."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from contract import rundir
from launcher import Unavailable
from launcher.manifest import SUBMISSIONS
from launcher.plan import Queued
from launcher.rundirs import Submission


class Report(Protocol):
    """Somebody who is told how the runs get on."""

    def queued(self, count: int, stage: str, job: str) -> None: ...
    def started(self, folder: Path, name: str) -> None: ...
    def elsewhere(self, folder: Path, name: str) -> None: ...
    def moved(self, folder: Path, name: str) -> None: ...
    def ended(self, folder: Path, name: str, state: rundir.State | None, why: str) -> None: ...


class Backend(Protocol):
    def ready(self) -> None:
        """Raises Unavailable where nothing can be submitted from here; asked before anything is written."""

    def render(self, submission: Submission) -> str:
        """The script, for a person to read or to send by hand."""

    def prepare(self, submission: Submission) -> object:
        """Write down what is about to be sent."""

    def submit(self, submission: Submission, report: Report) -> int:
        """Start what is on the disk. Gives the exit code of the launch."""

    def query(self, output_dir: Path) -> dict[str, Queued]:
        """The runs of this folder that the queue holds, by identity; at most one call. Raises Unavailable."""

    def cancel(self, jobs: Sequence[str]) -> None:
        """Take jobs out of the queue."""

    def signal(self, jobs: Sequence[str], name: str) -> None:
        """USR2, KILL: to every process of these jobs, as the scheduler warns and ends them."""


def load(scheduler: str) -> Backend:
    name = f"launcher.backends.{scheduler}"
    if find_spec(name) is None:
        raise Unavailable(f"env.scheduler={scheduler}: not built yet; env.scheduler=local runs here")
    backend: Backend = import_module(name).Backend()
    return backend


def intents(output_dir: Path) -> list[tuple[Path, dict[str, Any]]]:
    """What was, or was about to be, sent to a scheduler: files that are written before it is called."""
    return [(path, rundir.read_json(path)) for path in sorted(output_dir.glob(f"{SUBMISSIONS}/*/[0-9]*.json"))]


def queue(output_dir: Path) -> dict[str, Queued]:
    """What the schedulers hold of this folder. Asks only those that were ever given something of it."""
    found: dict[str, Queued] = {}
    for scheduler in {str(intent["scheduler"]) for _, intent in intents(output_dir)}:
        found |= load(scheduler).query(output_dir)
    return found
