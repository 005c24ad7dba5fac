"""Talking to LSF: one exit code for every error, answers that come late, twice, in part or never.

Nothing here knows of runs. A job is its number, an element ``(number, index)``.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher import NotQueued, Unavailable
from launcher.arrays import ranges

TIMEOUT_S = float(os.environ.get("SIGHTLINE_LSF_TIMEOUT_S", "60"))  # of one call: with its daemons down, LSF hangs
PAUSE_S = min(2.0, TIMEOUT_S / 30)  # before the same question once more
TRIES = 3
AT_ONCE = 500  # jobs a call
# What is set for a person, or by an enclosing job, must not change what is submitted or how it is answered.
FOREIGN = re.compile(
    r"BSUB_|LSB_|LS_JOBPID$|LSF_DOCKER_|CUDA_VISIBLE_DEVICES$|SIGHTLINE_(ATTEMPT|NODE)|(LOCAL_)?(RANK|WORLD_SIZE)$|MASTER_"
)
KEPT = re.compile(r"LSB_(CONFDIR|SHAREDIR)$")
ACCEPTED = re.compile(r"^Job <(\d+)> is submitted to (?:default )?queue <[^>]+>\.", re.MULTILINE)
NOT_FOUND = re.compile(r"^Job <(\d+)(?:\[(\d+)\])?> is not found", re.MULTILINE)
PASSING = re.compile(r"please wait|connection|time[d ]*out|try later|threshold reached|still trying", re.IGNORECASE)
FINAL = re.compile(r"Job not submitted\.\s*$")

Element = tuple[int, int]


@dataclass(frozen=True)
class Row:
    state: str
    why: str


def call(*words: str, script: Path | None = None, more: Mapping[str, str] | None = None) -> tuple[int | None, str, str]:
    """(exit code, output, errors) of an LSF command; the code is None where it did not answer in time."""

    def before_exec() -> None:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG: die when the launcher is killed
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C must not leave the outcome open

    env = {k: v for k, v in os.environ.items() if not FOREIGN.match(k) or KEPT.match(k)}
    env |= {"LC_ALL": "C", **(more or {})}
    stdin = script.open("rb") if script else subprocess.DEVNULL
    try:
        process = subprocess.Popen(
            words,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=env,
            text=True,
            errors="replace",
            preexec_fn=before_exec,  # noqa: PLW1509  # this process has one thread
        )
    except FileNotFoundError:
        raise NotQueued(f"{words[0]}: no such program; is this a host of the LSF cluster?") from None
    finally:
        if script:
            stdin.close()  # type: ignore[union-attr]
    try:
        out, err = process.communicate(timeout=2 * TIMEOUT_S if words[0] == "bsub" else TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        return None, out, err
    return process.returncode, out, err


# -- submitting -------------------------------------------------------------------------------------------------------


def submit(script: Path, name: str, more: Mapping[str, str]) -> int:
    """The number of the job that ``bsub < script`` made. Raises NotQueued with LSF's own words, or Unavailable where it
    is not known whether there is one: the job's name tells later."""
    for again in range(TRIES):
        code, out, err = call("bsub", script=script, more=more)
        said = (err.strip() or out.strip() or "no answer").splitlines()[-1]
        found = ACCEPTED.search(out)
        if code == 0 and found:
            return keep_oldest(_seen(name)[0] or [int(found[1])])
        if code is not None and code != 0 and FINAL.search(err) and not PASSING.search(err):
            raise NotQueued(err.strip())
        # Perhaps it was accepted: only its name can tell. Nothing is sent twice before LSF said so twice.
        if jobs := named(name):
            return keep_oldest(jobs)
        if code is not None and not PASSING.search(err):
            raise NotQueued(err.strip() or f"bsub: exit code {code}, and no job: {said}")
        if again + 1 < TRIES:
            time.sleep(PAUSE_S)
    raise NotQueued(f"bsub: tried {TRIES} times; LSF says: {said}")


def _seen(name: str) -> tuple[list[int], int | None, str]:
    """The jobs of this name that LSF shows at once, oldest first; its exit code and errors."""
    code, out, err = call("bjobs", "-a", "-noheader", "-o", "jobid delimiter='^'", "-J", name)
    return sorted({int(line) for line in out.splitlines() if line.strip().isdigit()}), code, err


def named(name: str) -> list[int]:
    """The jobs of this name, oldest first; that there are none is believed when said twice. Raises Unavailable."""
    empty = failed = 0
    while empty < 2:
        jobs, code, err = _seen(name)
        if jobs:
            return jobs
        clean = code is not None and (not err.strip() or re.search(r"no .*job found|is not found", err, re.IGNORECASE))
        empty, failed = empty + bool(clean), failed + (not clean)
        if failed >= TRIES:
            raise Unavailable(
                f"LSF does not answer ({_last(err)}): whether {name} was queued is not known; the same command finds "
                f"out, and queues nothing twice"
            )
        time.sleep(PAUSE_S)
    return []


def keep_oldest(jobs: Sequence[int]) -> int:
    """One bsub may be heard twice: the younger job goes."""
    if len(jobs) > 1:
        kill([str(job) for job in jobs[1:]])
    return jobs[0]


# -- looking ----------------------------------------------------------------------------------------------------------


def rows(jobs: Mapping[int, Iterable[int]]) -> tuple[dict[Element, Row], set[Element]]:
    """What LSF says of these jobs' elements, and those of which it says nothing, however often it is asked.

    Elements that LSF says it does not know (any more) are in neither. Raises Unavailable where it does not answer.
    """
    found: dict[Element, Row] = {}
    wanted = {(job, index) for job, indexes in jobs.items() for index in indexes}
    gone: set[Element] = set()
    for again in range(TRIES):
        left = sorted({job for job, index in wanted - found.keys() - gone})
        if not left:
            break
        if again:
            time.sleep(PAUSE_S)
        for at in range(0, len(left), AT_ONCE):
            some = left[at : at + AT_ONCE]
            out, err = _bjobs([str(job) for job in some])
            for line in out.splitlines():
                parts = line.split("^", 3)
                if len(parts) == 4 and parts[0].isdigit() and parts[1].isdigit():
                    found[int(parts[0]), int(parts[1])] = Row(parts[2].strip(), parts[3].strip())
            unknown = {(int(job), index and int(index)) for job, index in NOT_FOUND.findall(err)}
            gone |= {each for each in wanted if (each[0], "") in unknown or each in unknown}
    return {e: row for e, row in found.items() if e in wanted}, wanted - found.keys() - gone


def _bjobs(jobs: Sequence[str]) -> tuple[str, str]:
    fields = "jobid jobindex stat pend_reason delimiter='^'"
    said = ""
    for again in range(TRIES):
        if again:
            time.sleep(PAUSE_S)
        code, out, err = call("bjobs", "-a", "-noheader", "-o", fields, *jobs)
        errors = [line for line in err.splitlines() if line.strip() and not NOT_FOUND.match(line)]
        if code is not None and (out.strip() or NOT_FOUND.search(err)) and not errors:
            return out, err
        if code == 0 and not errors and not out.strip():
            said = "no answer to bjobs"  # happens on a busy cluster though the jobs are there
            continue
        said = _last(err) if code is not None else f"no answer in {TIMEOUT_S:g} s"
    if said == "no answer to bjobs":
        return "", ""
    raise Unavailable(f"bjobs: {said}")


def remembered(element: Element) -> bool | None:
    """Did it end, by LSF's history? None where that does not know either. For what bjobs forgot only: it is slow."""
    code, out, _ = call("bhist", "-l", "-n", "0", f"{element[0]}[{element[1]}]")
    if code is None:
        return None
    text = re.sub(r"\n\s*", "", out)  # wrapped at 80 columns, within words
    if "No matching job found" in text or not text.strip():
        return None
    ends = [
        m.start()
        for m in re.finditer(r"Done successfully|Exited with exit code|Exited by signal|Exited;|Exited\.", text)
    ]
    starts = [m.start() for m in re.finditer(r"Starting|Started|Pending: (Requeued|Job has been requeued)", text)]
    return bool(ends) and max(ends) > max(starts, default=0)


# -- taking out -------------------------------------------------------------------------------------------------------


def kill(jobs: Sequence[str], name: str | None = None) -> None:
    """Take ``12`` or ``12[3-5]`` out of the queue, or only send a signal of this name. Never called with nothing: that
    would kill the newest job. One that is over already makes the exit code an error, so that only an answer which does
    not come is one."""
    for at in range(0, len(jobs), 100):
        some = jobs[at : at + 100]
        if some:
            code, _, err = call("bkill", *(["-s", name] if name else []), *some)
            if code is None:
                raise Unavailable(
                    f"bkill: no answer in {TIMEOUT_S:g} s ({_last(err)}); the runs are marked all the same"
                )


def hold(arrays: Sequence[int]) -> None:
    """Elements that wait do not start until they are resumed."""
    for array in arrays:
        states = _states(array)
        waiting = sorted(index for index, state in states.items() if state in ("PEND", "WAIT"))
        if not waiting:
            continue
        call("bstop", f"{array}[{ranges(waiting)}]")
        stopped = [index for index, state in _states(array).items() if index in waiting and state == "USUSP"]
        if stopped:  # began in between
            call("bresume", f"{array}[{ranges(stopped)}]")


def _states(array: int) -> dict[int, str]:
    out, _ = _bjobs([str(array)])
    rows = [line.split("^", 3) for line in out.splitlines()]
    return {int(row[1]): row[2].strip() for row in rows if len(row) == 4 and row[1].isdigit()}


def _last(err: str) -> str:
    lines = err.strip().splitlines()
    return lines[-1] if lines else "no answer"
