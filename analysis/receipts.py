"""What stands behind a cell: machines, hours, how its runs ended and differ. Each run directory is read once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from analysis.cells import Cell, Table
from analysis.render import Grid, Text
from contract import cost, rundir
from contract.cost import Cost

HERE = frozenset({"output_dir", "encoder", "oracle", "job_name"})  # paths and names; the runs that they lead to differ
NOT_LOST = frozenset({"finished", "stopped", "busy"})  # ends of attempts after which nothing has to be done again


@dataclass(frozen=True)
class Attempt:
    """From a start to its end. ``cause``: as finely as the supervisor knew it; ``said``: in what words."""

    cause: str
    said: str
    host: str
    cost: Cost
    ended: bool

    @property
    def lost(self) -> bool:
        return self.cause not in NOT_LOST


@dataclass(frozen=True)
class Entry:
    """One run, as far as it has a directory."""

    identity: str
    folder: Path | None
    info: Mapping[str, Any] = field(default_factory=dict)
    records: Sequence[Mapping[str, Any]] = ()
    nodes: int = 1
    runs_as: str = ""  # the attempt that holds it now

    @property
    def parents(self) -> list[str]:
        return [str(each) for each in self.info.get("parents") or ()]

    @property
    def stage(self) -> str:
        return str(self.info.get("stage") or self.info.get("worker") or "")

    @property
    def cost(self) -> Cost:
        return self._cost(self.records)

    def attempts(self) -> list[Attempt]:
        """Node by node, in the order of their starts. One without an end was killed with its supervisor, or runs."""
        ends = {(r.get("attempt"), r.get("host")): r for r in self.records if r.get("event") == "end"}
        found = []
        for start in (r for r in self.records if r.get("event") == "start"):
            end = ends.get((start.get("attempt"), start.get("host")))
            cause = "running" if start.get("attempt") == self.runs_as else "no last word"
            if end is not None:
                cause = str(end.get("why") or end.get("cause") or "unknown")
            host = str(start.get("host") or "").partition("/")[0]
            found.append(
                Attempt(
                    cause, str((end or {}).get("said") or ""), host, self._cost([end] if end else []), end is not None
                )
            )
        return found

    def _cost(self, records: Sequence[Mapping[str, Any]]) -> Cost:
        processes = self.info.get("processes")
        return cost.of_records(records, processes if isinstance(processes, int) else 1, self.nodes)


class Ledger:
    """The runs of an output directory, by identity."""

    def __init__(self, output_dir: Path):
        self.output_dir = output_dir
        self._folders: dict[str, Path] | None = None
        self._entries: dict[str, Entry] = {}

    def entry(self, identity: str) -> Entry:
        if identity not in self._entries:
            folder = self._folder(identity)
            if folder is None:
                self._entries[identity] = Entry(identity, None)
            else:
                self._entries[identity] = _read(identity, folder)
        return self._entries[identity]

    def ancestry(self, identities: Iterable[str]) -> list[Entry]:
        """These and what they were built upon, each once."""
        todo = list(identities)
        found: dict[str, Entry] = {}
        while todo:
            identity = todo.pop(0)
            if identity not in found:
                found[identity] = self.entry(identity)
                todo += found[identity].parents
        return list(found.values())

    def with_parents(self, cell: Cell) -> Cost:
        return cost.total(each.cost for each in self.ancestry(run.identity for run in cell.runs))

    def of_table(self, table: Table) -> list[Entry]:
        return self.ancestry(run.identity for cell in table.cells.values() for run in cell.runs)

    def _folder(self, identity: str) -> Path | None:
        if self._folders is None:  # one look at each folder of a worker, not one search a run
            self._folders = {run.name: run for run in rundir.find_runs(self.output_dir)}
        return self._folders.get(identity)


def _read(identity: str, folder: Path) -> Entry:
    nodes = len(list(folder.glob("attempts.*.jsonl")))
    found = rundir.attempts(folder)
    started = [str(r.get("attempt")) for r in found if r.get("event") == "start"]
    ended = {str(r.get("attempt")) for r in found if r.get("event") == "end"}
    now = next((attempt for attempt in started if attempt not in ended and rundir.owned_by(folder, attempt)), "")
    if not now and set(started) - ended:
        found = rundir.attempts(folder)  # its supervisor may have said the last word meanwhile
    return Entry(identity, folder, _info(folder), found, nodes, now if now and rundir.owner_alive(folder) else "")


def with_parents(output_dir: Path, cell: Cell) -> Cost:
    """What a cell took; of several cells, ask one Ledger."""
    return Ledger(output_dir).with_parents(cell)


# -- as a table -------------------------------------------------------------------------------------------------------


def records(table: Table, ledger: Ledger | None = None) -> list[dict[str, Any]]:
    """Hours of GPUs, and of processes where a run had none: a record (``kind``) per cell, one per stage and cause by
    which attempts ended, and the total. Runs that several cells share are in each of these, and in the total once."""
    ledger = ledger or Ledger(table.output_dir)
    stages = {column.name: column.stage for column in table.columns}
    found = []
    for (row, column), cell in table.cells.items():
        own = [ledger.entry(run.identity) for run in cell.runs]
        spent = _record(kind="cell", row=row, column=column, stage=stages[column], entries=own)
        found.append(spent | _hours("with_parents_", ledger.with_parents(cell)))
    every = ledger.of_table(table)
    ends: dict[tuple[str, str], list[tuple[Entry, Attempt]]] = {}
    for entry in every:
        for attempt in entry.attempts():
            ends.setdefault((entry.stage, attempt.cause), []).append((entry, attempt))
    for (stage, cause), pairs in sorted(ends.items()):
        some: dict[str, Any] = {"kind": "cause", "row": "", "column": "", "stage": stage, "cause": cause}
        some |= {"runs": len({entry.identity for entry, _ in pairs}), "attempts": len(pairs)}
        some |= _hours("", cost.total(attempt.cost for _, attempt in pairs))
        some |= _hours("lost_", cost.total(attempt.cost for _, attempt in pairs if attempt.lost))
        found.append(some | {"with_parents_gpu_hours": None, "with_parents_cpu_hours": None})
    whole = _record(kind="total", row="", column="", stage="", entries=every)
    return [*found, whole | _hours("with_parents_", cost.total(each.cost for each in every))]


def _record(*, kind: str, row: str, column: str, stage: str, entries: Sequence[Entry]) -> dict[str, Any]:
    attempts = [attempt for entry in entries for attempt in entry.attempts()]
    found: dict[str, Any] = {"kind": kind, "row": row, "column": column, "stage": stage, "cause": ""}
    found |= {"runs": len(entries), "attempts": len(attempts)}
    found |= _hours("", cost.total(entry.cost for entry in entries))
    return found | _hours("lost_", cost.total(attempt.cost for attempt in attempts if attempt.lost))


def _hours(prefix: str, used: Cost) -> dict[str, float]:
    return {f"{prefix}gpu_hours": used.gpu_hours, f"{prefix}cpu_hours": used.cpu_hours}


def spelt(record: Mapping[str, Any], prefix: str = "") -> str:
    """``1.2 GPU-h`` of a record."""
    return str(Cost(record[f"{prefix}gpu_hours"] or 0.0, record[f"{prefix}cpu_hours"] or 0.0))


def grid(table: Table) -> Grid:
    head = ["", "", "runs", "attempts", "hours", "with what they are built upon", "lost"]
    lines: dict[str, list[list[Text]]] = {"cell": [], "cause": [], "total": []}
    for r in records(table):
        names = {"cell": (r["row"], r["column"]), "cause": (r["stage"], r["cause"]), "total": ("all", "")}[r["kind"]]
        more = "" if r["kind"] == "cause" else spelt(r, "with_parents_")
        lost = spelt(r, "lost_") if r["lost_gpu_hours"] or r["lost_cpu_hours"] else ""
        texts = [*names, str(r["runs"]), str(r["attempts"]), spelt(r), more, lost]
        lines[r["kind"]].append([Text(each) for each in texts])
    rows = [[Text("cells")], *lines["cell"], [Text("how attempts ended")], *lines["cause"], [Text("total")]]
    notes = [
        "Hours of GPUs, of processes where a run had no GPU. Cells that share runs count them each; the total, once."
    ]
    notes.append("Lost: attempts that ended badly; what a checkpoint saved of them is not taken off.")
    return Grid(f"{table.name}-receipts", f"{table.title}: what it took", head, [*rows, *lines["total"]], notes, [])


# -- how runs differ --------------------------------------------------------------------------------------------------


def differences(output_dir: Path, cell: Cell) -> list[str]:
    """``key: one | other`` for each setting that is not the same in all runs of a cell, the seed left out."""
    said: dict[str, dict[str, str]] = {}
    runs = [run for run in cell.runs if run.value is not None]
    for run in runs:
        for key, value in _config(rundir.run_dir(output_dir, run.worker, run.identity)):
            said.setdefault(key, {})[run.identity] = str(value)
    found = []
    for key, by_run in sorted(said.items()):
        values = {by_run.get(run.identity, "(not set)") for run in runs}
        if key != "seed" and len(values) > 1:
            found.append(f"{key}: {' | '.join(sorted(values))}")
    return found


def _info(folder: Path) -> dict[str, Any]:
    try:
        return rundir.read_json(folder / rundir.RUN)
    except rundir.RunDirError:
        return {}


def _config(folder: Path) -> Iterator[tuple[str, Any]]:
    try:
        said = yaml.load((folder / rundir.CONFIG).read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (OSError, yaml.YAMLError):
        return
    if isinstance(said, Mapping):
        yield from _leaves(said, "")


def _leaves(values: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        elif f"{prefix}{key}" not in HERE and not f"{prefix}{key}".startswith("env."):
            yield f"{prefix}{key}", value
