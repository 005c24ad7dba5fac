"""A sweep that nobody watches, on the stand-in for LSF: a canary first, a breaker behind it, runs that share a job."""

import json
import os
import subprocess
import sys

from contract import rundir

LSF = ["worker=main_lmim", "env=lsf", "env.ngpu=0"]
TYPO = {"FAKE_FAULTS": json.dumps({"bug": [*range(300)]})}


def test_a_typo_costs_three_runs_and_not_two_hundred(house, lsf):
    words = [*LSF, "seed=range(200)", "then=[main_knn]", "env.canary=False", "-q"]
    house.run(*words, "env.max_parallel=2", **TYPO)
    house.wait_for(lambda: any(house.out.glob("submissions/*/held.*.json")))
    house.wait_for(lambda: "RUN" not in lsf.stats() and "PSUSP" in lsf.stats())
    assert len(house.tried()) <= 4  # the one beside the third had begun
    shown = house.run("status", code=100).stdout
    assert "ended alike: KeyError:" in shown
    assert ":held" in shown
    house.run(*words, "env.extra.H=true")  # mended: all of them queued once
    jobs = [*lsf.state()["jobs"].values()]
    waiting = [e for job in jobs for e in job["elements"].values() if e["stat"] not in ("DONE", "EXIT")]
    assert len(waiting) == 400
    assert {state for _, _, state in house.states(code=101)} == {"queued"}


def test_a_canary_that_fails_releases_nothing(house, lsf):
    words = [*LSF, "seed=range(12)", "then=[main_knn]", "-q"]
    house.run(*words, FAKE_FAIL="0")
    house.wait_for(lsf.idle)
    assert house.tried() == ["lmim canary 0"]
    assert {s[2] for s in house.states(code=100)} == {"failed", "blocked"}
    house.run(*words)
    house.wait_for(lambda: house.all("finished"), 90)
    assert len(house.runs()) == 26
    begun = {f: min(r["time"] for r in rundir.attempts(f)) for f in house.runs()}
    ends = {f: max(r["time"] for r in rundir.attempts(f)) for f in house.runs()}
    first = {f for f in house.runs() if "canary" in rundir.read_run(f)["stage"]}
    assert max(ends[f] for f in first) <= min(begun[f] for f in begun.keys() - first)
    assert "by canary: lmim" in house.run("plan", *LSF, "seed=range(40)", "then=[main_knn]").stdout


def test_two_terminals_watch_with_one_call(house, lsf, tmp_path):
    house.run(*LSF, "seed=range(3)", "env.extra.H=true", "-q")
    before = lsf.calls("bjobs")
    command = [sys.executable, "launcher.py", "status", "--watch", "0.2"]
    seen = [tmp_path / "one", tmp_path / "two"]
    terminals = []
    for path in seen:
        with path.open("w") as file:
            env = house.environ(PATH=os.environ["PATH"], SIGHTLINE_QUEUE_S="30")
            terminals.append(subprocess.Popen(command, cwd=house.root, env=env, stdout=file, stderr=file))
    try:
        house.wait_for(lambda: all(path.read_text().count("3 runs") > 2 for path in seen))
        assert lsf.calls("bjobs") - before == 1
    finally:
        for each in terminals:
            each.kill()
            each.wait()


def test_several_runs_in_one_job_each_with_its_own_end(house, lsf):
    words = [*LSF, "seed=range(5)", "then=[main_knn]", "epochs=25", "env.pack=3", "env.mem_gb=2", "-q"]
    house.run(*words, FAKE_STEP_S="0.2", FAKE_FAIL="1")
    first = (house.out / "submissions").glob("*/0.bsub")
    text = next(first).read_text()
    assert "[1-2]" in text
    assert "#BSUB -n 3\n" in text
    assert "#BSUB -M 6GB\n" in text
    house.wait_for(lambda: len([f for f in house.runs() if house.steps(f)]) == 4)
    lsf.call("bkill", "-s", "USR2", min(lsf.state()["jobs"], key=int))
    house.wait_for(lambda: len([f for f in house.runs() if rundir.state(f) == "finished"]) == 8, 90)
    house.wait_for(lsf.idle)
    odd = [s for s in house.states(code=100) if s[2] != "finished"]
    assert odd == [("knn", 1, "blocked"), ("lmim", 1, "failed")]
    mains = [f for f in house.runs() if f.parent.name == "main_lmim"]
    assert {("stopped", "finished"), ("failed",)} <= {tuple(house.causes(f)) for f in mains}
    assert all(house.steps(f) == [*range(1, 26)] for f in mains if len(house.causes(f)) == 2)
