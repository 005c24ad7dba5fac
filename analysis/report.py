"""``python -m analysis.report --manifest STUDY.json``: a study as one HTML page that needs nothing beside it.

Tables whose cells lead to their runs, learning curves, attention, the runs' own pictures, failures, what it took, and
where it comes from. The page asks no network for anything, can be read on a phone, printed, and without JavaScript.
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from analysis import drawings, frame, receipts, studies, tables
from analysis.cells import Cell, Table
from analysis.receipts import Attempt, Entry, Ledger
from analysis.render import Grid
from contract import rundir
from contract.cost import Cost
from contract.settings.checks import SettingsError
from contract.study import Layout

TEMPLATE = "report.html.jinja"
LISTED = 5  # runs that are named for a cause of failure
STATES = ("finished", "running", "queued", "waiting", "stopped", "failed", "cancelled", "new")
AROUND = ("python", "torch", "torchvision", "timm", "numpy", "gpus", "driver", "cpu", "kernel", "container", "threads")


def build(table: Table, pictures: bool = True) -> str:
    """The page. Raises RunDirError where a run directory is damaged."""
    ledger = Ledger(table.output_dir)
    entries = ledger.of_table(table)
    states = _states(table, entries)
    spent = receipts.records(table, ledger)
    grid = tables.grid(table)
    context = {
        "table": table,
        "made": time.strftime("%Y-%m-%d %H:%M %Z"),
        "facts": _facts(table, entries, states, spent[-1]),
        "grid": _grid(table, grid),
        "notes": grid.notes,
        "cells": [_behind(table, cell, ledger) for cell in table.cells.values()],
        "figures": drawings.figures_as_svg(table) if pictures else [],
        "sheet": drawings.thumbnails(table) if pictures else [],
        "stages": _stages(entries, states),
        "states": [state for state in STATES if state in states.values()],
        "causes": _causes(entries),
        "receipts": [_receipt(each) for each in spent],
        "environments": _environments(entries),
        "code": _code(entries),
        "commands": _commands(table.output_dir, {entry.identity for entry in entries}),
        "runs": _runs(table, entries, states),
    }
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    made = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return made.get_template(TEMPLATE).render(context)


# -- what there is ----------------------------------------------------------------------------------------------------


def _states(table: Table, entries: Sequence[Entry]) -> dict[str, str]:
    known = frame.runs(table.output_dir)
    states = dict(zip(known["identity"], known["state"], strict=True))
    return {each.identity: str(states.get(each.identity, "waiting" if each.folder else "new")) for each in entries}


def _facts(
    table: Table, entries: Sequence[Entry], states: Mapping[str, str], total: Mapping[str, Any]
) -> list[tuple[str, str]]:
    full = sum(len(cell.values) == len(cell.runs) for cell in table.cells.values())
    counts = Counter(states.values())
    commits = sorted({str(each.info["commit"])[:10] for each in entries if each.info.get("commit")})
    return [
        ("cells", f"{full} of {len(table.cells)} complete"),
        ("runs", ", ".join(f"{counts[state]:,} {state}" for state in STATES if counts[state])),
        ("seeds", ", ".join(map(str, table.seeds))),
        ("used", receipts.spelt(total)),
        ("commit", ", ".join(commits[:4]) + (" ..." if len(commits) > 4 else "") or "none"),
    ]


def _grid(table: Table, grid: Grid) -> list[dict[str, Any]]:
    """The table by groups: rows of cells, each with what it is sorted by and the place of its details."""
    shown = iter(grid.rows)
    numbers = {key: f"cell-{i}" for i, key in enumerate(table.cells)}
    groups = []
    for name, rows in table.groups():
        if name:
            next(shown)
        lines = []
        for row in rows:
            line = next(shown)
            cells = []
            for column, text in zip(table.columns, line[1:], strict=False):
                cell = table.cells[row, column.name]
                middle = cell.shown(table.layout_of(column.name))[0]
                sort = middle if middle == middle else ""
                cells.append({"text": text.text, "bold": text.bold, "sort": sort, "place": numbers[row, column.name]})
            more = [each.text for each in line[1 + len(table.columns) :]]
            printed = [each.text for each in next(shown)[1:]] if any(r.row == row for r in table.reported) else None
            lines.append({"name": row, "cells": cells, "more": more, "reported": printed})
        groups.append({"name": name, "rows": lines})
    return groups


def _behind(table: Table, cell: Cell, ledger: Ledger) -> dict[str, Any]:
    layout: Layout = table.layout_of(cell.column)
    column = next(each for each in table.columns if each.name == cell.column)
    entries = [ledger.entry(run.identity) for run in cell.runs]
    runs = []
    for run, entry in zip(cell.runs, entries, strict=True):
        value = "" if run.value is None else f"{run.value:.6g}"
        runs.append(_run(entry) | {"seed": run.seed, "state": run.state, "value": value, "imported": run.imported})
    notes = ["runs of different code" if cell.mixed else ""]
    if len({str(each.info.get("group")) for each in entries if each.folder}) > 1:
        notes += receipts.differences(table.output_dir, cell)
    notes.append(f"{ledger.with_parents(cell)} with the runs that they were built upon")
    return {
        "row": cell.row,
        "column": cell.column,
        "metric": column.metric,
        "text": tables.text(cell, layout),
        "runs": runs,
        "notes": [note for note in notes if note],
    }


def _run(entry: Entry) -> dict[str, Any]:
    code = entry.info.get("code") or {}
    return {
        "identity": entry.identity,
        "hosts": ", ".join(entry.cost.hosts),
        "hours": str(entry.cost),
        "hours_sort": f"{entry.cost.hours:.6g}",
        "commit": str(entry.info.get("commit") or "")[:10],
        "code": str(code.get("hash") or "")[:8] if isinstance(code, Mapping) else "",
        "environment": _environment(entry),
    }


def _runs(table: Table, entries: Sequence[Entry], states: Mapping[str, str]) -> list[dict[str, Any]]:
    """Every run once, the ones that others are built upon too."""
    parts = studies.parts(table.output_dir, lambda _: None)
    found = []
    for entry in sorted(entries, key=lambda e: (e.stage, str(e.info.get("group")), str(e.info.get("seed")))):
        part = parts.get(entry.identity)
        rows = ", ".join(part.rows.get(table.name, [])) if part else ""
        more = {"stage": entry.stage, "seed": entry.info.get("seed", ""), "state": states[entry.identity], "rows": rows}
        found.append(_run(entry) | more | {"attempts": len(entry.attempts())})
    return found


# -- how it went ------------------------------------------------------------------------------------------------------


def _stages(entries: Sequence[Entry], states: Mapping[str, str]) -> list[dict[str, Any]]:
    stages: dict[str, Counter[str]] = {}
    for entry in entries:
        stages.setdefault(entry.stage or "not started", Counter())[states[entry.identity]] += 1
    return [{"stage": stage, "counts": counts} for stage, counts in stages.items()]


def _causes(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Attempts that ended badly, by stage and cause, the most frequent first; also of runs that finished later."""
    found: dict[tuple[str, str], list[tuple[Entry, Attempt]]] = {}
    for entry in entries:
        for attempt in entry.attempts():
            if attempt.lost and attempt.cause != "running":
                found.setdefault((entry.stage, attempt.cause), []).append((entry, attempt))
    lines = []
    for (stage, cause), pairs in sorted(found.items(), key=lambda item: -len(item[1])):
        identities = list(dict.fromkeys(entry.identity for entry, _ in pairs))
        said = Counter(attempt.said for _, attempt in pairs if attempt.said).most_common(1)
        lines.append(
            {
                "stage": stage,
                "cause": cause,
                "said": said[0][0] if said else "",
                "runs": len(identities),
                "attempts": len(pairs),
                "hours": str(sum((attempt.cost for _, attempt in pairs), Cost())),
                "examples": identities[:LISTED],
            }
        )
    return lines


def _receipt(record: Mapping[str, Any]) -> dict[str, Any]:
    lost = record["lost_gpu_hours"] or record["lost_cpu_hours"]
    more = {f"{name}_sort": f"{record[f'{p}gpu_hours'] or 0:.6g}" for name, p in (("hours", ""), ("lost", "lost_"))}
    return {
        **record,
        **more,
        "hours": receipts.spelt(record),
        "with_parents": receipts.spelt(record, "with_parents_"),
        "lost": receipts.spelt(record, "lost_") if lost else "",
    }


# -- where it comes from ----------------------------------------------------------------------------------------------


def _environment(entry: Entry) -> str:
    """The hash of what the last attempt ran in."""
    return next((str(r["environment"]) for r in reversed(entry.records) if r.get("environment")), "")


def _environments(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    by_hash: dict[str, list[Entry]] = {}
    for entry in entries:
        if name := _environment(entry):
            by_hash.setdefault(name, []).append(entry)
    found = []
    for name, runs in sorted(by_hash.items(), key=lambda item: -len(item[1])):
        said: dict[str, Any] = {}
        with contextlib.suppress(rundir.RunDirError):
            assert runs[0].folder is not None
            said = rundir.read_json(rundir.environment_file(runs[0].folder, name))
        packages: Mapping[str, str] = said.get("packages") or {}
        flat = {**said, **packages}
        spelt = {key: ", ".join(v) if isinstance(v := flat.get(key), list) else v for key in AROUND}
        main = [(key, str(value)) for key, value in spelt.items() if value]
        main += [("processes", str(said["processes"]))] if said.get("processes", 1) != 1 else []
        variables = said.get("variables") or {}
        main += [(str(key), str(value)) for key, value in variables.items()]
        listed = [f"{package}=={version}" for package, version in packages.items()]
        found.append({"hash": name, "runs": len(runs), "main": main, "packages": listed})
    return found


def _code(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Which code made how many runs of which worker."""
    counts: Counter[tuple[str, ...]] = Counter()
    for entry in entries:
        if entry.folder is not None:
            info, run = entry.info, _run(entry)
            imported = "imported" if info.get("imported") else str(info.get("capsule") or "")
            counts[str(info.get("worker")), run["commit"], run["code"], imported] += 1
    keys = ("worker", "commit", "code", "capsule")
    return [dict(zip(keys, key, strict=True)) | {"runs": n} for key, n in sorted(counts.items())]


def _commands(output_dir: Path, identities: set[str]) -> list[dict[str, Any]]:
    """The commands that started these runs, oldest first."""
    found = []
    for path in sorted(output_dir.glob("submissions/*/manifest.json")):
        with contextlib.suppress(rundir.RunDirError, KeyError, TypeError, ValueError, OSError):
            said = rundir.read_json(path)
            started = sum(bool(run.get("started")) and run["identity"] in identities for run in said["runs"])
            if started:
                when = time.strftime("%Y-%m-%d %H:%M", time.localtime(float(said["time"])))
                words = shlex.join(["python", "launcher.py", *map(str, said.get("command") or ())])
                found.append({"time": when, "host": str(said.get("host") or ""), "words": words, "runs": started})
    return found


# -- the command ------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python launcher.py report", description="A study as one HTML page.")
    parser.add_argument("--manifest", type=Path, required=True, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, metavar="FILE", help="instead of OUTPUT_DIR/reports/NAME.html")
    parser.add_argument("--no-pictures", action="store_true", help="tables only")
    args = parser.parse_args(argv)
    try:
        table = tables.load(args.manifest)
        output = args.output or table.output_dir / "reports" / f"{args.manifest.stem}.html"
        page = build(table, pictures=not args.no_pictures)
        output.parent.mkdir(parents=True, exist_ok=True)
        rundir.write_atomic(output, page)
    except (rundir.RunDirError, SettingsError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(output)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
