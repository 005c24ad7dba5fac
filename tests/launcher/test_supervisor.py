"""A supervisor on its own, as a scheduler starts it."""

import os
import signal
import subprocess
import sys
import time

import pytest
import yaml

from contract import rundir
from launcher import launches, rundirs, sweep

SLOW = {"FAKE_STEP_S": "0.1"}


@pytest.fixture
def ready(house):
    """A prepared run of 600 steps, and how to start its supervisor."""
    words = ["worker=main_lmim", "epochs=600", f"output_dir='{house.out}'"]
    (run,) = launches.of_launch(sweep.points(words)).runs
    capsule = house.out / "capsules" / "abc"
    capsule.parent.mkdir(parents=True)
    capsule.symlink_to(house.root)
    rundirs.prepare(run, capsule, None, None)
    started = []

    def supervise(**environ):
        command = [sys.executable, "-m", "launcher.supervisor", str(run.folder)]
        env = house.environ(**environ)
        started.append(subprocess.Popen(command, cwd=capsule, env=env, text=True, stderr=subprocess.PIPE))
        return started[-1]

    house.folder, house.supervise = run.folder, supervise
    yield house
    for each in started:
        each.kill()
        each.communicate()


def configure(folder, **env):
    values = yaml.safe_load((folder / rundir.CONFIG).read_text())
    epochs = env.pop("epochs", values["epochs"])
    values["epochs"], values["env"] = epochs, values["env"] | env
    (folder / rundir.CONFIG).write_text(yaml.safe_dump(values))


def test_an_attempt_that_finishes_is_written_down_and_a_second_one_does_nothing(ready):
    configure(ready.folder, epochs=2, threads=3)
    assert ready.supervise().wait(30) == 0
    start, end = ready.attempts(ready.folder)
    assert start["event"] == "start"
    assert start["attempt"] == end["attempt"]
    assert (end["cause"], end["exit"], end["signal"]) == ("finished", 0, None)
    assert end["peak_rss_mb"] > 1
    assert "threads 3" in (ready.folder / "log.txt").read_text()
    assert not (ready.folder / "owner.json").exists()
    assert ready.supervise().wait(30) == 0
    assert len(ready.attempts(ready.folder)) == 2


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_a_warning_that_reaches_every_process_saves_the_run_and_asks_to_be_started_again(ready, number):
    supervisor = ready.supervise(**SLOW)
    ready.wait_for((ready.folder / "metrics.jsonl").exists)
    if number == signal.SIGUSR2:  # schedulers signal the whole job
        for child in subprocess.check_output(["pgrep", "-P", str(supervisor.pid)], text=True).split():
            os.kill(int(child), number)
    supervisor.send_signal(number)
    assert supervisor.wait(30) == 75
    assert ready.attempts(ready.folder)[-1]["cause"] == "stopped"
    assert rundir.state(ready.folder) == "stopped"
    assert not list(ready.folder.glob("stop*"))
    step = int((ready.folder / "checkpoint.pt").read_text().split()[0])
    configure(ready.folder, epochs=step + 1)
    assert ready.supervise().wait(30) == 0
    lines = rundir.read_journal(ready.folder / "metrics.jsonl")[0]
    assert [line["step"] for line in lines] == list(range(1, step + 2))


def test_a_worker_that_does_not_listen_is_killed_after_the_grace(ready):
    configure(ready.folder, grace_s=1)
    supervisor = ready.supervise(FAKE_DEAF="1", **SLOW)
    ready.wait_for((ready.folder / "metrics.jsonl").exists)
    supervisor.send_signal(signal.SIGUSR2)
    assert supervisor.wait(30) == 1
    end = ready.attempts(ready.folder)[-1]
    assert (end["cause"], end["signal"]) == ("killed", 9)
    assert ready.processes() == []


def test_a_killed_supervisor_leaves_nothing_behind(ready):
    supervisor = ready.supervise(**SLOW)
    ready.wait_for((ready.folder / "metrics.jsonl").exists)
    supervisor.kill()
    supervisor.wait(30)
    ready.wait_for(lambda: ready.processes() == [], 5)
    assert rundir.state(ready.folder) == "failed"


def test_of_two_supervisors_one_runs_and_the_other_says_who_does(ready):
    first = ready.supervise(**SLOW)
    ready.wait_for((ready.folder / "metrics.jsonl").exists)
    second = ready.supervise(**SLOW)
    _, said = second.communicate(timeout=30)
    assert second.returncode == 75
    assert f"already running as process {first.pid}" in said
    first.terminate()
    assert first.wait(30) == 75


def test_a_supervisor_that_lost_the_run_to_another_leaves_at_once(ready):
    supervisor = ready.supervise(**SLOW)
    ready.wait_for((ready.folder / "metrics.jsonl").exists)
    owner = rundir.read_json(ready.folder / "owner.json")
    rundir.write_json(ready.folder / "owner.json", owner | {"attempt": "another"})
    assert supervisor.wait(30) == 75
    assert ready.attempts(ready.folder)[-1]["cause"] == "busy"
    assert rundir.read_json(ready.folder / "owner.json")["attempt"] == "another"


@pytest.mark.parametrize("name", ["stop", "CANCELLED"])
def test_what_a_person_stopped_is_not_started_and_one_that_runs_is_saved(ready, name):
    supervisor = ready.supervise(**SLOW)
    ready.wait_for((ready.folder / "metrics.jsonl").exists)
    (ready.folder / name).touch()
    assert supervisor.wait(30) == 4  # not 75: a scheduler must not start it again
    again = ready.supervise()
    _, said = again.communicate(timeout=30)
    assert again.returncode == 4
    assert f"{name} is there; python launcher.py retry" in said


def test_a_run_whose_parent_is_not_finished_is_not_started(ready):
    info = rundir.read_json(ready.folder / "run.json")
    rundir.write_json(ready.folder / "run.json", info | {"parents": ["0123456789ab"]})
    supervisor = ready.supervise()
    _, said = supervisor.communicate(timeout=30)
    assert supervisor.returncode == 4
    assert "needs 0123456789ab, which is not finished" in said


def test_the_last_attempt_is_told_apart_from_a_stop_that_was_meant_for_an_older_one(ready):
    (ready.folder / "stop.123-old").touch()
    configure(ready.folder, epochs=3)
    assert ready.supervise().wait(30) == 0
    assert not (ready.folder / "stop.123-old").exists()


@pytest.mark.parametrize(
    ("name", "text"), [("config.yaml", "worker: ["), ("run.json", "{"), ("run.json", '{"schema": 99}')]
)
def test_a_damaged_directory_is_refused_in_one_line(ready, name, text):
    (ready.folder / name).write_text(text)
    supervisor = ready.supervise()
    _, said = supervisor.communicate(timeout=30)
    assert supervisor.returncode == 1
    assert name in said
    assert len(said.strip().splitlines()) == 1


def test_in_a_queue_it_leaves_in_time_for_what_a_checkpoint_costs(ready):
    manifest = ready.out / "submissions" / "x" / "0.json"
    manifest.parent.mkdir(parents=True)
    place = f"main_lmim/{ready.folder.name}"
    rundir.write_json(manifest, {"scheduler": "slurm", "runs": {"3": [{"identity": "x", "dir": place}]}})
    rundir.write_json(ready.folder / rundir.SAVED, {"seconds": 7})
    configure(ready.folder, signal_s=1)
    began = time.time()
    job = {"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "4", "SLURM_ARRAY_TASK_ID": "3"}
    env = ready.environ(**SLOW, **job, SLURM_JOB_END_TIME=str(int(began) + 25), PATH="/nowhere")
    command = [sys.executable, "-m", "launcher.supervisor", "--manifest", str(manifest)]
    done = subprocess.run(command, cwd=ready.root, env=env, text=True, capture_output=True, timeout=30, check=False)
    assert done.returncode == 75
    assert time.time() - began < 15  # of 25, less three times 7
    assert ready.causes(ready.folder) == ["stopped"]
    assert "scontrol" in done.stderr  # it asked to be queued again; there is no queue here
