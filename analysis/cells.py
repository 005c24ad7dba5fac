"""The table of a study as data: cells of runs, filled from the run directories."""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis import frame, stats
from analysis.runs import Tell, to_stderr
from contract import rundir
from contract.settings import build
from contract.settings.checks import SettingsError
from contract.study import Layout, Reported

LEFT = frozenset({"failed", "cancelled"})  # what will not end by itself


@dataclass(frozen=True)
class CellRun:
    seed: int
    identity: str
    worker: str
    state: str
    value: float | None
    code: str
    commit: str
    imported: str = ""  # the source of a figure that no run of ours made


@dataclass(frozen=True)
class Cell:
    row: str
    column: str
    runs: tuple[CellRun, ...]

    @property
    def values(self) -> dict[int, float]:
        """By seed."""
        return {run.seed: run.value for run in self.runs if run.value is not None}

    @property
    def summary(self) -> stats.Summary:
        return stats.summary(list(self.values.values()))

    @property
    def iqm(self) -> stats.Iqm:
        return stats.iqm([list(self.values.values())])

    @property
    def failed(self) -> int:
        return sum(run.state in LEFT for run in self.runs)

    @property
    def mixed(self) -> bool:
        """Made by different code."""
        return len({run.code for run in self.runs if run.value is not None and not run.imported}) > 1

    @property
    def imported(self) -> bool:
        return any(run.imported for run in self.runs)

    def shown(self, layout: Layout) -> tuple[float, float, float]:
        """What the cell says: its middle, and the two ends of its interval (NaN where there is none)."""
        if layout.interval == "iqm":
            middle = self.iqm
            return middle.mean, middle.low, middle.high
        found = self.summary
        half = found.ci95 if layout.interval == "ci95" else found.std
        return found.mean, found.mean - half, found.mean + half


@dataclass(frozen=True)
class Column:
    name: str
    stage: str
    metric: str
    better: str = "higher"
    digits: int | None = None
    percent: bool | None = None


@dataclass(frozen=True)
class Table:
    name: str
    title: str
    output_dir: Path
    seeds: tuple[int, ...]
    rows: tuple[str, ...]
    columns: tuple[Column, ...]
    layout: Layout
    reported: tuple[Reported, ...]
    cells: Mapping[tuple[str, str], Cell]

    def groups(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """The rows as they are printed: those of no group first, under an empty heading."""
        grouped = {row for rows in self.layout.groups.values() for row in rows}
        if first := tuple(row for row in self.rows if row not in grouped):
            yield "", first
        for name, rows in self.layout.groups.items():
            if rows:
                yield name, tuple(rows)

    def layout_of(self, name: str) -> Layout:
        """The layout, with what a column has otherwise."""
        column = next(c for c in self.columns if c.name == name)
        changes = {k: v for k in ("digits", "percent") if (v := getattr(column, k)) is not None}
        return dataclasses.replace(self.layout, **changes)

    def comparisons(self, column: Column) -> list[stats.Comparison]:
        """The leading row against the others; one comparison for each group where bold is given within groups."""
        return self._compared[column.name]

    @functools.cached_property
    def _compared(self) -> dict[str, list[stats.Comparison]]:
        return {column.name: self._compare(column) for column in self.columns}

    def _compare(self, column: Column) -> list[stats.Comparison]:
        sets = [rows for _, rows in self.groups()] if self.layout.bold == "group" else [self.rows]
        made = [
            stats.compare({row: self.cells[row, column.name].values for row in rows}, column.better == "higher")
            for rows in sets
        ]
        return [each for each in made if each]

    def winners(self, column: Column) -> set[str]:
        """The rows that are bold."""
        if self.layout.bold == "none":
            return set()
        return {each.top for each in self.comparisons(column) if each.decided}

    def best(self, column: Column) -> str | None:
        """The one row of the whole table that a test says is best."""
        values = {row: self.cells[row, column.name].values for row in self.rows}
        return stats.best(values, higher=column.better == "higher")

    def overall(self, row: str) -> stats.Iqm:
        """The interquartile mean over the columns of ``layout.overall``, resampled within each."""
        return stats.iqm([list(self.cells[row, name].values.values()) for name in self.layout.overall])


def load(manifest: Path, tell: Tell = to_stderr) -> Table:
    """The table that a manifest describes, filled from the run directories. Raises RunDirError, naming the file."""
    said = rundir.read_json(manifest)
    if not isinstance(said.get("schema"), int) or said["schema"] > rundir.SCHEMA:
        raise rundir.RunDirError(f"{manifest}: schema {said.get('schema')!r}; this program reads up to {rundir.SCHEMA}")
    try:
        output_dir = manifest.parent.parent if manifest.parent.name == "studies" else Path(said["output_dir"])
        columns = tuple(Column(**{k: v for k, v in c.items() if k in Column.__match_args__}) for c in said["columns"])
        cells = {(c["row"], c["column"]): c["runs"] for c in said["cells"]}
        runs = {run["identity"]: run for each in cells.values() for run in each}
        known, values = _finals(output_dir, runs, tell)
        for column in columns:
            wanted = [run["identity"] for row in said["rows"] for run in cells[row, column.name]]
            _check_metric(column, wanted, known, values, tell)
        return Table(
            name=said["name"],
            title=said["title"],
            output_dir=output_dir,
            seeds=tuple(said["seeds"]),
            rows=tuple(said["rows"]),
            columns=columns,
            layout=build(Layout, said["layout"]),
            reported=tuple(build(Reported, each) for each in said["reported"]),
            cells={
                (row, column.name): Cell(
                    row, column.name, tuple(_run(r, column.metric, known, values) for r in cells[row, column.name])
                )
                for row in said["rows"]
                for column in columns
            },
        )
    except (KeyError, TypeError, AttributeError, SettingsError) as error:
        raise rundir.RunDirError(f"{manifest}: not a study's manifest ({type(error).__name__}: {error})") from None


Known = Mapping[str, Mapping[str, Any]]
Values = Mapping[tuple[str, str], float]


def _finals(output_dir: Path, runs: Mapping[str, Mapping[str, Any]], tell: Tell) -> tuple[Known, Values]:
    """What the run directories say: each run by identity, and the final values. One that says that it is another run
    than the study has under this name was changed by hand, and is left out."""
    found = frame.finals(output_dir)
    found = found[found["identity"].isin(list(runs))]
    columns = ["identity", "key", "state", "code", "commit", "worker", "seed", "imported"]
    known = {run["identity"]: run for run in found[columns].drop_duplicates("identity").to_dict("records")}
    for identity, run in list(known.items()):
        for key in ("worker", "seed"):
            if run[key] != runs[identity][key]:
                path = output_dir / str(run["key"]) / rundir.RUN
                tell(f"{path}: {key} {run[key]}, where the study has {runs[identity][key]}: changed by hand; left out")
                known.pop(identity, None)
    values = {
        (i, m): v for i, m, v in zip(found["identity"], found["metric"], found["value"], strict=True) if i in known
    }
    return known, values


def _check_metric(column: Column, wanted: Sequence[str], known: Known, values: Values, tell: Tell) -> None:
    """One line for a column whose metric finished runs do not have."""
    done = [i for i in wanted if known.get(i, {}).get("state") == "finished"]
    without = [i for i in done if (i, column.metric) not in values]
    if not without:
        return
    there = sorted({m for i, m in values if i in without and isinstance(m, str)})
    close = difflib.get_close_matches(column.metric, there, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    one = len(without) == 1
    who, has, it = (
        (f"run {without[0]} is", "has", "it has") if one else (f"{len(without)} runs are", "have", "they have")
    )
    tell(
        f"column {column.name}: {who} finished, but {has} no metric {column.metric}; "
        f"{it}: {', '.join(there) or 'none'}{hint}"
    )


def _run(said: Mapping[str, Any], metric: str, known: Known, values: Values) -> CellRun:
    identity = said["identity"]
    now = known.get(identity, {})
    value = values.get((identity, metric))
    state = now.get("state", said.get("state", "new"))
    if state in ("finished", "reuse", "stale") and value is None:
        state = "failed" if now else "new"  # it will not say it any more; its directory is gone
    return CellRun(
        seed=said["seed"],
        identity=identity,
        worker=said["worker"],
        state=state,
        value=value,
        code=now.get("code", ""),
        commit=now.get("commit", ""),
        imported=now.get("imported", ""),
    )
