"""Run directories into MLflow: ours against ``log_metric`` call by call and against one ``log_batch`` a run.

    python benchmarks/ingest.py [--runs 1000] [--steps 100] [--sample 2] [--store postgresql://USER@HOST/NAME]

Into fresh SQLite stores, or into the database named (an empty one: experiments are made there). The two other sides are
what a training script spends, and the quickest that one process can do by hand (no exactly-once, no tags, no resume);
they are timed on a sample of runs and scaled.
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

KEYS, PARAMS = ("train/loss", "train/lr", "train/momentum", "knn/loo1", "knn/top1"), 60


def fill(output_dir: Path, runs: int, steps: int = 100) -> None:
    """Finished runs with curves, as workers leave them."""
    from contract import rundir

    for number in range(runs):
        identity, begin = f"{number:08x}", 1.7e9 + 977 * number  # no two runs start at the same moment
        folder = rundir.run_dir(output_dir, "main_knn", identity)
        folder.mkdir(parents=True)
        run = {
            "schema": rundir.SCHEMA,
            "identity": identity,
            "group": identity[:6],
            "worker": "main_knn",
            "stage": "knn",
        }
        run |= {"name": "bench", "seed": number, "parents": [], "code": {"hash": "c0de"}, "submitted": begin}
        (folder / rundir.RUN).write_text(json.dumps(run))
        (folder / rundir.CONFIG).write_text("".join(f"key_{i}: value_{i}\n" for i in range(PARAMS)))
        lines = [
            {"step": s, "of": steps, "time": begin + s, **dict.fromkeys(KEYS, s * 0.01)} for s in range(1, steps + 1)
        ]
        (folder / rundir.METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
        done = {"metrics": {"knn/loo1": 1.0}, "steps": steps, "time": begin + steps}
        (folder / rundir.DONE).write_text(json.dumps(done))
        start = {"event": "start", "attempt": "a", "time": begin}
        (folder / "attempts.0.jsonl").write_text(json.dumps(start) + "\n")


def call_by_call(uri: str, runs: int, steps: int) -> float:
    """Seconds a run, as a training script that logs to MLflow spends them."""
    import mlflow

    mlflow.set_tracking_uri(uri)
    mlflow.set_experiment("bench-calls")
    begun = time.perf_counter()
    for _ in range(runs):
        with mlflow.start_run():
            mlflow.log_params({f"key_{i}": f"value_{i}" for i in range(PARAMS)})
            for step in range(1, steps + 1):
                for key in KEYS:
                    mlflow.log_metric(key, step * 0.01, step=step)
    return (time.perf_counter() - begun) / runs


def batch_by_batch(uri: str, folders: list[Path]) -> float:
    """Seconds a run, from its files to the store in three calls."""
    import yaml
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

    client = MlflowClient(uri)
    experiment = client.create_experiment("bench-batches")
    begun = time.perf_counter()
    for folder in folders:
        config = yaml.load((folder / "config.yaml").read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        metrics = [Metric(k, line[k], round(line["time"] * 1000), line["step"]) for line in lines for k in KEYS]
        run = client.create_run(experiment, round(lines[0]["time"] * 1000))
        client.log_batch(run.info.run_id, metrics, [Param(k, str(v)) for k, v in config.items()])
        client.set_terminated(run.info.run_id)
    return (time.perf_counter() - begun) / len(folders)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument(
        "--sample", type=int, default=2, help="runs of the call-by-call side; 20 times as many in batches"
    )
    parser.add_argument("--store", help="a database server; SQLite files by default")
    args = parser.parse_args()
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    with tempfile.TemporaryDirectory() as place:
        from analysis.store import choose

        output_dir = Path(place, "runs")
        output_dir.mkdir()
        fill(output_dir, args.runs, args.steps)
        other = choose(Path(place), args.store)
        other.open()
        slow = call_by_call(other.uri, args.sample, args.steps) * args.runs
        some = sorted(output_dir.glob("main_knn/*"))[: 20 * args.sample]
        batches = batch_by_batch(other.uri, some) * args.runs
        os.environ.pop("MLFLOW_TRACKING_URI", None)  # which MLflow has set
        command = [sys.executable, "-m", "analysis.ingest", "--output-dir", str(output_dir), "--json"]
        command += ["--store", args.store] if args.store else []
        found = []
        for _ in range(2):
            begun = time.perf_counter()
            answer = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
            found.append((time.perf_counter() - begun, json.loads(answer)))
    (first, count), (again, nothing) = found
    assert (count["new"], nothing["unchanged"], nothing["metrics"]) == (args.runs, args.runs, 0)
    where = "PostgreSQL" if args.store else "SQLite"
    print(f"{args.runs:,} runs x {args.steps} steps x {len(KEYS)} metrics into {where}, {os.cpu_count()} cores")
    print(f"  log_metric call by call   {slow:9.1f} s   ({args.sample} runs measured, scaled)")
    print(f"  log_batch run by run      {batches:9.1f} s   ({len(some)} runs measured, scaled)")
    print(f"  analysis.ingest           {first:9.1f} s   start, import and, of SQLite, migrations included")
    print(f"  again, nothing new        {again:9.1f} s")
    print(f"  ratio                     {slow / first:9.1f} x, to batches {batches / first:.1f} x")


if __name__ == "__main__":
    main()
