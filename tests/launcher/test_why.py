"""From logs to causes: real texts, kept with where they are from, and the failures of real processes."""

import json
import os
import shlex
from pathlib import Path

import pytest
import yaml

import contract.settings
from contract import rundir
from contract.settings.checks import SettingsError
from launcher import job_logs, mending, rundirs, why
from tests.house import build

TEXTS = sorted((Path(__file__).parent / "why").glob("*.txt"))


def read(path):
    """The header of a kept text, its log and its job's log."""
    head, _, rest = path.read_text().partition("-- ")
    told = dict(line.split(": ", 1) for line in head.splitlines())
    parts = dict(part.split("\n", 1) for part in ("-- " + rest).split("-- ")[1:]) if rest else {}
    return told, parts.get("log", ""), parts.get("job log", "")


@pytest.mark.parametrize("path", TEXTS, ids=lambda p: p.stem)
def test_a_kept_text_is_read_as_what_it_is(path):
    told, log, job_log = read(path)
    record = json.loads(told.get("record", '{"cause": "failed", "exit": 1}'))
    processes = int(told["processes"]) if "processes" in told else None
    found = why.of_text(log, record, job_log, data_path=told.get("data_path"), processes=processes)
    assert found.kind == told["kind"], found
    expected = json.loads(told.get("where", "{}"))
    assert {key: found.where.get(key) for key in expected} == expected
    assert found.said
    assert found.said.isprintable()


def test_every_kept_text_has_a_source_and_every_cause_a_text():
    told = [read(path)[0] for path in TEXTS]
    assert all(each.get("source") for each in told)
    assert {each["kind"] for each in told} == set(why.KINDS)


BUG = """\
{rank}Traceback (most recent call last):
{rank}  File "/scratch/{user}/runs/capsules/{capsule}/workers/main_lmim.py", line {line}, in main
{rank}    loss = model(batch)
{rank}  File "/home/{user}/env/lib/python3.11/site-packages/torch/nn/modules/module.py", line 1751, in _call_impl
{rank}    return forward_call(*args, **kwargs)
{rank}{error}
"""
ONE = {
    "rank": "",
    "user": "ada",
    "capsule": "0f1e2d3c4b5a6978",
    "line": 88,
    "error": "ValueError: 3 at 0x7f00 of /a/b/c.jpg",
}
SAME = [
    {"line": 91},
    {"user": "grace", "capsule": "ffffffffffffffff"},
    {"rank": "[rank1]: "},
    {"error": "ValueError: 12.5e-3 at 0x7fab of /z/c.jpg"},
]
OTHER = [{"error": "KeyError: 3 at 0x7f00 of /a/b/c.jpg"}, {"error": "ValueError: 3 before 0x7f00 of /a/b/c.jpg"}]


@pytest.mark.parametrize(("changes", "same"), [*((c, True) for c in SAME), *((c, False) for c in OTHER)])
def test_a_bug_has_one_mark_whatever_the_seed_the_rank_the_user_and_the_capsule(changes, same):
    ended = {"cause": "failed", "exit": 1}
    first, second = (why.of_text(BUG.format(**ONE | more), ended) for more in ({}, changes))
    assert first.kind == second.kind == why.BUG
    assert (first.mark == second.mark) == same


def test_mixed_lines_of_two_ranks_have_the_mark_of_one():
    ended = {"cause": "failed", "exit": 1}
    lines = BUG.format(**ONE).splitlines()
    mixed = "\n".join([lines[0], lines[1], lines[0], *[line for line in lines[2:] for _ in range(2)]])
    assert why.of_text(mixed, ended).mark == why.of_text("\n".join(lines), ended).mark


@pytest.mark.parametrize(
    "text", ["", "\x00\xff" * 9, "Traceback (most recent call last):\n" * 99, "a" * 99999, "\x1b[31mred"]
)
def test_whatever_a_log_holds_there_is_an_answer(text):
    for record in (None, {}, {"cause": "failed"}, {"cause": "killed", "signal": 99}, {"event": "start", "job": "1_2"}):
        assert why.of_text(text, record, text).said.isprintable()


def run_of_two_nodes(folder, job, log, end):
    """Four processes on two nodes, ended so; and where Slurm keeps what it says of that job."""
    folder.mkdir(parents=True)
    run = {"schema": 1, "identity": folder.name, "group": "g", "worker": "main_lmim", "seed": 0, "processes": 4}
    rundir.write_json(folder / rundir.RUN, run)
    (folder / rundir.LOG).write_text("of an older attempt: CUDA out of memory\n" + log)
    for node, host in enumerate(("alpha", "beta")):
        records = [{"event": "start", "attempt": "a", "job": job, "host": f"{host}/pid:[1]", "log": 40}]
        records += [{**end, "event": "end", "attempt": "a", "host": f"{host}/pid:[1]"}] if end else []
        lines = "".join(json.dumps(record) + "\n" for record in records)
        rundir.attempts_file(folder, node).write_text(lines)
    logs = folder.parent.parent / "submissions" / "x" / "logs"
    logs.mkdir(parents=True)
    rundir.write_json(logs.parent / "manifest.json", {"runs": []})
    return logs / f"{job}_0_log.out"


def test_the_node_of_the_missing_rank_is_named_and_older_attempts_are_passed_over(tmp_path):
    folder = tmp_path / "main_lmim" / "0123456789ab"
    _, log, _ = read(next(path for path in TEXTS if path.stem == "nccl_a_rank_is_silent"))
    run_of_two_nodes(folder, "7_3", log, {"cause": "failed", "exit": 1})
    found = why.of_run(folder, tmp_path)
    assert (found.kind, found.where["rank"], found.where["node"]) == (why.NCCL, 3, "beta")


@pytest.mark.parametrize("end", [None, {"cause": "killed", "exit": 0, "signal": 9}])
def test_the_scheduler_is_believed_for_its_own_attempt_only(tmp_path, end):
    folder = tmp_path / "main_lmim" / "0123456789ab"
    job_log = run_of_two_nodes(folder, "7_3", "step 5\n", end)
    oom, limit = "slurmstepd: error: Detected 1 oom_kill event in StepId=7.0.\n", "*** JOB 7 DUE TO TIME LIMIT ***\n"
    told = job_logs.MARKER.format(attempt="a", identity=folder.name) + "\n"
    job_log.write_text("attempt b of 0123456789ab\n" + oom + told + limit + "attempt a of ffffffffffff\n" + oom)
    assert why.of_run(folder, tmp_path).kind == why.TIME
    job_log.write_text(told + oom)
    assert why.of_run(folder, tmp_path).kind == why.HOST_OOM
    job_log.write_text(told)
    assert why.of_run(folder, tmp_path).kind == (why.KILLED if end else why.NODE)


# -- real processes ----------------------------------------------------------------------------------------------------

FAULTS = {"bug": [0, 1], "kill": [2], "oom": [3], "disk": [4], "data": [5]}
KINDS = {"bug": why.BUG, "kill": why.KILLED, "oom": why.HOST_OOM, "disk": why.DISK, "data": why.DATA}


def groups(house, *words, code=100):
    done = house.run("why", *words, "--json")
    assert done.returncode == code, done.stderr
    return {group["kind"]: group for group in map(json.loads, done.stdout.splitlines())}


def test_failures_of_real_processes_are_written_down_grouped_and_mended(house):
    words = ["worker=main_lmim", "seed=range(7)", "env.max_parallel=2", "then=[main_knn]"]
    more = {"FAKE_FAULTS": json.dumps(FAULTS)}
    assert house.run(*words, **more).returncode == 100
    seeds = {rundir.read_run(f)["seed"]: f for f in house.runs() if f.parent.name == "main_lmim"}
    ends = {seed: house.attempts(folder)[-1] for seed, folder in seeds.items()}
    for fault, those in FAULTS.items():
        assert [ends[seed]["why"] for seed in those] == [KINDS[fault]] * len(those)
        assert all(ends[seed]["said"] for seed in those)
    assert ends[0]["mark"] == ends[1]["mark"] != ends[2]["mark"]
    assert "why" not in ends[6]
    found = groups(house)
    assert {kind: (g["count"], g["blocked"]) for kind, g in found.items()} == {
        why.BUG: (2, 2), why.KILLED: (1, 1), why.HOST_OOM: (1, 1), why.DISK: (1, 1), why.DATA: (1, 1)
    }  # fmt: skip
    assert "/no/pictures" in found[why.DATA]["note"]
    assert found[why.BUG]["command"] is None
    assert "workers/main_lmim.py:" in found[why.BUG]["note"]
    screen = house.run("why").stdout
    assert "6 failed, 5 causes; 6 more wait" in screen
    assert len(screen.splitlines()) == 1 + 3 * 5
    # The command for memory mends as it stands; the others after what it says was done.
    assert house.run(*shlex.split(found[why.HOST_OOM]["command"])[2:], **more).returncode == 0
    (house.out / "mended").touch()
    for kind in (why.KILLED, why.DISK, why.DATA):
        done = house.run(*shlex.split(found[kind]["command"])[2:], **more)
        assert done.returncode == 0, done.stderr
    refused = house.run("retry", ":failed", **more)
    assert (refused.returncode, "2 runs ended by a bug" in refused.stderr) == (4, True)
    worker = house.root / "workers" / "main_lmim.py"
    worker.write_text(worker.read_text() + "\nmended = True\n")
    assert house.run("retry", "why=user bug", **more).returncode == 0
    assert house.all("finished")
    assert groups(house, code=0) == {}


def test_an_answer_is_about_the_last_attempt_only(house):
    words = ["worker=main_lmim", "epochs=2"]
    house.run(*words, FAKE_FAULTS='{"bug": [0]}')
    house.run(*words, FAKE_FAULTS='{"kill": [0]}')
    assert [*groups(house)] == [why.KILLED]


def test_a_supervisor_that_was_killed_is_told_from_one_that_wrote_its_end(house):
    launched = house.start("worker=main_lmim", "epochs=600", FAKE_STEP_S="0.1")
    house.wait_for(lambda: list(house.out.glob("*/*/checkpoint.pt")))
    (folder,) = house.runs()
    os.kill(rundir.read_json(folder / rundir.OWNER)["pid"], 9)
    launched.communicate(timeout=30)
    found = groups(house)
    assert [*found] == [why.KILLED]
    assert "without a warning" in found[why.KILLED]["said"]
    assert "killed without a warning" in house.run("status").stdout


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["why", "why=hostOOM"], 2, "error: why=hostOOM: unknown; did you mean host OOM?"),
        (["why", "sweep"], 102, "error: sweep: no study, sweep, worker or run"),
        (["retry", ":failed", "--set", "tau=1"], 2, "error: --set tau: can change the result"),
        (["retry", ":failed", "--set", "output_dir=x"], 2, "error: --set output_dir: can change the result"),
        (["retry", ":failed", "--set", "env.mem_gb"], 2, "error: --set env.mem_gb: expected KEY=VALUE"),
        (["retry", ":failed", "--set", "env.mem=4"], 2, "error: env.mem: unknown key; did you mean env.mem_gb?"),
        (["retry", ":failed", "--set", "env.mem_gb=lots"], 2, "error: env.mem_gb=lots: expected a number"),
        (["retry", ":failed", "--set", "env.vars.a.b=4"], 2, "error: env.vars.a={'b': 4}: expected text"),
        (["retry", ":failed", "--set", "env.slurm=True", "--set", "env.lsf=True"], 2, "error: env: asks for"),
    ],
)
def test_what_cannot_be_told_anew_is_refused_in_one_line_and_nothing_changes(failed_run, words, code, said):
    before = {p: p.read_bytes() for p in failed_run.out.rglob("*") if p.is_file()}
    done = failed_run.run(*words)
    assert (done.returncode, len(done.stderr.splitlines())) == (code, 1), done.stderr
    assert said in done.stderr
    assert {p: p.read_bytes() for p in failed_run.out.rglob("*") if p.is_file()} == before


@pytest.fixture(scope="module")
def failed_run(tmp_path_factory):
    """A house with one run that was killed."""
    made = build(tmp_path_factory.mktemp("failed") / "house")
    words = ["worker=main_lmim", "avg_sim_coeff=0", "batch_size=64", "env.max_parallel=1", "env.grace_s=5"]
    made.run(*words, FAKE_FAULTS='{"kill": [0]}')
    return made


def test_halving_keeps_the_run_and_what_is_told_anew_stays(failed_run):
    (folder,) = failed_run.runs()
    changes = ["--halve-batch", "--set", "env.grace_s=7", "--set", "log_every=3", "--set", "env.vars.A=b"]
    assert failed_run.run("retry", folder.name[:6], *changes).returncode == 0
    assert failed_run.runs() == [folder]
    config = yaml.safe_load((folder / rundir.CONFIG).read_text())
    assert (config["batch_size"], config["accum_iter"], config["effective_batch_size"]) == (32, 2, 64)
    assert (config["env"]["grace_s"], config["log_every"], config["env"]["vars"]) == (7, 3, {"A": "b"})
    assert rundir.state(folder) == "finished"


def changed(settings, *said, halve=False):
    change, _ = mending.change(said, halve)
    return change(settings)


def test_a_batch_that_is_part_of_the_method_is_not_halved():
    for worker in ("main_moco_mixmask", "main_detection"):  # its queue; the pictures that BatchNorm sees at once
        with pytest.raises(SettingsError, match="part of this method"):
            changed(contract.settings.read({"worker": worker}), halve=True)
    with pytest.raises(SettingsError, match="is odd"):
        changed(contract.settings.read({"worker": "main_mae", "batch_size": 7}), halve=True)
    with pytest.raises(SettingsError, match="trains nothing"):
        changed(contract.settings.read({"worker": "main_knn", "encoder": "x"}), halve=True)


def test_another_number_of_gpus_keeps_the_effective_batch():
    settings = contract.settings.read({"worker": "main_mae", "batch_size": 8, "env": {"slurm": True, "ngpu": 4}})
    settings.resolve_batch(4)
    made = changed(settings, "env.ngpu=2")
    assert (made.accum_iter, made.effective_batch_size, made.science()) == (2, 32, settings.science())
    with pytest.raises(SettingsError, match="not a multiple"):
        changed(settings, "env.ngpu=3")
    assert changed(settings, "env.lsf=True").env.scheduler == "lsf"  # in the place of Slurm


def mended(kind, *, env=None, where=(), good=(0, 0), words=(), worker="main_mae", tmp_path):
    """The command for a group of runs with these settings."""
    group = mending.Group(kind, "0" * 8, good=good)
    for i, each in enumerate(where or [{}, {}]):
        folder = tmp_path / worker / f"{i:012x}"
        folder.mkdir(parents=True, exist_ok=True)
        settings = contract.settings.read({"worker": worker, "env": {"slurm": True, **(env or {})}})
        (folder / rundir.CONFIG).write_text(rundirs.to_yaml(settings))
        group.runs.append(rundirs.Found(folder, {"identity": folder.name, "stage": "mae"}, "failed", i))
        group.causes.append(why.Cause(kind, "0" * 8, "", each))
    command, note = mending.mend(group, words)
    return command and command.removeprefix("python launcher.py retry "), note


@pytest.mark.parametrize(
    ("kind", "how", "command"),
    [
        (why.HOST_OOM, {"env": {"mem_gb": 48}}, ":failed 'why=host OOM' --set env.mem_gb=72"),
        (why.HOST_OOM, {"env": {"mem_gb": 10}, "where": [{"peak_mb": 20480}] * 2},
         ":failed 'why=host OOM' --set env.mem_gb=22"),
        (why.HOST_OOM, {"good": (431, 53350)}, ":failed 'why=host OOM' --set env.mem_gb=79"),
        (why.HOST_OOM, {"where": [{"shm": True}] * 2, "env": {"workers": 4}},
         ":failed 'why=host OOM' --set env.workers=0"),
        (why.HOST_OOM, {"where": [{"shm": True}] * 2,
                        "env": {"slurm": False, "lsf": True, "container": "a:b", "shm_gb": 8}},
         ":failed 'why=host OOM' --set env.shm_gb=16"),
        (why.CUDA_OOM, {}, ":failed 'why=CUDA OOM' --halve-batch"),
        (why.CUDA_OOM, {"worker": "main_moco_mixmask"}, None),
        (why.NODE, {"where": [{"node": "n7"}, {"node": "n3"}]}, ":failed 'why=node failure' --set env.exclude=n3,n7"),
        (why.NCCL, {"where": [{"node": "n7"}], "env": {"exclude": "n[1,2],n3"}},
         "00000000 --set 'env.exclude=n[1,2],n3,n7'"),
        (why.NCCL, {}, ":failed 'why=NCCL time-out'"),
        (why.TIME, {"words": ["sweep:running", "0-3", "seed=1", "output_dir=x"]},
         "sweep 0-3 seed=1 :failed 'why=time limit' output_dir=x"),
        (why.STALLED, {}, ":failed why=stalled"),
        (why.PREEMPTED, {}, ":failed why=preempted"),
        (why.BUG, {}, None),
    ],
)  # fmt: skip
def test_every_cause_has_its_command(kind, how, command, tmp_path):
    assert mended(kind, tmp_path=tmp_path, **how)[0] == command


def test_where_there_is_no_room_and_what_is_missing_is_said_first(tmp_path):
    assert "make room in /scratch/me" in mended(why.DISK, where=[{"path": "/scratch/me/x.pt"}], tmp_path=tmp_path)[1]
    assert mended(why.DATA, where=[{"path": "/data/in"}], tmp_path=tmp_path)[1] == "put /data/in there, then"


def test_retrying_many_asks_first(tmp_path):
    made = build(tmp_path / "house")
    faults = json.dumps({"kill": [*range(11)]})
    made.run("worker=main_lmim", "seed=range(11)", "epochs=0", "env.max_parallel=4", FAKE_FAULTS=faults)
    refused = made.run("retry", ":failed")
    assert (refused.returncode, "retry 11 runs; add -y" in refused.stderr) == (4, True)
    assert made.run("retry", ":failed", "-n").returncode == 0
    assert made.run("retry", ":failed", "0-1").returncode == 0
    assert len(made.run("status", ":failed", "--json").stdout.splitlines()) == 9
