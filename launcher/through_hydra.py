"""``hydra/launcher=submitit_slurm`` (or ``submitit_local``): Hydra composes the sweep and submits, one pickle a job.

For those who know it from elsewhere. Each job is a local launch of one run, on the node: the run directory, the
supervisor and the reuse of what is finished are the same. ``env.slurm=True`` is the better way to a queue: Hydra takes
a fraction of a second a run, does not link stages, and the code is read when a job starts.
"""

from __future__ import annotations

import subprocess
import sys
import time

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from launcher import CONFIGS, mirror
from launcher.supervisor import POLL_S

PLACE = "hydra.sweep.dir=runs/hydra/${now:%Y%m%d-%H%M%S}"
HERE = ["env.scheduler=local", "env.slurm=False", "env.lsf=False"]  # within the job


def main(words: list[str]) -> None:
    """Ends the process with Hydra's exit code."""
    where = [] if any(word.startswith("hydra.sweep.dir=") for word in words) else [PLACE]
    sys.argv = [sys.argv[0], *words, *where]
    hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="config")(job)()


def job(_config: DictConfig) -> None:
    """``python launcher.py`` with this job's words. Raises where the run did not finish, so that Hydra hears of it."""
    theirs = ("env.scheduler=", "env.slurm=", "env.lsf=")
    words = [word for word in HydraConfig.get().overrides.task if not word.startswith(theirs)]
    # A process of its own, as Hydra composes once a process; looked at again and again, since in submitit's handler of
    # a signal nothing may wait for it.
    command = [sys.executable, "-m", "launcher", *words, *HERE, "--quiet"]
    process = subprocess.Popen(command, env=mirror.environment())
    while process.poll() is None:
        time.sleep(POLL_S)
    if process.returncode:
        raise RuntimeError(
            f"not finished (exit code {process.returncode}); python launcher.py status says how the runs get on"
        )
