"""Synthetic run directories, and MLflow stores that are initialised once."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from contract import rundir

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ.pop("MLFLOW_TRACKING_URI", None)

THEIRS = (  # warnings of MLflow's code about its own libraries
    "ignore:The ``noload`` loader strategy is deprecated:DeprecationWarning",
)


def pytest_configure(config: pytest.Config) -> None:
    for each in THEIRS:
        config.addinivalue_line("filterwarnings", each)


BEGIN = 1_700_000_000.0
MakeRun = Callable[..., Path]


def put(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2))  # as rundir.write_json, but without waiting for the disk


@pytest.fixture
def output_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "runs"
    folder.mkdir()
    return folder


@pytest.fixture
def log_steps() -> Callable[..., None]:
    """Lines for the journal of a run directory."""

    def log(folder: Path, steps: range, at: float = BEGIN) -> None:
        journal = rundir.Journal(folder / rundir.METRICS)
        for step in steps:
            journal.append({"step": step, "of": 100, "time": at + step, "train/loss": 1 / step, "train/lr": 0.1})
        journal.close()

    return log


@pytest.fixture
def make_run(output_dir: Path, log_steps: Callable[..., None]) -> MakeRun:
    """A run directory as launcher and worker leave it."""

    def make(
        identity: str,
        *,
        worker: str = "main_knn",
        stage: str = "knn",
        seed: int = 0,
        steps: int = 0,
        metrics: Mapping[str, float] | None = None,
        code: str = "c0de",
        parents: tuple[str, ...] = (),
        end: str | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> Path:
        folder = rundir.run_dir(output_dir, worker, identity)
        folder.mkdir(parents=True)
        run = {"schema": rundir.SCHEMA, "identity": identity, "group": f"g-{identity[:-1]}", "name": "demo"}
        run |= {"worker": worker, "stage": stage, "seed": seed, "parents": list(parents), "processes": 1}
        run |= {"code": {"hash": code, "files": {}}, "commit": "abc", "capsule": "x", "submitted": BEGIN}
        put(folder / rundir.RUN, run)
        put(folder / rundir.CONFIG, config or {"worker": worker, "seed": seed})
        attempts = rundir.Journal(rundir.attempts_file(folder, 0))
        if steps or metrics is not None or end:
            attempts.append({"event": "start", "attempt": "a1", "time": BEGIN + 1, "host": "h", "pid": 1})
        log_steps(folder, range(1, steps + 1))
        if metrics is not None:
            done = {"metrics": dict(metrics), "steps": steps, "time": BEGIN + 100}
            put(folder / rundir.DONE, done)
            end = "finished"
        if end:
            attempts.append({"event": "end", "attempt": "a1", "time": BEGIN + 101, "cause": end, "exit": 0})
        attempts.close()
        return folder

    return make


@pytest.fixture(scope="session")
def template_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh MLflow database: its migrations take seconds, so the tests copy it."""
    from analysis.store import Store

    folder = tmp_path_factory.mktemp("template")
    Store(f"sqlite:///{folder / 'mlflow.db'}", folder).open()
    return folder / "mlflow.db"


@pytest.fixture
def store_file(template_store: Path, output_dir: Path) -> Path:
    return Path(shutil.copy(template_store, output_dir / "mlflow.db"))


ROWS = ("random encoder", "Latent & <MIM>")
COLUMNS = {"1-NN": ("knn", "main_knn", "knn/loo1"), "linear probe": ("probe", "main_linprobe", "linprobe/top1")}


@pytest.fixture
def make_study(output_dir: Path, make_run: MakeRun) -> Callable[..., Path]:
    """A study of two rows, two columns and three seeds, pretrained and evaluated; returns its manifest."""

    def make(rows: tuple[str, ...] = ROWS, seeds: int = 3, **changes: Any) -> Path:
        cells = []
        for r, row in enumerate(rows):
            for seed in range(seeds):
                make_run(f"aaa{r}{seed}", worker="main_lmim", stage="pretrain", seed=seed, steps=20, metrics={})
            for c, (column, (stage, worker, metric)) in enumerate(COLUMNS.items()):
                runs = []
                for seed in range(seeds):
                    identity = f"bb{c}{r}{seed}"
                    value = {metric: 0.5 + 0.2 * r + 0.1 * c + (0.01 + 0.003 * r) * seed}
                    made = {"stage": stage, "worker": worker, "seed": seed, "parents": (f"aaa{r}{seed}",)}
                    make_run(identity, metrics=value, **made)
                    runs.append({"seed": seed, "identity": identity, "worker": worker, "state": "finished"})
                cells.append({"row": row, "column": column, "metric": metric, "runs": runs})
        columns = [{"name": n, "stage": s, "metric": m, "better": "higher"} for n, (s, _, m) in COLUMNS.items()]
        manifest = {"schema": rundir.SCHEMA, "name": "demo", "title": "A demo", "output_dir": str(output_dir)}
        manifest |= {"seeds": list(range(seeds)), "rows": list(rows), "columns": columns, "cells": cells}
        manifest["identities"] = [folder.name for folder in rundir.find_runs(output_dir)]
        manifest["parents"] = {
            r["identity"]: rundir.read_run(rundir.run_dir(output_dir, r["worker"], r["identity"]))["parents"]
            for c in cells
            for r in c["runs"]
        }
        manifest |= {"layout": {"digits": 1, "interval": "ci95", "percent": True}, "reported": []} | changes
        path = output_dir / "studies" / "demo.json"
        path.parent.mkdir(exist_ok=True)
        put(path, manifest)
        return path

    return make
