"""From configurations to runs: pure, and all of it can be printed. Nothing is written here."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from contract import rundir, study
from contract.settings import Settings
from contract.settings.checks import SettingsError
from contract.settings.data import EMBEDDED
from contract.settings.env import Env
from launcher import breaker, closure
from launcher.identity import Input, digest, find_encoder, fingerprint

State = Literal["reuse", "stale", "running", "queued", "new", "held", "stopped", "failed", "cancelled"]
STATES: tuple[State, ...] = get_args(State)
OPEN: frozenset[State] = frozenset({"new", "held", "stopped", "failed"})  # what a launch starts
FROM_FILES: dict[rundir.State, State] = {
    "finished": "reuse",
    "running": "running",
    "cancelled": "cancelled",
    "failed": "failed",
    "stopped": "stopped",
    "waiting": "new",
}
QueueState = Literal["queued", "running", "blocked", "held", "leaving"]


@dataclass(frozen=True)
class Queued:
    """What a scheduler says of a run."""

    scheduler: str
    array: str  # its number
    element: int | None
    job: str  # the element as its commands call it
    state: QueueState  # blocked: it waits for what will never be; leaving: over, or about to be queued again
    why: str
    shared: bool = False  # with other runs, which are done one after another


def with_queue(state: str, queued: Queued | None) -> str:
    """What the files and the queue say together. A run that ended is what its files say."""
    if queued is None or state in ("reuse", "stale", "finished", "cancelled", "running"):
        return state
    if queued.state == "leaving":
        return "failed" if state == "failed" else "queued"
    return "queued" if queued.state == "held" else queued.state


@dataclass(frozen=True, kw_only=True)
class Run:
    identity: str
    group: str  # the same for runs that differ in their seed only
    stage: str
    settings: Settings
    folder: Path
    parents: tuple[str, ...]
    code: closure.Code
    state: State
    changed: tuple[str, ...] = ()  # when stale: the files that say something else now
    explicit: frozenset[str] = frozenset()  # the keys that were said, and not taken from a file

    @property
    def name(self) -> str:
        return self.settings.job_name or self.settings.worker

    @property
    def processes(self) -> int:
        return self.settings.env.processes

    @property
    def runs_here(self) -> bool:
        return self.state == "running" and self.settings.env.scheduler == "local"

    def line(self) -> dict[str, Any]:
        """For ``--json``; these keys stay."""
        return {
            "identity": self.identity,
            "group": self.group,
            "name": self.name,
            "worker": self.settings.worker,
            "stage": self.stage,
            "seed": self.settings.seed,
            "state": self.state,
            "parents": list(self.parents),
            "dir": str(self.folder),
            "changed": list(self.changed),
        }


@dataclass(frozen=True, kw_only=True)
class Plan:
    name: str
    output_dir: Path
    runs: tuple[Run, ...]  # parents before children, every identity once
    study: study.Study | None = None
    cells: Mapping[tuple[str, str], tuple[str, ...]] = field(default_factory=dict)  # (row, column) -> identities
    only: frozenset[str] | None = None  # what may start; None: everything

    def todo(self, stale: bool = False) -> list[Run]:
        """What a launch starts; with ``stale``, what other code made and what was built upon that, too.

        A launch here also waits for what another process runs here, and takes it over if that one lets go.
        """
        again: set[str] = set()
        for run in self.runs:
            if stale and (run.state == "stale" or (run.state == "reuse" and again.intersection(run.parents))):
                again.add(run.identity)
        found = [r for r in self.runs if r.state in OPEN or r.identity in again or r.runs_here]
        found = found if self.study is None else self._wanted(found)
        return found if self.only is None else [run for run in found if run.identity in self.only]

    def _wanted(self, found: list[Run]) -> list[Run]:
        """Without those that no cell shows and nothing that is to run is built upon: their evaluations are there."""
        open_ones = {run.identity for run in found}
        needed = {identity for identities in self.cells.values() for identity in identities}
        for run in reversed(self.runs):
            waits = run.identity in open_ones or run.state not in ("reuse", "stale", "cancelled")
            if run.identity in needed and waits:
                needed.update(run.parents)
        return [run for run in found if run.identity in needed]

    def manifest(self) -> dict[str, Any]:
        """What analysis is told of a study: which runs make which cell."""
        assert self.study is not None
        runs = {r.identity: r for r in self.runs}
        return {
            "schema": rundir.SCHEMA,
            "name": self.name,
            "title": self.study.title,
            "output_dir": str(self.output_dir),
            "identities": list(runs),
            "parents": {r.identity: list(r.parents) for r in self.runs if r.parents},
            "seeds": self.study.seeds,
            "rows": list(self.study.rows),
            "columns": [
                {"name": name, "stage": c.stage, "metric": c.metric, "better": c.better}
                | {k: v for k in ("digits", "percent") if (v := getattr(c, k)) is not None}
                for name, c in self.study.columns.items()
            ],
            "layout": dataclasses.asdict(self.study.layout),
            "reported": [dataclasses.asdict(r) for r in self.study.reported],
            "cells": [
                {
                    "row": row,
                    "column": column,
                    "metric": self.study.columns[column].metric,
                    "runs": [
                        {
                            "seed": runs[i].settings.seed,
                            "identity": i,
                            "worker": runs[i].settings.worker,
                            "state": runs[i].state,
                        }
                        for i in identities
                    ],
                }
                for (row, column), identities in self.cells.items()
            ],
        }


# -- a run ----------------------------------------------------------------------------------------------------------


def build(settings: Settings, source: Input | None, stage: str, explicit: frozenset[str] = frozenset()) -> Run:
    """The run of settings that are complete: which identity, and what there is of it."""
    science = {**settings.science(), "fingerprint": fingerprint(settings)}
    read = {"encoder": source} if source else {}
    if named := getattr(settings, "oracle", None):  # a second encoder, which is there already
        read["oracle"] = find_encoder(named, Path(settings.output_dir), "oracle")
        setattr(settings, "oracle", read["oracle"].path)  # noqa: B010  # not all settings have one
    science |= {key: each.identity for key, each in read.items()}
    identity = digest(science)
    del science["seed"]
    science |= {key: each.group for key, each in read.items()}
    folder = rundir.run_dir(Path(settings.output_dir), settings.worker, identity)
    code = closure.code(settings.worker, _texts(science))
    state, changed = look(folder, code)
    return Run(
        identity=identity,
        group=digest(science),
        stage=stage,
        settings=settings,
        folder=folder,
        parents=tuple(dict.fromkeys(parent for each in read.values() for parent in each.parents)),
        code=code,
        state=state,
        changed=tuple(changed),
        explicit=explicit,
    )


def look(folder: Path, code: closure.Code) -> tuple[State, list[str]]:
    """What there is of a run, and if it is finished with other code: which files changed."""
    if not (folder / rundir.RUN).exists():
        return "new", []
    state = rundir.state(folder)
    if state in ("waiting", "stopped") and breaker.holds(folder, rundir.read_run(folder)):
        return "held", []
    if state == "finished":
        run = rundir.read_run(folder)
        if run.get("imported"):
            return "reuse", []  # no code of ours made it
        made = run.get("code") or {}
        if made.get("hash") != code.hash:
            return "stale", code.changed(made.get("files") or {})
    return FROM_FILES[state], []


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _texts(each)


# -- this machine -----------------------------------------------------------------------------------------------------


def absolute(path: str) -> str:
    """As the user means it; links are not followed."""
    return os.path.abspath(Path(path).expanduser())  # noqa: PTH100


def located(env: Env) -> Env:
    """``env`` with the number of GPUs settled. Raises SettingsError where the processes do not fit them."""
    if env.ngpu is None:
        ngpu = len(visible_gpus()) if env.scheduler == "local" else 1
        if env.nproc and ngpu and env.nproc > ngpu:
            raise SettingsError(f"env.nproc={env.nproc}: more than the {ngpu} GPU(s) here; env.ngpu=0 takes the CPU")
        env = dataclasses.replace(env, ngpu=env.nproc or ngpu if ngpu else 0)
    if env.distributed is False and env.processes > 1:
        raise SettingsError(f"env.distributed=False: but {env.processes} processes; say env.nproc=1, or True")
    return env


@functools.cache
def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES would hold for all of them. Asks the driver's own tool: torch would take seconds."""
    if (said := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [d for d in said.split(",") if d.strip() not in ("", "-1")]
    if shutil.which("nvidia-smi") is None:
        return []
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [str(i) for i, _ in enumerate(re.findall(r"^GPU \d+", listed, re.MULTILINE))]


def check_data(runs: Iterable[Run]) -> None:
    """Refuse, before anything is written, runs whose pictures are not there. Raises SettingsError."""
    asked = {
        (r.settings.data.name, r.settings.data_path): r.settings for r in runs if r.settings.data.check == "launch"
    }
    for (name, path), settings in asked.items():
        if path is None:
            if name not in EMBEDDED:
                raise SettingsError(f"data_path: missing; data={name} needs data_path=FOLDER")
        elif not settings.data.download and not Path(path).is_dir():
            raise SettingsError(
                f"data_path={path}: no such folder here; data.check=node leaves it to the node that runs"
            )
