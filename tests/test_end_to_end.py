"""The launcher, the workers and the analysis together, as a user has them, with kills in between."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil

from contract import rundir

ROOT = Path(__file__).resolve().parent.parent
LAUNCH = [
    "worker=main_lmim", "data=fake", "data.size=16", "data.length=96", "grid_size=4", "num_vis=5", "batch_size=8",
    "epochs=3", "eval_freq=1", "log_every=5",
    "checkpoint_minutes=0", "env.nproc=2", "env.threads=1", "seed=0,1", "then=[main_knn]",
]  # fmt: skip


def launch(output_dir: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "launcher.py", *LAUNCH, f"output_dir={output_dir}"],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def kill_everything(process: subprocess.Popen[str]) -> None:
    """kill -9 of the launcher, the supervisors, torchrun and all ranks, in any order."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    random.shuffle(family)
    for each in family:
        try:
            each.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    process.communicate()


def table(output_dir: Path) -> str:
    runs = {rundir.read_run(f)["identity"]: f for f in rundir.find_runs(output_dir)}
    cells = [
        {
            "row": "noise",
            "column": name,
            "metric": "knn/loo1",
            "runs": [
                {
                    "seed": json.loads((f / rundir.RUN).read_text())["seed"],
                    "identity": i,
                    "worker": name,
                    "state": "finished",
                }
                for i, f in runs.items()
                if f.parent.name == name
            ],
        }
        for name in ("main_lmim", "main_knn")
    ]
    manifest = {
        "schema": 1,
        "name": "kills",
        "title": "kills",
        "output_dir": str(output_dir),
        "seeds": [0, 1],
        "rows": ["noise"],
        "columns": [
            {"name": c["column"], "stage": c["column"], "metric": "knn/loo1", "better": "higher"} for c in cells
        ],
        "layout": {"digits": 4, "interval": "ci95", "percent": True},
        "reported": [],
        "cells": cells,
    }
    path = output_dir / "manifest.json"
    path.write_text(json.dumps(manifest))
    done = subprocess.run(
        [sys.executable, "-m", "analysis.tables", "--manifest", str(path), "--format", "csv"],
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=True,
    )
    return done.stdout


def test_a_sweep_killed_at_random_moments_ends_with_the_same_bytes_and_the_same_table(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    undisturbed = launch(whole)
    said, _ = undisturbed.communicate(timeout=300)
    assert undisturbed.returncode == 0, said

    for _ in range(2):
        process = launch(killed)
        time.sleep(random.uniform(3, 14))
        if process.poll() is None:
            kill_everything(process)
    last = launch(killed)
    said, _ = last.communicate(timeout=300)
    assert last.returncode == 0, said

    encoders = sorted(whole.glob("main_lmim/*/encoder.pt"))
    assert len(encoders) == 2
    for each in encoders:
        assert (killed / each.relative_to(whole)).read_bytes() == each.read_bytes()
    assert sorted(f.relative_to(killed) for f in rundir.find_runs(killed)) == sorted(
        f.relative_to(whole) for f in rundir.find_runs(whole)
    )
    assert table(killed) == table(whole)
    assert "noise" in table(whole)
    again = [sys.executable, "launcher.py", "repro", encoders[0].parent.name, f"output_dir={killed}", "--json"]
    again += ["--steps", "5"]
    said = subprocess.run(again, cwd=ROOT, text=True, capture_output=True, check=False)
    assert json.loads(said.stdout)["identical"], said.stderr
    leftovers = [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(p.info["cmdline"] or [])]
    assert not [p for p in leftovers if p.pid != os.getpid()]


def test_without_an_argument_a_newcomer_is_told_what_to_do():
    done = subprocess.run([sys.executable, "launcher.py"], cwd=ROOT, text=True, capture_output=True, check=False)
    assert done.returncode == 0
    for command in (
        "make demo",
        "plan quickstart",
        "fill quickstart",
        "table quickstart",
        "worker=main_lmim",
        "--help",
    ):
        assert command in done.stdout


PUBLISHED = """
    --config-name=lmim worker=main_lmim encoder=vit_base decoder_depth=3 avg_sim_coeff=0.1 loss=infonce_patches
    patch_gap=4 epochs=800 warmup_epochs=40 blr=1.5e-4 min_lr_frac=0.25 weight_decay=0.05 batch_size=256 accum_iter=2
    env.ngpu=8 dataset=imagenet resume=True output_dir=./checkpoints data_path=/path/to/imagenet env.slurm=True
    env.distributed=True"""


def test_the_published_command_is_accepted_as_it_stands():
    command = [sys.executable, "launcher.py", *PUBLISHED.split(), "--dry-run", "--json"]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    (run,) = [json.loads(line) for line in done.stdout.splitlines()]
    assert run["worker"] == "main_lmim"
    assert not (ROOT / "checkpoints").exists()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_the_page_of_the_store_is_served_on_loopback_only_and_ends_with_ctrl_c(tmp_path):
    port = free_port()
    (tmp_path / "main_knn").mkdir()
    command = [sys.executable, "launcher.py", "ui", f"output_dir={tmp_path}", "--port", str(port)]
    page = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5) as answer:
                    assert answer.status == 200
                break
            except OSError:
                assert page.poll() is None, "the server ended"
                assert time.monotonic() < deadline, "no answer"
                time.sleep(0.5)
        family = [psutil.Process(page.pid), *psutil.Process(page.pid).children(recursive=True)]
        listening = {c.laddr.ip for p in family for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN}
        assert listening <= {"127.0.0.1"}
        os.killpg(page.pid, signal.SIGINT)
        page.wait(60)
        assert not [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    finally:
        if page.poll() is None:
            os.killpg(page.pid, signal.SIGKILL)
            page.wait()
