"""Real workers, killed. Byte for byte the same as undisturbed ones."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from contract import rundir


def curve(folder: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if k != "time"} for line in rundir.read_journal(folder / rundir.METRICS)[0]]


def kill_tree(pid: int) -> None:
    family = [*psutil.Process(pid).children(recursive=True), psutil.Process(pid)]
    random.shuffle(family)  # no order of death is better than another
    for process in family:
        try:
            process.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue


def wait_for(condition, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


@pytest.mark.parametrize("processes", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_run_killed_at_random_moments_ends_with_the_same_bytes(tmp_path, make_run, work, start, tiny, processes):
    tiny |= {"checkpoint_minutes": 0.0, "env": {"nproc": processes}}  # save at every look
    whole = make_run(tmp_path / "whole" / "r", **tiny)
    assert work(whole, processes).returncode == 0

    killed = make_run(tmp_path / "killed" / "r", **tiny)
    for lines in (1, 4):  # after the first line of its journal, and later
        process = start(killed, processes)
        wait_for(lambda lines=lines, process=process: len(curve(killed)) >= lines or process.poll() is not None)
        time.sleep(random.uniform(0, 0.2))
        if process.poll() is None:
            kill_tree(process.pid)
        process.wait()
    done = work(killed, processes)
    assert done.returncode == 0, done.stdout + done.stderr

    assert (killed / rundir.ENCODER).read_bytes() == (whole / rundir.ENCODER).read_bytes()
    assert curve(killed) == curve(whole)
    metrics = [json.loads((folder / rundir.DONE).read_text())["metrics"] for folder in (killed, whole)]
    assert metrics[0] == metrics[1]


def test_a_stop_file_saves_and_leaves_with_0_on_all_ranks(tmp_path, make_run, work, start, tiny):
    folder = make_run(tmp_path / "r", **{**tiny, "epochs": 400})
    process = start(folder, 2)
    wait_for(lambda: len(curve(folder)) >= 1)
    (folder / rundir.STOP).touch()
    assert process.wait(60) == 0
    assert (folder / rundir.CHECKPOINT).exists()
    assert not (folder / rundir.DONE).exists()


def test_a_run_that_was_taken_over_writes_nothing_more(tmp_path, make_run, start, tiny):
    folder = make_run(tmp_path / "r", **{**tiny, "epochs": 400})
    rundir.write_json(folder / rundir.OWNER, {"attempt": "first"})
    process = start(folder, SIGHTLINE_ATTEMPT="first")
    wait_for(lambda: len(curve(folder)) >= 1)
    rundir.write_json(folder / rundir.OWNER, {"attempt": "second"})
    assert process.wait(60) == 1
    assert "taken over by attempt second" in (folder / rundir.LOG).read_text()
    assert not (folder / rundir.CHECKPOINT).exists()


def test_a_loss_that_is_not_finite_stops_all_ranks(tmp_path, make_run, work, tiny):
    folder = make_run(tmp_path / "r", **{**tiny, "blr": 1e12, "weight_decay": 0.0, "epochs": 30})
    done = work(folder, 2)
    assert done.returncode == 1
    for rank in (0, 1):
        assert f"[rank {rank}] error: the loss is not finite at step" in done.stdout
    assert not (folder / rundir.DONE).exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root, as in CI")
def test_a_full_disk_during_a_checkpoint_is_one_clear_line_and_loses_nothing(tmp_path, make_run, work, tiny):
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", disk], check=True)
    try:
        folder = make_run(disk / "r", **{**tiny, "checkpoint_epochs": 1})
        ballast = disk / "ballast"
        ballast.write_bytes(b"0" * (36 << 20))
        done = work(folder)
        assert done.returncode == 1
        assert "error: " in done.stdout
        assert "No space left on device" in done.stdout
        assert "make room, then retry" in done.stdout
        ballast.unlink()
        assert work(folder).returncode == 0
        assert (folder / rundir.DONE).exists()
    finally:
        subprocess.run(["umount", disk], check=True)
