"""Attempts that hang, on real workers: noticed, asked where they are, ended, and gone on with."""

import re
import subprocess
import sys

import pytest

from contract import rundir
from launcher import stall
from tests.house import edit, with_real_workers

REAL = [
    *("worker=main_lmim", "data=fake", "data.size=16", "data.length=96", "grid_size=4", "num_vis=5", "batch_size=8"),
    *("epochs=2", "log_every=1", "env.threads=1", "env.stall_min=0.1", "-q"),
]
HANG = """            step += 1
            if step == 7 and str(distributed.rank()) == __import__("os").environ.get("HANGS"):
                time.sleep(3600)
"""
SLOW = """        for batch in batches:
            time.sleep(float(os.environ.get("BATCH_S", "0")))
"""


@pytest.fixture
def real(house):
    """A house with the true workers, where one rank can hang in its 7th step, and all is looked at more often."""
    with_real_workers(house)
    edit(house.root / "workers" / "engine" / "fit.py", "            step += 1\n", HANG)
    edit(house.root / "workers" / "engine" / "pulse.py", "EVERY_S = 5.0", "EVERY_S = 0.2")
    edit(house.root / "contract" / "rundir.py", "HEARTBEAT_S = 5.0", "HEARTBEAT_S = 0.5")
    return house


def line_of(house, text: str) -> int:
    lines = (house.root / "workers" / "engine" / "fit.py").read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if text in line)


def test_of_two_ranks_one_hangs_and_both_say_where_before_the_attempt_is_ended(real):
    words = [*REAL, "env.nproc=2", "checkpoint_minutes=0"]
    real.run(*words, code=101, HANGS="1")
    (folder,) = real.runs()
    start, end = rundir.attempts(folder)
    assert end["cause"] == "stalled"
    assert rundir.state(folder) == "stopped"
    log = (folder / rundir.LOG).read_text()
    assert f"rank 1: workers/engine/fit.py:{line_of(real, 'time.sleep(3600)')} in fit\n" in log
    assert re.search(r"rank 0: workers/engine/\w+\.py:\d+ in \w+, which had called \w+\.py:\d+ in \w+", log)
    for rank in (0, 1):
        stacks = rundir.stacks_file(folder, start["attempt"], rank).read_text()
        assert "workers/main_lmim.py" in stacks
        assert "in fit" in stacks
    assert real.processes() == []

    real.run(*words, code=0)
    assert "resumed from step" in (folder / rundir.LOG).read_text()
    assert rundir.state(folder) == "finished"
    assert {path.name.split(".")[1] for path in folder.glob("stacks.*")} == {start["attempt"]}
    assert not list(folder.glob("beat.*"))


@pytest.mark.slow
def test_a_long_evaluation_lives_and_what_hung_ends_with_the_same_bytes(real):
    """The evaluation at the end takes twice as long as may be without a sign of life."""
    edit(real.root / "workers" / "data" / "loader.py", "        for batch in batches:\n", SLOW)
    edit(real.root / "workers" / "data" / "loader.py", "import os\n", "import os\nimport time\n")
    edit(real.root / "workers" / "engine" / "pictures.py", "batch_size: int = 256", "batch_size: int = 1")
    real.run(*REAL, "checkpoint_minutes=0", f"output_dir={real.root}/calm", code=0, BATCH_S="0.5")
    (calm,) = real.root.glob("calm/main_lmim/*")
    assert real.causes(calm) == ["finished"]
    lines = rundir.read_journal(calm / rundir.METRICS)[0]
    assert lines[-1]["time"] - lines[-2]["time"] > 2 * 6
    assert not [*calm.glob("stacks.*"), *calm.glob("beat.*")]

    real.run(*REAL, "checkpoint_minutes=0", code=101, HANGS="0")
    (folder,) = real.runs()
    assert f"fit.py:{line_of(real, 'time.sleep(3600)')} in fit" in (folder / rundir.LOG).read_text()
    real.run(*REAL, "checkpoint_minutes=0", code=0)
    assert real.causes(folder) == ["stalled", "finished"]
    assert (folder / "encoder.pt").read_bytes() == (calm / "encoder.pt").read_bytes()
    curves = [rundir.read_journal(run / rundir.METRICS)[0] for run in (folder, calm)]
    assert [{**line, "time": 0} for line in curves[0]] == [{**line, "time": 0} for line in curves[1]]


SLEEPER = """
import os, sys, time
from pathlib import Path
from contract import rundir
rundir.beat_file(Path(sys.argv[1]), os.environ["SIGHTLINE_ATTEMPT"]).touch()
time.sleep(3600)
"""


def test_in_a_queue_it_is_queued_again_and_gives_up_where_it_hangs_at_the_same_step(house):
    edit(house.root / "contract" / "rundir.py", "HEARTBEAT_S = 5.0", "HEARTBEAT_S = 0.2")
    (house.root / "workers" / "main_lmim.py").write_text(SLEEPER)
    house.run("worker=main_lmim", "env.stall_min=0.01", "env.max_requeue=1", "-q", code=101)
    (folder,) = house.runs()
    manifest = house.out / "submissions" / "x" / "0.json"
    manifest.parent.mkdir(parents=True)
    rundir.write_json(
        manifest, {"scheduler": "slurm", "runs": {"0": [{"identity": "x", "dir": f"main_lmim/{folder.name}"}]}}
    )
    job = {"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "0", "SLURM_JOB_END_TIME": "9e9"}
    codes = []
    for again in "12":
        env = house.environ(**job, PATH="/nowhere", SLURM_RESTART_COUNT=again)
        command = [sys.executable, "-m", "launcher.supervisor", "--manifest", str(manifest)]
        done = subprocess.run(command, cwd=house.root, env=env, text=True, capture_output=True, timeout=60, check=False)
        codes.append(
            (done.returncode, "scontrol" in done.stderr)
        )  # it asked to be queued again; there is no queue here
    assert codes == [(75, True), (1, False)]
    assert house.causes(folder) == ["stalled", "stalled", "gave up"]
    assert (folder / rundir.LOG).read_text().count("rank 0: no answer") == 2


def test_the_main_thread_is_the_last_one_with_our_code(tmp_path):
    said = f"""Thread 0x01 (most recent call first):
  File "/usr/lib/python3.11/threading.py", line 324 in wait
  File "{tmp_path}/workers/data/cache.py", line 9 in fill

Current thread 0x02 (most recent call first):
  File "/site/torch/distributed/distributed_c10d.py", line 3411 in all_gather
  File "{tmp_path}/workers/engine/distributed.py", line 134 in exchange
  File "{tmp_path}/workers/engine/fit.py", line 150 in look
"""
    expected = "workers/engine/distributed.py:134 in exchange, which had called distributed_c10d.py:3411 in all_gather"
    assert stall.place(said, tmp_path) == expected
    assert stall.place("Fatal: nothing", tmp_path) == "not in our code"
