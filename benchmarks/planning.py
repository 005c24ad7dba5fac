"""Planning 1,000 configurations against 1,000 finished runs, beside plain Hydra composing (measured on a sample and
scaled). CPU time, so that a busy machine does not matter; about 1 s is the aim.  python benchmarks/planning.py"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from hydra import compose, initialize_config_dir

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from contract import rundir  # noqa: E402
from launcher import CONFIGS, launches, rundirs, sweep  # noqa: E402

SAMPLE = 20


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        words = ["worker=main_lmim", "seed=range(500)", "tau=0.1,0.2", f"output_dir={folder}"]
        began = time.process_time()
        runs = launches.of_launch(sweep.points(words)).runs
        fresh = time.process_time() - began
        for run in runs:
            rundirs.prepare(run, Path(folder, "capsules", "x"), None, None)
            (run.folder / rundir.DONE).write_text("{}")
        before = _children()
        command = [sys.executable, "launcher.py", "plan", *words]
        said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        whole = _children() - before
        assert "1,000 runs" in said
        assert "reuse" in said
    began = time.process_time()
    for seed in range(SAMPLE):
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            compose("config", ["worker=main_lmim", f"seed={seed}", "tau=0.1"])
    plain = (time.process_time() - began) / SAMPLE * len(runs)
    print(f"compose, check and identify {len(runs)} new runs       {fresh:6.2f} s")
    print(f"the command, start to end, {len(runs)} runs finished   {whole:6.2f} s")
    print(f"Hydra composing alone, {SAMPLE} measured, scaled       {plain:6.2f} s   {plain / whole:.0f}x the command")


if __name__ == "__main__":
    main()
