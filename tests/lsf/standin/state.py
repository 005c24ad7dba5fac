"""What the stand-in knows: one JSON file under a lock, the profile of the cluster, and the faults to come."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

OVER = ("DONE", "EXIT")
PROFILE: dict[str, Any] = {
    "scale": 0.02,  # real seconds of one of LSF's seconds
    "slots": 8,
    "hosts": ["node1", "node2"],
    "queues": ["normal", "general", "short"],
    "default_queue": "normal",
    "groups": ["compute-lab"],
    "longest_minutes": 28 * 24 * 60,
    "longest_array": 1000,
    "wants_output": True,  # an esub refuses jobs without -o
    "sequential_signal": False,  # INT, TERM, KILL for parallel jobs too; otherwise KILL only
    "rc_no_jobs": 0,
    "clean_period_s": 3600,  # real seconds from the end of a job until bjobs forgets it
}

Row = tuple[dict[str, Any], int, dict[str, Any]]


def home() -> Path:
    return Path(os.environ["FAKE_LSF_DIR"])


def profile() -> dict[str, Any]:
    path = home() / "profile.json"
    return PROFILE | (json.loads(path.read_text()) if path.exists() else {})


@contextlib.contextmanager
def _locked(name: str) -> Iterator[None]:
    with (home() / name).open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write(path: Path, value: object) -> None:
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(value))
    part.replace(path)


@contextlib.contextmanager
def opened() -> Iterator[dict[str, Any]]:
    """All that is known, for one at a time; what was changed is written unless an error is raised."""
    path = home() / "state.json"
    with _locked("lock"):
        now = _read(path) if path.exists() else {"next": 1, "last": None, "jobs": {}}
        before = json.dumps(now)
        yield now
        if json.dumps(now) != before:
            _write(path, now)


def _read(path: Path) -> dict[str, Any]:
    """A test that edits the file takes no lock: half of a file is not what is known."""
    for _ in range(100):
        with contextlib.suppress(json.JSONDecodeError):
            return dict(json.loads(path.read_text()))
        time.sleep(0.01)
    raise ValueError(f"{path}: not JSON")


def fault(call: str) -> dict[str, Any] | None:
    """What is to go wrong in this call; a fault is used up after its ``times``."""
    path = home() / "faults.json"
    if not path.exists():
        return None
    with _locked("faults.lock"):
        faults = json.loads(path.read_text())
        for each in faults:
            if each["call"] == call and each["times"] > 0:
                each["times"] -= 1
                _write(path, faults)
                return dict(each)
    return None


def elements(
    now: dict[str, Any], ids: Sequence[str] | None = None, name: str | None = None
) -> tuple[list[Row], list[str]]:
    """((job, index, element) of what ``12`` or ``12[1,3-5]`` mean, the ids of which nothing is known (any more))."""
    forgotten = time.time() - profile()["clean_period_s"]
    known: dict[str, list[Row]] = {}
    for number, job in now["jobs"].items():
        if name is not None and not fnmatchcase(job["name"], name):
            continue
        rows = [(job, int(i), e) for i, e in job["elements"].items() if e["end"] is None or e["end"] > forgotten]
        if rows:
            known[number] = rows
    if ids is None:
        return [row for rows in known.values() for row in rows], []
    found: list[Row] = []
    missing: list[str] = []
    for each in ids:
        match = re.fullmatch(r"(\d+)(?:\[([\d,-]+)\])?", each)
        wanted = _indexes(match[2]) if match and match[2] else None
        rows = known.get(match[1], []) if match else []
        rows = [row for row in rows if wanted is None or row[1] in wanted]
        found += rows
        if not rows:
            missing.append(each)
    return found, missing


def _indexes(text: str) -> set[int]:
    pairs = (part.partition("-") for part in text.split(",") if part)
    return {index for low, _, high in pairs for index in range(int(low), int(high or low) + 1)}
