"""One real Slurm for the tests of this folder: two nodes, a few seconds to start."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "cluster_scripts"


@dataclass
class Box:
    folder: Path

    def do(self, command: str, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self._run(str(SCRIPTS / "slurm_box"), command, str(self.folder), *words, check=check)

    def ask(self, *words: str, **env: str) -> str:
        """What a client of this cluster printed."""
        return self._run(*words, **env).stdout.strip()

    def _run(self, *words: str, check: bool = True, **more: str) -> subprocess.CompletedProcess[str]:
        foreign = ("SLURM_", "SBATCH_", "SRUN_")  # the tests may run in a job themselves
        env = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
        env |= {"SLURM_CONF": str(self.folder / "etc" / "slurm.conf"), **more}
        done = subprocess.run(
            words, env=env, text=True, stdin=subprocess.DEVNULL, capture_output=True, timeout=120, check=False
        )
        assert done.returncode == 0 or not check, f"{words}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done

    @staticmethod
    def wait_for(condition: Callable[[], object], timeout: float = 30) -> None:
        end = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < end, "waited in vain"
            time.sleep(0.1)


@pytest.fixture(scope="session")
def empty_box() -> Iterator[Box]:
    """Not started. Its folder has a short name: pytest's would be too long for Unix sockets."""
    if os.geteuid() or shutil.which("slurmctld", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin") is None:
        missing = "no Slurm, or not root: cluster_scripts/slurm_box start --install DIR"
        if "slurm" in os.environ.get("SIGHTLINE_REQUIRE", ""):
            pytest.fail(missing)
        pytest.skip(missing)
    folder = Path(tempfile.mkdtemp(prefix="box-", dir="/tmp"))
    yield Box(folder)
    subprocess.run([SCRIPTS / "slurm_box", "wipe", folder, "--grace", "2"], check=False, capture_output=True)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def box(empty_box: Box) -> Box:
    empty_box.do("start", "--nodes", "2", "--cpus", "4", "--mem", "8000", "--gpus", "2")
    return empty_box
