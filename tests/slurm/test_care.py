"""A sweep that nobody watches, on a real Slurm: a canary first, a breaker behind it, several runs in one job."""

import json
import os
import shutil
import subprocess
import sys

from contract import rundir

WORDS = ["worker=main_lmim", "env=slurm", "env.ngpu=0"]
TYPO = {"FAKE_FAULTS": json.dumps({"bug": [*range(300)]})}


def test_a_typo_costs_three_runs_and_not_two_hundred(house, cluster):
    words = [*WORDS, "seed=range(200)", "then=[main_knn]", "env.canary=False", "-q"]
    house.run(*words, "env.max_parallel=2", **TYPO)
    house.wait_for(lambda: any(house.out.glob("submissions/*/held.*.json")))
    house.wait_for(lambda: "RUNNING" not in str(cluster.queue()))
    assert len(house.tried()) <= 4  # the one beside the third had begun
    assert any("JobHeldUser" in line for line in cluster.queue())
    shown = house.run("status", code=100).stdout
    assert "ended alike: KeyError:" in shown
    (sweep,) = [path.parent.name for path in house.out.glob("submissions/*/manifest.json")]
    assert f"python launcher.py retry {sweep}:held" in shown
    assert f"python launcher.py cancel {sweep}:held" in shown
    # Mended and said again, everything is queued once: what was held, what waits for it, and what failed.
    house.run(*words, "env.extra.hold=true")
    assert len(cluster.queue()) == 400
    assert {state for _, _, state in house.states(code=101)} == {"queued"}


def test_what_is_held_can_be_given_up(house, cluster):
    house.run(*WORDS, "seed=range(8)", "env.breaker=1", "env.max_parallel=1", "-q", **TYPO)
    house.wait_for(lambda: any(house.out.glob("submissions/*/held.*.json")))
    house.wait_for(lambda: "RUNNING" not in str(cluster.queue()))
    house.run("cancel", ":held")
    house.wait_for(lambda: not cluster.queue())
    assert sorted({state for _, _, state in house.states(code=100)}) == ["cancelled", "failed"]


def test_a_canary_that_fails_releases_nothing(house, cluster):
    words = [*WORDS, "seed=range(12)", "then=[main_knn]", "-q"]
    house.run(*words, FAKE_FAIL="0")
    house.wait_for(lambda: not cluster.queue())
    assert house.tried() == ["lmim canary 0"]
    states = house.states(code=100)
    assert [s for s in states if s[2] == "failed"] == [("lmim canary", 0, "failed")]
    assert {s[2] for s in states} == {"failed", "blocked"}
    shown = house.run("status", code=100).stdout
    assert "canary   1 blocked, 1 failed; 24 runs wait for it" in shown
    assert "nothing but its canary has started" in shown
    # Mended: the canary again, then all of the rest.
    house.run(*words)
    house.wait_for(lambda: house.all("finished"), 90)
    assert len(house.runs()) == 26
    begun = {f: min(r["time"] for r in rundir.attempts(f)) for f in house.runs()}
    ends = {f: max(r["time"] for r in rundir.attempts(f)) for f in house.runs()}
    first = {f for f in house.runs() if "canary" in rundir.read_run(f)["stage"]}
    assert max(ends[f] for f in first) <= min(begun[f] for f in begun.keys() - first)
    # The next sweep of the same code does without, and knows what its runs will take.
    more = house.run("plan", *WORDS, "seed=range(40)", "then=[main_knn]").stdout
    assert "by canary: lmim" in more
    assert "of memory a process" in more
    house.run(*WORDS, "seed=range(40)", "then=[main_knn]", "env.extra.hold=true", "-q")
    assert len(cluster.queue()) == 2 * 28


def test_two_terminals_watch_with_one_call(house, cluster, tmp_path):
    house.run(*WORDS, "seed=range(3)", "env.extra.hold=true", "-q")
    real, calls = shutil.which("squeue"), tmp_path / "calls"
    (tmp_path / "squeue").write_text(f'#!/bin/sh\necho x >> {calls}\nexec {real} "$@"\n')
    (tmp_path / "squeue").chmod(0o755)
    env = house.environ(PATH=f"{tmp_path}:{os.environ['PATH']}", SIGHTLINE_QUEUE_S="30")
    command = [sys.executable, "launcher.py", "status", "--watch", "0.2"]
    seen = [tmp_path / "one", tmp_path / "two"]
    terminals = []
    for path in seen:
        with path.open("w") as file:
            terminals.append(subprocess.Popen(command, cwd=house.root, env=env, stdout=file, stderr=file))
    try:
        house.wait_for(lambda: all("queued" in path.read_text() for path in seen))
        house.wait_for(lambda: all(path.read_text().count("3 runs") > 2 for path in seen))  # the age is told anew
        assert calls.read_text().count("x") == 1
    finally:
        for each in terminals:
            each.kill()
            each.wait()


def test_several_runs_in_one_job_each_with_its_own_end(house, cluster):
    words = [*WORDS, "seed=range(5)", "then=[main_knn]", "epochs=25", "env.pack=3", "main_knn.env.pack=3", "-q"]
    house.run(*words, FAKE_STEP_S="0.2", FAKE_FAIL="1")
    sent = [path.read_text() for path in sorted(house.out.glob("submissions/*/*.sbatch"))]
    assert all("--array=0-1\n" in text and "--cpus-per-task=3\n" in text for text in sent)
    house.wait_for(lambda: len([f for f in house.runs() if house.steps(f)]) == 4)
    cluster.call("scancel", "--signal=USR2", "--state=RUNNING", "-u", "root")  # a warning, as before a preemption
    house.wait_for(lambda: len([f for f in house.runs() if rundir.state(f) == "finished"]) == 8, 90)
    house.wait_for(lambda: not cluster.queue())
    odd = [s for s in house.states(code=100) if s[2] != "finished"]
    assert odd == [("knn", 1, "blocked"), ("lmim", 1, "failed")]
    mains = [f for f in house.runs() if f.parent.name == "main_lmim"]
    assert {("stopped", "finished"), ("failed",)} <= {tuple(house.causes(f)) for f in mains}
    assert all(house.steps(f) == [*range(1, 26)] for f in mains if len(house.causes(f)) == 2)
