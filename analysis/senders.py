"""Who sends the runs of a pass: this process, or several where there are many runs.

Most of the time of an ingest is MLflow's own, in Python, run by run; with several processes it is shared out. Each run
is one process's, so that all that ``mirror`` says of being killed holds here, too. The processes die with this one.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from analysis import runs as rd
from analysis.mirror import Mirror, Outcome
from analysis.store import Store, StoreError, prepare
from analysis.studies import Part
from contract import rundir

if TYPE_CHECKING:
    from mlflow.entities import Run as Stored
    from mlflow.tracking import MlflowClient

MANY = 100  # new runs: below, starting processes takes longer than it saves
MOST = 4  # processes: a database takes no more at once
GARBAGE = 20  # runs between two collections: MLflow makes a million objects, all in circles


@dataclass(frozen=True)
class Job:
    run: rd.Run
    stored: Stored | None
    experiment: str
    part: Part | None
    parent: str | None


@dataclass(frozen=True)
class Done:
    outcome: Outcome | Literal["left_out"]
    metrics: int = 0
    run_id: str | None = None
    lines: tuple[str, ...] = ()


Send = Callable[["MlflowClient", Sequence[Job]], Iterator[Done]]


@contextlib.contextmanager
def sender(store: Store) -> Iterator[Send]:
    """What takes jobs and gives what became of them, in order. Raises StoreError. Processes start when they are needed
    for the first time."""
    processes = min(MOST, len(os.sched_getaffinity(0)))
    with contextlib.ExitStack() as stack:
        pool: ProcessPoolExecutor | None = None

        def send(client: MlflowClient, jobs: Sequence[Job]) -> Iterator[Done]:
            nonlocal pool
            if processes == 1 or sum(job.stored is None for job in jobs) < MANY:
                return _here(client, jobs)
            if pool is None:
                # Started afresh, not forked: a copy of a process that has used MLflow would share its connections.
                context = multiprocessing.get_context("spawn")
                pool = ProcessPoolExecutor(processes, context, _begin, (store, os.getpid()))
                stack.callback(pool.shutdown, cancel_futures=True)
            return _there(pool, store, jobs)

        yield send


def _here(client: MlflowClient, jobs: Sequence[Job]) -> Iterator[Done]:
    gc.freeze()
    gc.disable()
    try:
        for number, job in enumerate(jobs, 1):
            yield _send(client, job)
            if number % GARBAGE == 0:
                gc.collect()
    finally:
        gc.enable()
        gc.unfreeze()


def _there(pool: ProcessPoolExecutor, store: Store, jobs: Sequence[Job]) -> Iterator[Done]:
    try:
        for done in pool.map(_in_process, jobs, chunksize=4):
            if isinstance(done, tuple):
                raise StoreError(done[0], locked=done[1])
            yield done
    except BrokenProcessPool:
        raise StoreError(f"{store.shown}: a process that sends was killed; nothing is lost, try again") from None


def _send(client: MlflowClient, job: Job) -> Done:
    lines: list[str] = []
    try:
        mirror = Mirror(job.run, lines.append, job.part, job.parent)
    except (rundir.RunDirError, OSError) as error:
        return Done("left_out", lines=(f"{error}; the run is left out",))
    outcome, metrics, run_id = mirror.send(client, job.experiment, job.stored)
    return Done(outcome, metrics, run_id, tuple(lines))


# -- in a process of its own ------------------------------------------------------------------------------------------

_store: Store
_client: MlflowClient | None = None
_sent = 0


def _begin(store: Store, parent: int) -> None:
    global _store
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG: nobody else may write once it is gone
    if os.getppid() != parent:
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started us
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _store = store
    prepare()
    gc.freeze()
    gc.disable()


def _in_process(job: Job) -> Done | tuple[str, bool]:
    global _client, _sent
    _sent += 1
    if _sent % GARBAGE == 0:
        gc.collect()
    try:
        with _store.explained():
            _client = _client or _store.client()  # not sooner: the process that started us makes the store
            return _send(_client, job)
    except StoreError as error:
        return str(error), error.locked
