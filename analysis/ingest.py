"""``python -m analysis.ingest``: mirrors run directories into an MLflow store. The only writer of the store.

One experiment a worker, one MLflow run an identity, every (run, metric, step) once, steps and times as in the files.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from analysis import runs as rd
from analysis import studies
from analysis.mirror import IDENTITY, artifacts
from analysis.runs import Tell, to_stderr
from analysis.senders import Job, Send, sender
from analysis.store import Lease, Store, StoreError, choose
from analysis.studies import Part
from contract import rundir

if TYPE_CHECKING:
    from mlflow.entities import Run as Stored
    from mlflow.tracking import MlflowClient

UNREACHABLE = 3  # the exit code
LOCKED_TRIES = 3
FEW = 20  # so many runs are looked up one by one


@dataclass
class Count:
    """What one pass did; the keys of ``--json``."""

    store: str
    runs: int = 0
    new: int = 0
    grown: int = 0
    unchanged: int = 0
    left_out: int = 0
    metrics: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        return (
            f"{self.new} new, {self.grown} grown, {self.unchanged} unchanged runs, {self.metrics:,} metrics "
            f"in {self.seconds:.1f} s -> {self.store}"
        )


def ingest(folders: Sequence[Path], store: Store, tell: Tell = to_stderr) -> Count:
    """One pass over run directories. Raises StoreError; whatever was sent before stays sent."""
    begun, count = time.monotonic(), Count(store.shown, len(folders))
    found = []
    for folder in folders:
        try:
            found.append(rd.read_run(folder))
        except rundir.RunDirError as error:
            count.left_out += 1
            tell(f"{error}; the run is left out")
    if found:
        with store.alone(), sender(store) as send:
            one_pass = _Pass(store.open(), store, send, studies.parts(store.output_dir, tell), count, tell)
            generation = _generations(found)
            order = sorted(found, key=lambda run: (generation[run.identity], run.key))
            for (_, worker), each in groupby(order, key=lambda run: (generation[run.identity], run.worker)):
                with store.explained():
                    one_pass.worker(worker, list(each))
    count.seconds = round(time.monotonic() - begun, 3)
    return count


def _generations(runs: Sequence[rd.Run]) -> dict[str, int]:
    """How many runs stand behind each: what an evaluation is built upon is sent before it, and can be named by it."""
    parents = {run.identity: run.parents for run in runs}
    found: dict[str, int] = {}

    def of(identity: str, seen: frozenset[str] = frozenset()) -> int:
        if identity not in found:
            known = [p for p in parents[identity] if p in parents and p not in seen]
            found[identity] = 1 + max((of(p, seen | {identity}) for p in known), default=-1)
        return found[identity]

    return {identity: of(identity) for identity in parents}


@dataclass
class _Pass:
    client: MlflowClient
    store: Store
    send: Send
    parts: Mapping[str, Part]
    count: Count
    tell: Tell
    stored: dict[str, str | None] = field(default_factory=dict)  # identity -> MLflow's run id

    def worker(self, worker: str, runs: list[rd.Run]) -> None:
        """All runs of a worker, which are one experiment."""
        experiment = _experiment(self.client, self.store, worker)
        shared = self.store.file is None
        with Lease(self.client, experiment, self.store) if shared else contextlib.nullcontext() as lease:
            known = _known(self.client, experiment, runs)
            jobs = [
                Job(run, known.get(run.identity), experiment, self.parts.get(run.identity), self._parent(run))
                for run in runs
            ]
            for job, done in zip(jobs, self.send(self.client, jobs), strict=True):
                if lease is not None:
                    lease.keep()
                for line in done.lines:
                    self.tell(line)
                setattr(self.count, done.outcome, getattr(self.count, done.outcome) + 1)
                self.count.metrics += done.metrics
                self.stored[job.run.identity] = done.run_id

    def _parent(self, run: rd.Run) -> str | None:
        """The stored run that it is built upon; sent in this pass, or before."""
        if not run.parents:
            return None
        parent = run.parents[0]
        if parent not in self.stored:
            self.stored[parent] = None
            for folder in self.store.output_dir.glob(f"*/{parent}") if parent.isalnum() else ():
                if experiment := self.client.get_experiment_by_name(folder.parent.name):
                    found = self.client.search_runs([experiment.experiment_id], _filter(parent), max_results=1)
                    self.stored[parent] = found[0].info.run_id if found else None
        return self.stored[parent]


def _experiment(client: MlflowClient, store: Store, worker: str) -> str:
    found = client.get_experiment_by_name(worker)
    if found is None:
        where = f"{store.artifacts}/{worker}" if store.artifacts else None
        return str(client.create_experiment(worker, artifact_location=where))
    if found.lifecycle_stage != "active":
        raise StoreError(
            f"{store.shown}: experiment {worker} is deleted; mlflow experiments restore -x {found.experiment_id}"
        )
    return str(found.experiment_id)


def _known(client: MlflowClient, experiment: str, runs: Sequence[rd.Run]) -> dict[str, Stored]:
    """The runs that the store has, by identity."""
    if len(runs) <= FEW and all(run.identity.isalnum() for run in runs):
        filters = [_filter(run.identity) for run in runs]
    else:
        filters = [""]
    found: dict[str, Stored] = {}
    for each in filters:
        token: str | None = None
        while True:
            page = client.search_runs([experiment], each, max_results=1000, page_token=token)
            found |= {run.data.tags[IDENTITY]: run for run in page if IDENTITY in run.data.tags}
            if not (token := page.token):
                break
    return found


def _filter(identity: str) -> str:
    return f"tags.`{IDENTITY}` = '{identity}'"


# -- the command ------------------------------------------------------------------------------------------------------


@dataclass
class Watch:
    """Which runs changed since the last pass, by their files alone: an idle watcher never asks the store."""

    output_dir: Path
    seen: dict[Path, object] = field(default_factory=dict)

    def changed(self, folders: Iterable[Path]) -> dict[Path, object]:
        parts = studies.parts(self.output_dir, lambda _: None)
        now = {folder: (self._signature(folder), parts.get(folder.name)) for folder in folders}
        return {folder: signature for folder, signature in now.items() if self.seen.get(folder) != signature}

    @staticmethod
    def _signature(folder: Path) -> object:
        paths = [folder / rundir.METRICS, folder / rundir.DONE, folder / rundir.RUN, folder / rundir.ENCODER]
        paths += artifacts(folder)
        with contextlib.suppress(OSError):
            files = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in paths if p.exists()]
            return rundir.state(folder), files
        return object()  # it changed just now


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m analysis.ingest", description="Run directories -> MLflow.")
    parser.add_argument("--output-dir", type=Path, default=Path("runs"))
    parser.add_argument(
        "--store",
        help="sqlite:///FILE, postgresql://..., http://...; else MLFLOW_TRACKING_URI, else OUTPUT_DIR/mlflow.db",
    )
    watching = "again and again; SIGTERM: once more, then leave"
    parser.add_argument("--watch", type=float, nargs="?", const=10.0, metavar="SECONDS", help=watching)
    parser.add_argument("--upgrade", action="store_true", help="first bring a store of an older MLflow to today's form")
    parser.add_argument("--json", action="store_true", help="one JSON object a pass")
    args = parser.parse_args(argv)
    if not args.output_dir.is_dir():
        print(f"error: {args.output_dir}: no such directory", file=sys.stderr)
        return 2
    try:
        store = choose(args.output_dir, args.store)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.upgrade:
        try:
            if kept := store.upgrade():
                print(f"upgraded; the store as it was is kept in {kept}; start mlflow ui anew", file=sys.stderr)
        except StoreError as error:
            print(f"error: {error}", file=sys.stderr)
            return UNREACHABLE
    watch, told, leave = Watch(store.output_dir), "", threading.Event()
    if args.watch is not None:
        signal.signal(signal.SIGTERM, lambda *_: leave.set())
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # whoever started us may have held it back
    while True:
        last = args.watch is None or leave.is_set()  # asked for before the pass that sees everything
        changed = watch.changed(rundir.find_runs(args.output_dir))
        try:
            if changed or args.watch is None:
                count = _patiently(list(changed), store)
                watch.seen |= changed
                print(json.dumps(asdict(count)) if args.json else count, flush=True)
            told = ""
        except StoreError as error:
            if str(error) != told:
                print(f"error: {error}", file=sys.stderr, flush=True)
            if last:
                return UNREACHABLE
            told = str(error)
        if last:
            return 0
        leave.wait(args.watch)


def _patiently(folders: Sequence[Path], store: Store) -> Count:
    for left in reversed(range(LOCKED_TRIES)):
        try:
            return ingest(folders, store)
        except StoreError as error:
            if not error.locked or not left:
                raise
            time.sleep(1.0)
    raise AssertionError("the last try returns or raises")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
