"""A real Slurm for the whole session, and a house whose workers take no time and no torch."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from contract import rundir

ROOT = Path(__file__).resolve().parents[2]
BOX = ROOT / "cluster_scripts" / "slurm_box"
REQUIRED = "slurm" in os.environ.get("SIGHTLINE_REQUIRE", "").split(",")

WORKER = """
import json, os, sys, time
from pathlib import Path
import yaml
from contract import rundir

folder = Path(sys.argv[1])
config = yaml.safe_load((folder / "config.yaml").read_text())
steps, rank = config.get("epochs", 1), os.environ.get("RANK", "0")
checkpoint = folder / "checkpoint.pt"
step = int(checkpoint.read_text()) if checkpoint.exists() else 0
print("rank", rank, "devices", os.environ.get("CUDA_VISIBLE_DEVICES"), "VERSION 1", flush=True)
if os.environ.get("FAKE_FAIL") == str(config["seed"]) and not (folder / "mended").exists():
    raise ValueError(f"seed {config['seed']} is unlucky")
while step < steps:
    time.sleep(float(os.environ.get("FAKE_STEP_S", "0")))
    if not os.environ.get("FAKE_STUCK"):
        step += 1
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, "of": steps, "time": time.time(), "train/loss": 1 / step}) + "\\n")
        checkpoint.write_text(str(step))
    if (folder / f"stop.{os.environ['SIGHTLINE_ATTEMPT']}").exists():
        sys.exit(0)
(folder / "encoder.pt").write_text(str(config["seed"]))
rundir.write_json(folder / "done.json", {"metrics": {"knn/top1": 0.5}})
"""


@dataclass
class Cluster:
    folder: Path

    def box(self, *words: str) -> str:
        return subprocess.check_output([sys.executable, str(BOX), *words], text=True)

    def call(self, *words: str) -> str:
        return subprocess.check_output(words, text=True).strip()

    def queue(self) -> list[str]:
        return self.call("squeue", "-h", "-r", "-o", "%F_%K %T %r").splitlines()


@dataclass
class House:
    root: Path
    out: Path

    def start(self, *words: str, **more: str) -> subprocess.Popen[str]:
        env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"COLUMNS": "200"} | more
        return subprocess.Popen(
            [sys.executable, str(self.root / "launcher.py"), *words],
            cwd=self.root,
            env=env,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def run(self, *words: str, code: int = 0, **more: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*words, **more)
        out, err = process.communicate(timeout=60)
        assert process.returncode == code, err
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    def runs(self) -> list[Path]:
        return sorted(p.parent for p in self.out.glob("*/*/run.json"))

    def all(self, state: str) -> bool:
        """All runs, with all that is written about them."""
        over = state == "running" or not any(self.out.glob(f"*/*/{rundir.OWNER}"))
        return bool(self.runs()) and over and all(rundir.state(folder) == state for folder in self.runs())

    def said(self) -> str:
        """Everything there is to read when a test failed."""
        files = [*self.out.glob("submissions/*/logs/*"), *self.out.glob("*/*/log.txt"), *self.out.glob("*/*/attempts*")]
        return "\n".join(f"-- {path.relative_to(self.out)}\n{path.read_text()}" for path in files)

    @staticmethod
    def steps(folder: Path) -> list[int]:
        return [line["step"] for line in rundir.read_journal(folder / rundir.METRICS)[0]]

    @staticmethod
    def causes(folder: Path) -> list[str]:
        return [r["cause"] for r in rundir.attempts(folder) if r["event"] == "end"]

    def wait_for(self, condition: Callable[[], object], timeout: float = 40) -> None:
        end = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < end, f"waited in vain\n{self.said()}"
            time.sleep(0.1)


@pytest.fixture(scope="session")
def cluster():
    problem = None
    if os.getuid() != 0:
        problem = "slurm_box needs root"
    elif shutil.which("slurmctld", path=f"{os.environ['PATH']}:/usr/sbin") is None:
        problem = "slurmctld is not installed; cluster_scripts/slurm_box start --install DIR gets it"
    if problem and not REQUIRED:
        pytest.skip(problem)
    folder = Path(tempfile.mkdtemp(prefix="box"))  # short, for unix sockets
    made = Cluster(folder)
    install = ["--install"] if problem and os.getuid() == 0 else []
    made.box("start", *install, str(folder))
    try:
        for line in made.box("env", str(folder)).splitlines():
            key, _, value = line.removeprefix("export ").partition("=")
            os.environ[key] = value.strip("'\"")
        yield made
    finally:
        made.box("stop", str(folder))
        os.environ.pop("SLURM_CONF", None)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def house(cluster):
    """Removed before the next test, with all of its jobs."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-house"))
    root = folder / "house"
    root.mkdir()
    for name in ("launcher", "contract", "configs"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("launcher.py", "setup.cfg"):
        shutil.copy(ROOT / name, root)
    for package in ("workers", "analysis"):
        (root / package).mkdir()
        (root / package / "__init__.py").touch()
    for name in ("main_lmim", "main_knn", "main_linprobe"):
        (root / "workers" / f"{name}.py").write_text(WORKER)
    made = House(root, root / "runs")
    yield made
    cluster.call("scancel", "-u", "root")
    made.wait_for(lambda: not cluster.queue())
    shutil.rmtree(folder, ignore_errors=True)
