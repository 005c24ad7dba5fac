"""``python -m launcher.supervisor RUN_DIR``: the one process on a node that hears the scheduler.

It holds the fence, starts the worker from the capsule, turns a warning (USR2, TERM, INT, a ``stop`` file) into
``stop.ATTEMPT``, which the worker answers by saving and leaving, and writes down how the attempt ended. Everything
below it ignores USR2: schedulers signal every process of a job, and being ignored, unlike a handler, survives exec.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

import contract.settings
from contract import rundir
from contract.settings import Settings
from contract.settings.checks import SettingsError

FINISHED, FAILED, NOT_ALLOWED, AGAIN = 0, 1, 4, 75
"""Exit codes. AGAIN: stopped, or busy elsewhere: a scheduler may start it again. NOT_ALLOWED: somebody said no."""

POLL_S = 0.2


class Supervisor:
    def __init__(self, folder: Path, node: int = 0, parent: int | None = None):
        self.folder, self.node, self.parent = folder, node, parent
        self.asked = 0  # how often we were told to leave
        for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._hear)

    def _hear(self, _number: int, _frame: object) -> None:
        self.asked += 1

    def run(self) -> int:
        """One attempt, from the claim to the end record. Gives the exit code."""
        run = rundir.read_run(self.folder)
        settings = read_settings(self.folder)
        job = os.environ.get("SLURM_JOB_ID") or os.environ.get("LSB_JOBID")
        try:
            owner = rundir.claim(self.folder, job)
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
                old.unlink(missing_ok=True)
            return self._attempt(owner, settings, job)
        finally:
            owner.release()

    def _forbidden(self, run: Mapping[str, Any]) -> str | None:
        for name in (rundir.CANCELLED, rundir.STOP):
            if (self.folder / name).exists():
                return f"not started: {name} is there; python launcher.py retry {run['identity']}"
        for parent in run.get("parents", ()):
            if not any(self.folder.parent.parent.glob(f"*/{parent}/{rundir.DONE}")):
                return f"not started: it needs {parent}, which is not finished"
        return None

    def _attempt(self, owner: rundir.Owner, settings: Settings, job: str | None) -> int:
        journal = rundir.Journal(rundir.attempts_file(self.folder, self.node))
        started = time.monotonic()
        record = {"attempt": owner.attempt, "host": rundir.this_host(), "job": job}
        with (self.folder / rundir.LOG).open("ab", buffering=0) as log:
            child = self._start(settings, owner.attempt, log)
            journal.append({"event": "start", **record, "time": time.time(), "pid": os.getpid()})
            try:
                cause = self._watch(child, owner, settings.env.grace_s)
            finally:
                if child.poll() is None:
                    kill_tree(child.pid)  # nothing of this attempt outlives it
                status = child.wait()
        if cause is None:
            if status:
                cause = "killed" if status < 0 else "failed"
            else:
                cause = "finished" if (self.folder / rundir.DONE).exists() else "stopped"
        seconds = time.monotonic() - started
        journal.append(
            {
                "event": "end",
                **record,
                "time": time.time(),
                "cause": cause,
                "exit": max(status, 0),
                "signal": max(-status, 0) or None,
                "seconds": round(seconds, 3),
                "peak_rss_mb": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024,
                "gpu_seconds": round(seconds * (settings.env.ngpu or 0), 3),
            }
        )
        rundir.stop_file(self.folder, owner.attempt).unlink(missing_ok=True)
        if cause == "stopped" and self._told_by_a_person():
            return NOT_ALLOWED
        return {"finished": FINISHED, "stopped": AGAIN, "busy": AGAIN}.get(cause, FAILED)

    def _start(self, settings: Settings, attempt: str, log: Any) -> subprocess.Popen[bytes]:
        capsule = (self.folder / rundir.CAPSULE).resolve()
        me = os.getpid()

        def before_exec() -> None:
            for number in (signal.SIGUSR2, signal.SIGINT, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG: die when the supervisor is killed
            if os.getppid() != me:
                os._exit(1)

        return subprocess.Popen(
            command(settings, self.folder),
            cwd=capsule,
            env=environment(settings, capsule, attempt),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            preexec_fn=before_exec,  # noqa: PLW1509  # this process has one thread
        )

    def _watch(self, child: subprocess.Popen[bytes], owner: rundir.Owner, grace_s: float) -> str | None:
        """Until the child has left; the cause of the end if it was ours. Polls: a handler may run at any point."""
        beat, deadline = 0.0, float("inf")
        while child.poll() is None:
            now = time.monotonic()
            if now - beat > rundir.HEARTBEAT_S:
                beat = now
                if not owner.beat():
                    return "busy"
            if self.parent is not None and os.getppid() != self.parent:
                self.parent, self.asked = None, self.asked + 1
            if deadline == float("inf") and (self.asked or self._told_by_a_person()):
                deadline = now + grace_s
                rundir.stop_file(self.folder, owner.attempt).touch()
            if now > deadline or self.asked > 1:
                return "killed"
            time.sleep(POLL_S)
        return None

    def _told_by_a_person(self) -> bool:
        return (self.folder / rundir.STOP).exists() or (self.folder / rundir.CANCELLED).exists()


def command(settings: Settings, folder: Path) -> list[str]:
    """What runs the worker: torchrun where there are several processes."""
    worker = ["-m", f"workers.{settings.worker}", str(folder)]
    processes = settings.env.processes_per_node
    if processes == 1 and settings.env.nodes == 1:
        return [sys.executable, *worker]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *worker]


def environment(settings: Settings, capsule: Path, attempt: str) -> dict[str, str]:
    env = settings.env
    side_by_side = (env.max_parallel or 1) if env.scheduler == "local" else 1
    threads = env.threads or max(1, len(os.sched_getaffinity(0)) // (env.processes_per_node * side_by_side))
    found = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(capsule), os.environ.get("PYTHONPATH")])),
        "PYTHONUNBUFFERED": "1",
        "SIGHTLINE_ATTEMPT": attempt,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
    }
    return found | ({"CUDA_VISIBLE_DEVICES": ""} if env.ngpu == 0 else {})


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


def kill_tree(pid: int) -> None:
    """SIGKILL ``pid`` and all below it. torchrun's children lead sessions of their own, so that killpg misses them."""
    below: dict[int, list[int]] = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):
                parent = int(Path(entry.path, "stat").read_text().rpartition(")")[2].split()[1])
                below.setdefault(parent, []).append(int(entry.name))
    todo = [pid]
    while todo:
        each = todo.pop()
        todo += below.get(each, [])
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(each, signal.SIGKILL)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m launcher.supervisor", description=__doc__, allow_abbrev=False)
    parser.add_argument("folder", type=Path, metavar="RUN_DIR")
    parser.add_argument("--node", type=int, default=0, help="this node's number")
    parser.add_argument("--parent", type=int, metavar="PID", help="stop when this parent process is gone")
    args = parser.parse_args()
    try:
        sys.exit(Supervisor(args.folder.resolve(), args.node, args.parent).run())
    except (rundir.RunDirError, OSError) as error:
        print(error, file=sys.stderr)
        sys.exit(FAILED)


if __name__ == "__main__":
    main()
