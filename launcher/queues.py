"""What waits in a scheduler's queue, beside what the files say: asked in one call, and added to by one at a time."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import shutil
import sys
import time
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from contract import rundir
from launcher import NotQueued, Unavailable, backends, breaker, show
from launcher.manifest import SUBMISSIONS, elements
from launcher.plan import OPEN, Plan, Queued, State, look, with_queue
from launcher.rundirs import Submission

GLANCE = ".glance.json"
KEPT_S = ("SIGHTLINE_QUEUE_S", "30")


def asked(output_dir: Path, clean: bool = True) -> dict[str, Queued]:
    """What the schedulers hold, now. Left out are jobs that wait for what will never be, or that the breaker holds;
    with ``clean`` they are taken out of the queue, to be queued anew. Raises Unavailable."""
    queue = backends.queue(output_dir)
    in_vain = _in_vain(output_dir, queue)
    if clean and in_vain:
        changed(output_dir)
        take_out(in_vain)
    return {identity: job for identity, job in queue.items() if identity not in in_vain}


# -- looking, from any number of terminals ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Glance:
    """What the schedulers held at ``time``; None where nothing was ever given to one."""

    runs: Mapping[str, Queued] = field(default_factory=dict)
    time: float | None = None


def glance(output_dir: Path, fresh: bool = False) -> Glance:
    """What the schedulers hold, as of the last ``SIGHTLINE_QUEUE_S`` (30) seconds: all terminals share one call.

    A scheduler that does not answer is mentioned; what it said last is used.
    """
    if not any(output_dir.glob(f"{SUBMISSIONS}/*/[0-9]*.json")):
        return Glance()
    place = output_dir / SUBMISSIONS
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # of a folder that is only to be read
            lock = stack.enter_context((place / ".glance.lock").open("w"))
            fcntl.lockf(lock, fcntl.LOCK_EX)
        last = _last_glance(place)
        if last.time is not None and not fresh and 0 <= time.time() - last.time < float(os.environ.get(*KEPT_S)):
            return last
        try:
            found = Glance(asked(output_dir, clean=False), time.time())
        except Unavailable as error:
            print(f"error: {error}\nwhat is queued is not known; this is what the files say", file=sys.stderr)
            return last
        runs = {identity: dataclasses.asdict(job) for identity, job in found.runs.items()}
        with contextlib.suppress(OSError):
            rundir.write_json(place / GLANCE, {"time": found.time, "runs": runs}, sync=False)
        return found


def _last_glance(place: Path) -> Glance:
    try:
        said = rundir.read_json(place / GLANCE)
        return Glance({identity: Queued(**job) for identity, job in said["runs"].items()}, float(said["time"]))
    except (rundir.RunDirError, KeyError, TypeError, ValueError):
        return Glance()


def changed(output_dir: Path) -> None:
    """The queue is not what it was when somebody last looked."""
    (output_dir / SUBMISSIONS / GLANCE).unlink(missing_ok=True)


# -- acting -----------------------------------------------------------------------------------------------------------


def _in_vain(output_dir: Path, queue: Mapping[str, Queued]) -> dict[str, Queued]:
    """Jobs that wait for what will never be, or that the breaker holds, and what in the queue is built upon these."""
    found = {identity: job for identity, job in queue.items() if job.state == "blocked"}
    held = [identity for identity, job in queue.items() if job.state == "held"]
    found |= {i: queue[i] for i in held if any(breaker.holds(f, info) for f, info in _described(output_dir, i))}
    left = {i: job for i, job in queue.items() if job.state == "queued" and i not in found} if found else {}
    needs = {i: {p for _, info in _described(output_dir, i) for p in _needs(info)} for i in left}
    while more := {i for i in left if i not in found and not needs[i].isdisjoint(found)}:
        found |= {i: queue[i] for i in more}
    return found


def _described(output_dir: Path, identity: str) -> list[tuple[Path, dict[str, Any]]]:
    return [(path.parent, rundir.read_run(path.parent)) for path in output_dir.glob(f"*/{identity}/{rundir.RUN}")]


def _needs(info: Mapping[str, Any]) -> Iterator[str]:
    yield from info.get("parents", ())
    yield from info.get("canary", ())


def take_out(jobs: Mapping[str, Queued], others: Iterable[Queued] = ()) -> None:
    """Take these runs' jobs out of the queue; not a job that also does ``others``, which finds the mark at its run."""
    needed = {(job.scheduler, job.job) for job in others}
    unwanted = {(job.scheduler, job.job) for job in jobs.values()} - needed
    for scheduler in {scheduler for scheduler, _ in unwanted}:
        backends.load(scheduler).cancel(sorted(job for of, job in unwanted if of == scheduler))


def told(found: Plan, queue: Mapping[str, Queued]) -> Plan:
    runs = [dataclasses.replace(r, state=cast(State, with_queue(r.state, queue.get(r.identity)))) for r in found.runs]
    return dataclasses.replace(found, runs=tuple(runs))


def looked_again(found: Plan) -> Plan:
    """Another launch may have had its turn since."""
    again = {r.identity: look(r.folder, r.code) for r in found.runs if r.state in OPEN}
    runs = [
        dataclasses.replace(r, state=again[r.identity][0], changed=tuple(again[r.identity][1]))
        if r.identity in again
        else r
        for r in found.runs
    ]
    return dataclasses.replace(found, runs=tuple(runs))


@contextlib.contextmanager
def turn(output_dir: Path) -> Iterator[None]:
    """One launch to a queue at a time: between the look at the queue and the last call nobody else adds to it."""
    place = output_dir / SUBMISSIONS
    place.mkdir(parents=True, exist_ok=True)
    with (place / ".lock").open("w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        yield


def forget(submission: Submission, queued: Container[str]) -> None:
    """Undo what ``write`` made for runs that no scheduler took."""
    for run in submission.runs:
        untouched = not rundir.owner_alive(run.folder) and not rundir.attempts_file(run.folder, 0).exists()
        if run.identity in submission.fresh and run.identity not in queued and untouched:
            shutil.rmtree(run.folder)
            with contextlib.suppress(OSError):  # others are in it
                run.folder.parent.rmdir()
    if not any(r.identity in queued for r in submission.runs):
        shutil.rmtree(submission.folder)


def send(submission: Submission, backend: backends.Backend, watch: show.Watch) -> int:
    changed(submission.output_dir)
    try:
        return backend.submit(submission, watch)
    except NotQueued:
        kept = [i for path, i in backends.intents(submission.output_dir) if path.parent == submission.folder]
        queued = {run["identity"] for intent in kept for runs in elements(intent).values() for run in runs}
        forget(submission, queued)
        raise
    finally:
        changed(submission.output_dir)
