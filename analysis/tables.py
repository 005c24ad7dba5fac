"""``python -m analysis.tables --manifest STUDY.json``: the table of a study, complete or not."""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis import frame, stats
from analysis.render import RENDERERS, Grid, Text
from analysis.runs import to_stderr
from contract import rundir
from contract.settings import build
from contract.settings.checks import SettingsError
from contract.study import Layout, Reported

SUFFIXES = {".md": "md", ".tex": "latex", ".csv": "csv", ".html": "html"}
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
    def failed(self) -> int:
        return sum(run.state in LEFT for run in self.runs)

    @property
    def mixed(self) -> bool:
        """Made by different code."""
        return len({run.code for run in self.runs if run.value is not None}) > 1


@dataclass(frozen=True)
class Column:
    name: str
    stage: str
    metric: str
    better: str = "higher"


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

    def best(self, column: Column) -> str | None:
        values = {row: self.cells[row, column.name].values for row in self.rows}
        return stats.best(values, higher=column.better == "higher")


def load(manifest: Path) -> Table:
    """The table that a manifest describes, filled from the run directories. Raises RunDirError, naming the file."""
    said = rundir.read_json(manifest)
    if not isinstance(said.get("schema"), int) or said["schema"] > rundir.SCHEMA:
        raise rundir.RunDirError(f"{manifest}: schema {said.get('schema')!r}; this program reads up to {rundir.SCHEMA}")
    try:
        output_dir = manifest.parent.parent if manifest.parent.name == "studies" else Path(said["output_dir"])
        columns = tuple(Column(**{k: v for k, v in c.items() if k in Column.__match_args__}) for c in said["columns"])
        metrics = {column.name: column.metric for column in columns}
        cells = {(c["row"], c["column"]): c["runs"] for c in said["cells"]}
        wanted = {(run["identity"], metrics[column]) for (_, column), runs in cells.items() for run in runs}
        known, values = _finals(output_dir, wanted)
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


def _finals(
    output_dir: Path, wanted: set[tuple[str, str]]
) -> tuple[dict[str, dict[str, Any]], dict[tuple[str, str], float]]:
    """What the run directories say: each run by identity, and the final values."""
    found = frame.finals(output_dir)
    found = found[found["identity"].isin({identity for identity, _ in wanted})]
    columns = ["identity", "state", "code", "commit"]
    known = {run["identity"]: run for run in found[columns].drop_duplicates("identity").to_dict("records")}
    values = {(i, m): v for i, m, v in zip(found["identity"], found["metric"], found["value"], strict=True)}
    for identity, metric in sorted(wanted):
        if known.get(identity, {}).get("state") == "finished" and (identity, metric) not in values:
            there = ", ".join(sorted(m for i, m in values if i == identity)) or "none"
            to_stderr(f"run {identity} is finished, but has no metric {metric}; it has: {there}")
    return known, values


def _run(
    said: Mapping[str, Any],
    metric: str,
    known: Mapping[str, Mapping[str, Any]],
    values: Mapping[tuple[str, str], float],
) -> CellRun:
    identity = said["identity"]
    now = known.get(identity, {})
    value = values.get((identity, metric))
    state = now.get("state", said.get("state", "new"))
    if state == "finished" and value is None:
        state = "failed" if now else "new"  # it will not say it any more; its directory is gone
    return CellRun(
        seed=said["seed"],
        identity=identity,
        worker=said["worker"],
        state=state,
        value=value,
        code=now.get("code", ""),
        commit=now.get("commit", ""),
    )


# -- as text ----------------------------------------------------------------------------------------------------------


def text(cell: Cell, layout: Layout) -> str:
    """``93.1 ± 0.4``, with what is missing."""
    found, total = cell.summary, len(cell.runs)
    open_ones = f"{found.n}/{total}" + (f", {cell.failed} failed" if cell.failed and cell.failed < total else "")
    if not found.n:
        return f"{'failed' if cell.failed == total else 'pending'} ({open_ones})"
    shown = _number(found.mean, layout)
    if found.n > 1 and math.isfinite(found.mean):
        shown += f" ± {_number(found.ci95 if layout.interval == 'ci95' else found.std, layout)}"
    return shown + ("†" if cell.mixed else "") + (f" ({open_ones})" if found.n < total else "")


def _number(value: float, layout: Layout) -> str:
    if not math.isfinite(value):
        return "NaN"
    return f"{value * (100 if layout.percent else 1):.{layout.digits}f}"


def grid(table: Table) -> Grid:
    best = {column.name: table.best(column) for column in table.columns}
    sources = list(dict.fromkeys(each.source for each in table.reported))
    rows = []
    for row in table.rows:
        cells = [table.cells[row, column.name] for column in table.columns]
        rows.append([Text(row), *(Text(text(c, table.layout), bold=best[c.column] == row) for c in cells)])
        printed = {e.column: f"{e.value:g} [{sources.index(e.source) + 1}]" for e in table.reported if e.row == row}
        if printed:
            rows.append([Text(f"{row}, reported"), *(Text(printed.get(c.name, "")) for c in table.columns)])
    notes = [*_notes(table), *(f"[{i}] {source}" for i, source in enumerate(sources, 1))]
    comments = [f"study {table.name}: {table.title}; the runs behind each cell as seed=identity"]
    comments += [
        f"{cell.row} | {cell.column}: " + " ".join(f"{r.seed}={r.identity}" for r in cell.runs)
        for cell in table.cells.values()
    ]
    return Grid(table.name, table.title, ["", *(c.name for c in table.columns)], rows, notes, comments)


def _notes(table: Table) -> list[str]:
    """The protocol, and what the marks mean."""
    cells = table.cells.values()
    interval = "95 % t interval of the mean" if table.layout.interval == "ci95" else "standard deviation"
    seeds = f"{len(table.seeds)} seeds ({', '.join(map(str, table.seeds))})"
    if len(table.seeds) == 1:
        notes = [f"One seed ({table.seeds[0]}): no interval{', in per cent' if table.layout.percent else ''}."]
    else:
        notes = [f"Mean ± {interval} over {seeds}{', in per cent' if table.layout.percent else ''}."]
    names = [f"{c.name}: {c.metric}{'' if c.better == 'higher' else ', lower is better'}" for c in table.columns]
    notes.append("; ".join(names) + ".")
    if any(table.best(column) for column in table.columns):
        notes.append("Bold: better than every other row with results, p < 0.05 (t-test paired by seed, else Welch's).")
    if any(len(cell.values) < len(cell.runs) for cell in cells):
        notes.append("(k/n): k of n seeds are in.")
    if any(cell.mixed for cell in cells):
        notes.append("†: runs of different code.")
    if any(cell.values and not math.isfinite(cell.summary.mean) for cell in cells):
        notes.append("NaN: the result of a run is not a finite number.")
    return notes


def records(table: Table) -> list[dict[str, Any]]:
    """One flat record a cell, in the metrics' own units; for ``--format csv`` and ``--json``."""
    printed = {(each.row, each.column): each for each in table.reported}
    found = []
    for (row, name), cell in table.cells.items():
        column = next(c for c in table.columns if c.name == name)
        one, said = cell.summary, printed.get((row, name))
        record: dict[str, Any] = {"row": row, "column": name, "stage": column.stage, "metric": column.metric}
        record |= {"better": column.better, "n": one.n, "of": len(cell.runs), "failed": cell.failed}
        record |= {"mean": one.mean, "std": one.std, "ci95": one.ci95}
        record |= {"best": table.best(column) == row, "mixed_code": cell.mixed}
        record |= {"reported": said.value if said else None, "source": said.source if said else None}
        record["runs"] = " ".join(run.identity for run in cell.runs)
        found.append(
            {k: None if isinstance(v, float) and math.isnan(v) and not one.n else v for k, v in record.items()}
        )
    return found


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def to_json(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line each; NaN as text, as in the journal."""
    plain = [{k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in r.items()} for r in rows]
    return "".join(json.dumps(row, allow_nan=False) + "\n" for row in plain)


def behind(cell: Cell) -> list[dict[str, Any]]:
    """The runs behind a cell, one record each."""
    return [{name: getattr(run, name) for name in CellRun.__match_args__} for run in cell.runs]


def cell_grid(table: Table, cell: Cell) -> Grid:
    rows = [
        [str(r.seed), r.identity, r.state, "" if r.value is None else f"{r.value:.6g}", r.code[:8], r.commit[:8]]
        for r in cell.runs
    ]
    notes = [f"{cell.row} | {cell.column}: {text(cell, table.layout)}", f"in {table.output_dir / cell.runs[0].worker}"]
    notes += ["†: runs of different code."] if cell.mixed else []
    head = ["seed", "identity", "state", "value", "code", "commit"]
    return Grid(table.name, table.title, head, [[Text(each) for each in row] for row in rows], notes, [])


# -- the command ------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m analysis.tables", description="The table of a study.")
    parser.add_argument("--manifest", type=Path, required=True, help="OUTPUT_DIR/studies/NAME.json")
    parser.add_argument("--format", choices=[*RENDERERS, "csv"], help="default: by OUTPUT's suffix, else term")
    parser.add_argument("--output", type=Path, metavar="FILE", help="instead of standard output")
    parser.add_argument("--cell", nargs=2, metavar=("ROW", "COLUMN"), help="the runs behind one cell")
    parser.add_argument("--json", action="store_true", help="one JSON object a cell, or a run with --cell")
    args = parser.parse_args(argv)
    try:
        table = load(args.manifest)
        if args.cell and tuple(args.cell) not in table.cells:
            valid = f"rows: {', '.join(table.rows)}; columns: {', '.join(c.name for c in table.columns)}"
            raise rundir.RunDirError(f"--cell {args.cell[0]!r} {args.cell[1]!r}: no such cell; {valid}")
        cell = table.cells[tuple(args.cell)] if args.cell else None
        kind = args.format or (SUFFIXES.get(args.output.suffix, "term") if args.output else "term")
        rows = behind(cell) if cell else records(table)
        if args.json:
            shown = to_json(rows)
        elif kind == "csv":
            shown = to_csv(rows)
        else:
            shown = RENDERERS[kind](cell_grid(table, cell) if cell else grid(table))
        if args.output:
            rundir.write_atomic(args.output, shown)
        else:
            print(shown, end="")
    except (rundir.RunDirError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
