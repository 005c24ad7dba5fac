"""A typo costs three runs and not a thousand: when the first runs of a stage end alike, the rest of it is held.

Nobody stays alive to watch a launch, so the supervisors do it: each that fails leaves a mark in the folder of its
submission, and the one that makes it ``env.breaker`` marks of one kind, with no run of the stage finished, writes
``held.STAGE.json``. No supervisor starts a run of that stage then, and what still waits in the queue is held there.
To say the launch again, or ``retry``, makes a new submission, of the code as it is then.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from contract import rundir
from launcher import why
from launcher.manifest import SUBMISSIONS, SUBMITTED

# What the next run would meet as well, wherever it runs.
ALIKE = frozenset({why.BUG, why.DATA, why.DISK, why.CUDA_OOM, why.HOST_OOM, why.UNKNOWN})


def held(output_dir: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """What is held in an output folder: (submission, stage) -> why."""
    found = {}
    for path in output_dir.glob(f"{SUBMISSIONS}/*/held.*.json"):
        reason = rundir.read_json(path)
        found[path.parent.name, str(reason["stage"])] = reason
    return found


def holds(folder: Path, info: Mapping[str, Any]) -> bool:
    """Is the run in this directory not to start?"""
    place = _place(folder, info)
    return place is not None and _file(place, str(info.get("stage"))).exists()


def failed(folder: Path, end: Mapping[str, Any], limit: int) -> list[str]:
    """Note that the run in this directory failed, as its ``end`` record says. The numbers of the arrays that are to be
    held, where it was one too many."""
    info = rundir.read_run(folder)
    place, stage = _place(folder, info), str(info.get("stage"))
    if not limit or place is None or end.get("why") not in ALIKE or _file(place, stage).exists():
        return []
    marks = place / "failed" / quote(stage, safe="") / str(end["mark"])
    marks.mkdir(parents=True, exist_ok=True)
    (marks / folder.name).touch()
    alike = sorted(path.name for path in marks.iterdir())
    if len(alike) < limit or _any_finished(place, folder.parent.parent, stage):
        return []
    reason = {
        "stage": stage,
        "runs": alike[:limit],
        "time": time.time(),
        **{k: end[k] for k in ("why", "mark", "said")},
    }
    rundir.write_once(_file(place, stage), json.dumps(reason, indent=2) + "\n")
    return _arrays(place, stage)


def _place(folder: Path, info: Mapping[str, Any]) -> Path | None:
    """The folder of the submission that a run belongs to."""
    name = info.get("submission")
    place = folder.parent.parent / SUBMISSIONS / str(name)
    return place if name and place.is_dir() else None


def _file(place: Path, stage: str) -> Path:
    return place / f"held.{quote(stage, safe='')}.json"


def _any_finished(place: Path, output_dir: Path, stage: str) -> bool:
    listed = rundir.read_json(place / "manifest.json")["runs"]
    mine = (run for run in listed if run["started"] and run["stage"] == stage)
    return any((rundir.run_dir(output_dir, run["worker"], run["identity"]) / rundir.DONE).exists() for run in mine)


def _arrays(place: Path, stage: str) -> list[str]:
    """The numbers of the arrays, in their scheduler, that do this stage; none where nothing was queued."""
    submitted = place / SUBMITTED
    numbers = rundir.read_json(submitted) if submitted.exists() else {}
    intents = [rundir.read_json(path) for path in sorted(place.glob("[0-9]*.json"))]
    return [str(numbers[i["name"]]) for i in intents if i.get("stage") == stage and i["name"] in numbers]
