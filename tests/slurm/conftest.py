"""Two real clusters for the whole session: one that takes what comes, and one that is strict."""

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.house import ROOT, House, build

BOX = ROOT / "cluster_scripts" / "slurm_box"
REQUIRED = "slurm" in os.environ.get("SIGHTLINE_REQUIRE", "").split(",")


@dataclass
class Cluster:
    folder: Path
    conf: str = ""

    def box(self, *words: str) -> str:
        return subprocess.check_output([sys.executable, str(BOX), *words], text=True)

    def call(self, *words: str, **more: str) -> str:
        env = {**os.environ, "SLURM_CONF": self.conf, **more}
        return subprocess.check_output(words, text=True, env=env).strip()

    def queue(self) -> list[str]:
        return self.call("squeue", "-h", "-r", "-o", "%F_%K %T %r").splitlines()

    def empty(self) -> None:
        self.call("scancel", "-u", "root")


def start(*options: str) -> Cluster:
    problem = None
    if os.getuid() != 0:
        problem = "slurm_box needs root"
    elif shutil.which("slurmctld", path=f"{os.environ['PATH']}:/usr/sbin") is None:
        problem = "slurmctld is not installed; cluster_scripts/slurm_box start --install DIR gets it"
    if problem and not REQUIRED:
        pytest.skip(problem)
    made = Cluster(Path(tempfile.mkdtemp(prefix="box")))  # short, for unix sockets
    install = ["--install"] if problem and os.getuid() == 0 else []
    made.box("start", *install, str(made.folder), *options)
    made.conf = made.box("env", str(made.folder)).partition("SLURM_CONF=")[2].splitlines()[0].strip("'\"")
    return made


def stop(cluster: Cluster) -> None:
    cluster.box("stop", str(cluster.folder))
    shutil.rmtree(cluster.folder, ignore_errors=True)


@pytest.fixture(scope="session")
def cluster():
    made = start()
    yield made
    stop(made)


@pytest.fixture(scope="session")
def strict_cluster():
    """Of a site with limits: accounts that must exist, short arrays, few jobs a user."""
    made = start(
        *("--nodes", "1", "--set", "MaxArraySize=9", "--set", "AccountingStorageEnforce=associations,limits"),
        *("--partition", "PartitionName=main Default=YES Nodes=ALL MaxTime=60"),
    )
    made.call("sacctmgr", "-i", "add", "account", "lab")
    made.call("sacctmgr", "-i", "add", "user", "root", "account=lab")
    yield made
    stop(made)


class QueueHouse(House):
    def run(self, *words: str, code: int | None = 0, **more: str) -> subprocess.CompletedProcess[str]:
        return super().run(*words, code=code, **more)


def live_in(cluster: Cluster, monkeypatch: pytest.MonkeyPatch):
    """A house whose jobs go to this cluster. Removed before the next test, with all of its jobs."""
    monkeypatch.setenv("SLURM_CONF", cluster.conf)
    folder = Path(tempfile.mkdtemp(prefix="slurm-house"))
    built = build(folder / "house")
    made = QueueHouse(built.root, built.out)
    yield made
    cluster.empty()
    made.wait_for(lambda: not cluster.queue())
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def house(cluster, monkeypatch):
    yield from live_in(cluster, monkeypatch)


@pytest.fixture
def strict_house(strict_cluster, monkeypatch):
    yield from live_in(strict_cluster, monkeypatch)
