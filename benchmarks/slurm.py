"""From a command to what Slurm has accepted: 1,000 runs, and 1,000 runs of four stages; a sample through
hydra-submitit-launcher, and a loop of sbatch, scaled. Needs a Slurm whose queue you may fill with held jobs; all of
them are cancelled again:

    cluster_scripts/slurm_box start /tmp/box; eval "$(cluster_scripts/slurm_box env /tmp/box)"
    python benchmarks/slurm.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RUNS, SAMPLE, SBATCHES = 1000, 100, 50

APP = f"""
import hydra
@hydra.main(config_path={str(ROOT / "configs")!r}, config_name="config", version_base="1.3")
def main(config): pass
main()
"""


def launcher(*words: str) -> float:
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, str(ROOT / "launcher.py"), *words], capture_output=True, text=True, check=False
    )
    if done.returncode not in (0, 101):
        sys.exit(done.stderr)
    return time.perf_counter() - began


def ours(folder: Path) -> float:
    words = ["worker=main_lmim", "env=slurm", "env.ngpu=0", "env.extra.hold=true", f"output_dir={folder}"]
    words.append("env.canary=False")  # held, it would never end
    sweep = f"seed=range({RUNS})"
    try:
        launcher(*words, "seed=123456")  # warms the caches of files and byte code
        took = launcher(*words, sweep)
        print(f"{RUNS} runs, command to accepted   {took:7.2f} s")
        print(f"the same again, nothing to do     {launcher(*words, sweep):7.2f} s")
        print(f"status, asking the queue          {launcher('status', '--fresh', f'output_dir={folder}'):7.2f} s")
        print(f"status, in a second terminal      {launcher('status', f'output_dir={folder}'):7.2f} s")
        runs = [p for p in folder.rglob("*") if p.is_file() and "capsules" not in p.parts and not p.is_symlink()]
        size = sum(p.stat().st_size for p in runs)
        print(f"written                           {size / 2**20:7.2f} MB in {len(runs) / (RUNS + 1):.2f} files per run")
        before = len([*folder.glob("submissions/*/*.sbatch")])
        more = "then=[main_knn,main_linprobe,main_attention_stats]"
        stages = launcher(*words, f"seed=range(1000,{1000 + RUNS})", more)
        arrays = len([*folder.glob("submissions/*/*.sbatch")]) - before
        print(f"{RUNS} runs of 4 stages             {stages:7.2f} s  in {arrays} submissions")
    finally:
        ids = [i for p in folder.glob("submissions/*/submitted.json") for i in json.loads(p.read_text()).values()]
        subprocess.run(["scancel", "-Q", *ids], check=bool(ids))
    return took


def loop(folder: Path) -> None:
    began = time.perf_counter()
    words = ["sbatch", "--parsable", "--hold", "-o", "/dev/null", "--wrap", "true"]
    ids = [subprocess.check_output(words, text=True).strip() for _ in range(SBATCHES)]
    took = time.perf_counter() - began
    subprocess.run(["scancel", *ids], check=True)
    print(f"plain sbatch in a loop, {RUNS}      {took / SBATCHES * RUNS:7.2f} s  scaled from {SBATCHES}")


def hydra(folder: Path, ours: float) -> None:
    """Until it calls sbatch, which is a stand-in that says when."""
    (folder / "app.py").write_text(APP)
    reached = folder / "reached"
    (folder / "sbatch").write_text(f"#!/bin/sh\ntouch {reached}\nexit 1\n")
    (folder / "sbatch").chmod(0o755)
    words = [sys.executable, "app.py", "-m", "hydra/launcher=submitit_slurm", "worker=main_lmim"]
    words.append(f"seed=range({SAMPLE})")
    env = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
    began = time.time()
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, check=False)
    if not reached.exists():
        sys.exit(done.stderr)
    took = (reached.stat().st_mtime - began) / SAMPLE * RUNS
    print(f"hydra-submitit-launcher, {RUNS}     {took:7.2f} s  scaled from {SAMPLE}, up to its one sbatch")
    print(f"ratio to hydra-submitit-launcher  {took / ours:7.1f}")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        took = ours(Path(folder) / "runs")
        loop(Path(folder))
        hydra(Path(folder), took)


if __name__ == "__main__":
    main()
