"""``python -m launcher.supervisor RUN_DIR``: the one process on a node that hears the scheduler.

In a job of a queue, ``--manifest FILE`` says which run it is. The first node holds the fence; the others follow it.

It holds the fence, starts the worker from the capsule, turns a warning (USR2, TERM, INT, a ``stop`` file) into
``stop.ATTEMPT``, which the worker answers by saving and leaving, and writes down how the attempt ended. Everything
below it ignores USR2: schedulers signal every process of a job, and being ignored, unlike a handler, survives exec.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import yaml

import contract.settings
from contract import rundir
from contract.settings import Settings
from contract.settings.checks import SettingsError
from contract.settings.env import Env
from launcher import breaker, job_logs, stall, why
from launcher import environment as surroundings
from launcher.processes import kill_tree

if TYPE_CHECKING:
    from launcher.backends.lsf_node import Job as LsfJob
    from launcher.backends.slurm_node import Job as SlurmJob

    Job: TypeAlias = SlurmJob | LsfJob

FINISHED, FAILED, NOT_ALLOWED, AGAIN = 0, 1, 4, 75
"""Exit codes. AGAIN: stopped, or busy elsewhere: a scheduler may start it again. NOT_ALLOWED: somebody said no."""

POLL_S = 0.2
IN_JOB = frozenset({"SLURM_JOB_ID", "LSB_JOBID"})  # what a queue's jobs, and a launch within one, have in common
TIMES_TO_SAVE = 3.0  # how many times what the last checkpoint took is kept for the one at the time limit


class Supervisor:
    def __init__(self, folder: Path, parent: int | None = None, job: Job | None = None):
        self.folder, self.parent, self.job = folder, parent, job
        self.node, self.pack = (job.node, job.pack) if job else (0, 1)
        # A scheduler signals all processes of a job, also of a launch that a person started within one.
        self.in_queue = job is not None or bool(IN_JOB & os.environ.keys())
        self.ends = float("inf")  # when the time limit comes
        self.margin = 0.0  # how long before that we leave
        self.heard: set[int] = set()
        self.asked = 0  # how often we were told to leave
        for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._hear)

    def _hear(self, number: int, _frame: object) -> None:
        self.heard.add(number)
        # One wish to have us leave arrives as USR2, INT, TERM and TERM in a queue; a second Ctrl-C is a second wish.
        once = self.job or (self.in_queue and number != signal.SIGINT)
        self.asked = max(self.asked, 1) if once else self.asked + 1

    def run(self) -> int:
        """One attempt, from the claim to the end record. Gives the exit code."""
        run = rundir.read_run(self.folder)
        settings = read_settings(self.folder)
        job = self.job.id if self.job else os.environ.get("SLURM_JOB_ID") or os.environ.get("LSB_JOBID")
        if self.job and (ends := self.job.ends()):
            self.ends, self.margin = ends, settings.env.signal_s
        if self.job and self.node:
            return self._follow(settings, self.job)
        try:
            owner = self._claim(job)
        except rundir.Busy as error:
            print(error, file=sys.stderr)
            return AGAIN
        try:
            if (self.folder / rundir.DONE).exists():
                return FINISHED
            if reason := self._forbidden(run):
                print(f"{self.folder}: {reason}", file=sys.stderr)
                return NOT_ALLOWED
            for old in self.folder.glob(f"{rundir.STOP}.*"):
                if old != rundir.stop_file(self.folder, owner.attempt):
                    old.unlink(missing_ok=True)
            stall.clear(self.folder, but=owner.attempt)
            if self.job and (tries := self._tries_in_vain()) > settings.env.max_requeue:
                return self._give_up(owner, tries)
            return self._attempt(owner, settings, job)
        finally:
            owner.release()

    def queue_again(self, code: int) -> bool:
        """Is it for us to ask the queue for another attempt? Not where it stops us for good or does so itself, which
        come as TERM (Slurm) or INT (LSF)."""
        ended = {signal.SIGTERM, signal.SIGINT} & self.heard
        return self.node == 0 and code == AGAIN and (self._near_the_end() or not ended)

    def _near_the_end(self) -> bool:
        return time.time() > self.ends - self.margin

    def _claim(self, job: str | None) -> rundir.Owner:
        """In a queue, an owner that went down with its node is waited for until it counts as lost."""
        end = time.monotonic() + (1.5 * rundir.STALE_S if self.job else 0)
        while True:
            try:
                return rundir.claim(self.folder, job, functools.partial(str, self.job.attempt) if self.job else None)
            except rundir.Busy:
                if time.monotonic() > end or self.asked:
                    raise
            time.sleep(1)

    def _follow(self, settings: Settings, job: Job) -> int:
        """On the other nodes: take part in what the first one does."""
        end = time.monotonic() + 2 * rundir.STALE_S
        while not rundir.owned_by(self.folder, job.attempt):
            if (self.folder / rundir.DONE).exists():
                return FINISHED
            if self.asked or time.monotonic() > end:
                return AGAIN
            time.sleep(POLL_S)
        code = self._attempt(rundir.Owner(self.folder, job.attempt), settings, job.id)
        return FINISHED if code == AGAIN else code  # the first node asks for another attempt

    def _step(self) -> int:
        return int((rundir.last_record(self.folder / rundir.METRICS) or {}).get("step") or 0)

    def _tries_in_vain(self) -> int:
        """How many attempts in a row began where this one does."""
        records, _ = rundir.read_journal(rundir.attempts_file(self.folder, 0))
        steps = [r.get("step") for r in records if r.get("event") == "start"]
        return next((i for i, step in enumerate(reversed(steps)) if step != self._step()), len(steps))

    def _give_up(self, owner: rundir.Owner, tries: int) -> int:
        job = self.job.id if self.job else None
        record = {"attempt": owner.attempt, "host": rundir.this_host(), "job": job, "time": time.time()}
        journal = rundir.Journal(rundir.attempts_file(self.folder, 0))
        journal.append({"event": "start", **record})  # without a step: a retry counts anew
        journal.append({"event": "end", **record, "cause": "gave up", "exit": FAILED, "signal": None})
        with (self.folder / rundir.LOG).open("a") as log:
            print(f"error: gave up after {tries} attempts without a new step (env.max_requeue)", file=log)
        return FAILED

    def _forbidden(self, run: Mapping[str, Any]) -> str | None:
        for name in (rundir.CANCELLED, rundir.STOP):
            if (self.folder / name).exists():
                return f"not started: {name} is there; python launcher.py retry {run['identity']}"
        if breaker.holds(self.folder, run):
            return "not started: held, as others of its launch ended alike; python launcher.py status says more"
        for other in (*run.get("parents", ()), *run.get("canary", ())):
            if not any(self.folder.parent.parent.glob(f"*/{other}/{rundir.DONE}")):
                return f"not started: it needs {other}, which is not finished"
        return None

    def _attempt(self, owner: rundir.Owner, settings: Settings, job: str | None) -> int:
        journal = rundir.Journal(rundir.attempts_file(self.folder, self.node))
        started = time.monotonic()
        record = {"attempt": owner.attempt, "host": rundir.this_host(), "job": job}
        with (self.folder / rundir.LOG).open("ab", buffering=0) as log:
            at = log.tell()
            begin: dict[str, Any] = {"time": time.time(), "pid": os.getpid(), "step": self._step(), "log": at}
            if self.job:
                print(job_logs.MARKER.format(attempt=owner.attempt, identity=self.folder.name), flush=True)
            child = self._start(settings, owner.attempt, log)
            begin["environment"] = surroundings.keep(self.folder, surroundings_of(settings, self.job))
            journal.append({"event": "start", **record, **begin})
            try:
                cause = self._watch(child, owner, settings.env, log)
            finally:
                if child.poll() is None:
                    kill_tree(child.pid)  # nothing of this attempt outlives it
                status = child.wait()
        late = {"asked": settings.env.grace_s} if cause == "killed" and self.asked < 2 else {}
        if cause is None:
            if status:
                cause = "killed" if status < 0 else "failed"
            else:
                cause = "finished" if (self.folder / rundir.DONE).exists() else "stopped"
        seconds = time.monotonic() - started
        ends = {"cause": cause, "exit": max(status, 0), "signal": max(-status, 0) or None, **late}
        ends |= self._why({**record, **ends}, settings, at)
        journal.append(
            {
                "event": "end",
                **record,
                "time": time.time(),
                **ends,
                "seconds": round(seconds, 3),
                "peak_rss_mb": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024,
                "gpu_seconds": round(seconds * (settings.env.ngpu or 0) / self.pack, 3),
            }
        )
        if self.node == 0:
            rundir.stop_file(self.folder, owner.attempt).unlink(missing_ok=True)
            if to_hold := breaker.failed(self.folder, ends, settings.env.breaker):
                print(f"{self.folder.name}: ended like others of its stage; the rest of it is held", file=sys.stderr)
                if self.job:
                    self.job.hold(to_hold)
            stall.clear(self.folder)
        if cause in ("stopped", "stalled") and self._told_by_a_person():
            return NOT_ALLOWED
        return {"finished": FINISHED, "stopped": AGAIN, "stalled": AGAIN, "busy": AGAIN}.get(cause, FAILED)

    def _why(self, end: Mapping[str, Any], settings: Settings, begin: int) -> dict[str, Any]:
        """What the end record says of a failure. The log may hold anything; nothing in it may cost us the record."""
        with contextlib.suppress(Exception):
            if end["cause"] == "stopped" and self._near_the_end():
                return {"why": why.TIME}
            if end["cause"] in ("failed", "killed", "stalled"):
                said = job_logs.tail(self.folder / rundir.LOG, begin)
                return why.of_text(said, end, data_path=settings.data_path, processes=settings.env.processes).record()
        return {}

    def _start(self, settings: Settings, attempt: str, log: Any) -> subprocess.Popen[bytes]:
        capsule = (self.folder / rundir.CAPSULE).resolve()
        me = os.getpid()
        deaf = [signal.SIGUSR2, signal.SIGINT, signal.SIGHUP, *([signal.SIGTERM] if self.in_queue else [])]

        def before_exec() -> None:
            for number in deaf:
                signal.signal(number, signal.SIG_IGN)
            ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG: die when the supervisor is killed
            if os.getppid() != me:
                os._exit(1)

        return subprocess.Popen(
            command(settings, self.folder, self.job),
            cwd=capsule,
            env=environment(settings, capsule, attempt, self.job, self.in_queue),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            preexec_fn=before_exec,  # noqa: PLW1509  # this process has one thread
        )

    def _watch(self, child: subprocess.Popen[bytes], owner: rundir.Owner, env: Env, log: Any) -> str | None:
        """Until the child has left; the cause of the end if it was ours. Polls: a handler may run at any point."""
        watchdog = stall.Watchdog(self.folder, owner.attempt, env)
        beat, deadline = 0.0, float("inf")
        while child.poll() is None:
            now = time.monotonic()
            if now - beat > rundir.HEARTBEAT_S:
                beat = now
                if self.node == 0 and not owner.beat():
                    return "busy"
                if watchdog.stalled():
                    if (self.folder / rundir.DONE).exists():
                        return "finished"  # it hangs in taking its leave
                    self._tell(watchdog.ask(child.pid, (self.folder / rundir.CAPSULE).resolve()), log)
                    return "stalled"
                self.margin = max(self.margin, TIMES_TO_SAVE * rundir.seconds_to_save(self.folder))
            if self.parent is not None and os.getppid() != self.parent:
                self.parent, self.asked = None, self.asked + 1
            asked = self.asked or self._near_the_end() or self._told_by_a_person()
            if deadline == float("inf") and asked:
                deadline = now + env.grace_s
                rundir.stop_file(self.folder, owner.attempt).touch()
            if now > deadline or self.asked > 1:
                return "killed"
            time.sleep(POLL_S)
        return None

    def _tell(self, said: str, log: Any) -> None:
        if self.node == 0:
            log.write(f"{said}\n".encode())
            print(said.removeprefix("error: "), file=sys.stderr)

    def _told_by_a_person(self) -> bool:
        return (self.folder / rundir.STOP).exists() or (self.folder / rundir.CANCELLED).exists()


def command(settings: Settings, folder: Path, job: Job | None = None) -> list[str]:
    """What runs the worker: torchrun where there are several processes."""
    worker = ["-m", f"workers.{settings.worker}", str(folder)]
    processes = settings.env.processes_per_node
    if processes == 1 and settings.env.nodes == 1:
        return [sys.executable, *worker]
    place = job.torchrun() if job and settings.env.nodes > 1 else ["--standalone"]
    return [sys.executable, "-m", "torch.distributed.run", *place, f"--nproc-per-node={processes}", *worker]


def environment(
    settings: Settings, capsule: Path, attempt: str, job: Job | None = None, in_queue: bool = False
) -> dict[str, str]:
    env, threads = settings.env, threads_each(settings, job)
    # torchrun, too, must not die of the scheduler's TERM, which everything below it ignores.
    torchrun = {"PET_SIGNALS_TO_HANDLE": "SIGQUIT", "PET_SHUTDOWN_TIMEOUT": "5"} if in_queue else {}
    found = torchrun | {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(capsule), os.environ.get("PYTHONPATH")])),
        "PYTHONUNBUFFERED": "1",
        "SIGHTLINE_ATTEMPT": attempt,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
    }
    return found | ({"CUDA_VISIBLE_DEVICES": ""} if env.ngpu == 0 else {})


def threads_each(settings: Settings, job: Job | None = None) -> int:
    """As said, else the cores shared out."""
    env = settings.env
    side_by_side = (env.max_parallel or 1) if job is None else job.pack
    cores = int(os.environ.get("SLURM_CPUS_PER_TASK", "0")) if job else 0
    return env.threads or max(1, (cores or len(os.sched_getaffinity(0))) // (env.processes_per_node * side_by_side))


def surroundings_of(settings: Settings, job: Job | None = None) -> dict[str, Any]:
    """What a run of these settings would have around it here."""
    env = settings.env
    return surroundings.here(threads_each(settings, job), env.processes, env.workers, env.ngpu != 0, env.container)


def read_settings(folder: Path) -> Settings:
    """The run's ``config.yaml``. Raises RunDirError, naming the file."""
    path = folder / rundir.CONFIG
    try:
        values = yaml.load(path.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        if not isinstance(values, dict):
            raise SettingsError("expected keys and values")
        return contract.settings.read(values)
    except FileNotFoundError:
        raise rundir.RunDirError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, SettingsError) as error:
        raise rundir.RunDirError(f"{path}: unreadable ({'; '.join(str(error).splitlines())})") from None


def in_turn(job: Job) -> int:
    """The runs of a job, one after another; what fails does not keep the others from their turn."""
    codes = []
    others = job.start_others()
    for folder in job.folders:
        if len(job.folders) > 1 and rundir.ended_in(folder, job.id):  # before the job was queued again
            codes.append(FAILED)
            continue
        supervisor = Supervisor(folder, job=job)
        code = supervisor.run()
        if supervisor.asked and folder != job.folders[-1]:
            code = AGAIN  # for those that follow
        if code == AGAIN:
            return job.again(supervisor.queue_again(code), code)
        codes.append(code)
    for each in others:
        each.wait()
    return FINISHED if FINISHED in codes else codes[0]


def _job(manifest: Path) -> Job:
    scheduler = rundir.read_json(manifest).get("scheduler")
    if scheduler == "lsf":
        from launcher.backends import lsf_node

        return lsf_node.this_job(manifest)
    from launcher.backends import slurm_node

    return slurm_node.this_job(manifest)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m launcher.supervisor", description=__doc__, allow_abbrev=False)
    parser.add_argument("folder", type=Path, metavar="RUN_DIR", nargs="?")
    parser.add_argument("--manifest", type=Path, metavar="FILE", help="find the run of this job in it")
    parser.add_argument("--only", metavar="IDENTITY", help="of the runs that the job does side by side")
    parser.add_argument("--parent", type=int, metavar="PID", help="stop when this parent process is gone")
    args = parser.parse_args()
    if (args.folder is None) == (args.manifest is None):
        parser.error("say a RUN_DIR, or --manifest FILE within a job")
    try:
        if args.manifest:
            job = _job(args.manifest)
            if job.pack == 1:
                sys.exit(in_turn(job))
            from launcher import packing

            sys.exit(packing.one_of_several(job, args.only) if args.only else packing.Pack(args.manifest, job).run())
        sys.exit(Supervisor(args.folder.resolve(), args.parent).run())
    except (rundir.RunDirError, OSError) as error:
        print(error, file=sys.stderr)
        sys.exit(FAILED)


if __name__ == "__main__":
    main()
