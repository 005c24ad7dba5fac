"""The same ingester against a real MLflow server and a real PostgreSQL, both private to the test session."""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from analysis import ingest, mirror, runs, store
from contract import rundir

MakeRun = Callable[..., Path]
LogSteps = Callable[..., None]
PASSWORD = "hunter2/%@"
ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """A store that can be stopped and started."""

    uri: str

    def start(self) -> None:
        raise NotImplementedError

    def stop(self) -> None:
        raise NotImplementedError


class Mlflow(Server):
    def __init__(self, database: Path, folder: Path):
        port = free_port()
        self.uri = f"http://127.0.0.1:{port}"
        self.command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
        self.command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{database}"]
        self.command += ["--artifacts-destination", str(folder / "artifacts")]
        self.log = folder / "server.log"

    def start(self) -> None:
        with self.log.open("ab") as log:
            env = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
            self.process = subprocess.Popen(self.command, env=env, stdout=log, stderr=log, start_new_session=True)
        for _ in range(600):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.uri}/health"):
                return
            time.sleep(0.1)
        pytest.fail(f"no MLflow server: {self.log.read_text()}")

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Postgres(Server):
    def __init__(self, programs: Path):
        self.programs = programs
        self.folder = Path(tempfile.mkdtemp(prefix="sightline-pg-"))  # below /tmp: a socket's path must be short
        self.user = {"user": "postgres"} if os.getuid() == 0 else {}  # it refuses to run as root
        if self.user:
            shutil.chown(self.folder, "postgres")
        password = self.folder / "password"
        password.write_text(PASSWORD + "\n")
        password.chmod(0o644)
        self._run("initdb", "-U", "me", "--auth=scram-sha-256", f"--pwfile={password}", "--no-sync")
        quoted = "hunter2%2F%25%40"
        self.uri = f"postgresql://me:{quoted}@/postgres?host={self.folder}"

    def start(self) -> None:
        options = f"-k {self.folder} -c listen_addresses='' -c fsync=off"
        self._run("pg_ctl", "-w", "-l", str(self.folder / "log"), "-o", options, "start")

    def stop(self) -> None:
        self._run("pg_ctl", "-w", "-m", "immediate", "stop")

    def _run(self, program: str, *args: str) -> None:
        command = [str(self.programs / program), "-D", str(self.folder / "data"), *args]
        subprocess.run(command, check=True, cwd=self.folder, stdout=subprocess.DEVNULL, **self.user)  # type: ignore[call-overload]


@pytest.fixture(scope="session")
def http(template_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    server = Mlflow(Path(shutil.copy(template_store, folder / "mlflow.db")), folder)
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def postgres() -> Iterator[Server]:
    places = [*map(Path, os.environ["PATH"].split(os.pathsep)), *Path("/usr/lib/postgresql").glob("*/bin")]
    programs = next((place for place in places if (place / "initdb").exists()), None)
    try:
        import psycopg  # noqa: F401
    except ImportError:
        programs = None
    if programs is None:
        missing = "no PostgreSQL: apt-get install postgresql; pip install 'psycopg[binary]'"
        if "postgres" in os.environ.get("SIGHTLINE_REQUIRE", ""):
            pytest.fail(missing)
        pytest.skip(missing)
    server = Postgres(programs.resolve() if programs.is_symlink() else programs)
    server.start()
    yield server
    with contextlib.suppress(subprocess.CalledProcessError):
        server.stop()
    shutil.rmtree(server.folder)


@pytest.fixture(params=["http", "postgres"])
def server(request: pytest.FixtureRequest) -> Server:
    found: Server = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """Identities of one test: the servers are shared."""
    return request.node.name.replace("_", "").replace("[", "").replace("]", "")


def go(output_dir: Path, server: Server, *args: str) -> int:
    return ingest.main(["--output-dir", str(output_dir), "--store", server.uri, *args])


def stored(server: Server, identity: str) -> tuple[MlflowClient, Run]:
    client = MlflowClient(store.choose(Path(), server.uri).uri)
    experiments = [e.experiment_id for e in client.search_experiments()]
    (run,) = client.search_runs(experiments, f"tags.`sightline.identity` = '{identity}'")
    return client, run


def history(client: MlflowClient, run: Run, key: str = "train/loss") -> list[tuple[int, int, float]]:
    return [(m.step, m.timestamp, m.value) for m in client.get_metric_history(run.info.run_id, key)]


def in_the_files(folder: Path, key: str = "train/loss") -> list[tuple[int, int, float]]:
    records, _ = rundir.read_journal(folder / rundir.METRICS)
    return [(p.step, round(p.time * 1000), p.value) for p in runs.points(records) if p.key == key]


def test_a_run_is_mirrored_grows_and_is_sent_once(
    output_dir: Path,
    make_run: MakeRun,
    log_steps: LogSteps,
    server: Server,
    name: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = make_run(name, steps=3, config={"a": {"b": "x" * 9000}})
    (folder / rundir.FIGURES).mkdir()
    (folder / rundir.FIGURES / "map.png").write_bytes(b"picture")
    counts = []
    for turn in range(4):
        assert go(output_dir, server, "--json") == 0
        counts.append(json.loads(capsys.readouterr().out)["metrics"])
        if turn == 1:
            log_steps(folder, range(4, 1000))  # more than one batch
            rundir.write_json(folder / rundir.DONE, {"metrics": {"m": math.nan}, "steps": 999, "time": 1_700_001_000})
        if turn == 2:  # as if killed after the metrics
            client, run = stored(server, name)
            client.set_tag(run.info.run_id, mirror.SENT, mirror.SENDING)
    assert counts == [6, 0, 2 * 996 + 1, 0]
    client, run = stored(server, name)
    assert run.info.status == "FINISHED"
    assert len(run.data.params["a.b"]) == 6000
    assert history(client, run) == in_the_files(folder)
    assert [math.isnan(v) for *_, v in history(client, run, "m")] == [True]
    assert [a.path for a in client.list_artifacts(run.info.run_id, "figures")] == ["figures/map.png"]


def test_what_the_store_has_is_not_stored_twice(output_dir: Path, make_run: MakeRun, server: Server, name: str) -> None:
    make_run(name, steps=3, metrics={"m": math.nan})
    go(output_dir, server)
    client, run = stored(server, name)
    for key in run.data.metrics:  # MLflow's own guard, beneath ours: equal points are one point
        before = client.get_metric_history(run.info.run_id, key)
        client.log_batch(run.info.run_id, before)
        assert len(client.get_metric_history(run.info.run_id, key)) == len(before)


def start(output_dir: Path, server: Server) -> multiprocessing.process.BaseProcess:
    """An ingester in a process of its own, forked because MLflow is imported here already."""
    uri = server.uri
    if isinstance(server, Postgres):  # another address of the same store: no connection of this process is shared
        uri += f"&application_name={time.monotonic_ns()}"

    def child() -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = 1
        try:
            code = ingest.main(["--output-dir", str(output_dir), "--store", uri])
        finally:
            os._exit(code)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    return process


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # Python 3.12 about threads of MLflow's
def test_killed_and_two_at_once(output_dir: Path, make_run: MakeRun, server: Server, name: str) -> None:
    folders = [make_run(f"{name}{i}", steps=40, metrics={"m": 1.0}) for i in range(4)]
    twin = output_dir.with_name("twin")  # another person's copy of the same runs: another lock, the same store
    shutil.copytree(output_dir, twin)
    for moment in (0.15, 0.3, 0.6):
        process = start(output_dir, server)
        process.join(moment)
        process.kill()
        process.join()
    assert go(output_dir, server) == 0  # the lease of the killed one is ours
    shutil.rmtree(output_dir / "main_knn" / f"{name}0")
    both = [start(folder, server) for folder in (output_dir, twin)]
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    for folder in folders:
        client, run = stored(server, folder.name)
        assert history(client, run) == in_the_files(twin / "main_knn" / folder.name)


def refused(output_dir: Path, uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ingest.main(["--output-dir", str(output_dir), "--store", uri]) == 3
    out, err = capsys.readouterr()
    assert not out
    assert err.count("\n") == 1
    assert "does not answer; is the server up?" in err
    assert "hunter2" not in err


def test_a_server_that_goes_and_comes_back(
    output_dir: Path, make_run: MakeRun, postgres: Server, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run(name, steps=3, metrics={"m": 1.0})
    postgres.stop()
    refused(output_dir, postgres.uri, capsys)
    postgres.start()
    assert go(output_dir, postgres) == 0
    client, run = stored(postgres, name)
    assert history(client, run) == in_the_files(folder)


def test_watching_through_a_server_that_is_killed_and_comes_back(
    output_dir: Path, make_run: MakeRun, log_steps: LogSteps, template_store: Path, tmp_path: Path, name: str
) -> None:
    server = Mlflow(Path(shutil.copy(template_store, tmp_path / "mlflow.db")), tmp_path)
    server.start()
    folder = make_run(name, steps=50)
    words = [sys.executable, "-m", "analysis.ingest", "--output-dir", str(output_dir), "--store", server.uri]
    said, told = tmp_path / "out", tmp_path / "err"
    with said.open("w") as out, told.open("w") as err:
        watcher = subprocess.Popen([*words, "--watch", "0.1"], cwd=ROOT, stdout=out, stderr=err)
    try:
        wait_for(lambda: "1 new" in said.read_text())
        for step in range(51, 1000):
            log_steps(folder, range(step, step + 1))
            if step == 200:
                server.stop()  # kill -9, most likely in the middle of a pass
            time.sleep(0.002)
        wait_for(lambda: "does not answer" in told.read_text())
        server.start()
        wait_for(lambda: stored(server, name)[1].data.metrics.get("train/loss") == 1 / 999)
        rundir.write_json(folder / rundir.DONE, {"metrics": {"m": 1.0}, "steps": 999, "time": 1_700_001_000})
        watcher.terminate()
        assert watcher.wait(60) == 0
        client, run = stored(server, name)
        assert history(client, run) == in_the_files(folder)
        assert (run.info.status, run.data.metrics["m"]) == ("FINISHED", 1.0)
        assert told.read_text().count("error:") == 1  # said once, not at every pass
    finally:
        watcher.kill()
        watcher.wait()
        server.stop()


def wait_for(condition: Callable[[], object], timeout: float = 100) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def test_a_server_that_is_not_there(output_dir: Path, make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    make_run("a1", steps=3)
    refused(output_dir, f"http://me:hunter2@127.0.0.1:{free_port()}", capsys)


def test_a_wrong_password_is_told_and_none_is_kept(
    output_dir: Path, make_run: MakeRun, postgres: Server, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(name, steps=1)
    wrong = postgres.uri.replace("hunter2", "wrong2")
    assert ingest.main(["--output-dir", str(output_dir), "--store", wrong]) == 3
    assert go(output_dir, postgres) == 0
    out, err = capsys.readouterr()
    assert "the user or the password was refused" in err
    assert not [secret for secret in ("wrong2", "hunter2") if secret in out + err]
    kept = b"".join(path.read_bytes() for path in output_dir.rglob("*") if path.is_file())
    assert b"hunter2" not in kept
    assert b"wrong2" not in kept


def test_the_environment_names_the_store(
    output_dir: Path, make_run: MakeRun, http: Server, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(name, steps=1)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", http.uri)
    assert ingest.main(["--output-dir", str(output_dir)]) == 0
    assert stored(http, name)
    assert not (output_dir / "mlflow.db").exists()
