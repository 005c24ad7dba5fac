"""One file per scheduler: ``env.scheduler=lsf`` is ``launcher/backends/lsf.py``."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from contract import rundir
from launcher import Unavailable
from launcher.rundirs import Submission


class Report(Protocol):
    """Somebody who is told how the runs get on."""

    def started(self, folder: Path, name: str) -> None: ...
    def elsewhere(self, folder: Path, name: str) -> None: ...
    def moved(self, folder: Path, name: str) -> None: ...
    def ended(self, folder: Path, name: str, state: rundir.State | None, why: str) -> None: ...


class Backend(Protocol):
    def render(self, submission: Submission) -> str:
        """The script, for a person to read or to send by hand."""

    def submit(self, submission: Submission, report: Report) -> int:
        """Start what is on the disk. Gives the exit code of the launch."""

    def query(self) -> set[str]:
        """The identities that wait in the queue."""

    def cancel(self, folders: list[Path]) -> None:
        """Take queued jobs away; those that run see CANCELLED in their run directory."""


def load(scheduler: str) -> Backend:
    name = f"launcher.backends.{scheduler}"
    if find_spec(name) is None:
        raise Unavailable(f"env.scheduler={scheduler}: not built yet; env.scheduler=local runs here")
    backend: Backend = import_module(name).Backend()
    return backend
