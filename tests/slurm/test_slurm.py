"""The launcher against a real Slurm: what is submitted runs, once, and comes back whatever befalls it."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from contract import rundir
from tests.house import edit, killed_at_any_step, with_real_workers

CPU = "env.ngpu=0"
HOLD = "env.extra.hold=true"
SLOW = {"FAKE_STEP_S": "0.2"}


def test_the_published_way_to_submit(house):
    done = house.run("worker=main_lmim", "env.slurm=True")
    assert "1 run of lmim as job" in done.stderr
    assert "done" not in done.stdout
    house.wait_for(lambda: house.all("finished"))
    (folder,) = house.runs()
    assert "devices 0" in (folder / "log.txt").read_text()  # Slurm's GPU
    assert "nothing to do" in house.run("worker=main_lmim", "env.slurm=True").stderr
    assert "finished" in house.run("status").stdout


def test_an_array_with_a_cap_is_one_submission_and_a_dry_run_shows_its_script(house, cluster):
    words = ["worker=main_lmim", "env=slurm", CPU, "seed=range(50)", "env.max_parallel=12", "env.canary=False"]
    script = house.run(*words, "-n").stdout
    assert "#SBATCH --array=0-49%12" in script
    assert not house.out.exists()
    house.run(*words)
    (sent,) = house.out.glob("submissions/*/*.sbatch")
    assert [w for w in sent.read_text().split() if "submissions" not in w and "main_lmim-" not in w] == [
        w for w in script.split() if "submissions" not in w and "main_lmim-" not in w
    ]
    at_once = 0
    while not house.all("finished"):
        at_once = max(at_once, sum("RUNNING" in line for line in cluster.queue()))
        time.sleep(0.2)
    assert 1 < at_once <= 12


def test_what_is_queued_is_known_and_not_queued_again(house, cluster):
    words = ["worker=main_lmim", "env.slurm=True", CPU, "seed=0,1", HOLD]
    house.run(*words)
    assert "nothing to do" in house.run(*words).stderr
    plan = house.run("plan", *words, "--json")
    assert [json.loads(line)["state"] for line in plan.stdout.splitlines()] == ["queued", "queued"]
    status = house.run("status", "--json", code=101)
    assert [json.loads(line)["state"] for line in status.stdout.splitlines()] == ["queued", "queued"]
    house.run("cancel", "seed=0")
    assert len(cluster.queue()) == 1
    cluster.call("scancel", "-u", "root")  # from outside
    house.wait_for(lambda: not cluster.queue())
    states = [json.loads(line)["state"] for line in house.run("status", "--json", code=101).stdout.splitlines()]
    assert sorted(states) == ["cancelled", "waiting"]


def test_scancel_of_a_running_job_saves_it_and_is_final_until_told_otherwise(house, cluster):
    words = ["worker=main_lmim", "env.slurm=True", CPU, "epochs=20"]
    house.run(*words, **SLOW)
    house.wait_for(lambda: house.runs() and house.steps(house.runs()[0]))
    cluster.call("scancel", "-u", "root")
    house.wait_for(lambda: house.all("stopped") and not cluster.queue())
    assert "stopped" in house.run("status", code=101).stdout
    time.sleep(1)
    assert cluster.queue() == []
    house.run("retry", ":stopped")
    house.wait_for(lambda: house.all("finished"))
    assert house.steps(house.runs()[0]) == [*range(1, 21)]


@pytest.mark.parametrize("partition", ["preempt", "grace"])
def test_a_preempted_run_comes_back_and_goes_on(house, cluster, partition):
    house.run(
        "worker=main_lmim", "env=slurm", CPU, "epochs=25", f"env.partition={partition}", "env.nodelist=node1", **SLOW
    )
    house.wait_for(lambda: house.runs() and house.steps(house.runs()[0]))
    cluster.call("sbatch", "-p", "main", "-w", "node1", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1")
    house.wait_for(lambda: house.all("finished"))
    (folder,) = house.runs()
    assert house.causes(folder) == ["stopped", "finished"]
    assert house.steps(folder) == [*range(1, 26)]


def test_a_time_limit_is_foreseen_without_a_signal(house):
    limit = ["env.timeout_min=1", "env.signal_s=56"]
    house.run("worker=main_lmim", "env=slurm", CPU, "epochs=30", *limit, **SLOW)
    house.wait_for(lambda: house.all("finished"))
    (folder,) = house.runs()
    assert house.causes(folder)[0] == "stopped"
    assert house.causes(folder)[-1] == "finished"
    assert next(r["why"] for r in rundir.attempts(folder) if r.get("cause") == "stopped") == "time limit"
    assert house.steps(folder) == [*range(1, 31)]


def test_attempts_without_a_step_come_to_an_end(house, cluster):
    house.run("worker=main_lmim", "env=slurm", CPU, "env.max_requeue=0", "epochs=9", FAKE_STUCK="1", FAKE_STEP_S="0.1")
    house.wait_for(lambda: house.all("running"))
    time.sleep(1)
    cluster.call("scancel", "--signal=USR2", "-u", "root")
    house.wait_for(lambda: house.all("failed"))
    assert house.causes(house.runs()[0]) == ["stopped", "gave up"]
    assert "gave up after 1 attempts" in house.run("status", code=100).stdout


def test_a_lost_node_gives_the_run_to_another_one(house, cluster):
    house.run("worker=main_lmim", "env=slurm", CPU, "epochs=25", "env.exclude='node[1,2,4]'", **SLOW)
    house.wait_for(lambda: house.runs() and house.steps(house.runs()[0]))
    (folder,) = house.runs()
    cluster.box("crash", str(cluster.folder), "node3", "--down")
    try:
        before = house.steps(folder)
        assert len(before) < 25
        long_ago = time.time() - 2 * rundir.STALE_S  # so that nobody has to wait for that
        os.utime(folder / rundir.OWNER, (long_ago, long_ago))
        (job,) = (line.split()[0] for line in cluster.queue())
        cluster.call("scontrol", "update", f"JobId={job}", "ExcNodeList=")
        house.wait_for(lambda: house.all("finished"))
    finally:
        cluster.box("revive", str(cluster.folder), "node3")
    assert house.causes(folder) == ["finished"]
    assert len({r["host"].partition("/")[0] for r in rundir.attempts(folder)}) == 2
    assert house.steps(folder) == [*range(1, 26)]


@pytest.mark.parametrize(
    ("word", "slurm_says"),
    [
        ("env.partition=nowhere", "invalid partition"),
        ("env.ngpu=9", "Requested node configuration is not available"),
        ("env.extra.nonsense=1", "unrecognized option"),
    ],
)
def test_what_slurm_refuses_is_said_in_its_words_and_leaves_nothing_behind(house, cluster, word, slurm_says):
    done = house.run("worker=main_lmim", "env.slurm=True", "then=[main_knn]", word, code=3)
    assert slurm_says in done.stderr
    assert house.runs() == []
    assert [p for p in house.out.rglob("*") if p.name not in ("submissions", ".lock")
            and "capsules" not in p.parts] == []  # fmt: skip
    assert cluster.queue() == []


def test_a_scheduler_that_does_not_answer(house, tmp_path):
    nowhere = tmp_path / "slurm.conf"
    conf = Path(os.environ["SLURM_CONF"]).read_text()
    house.run("worker=main_lmim", "env.slurm=True", CPU)
    house.wait_for(lambda: house.all("finished"))
    lines = [f"{line.partition('=')[0]}=1" if line.startswith("SlurmctldPort") else line for line in conf.splitlines()]
    nowhere.write_text("\n".join([*lines, "MessageTimeout=1"]))
    done = house.run("worker=main_lmim", "env.slurm=True", CPU, "seed=5", code=3, SLURM_CONF=str(nowhere))
    assert "error:" in done.stderr
    assert len(house.runs()) == 1
    assert "what is queued is not known" in house.run("status", SLURM_CONF=str(nowhere)).stderr


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_launcher_killed_around_sbatch_doubles_and_loses_nothing(house, cluster, tmp_path, moment):
    real, reached = shutil.which("sbatch"), tmp_path / "reached"
    slow = tmp_path / "sbatch"
    call = f'{real} "$@"\n' if moment == "after" else ""
    slow.write_text(f"#!/bin/sh\n{call}touch {reached}\nsleep 30\n")
    slow.chmod(0o755)
    words = ["worker=main_lmim", "env.slurm=True", CPU, "seed=range(3)"]
    launcher = house.start(*words, PATH=f"{tmp_path}:{os.environ['PATH']}")
    house.wait_for(reached.exists)
    launcher.kill()
    launcher.communicate()
    house.run(*words)
    house.run(*words)
    house.wait_for(lambda: house.all("finished") and not cluster.queue())
    assert len(house.runs()) == 3
    assert len(cluster.call("sacct", "-X", "-n", "-S", "now-10minutes", "-o", "jobid").split()) >= 3
    for folder in house.runs():
        assert house.causes(folder) == ["finished"]


def test_an_answer_that_is_lost_is_looked_for_in_the_queue(house, cluster, tmp_path):
    mute = tmp_path / "sbatch"
    call = f'{shlex.quote(str(shutil.which("sbatch")))} "$@" >/dev/null'
    mute.write_text(f"#!/bin/sh\n{call}\necho 'sbatch: error: Socket timed out on send/recv operation' >&2\nexit 1\n")
    mute.chmod(0o755)
    house.run("worker=main_lmim", "env.slurm=True", CPU, HOLD, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert len(cluster.queue()) == 1
    (ids,) = house.out.glob("submissions/*/submitted.json")
    assert list(json.loads(ids.read_text()).values()) == [cluster.queue()[0].split("_")[0]]


def test_two_launchers_at_once_queue_every_run_once(house, cluster):
    words = ["worker=main_lmim", "env.slurm=True", CPU, "seed=range(4)", HOLD]
    for each in [house.start(*words) for _ in range(2)]:
        _, said = each.communicate(timeout=60)
        assert each.returncode == 0, said
    assert len(cluster.queue()) == 4


def test_code_that_is_edited_later_does_not_reach_what_is_queued(house, cluster):
    house.run("worker=main_lmim", "env.slurm=True", CPU, HOLD)
    worker = house.root / "workers" / "main_lmim.py"
    worker.write_text(worker.read_text().replace("VERSION 1", "VERSION 2"))
    cluster.call("scontrol", "release", cluster.queue()[0].split("_")[0])
    house.wait_for(lambda: house.all("finished"))
    assert "VERSION 1" in (house.runs()[0] / "log.txt").read_text()


def test_a_pipeline_where_one_element_fails_and_is_mended(house, cluster):
    words = ["worker=main_lmim", "env.slurm=True", CPU, "seed=0,1,2", "then=[main_knn,main_linprobe]"]
    house.run(*words, FAKE_FAIL="1")
    assert len([*house.out.glob("submissions/*/*.sbatch")]) == 3
    house.wait_for(lambda: not cluster.queue())
    states = [json.loads(line) for line in house.run("status", "--json", code=100).stdout.splitlines()]
    found = sorted((s["stage"], s["seed"], s["state"]) for s in states if s["state"] != "finished")
    assert found == [("knn", 1, "blocked"), ("linprobe", 1, "blocked"), ("lmim", 1, "failed")]
    house.run("retry", ":failed", "--force")
    house.wait_for(lambda: house.all("finished"))


def test_an_evaluation_follows_what_is_queued_already(house, cluster):
    words = ["worker=main_lmim", "env.slurm=True", CPU, "seed=0,1"]
    house.run(*words, HOLD)
    house.run(*words, "then=[main_knn]")
    house.wait_for(lambda: sum("Dependency" in line for line in cluster.queue()) == 2)
    cluster.call("scontrol", "release", *{line.split("_")[0] for line in cluster.queue() if "JobHeld" in line})
    house.wait_for(lambda: house.all("finished"))


def test_a_launch_from_within_a_job(house, cluster):
    words = [
        sys.executable,
        "launcher.py",
        "worker=main_lmim",
        "env.slurm=True",
        "env.nodelist=node1",
        CPU,
        "env.cpus=2",
    ]
    cluster.call("srun", "-w", "node2", "-c", "1", "--chdir", str(house.root), "env", "-u", "USER", *words)
    house.wait_for(lambda: house.all("finished"))


def test_a_local_launch_within_a_job_is_saved_when_the_job_is_told_to_leave(house, cluster):
    words = [sys.executable, "launcher.py", "worker=main_lmim", "epochs=50", "-q"]
    job = ["sbatch", "--parsable", "-o", "/dev/null", "--chdir", str(house.root), "--wrap", f"exec {shlex.join(words)}"]
    number = cluster.call(*job, **SLOW)
    house.wait_for(lambda: house.runs() and house.steps(house.runs()[0]))
    cluster.call("scancel", number)
    house.wait_for(lambda: not cluster.queue() and house.all("stopped"))
    assert house.causes(house.runs()[0]) == ["stopped"]


def test_a_person_may_requeue_a_running_job(house, cluster):
    house.run("worker=main_lmim", "env=slurm", CPU, "epochs=25", **SLOW)
    house.wait_for(lambda: house.runs() and house.steps(house.runs()[0]))
    cluster.call("scontrol", "requeue", cluster.queue()[0].split()[0])
    house.wait_for(lambda: house.all("finished"))
    assert house.causes(house.runs()[0]) == ["stopped", "finished"]
    assert house.steps(house.runs()[0]) == [*range(1, 26)]


def test_no_accounting_no_user_name(house, cluster, tmp_path):
    for name in ("sbatch", "squeue", "scancel", "scontrol"):  # neither sacct nor sacctmgr
        (tmp_path / name).symlink_to(shutil.which(name))
    bare = {"PATH": str(tmp_path), "USER": "", "LOGNAME": ""}
    house.run("worker=main_lmim", "env.slurm=True", CPU, "seed=0,1", "env.vars.PATH=/usr/bin:/bin", **bare)
    house.wait_for(lambda: house.all("finished"))
    assert house.run("status", **bare).returncode == 0


def test_a_container_by_apptainer(house, tmp_path):
    """The image is not real: what stands in for apptainer runs the command, where Slurm's own commands are missing."""
    inside = tmp_path / "apptainer"
    inside.write_text(
        '#!/bin/bash\nset -eu\n[ "$1 $2" = "exec --bind" ]\n[ "$4" = lab.sif ]\nshift 4\nPATH=/nowhere exec "$@"\n'
    )
    inside.chmod(0o755)
    words = ["env.container=lab.sif", "env.container_by=apptainer", f"env.setup=['export PATH={tmp_path}:$PATH']"]
    limit = ["env.timeout_min=1", "env.signal_s=56"]
    house.run("worker=main_lmim", "env=slurm", CPU, "epochs=30", *words, *limit, **SLOW)
    house.wait_for(lambda: house.all("finished"))
    assert house.causes(house.runs()[0])[0] == "stopped"  # by its own clock, and queued again from outside
    assert house.steps(house.runs()[0]) == [*range(1, 31)]


def test_a_run_root_that_cannot_be_written(house, cluster):
    house.out.mkdir()
    words = [sys.executable, "launcher.py", "worker=main_lmim", "env.slurm=True", CPU]
    mounted = f"mount -t tmpfs -o ro none {shlex.quote(str(house.out))} && exec {shlex.join(words)}"
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", mounted], cwd=house.root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("Read-only file system")
    assert cluster.queue() == []


def test_killed_at_any_step_of_a_submission_and_said_again_every_run_is_queued_once(house, cluster, tmp_path):
    words = ["worker=main_lmim", "env.slurm=True", CPU, "seed=0,1", "then=[main_knn]", HOLD, "-q"]
    for step in killed_at_any_step(house, words, tmp_path, 6):
        assert len(cluster.queue()) == 4, step
        assert {state for _, _, state in house.states(code=101)} == {"queued"}
        cluster.empty()
        house.wait_for(lambda: not cluster.queue())
        shutil.rmtree(house.out)


@pytest.mark.parametrize("where", ["slurm", "local"])
def test_hydras_own_launchers(house, cluster, where):
    place = f"hydra.sweep.dir={house.out}/hydra"
    house.run("-m", f"hydra/launcher=submitit_{where}", place, "worker=main_lmim", "seed=0,1", "epochs=2", CPU)
    assert house.all("finished")
    assert len(house.runs()) == 2


def test_a_site_with_short_arrays_gets_more_of_them(strict_house, strict_cluster):
    strict_house.run(
        "worker=main_lmim", "env=slurm", CPU, "env.canary=False", "seed=range(12)", "then=[main_knn]", HOLD
    )
    assert len([*strict_house.out.glob("submissions/*/*.sbatch")]) == 4
    assert len(strict_cluster.queue()) == 24


def test_a_site_that_takes_few_jobs_gets_jobs_that_do_several_runs(strict_house, strict_cluster):
    strict_cluster.call("sacctmgr", "-i", "modify", "user", "root", "set", "MaxSubmitJobs=4")
    try:
        words = ["worker=main_lmim", "env.slurm=True", CPU, "seed=range(5)", "then=[main_knn]"]
        strict_house.run(*words, FAKE_FAIL="2")
        strict_house.wait_for(lambda: not strict_cluster.queue())
        odd = [s for s in strict_house.states(code=100) if s[2] != "finished"]
        assert odd == [("knn", 2, "blocked"), ("lmim", 2, "failed")]
        # One of those that share a job is taken back; the others of that job are done.
        strict_house.run("worker=main_lmim", "env.slurm=True", CPU, "seed=range(10,18)", HOLD)
        assert len(strict_cluster.queue()) == 4
        assert (
            "the site takes 0 more jobs"
            in strict_house.run("worker=main_lmim", "env=slurm", CPU, "seed=30", code=3).stderr
        )
        strict_house.run("cancel", "seed=10")
        assert len(strict_cluster.queue()) == 4
        strict_cluster.call("scontrol", "release", *{line.split("_")[0] for line in strict_cluster.queue()})
        strict_house.wait_for(lambda: not strict_cluster.queue())
        held = [s for s in strict_house.states(code=100) if s[1] >= 10]
        assert [s[2] for s in held] == ["cancelled"] + ["finished"] * 7
    finally:
        strict_cluster.call("sacctmgr", "-i", "modify", "user", "root", "set", "MaxSubmitJobs=-1")


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("env.account=nowhere", "Invalid account"),
        ("env.timeout_min=61", "env.timeout_min=61: Requested time limit is invalid"),
    ],
)
def test_what_a_strict_site_refuses_is_said_in_its_words(strict_house, strict_cluster, word, said):
    done = strict_house.run("worker=main_lmim", "env.slurm=True", CPU, word, code=3)
    assert said in done.stderr
    assert strict_house.runs() == []
    assert strict_cluster.queue() == []


REAL = ["worker=main_lmim", "data=fake", "data.size=16", "data.length=96", "grid_size=4", "num_vis=5", "batch_size=8"]


def test_two_nodes_of_two_processes(house):
    with_real_workers(house)
    house.run(*REAL, "env.slurm=True", CPU, "env.nodes=2", "env.nproc=2", "epochs=2", "env.threads=1")
    house.wait_for(lambda: house.all("finished"), 120)
    (folder,) = house.runs()
    hosts = {r["host"].partition("/")[0] for r in rundir.attempts(folder)}
    assert len(hosts) == 2
    assert rundir.read_run(folder)["processes"] == 4
    assert yaml.safe_load((folder / "config.yaml").read_text())["env"]["nodes"] == 2


def test_a_preempted_training_has_the_bytes_of_an_undisturbed_one(house, cluster):
    with_real_workers(house)
    words = [*REAL, "env=slurm", CPU, "epochs=12", "env.threads=1", "env.partition=preempt"]
    house.run(*words, "env.nodelist=node1")
    house.wait_for(lambda: house.runs() and house.steps(house.runs()[0]), 60)
    cluster.call("sbatch", "-p", "main", "-w", "node1", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1")
    house.run(*words, f"output_dir={house.root}/calm", "env.nodelist=node2")
    calm = house.root / "calm" / "main_lmim" / house.runs()[0].name
    house.wait_for(lambda: house.all("finished") and rundir.state(calm) == "finished", 90)
    assert house.causes(house.runs()[0]) == ["stopped", "finished"]
    assert (house.runs()[0] / "encoder.pt").read_bytes() == (calm / "encoder.pt").read_bytes()


DRILL = ["drill", "worker=main_lmim", "env=slurm", CPU, "epochs=50", "env.nodelist=node1", "--steps", "30"]


def test_a_drill_preempts_by_slurms_own_signals(house, cluster):
    said = json.loads(house.run(*DRILL, "--json", FAKE_SAVE="7", **SLOW).stdout)
    warned, killed = said["runs"]
    assert (said["scheduler"], said["equal"]) == ("slurm", True)
    assert (warned["attempts"], warned["identical"]) == (2, True)
    assert warned["interrupted"] == warned["resumed"]
    assert (killed["attempts"], killed["identical"]) == (3, True)
    assert killed["resumed"][1] % 7 == 0 < killed["resumed"][1] < killed["interrupted"][1]
    assert [*house.out.glob("drills/*")] == []
    cluster.empty()


@pytest.mark.slow
def test_a_drill_on_slurm_catches_a_worker_that_forgets(house):
    done = house.run(*DRILL, code=100, FAKE_FORGETS="1", **SLOW)
    assert "differs by" in done.stdout
    assert "train/sum" in done.stdout


HANG = """            step += 1
            if step == 7 and distributed.rank() == 1 and not (hung := checkpoint.path.with_name("hung")).exists():
                hung.touch()
                time.sleep(3600)
"""


@pytest.mark.slow
def test_what_hangs_on_two_nodes_says_where_on_both_and_is_queued_again(house):
    with_real_workers(house)
    edit(house.root / "workers" / "engine" / "fit.py", "            step += 1\n", HANG)
    edit(house.root / "workers" / "engine" / "pulse.py", "EVERY_S = 5.0", "EVERY_S = 0.2")
    words = ["env.slurm=True", CPU, "env.nodes=2", "env.nproc=1", "env.threads=1", "env.stall_min=0.2", "log_every=1"]
    house.run(*REAL, *words, "epochs=2", "checkpoint_minutes=0")
    house.wait_for(lambda: house.all("finished"), 300)
    (folder,) = house.runs()
    first, *_ = rundir.attempts(folder)
    for rank in (0, 1):
        assert "in fit" in rundir.stacks_file(folder, first["attempt"], rank).read_text()
    assert "rank 1: workers/engine/fit.py:" in (folder / rundir.LOG).read_text()
    for node in (0, 1):
        records, _ = rundir.read_journal(rundir.attempts_file(folder, node))
        assert next(r["cause"] for r in records if r["event"] == "end") == "stalled"
