"""What stands behind a cell: machines, hours, and how its runs differ. Reads the directories of these runs only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from analysis.cells import Cell, CellRun
from contract import cost, rundir
from contract.cost import Cost

HERE = frozenset({"output_dir", "encoder", "oracle", "job_name"})  # paths and names; the runs that they lead to differ


def of_run(output_dir: Path, run: CellRun) -> Cost:
    return _cost(rundir.run_dir(output_dir, run.worker, run.identity))


def with_parents(output_dir: Path, cell: Cell) -> Cost:
    """The runs of a cell, and what they were built upon, each once."""
    todo = [rundir.run_dir(output_dir, run.worker, run.identity) for run in cell.runs]
    seen: dict[str, Cost] = {}
    while todo:
        folder = todo.pop()
        if folder.name not in seen:
            seen[folder.name] = _cost(folder)
            for parent in _info(folder).get("parents") or ():
                todo += output_dir.glob(f"*/{parent}")
    return cost.total(seen.values())


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


def _cost(folder: Path) -> Cost:
    processes = _info(folder).get("processes")
    return cost.of(folder, processes if isinstance(processes, int) else 1)


def _info(folder: Path) -> dict[str, Any]:
    try:
        return rundir.read_json(folder / rundir.RUN)
    except rundir.RunDirError:
        return {}


def _config(folder: Path) -> Iterator[tuple[str, Any]]:
    try:
        said = yaml.safe_load((folder / rundir.CONFIG).read_text())
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
