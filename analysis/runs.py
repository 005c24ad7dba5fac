"""One run directory, read for analysis: what it is, how it ended, its curves."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from contract import rundir

NOT_METRICS = frozenset({"step", "of", "time"})

Tell = Callable[[str], None]


def to_stderr(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr)


class Point(NamedTuple):
    key: str
    step: int
    time: float
    value: float


@dataclass(frozen=True)
class Run:
    """``run.json``, checked against the folder that it lies in."""

    folder: Path
    identity: str
    group: str
    name: str
    worker: str
    stage: str
    seed: int
    code: str
    commit: str
    study: str
    imported: str  # where its figures come from, if no worker of ours made them
    submitted: float
    parents: tuple[str, ...]
    processes: int
    capsule: str

    @property
    def key(self) -> str:
        """``worker/identity``: the folder below the output directory."""
        return f"{self.folder.parent.name}/{self.folder.name}"


def read_run(folder: Path) -> Run:
    """Raises RunDirError, naming the file, for what a hand or another version of the program made of it."""
    path = folder / rundir.RUN
    run = rundir.read_run(folder)
    if run["identity"] != folder.name:
        raise rundir.RunDirError(f"{path}: identity {run['identity']!r} in a folder named {folder.name!r}: a copy?")
    code = run.get("code")
    try:
        return Run(
            folder=folder,
            identity=folder.name,
            group=str(run["group"]),
            name=str(run.get("name") or folder.name),
            worker=str(run["worker"]),
            stage=str(run.get("stage") or run["worker"]),
            seed=int(run["seed"]),
            code=str(code.get("hash") or "") if isinstance(code, Mapping) else str(code or ""),
            commit=str(run.get("commit") or ""),
            study=str(run.get("study") or ""),
            imported=_source(run.get("imported")),
            submitted=number(run.get("submitted")) or 0.0,
            parents=tuple(map(str, run.get("parents") or ())),
            processes=int(run.get("processes") or 1),
            capsule=str(run.get("capsule") or ""),
        )
    except (TypeError, ValueError) as error:
        raise rundir.RunDirError(f"{path}: {error}") from None


def _source(imported: object) -> str:
    return str(imported.get("source") or "somewhere") if isinstance(imported, Mapping) else str(imported or "")


def number(value: object) -> float | None:
    """A metric's value; the journal spells NaN and the infinities as text. None for what is no number."""
    if isinstance(value, (bool, int, float)):
        return float(value)
    return float(value) if value in ("nan", "inf", "-inf") else None


def points(records: Iterable[Mapping[str, Any]]) -> Iterator[Point]:
    """The values of journal lines, one by one. A line without a step is passed over."""
    for record in records:
        step, time = record.get("step"), number(record.get("time"))
        if not isinstance(step, int):
            continue
        for key, each in record.items():
            if key not in NOT_METRICS and (value := number(each)) is not None:
                yield Point(key, step, time if time is not None and math.isfinite(time) else 0.0, value)


def curves(folder: Path) -> tuple[list[Point], list[str]]:
    """All points of ``metrics.jsonl``, and a line for what had to be left out of it."""
    path = folder / rundir.METRICS
    records, end = rundir.read_journal(path)
    found = list(points(records))
    problems: list[str] = []
    if not path.exists():
        return found, problems
    data = path.read_bytes()
    if damaged := len(data[:end].splitlines()) - len(records):
        problems.append(f"{path}: {damaged} damaged line(s) left out")
    if data[end:] and (folder / rundir.DONE).exists():
        problems.append(f"{path}: the last line is torn; left out")
    return found, problems


@dataclass(frozen=True)
class Final:
    """``done.json``."""

    metrics: dict[str, float]
    steps: int
    time: float
    peak_gpu_mb: float | None = None

    def points(self) -> list[Point]:
        return [Point(key, self.steps, self.time, value) for key, value in self.metrics.items()]


def read_final(folder: Path) -> Final | None:
    """None while the run is not finished. Raises RunDirError for a damaged file."""
    path = folder / rundir.DONE
    if not path.exists():
        return None
    done = rundir.read_json(path)
    metrics = done.get("metrics")
    if not isinstance(metrics, dict):
        raise rundir.RunDirError(f"{path}: has no 'metrics'")
    values = {str(key): number(value) for key, value in metrics.items()}
    if bad := [key for key, value in values.items() if value is None]:
        raise rundir.RunDirError(f"{path}: {bad[0]}={metrics[bad[0]]!r} is not a number")
    steps = done.get("steps")
    return Final(
        metrics={key: value for key, value in values.items() if value is not None},
        steps=steps if isinstance(steps, int) else 0,
        time=number(done.get("time")) or path.stat().st_mtime,
        peak_gpu_mb=number(done.get("peak_gpu_mb")),
    )
