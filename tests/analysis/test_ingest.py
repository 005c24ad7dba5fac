"""Against real SQLite stores. Servers: test_servers.py."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import sqlalchemy
from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from analysis import ingest, mirror, runs, senders, store
from contract import rundir

MakeRun = Callable[..., Path]
LogSteps = Callable[..., None]
ROOT = Path(__file__).resolve().parents[2]


def go(output_dir: Path, *args: str) -> int:
    return ingest.main(["--output-dir", str(output_dir), *args])


def counted(output_dir: Path, capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, object]:
    assert go(output_dir, "--json", *args) == 0
    found = json.loads(capsys.readouterr().out)
    return {key: found[key] for key in ("new", "grown", "unchanged", "left_out", "metrics")}


def stored(output_dir: Path) -> tuple[MlflowClient, dict[str, Run]]:
    """The runs in the store by identity; fails on one that is there twice."""
    client = MlflowClient(f"sqlite:///{output_dir / 'mlflow.db'}")
    experiments = [e.experiment_id for e in client.search_experiments()]
    found = client.search_runs(experiments, max_results=5000)
    by_identity = {run.data.tags["sightline.identity"]: run for run in found}
    assert len(by_identity) == len(found)
    return client, by_identity


def history(client: MlflowClient, run: Run, key: str = "train/loss") -> list[tuple[int, int, float]]:
    return [(m.step, m.timestamp, m.value) for m in client.get_metric_history(run.info.run_id, key)]


def in_the_files(folder: Path, key: str = "train/loss") -> list[tuple[int, int, float]]:
    records, _ = rundir.read_journal(folder / rundir.METRICS)
    return [(p.step, round(p.time * 1000), p.value) for p in runs.points(records) if p.key == key]


pytestmark = pytest.mark.usefixtures("store_file")


def test_a_run_is_mirrored(output_dir: Path, make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    config = {
        "worker": "main_knn",
        "seed": 3,
        "data": {"name": "digits", "cache": None},
        "then": [],
        "long": "x" * 9000,
    }
    folder = make_run("a1", seed=3, steps=4, metrics={"knn/loo1": 0.9}, config=config, parents=("p1", "p2"))
    (folder / rundir.FIGURES).mkdir()
    (folder / rundir.FIGURES / "map.png").write_bytes(b"picture")
    assert counted(output_dir, capsys) == {"new": 1, "grown": 0, "unchanged": 0, "left_out": 0, "metrics": 9}
    client, found = stored(output_dir)
    run = found["a1"]
    assert run.info.status == "FINISHED"
    assert run.info.start_time == 1_700_000_001_000
    assert run.info.end_time == 1_700_000_100_000
    assert run.info.run_name == "demo seed=3"
    assert client.get_experiment(run.info.experiment_id).name == "main_knn"
    assert run.data.metrics == {"train/loss": 0.25, "train/lr": 0.1, "knn/loo1": 0.9}
    assert history(client, run) == in_the_files(folder)
    assert history(client, run, "knn/loo1") == [(4, 1_700_000_100_000, 0.9)]
    assert run.data.params["data.name"] == "digits"
    assert run.data.params["data.cache"] == "null"
    assert len(run.data.params["long"]) == 6000
    tags = {k.partition(".")[2]: v for k, v in run.data.tags.items() if k.startswith("sightline.")}
    wanted = {"identity": "a1", "group": "g-a", "seed": "3", "stage": "knn", "worker": "main_knn", "code": "c0de"}
    assert wanted | {"state": "finished", "parents": "p1,p2"} == {k: tags[k] for k in (*wanted, "state", "parents")}
    assert run.data.tags["mlflow.source.git.commit"] == "abc"
    (artifact,) = client.list_artifacts(run.info.run_id, "figures")
    assert artifact.path == "figures/map.png"
    assert list((output_dir / "mlartifacts").rglob("map.png"))


def test_again_is_nothing(output_dir: Path, make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    make_run("a1", steps=3, metrics={"knn/loo1": 0.9})
    make_run("a2", steps=3, end="failed")
    make_run("a3")
    counted(output_dir, capsys)
    before = (output_dir / "mlflow.db").read_bytes()
    assert counted(output_dir, capsys) == {"new": 0, "grown": 0, "unchanged": 3, "left_out": 0, "metrics": 0}
    assert (output_dir / "mlflow.db").read_bytes() == before


def test_a_run_that_grew_sends_the_rest(
    output_dir: Path, make_run: MakeRun, log_steps: LogSteps, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run("a1", steps=3)
    with (folder / rundir.METRICS).open("a") as file:
        file.write('{"step": 4, "ti')  # being written
    counted(output_dir, capsys)
    log_steps(folder, range(4, 7))
    assert counted(output_dir, capsys) == {"new": 0, "grown": 1, "unchanged": 0, "left_out": 0, "metrics": 6}
    client, found = stored(output_dir)
    assert history(client, found["a1"]) == in_the_files(folder)
    assert len(history(client, found["a1"])) == 6


def test_a_journal_cut_back_by_a_resume_is_not_doubled(
    output_dir: Path, make_run: MakeRun, log_steps: LogSteps, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run("a1", steps=6)
    counted(output_dir, capsys)
    lines = (folder / rundir.METRICS).read_bytes().splitlines(keepends=True)
    (folder / rundir.METRICS).write_bytes(b"".join(lines[:3]))  # the checkpoint was older than what was sent
    log_steps(folder, range(4, 9), at=1_700_009_000)
    assert counted(output_dir, capsys)["metrics"] == 4
    client, found = stored(output_dir)
    assert [step for step, *_ in history(client, found["a1"])] == list(range(1, 9))


def test_a_run_made_again_with_other_code_replaces_the_old_one(
    output_dir: Path, make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run("a1", steps=2, metrics={"knn/loo1": 0.1})
    counted(output_dir, capsys)
    shutil.rmtree(output_dir / "main_knn" / "a1")
    make_run("a1", steps=2, metrics={"knn/loo1": 0.2}, code="newer")
    counted(output_dir, capsys)
    client, found = stored(output_dir)
    assert history(client, found["a1"], "knn/loo1") == [(2, 1_700_000_100_000, 0.2)]
    assert found["a1"].data.tags["sightline.code"] == "newer"


def test_code_that_changes_while_a_run_goes_on_changes_the_tag_only(
    output_dir: Path, make_run: MakeRun, log_steps: LogSteps, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run("a1", steps=2)
    counted(output_dir, capsys)
    path = folder / rundir.RUN
    path.write_text(path.read_text().replace("c0de", "newer"))
    log_steps(folder, range(3, 5))
    assert counted(output_dir, capsys) == {"new": 0, "grown": 1, "unchanged": 0, "left_out": 0, "metrics": 4}


def test_states_become_statuses(output_dir: Path, make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    make_run("finished", metrics={"m": 1.0})
    make_run("failed", end="failed")
    make_run("killed", end="killed")
    make_run("vanished", steps=1)
    make_run("stopped", end="stopped")
    make_run("waiting")
    (make_run("cancelled", end="stopped") / rundir.CANCELLED).touch()
    owner = rundir.claim(make_run("running", steps=1))
    counted(output_dir, capsys)
    _, found = stored(output_dir)
    assert {name: run.info.status for name, run in found.items()} == {
        "finished": "FINISHED",
        "failed": "FAILED",
        "killed": "KILLED",
        "vanished": "KILLED",
        "stopped": "SCHEDULED",
        "waiting": "SCHEDULED",
        "cancelled": "KILLED",
        "running": "RUNNING",
    }
    owner.release()
    assert counted(output_dir, capsys)["grown"] == 1
    assert stored(output_dir)[1]["running"].info.status == "KILLED"


def test_nan_and_infinities_arrive_once(
    output_dir: Path, make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run("a1", metrics={"a": math.nan, "b": math.inf, "c": 1.0})
    journal = rundir.Journal(folder / rundir.METRICS)
    for step in (1, 2):
        journal.append({"step": step, "time": 1.0, "train/loss": math.nan, "train/grad": -math.inf})
    journal.close()
    counted(output_dir, capsys)
    client, found = stored(output_dir)
    client.set_tag(found["a1"].info.run_id, mirror.SENT, mirror.SENDING)  # as if killed on the way
    assert counted(output_dir, capsys)["metrics"] == 0
    assert [(s, math.isnan(v)) for s, _, v in history(client, found["a1"])] == [(1, True), (2, True)]
    assert math.isnan(found["a1"].data.metrics["a"])
    assert found["a1"].data.metrics["b"] > 1e308
    assert [v < -1e308 for *_, v in history(client, found["a1"], "train/grad")] == [True, True]


def test_a_final_value_that_the_journal_has_is_not_sent_twice(
    output_dir: Path, make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run("a1", steps=4, metrics={"train/loss": 0.25, "train/lr": 0.2})
    assert counted(output_dir, capsys)["metrics"] == 4 + 4 + 1  # another learning rate than the journal's
    _, found = stored(output_dir)
    assert found["a1"].data.metrics == {"train/loss": 0.25, "train/lr": 0.2}


def test_odd_names_and_secrets(output_dir: Path, make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    config = {
        "env": {"db_password": "hunter2", "uri": "postgresql://me:hunter2@host/db", "setup": "export API_KEY=hunter2"},
        "mask token $ü": 1,
        "../x": 2,
    }
    make_run("a1", metrics={"acc@1 %": 0.5, "a//b": 0.1, "x" * 300: 0.2, "/": 0.3}, config=config)
    counted(output_dir, capsys)
    _, found = stored(output_dir)
    assert set(found["a1"].data.metrics) == {"acc_1 _", "a/b", "x" * 250, "_"}
    assert found["a1"].data.params["env.uri"] == "postgresql://me:***@host/db"
    assert "hunter2" not in str(found["a1"].data.params)
    assert b"hunter2" not in (output_dir / "mlflow.db").read_bytes()


def test_broken_runs_are_left_out_with_a_line(
    output_dir: Path, make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run("good", metrics={"m": 1.0})
    for name in ("newer", "cut"):
        make_run(name, metrics={"m": 1.0})
    path = output_dir / "main_knn" / "newer" / rundir.RUN
    path.write_text(path.read_text().replace('"schema": 1', '"schema": 9'))
    (output_dir / "main_knn" / "cut" / rundir.DONE).write_text("{")
    (output_dir / "main_knn" / "good" / rundir.CONFIG).write_text("a: [")
    assert go(output_dir, "--json") == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["left_out"] == 2
    assert [line.startswith("warning: ") for line in err.splitlines()] == [True] * 3
    assert [name in err for name in ("newer/run.json", "cut/done.json", "good/config.yaml")] == [True] * 3
    assert list(stored(output_dir)[1]) == ["good"]


# -- as people look at it ---------------------------------------------------------------------------------------------


def test_runs_can_be_found_by_study_row_column_and_stage(
    output_dir: Path, make_study: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    make_study()
    (output_dir / "main_lmim" / "aaa10" / rundir.ENCODER).write_bytes(b"weights")
    assert counted(output_dir, capsys)["new"] == 18
    assert counted(output_dir, capsys)["unchanged"] == 18
    client, found = stored(output_dir)
    experiments = [e.experiment_id for e in client.search_experiments()]
    filters = "tags.`sightline.study` = 'demo' and tags.`sightline.row` = 'Latent & <MIM>'"
    assert len(client.search_runs(experiments, filters)) == 9
    assert len(client.search_runs(experiments, f"{filters} and tags.`sightline.stage` = 'knn'")) == 3
    knn, parent = found["bb010"], found["aaa10"]
    assert client.get_parent_run(knn.info.run_id).info.run_id == parent.info.run_id
    assert knn.data.tags["sightline.column"] == "1-NN"
    assert "sightline.column" not in parent.data.tags
    assert parent.data.tags["sightline.encoder"] == (output_dir / "main_lmim" / "aaa10" / "encoder.pt").as_uri()
    assert "python launcher.py repro bb010" in knn.data.tags["mlflow.note.content"]
    make_study_again(output_dir, "other", ["aaa10"])
    assert counted(output_dir, capsys)["grown"] == 1
    tags = stored(output_dir)[1]["aaa10"].data.tags
    assert (tags["sightline.study"], tags["sightline.row"]) == ("demo, other", "demo: Latent & <MIM>")


def make_study_again(output_dir: Path, name: str, identities: list[str]) -> None:
    said = json.loads((output_dir / "studies" / "demo.json").read_text())
    said |= {"name": name, "identities": identities, "cells": []}
    (output_dir / "studies" / f"{name}.json").write_text(json.dumps(said))


def test_an_evaluation_that_comes_later_finds_its_parent(
    output_dir: Path, make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run("aaa1", worker="main_lmim", metrics={"m": 1.0})
    counted(output_dir, capsys)
    folder = make_run("bbb1", parents=("aaa1",), metrics={"m": 1.0})
    ingest.ingest([folder], store.choose(output_dir, None))
    client, found = stored(output_dir)
    assert client.get_parent_run(found["bbb1"].info.run_id).info.run_id == found["aaa1"].info.run_id


def test_what_a_finished_run_has_used_are_metrics_sent_once_its_supervisor_has_said_all(
    output_dir: Path, make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run("a1", steps=4)
    owner = rundir.claim(folder)
    done = {"metrics": {"m": 0.5}, "steps": 4, "time": 1_700_000_100.0, "peak_gpu_mb": 900}
    rundir.write_json(folder / rundir.DONE, done)
    assert counted(output_dir, capsys)["metrics"] == 9
    journal = rundir.Journal(rundir.attempts_file(folder, 0))
    end = {"event": "end", "attempt": "a1", "time": 1_700_000_101.0, "cause": "finished", "seconds": 1800}
    journal.append(end | {"gpu_seconds": 3600, "peak_rss_mb": 700})
    journal.close()
    owner.release()
    assert counted(output_dir, capsys)["metrics"] == 3
    assert counted(output_dir, capsys)["unchanged"] == 1
    client, found = stored(output_dir)
    costs = {k: v for k, v in found["a1"].data.metrics.items() if k.startswith("cost/")}
    assert costs == {"cost/gpu_hours": 1.0, "cost/peak_gpu_mb": 900.0, "cost/peak_rss_mb": 700.0}
    assert found["a1"].data.tags["sightline.hours"] == "1 GPU-h"
    client.set_tag(found["a1"].info.run_id, mirror.SENT, mirror.SENDING)  # as if killed on the way
    assert counted(output_dir, capsys)["metrics"] == 0


# -- killed, and several at once --------------------------------------------------------------------------------------


def start(output_dir: Path, statements: float = math.inf) -> multiprocessing.process.BaseProcess:
    """An ingester in a process of its own, forked because MLflow is imported here already. It is killed before its
    SQL statement of that number."""

    def count(*_: object) -> None:
        nonlocal statements
        statements -= 1
        if statements <= 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def child() -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sqlalchemy.event.listen(sqlalchemy.Engine, "before_cursor_execute", count)
        code = 1
        try:
            code = go(output_dir)
        finally:
            os._exit(code)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    return process


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # Python 3.12 about threads of MLflow's
def test_killed_at_random_moments_every_metric_arrives_once(
    output_dir: Path, make_run: MakeRun, log_steps: LogSteps, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [make_run(f"a{i}", steps=30) for i in range(6)]
    moments = random.Random(0)
    ends = []
    for turn in range(12):
        process = start(output_dir, moments.randrange(30, 120))
        process.join()
        ends.append(process.exitcode)
        log_steps(folders[turn % 6], range(31 + turn // 6, 32 + turn // 6))
    assert ends.count(-signal.SIGKILL) >= 8
    for i, folder in enumerate(folders):
        rundir.write_json(folder / rundir.DONE, {"metrics": {"m": i}, "steps": 40, "time": 1_700_000_300.0})
    counted(output_dir, capsys)
    client, found = stored(output_dir)
    assert sorted(found) == [folder.name for folder in folders]
    for folder in folders:
        assert history(client, found[folder.name]) == in_the_files(folder)
        assert len(history(client, found[folder.name], "m")) == 1
        assert found[folder.name].data.params["worker"] == "main_knn"
    assert counted(output_dir, capsys)["unchanged"] == 6


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_two_at_once_do_not_double(output_dir: Path, make_run: MakeRun) -> None:
    folders = [make_run(f"a{i}", steps=20, metrics={"m": 1.0}) for i in range(5)]
    both = [start(output_dir), start(output_dir)]
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    client, found = stored(output_dir)
    for folder in folders:
        assert history(client, found[folder.name]) == in_the_files(folder)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_24_at_once_on_a_fresh_store_all_arrive(output_dir: Path, make_run: MakeRun, store_file: Path) -> None:
    store_file.unlink()
    folder = make_run("a1", steps=5, metrics={"m": 1.0})
    every = [start(output_dir) for _ in range(24)]
    for process in every:
        process.join()
    assert [process.exitcode for process in every] == [0] * 24
    client, found = stored(output_dir)
    assert history(client, found["a1"]) == in_the_files(folder)
    assert not list(output_dir.glob(".mlflow.db.*"))


def test_watching_follows_the_files(
    output_dir: Path,
    make_run: MakeRun,
    log_steps: LogSteps,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = make_run("a1", steps=2)
    turns = iter(["nothing happens", "grows", "store is locked", "unlocked"])
    lock = store.Store.open

    def turn(_: float) -> None:
        match next(turns, None):
            case "grows":
                log_steps(folder, range(3, 5))
            case "store is locked":
                log_steps(folder, range(5, 6))
                monkeypatch.setattr(store.Store, "open", lambda self: (_ for _ in ()).throw(store.StoreError("down")))
            case "unlocked":
                monkeypatch.setattr(store.Store, "open", lock)
            case None:
                raise KeyboardInterrupt

    wait = ingest.threading.Event.wait
    between_passes = 5.0
    monkeypatch.setattr(
        ingest.threading.Event,
        "wait",
        lambda self, timeout=None: turn(timeout) if timeout == between_passes else wait(self, timeout),
    )
    with pytest.raises(KeyboardInterrupt):
        go(output_dir, "--json", "--watch", "5")
    out, err = capsys.readouterr()
    assert [json.loads(line)["metrics"] for line in out.splitlines()] == [4, 4, 2]
    assert err == "error: down\n"
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the watcher's own answer to it ends here


def test_a_watcher_follows_and_makes_one_last_pass_when_it_is_told_to_leave(
    output_dir: Path, make_run: MakeRun, log_steps: LogSteps
) -> None:
    folder = make_run("aaa", steps=3)
    command = [sys.executable, "-m", "analysis.ingest", "--output-dir", str(output_dir), "--watch", "600"]
    watcher = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert watcher.stdout is not None
    assert "1 new" in watcher.stdout.readline()
    log_steps(folder, range(4, 8))  # far from the next pass
    watcher.terminate()
    said, _ = watcher.communicate(timeout=60)
    assert watcher.returncode == 0
    assert "1 grown" in said
    client, runs_there = stored(output_dir)
    assert history(client, runs_there["aaa"]) == in_the_files(folder)


def test_many_runs_are_sent_by_several_processes_which_die_with_the_one_that_started_them(
    output_dir: Path, make_run: MakeRun, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [make_run(f"a{i:03}", steps=2, metrics={"m": 1.0}) for i in range(senders.MANY)]
    command = [sys.executable, "-m", "analysis.ingest", "--output-dir", str(output_dir)]
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    database = sqlalchemy.create_engine(f"sqlite:///{output_dir / 'mlflow.db'}")
    while first.poll() is None:
        with database.connect() as connection:
            if connection.execute(sqlalchemy.text("SELECT count(*) FROM runs")).scalar_one() >= 10:
                break
        time.sleep(0.05)
    family = psutil.Process(first.pid).children(recursive=True)
    assert len([p for p in family if "spawn_main" in " ".join(p.cmdline())]) == min(4, len(os.sched_getaffinity(0)))
    first.kill()
    first.wait()
    database.dispose()
    psutil.wait_procs(family, timeout=10)
    assert not [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    monkeypatch.setattr(senders, "MANY", 1000)  # by this process alone
    counted(output_dir, capsys)
    client, found = stored(output_dir)
    assert len(found) == len(folders)
    for folder in folders:
        assert history(client, found[folder.name]) == in_the_files(folder)
        assert found[folder.name].info.status == "FINISHED"
