"""A table of results: ours from the Parquet cache against ``mlflow.search_runs`` and a groupby, both in cold processes.

    python benchmarks/table.py [--runs 1000] [--metrics 20]

The store is filled by our own ingester first (not timed).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

SEEDS = 5
OURS = """
import sys
from analysis import frame
found = frame.results(sys.argv[1])
table = found.groupby(["group", "metric"])["value"].agg(["mean", "std", "count"])
print(len(table))
"""
THEIRS = """
import sys
import mlflow
mlflow.set_tracking_uri(f"sqlite:///{sys.argv[1]}/mlflow.db")
found = mlflow.search_runs(experiment_names=["main_knn"], max_results=100_000)
values = [c for c in found.columns if c.startswith("metrics.")]
table = found.groupby("tags.sightline.group")[values].agg(["mean", "std", "count"])
print(len(table) * len(values))
"""


def fill(output_dir: Path, runs: int, metrics: int) -> None:
    from contract import rundir

    for number in range(runs):
        identity = f"{number:08x}"
        folder = rundir.run_dir(output_dir, "main_knn", identity)
        folder.mkdir(parents=True)
        run = {"schema": rundir.SCHEMA, "identity": identity, "group": f"g{number // SEEDS}", "worker": "main_knn"}
        run |= {"stage": "knn", "name": "bench", "seed": number % SEEDS, "parents": [], "code": {"hash": "c0de"}}
        (folder / rundir.RUN).write_text(json.dumps(run))
        (folder / rundir.CONFIG).write_text("".join(f"key_{i}: value_{i}\n" for i in range(40)))
        done = {"metrics": {f"knn/m{i}": number + i / 7 for i in range(metrics)}, "steps": 1, "time": 1.7e9}
        (folder / rundir.DONE).write_text(json.dumps(done))


def cold(code: str, output_dir: Path, times: int = 3) -> tuple[float, int]:
    """The best of some whole processes, and what they printed."""
    best = float("inf")
    for _ in range(times):
        begun = time.perf_counter()
        command = [sys.executable, "-c", code, str(output_dir)]
        answer = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        best = min(best, time.perf_counter() - begun)
    return best, int(answer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--metrics", type=int, default=20)
    args = parser.parse_args()
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    with tempfile.TemporaryDirectory() as place:
        output_dir = Path(place)
        fill(output_dir, args.runs, args.metrics)
        command = [sys.executable, "-m", "analysis.ingest", "--output-dir", place]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        first, _ = cold(OURS, output_dir, times=1)
        ours, our_cells = cold(OURS, output_dir)
        one = next(iter(output_dir.glob("main_knn/*/done.json")))
        one.write_text(one.read_text().replace("1700000000.0", "1700000001.0"))
        refreshed, _ = cold(OURS, output_dir, times=1)
        theirs, their_cells = cold(THEIRS, output_dir)
    assert our_cells == their_cells == args.runs // SEEDS * args.metrics
    print(f"table of {args.runs:,} runs x {args.metrics} metrics ({our_cells:,} cells), whole processes")
    for name, seconds in (
        ("mlflow.search_runs + groupby", theirs),
        ("ours, from Parquet", ours),
        ("ours, no cache yet", first),
        ("ours, one run changed", refreshed),
    ):
        print(f"  {name:30} {seconds:7.2f} s")
    print(f"  {'ratio':30} {theirs / ours:7.1f} x")


if __name__ == "__main__":
    main()
