"""Where a scheduler writes what a job says: beside the submission, while the run's own log is in its directory."""

from __future__ import annotations

import contextlib
import functools
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from contract import rundir
from launcher.manifest import elements

LOOK_S = 5.0  # how long what was submitted is taken to be all
TAIL = 65536  # bytes of a log that are looked at
MARKER = "attempt {attempt} of {identity}"  # a supervisor in a job says so, in the job's own log


def tail(path: Path, start: int = 0) -> str:
    """The end of a file, at most TAIL bytes and from ``start`` on; nothing where there is none."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(start if start <= size else 0, size - TAIL))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def of_job(folder: Path, output_dir: Path, job: str) -> list[Path]:
    """What the scheduler keeps of an element, ``12_3`` (Slurm) or ``12[3]`` (LSF), as far as it is there."""
    if lsf := re.fullmatch(r"(\d+)\[(\d+)\]", job):
        array, names = lsf[1], [f"{lsf[1]}.{lsf[2]}.out"]
    else:
        nodes = max(1, sum(1 for _ in folder.glob("attempts.*.jsonl")))
        array, names = job.partition("_")[0], [f"{job}_{task}_log.out" for task in range(nodes)]
    known = _known(output_dir)
    places = [known.arrays[array]] if array in known.arrays else known.folders
    return [path for place in places for name in names if (path := place / "logs" / name).is_file()]


def of_run(folder: Path, output_dir: Path) -> list[Path]:
    """Of all jobs that were to do this run, oldest first; those too that died before a supervisor spoke."""
    jobs = [str(r["job"]) for r in rundir.attempts(folder) if r.get("event") == "start" and r.get("job")]
    jobs += _known(output_dir).jobs.get(folder.name, [])
    return [path for job in dict.fromkeys(jobs) for path in of_job(folder, output_dir, job)]


@dataclass
class _Known:
    """What was submitted from an output folder."""

    folders: list[Path]
    arrays: dict[str, Path] = field(default_factory=dict)  # number -> the folder of its submission
    jobs: dict[str, list[str]] = field(default_factory=dict)  # identity -> the elements that were to do it


def _known(output_dir: Path) -> _Known:
    return _look(output_dir, int(time.monotonic() // LOOK_S))


@functools.lru_cache(maxsize=1)
def _look(output_dir: Path, _when: int) -> _Known:
    """Once for a thousand runs."""
    found = _Known(sorted(path.parent for path in output_dir.glob("submissions/*/manifest.json")))
    for path in [path for folder in found.folders for path in sorted(folder.glob("[0-9]*.json"))]:
        with contextlib.suppress(rundir.RunDirError, KeyError, TypeError):
            intent = rundir.read_json(path)
            array = str(rundir.read_json(path.parent / "submitted.json")[intent["name"]])
            found.arrays[array] = path.parent
            for number, runs in elements(intent).items():
                name = f"{array}_{number}" if intent["scheduler"] == "slurm" else f"{array}[{number}]"
                for run in runs:
                    found.jobs.setdefault(run["identity"], []).append(name)
    return found


def of_attempt(folder: Path, output_dir: Path, start: Mapping[str, Any]) -> str:
    """What the scheduler's log has of this attempt. A job that is queued again goes on writing to the same file."""
    if not start.get("job"):
        return ""
    texts = []
    marker = MARKER.format(attempt=start.get("attempt"), identity=folder.name)
    for path in of_job(folder, output_dir, str(start["job"])):
        text = tail(path)
        _, here, rest = text.rpartition(marker)
        texts.append(re.split(r"^attempt \S+ of \w+$", rest, maxsplit=1, flags=re.MULTILINE)[0] if here else text)
    return "\n".join(texts)
