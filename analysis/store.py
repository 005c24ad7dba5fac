"""The MLflow store: which one, opened without harm, by one writer at a time. Every trouble is one line, ``StoreError``.

MLflow is imported only when a store is opened: that takes seconds.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import re
import socket
import sqlite3
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient
    from sqlalchemy import Engine

WAIT_S = 600.0  # how long one ingester waits for another
LEASE_S = 120.0  # an ingester on another machine that was silent for so long is dead
BUSY_S = 20.0  # how long SQLite waits for another program's lock; MLflow's own choice
LEASE = "sightline.lease"

# No telemetry, no lines of its own, and an answer within seconds from a server that is down.
SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",
}


class StoreError(Exception):
    """The store takes nothing now; nothing is lost, the same command will do later. ``locked``: worth a retry."""

    def __init__(self, message: str, locked: bool = False):
        super().__init__(message)
        self.locked = locked


class Older(StoreError):
    """Made by an older MLflow, which would be upgraded without a word by merely opening it."""

    def __init__(self, store: Store, schema: str):
        how = "python launcher.py ingest --upgrade keeps a copy and upgrades it"
        if store.file is None:
            how = f"back it up (pg_dump), then: mlflow db upgrade '{store.shown}'"
        super().__init__(f"{store.shown}: made by an older MLflow (schema {schema}); {how}")
        self.schema = schema


def prepare() -> None:
    """Imports MLflow, for the first time in seconds, and keeps it quiet."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    import mlflow.tracking

    logging.getLogger("alembic").setLevel(logging.ERROR)
    logging.getLogger(mlflow.__name__).setLevel(logging.CRITICAL)  # its lines come as ours


@dataclass(frozen=True)
class Store:
    uri: str  # may hold a password: to be shown as ``shown`` only
    output_dir: Path

    @property
    def shown(self) -> str:
        return self.clean(self.uri)

    def clean(self, text: str) -> str:
        """``text`` without the store's password."""
        found = re.findall(r"://[^/@:]*:(.*)@|[?&]password=([^&]*)", self.uri)
        for secret in {form for pair in found for each in pair if each for form in (each, unquote(each))}:
            text = text.replace(secret, "***")
        return text

    @property
    def file(self) -> Path | None:
        """The database of an SQLite store."""
        return Path(self.uri.removeprefix("sqlite:///")) if self.uri.startswith("sqlite:///") else None

    @property
    def artifacts(self) -> str | None:
        """Where figures go: beside the database; a server decides for itself."""
        if self.uri.startswith("http"):
            return None
        return ((self.file.parent if self.file else self.output_dir) / "mlartifacts").as_uri()

    # -- one writer ---------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def alone(self, wait: float | None = None) -> Iterator[None]:
        """The lock of this store; it dies with its process. Raises StoreError where another does not let go of it."""
        if self.file:
            path = self.file.with_name(f"{self.file.name}.lock")
        else:
            path = self.output_dir / ".cache" / f"ingest-{hashlib.blake2b(self.uri.encode()).hexdigest()[:12]}.lock"
        deadline = time.monotonic() + (WAIT_S if wait is None else wait)
        try:
            if not self.file:
                path.parent.mkdir(exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise StoreError(f"{path}: cannot be written ({error.strerror})") from None
        try:
            while True:
                try:
                    fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except (BlockingIOError, PermissionError):
                    if time.monotonic() > deadline:
                        holder = os.pread(handle, 200, 0).decode(errors="replace").strip()
                        raise StoreError(f"{self.shown}: another ingest writes to it ({holder}); try later") from None
                    time.sleep(0.1)
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
            yield
        finally:
            os.close(handle)

    # -- opening ------------------------------------------------------------------------------------------------------

    def open(self) -> MlflowClient:
        """A client of a store that answers and has today's schema; a fresh one is initialised. Raises StoreError."""
        prepare()
        with self.explained():
            if self.file:
                self._make(self.file)
            if not self.uri.startswith("http"):
                self._check_schema()
            client = self.client()
            client.search_experiments(max_results=1)
        return client

    def client(self) -> MlflowClient:
        """Of a store that was opened before."""
        prepare()
        from mlflow.tracking import MlflowClient

        return MlflowClient(self.uri)

    def _make(self, file: Path) -> None:
        """A fresh SQLite store appears by rename: a process killed on the way leaves no half of one."""
        if file.exists() and file.stat().st_size:
            if not os.access(file, os.W_OK) or not os.access(file.parent, os.W_OK):
                raise StoreError(f"{self.shown}: read-only; nothing was written")
            return
        if not file.parent.is_dir():
            raise StoreError(f"{self.shown}: there is no folder {file.parent}")
        from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

        partial = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}")
        try:
            store = SqlAlchemyStore(f"sqlite:///{partial}", self.artifacts)  # type: ignore[no-untyped-call]  # theirs
            store.engine.dispose()
            partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)

    def _check_schema(self) -> None:
        """MLflow itself would upgrade an older store without a word."""
        import mlflow.store.db_migrations
        import sqlalchemy
        from alembic.migration import MigrationContext
        from alembic.script import ScriptDirectory

        busy = {"timeout": BUSY_S} if self.file else {"connect_timeout": 10}
        engine: Engine = sqlalchemy.create_engine(self.uri, connect_args=busy)
        try:
            with engine.connect() as connection:
                found = MigrationContext.configure(connection).get_current_revision()
                empty = not sqlalchemy.inspect(connection).get_table_names()
        finally:
            engine.dispose()
        if empty:
            return
        script = ScriptDirectory(next(iter(mlflow.store.db_migrations.__path__)))
        if found == script.get_current_head():
            return
        if found is None:
            raise StoreError(f"{self.shown}: a database, but not an MLflow store")
        if found not in {revision.revision for revision in script.walk_revisions()}:
            raise StoreError(f"{self.shown}: made by a newer MLflow (schema {found}); update mlflow here")
        raise Older(self, found)

    def upgrade(self) -> Path | None:
        """An older SQLite store becomes one of today's; the old one is kept, at the path returned. None: nothing to do.

        A copy is upgraded and takes the place of the original at the end: killed on the way, the original is as it was.
        """
        prepare()
        with self.alone(), self.explained():
            try:
                self._check_schema()
                return None
            except Older as error:
                if self.file is None:
                    raise
                kept = self.file.with_name(f"{self.file.name}.schema-{error.schema}")
            if kept.exists():
                kept = kept.with_name(f"{kept.name}-{time.strftime('%Y%m%d-%H%M%S')}")
            partial = self.file.with_name(f".{self.file.name}.{uuid.uuid4().hex[:8]}")
            try:
                before = _written(self.file)
                _copy(self.file, partial)
                words = [sys.executable, "-m", "mlflow", "db", "upgrade", f"sqlite:///{partial}"]
                done = subprocess.run(words, capture_output=True, text=True, check=False)
                if done.returncode:
                    last = next(iter(done.stderr.strip().splitlines()[-1:]), "no word")
                    raise StoreError(f"{self.shown}: MLflow cannot upgrade it ({last}); it is as it was")
                if _written(self.file) != before:
                    raise StoreError(f"{self.shown}: another program (mlflow ui?) wrote to it; end that and try again")
                os.link(self.file, kept)
                partial.replace(self.file)
            finally:
                partial.unlink(missing_ok=True)
            self._check_schema()
        return kept

    # -- troubles -----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Whatever the store raises inside becomes a StoreError of one line, without the password."""
        from mlflow.exceptions import MlflowException
        from requests.exceptions import RequestException
        from sqlalchemy.exc import SQLAlchemyError

        try:
            yield
        except ModuleNotFoundError as error:
            raise StoreError(f"{self.shown}: needs the package {error.name}: pip install 'psycopg[binary]'") from None
        except (MlflowException, SQLAlchemyError, RequestException, OSError) as error:
            raise self._explain(error) from error

    def _explain(self, error: BaseException) -> StoreError:
        text = str(error)
        for pattern, meaning in MEANINGS:
            if re.search(pattern, text, re.IGNORECASE):
                return StoreError(f"{self.shown}: {meaning}", locked=meaning is LOCKED)
        line = next(iter(text.splitlines()), type(error).__name__)
        return StoreError(f"{self.shown}: {self.clean(line)[:300]}")


def _written(file: Path) -> tuple[int, int]:
    return file.stat().st_mtime_ns, file.stat().st_size


def _copy(file: Path, to: Path) -> None:
    """A whole SQLite database, also while others write to it."""
    with contextlib.closing(sqlite3.connect(file)) as old, contextlib.closing(sqlite3.connect(to)) as new:
        old.backup(new)


LOCKED = "locked by another program; nothing is lost, try again"
MEANINGS = (
    (r"database is locked", LOCKED),
    (r"readonly database|read-only (file system|transaction)", "read-only; nothing was written"),
    (r"unable to open database file", "cannot be opened"),
    (r"not a database|malformed", "not an MLflow store, or a damaged one"),
    (r"database or disk is full|no space left", "the disk is full"),
    (r"authentication failed|no password supplied|\b40[13]\b", "the user or the password was refused"),
    (
        r"connection refused|max retries exceeded|could not (connect|translate)|name or service|timed? ?out"
        r"|no such file|server closed the connection|connection (failed|reset|aborted)|starting up|shutting down",
        "does not answer; is the server up? Nothing is lost, the same command sends it later",
    ),
)


def choose(output_dir: Path, uri: str | None) -> Store:
    """``--store``, or MLFLOW_TRACKING_URI, or ``mlflow.db`` in the output directory. Raises ValueError for others."""
    output_dir = output_dir.resolve()
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{output_dir / 'mlflow.db'}"
    kind, _, rest = uri.partition("://")
    if kind == "sqlite" and rest.startswith("/") and len(rest) > 1 and "?" not in rest:
        return Store(f"sqlite:///{Path(rest[1:]).absolute()}", output_dir)
    if kind in ("postgres", "postgresql"):
        return Store(f"postgresql+psycopg://{rest}", output_dir)
    if kind in ("http", "https", "postgresql+psycopg", "postgresql+psycopg2"):
        return Store(uri, output_dir)
    raise ValueError(f"store {kind}: expected sqlite:///FILE, postgresql://USER@HOST/NAME or http://HOST:PORT")


class Lease:
    """The right to write one experiment of a store that several machines share, as a tag; taken over when it is silent.

    The lock of the output directory comes first: a lease in its name is ours, left by a process that was killed.
    """

    def __init__(self, client: MlflowClient, experiment_id: str, store: Store):
        self.client, self.experiment_id, self.store = client, experiment_id, store
        self.owner = f"{socket.gethostname()}:{store.output_dir}"
        self.mine = f"{self.owner} {uuid.uuid4().hex[:8]}"
        self.until = 0.0

    def __enter__(self) -> Lease:
        deadline = time.monotonic() + WAIT_S
        while True:
            holder = self._read()
            match = re.fullmatch(r"(.*) \w{8} (\d+)", holder)
            if match is None or match[1] == self.owner or int(match[2]) < time.time():
                self._write()
                time.sleep(0.3)  # had another the same thought? The last one to write has it
                if self._read().startswith(self.mine):
                    return self
            if time.monotonic() > deadline:
                raise StoreError(f"{self.store.shown}: another ingest writes to it ({holder}); try later")
            time.sleep(0.5)

    def keep(self) -> None:
        """To be called now and then."""
        if time.time() > self.until - LEASE_S * 2 / 3:
            if not self._read().startswith(self.mine):
                raise StoreError(f"{self.store.shown}: another ingest took over, this one was silent for too long")
            self._write()

    def __exit__(self, *_: object) -> None:
        if self._read().startswith(self.mine):
            self.client.set_experiment_tag(self.experiment_id, LEASE, "")

    def _read(self) -> str:
        return str(self.client.get_experiment(self.experiment_id).tags.get(LEASE, ""))

    def _write(self) -> None:
        self.until = time.time() + LEASE_S
        self.client.set_experiment_tag(self.experiment_id, LEASE, f"{self.mine} {self.until:.0f}")
