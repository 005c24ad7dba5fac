"""What a run has used, from the records that its supervisors left: device hours and the machines."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contract import rundir


@dataclass(frozen=True)
class Cost:
    """Hours of GPUs, or of processes where a run had no GPU. An attempt that left no last word is not in it."""

    gpu_hours: float = 0.0
    cpu_hours: float = 0.0
    hosts: tuple[str, ...] = ()
    attempts: int = 0

    @property
    def hours(self) -> float:
        return self.gpu_hours + self.cpu_hours

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.gpu_hours + other.gpu_hours,
            self.cpu_hours + other.cpu_hours,
            tuple(dict.fromkeys((*self.hosts, *other.hosts))),
            self.attempts + other.attempts,
        )

    def __str__(self) -> str:
        kinds = [(self.gpu_hours, "GPU"), (self.cpu_hours, "CPU")]
        return " + ".join(_spell(hours, unit) for hours, unit in kinds if hours) or "0 h"


def _spell(hours: float, unit: str) -> str:
    return f"{hours:.3g} {unit}-h" if hours >= 0.1 else f"{60 * hours:.2g} {unit}-min"


def of(folder: Path, processes: int = 1) -> Cost:
    """All attempts of a run, those that failed too. ``processes``: of the whole run, see ``run.json``."""
    return of_records(rundir.attempts(folder), processes, len(list(folder.glob("attempts.*.jsonl"))))


def of_records(records: Sequence[Mapping[str, Any]], processes: int = 1, nodes: int = 1) -> Cost:
    """Of some starts and ends of attempts, on so many nodes."""
    hosts = tuple(dict.fromkeys(str(r["host"]).partition("/")[0] for r in records if r.get("host")))
    gpu = cpu = 0.0
    for record in records:
        seconds, on_gpus = _number(record, "seconds"), _number(record, "gpu_seconds")
        gpu += on_gpus / 3600
        cpu += 0.0 if on_gpus else seconds * max(1, processes // max(1, nodes)) / 3600
    return Cost(gpu, cpu, hosts, len({r.get("attempt") for r in records}))


def total(costs: Iterable[Cost]) -> Cost:
    return sum(costs, Cost())


def _number(record: Mapping[str, Any], key: str) -> float:
    value = record.get(key)
    return float(value) if isinstance(value, (int, float)) and value > 0 else 0.0
