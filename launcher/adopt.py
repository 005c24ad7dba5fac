"""``import``: results and checkpoints from before, as finished runs of a study. They say where they come from, in
``run.json``; nothing that other code made is ever stale.

CSV: a line ``row,column,seed,value`` for every figure, with a ``source`` of its own where there is one. MLflow: one row
of the study at a time. Checkpoints: the encoder of one row and seed, read and written anew by a process with torch.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from contract import rundir
from contract.settings import unknown
from contract.settings.checks import SettingsError
from launcher import mirror, rundirs
from launcher.plan import Plan, Run

TAKEN = frozenset({"reuse", "stale", "running", "queued"})


@dataclass
class Adopted:
    """What one run directory will hold."""

    run: Run
    metrics: dict[str, float] = field(default_factory=dict)
    sources: list[str] = field(default_factory=list)
    checkpoint: Path | None = None


def adopt(plan: Plan, args: argparse.Namespace) -> list[Adopted]:
    """Everything is checked before anything is written. Raises SettingsError, naming the file and the line."""
    if plan.study is None:
        raise SettingsError("import: say the study that the runs belong to")
    found: dict[str, Adopted] = {}
    given = [name for name in ("csv", "mlflow", "checkpoint") if getattr(args, name)]
    if len(given) != 1:
        raise SettingsError("import: give one of --csv FILE, --mlflow URI, --checkpoint FILE")
    if args.checkpoint:
        each = _checkpoint(plan, args)
        found[each.run.identity] = each
    else:
        figures = _csv(Path(args.csv)) if args.csv else _mlflow(plan, args)
        for where, row, column, seed, value, source in figures:
            _put(plan, found, where, row, column, seed, _unit(plan, where, column, value, args.percent), source)
    for each in found.values():
        _check_free(each)
    return list(found.values())


def write(plan: Plan, adopted: list[Adopted]) -> None:
    for each in adopted:
        run, now = each.run, time.time()
        run.folder.mkdir(parents=True, exist_ok=True)
        if each.checkpoint:
            _convert(each)
        before = rundir.read_json(run.folder / rundir.DONE) if (run.folder / rundir.DONE).exists() else {}
        rundir.write_atomic(run.folder / rundir.CONFIG, rundirs.to_yaml(run.settings))
        described: dict[str, Any] = {"schema": rundir.SCHEMA, "identity": run.identity, "group": run.group}
        described |= {"name": run.name, "worker": run.settings.worker, "stage": run.stage, "seed": run.settings.seed}
        described |= {"parents": list(run.parents), "processes": run.processes, "code": {"hash": "", "files": {}}}
        described |= {"commit": None, "submitted": now, "study": plan.name}
        sources = "; ".join(dict.fromkeys([*_old_sources(run.folder), *each.sources]))
        described["imported"] = {"source": sources, "time": now}
        rundir.write_json(run.folder / rundir.RUN, described)
        metrics = {**before.get("metrics", {}), **_spelled(each.metrics)}
        rundir.write_json(run.folder / rundir.DONE, {"metrics": metrics, "steps": 0, "time": now})
    rundirs.write_study(plan)


def _old_sources(folder: Path) -> list[str]:
    try:
        return [str(rundir.read_run(folder)["imported"]["source"])]
    except (rundir.RunDirError, KeyError, TypeError):
        return []


def _spelled(metrics: Mapping[str, float]) -> dict[str, float | str]:
    return {key: value if math.isfinite(value) else repr(value) for key, value in metrics.items()}


# -- where a figure goes ----------------------------------------------------------------------------------------------


def _put(
    plan: Plan, found: dict[str, Adopted], where: str, row: str, column: str, seed: int, value: float, source: str
) -> None:
    assert plan.study is not None
    run = _cell_run(plan, where, row, column, seed)
    metric = plan.study.columns[column].metric
    each = found.setdefault(run.identity, Adopted(run))
    if metric in each.metrics and each.metrics[metric] != value:
        raise SettingsError(f"{where}: {row} | {column} | seed {seed}: a second figure, {value:g}; which one is it?")
    each.metrics[metric] = value
    if source not in each.sources:
        each.sources.append(source)


def _cell_run(plan: Plan, where: str, row: str, column: str, seed: int) -> Run:
    assert plan.study is not None
    for what, name, valid in (("row", row, plan.study.rows), ("column", column, plan.study.columns)):
        if name not in valid:
            raise SettingsError(f"{where}: {unknown(what, name, valid)}")
    runs = {r.identity: r for r in plan.runs}
    by_seed = {runs[i].settings.seed: runs[i] for i in plan.cells[row, column]}
    if seed not in by_seed:
        raise SettingsError(
            f"{where}: seed={seed}: the study has {', '.join(map(str, by_seed))}; say seed=... beside it"
        )
    return by_seed[seed]


def _unit(plan: Plan, where: str, column: str, value: float, percent: bool) -> float:
    """In the metric's own unit."""
    assert plan.study is not None
    declared = plan.study.columns.get(column)
    fraction = plan.study.layout.percent if declared is None or declared.percent is None else declared.percent
    if not fraction:
        return value
    if not percent and math.isfinite(value) and abs(value) > 1:
        raise SettingsError(f"{where}: {column}={value:g}: this metric is a fraction; --percent if these are per cent")
    return value / 100 if percent else value


def _check_free(each: Adopted) -> None:
    """A result of our own is never written over; to one that was taken over, other metrics may be added."""
    run = each.run
    if run.state not in TAKEN:
        return
    try:
        imported = rundir.read_run(run.folder).get("imported")
        metrics = rundir.read_json(run.folder / rundir.DONE).get("metrics") if imported else None
    except rundir.RunDirError:
        imported, metrics = None, None
    about = f"{run.folder}: {run.stage}, seed {run.settings.seed}"
    if not imported:
        raise SettingsError(f"{about} is {run.state} already; it is not written over")
    for key, value in each.metrics.items():
        if (metrics or {}).get(key, value) != value:
            raise SettingsError(
                f"{about} has {key}={(metrics or {})[key]} from an import; delete the folder to replace it"
            )


# -- where figures come from ------------------------------------------------------------------------------------------


Figure = tuple[str, str, str, int, float, str]  # where, row, column, seed, value, source


def _csv(path: Path) -> Iterator[Figure]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SettingsError(f"--csv {path}: {getattr(error, 'strerror', None) or error}") from None
    names = list(lines[0]) if lines else []
    if missing := [name for name in ("row", "column", "seed", "value") if name not in names]:
        raise SettingsError(f"{path}:1: no column {missing[0]!r}; expected row,column,seed,value and perhaps source")
    for number, line in enumerate(lines, 2):
        where = f"{path}:{number}"
        try:
            seed, value = int(line["seed"]), float(line["value"])
        except (TypeError, ValueError):
            raise SettingsError(f"{where}: seed={line['seed']}, value={line['value']}: expected numbers") from None
        source = (line.get("source") or "").strip() or f"{path.name}, line {number}"
        yield where, line["row"], line["column"], seed, value, source


def _mlflow(plan: Plan, args: argparse.Namespace) -> Iterator[Figure]:
    """The launcher never imports mlflow: a process of the analysis reads the store."""
    assert plan.study is not None
    if not args.experiment or not args.row:
        raise SettingsError("--mlflow: add --experiment NAME and --row ROW; --filter narrows down which of its runs")
    keys = {name: column.metric for name, column in plan.study.columns.items()}
    for word in args.metric or ():
        name, equals, key = word.partition("=")
        if not equals or name not in keys:
            raise SettingsError(f"--metric {word}: expected COLUMN=METRIC; columns: {', '.join(keys)}")
        keys[name] = key
    command = [sys.executable, "-m", "analysis.adopt", "--store", args.mlflow, "--experiment", args.experiment]
    command += ["--filter", args.filter or "", "--seed", args.seed_key]
    done = subprocess.run(command, env=mirror.environment(), check=False, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SettingsError(f"--mlflow: experiment {args.experiment} was not read; nothing was imported")
    there: set[str] = set()
    some = False
    for each in map(json.loads, done.stdout.splitlines()):
        there |= each["metrics"].keys()
        for name, key in keys.items():
            if key in each["metrics"]:
                some = True
                value = float(each["metrics"][key])
                yield each["source"], args.row, name, int(each["seed"]), value, each["source"]
    if not some:
        have = ", ".join(sorted(there)) or "none"
        raise SettingsError(f"--mlflow: no run has one of {', '.join(keys.values())}; metrics there: {have}")


def _checkpoint(plan: Plan, args: argparse.Namespace) -> Adopted:
    assert plan.study is not None
    path = Path(args.checkpoint).expanduser().resolve()
    if not path.is_file():
        raise SettingsError(f"--checkpoint {args.checkpoint}: no such file")
    if args.row not in plan.study.rows:
        raise SettingsError(f"--checkpoint: {unknown('--row', str(args.row), plan.study.rows)}")
    wanted = args.seed if args.seed is not None else plan.study.seeds[0]
    makes = [name for name, stage in plan.study.stages.items() if stage.after is None]
    stage = args.stage or makes[0]
    if stage not in makes:
        raise SettingsError(unknown("--stage", stage, makes))
    column = next((n for n, c in plan.study.columns.items() if _root(plan, c.stage) == stage), None)
    if column is None:
        raise SettingsError(f"--stage {stage}: no column of the table is built upon it")
    run = _cell_run(plan, "--checkpoint", args.row, column, wanted)
    runs = {r.identity: r for r in plan.runs}
    while run.parents and run.parents[0] in runs:
        run = runs[run.parents[0]]
    content = hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
    return Adopted(run, sources=[f"{path} (blake2b {content})"], checkpoint=path)


def _root(plan: Plan, stage: str) -> str:
    assert plan.study is not None
    while (after := plan.study.stages[stage].after) is not None:
        stage = after
    return stage


def _convert(each: Adopted) -> None:
    command = [sys.executable, "-m", "workers.engine.convert", str(each.checkpoint), str(each.run.folder)]
    done = subprocess.run(
        [*command, each.run.identity], env=mirror.environment(), check=False, stderr=subprocess.PIPE, text=True
    )
    if done.returncode:
        with_error = [line for line in done.stderr.splitlines() if line.strip()] or ["it left no word"]
        each.run.folder.rmdir() if not any(each.run.folder.iterdir()) else None
        raise SettingsError(f"--checkpoint {each.checkpoint}: {with_error[-1].rpartition('error: ')[2]}")
