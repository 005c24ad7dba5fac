"""Run directories without the launcher, and the real workers in them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import contract.settings
from contract import rundir

ROOT = Path(__file__).resolve().parents[2]
TINY = {  # a Latent MIM that trains in seconds on noise
    "worker": "main_lmim",
    "data": {"name": "fake", "size": 16, "length": 96},
    "grid_size": 4,
    "num_vis": 5,
    "epochs": 3,
    "batch_size": 8,
    "eval_freq": 1,
    "log_every": 5,
    "blr": 8e-3,
}


@pytest.fixture
def make_run():
    """``make_run(folder, worker=..., key=value)``: what the launcher would have written."""

    def make(folder: Path, **values) -> Path:
        settings = contract.settings.read(values)
        if isinstance(settings, contract.settings.Stepping):
            settings.resolve_batch(settings.env.processes)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / rundir.CONFIG).write_text(yaml.safe_dump(contract.settings.plain(settings), sort_keys=False))
        run = {"schema": 1, "identity": folder.name, "group": "g", "worker": values["worker"], "seed": settings.seed}
        rundir.write_json(folder / rundir.RUN, run)
        return folder

    return make


def command(folder: Path, processes: int = 1) -> list[str]:
    worker = yaml.safe_load((folder / rundir.CONFIG).read_text())["worker"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    return [sys.executable, *torchrun, "-m", f"workers.{worker}", str(folder)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.fixture
def work():
    """``work(folder)``: run the worker to its end. Returns the finished process."""

    def run(folder: Path, processes: int = 1) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command(folder, processes), env=environment(), text=True, capture_output=True, timeout=300, check=False
        )

    return run


@pytest.fixture
def start():
    """``start(folder)``: begin, in a session of its own. Killed at the end of the test, if need be."""
    begun: list[subprocess.Popen[bytes]] = []

    def run(folder: Path, processes: int = 1, **env: str) -> subprocess.Popen[bytes]:
        with (folder / rundir.LOG).open("ab") as log:
            process = subprocess.Popen(
                command(folder, processes), env={**environment(), **env}, stdout=log, stderr=log, start_new_session=True
            )
        begun.append(process)
        return process

    yield run
    for process in begun:
        if process.poll() is None:
            process.kill()
        process.wait()


@pytest.fixture
def tiny():
    return dict(TINY)
