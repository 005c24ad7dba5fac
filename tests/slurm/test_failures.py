"""Failures on a real Slurm: what it writes about them is read, grouped, and mended by the command that is printed.

This Slurm enforces no memory limits (no cgroups): its words about memory are among the kept texts of test_why.py.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from contract import rundir
from launcher import why

CPU = "env.ngpu=0"
SLOW = {"FAKE_STEP_S": "0.2"}
FAULTS = {"oom": [*range(10, 50)], "bug": [*range(60, 80)], "disk": [*range(100, 115)], "kill": [*range(150, 160)]}
COUNTS = {why.HOST_OOM: 40, why.BUG: 20, why.DISK: 15, why.KILLED: 10}


def test_two_hundred_runs_with_four_causes_are_four_groups_and_their_commands_mend_them(house, cluster):
    """12 jobs do 200 runs: what Slurm and the supervisors say of one is not taken for another's."""
    more = {"FAKE_FAULTS": json.dumps(FAULTS)}
    words = ["worker=main_lmim", "job_name=sweep", "env.slurm=True", CPU, "seed=range(200)", "env.max_submit=12"]
    house.run(*words, "env.canary=False", "epochs=1", "-q", **more)
    house.wait_for(lambda: not cluster.queue(), 180)
    found = house.causes_told("sweep")
    assert {kind: group["count"] for kind, group in found.items()} == COUNTS
    screen = house.run("why", "sweep", code=100).stdout.splitlines()
    assert screen[0] == "85 failed, 4 causes"
    assert len(screen) == 1 + 3 * 4
    assert [line.split("  ")[0] for line in screen[1::3]] == [f"{kind} x{n}" for kind, n in COUNTS.items()]
    for kind in (why.HOST_OOM, why.DISK, why.KILLED):
        if kind == why.DISK:
            (house.out / "mended").touch()
        house.say(found[kind]["command"] + " -y -q", **more)
        house.wait_for(lambda: not cluster.queue(), 60)  # the site takes 12 jobs at once
    assert "20 runs ended by a bug" in house.run("retry", "sweep", "why=user bug", "-y", code=4).stderr
    house.run("retry", "sweep", "why=user bug", "-y", "-q", "--force", **more)
    house.wait_for(lambda: not cluster.queue(), 180)
    assert house.all("finished")
    assert house.causes_told(code=0) == {}


def test_a_node_that_died_is_named_and_left_out(house, cluster):
    words = ["worker=main_lmim", "env=slurm", CPU, "epochs=99", "env.exclude='node[1,2,4]'"]
    house.run(*words, "env.extra.requeue=null", "env.extra.no-requeue=true", **SLOW)
    house.wait_for(lambda: house.runs() and house.steps(house.runs()[0]))
    (folder,) = house.runs()
    cluster.box("crash", str(cluster.folder), "node3", "--down")
    try:
        house.wait_for(lambda: not cluster.queue())
        long_ago = time.time() - 2 * rundir.STALE_S  # so that nobody has to wait for that
        os.utime(folder / rundir.OWNER, (long_ago, long_ago))
        (group,) = house.causes_told().values()
        assert (group["kind"], group["nodes"]) == (why.NODE, ["node3"])
        assert group["command"].endswith("--set 'env.exclude=node[1,2,4],node3'")
        house.say(group["command"].replace("node[1,2,4],", ""))
        house.wait_for(lambda: house.all("finished"))
    finally:
        cluster.box("revive", str(cluster.folder), "node3")


def test_a_supervisor_that_slurm_killed_and_one_that_never_came(house, cluster):
    house.run("worker=main_lmim", "env=slurm", CPU, "epochs=99", "seed=1", **SLOW)
    house.wait_for(lambda: house.runs() and house.steps(house.runs()[0]))
    for path in Path("/proc").glob("[0-9]*/cmdline"):  # as this machine numbers them
        words = path.read_bytes().decode().split("\0")
        if words[:3] == [sys.executable, "-m", "launcher.supervisor"] and str(house.out) in words[4]:
            os.kill(int(path.parent.name), signal.SIGKILL)
    house.run("worker=main_lmim", "env=slurm", CPU, "seed=2", "env.python=/no/python")
    house.wait_for(lambda: not cluster.queue())
    for owner in house.out.glob("*/*/owner.json"):
        os.utime(owner, (1, 1))  # so that nobody has to wait until its silence tells
    found = house.causes_told()
    assert "the supervisor was killed" in found[why.KILLED]["said"]
    assert "/no/python: No such file or directory" in found[why.UNKNOWN]["said"]
    (unborn,) = found[why.UNKNOWN]["runs"]
    assert "no log yet" in house.run("logs", unborn).stderr
    assert "/no/python" in house.run("logs", unborn, "--job").stdout
    house.say(found[why.UNKNOWN]["command"] + " --set env.python=null")
    house.say(found[why.KILLED]["command"])
    house.wait_for(lambda: house.all("finished"))


def test_what_a_person_ended_and_what_the_clock_did(house, cluster):
    house.run("worker=main_lmim", "env=slurm", CPU, "epochs=99", "seed=0,1", **SLOW)
    house.wait_for(lambda: len(house.runs()) == 2 and all(house.steps(f) for f in house.runs()))
    follower = house.start("logs", "main_lmim", "-f")
    cluster.call("scancel", "-u", "root")
    house.wait_for(lambda: house.all("stopped") and not cluster.queue())
    (group,) = house.causes_told(code=101).values()
    assert (group["kind"], group["count"]) == (why.PREEMPTED, 2)
    house.say(group["command"])
    house.wait_for(lambda: house.all("finished"))
    out, _ = follower.communicate(timeout=60)
    assert {line.partition(" |")[0].partition(" ")[2] for line in out.splitlines()} == {"seed=0", "seed=1"}
