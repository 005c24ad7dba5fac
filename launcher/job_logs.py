"""Where a scheduler writes what a job says: beside the submission, while the run's own log is in its directory."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from contract import rundir
from launcher.manifest import elements

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
        names = [f"{lsf[1]}.{lsf[2]}.out"]
    else:
        nodes = max(1, sum(1 for _ in folder.glob("attempts.*.jsonl")))
        names = [f"{job}_{task}_log.out" for task in range(nodes)]
    places = sorted(output_dir.glob("submissions/*/logs"))
    return [logs / name for logs in places for name in names if (logs / name).is_file()]


def of_run(folder: Path, output_dir: Path) -> list[Path]:
    """Of all jobs that were to do this run, oldest first; those too that died before a supervisor spoke."""
    jobs = [str(r["job"]) for r in rundir.attempts(folder) if r.get("event") == "start" and r.get("job")]
    for path in sorted(output_dir.glob("submissions/*/[0-9]*.json")):
        element = _elements(path).get(folder.name)
        if element is not None:
            with contextlib.suppress(rundir.RunDirError):
                name, slurm = rundir.read_json(path)["name"], rundir.read_json(path)["scheduler"] == "slurm"
                array = rundir.read_json(path.parent / "submitted.json").get(name)
                jobs += [f"{array}_{element}" if slurm else f"{array}[{element}]"] if array else []
    return [path for job in dict.fromkeys(jobs) for path in of_job(folder, output_dir, job)]


@functools.lru_cache(maxsize=64)
def _elements(path: Path) -> dict[str, str]:
    """identity -> number of the element, of a submitted array; the file is written once."""
    try:
        return {run["identity"]: n for n, runs in elements(rundir.read_json(path)).items() for run in runs}
    except (rundir.RunDirError, KeyError, TypeError):
        return {}


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
