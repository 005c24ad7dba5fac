"""A table of results: ours from the Parquet cache against ``mlflow.search_runs`` and a groupby, both in cold processes.

    python benchmarks/table.py [--runs 10000] [--metrics 20]

The store is filled by our own ingester first (not timed; minutes for 10,000 runs). Refresh: in a process that has the
table already, after one more run, as ``table --watch`` and a notebook do it.
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
PEAK = """
import resource
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
"""
OURS = """
import sys
from analysis import frame
found = frame.results(sys.argv[1])
table = found.groupby(["group", "metric"])["value"].agg(["mean", "std", "count"])
"""
REFRESH = """
import time
from benchmarks.table import new_run
new_run(sys.argv[1])
begun = time.perf_counter()
found = frame.results(sys.argv[1])
table = found.groupby(["group", "metric"])["value"].agg(["mean", "std", "count"])
seconds = time.perf_counter() - begun
"""
THEIRS = """
import sys
import mlflow
mlflow.set_tracking_uri(f"sqlite:///{sys.argv[1]}/mlflow.db")
found = mlflow.search_runs(experiment_names=["main_knn"], max_results=100_000)
values = [c for c in found.columns if c.startswith("metrics.")]
table = found.groupby("tags.sightline.group")[values].agg(["mean", "std", "count"])
"""
CELLS = {"ours": "len(table)", "theirs": "len(table) * len(values)"}


def one_run(output_dir: Path, number: int, metrics: int) -> None:
    from contract import rundir

    identity = f"{number:08x}"
    folder = rundir.run_dir(output_dir, "main_knn", identity)
    folder.mkdir(parents=True)
    run = {"schema": rundir.SCHEMA, "identity": identity, "group": f"g{number // SEEDS}", "worker": "main_knn"}
    run |= {"stage": "knn", "name": "bench", "seed": number % SEEDS, "parents": [], "code": {"hash": "c0de"}}
    (folder / rundir.RUN).write_text(json.dumps(run))
    (folder / rundir.CONFIG).write_text("".join(f"key_{i}: value_{i}\n" for i in range(40)))
    done = {"metrics": {f"knn/m{i}": number + i / 7 for i in range(metrics)}, "steps": 1, "time": 1.7e9}
    (folder / rundir.DONE).write_text(json.dumps(done))


def new_run(output_dir: str) -> None:
    place = Path(output_dir)
    number = 1 + max(int(folder.name, 16) for folder in (place / "main_knn").iterdir())
    one = json.loads(next(place.glob("main_knn/*/done.json")).read_text())
    one_run(place, number, len(one["metrics"]))


def cold(code: str, shown: str, output_dir: Path, times: int = 3) -> tuple[float, float, list[float]]:
    """Of the quickest of some whole processes: its seconds, its peak memory in MB, and what it printed."""
    best: tuple[float, float, list[float]] = (float("inf"), 0.0, [])
    for _ in range(times):
        begun = time.perf_counter()
        command = [sys.executable, "-c", f"{code}{PEAK}print(peak, {shown})", str(output_dir)]
        answer = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        peak, *said = map(float, answer.split()[-len(shown.split(",")) - 1 :])
        best = min(best, (time.perf_counter() - begun, peak, said))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--metrics", type=int, default=20)
    args = parser.parse_args()
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    with tempfile.TemporaryDirectory() as place:
        output_dir = Path(place)
        for number in range(args.runs):
            one_run(output_dir, number, args.metrics)
        command = [sys.executable, "-m", "analysis.ingest", "--output-dir", place]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        first, first_mb, _ = cold(OURS, CELLS["ours"], output_dir, times=1)
        ours, our_mb, (our_cells,) = cold(OURS, CELLS["ours"], output_dir)
        theirs, their_mb, (their_cells,) = cold(THEIRS, CELLS["theirs"], output_dir)
        assert our_cells == their_cells == args.runs // SEEDS * args.metrics
        _, refresh_mb, (refreshed, _) = min(
            (cold(OURS + REFRESH, "seconds, len(table)", output_dir, times=1) for _ in range(3)), key=lambda c: c[2][0]
        )
    cells = f"({our_cells:,.0f} cells), whole processes; MB: their peak"
    print(f"table of {args.runs:,} runs x {args.metrics} metrics {cells}")
    for name, seconds, memory in (
        ("mlflow.search_runs + groupby", theirs, their_mb),
        ("ours, from Parquet", ours, our_mb),
        ("ours, no cache yet", first, first_mb),
        ("ours, refresh after a new run", refreshed, refresh_mb),
    ):
        print(f"  {name:30} {seconds:7.2f} s {memory:7.0f} MB")
    print(f"  {'ratio':30} {theirs / ours:7.1f} x")


if __name__ == "__main__":
    main()
