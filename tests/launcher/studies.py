"""A small study, and runs of it that are finished."""

import time
from pathlib import Path

from contract import rundir
from launcher import rundirs

STUDY = """\
title: T
seeds: [0, 1]
overrides: {data: digits}
stages:
  pretrain: {worker: main_lmim}
  knn: {worker: main_knn, after: pretrain}
rows:
  ViT-B/16 v1.0: {}
  b:
    pretrain.epochs: 0
columns:
  1-NN: {stage: knn, metric: knn/loo1}
reported:
  - {row: b, column: 1-NN, value: 50.1, source: "Table 1"}
layout: {digits: 1}
"""


def finish(run, metrics=None, seconds=3600.0, gpus=0, **info):
    rundirs.prepare(run, Path(run.settings.output_dir) / "capsules" / "x", "abc", "mine")
    described = rundir.read_run(run.folder)
    rundir.write_json(run.folder / rundir.RUN, {**described, **info})
    journal = rundir.Journal(rundir.attempts_file(run.folder, 0))
    about = {"attempt": "1", "host": "n1/pid:[1]"}
    journal.append({"event": "start", **about, "time": 1})
    end = {"event": "end", **about, "time": time.time(), "cause": "finished", "seconds": seconds}
    journal.append(end | {"gpu_seconds": seconds * gpus})
    journal.close()
    rundir.write_json(run.folder / rundir.DONE, {"metrics": metrics if metrics is not None else {"knn/loo1": 0.5}})
