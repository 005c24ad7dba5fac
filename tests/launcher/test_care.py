"""Care for many runs where there is no scheduler: canary, breaker, status; and what a canary is."""

import dataclasses
import json

import pytest

from contract import rundir
from launcher import canary, launches, sweep

SLOW = {"FAKE_STEP_S": "0.1"}


def plan(*words: str, out):
    return launches.of_launch(sweep.points([*words, f"output_dir={out}"]))


def test_a_canary_is_the_same_run_at_smoke_scale_through_all_stages(tmp_path):
    found = plan("worker=main_lmim", "seed=range(30)", "then=[main_knn,main_linprobe]", out=tmp_path)
    assert canary.wanted(found.todo())
    small = canary.of(found, found.todo())
    assert [run.stage for run in small] == ["lmim canary", "knn canary", "linprobe canary"]
    first, *others = small
    assert first.settings.smoke == canary.STEPS
    assert {run.parents for run in others} == {(first.identity,)}
    assert not {run.identity for run in small} & {run.identity for run in found.runs}
    same = dataclasses.replace(first.settings, smoke=None)
    assert same.science() == found.runs[0].settings.science()
    assert not canary.wanted(plan("worker=main_lmim", "seed=range(20)", out=tmp_path).todo())
    assert not canary.wanted(plan("worker=main_lmim", "seed=range(30)", "env.canary=False", out=tmp_path).todo())
    assert not canary.wanted(plan("worker=main_lmim", "seed=range(30)", "smoke=3", out=tmp_path).todo())


def test_a_canary_goes_first_and_when_it_fails_nothing_else_starts(house):
    words = ["worker=main_lmim", "seed=range(11)", "then=[main_knn]", "env.max_parallel=3"]
    failed = house.run(*words, FAKE_FAIL="0", code=100)
    assert "canary: seed=0" in failed.stderr
    assert "22 runs wait for it" in failed.stderr
    (tried,) = [f for f in house.runs() if rundir.attempts_file(f, 0).exists()]
    assert rundir.read_run(tried)["stage"] == "lmim canary"
    house.run(*words, code=0)
    assert len(house.runs()) == 24
    assert house.all("finished")


@pytest.mark.parametrize("limit", [3, 0])
def test_the_breaker_stops_a_launch_here_too(house, limit):
    faults = {"FAKE_FAULTS": json.dumps({"bug": [*range(6)]})}
    words = ["worker=main_lmim", "seed=range(6)", f"env.breaker={limit}", "env.max_parallel=1"]
    done = house.run(*words, **faults, code=100)
    states = [state for _, _, state in house.states(code=100)]
    assert states.count("failed") == (limit or 6)
    assert states.count("held") == (3 if limit else 0)
    assert ("held, and 2 more" in done.stderr) == bool(limit)
    if limit:
        house.run("retry", ":held", code=0)  # without the fault
        assert [state for _, _, state in house.states(code=100)].count("finished") == 3


def test_runs_that_end_in_different_ways_do_not_hold_the_rest(house):
    faults = {"FAKE_FAULTS": json.dumps({"bug": [0, 3], "data": [1], "kill": [2]})}
    house.run("worker=main_lmim", "seed=range(6)", "env.max_parallel=1", **faults, code=100)
    assert [state for _, _, state in house.states(code=100)] == ["failed"] * 4 + ["finished"] * 2
    shown = house.run("status", code=100).stdout
    assert "2 runs: user bug: KeyError:" in shown
    assert "data missing: " in shown
    assert "next: python launcher.py why" in shown


def test_status_of_what_runs_says_how_long_and_from_which_step(house):
    words = ["worker=main_lmim", "seed=0,1", "epochs=40", "env.max_parallel=2"]
    launched = house.start(*words, **SLOW)
    house.wait_for(lambda: len([f for f in house.runs() if len(house.steps(f)) > 5]) == 2)
    launched.terminate()
    launched.communicate(timeout=60)
    launched = house.start(*words, FAKE_STEP_S="0.3")
    house.wait_for(lambda: house.all("running") and all(len(house.attempts(f)) == 3 for f in house.runs()))
    at = [len(house.steps(f)) for f in house.runs()]
    house.wait_for(lambda: all(len(house.steps(f)) > n + 1 for f, n in zip(house.runs(), at, strict=True)))
    shown = house.run("status", code=101).stdout
    assert "requeued 2, to go on from step" in shown
    assert "attempt 2, from step" in shown
    assert " left (until " in shown
    lines = [json.loads(line) for line in house.run("status", "--json", code=101).stdout.splitlines()]
    assert all(line["attempts"] == 2 and line["resumed_at"] > 5 and line["left_s"] > 0 for line in lines)
    assert all(0 < line["metrics"]["train/loss"] < 1 for line in lines)
    watched = house.run("status", "--watch", "0.3", code=0)
    launched.communicate(timeout=60)
    assert launched.returncode == 0
    screens = watched.stdout.count("2 runs")
    assert screens > 1
    assert watched.stdout.rstrip().splitlines()[-1].startswith("lmim")


def test_one_screen_at_any_size(house):
    for seed in range(600):
        folder = house.out / ("main_lmim", "main_knn")[seed % 2] / f"{seed:012x}"
        folder.mkdir(parents=True)
        info = {"schema": 1, "identity": folder.name, "group": "g", "name": "n", "worker": folder.parent.name}
        rundir.write_json(folder / rundir.RUN, {**info, "seed": seed, "stage": "s", "parents": []}, sync=False)
        journal = rundir.Journal(rundir.attempts_file(folder, 0))
        if seed % 3:
            journal.append({"event": "start", "attempt": "a", "time": seed, "step": 0, "host": "h"})
            end = {"event": "end", "attempt": "a", "time": seed + 1, "cause": ("finished", "failed")[seed % 2]}
            journal.append(end | ({"why": "user bug", "mark": f"{seed % 20}", "said": "x" * 300} if seed % 2 else {}))
            if seed % 2 == 0:
                rundir.write_json(folder / rundir.DONE, {"metrics": {"knn/top1": seed}}, sync=False)
        journal.close()
    lines = house.run("status", code=100, COLUMNS="100").stdout.splitlines()
    assert len(lines) < 20
    assert "and 5 more causes: python launcher.py why" in "\n".join(lines)
    assert len(house.run("status", "--json", code=100).stdout.splitlines()) == 600
