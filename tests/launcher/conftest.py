"""A house of its own for a test: our launcher, contract and configs, with workers that take no time and no torch."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import settings

from launcher import plan

settings.register_profile("shared", deadline=None)  # another process may have the machine for a while
settings.load_profile("shared")

ROOT = Path(__file__).resolve().parents[2]

WORKER = """
import json, os, sys, time
from pathlib import Path
import yaml
from contract import rundir

folder = Path(sys.argv[1])
config = yaml.safe_load((folder / "config.yaml").read_text())
assert rundir.read_json(folder / rundir.OWNER)["attempt"] == os.environ["SIGHTLINE_ATTEMPT"]
steps, rank = config.get("epochs", 1), os.environ.get("RANK", "0")
checkpoint = folder / "checkpoint.pt"
step = int(checkpoint.read_text()) if checkpoint.exists() else 0
print("threads", os.environ["OMP_NUM_THREADS"], "rank", rank, flush=True)
if os.environ.get("FAKE_FAIL") == str(config["seed"]):
    raise ValueError(f"seed {config['seed']} is unlucky")
while step < steps:
    time.sleep(float(os.environ.get("FAKE_STEP_S", "0")))
    step += 1
    if rank == "0":
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, "of": steps, "time": time.time(), "train/loss": 1 / step}) + "\\n")
        checkpoint.write_text(str(step))
    asked = (folder / f"stop.{os.environ['SIGHTLINE_ATTEMPT']}").exists()
    if asked and not os.environ.get("FAKE_DEAF"):
        sys.exit(0)
if rank == "0":
    (folder / "encoder.pt").write_text(str(config["seed"]))
    rundir.write_json(folder / "done.json", {"metrics": {"knn/top1": 0.5}})
"""


@dataclass
class House:
    root: Path
    out: Path

    def environ(self, **more: str) -> dict[str, str]:
        clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "CUDA_VISIBLE_DEVICES")}
        return {**clean, "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200", **more}

    def start(self, *words: str, **more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, str(self.root / "launcher.py"), *words],
            cwd=self.root,
            env=self.environ(**more),
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def run(self, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*words, **more)
        out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    def runs(self) -> list[Path]:
        return sorted(p.parent for p in self.out.glob("*/*/run.json"))

    def attempts(self, folder: Path) -> list[dict[str, object]]:
        return [json.loads(line) for line in (folder / "attempts.0.jsonl").read_text().splitlines()]

    @staticmethod
    def wait_for(condition: Callable[[], object], timeout: float = 30) -> None:
        end = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < end, "waited in vain"
            time.sleep(0.05)

    def processes(self) -> list[str]:
        """Command lines of all that still runs for this house."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = path.read_bytes().decode(errors="replace").replace("\0", " ")
            except OSError:
                continue
            if str(self.out) in words:
                found.append(words)
        return found


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    """Plans must not depend on the machine that the tests run on."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    plan.visible_gpus.cache_clear()
    yield
    plan.visible_gpus.cache_clear()


@pytest.fixture
def house(tmp_path):
    root = tmp_path / "house"
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
    (root / "analysis" / "ingest.py").write_text(
        "import sys\nfrom pathlib import Path\nPath(sys.argv[2], 'ingested').write_text(' '.join(sys.argv))\n"
    )
    (root / "analysis" / "tables.py").write_text("import sys\nprint(*sys.argv[1:])\nsys.exit(7)\n")
    made = House(root, root / "runs")
    yield made
    for path in Path("/proc").glob("[0-9]*/cmdline"):  # what a failed test left, found by this test's own folder
        try:
            if str(tmp_path) in path.read_bytes().decode(errors="replace"):
                os.kill(int(path.parent.name), signal.SIGKILL)
        except OSError:
            continue
