"""What may go from an output folder, and nothing else:

checkpoints    checkpoint.pt and checkpoint.previous.pt of finished runs: their encoder.pt and records stay
capsules       code that no run directory and no queued job refers to, unused for a day
abandoned      run directories that were never started, older than --days, in no launch that is still at work
leftovers      half-written files of killed processes, older than a day
replaced       with --replaced only: runs that fill --stale set aside, older than --days

Never encoder.pt, metrics, records, logs, figures or tables of a run that was started. What runs or is queued is not
touched. Directories go by one rename, out of sight of all others, and are taken apart then: a kill in between leaves
what the next prune removes.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contract import rundir
from launcher import backends
from launcher.manifest import SUBMISSIONS, elements
from launcher.rundirs import REPLACED, Found

DAY = 86400.0
GONE = ".pruned-"
CAPSULES = "capsules"
PREVIOUS = Path(rundir.CHECKPOINT).with_suffix(".previous.pt").name
HALF = re.compile(r"\..+\.[0-9a-f]{8}")  # as rundir.write_atomic and its like call them
REASONS = {
    "checkpoints": "of finished runs; encoder.pt stays",
    "capsules": "code that no run and no queued job refers to",
    "abandoned": "never started, in no launch that is at work",
    "leftovers": "half-written by killed processes",
    "replaced": "set aside by fill --stale",
}


@dataclass(frozen=True)
class Item:
    what: str  # a key of REASONS
    path: Path
    size: int  # bytes
    still: Callable[[], bool]  # may it go? asked again right before

    def line(self) -> dict[str, Any]:
        """For ``--json``; these keys stay."""
        return {"what": self.what, "path": str(self.path), "bytes": self.size, "why": REASONS[self.what]}


def items(
    found: Iterable[Found], output_dir: Path, queued: Collection[str], *, days: float, everything: bool, replaced: bool
) -> list[Item]:
    """What may go of these runs and, with ``everything``, of the folder. ``queued``: identities."""
    found = [f for f in found if f.identity not in queued and not rundir.owner_alive(f.folder)]
    at_work = _at_work(output_dir, days)
    made = [item for each in found for item in _of_run(each, days, at_work)]
    if everything:
        made += [*_capsules(output_dir, queued), *_leftovers(output_dir)]
    if everything and replaced:
        made += _replaced(output_dir, days)
    return made


def remove(item: Item, output_dir: Path) -> bool:
    """Gone now? Not what has come to life since it was shown."""
    if not item.still():
        return False
    if not item.path.is_dir() or item.path.is_symlink():
        item.path.unlink(missing_ok=True)
        return True
    away = output_dir / f"{GONE}{uuid.uuid4().hex[:8]}"
    with contextlib.suppress(FileNotFoundError):
        item.path.rename(away)
        if item.what == "capsules" and not _old(away, DAY):  # a launch took it in the very moment
            away.rename(item.path)
            return False
        shutil.rmtree(away, ignore_errors=True)
    return True


def _of_run(run: Found, days: float, at_work: Collection[str]) -> Iterator[Item]:
    folder = run.folder

    def finished() -> bool:
        return (folder / rundir.DONE).exists() and not rundir.owner_alive(folder)

    def abandoned() -> bool:
        return _never_started(folder) and _old(folder / rundir.RUN, days * DAY)

    if finished():
        for name in (rundir.CHECKPOINT, PREVIOUS):
            if (folder / name).is_file():
                yield Item("checkpoints", folder / name, _size(folder / name), finished)
    elif run.state in ("waiting", "blocked") and run.identity not in at_work and abandoned():
        yield Item("abandoned", folder, _size(folder), abandoned)
        return
    for path in folder.iterdir():
        if HALF.fullmatch(path.name) and _old(path, DAY):
            yield Item("leftovers", path, _size(path), lambda path=path: _old(path, DAY))  # type: ignore[misc]


def _never_started(folder: Path) -> bool:
    marks = (rundir.DONE, rundir.CHECKPOINT, rundir.ENCODER, rundir.METRICS, rundir.STOP, rundir.CANCELLED)
    started = any(folder.glob("attempts.*.jsonl")) or any((folder / name).exists() for name in marks)
    return not started and not rundir.owner_alive(folder)


def _at_work(output_dir: Path, days: float) -> set[str]:
    """The runs of launches in which something happened since: others of theirs may still have to wait."""
    found: set[str] = set()
    for path in output_dir.glob(f"{SUBMISSIONS}/*/manifest.json"):
        with contextlib.suppress(rundir.RunDirError):
            runs = [r for r in rundir.read_json(path).get("runs", ()) if isinstance(r, dict)]
            folders = [output_dir / str(r.get("worker")) / str(r.get("identity")) for r in runs]
            files = [f / name for f in folders for name in (rundir.OWNER, "attempts.0.jsonl", rundir.METRICS)]
            if not all(_old(file, days * DAY) for file in [path, *files]):
                found |= {str(r.get("identity")) for r in runs}
    return found


def _capsules(output_dir: Path, queued: Collection[str]) -> Iterator[Item]:
    used = _used(output_dir, queued)
    for path in sorted((output_dir / CAPSULES).glob("[!.]*")):
        if path.is_dir() and path.name not in used and _old(path, DAY):

            def unused(path: Path = path) -> bool:
                return _old(path, DAY) and path.name not in _used(output_dir, queued)

            yield Item("capsules", path, _size(path), unused)


def _used(output_dir: Path, queued: Collection[str]) -> set[str]:
    """The capsules that runs and jobs refer to, those set aside too."""
    used = set()
    for pattern in (f"*/*/{rundir.RUN}", f"{REPLACED}/*/*/*/{rundir.RUN}"):
        for path in output_dir.glob(pattern):
            with contextlib.suppress(rundir.RunDirError):
                used.add(str(rundir.read_json(path).get("capsule")))
            with contextlib.suppress(OSError):
                used.add((path.parent / rundir.CAPSULE).readlink().name)
    for path, intent in backends.intents(output_dir):
        if any(run["identity"] in queued for runs in elements(intent).values() for run in runs):
            with contextlib.suppress(rundir.RunDirError):
                used.add(str(rundir.read_json(path.parent / "manifest.json").get("capsule")))
    return used


def _leftovers(output_dir: Path) -> Iterator[Item]:
    places = [*output_dir.glob(f"{GONE}*"), *output_dir.glob(f"{CAPSULES}/.partial-*")]
    places += [p for pattern in ("studies/.*", f"{SUBMISSIONS}/*/.*") for p in output_dir.glob(pattern)
               if HALF.fullmatch(p.name)]  # fmt: skip
    for path in places:
        if path.name.startswith(GONE) or _old(path, DAY):
            yield Item("leftovers", path, _size(path), path.exists)


def _replaced(output_dir: Path, days: float) -> Iterator[Item]:
    for path in sorted(output_dir.glob(f"{REPLACED}/*/*/*")):
        if path.is_dir() and _old(path.parent.parent, days * DAY):
            yield Item("replaced", path, _size(path), path.exists)


def _old(path: Path, seconds: float) -> bool:
    """Unchanged for so long; what is not there is as old as can be."""
    try:
        return time.time() - path.lstat().st_mtime > seconds
    except FileNotFoundError:
        return True


def _size(path: Path) -> int:
    try:
        if not path.is_dir() or path.is_symlink():
            return path.lstat().st_size
        return sum(os.lstat(Path(at, name)).st_size for at, _, names in os.walk(path) for name in names)
    except OSError:
        return 0
