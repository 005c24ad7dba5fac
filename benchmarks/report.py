"""The page of a study of many runs: ours, from run directories, against the same tables and curves fetched from MLflow.

    python benchmarks/report.py [--runs 1000] [--steps 100]

Both sides are whole processes that end with an HTML file. Theirs is what one would write with MLflow: ``search_runs``
for the tables and ``get_metric_history`` for the curves, drawn by the same code; it has no cell details, receipts or
provenance. The store is filled by our own ingester first (not timed). Ours is timed twice: with no cache, and again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

SEEDS, COLUMNS = 5, 3
THEIRS = """
import sys
from pathlib import Path
import mlflow, pandas as pd
from analysis import drawings, figures, render, tables
mlflow.set_tracking_uri(f"sqlite:///{sys.argv[1]}/mlflow.db")
runs = mlflow.search_runs(search_all_experiments=True, max_results=100_000)
values = [c for c in runs.columns if c.startswith("metrics.knn")]
wide = runs.groupby("tags.sightline.row")[values].agg(["mean", "std", "count"])
client = mlflow.MlflowClient()
points = [
    (row, m.step, m.value)
    for run, row, stage in zip(runs["run_id"], runs["tags.sightline.row"], runs["tags.sightline.stage"])
    if stage == "pretrain"
    for m in client.get_metric_history(run, "train/loss")
]
frame = pd.DataFrame(points, columns=["row", "step", "value"])
figure = drawings.Figure()
figures.bands(figure.subplots(), frame, sorted(set(frame["row"])))
figure.savefig(sys.argv[1] + "/curves.svg")
page = wide.to_html() + Path(sys.argv[1], "curves.svg").read_text()
Path(sys.argv[1], "theirs.html").write_text(page)
"""


def fill(output_dir: Path, runs: int, steps: int) -> Path:
    """A study of rows x 3 columns x 5 seeds: a quarter of the runs pretrains, the others evaluate. Its manifest."""
    from contract import rundir

    rows = max(1, runs // (SEEDS * (1 + COLUMNS)))
    cells = {(f"row {r}", f"column {c}"): list[dict[str, object]]() for r in range(rows) for c in range(COLUMNS)}
    identities = []
    for r in range(rows):
        for seed in range(SEEDS):
            parent = f"{r:06x}{seed:02x}0000"
            one_run(output_dir, parent, "main_lmim", "pretrain", r, seed, steps, (), {"knn/loo1": r + seed})
            identities.append(parent)
            for c in range(COLUMNS):
                identity = f"{r:06x}{seed:02x}{c + 1:04x}"
                one_run(output_dir, identity, "main_knn", f"knn{c}", r, seed, 1, (parent,), {"knn/top1": r / 9 + seed})
                cells[f"row {r}", f"column {c}"].append({"seed": seed, "identity": identity, "worker": "main_knn"})
                identities.append(identity)
    columns = [{"name": f"column {c}", "stage": f"knn{c}", "metric": "knn/top1"} for c in range(COLUMNS)]
    manifest = {"schema": 1, "name": "bench", "title": "Many runs", "output_dir": str(output_dir), "columns": columns}
    manifest |= {"rows": [f"row {r}" for r in range(rows)], "seeds": list(range(SEEDS)), "identities": identities}
    manifest |= {"layout": {"digits": 1, "interval": "ci95", "percent": False}, "reported": []}
    said = [{"row": row, "column": column, "runs": each} for (row, column), each in cells.items()]
    manifest |= {"cells": said, "parents": {i: [i[:8] + "0000"] for i in identities if not i.endswith("0000")}}
    path = output_dir / "studies" / "bench.json"
    path.parent.mkdir()
    rundir.write_json(path, manifest)
    return path


def one_run(
    output_dir: Path, identity: str, worker: str, stage: str, row: int, seed: int, steps: int,
    parents: tuple[str, ...], metrics: dict[str, float],
) -> None:  # fmt: skip
    from contract import rundir

    folder, begin = rundir.run_dir(output_dir, worker, identity), 1.7e9 + 977 * row + seed
    folder.mkdir(parents=True)
    run = {"schema": rundir.SCHEMA, "identity": identity, "group": f"{stage}{row}", "worker": worker, "stage": stage}
    run |= {"name": "bench", "seed": seed, "parents": list(parents), "code": {"hash": "c0de"}, "commit": "abcdef"}
    (folder / rundir.RUN).write_text(json.dumps(run | {"processes": 1, "capsule": "cafe", "submitted": begin}))
    (folder / rundir.CONFIG).write_text("".join(f"key_{i}: value_{i}\n" for i in range(60)))
    keys = ("train/loss", "train/lr", "train/momentum", "knn/loo1", "knn/top1")
    lines = [{"step": s, "of": steps, "time": begin + s, **dict.fromkeys(keys, s * 0.01)} for s in range(1, steps + 1)]
    (folder / rundir.METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / rundir.DONE).write_text(json.dumps({"metrics": metrics, "steps": steps, "time": begin + steps}))
    around = {"python": "3.11", "packages": {f"package-{i}": "1.0" for i in range(200)}, "gpus": ["H100"], "threads": 8}
    rundir.environment_file(folder, "e0e0e0e0").write_text(json.dumps(around))
    about = {"attempt": "a", "host": f"node{row}/pid:[1]", "environment": "e0e0e0e0"}
    end = {"event": "end", **about, "time": begin + steps, "cause": "finished", "seconds": 60.0, "gpu_seconds": 60.0}
    start = {"event": "start", **about, "time": begin}
    (folder / "attempts.0.jsonl").write_text(json.dumps(start) + "\n" + json.dumps(end) + "\n")


def timed(*command: str) -> float:
    begun = time.perf_counter()
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        output_dir = Path(place)
        manifest = fill(output_dir, args.runs, args.steps)
        ours = ["-m", "analysis.report", "--manifest", str(manifest)]
        first, again = timed(*ours), timed(*ours)
        size = (output_dir / "reports" / "bench.html").stat().st_size
        timed("-m", "analysis.ingest", "--output-dir", place)
        theirs = timed("-c", THEIRS, place)
        runs = sum(1 for _ in output_dir.glob("main_*/*"))
    print(f"report of {runs:,} runs, {runs // (1 + COLUMNS):,} of them with {args.steps} steps x 5 metrics")
    print(f"  search_runs and get_metric_history    {theirs:7.1f} s   tables and one figure")
    print(f"  analysis.report, no cache yet         {first:7.1f} s   {size / 1e6:.2f} MB")
    print(f"  analysis.report, again                {again:7.1f} s")
    print(f"  ratio                                 {theirs / first:7.1f} x")


if __name__ == "__main__":
    main()
