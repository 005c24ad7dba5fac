"""Failures on LSF's stand-in, which says of memory and limits what LSF says."""

import json
import os
import time

from launcher import why

LSF = ["worker=main_lmim", "env=lsf", "env.ngpu=0"]
SLOW = {"FAKE_STEP_S": "0.1"}
FAULTS = {"oom": [*range(10, 50)], "bug": [*range(60, 80)], "data": [*range(100, 115)], "kill": [*range(150, 160)]}
COUNTS = {why.HOST_OOM: 40, why.BUG: 20, why.DATA: 15, why.KILLED: 10}


def test_two_hundred_runs_with_four_causes_are_four_groups_and_their_commands_mend_them(house, lsf):
    more = {"FAKE_FAULTS": json.dumps(FAULTS)}
    house.run(
        *LSF, "env.canary=False", "job_name=sweep", "seed=range(200)", "env.max_submit=12", "epochs=1", "-q", **more
    )
    house.wait_for(lsf.idle, 180)
    found = house.causes_told("sweep")
    assert {kind: group["count"] for kind, group in found.items()} == COUNTS
    screen = house.run("why", "sweep", code=100).stdout.splitlines()
    assert screen[0] == "85 failed, 4 causes"
    assert [line.split("  ")[0] for line in screen[1::3]] == [f"{kind} x{n}" for kind, n in COUNTS.items()]
    house.say(found[why.HOST_OOM]["command"] + " -y -q", **more)
    (house.out / "mended").touch()
    for kind in (why.DATA, why.KILLED):
        house.say(found[kind]["command"] + " -y -q", **more)
    assert "20 runs ended by a bug" in house.run("retry", "sweep", "why=user bug", "-y", code=4).stderr
    house.wait_for(lsf.idle, 180)
    assert {kind: group["count"] for kind, group in house.causes_told().items()} == {why.BUG: 20}


def test_memory_and_limits_as_lsf_reports_them(house, lsf):
    """The supervisor is killed; what LSF's report says of the element comes after that, into the job's own log."""
    house.run(*LSF, "seed=0,1", "epochs=600", "env.mem_gb=20", "env.vars.A=b", **SLOW)
    house.wait_for(lambda: len(house.runs()) == 2 and all(house.steps(f) for f in house.runs()))
    (number,) = lsf.state()["jobs"]
    for index, reason in (("1", "TERM_MEMLIMIT: job killed after reaching LSF memory usage limit"),
                          ("2", "TERM_RUNLIMIT: job killed after reaching LSF run time limit")):  # fmt: skip
        lsf.kill(number, index, reason)
    house.wait_for(lsf.idle)
    found = house.causes_told()
    assert {kind: group["count"] for kind, group in found.items()} == {why.HOST_OOM: 1, why.TIME: 1}
    assert found[why.HOST_OOM]["command"].endswith("--set env.mem_gb=30")
    run = found[why.HOST_OOM]["runs"][0]
    assert "TERM_MEMLIMIT" in house.run("logs", run, "--job").stdout
    assert house.run("logs", run, "--tail", "1").stdout.count("\n") == 1
    for group in found.values():
        house.say(group["command"], FAKE_STEP_S="0")
    house.wait_for(lambda: house.all("finished"))
    assert "30GB" in (sorted(house.out.glob("submissions/*/0.bsub"))[1].read_text())


def test_prune_leaves_what_is_queued(house, lsf):
    house.run(*LSF, "env.extra.H=true")
    old = time.time() - 99 * 86400
    for path in [*house.out.glob("capsules/*"), *house.out.glob("*/*/run.json"), *house.out.glob("submissions/*/*")]:
        os.utime(path, (old, old))
    assert "nothing may go" in house.run("prune", "-y").stdout
    lsf.fault("bjobs", "hang", times=9)
    house.run("prune", "-y", code=3, SIGHTLINE_LSF_TIMEOUT_S="0.5")  # not known, nothing goes
    (lsf.folder / "faults.json").unlink()
    assert len(house.runs()) == 1
    lsf.call("bkill", *lsf.state()["jobs"])
    house.run("prune", "-y")
    assert house.runs() == []
