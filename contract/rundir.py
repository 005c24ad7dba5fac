"""The run directory: its file names, who owns it, its state, and the only code that appends to its journals.

Every file has one writer. Whole files appear by rename, journals grow by single writes of whole lines, so that all of
them can be read while they are written, on NFS too.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

SCHEMA = 1

CONFIG = "config.yaml"
RUN = "run.json"
DONE = "done.json"
METRICS = "metrics.jsonl"
LOG = "log.txt"
STOP = "stop"
CANCELLED = "CANCELLED"
OWNER = "owner.json"
CHECKPOINT = "checkpoint.pt"
SAVED = "checkpoint.json"  # {"seconds"}: what the last one cost
ENCODER = "encoder.pt"
FIGURES = "figures"
TABLES = "tables"
CAPSULE = "capsule"

HEARTBEAT_S = 5.0  # how often a supervisor touches owner.json
STALE_S = 90.0  # an owner on another host that was silent for so long has lost the run

State = Literal["finished", "running", "cancelled", "failed", "stopped", "waiting"]
"""``finished``: done.json. ``running``: a live owner. ``stopped``: left after a request to save, or was
ended because it hung, and will go on when started again. ``failed``: the last attempt ended badly. ``waiting``:
planned, never started."""


class RunDirError(Exception):
    """A run directory that cannot be read; the message names the file."""


class Busy(RunDirError):
    """Somebody else is writing this run directory."""


# -- whole files -------------------------------------------------------------------------------------------------------


def write_atomic(path: Path, data: bytes | str, sync: bool = True) -> None:
    """Replace ``path`` in one step: a reader sees the old content or the new one. On OSError the old one stays.

    Without ``sync`` a power failure may undo it until ``sync_all``, which is much faster for a thousand files.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with partial.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    if sync:
        sync_folder(path.parent)


def write_once(path: Path, data: str) -> bool:
    """Make ``path`` unless it exists. True for the one caller, of many at once, who made it."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        partial.write_text(data)
        os.link(partial, path)
    except FileExistsError:
        return False
    finally:
        partial.unlink(missing_ok=True)
    return True


def sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` survive a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_all(folder: Path) -> None:
    """Everything on the file system of ``folder`` survives a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        ctypes.CDLL(None).syncfs(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Mapping[str, Any], sync: bool = True) -> None:
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n", sync)


def read_json(path: Path) -> dict[str, Any]:
    """Raises RunDirError, naming the file, where it is missing or not a JSON object."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise RunDirError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise RunDirError(f"{path}: unreadable ({error})") from None
    if not isinstance(value, dict):
        raise RunDirError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


# -- journals: one JSON object a line ----------------------------------------------------------------------------------


class Journal:
    """Append-only JSON lines. ``append`` is one ``write`` of whole lines; nothing is buffered."""

    def __init__(self, path: Path):
        self.path = path
        self._handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        # A line torn by a crash must not swallow the next one.
        if (size := os.fstat(self._handle).st_size) and not _ends_line(path, size):
            os.ftruncate(self._handle, whole_lines(path))

    def append(self, record: Mapping[str, Any]) -> None:
        """NaN and infinities are written as strings ("nan"), which strict JSON readers accept."""
        try:
            line = json.dumps(record, allow_nan=False)
        except ValueError:
            line = json.dumps({k: repr(v) if isinstance(v, float) and v - v != 0 else v for k, v in record.items()})
        os.write(self._handle, line.encode() + b"\n")

    def sync(self) -> int:
        """Everything so far is on the disk. Returns the length in bytes, to be kept in a checkpoint."""
        os.fsync(self._handle)
        return os.fstat(self._handle).st_size

    def cut(self, offset: int) -> None:
        """Forget what came after ``offset`` (never within a line)."""
        size = os.fstat(self._handle).st_size
        os.ftruncate(self._handle, min(offset, size))
        if not _ends_line(self.path, min(offset, size)):
            os.ftruncate(self._handle, whole_lines(self.path))

    def close(self) -> None:
        os.close(self._handle)


def _ends_line(path: Path, size: int) -> bool:
    if size == 0:
        return True
    with path.open("rb") as file:
        file.seek(size - 1)
        return file.read(1) == b"\n"


def whole_lines(path: Path) -> int:
    """The length, in bytes, of the part of ``path`` that ends in a line end."""
    return path.read_bytes().rfind(b"\n") + 1


def read_journal(path: Path, offset: int = 0) -> tuple[list[dict[str, Any]], int]:
    """The records after ``offset`` and the offset to go on from. A torn or foreign line is passed over; a last line
    without its end is left for the next call. A missing file has no records."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read()
    except FileNotFoundError:
        return [], offset
    end = data.rfind(b"\n") + 1
    records = []
    for line in data[:end].splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records, offset + end


def last_record(path: Path, tail: int = 4096) -> dict[str, Any] | None:
    """The newest whole record, read from the last ``tail`` bytes only."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return None
    records, _ = read_journal(path, max(0, size - tail))
    return records[-1] if records else None


# -- runs --------------------------------------------------------------------------------------------------------------


def run_dir(output_dir: Path, worker: str, identity: str) -> Path:
    return output_dir / worker / identity


def find_runs(output_dir: Path) -> Iterator[Path]:
    """Every run directory below ``output_dir``, in a stable order."""
    for run in sorted(output_dir.glob(f"*/*/{RUN}")):
        yield run.parent


def read_run(folder: Path) -> dict[str, Any]:
    """``run.json``, brought to today's schema. Raises RunDirError for one that is newer than this program."""
    run = read_json(folder / RUN)
    version = run.get("schema")
    if not isinstance(version, int) or version > SCHEMA:
        raise RunDirError(f"{folder / RUN}: schema {version!r}; this program reads up to {SCHEMA}: update sightline")
    for missing in ("identity", "group", "worker", "seed"):
        if missing not in run:
            raise RunDirError(f"{folder / RUN}: has no {missing!r}")
    return run


def attempts_file(folder: Path, node: int) -> Path:
    return folder / f"attempts.{node}.jsonl"


def stop_file(folder: Path, attempt: str) -> Path:
    return folder / f"stop.{attempt}"


def beat_file(folder: Path, attempt: str) -> Path:
    """Touched by the worker as a sign of life."""
    return folder / f"beat.{attempt}"


def stacks_file(folder: Path, attempt: str, rank: int) -> Path:
    """Where a rank was when it was asked, see ``launcher/stall.py``."""
    return folder / f"stacks.{attempt}.{rank}.txt"


def attempts(folder: Path) -> list[dict[str, Any]]:
    """All starts and ends of all nodes, oldest first."""
    found = [r for path in sorted(folder.glob("attempts.*.jsonl")) for r in read_journal(path)[0]]
    return sorted(found, key=lambda r: float(r.get("time", 0)))


def environment_file(folder: Path, name: str) -> Path:
    return folder / f"environment.{name}.json"


def environment(folder: Path) -> tuple[str, dict[str, Any]] | None:
    """The hash and the content of what the last attempt ran in; None for a run that has no (readable) record of it."""
    names = [path.name.split(".")[1] for path in folder.glob("environment.*.json")]
    if len(names) > 1:  # moved on the way
        starts = [r for r in attempts(folder) if r.get("event") == "start" and r.get("environment") in names]
        names = [str(starts[-1]["environment"])] if starts else names[-1:]
    try:
        return (names[0], read_json(environment_file(folder, names[0]))) if names else None
    except RunDirError:
        return None


def seconds_to_save(folder: Path) -> float:
    """How long the last checkpoint took; 0 before there is one."""
    try:
        return float(read_json(folder / SAVED)["seconds"])
    except (RunDirError, KeyError, TypeError, ValueError):
        return 0.0


def ended_in(folder: Path, job: str) -> bool:
    """Did its last attempt belong to this job of a queue, and fail? Then the job does not try again."""
    ends = [r for r in attempts(folder) if r.get("event") == "end"]
    last = ends[-1] if ends else {}
    return last.get("job") == job and last.get("cause") in ("failed", "killed", "gave up")


def state(folder: Path) -> State:
    """What the files say; only the queue knows more."""
    if (folder / DONE).exists():
        return "finished"
    if owner_alive(folder):
        return "running"
    if (folder / CANCELLED).exists():
        return "cancelled"
    records, _ = read_journal(attempts_file(folder, 0))  # in the order of writing: clocks may jump
    ends = {r.get("attempt"): r for r in records if r.get("event") == "end"}
    starts = [r for r in records if r.get("event") == "start"]
    if not starts:
        return "waiting"
    end = ends.get(starts[-1].get("attempt"))
    return "stopped" if end is not None and end.get("cause") in ("stopped", "stalled") else "failed"


# -- the fence: one writer at a time -----------------------------------------------------------------------------------


def this_host() -> str:
    """The host together with its process namespace: in two containers on one host the same pid means two processes."""
    try:
        namespace = Path("/proc/self/ns/pid").readlink().name
    except OSError:
        namespace = ""
    return f"{socket.gethostname()}/{namespace}"


def _process_start(pid: int) -> str | None:
    """When the process began, in the kernel's ticks: tells a process from a later one of the same number."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


@dataclass(frozen=True)
class Owner:
    """The right to write a run directory, held by one supervisor until ``release``."""

    folder: Path
    attempt: str

    def beat(self) -> bool:
        """Still mine? Called every HEARTBEAT_S."""
        try:
            if read_json(self.folder / OWNER).get("attempt") != self.attempt:
                return False
            os.utime(self.folder / OWNER)
        except (RunDirError, FileNotFoundError):
            return False
        return True

    def release(self) -> None:
        with _locked(self.folder), contextlib.suppress(RunDirError):
            if read_json(self.folder / OWNER).get("attempt") == self.attempt:
                (self.folder / OWNER).unlink()


def claim(folder: Path, job: str | None = None, new_attempt: Callable[[], str] | None = None) -> Owner:
    """Become the one writer of ``folder``. Raises Busy, naming the holder, while another lives."""
    with _locked(folder) as now:
        owner = _read_owner(folder)
        if owner is not None and _alive(folder, owner, now):
            raise Busy(f"{folder}: already running as process {owner.get('pid')} on {owner.get('host')}")
        attempt = new_attempt() if new_attempt else f"{int(time.time())}-{uuid.uuid4().hex[:6]}"
        pid = os.getpid()
        write_json(
            folder / OWNER,
            {"attempt": attempt, "host": this_host(), "pid": pid, "started": _process_start(pid), "job": job},
        )
    return Owner(folder, attempt)


def owned_by(folder: Path, attempt: str) -> bool:
    return (_read_owner(folder) or {}).get("attempt") == attempt


def owner_alive(folder: Path) -> bool:
    owner = _read_owner(folder)
    return owner is not None and _alive(folder, owner, time.time())


def _read_owner(folder: Path) -> dict[str, Any] | None:
    try:
        return read_json(folder / OWNER)
    except RunDirError:
        return None


def _alive(folder: Path, owner: Mapping[str, Any], now: float) -> bool:
    if owner.get("host") == this_host():
        return _process_start(int(owner.get("pid", 0))) == owner.get("started")
    try:
        return now - (folder / OWNER).stat().st_mtime < STALE_S
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[float]:
    """A lock that dies with its process. Gives the file system's own time: the hosts' clocks may disagree."""
    handle = os.open(folder / ".owner.lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX)
        os.utime(handle)
        yield os.fstat(handle).st_mtime
    finally:
        os.close(handle)
