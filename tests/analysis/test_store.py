"""Stores that do not take anything now: one clear line, exit code 3, nothing lost."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import alembic.command
import pytest
import sqlalchemy
from mlflow.store.db import utils
from mlflow.store.tracking.dbmodels import initial_models
from mlflow.tracking import MlflowClient

from analysis import ingest, store

MakeRun = Callable[..., Path]
ROOT = Path(__file__).resolve().parents[2]


def go(output_dir: Path, *args: str) -> int:
    return ingest.main(["--output-dir", str(output_dir), *args])


def arrives(output_dir: Path, capsys: pytest.CaptureFixture[str]) -> bool:
    assert go(output_dir, "--json") == 0
    return bool(json.loads(capsys.readouterr().out)["new"] == 1)


pytestmark = pytest.mark.usefixtures("store_file")


def refused(output_dir: Path, capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The one line of an ingest that ended with 3."""
    assert go(output_dir, *args) == 3
    out, err = capsys.readouterr()
    assert not out
    assert err.count("\n") == 1
    assert err.startswith("error: ")
    return err


def test_a_locked_store_is_told_after_some_tries(
    output_dir: Path,
    make_run: MakeRun,
    store_file: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make_run("a1", steps=2)
    monkeypatch.setattr(store, "BUSY_S", 0.1)
    holder = sqlite3.connect(store_file)
    holder.execute("BEGIN EXCLUSIVE")
    assert "locked by another program" in refused(output_dir, capsys)
    holder.close()
    assert arrives(output_dir, capsys)


def test_a_read_only_store_is_told(
    output_dir: Path,
    make_run: MakeRun,
    store_file: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make_run("a1", steps=2)
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and real(path, mode))  # root may write all
    assert "read-only" in refused(output_dir, capsys)


def test_an_absent_folder_is_told(output_dir: Path, make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    make_run("a1", steps=2)
    assert "cannot be written" in refused(output_dir, capsys, "--store", f"sqlite:///{output_dir}/none/mlflow.db")
    assert not (output_dir / "none").exists()


def older_store(file: Path, revision: str) -> str:
    """A store as MLflow's own migrations left it at that schema, with a run of somebody's in it."""
    file.unlink()
    engine = sqlalchemy.create_engine(f"sqlite:///{file}")
    initial_models.Base.metadata.create_all(engine)
    alembic.command.upgrade(utils._get_alembic_config(f"sqlite:///{file}"), revision)  # type: ignore[no-untyped-call]
    meta = sqlalchemy.MetaData()
    meta.reflect(engine)
    with engine.begin() as connection:
        named = {"name": "mine", "artifact_location": str(file.parent), "lifecycle_stage": "active"}
        connection.execute(meta.tables["experiments"].insert(), {"experiment_id": 1, **named})
        run = {"run_uuid": "0" * 32, "experiment_id": 1, "name": "", "user_id": "me", "status": "FINISHED"}
        run |= {
            "start_time": 1,
            "end_time": 2,
            "lifecycle_stage": "active",
            "artifact_uri": "x",
            "source_type": "LOCAL",
        }
        connection.execute(meta.tables["runs"].insert(), run)
        values = {"run_uuid": "0" * 32, "key": "loss", "value": 0.5, "timestamp": 3, "step": 1, "is_nan": False}
        connection.execute(meta.tables["metrics"].insert(), values)
        connection.execute(meta.tables["latest_metrics"].insert(), values)
    engine.dispose()
    return revision


def test_an_older_store_is_refused_and_upgraded_when_asked_with_the_old_one_kept(
    output_dir: Path, make_run: MakeRun, store_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run("a1", steps=2)
    old = older_store(store_file, "cc1f77228345")  # of MLflow 1.26
    before = store_file.read_bytes()
    assert f"schema {old}); python launcher.py ingest --upgrade" in refused(output_dir, capsys)
    assert store_file.read_bytes() == before
    assert go(output_dir, "--upgrade", "--json") == 0
    out, err = capsys.readouterr()
    kept = output_dir / f"mlflow.db.schema-{old}"
    assert err == f"upgraded; the store as it was is kept in {kept}; start mlflow ui anew\n"
    assert kept.read_bytes() == before
    assert json.loads(out)["new"] == 1
    client = MlflowClient(f"sqlite:///{store_file}")
    assert client.get_run("0" * 32).data.metrics == {"loss": 0.5}
    assert go(output_dir, "--upgrade") == 0
    assert capsys.readouterr().err == ""  # nothing to do
    assert not list(output_dir.glob(".mlflow.db.*"))


def test_an_upgrade_that_fails_leaves_the_store_as_it_was(
    output_dir: Path, make_run: MakeRun, store_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run("a1", steps=2)
    set_schema(store_file, "451aebb31d03")  # it says so, but its tables are those of today
    before = store_file.read_bytes()
    assert "cannot upgrade it" in refused(output_dir, capsys, "--upgrade")
    assert store_file.read_bytes() == before
    assert not [*output_dir.glob("mlflow.db.schema-*"), *output_dir.glob(".mlflow.db.*")]


def test_a_newer_store_is_told(
    output_dir: Path, make_run: MakeRun, store_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run("a1", steps=2)
    set_schema(store_file, "fffffffffff")
    assert "newer MLflow" in refused(output_dir, capsys, "--upgrade")


def set_schema(file: Path, revision: str) -> None:
    connection = sqlite3.connect(file)
    connection.execute("UPDATE alembic_version SET version_num = ?", (revision,))
    connection.commit()
    connection.close()


@pytest.mark.parametrize("content", [b"no database, but long enough to look like a file" * 9, None])
def test_what_is_no_store_is_told(
    output_dir: Path, make_run: MakeRun, store_file: Path, capsys: pytest.CaptureFixture[str], content: bytes | None
) -> None:
    make_run("a1", steps=2)
    store_file.write_bytes(content or b"")
    if content is None:
        connection = sqlite3.connect(store_file)
        connection.execute("CREATE TABLE mine (x)")
        connection.close()
    assert "not an MLflow store" in refused(output_dir, capsys)


def test_a_store_in_use_by_another_ingest_is_told(
    output_dir: Path, make_run: MakeRun, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run("a1", steps=2)
    monkeypatch.setattr(store, "WAIT_S", 0.3)
    holder = subprocess.Popen(
        [sys.executable, "-c", "import sys; from pathlib import Path; from analysis.store import choose\n"
         "with choose(Path(sys.argv[1]), None).alone(): print('held', flush=True); input()", str(output_dir)],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert holder.stdout
    holder.stdout.readline()
    assert f"process {holder.pid} on" in refused(output_dir, capsys)
    holder.communicate(b"\n")
    assert arrives(output_dir, capsys)


def test_a_deleted_experiment_is_told(output_dir: Path, make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    make_run("a1", steps=2)
    assert arrives(output_dir, capsys)
    client = MlflowClient(f"sqlite:///{output_dir / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("main_knn")
    assert experiment is not None
    client.delete_experiment(experiment.experiment_id)
    assert "mlflow experiments restore" in refused(output_dir, capsys)


@pytest.mark.parametrize("uri", ["file:///tmp/x", "mysql://a/b", "sqlite://", "nonsense"])
def test_a_store_of_another_kind_is_a_usage_error(
    output_dir: Path, uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert go(output_dir, "--store", uri) == 2
    assert "expected sqlite:///FILE" in capsys.readouterr().err


def test_a_missing_output_directory_is_a_usage_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert go(tmp_path / "none") == 2
    assert "no such directory" in capsys.readouterr().err


def test_no_runs_need_no_mlflow(output_dir: Path) -> None:
    code = "import sys; from analysis import ingest; ingest.main(sys.argv[1:]); print('mlflow' in sys.modules)"
    command = [sys.executable, "-c", code, "--output-dir", str(output_dir)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("postgresql://me:hunter2%20pa@ss:w/rd@host/db", "postgresql+psycopg://me:***@host/db"),
        ("postgresql://host/db?user=me&password=hunter2&x=1", "postgresql+psycopg://host/db?user=me&password=***&x=1"),
        ("http://me:hunter2@host:5000", "http://me:***@host:5000"),
        ("http://host:5000", "http://host:5000"),
    ],
)
def test_passwords_are_never_shown(output_dir: Path, uri: str, shown: str) -> None:
    found = store.choose(output_dir, uri)
    assert found.shown == shown
    assert "hunter2" not in str(found._explain(ValueError(f"cannot reach {found.uri}")))
