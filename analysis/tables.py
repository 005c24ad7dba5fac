"""``python -m analysis.tables --manifest STUDY.json``: the table of a study, complete or not."""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from analysis import receipts, stats
from analysis.cells import Cell, CellRun, Column, Table, load
from analysis.render import RENDERERS, Grid, Text
from contract import cost, rundir
from contract.settings.checks import SettingsError
from contract.study import Layout

__all__ = ["INTERVALS", "Cell", "CellRun", "Column", "Table", "behind", "grid", "load", "main", "records", "text"]

SUFFIXES = {".md": "md", ".tex": "latex", ".csv": "csv", ".html": "html", ".parquet": "parquet"}
INTERVALS = {
    "ci95": "mean ± 95 % t interval of the mean",
    "std": "mean ± standard deviation",
    "iqm": "interquartile mean, 95 % bootstrap interval",
}


# -- as text ----------------------------------------------------------------------------------------------------------


def text(cell: Cell, layout: Layout) -> str:
    """``93.1 ± 0.4``, with what is missing."""
    found, total = cell.summary, len(cell.runs)
    open_ones = f"{found.n}/{total}" + (f", {cell.failed} failed" if cell.failed and cell.failed < total else "")
    if not found.n:
        return f"{'failed' if cell.failed == total else 'pending'} ({open_ones})"
    marks = ("†" if cell.mixed else "") + ("‡" if cell.imported else "")
    shown = _interval(*cell.shown(layout), layout)
    return shown + marks + (f" ({open_ones})" if found.n < total else "")


def _interval(middle: float, low: float, high: float, layout: Layout) -> str:
    shown = _number(middle, layout)
    if not math.isfinite(low):
        return shown
    if layout.interval == "iqm":
        return f"{shown} [{_number(low, layout)}, {_number(high, layout)}]"
    return f"{shown} ± {_number(high - middle, layout)}"


def _number(value: float, layout: Layout) -> str:
    if not math.isfinite(value):
        return "NaN"
    return f"{value * (100 if layout.percent else 1):.{layout.digits}f}"


def grid(table: Table, source: bool = False) -> Grid:
    """``source``: with comments that say which runs, where and for how long; they are read for it."""
    bold = {column.name: table.winners(column) for column in table.columns}
    sources = list(dict.fromkeys(each.source for each in table.reported))
    rows: list[list[Text]] = []
    for group, names in table.groups():
        rows += [[Text(group)]] if group else []
        for row in names:
            cells = [table.cells[row, column.name] for column in table.columns]
            line = [Text(row)]
            line += [Text(text(c, table.layout_of(c.column)), bold=row in bold[c.column]) for c in cells]
            rows.append([*line, *([Text(_overall(table, row))] if table.layout.overall else [])])
            rows += _reported(table, row, sources)
    notes = [*_notes(table), *(f"[{i}] {source}" for i, source in enumerate(sources, 1))]
    ledger = receipts.Ledger(table.output_dir)
    comments = [f"study {table.name}: {table.title}; the runs behind each cell as seed=identity"]
    for cell in table.cells.values():
        comments.append(f"{cell.row} | {cell.column}: " + " ".join(f"{r.seed}={r.identity}" for r in cell.runs))
        if source:
            commits = ", ".join(sorted({run.commit[:12] for run in cell.runs if run.commit})) or "none"
            spent = ledger.with_parents(cell)
            hosts = ", ".join(sorted(spent.hosts)) or "no host"
            comments.append(f"commit {commits}; {spent} with pretraining; on {hosts}")
            comments += [f"seed {run.seed} from {run.imported}" for run in cell.runs if run.imported]
    head = ["", *(c.name for c in table.columns), *(["IQM"] if table.layout.overall else [])]
    return Grid(table.name, table.title, head, rows, notes, comments)


def _overall(table: Table, row: str) -> str:
    found = table.overall(row)
    if not found.n:
        return "pending"
    missing = any(len(c.values) < len(c.runs) for c in (table.cells[row, n] for n in table.layout.overall))
    shown = _interval(found.mean, found.low, found.high, build_iqm(table.layout))
    return shown + (" (incomplete)" if missing else "")


def build_iqm(layout: Layout) -> Layout:
    return Layout(digits=layout.digits, percent=layout.percent, interval="iqm")


def _reported(table: Table, row: str, sources: Sequence[str]) -> list[list[Text]]:
    """What was printed elsewhere for this row, and how far ours is from it."""
    printed = {each.column: each for each in table.reported if each.row == row}
    if not printed:
        return []
    line = [Text(f"{row}, reported")]
    for column in table.columns:
        each = printed.get(column.name)
        line.append(Text(_beside(table, row, column, each.value, sources.index(each.source)) if each else ""))
    return [[*line, *([Text("")] if table.layout.overall else [])]]


def _beside(table: Table, row: str, column: Column, value: float, number: int) -> str:
    off = difference(table, row, column, value)
    layout = table.layout_of(column.name)
    return f"{value:g} [{number + 1}]" + ("" if off is None else f" (Δ {off:+.{layout.digits}f})".replace("-", "−"))


def difference(table: Table, row: str, column: Column, value: float) -> float | None:
    """Ours less a reported figure, in the table's units; None while there is none of ours."""
    layout = table.layout_of(column.name)
    middle = table.cells[row, column.name].shown(layout)[0]
    return middle * (100 if layout.percent else 1) - value if math.isfinite(middle) else None


def _notes(table: Table) -> list[str]:
    """The protocol, and what the marks mean."""
    cells, layout = table.cells.values(), table.layout
    percent = ", in per cent" if layout.percent else ""
    seeds = sorted({run.seed for cell in cells for run in cell.runs})
    if len(seeds) == 1:
        notes = [f"One seed ({seeds[0]}): no interval{percent}."]
    else:
        shown = INTERVALS[layout.interval]
        notes = [f"{shown[0].upper()}{shown[1:]} over {len(seeds)} seeds ({', '.join(map(str, seeds))}){percent}."]
    if len({len(cell.runs) for cell in cells}) > 1:
        notes.append("Rows differ in their number of seeds: more where a comparison was open.")
    names = [f"{c.name}: {c.metric}{'' if c.better == 'higher' else ', lower is better'}" for c in table.columns]
    notes.append("; ".join(names) + ".")
    if any(table.winners(column) for column in table.columns):
        rest = "every other row of its group" if layout.bold == "group" else "every other row"
        notes.append(
            f"Bold: better than {rest} with results, p < {stats.ALPHA:g} "
            "(t-test paired by seed, else Welch's; Holm's correction)."
        )
    if layout.overall:
        notes.append(f"IQM: interquartile mean over {', '.join(layout.overall)}, 95 % stratified bootstrap interval.")
    if any(len(cell.values) < len(cell.runs) for cell in cells):
        notes.append("(k/n): k of n seeds are in.")
    if table.reported:
        notes.append("Reported: as printed in the source given; Δ: ours less that.")
    if any(cell.mixed for cell in cells):
        notes.append("†: runs of different code.")
    if any(cell.imported for cell in cells):
        notes.append("‡: figures taken over from elsewhere, not made by runs of ours; --cell says from where.")
    if bad := [f"{c.row} | {c.column}" for c in cells if c.values and not math.isfinite(c.summary.mean)]:
        notes.append(f"NaN: the result of a run is not a finite number ({'; '.join(bad[:3])}).")
    return notes


# -- as data ----------------------------------------------------------------------------------------------------------


def records(table: Table) -> list[dict[str, Any]]:
    """One flat record a cell, in the metrics' own units; for CSV, Parquet and ``--json``."""
    printed = {(each.row, each.column): each for each in table.reported}
    compared = {column.name: table.comparisons(column) for column in table.columns}
    columns = {column.name: column for column in table.columns}
    winners = {column.name: table.winners(column) for column in table.columns}
    groups = {row: group for group, rows in table.groups() for row in rows}
    found = []
    for (row, name), cell in table.cells.items():
        column, one, said = columns[name], cell.summary, printed.get((row, name))
        record: dict[str, Any] = {"row": row, "column": name, "stage": column.stage, "metric": column.metric}
        record |= {"better": column.better, "n": one.n, "of": len(cell.runs), "failed": cell.failed}
        record |= {"mean": one.mean, "std": one.std, "ci95": one.ci95}
        record |= {"best": row in winners[name], "mixed_code": cell.mixed}
        record |= {"reported": said.value if said else None, "source": said.source if said else None}
        record["runs"] = " ".join(run.identity for run in cell.runs)
        middle = cell.iqm if table.layout.interval == "iqm" else None
        record |= {"iqm": middle.mean, "iqm_low": middle.low, "iqm_high": middle.high} if middle else {}
        record["difference"] = difference(table, row, column, said.value) if said else None
        record["p_value"] = next((c.p_values[row] for c in compared[name] if row in c.p_values), None)
        record |= {"group": groups[row], "imported": cell.imported}
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


def to_parquet(rows: Sequence[Mapping[str, Any]]) -> bytes:
    import pandas as pd

    file = io.BytesIO()
    pd.DataFrame.from_records(list(rows)).to_parquet(file)
    return file.getvalue()


def behind(table: Table, cell: Cell, ledger: receipts.Ledger | None = None) -> list[dict[str, Any]]:
    """The runs behind a cell, one record each, with where they ran and for how long."""
    ledger = ledger or receipts.Ledger(table.output_dir)
    found = []
    for run in cell.runs:
        spent = ledger.entry(run.identity).cost
        record: dict[str, Any] = {name: getattr(run, name) for name in CellRun.__match_args__}
        record |= {"hosts": " ".join(spent.hosts), "gpu_hours": spent.gpu_hours, "cpu_hours": spent.cpu_hours}
        found.append(record)
    return found


def cell_grid(table: Table, cell: Cell) -> Grid:
    rows = []
    for r in behind(table, cell):
        value = "" if r["value"] is None else f"{r['value']:.6g}"
        hours = str(cost.Cost(r["gpu_hours"], r["cpu_hours"]))
        rows.append(
            [str(r["seed"]), r["identity"], r["state"], value, r["code"][:6], r["commit"][:7], r["hosts"], hours]
        )
    spent = receipts.with_parents(table.output_dir, cell)
    notes = [f"{cell.row} | {cell.column}: {text(cell, table.layout_of(cell.column))}"]
    notes += [f"in {table.output_dir / cell.runs[0].worker}", f"{spent} with the runs that they were built upon"]
    differ = receipts.differences(table.output_dir, cell)
    notes += ["the settings are the same but for the seed"] if not differ else [f"differ in {each}" for each in differ]
    notes += [f"‡ seed {run.seed}: from {run.imported}" for run in cell.runs if run.imported]
    notes += ["†: runs of different code."] if cell.mixed else []
    head = ["seed", "identity", "state", "value", "code", "commit", "hosts", "hours"]
    return Grid(table.name, table.title, head, [[Text(each) for each in row] for row in rows], notes, [])


# -- the command ------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m analysis.tables", description="The table of a study.")
    parser.add_argument("--manifest", type=Path, required=True, help="OUTPUT_DIR/studies/NAME.json")
    kinds = [*RENDERERS, "csv", "parquet"]
    parser.add_argument("--format", choices=kinds, help="default: by OUTPUT's suffix, else term")
    parser.add_argument("--output", type=Path, metavar="FILE", help="instead of standard output")
    parser.add_argument("--cell", nargs=2, metavar=("ROW", "COLUMN"), help="the runs behind one cell")
    parser.add_argument("--receipts", action="store_true", help="what it took: hours per cell and per cause of failure")
    parser.add_argument("--json", action="store_true", help="one JSON object a cell, or a run with --cell")
    again = "draw it again as cells fill, until all are full or failed"
    parser.add_argument("--watch", type=float, nargs="?", const=2.0, metavar="SECONDS", help=again)
    parser.add_argument("--open", metavar="RULE", help=argparse.SUPPRESS)  # for fill --until
    args = parser.parse_args(argv)
    kind = args.format or (SUFFIXES.get(args.output.suffix, "term") if args.output else "term")
    try:
        if kind == "parquet" and not args.output:
            raise rundir.RunDirError("--format parquet: add --output FILE; a terminal cannot show it")
        if args.open:
            from analysis import undecided

            print(json.dumps(undecided.of(load(args.manifest), args.open)))
        elif args.watch is not None:
            return _watch(args, kind)
        else:
            _put(_shown(load(args.manifest), args, kind), args.output)
    except (rundir.RunDirError, SettingsError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _shown(table: Table, args: argparse.Namespace, kind: str) -> str | bytes:
    if args.cell and tuple(args.cell) not in table.cells:
        valid = f"rows: {', '.join(table.rows)}; columns: {', '.join(c.name for c in table.columns)}"
        raise rundir.RunDirError(f"--cell {args.cell[0]!r} {args.cell[1]!r}: no such cell; {valid}")
    cell = table.cells[tuple(args.cell)] if args.cell else None
    if args.json or kind in ("csv", "parquet"):
        rows = behind(table, cell) if cell else receipts.records(table) if args.receipts else records(table)
        return to_json(rows) if args.json else to_csv(rows) if kind == "csv" else to_parquet(rows)
    if args.receipts and not cell:
        return RENDERERS[kind](receipts.grid(table))
    return RENDERERS[kind](cell_grid(table, cell) if cell else grid(table, source=kind == "latex"))


def _put(shown: str | bytes, output: Path | None) -> None:
    if output:
        rundir.write_atomic(output, shown)
    else:
        print(shown, end="", flush=True)


def _watch(args: argparse.Namespace, kind: str) -> int:
    """On a terminal in place, else one table after another; into a file, the file is replaced."""
    before: object = None
    told: set[str] = set()

    def once(line: str) -> None:
        if line not in told:
            told.add(line)
            print(f"warning: {line}", file=sys.stderr)

    while True:
        table = load(args.manifest, once)
        states = [run.state for cell in table.cells.values() for run in cell.runs]
        now = _shown(table, args, kind)
        if now != before:
            if not args.output and before is not None:
                print("\x1b[H\x1b[2J" if sys.stdout.isatty() else "", flush=True)
            _put(now, args.output)
            before = now
        if all(state in ("finished", "failed", "cancelled") for state in states):
            return 0
        time.sleep(args.watch)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
