"""The launcher against LSF's stand-in: whatever LSF does, every run exists once, ends once, and people are told."""

import json
import shutil
import subprocess
import sys
import time

import pytest

from contract import rundir
from tests.house import ROOT, killed_at_any_step

CPU = "env.ngpu=0"
LSF = ["worker=main_lmim", "env=lsf", CPU]
SLOW = {"FAKE_STEP_S": "0.1"}


def started(lsf) -> list[int]:
    """How often each element was started."""
    jobs = lsf.state()["jobs"].values()
    return [sum("Starting" in line for line in e["history"]) for job in jobs for e in job["elements"].values()]


def test_an_array_with_a_cap_runs_and_nothing_that_was_said_is_dropped(house, lsf):
    house.run("worker=main_lmim", "env.lsf=True", "seed=range(12)", "env.max_parallel=3", "env.partition=general")
    (job,) = lsf.state()["jobs"].values()
    assert job["queue"] == "general"
    assert (len(job["indexes"]), job["cap"]) == (12, 3)
    (sent,) = house.out.glob("submissions/*/0.bsub")
    lines = sent.read_text().splitlines()
    assert len(job["said"]) == sum(line.startswith("#BSUB") for line in lines)
    house.wait_for(lambda: house.all("finished"))
    assert started(lsf) == [1] * 12
    assert "devices 0" in (house.runs()[0] / "log.txt").read_text()
    assert "nothing to do" in house.run("worker=main_lmim", "env.lsf=True", "seed=range(12)").stderr


def test_a_thousand_runs_are_one_array_and_one_question(house, lsf):
    house.run(*LSF, "seed=range(1000)", "env.canary=False", "env.extra.H=true", "-q")
    before = lsf.calls("bjobs")
    assert len(lsf.stats()) == 1000
    assert {state for _, _, state in house.states(code=101)} == {"queued"}
    assert lsf.calls("bjobs") - before == 1


def test_a_pipeline_where_one_element_fails_and_is_mended(house, lsf):
    house.run(*LSF, "seed=0,1,2", "then=[main_knn,main_linprobe]", FAKE_FAIL="1")
    assert len(lsf.state()["jobs"]) == 3
    house.wait_for(lsf.idle)
    odd = [s for s in house.states(code=100) if s[2] != "finished"]
    assert odd == [("knn", 1, "blocked"), ("linprobe", 1, "blocked"), ("lmim", 1, "failed")]
    house.run("retry", ":failed", "--force")
    house.wait_for(lambda: house.all("finished"))
    assert len(lsf.state()["jobs"]) == 6


def test_what_was_warned_is_saved_and_queued_again_by_its_exit_code(house, lsf):
    house.run(*LSF, "epochs=25", **SLOW)
    house.wait_for(lambda: house.runs() and house.steps(house.runs()[0]))
    (number,) = lsf.state()["jobs"]
    lsf.call("bkill", "-s", "USR2", number)
    house.wait_for(lambda: house.all("finished"))
    assert house.causes(house.runs()[0]) == ["stopped", "finished"]
    assert house.steps(house.runs()[0]) == [*range(1, 26)]
    assert started(lsf) == [2]


def test_the_time_limit_is_foreseen_by_its_own_clock(house, lsf):
    lsf.profile(scale=1)  # the stand-in's own limit and warning do not come
    house.run(*LSF, "epochs=60", "env.timeout_min=1", "env.signal_s=58", **SLOW)
    house.wait_for(lambda: house.all("finished"))
    assert house.causes(house.runs()[0])[0] == "stopped"
    assert house.steps(house.runs()[0]) == [*range(1, 61)]


def test_bkill_by_a_person_saves_and_does_not_come_back(house, lsf):
    house.run(*LSF, "epochs=50", **SLOW)
    house.wait_for(lambda: house.runs() and house.steps(house.runs()[0]))
    lsf.call("bkill", *lsf.state()["jobs"])
    house.wait_for(lambda: lsf.idle() and house.all("stopped"))
    assert house.states(code=101) == [("lmim", 0, "stopped")]
    house.run("retry", ":stopped")
    house.wait_for(lambda: house.all("finished"))


def test_a_cancelled_run_stays_cancelled_even_if_bkill_was_lost_while_it_started(house, lsf):
    house.run(*LSF, "seed=0,1", "epochs=40", "env.max_parallel=1", **SLOW)
    house.wait_for(lambda: "RUN" in lsf.stats())
    lsf.fault("bkill", "lost", times=9)
    house.run("cancel", ":queued")
    house.run("cancel", ":running")
    house.wait_for(lambda: lsf.idle() and not any(house.out.glob("*/*/owner.json")))
    assert {state for _, _, state in house.states(code=103)} == {"cancelled"}
    assert sum("stopped" in house.causes(folder) for folder in house.runs()) == 1  # saved; the other never began


def test_brequeue_and_a_suspension_lose_nothing(house, lsf):
    house.run(*LSF, "epochs=25", **SLOW)
    house.wait_for(lambda: house.runs() and house.steps(house.runs()[0]))
    lsf.change("SSUSP")
    assert house.states(code=101) == [("lmim", 0, "running")]
    lsf.change("RUN")
    lsf.call("brequeue", *lsf.state()["jobs"])
    house.wait_for(lambda: house.all("finished"))
    assert house.steps(house.runs()[0]) == [*range(1, 26)]


def test_a_host_that_cannot_be_reached_is_not_given_up(house, lsf):
    house.run(*LSF, "epochs=15", **SLOW)
    house.wait_for(lambda: house.runs() and house.steps(house.runs()[0]))
    lsf.change("UNKWN")
    assert house.states(code=101) == [("lmim", 0, "running")]
    assert "nothing to do" in house.run(*LSF, "epochs=15").stderr
    house.wait_for(lambda: house.all("finished"))
    assert "nothing to do" in house.run(*LSF, "epochs=15").stderr  # though LSF still says UNKWN
    lsf.change("RUN")


@pytest.mark.parametrize("kind", ["mute", "noise", "killed", "duplicate"])
def test_however_bsub_answers_every_run_is_there_once(house, lsf, kind):
    lsf.fault("bsub", kind)
    house.run(*LSF, "seed=0,1", "env.extra.H=true")
    alive = [s for s in lsf.stats() if s not in ("DONE", "EXIT")]
    assert alive == ["PSUSP"] * 2
    assert {state for _, _, state in house.states(code=101)} == {"queued"}
    house.run(*LSF, "seed=0,1")
    assert len([s for s in lsf.stats() if s == "PSUSP"]) == 2


def test_an_answer_that_comes_too_late(house, lsf):
    lsf.fault("bsub", "late", seconds=8)
    house.run(*LSF, "seed=0,1", "env.extra.H=true")
    assert lsf.stats() == ["PSUSP"] * 2


def test_daemons_that_are_down(house, lsf):
    for call in ("bsub", "bjobs"):
        lsf.fault(call, "hang", times=9)
    done = house.run(*LSF, code=3, SIGHTLINE_LSF_TIMEOUT_S="0.5")
    assert "whether" in done.stderr
    assert "is not known" in done.stderr
    (lsf.folder / "faults.json").unlink()
    house.run(*LSF)
    house.wait_for(lambda: house.all("finished"))
    assert started(lsf) == [1]
    house.run(*LSF, "seed=5", "env.extra.H=true")
    lsf.fault("bjobs", "hang", times=9)
    assert "what is queued is not known" in house.run("status", code=None, SIGHTLINE_LSF_TIMEOUT_S="0.5").stderr


@pytest.mark.parametrize("kind", ["empty", "error", "drop"])
def test_bjobs_that_answers_nothing_or_in_part(house, lsf, kind):
    house.run(*LSF, "seed=range(6)", "env.extra.H=true")
    lsf.fault("bjobs", kind, times=2)
    house.run(*LSF, "seed=range(6)")
    assert lsf.stats() == ["PSUSP"] * 6


def test_jobs_that_lsf_forgot(house, lsf):
    house.run(*LSF, "seed=0,1", FAKE_FAIL="1")
    house.wait_for(lsf.idle)
    lsf.profile(clean_period_s=0)
    assert house.states(code=100) == [("lmim", 0, "finished"), ("lmim", 1, "failed")]
    house.run("retry", ":failed", "--force")
    house.wait_for(lambda: house.all("finished"))
    asked = lsf.calls("bjobs")
    house.run("status")
    house.run("status")
    assert lsf.calls("bjobs") - asked <= 1  # what is over is never asked for again


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("env.partition=nowhere", "nowhere: No such queue"),
        ("env.account=nobody", "Request aborted by esub"),
        ("env.timeout_min=60000", "Cannot exceed queue's hard limit"),
        ("env.extra.zz=1", "illegal option -- zz"),
        ("env.nodelist=node99", "Bad host name"),
    ],
)
def test_what_lsf_refuses_is_said_in_its_words_and_leaves_nothing_behind(house, lsf, word, says):
    done = house.run(*LSF, "then=[main_knn]", word, code=3)
    assert says in done.stderr
    assert house.runs() == []
    assert lsf.stats() == []
    assert lsf.calls("bsub") == 1  # what is final is not tried again


def test_a_launcher_killed_before_it_wrote_the_number_down(house, lsf):
    lsf.fault("bsub", "late", seconds=30)
    launcher = house.start(*LSF, "seed=0,1", "env.extra.H=true")
    house.wait_for(lambda: len(lsf.stats()) == 2)
    launcher.kill()
    launcher.communicate()
    house.run(*LSF, "seed=0,1")
    assert len(lsf.stats()) == 2


def test_two_launchers_at_once(house, lsf):
    both = [house.start(*LSF, "seed=range(4)", "env.extra.H=true") for _ in range(2)]
    assert [each.communicate(timeout=60) and each.returncode for each in both] == [0, 0]
    assert lsf.stats() == ["PSUSP"] * 4


def test_the_printed_script_can_be_sent_by_a_person(house, lsf):
    words = [*LSF, "seed=0,1,2", "epochs=2"]
    script = house.run(*words, "-n", "-q").stdout
    assert not house.out.exists()
    done = subprocess.run(
        ["bsub"], input=script, cwd=house.root, text=True, capture_output=True, env=house.environ(), check=False
    )
    assert done.returncode == 0, done.stderr
    house.wait_for(lambda: lsf.idle() and house.all("finished"))
    assert len(house.runs()) == 3
    assert started(lsf) == [1] * 3
    assert {state for _, _, state in house.states()} == {"finished"}


def test_code_that_is_edited_later_does_not_reach_what_is_queued(house, lsf):
    house.run(*LSF, "env.extra.H=true")
    worker = house.root / "workers" / "main_lmim.py"
    worker.write_text(worker.read_text().replace("VERSION 1", "VERSION 2"))
    lsf.call("bresume", *lsf.state()["jobs"])
    house.wait_for(lambda: house.all("finished"))
    assert "VERSION 1" in (house.runs()[0] / "log.txt").read_text()


def test_the_example_job_is_sent_as_it_is(house, lsf):
    text = (ROOT / "cluster_scripts" / "job.sh").read_text()
    text = text.replace("##BSUB -J sightline[1-5]%2\n#BSUB -J sightline\n", "#BSUB -J sightline[1-2]%2\n")
    text = text.replace("PYTHON=python3", f"PYTHON={sys.executable}").replace(
        "worker=main_lmim)", "worker=main_lmim epochs=20)"
    )
    sent = subprocess.run(
        ["bsub"], input=text, cwd=house.root, text=True, capture_output=True, env=house.environ(**SLOW), check=False
    )
    assert sent.returncode == 0, sent.stderr
    house.wait_for(lambda: len(house.runs()) == 2 and all(house.steps(f) for f in house.runs()))
    (number,) = lsf.state()["jobs"]
    lsf.call("bkill", "-s", "USR2", number)
    house.wait_for(lambda: lsf.idle() and house.all("finished"))
    assert sorted(rundir.read_run(f)["seed"] for f in house.runs()) == [1, 2]
    assert started(lsf) == [2, 2]
    for folder in house.runs():
        assert house.steps(folder) == [*range(1, 21)]


def test_a_run_that_others_hold_is_waited_for(house, lsf):
    """What LSF gave up may still live on its host: the fence keeps a second attempt away."""
    house.run(*LSF, "epochs=40", **SLOW)
    house.wait_for(lambda: house.runs() and house.steps(house.runs()[0]))
    (number,) = lsf.state()["jobs"]
    lsf.change("UNKWN")
    house.run("retry", ":failed", code=None)
    time.sleep(0.5)
    assert len(lsf.state()["jobs"]) == 1
    lsf.change("RUN")
    house.wait_for(lambda: house.all("finished"))
    assert house.steps(house.runs()[0]) == [*range(1, 41)]
    assert number


def test_killed_at_any_step_of_a_submission_and_said_again_every_run_is_queued_once(house, lsf, tmp_path):
    words = [*LSF, "seed=0,1", "then=[main_knn]", "env.extra.H=true", "-q"]
    for step in killed_at_any_step(house, words, tmp_path, 4):
        assert lsf.stats() == ["PSUSP"] * 4, step
        lsf.call("bkill", "0")
        (lsf.folder / "state.json").unlink()
        shutil.rmtree(house.out)


def test_two_hosts_of_two_processes(house, lsf):
    """LSF starts the first host's supervisor, which starts the other's; both hosts are this machine."""
    lsf.profile(hosts=["localhost", "127.0.0.1"])
    (lsf.folder / "bin" / "blaunch").write_text(
        '#!/bin/sh\n[ "$1 $2" = "-z 127.0.0.1" ] || exit 2\nshift 2\nexec "$@"\n'
    )
    (lsf.folder / "bin" / "blaunch").chmod(0o755)
    shutil.rmtree(house.root / "workers")
    shutil.copytree(ROOT / "workers", house.root / "workers", ignore=shutil.ignore_patterns("__pycache__"))
    tiny = ["data=fake", "data.size=16", "data.length=96", "grid_size=4", "num_vis=5", "batch_size=8", "epochs=2"]
    house.run(*LSF, *tiny, "env.nodes=2", "env.nproc=2", "env.threads=1")
    house.wait_for(lambda: house.all("finished"), 120)
    (folder,) = house.runs()
    assert rundir.read_run(folder)["processes"] == 4
    assert (folder / "attempts.1.jsonl").exists()
    house.wait_for(lsf.idle)
    assert lsf.stats() == ["DONE"]


@pytest.mark.slow
def test_a_drill_preempts_by_lsfs_own_signals(house, lsf):
    said = json.loads(house.run("drill", *LSF, "epochs=90", "--steps", "40", "--json", FAKE_SAVE="9", **SLOW).stdout)
    warned, killed = said["runs"]
    assert (said["scheduler"], said["equal"]) == ("lsf", True)
    assert (warned["attempts"], warned["identical"]) == (2, True)
    assert warned["interrupted"] == warned["resumed"]
    assert (killed["attempts"], killed["identical"]) == (3, True)
    assert killed["resumed"][1] % 9 == 0 < killed["resumed"][1] <= killed["interrupted"][1]
    assert started(lsf) == [1, 2, 1, 1, 1]  # queued again by its exit code; sent again twice after it was killed
    assert [*house.out.glob("drills/*")] == []


@pytest.mark.slow
def test_a_drill_on_lsf_catches_a_worker_that_forgets(house, lsf):
    done = house.run("drill", *LSF, "epochs=90", "--steps", "40", code=100, FAKE_FORGETS="1", **SLOW)
    assert "differs by" in done.stdout
    assert "train/sum" in done.stdout
