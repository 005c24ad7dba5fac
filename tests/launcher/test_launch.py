"""The launcher as people start it: real processes, workers that take no time."""

import json
import os
import shlex
import signal
import subprocess
import sys

import pytest

from contract import rundir

SLOW = {"FAKE_STEP_S": "0.1"}


def test_a_sweep_with_evaluations_runs_in_order_and_a_second_launch_does_nothing(house):
    words = ["worker=main_lmim", "seed=0,1", "epochs=2", "then=[main_knn]"]
    done = house.run(*words)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert "4 of 4" in done.stderr
    assert "\x1b" not in done.stderr  # no colours, no bars: this is not a terminal
    assert len(house.runs()) == 4
    for folder in house.runs():
        assert rundir.state(folder) == "finished"
        assert (folder / "capsule" / "workers" / "main_lmim.py").exists()
        info = rundir.read_run(folder)
        assert folder.name == info["identity"]
        for parent in info["parents"]:
            assert (house.out / "main_lmim" / parent / "encoder.pt").exists()
    assert str(house.out) in (house.out / "ingested").read_text()
    (manifest,) = house.out.glob("submissions/*/manifest.json")
    assert len(json.loads(manifest.read_text())["runs"]) == 4
    again = house.run(*words)
    assert again.returncode == 0
    assert "nothing to do" in again.stderr
    assert len(list(house.out.glob("submissions/*"))) == 1
    assert sorted(p.name for p in house.root.iterdir() if p.name != "__pycache__") == sorted(
        ["analysis", "configs", "contract", "launcher", "launcher.py", "runs", "setup.cfg", "workers"]
    )  # Hydra leaves no litter


def test_a_failure_is_told_with_its_reason_and_blocks_only_what_needs_it(house):
    words = ["worker=main_lmim", "seed=0,1", "epochs=1", "then=[main_knn]"]
    done = house.run(*words, FAKE_FAIL="0")
    assert done.returncode == 100
    assert "ValueError: seed 0 is unlucky" in done.stderr
    assert "blocked" in done.stderr
    status = house.run("status")
    assert status.returncode == 100
    assert "ValueError: seed 0 is unlucky" in status.stdout
    retried = house.run("retry", ":failed", "--force")
    assert retried.returncode == 0, retried.stderr
    assert house.run("status").returncode == 0  # what was blocked ran, too


def test_ctrl_c_saves_and_leaves_no_process_and_the_same_command_goes_on(house):
    words = ["worker=main_lmim", "seed=0,1", "epochs=30", "env.max_parallel=2"]
    launched = house.start(*words, **SLOW)
    house.wait_for(lambda: len(list(house.out.glob("*/*/checkpoint.pt"))) == 2)
    launched.send_signal(signal.SIGINT)
    _, said = launched.communicate(timeout=30)
    assert launched.returncode == 130
    assert "the same command goes on where it left off" in said
    assert house.processes() == []
    assert {rundir.state(f) for f in house.runs()} == {"stopped"}
    assert not [p for p in house.out.rglob(".*") if p.name != ".owner.lock"]  # no half-written file
    assert house.run("status").returncode == 101
    assert house.run(*words).returncode == 0
    for folder in house.runs():
        lines = rundir.read_journal(folder / "metrics.jsonl")[0]
        assert [line["step"] for line in lines] == list(range(1, 31))


def test_a_second_ctrl_c_does_not_wait(house):
    launched = house.start("worker=main_lmim", "epochs=600", "env.grace_s=60", FAKE_DEAF="1", **SLOW)
    house.wait_for(lambda: list(house.out.glob("*/*/checkpoint.pt")))
    launched.send_signal(signal.SIGINT)
    house.wait_for(lambda: list(house.out.glob("*/*/stop.*")))
    launched.send_signal(signal.SIGINT)
    launched.communicate(timeout=10)
    assert launched.returncode == 130
    assert house.processes() == []


def test_a_killed_launcher_leaves_no_orphan_and_nothing_is_lost(house):
    launched = house.start("worker=main_lmim", "epochs=600", **SLOW)
    house.wait_for(lambda: list(house.out.glob("*/*/checkpoint.pt")))
    launched.kill()
    launched.communicate(timeout=30)
    house.wait_for(lambda: house.processes() == [])
    (folder,) = house.runs()
    assert rundir.state(folder) == "stopped"


def test_two_launchers_at_once_start_each_run_once(house):
    words = ["worker=main_lmim", "seed=range(3)", "epochs=3", "env.max_parallel=3"]
    both = [house.start(*words, **SLOW) for _ in range(2)]
    for each in both:
        _, said = each.communicate(timeout=60)
        assert each.returncode == 0, said
    for folder in house.runs():
        assert rundir.state(folder) == "finished"
        assert [a["event"] for a in house.attempts(folder)] == ["start", "end"]


def test_a_dry_run_writes_nothing_and_prints_what_would_run(house):
    command = (
        "--config-name=lmim worker=main_lmim encoder=vit_base decoder_depth=3 avg_sim_coeff=0.1 loss=infonce_patches "
        "patch_gap=4 epochs=800 warmup_epochs=40 blr=1.5e-4 min_lr_frac=0.25 weight_decay=0.05 batch_size=256 "
        "accum_iter=2 env.ngpu=8 dataset=imagenet resume=True output_dir=./checkpoints data_path=/path/to/imagenet "
        "env.slurm=True env.distributed=True --dry-run"
    )
    done = house.run(*shlex.split(command))
    assert done.returncode == 0, done.stderr
    assert "--nproc-per-node=8 -m workers.main_lmim" in done.stdout
    assert not (house.root / "checkpoints").exists()
    lines = house.run("worker=main_lmim", "seed=0,1", "-n", "--json").stdout.splitlines()
    assert [json.loads(line)["seed"] for line in lines] == [0, 1]
    assert not house.out.exists()


def test_names_that_a_shell_would_read_are_only_names(house, tmp_path):
    out = tmp_path / "o 'x\"; touch $(echo pwned) é\n;"
    words = ["worker=main_lmim", "epochs=1", 'job_name="a/../../b; touch pwned\\nc"']
    quoted = "'" + str(out).replace("'", "\\'") + "'"
    done = house.run(*words, f"output_dir={quoted}")
    assert done.returncode == 0, done.stderr
    assert len(list(out.glob("*/*/done.json"))) == len(list(out.glob("submissions/*"))) == 1
    script = house.run(*words, "seed=1", f"output_dir={quoted}", "-n").stdout
    assert shlex.quote(str(out / "main_lmim"))[1:-1] in script
    assert subprocess.run(["sh", "-n"], input=script, text=True, check=False).returncode == 0
    assert not list(tmp_path.rglob("pwned"))


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["worker=main_lmim", "epochz=1"], 2, "error: epochz: unknown key; did you mean epochs?"),
        (
            ["worker=main_lmim", "data=imagefolder", "data_path=/no/where"],
            2,
            "error: data_path=/no/where: no such folder",
        ),
        (["worker=main_lmim", "env.lsf=True"], 3, "error: bsub: no such program"),
        (["worker=main_lmim", "env.nodes=2"], 2, "error: env.nodes"),
        (["plan", "nothing"], 2, "error: study=nothing: unknown"),
        (["plan", "../../etc/passwd"], 2, "error: study=../../etc/passwd: unknown"),
        (["frobnicate"], 2, "no such verb; choose one of plan, fill"),
        (["status"], 102, "error: no such run in"),
        (["logs", "abcdef"], 102, "error: abcdef: no study, sweep, worker or run"),
        (["retry"], 2, "error: retry: say which"),
        (["status", ":lost"], 2, "error: state=lost: unknown"),
    ],
)
def test_a_mistake_is_one_line_with_its_exit_code_and_nothing_is_written(house, words, code, said):
    done = house.run(*words)
    assert done.returncode == code
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not house.out.exists()


def test_the_output_folder_that_cannot_be_written_is_one_line(house):
    (house.root / "file").touch()
    done = house.run("worker=main_lmim", "output_dir=file/below")
    assert (done.returncode, "Not a directory" in done.stderr, "Traceback" in done.stderr) == (1, True, False)


def test_a_study_is_planned_filled_and_tabulated(house):
    small = ["seed=0", "pretrain.epochs=2", "probe.epochs=2", "probe.warmup_epochs=0"]
    planned = house.run("plan", "quickstart", *small)
    assert planned.returncode == 0
    assert "fill quickstart seed=0" in planned.stdout
    assert not house.out.exists()
    filled = house.run("fill", "quickstart", *small)
    assert filled.returncode == 0, filled.stderr
    states = [
        json.loads(line)["state"] for line in house.run("plan", "quickstart", *small, "--json").stdout.splitlines()
    ]
    assert states == ["reuse"] * 6
    table = house.run("table", "quickstart", *small, "--format", "md")
    assert table.returncode == 7  # analysis's own
    assert table.stdout.split() == ["--manifest", str(house.out / "studies/quickstart.json"), "--format", "md"]
    manifest = json.loads((house.out / "studies/quickstart.json").read_text())
    assert {r["state"] for c in manifest["cells"] for r in c["runs"]} == {"reuse"}
    chosen = house.run("status", "quickstart:finished", "seed=0", "0-2", "--json")
    assert chosen.returncode == 0
    assert len(chosen.stdout.splitlines()) == 3


def test_stale_runs_are_named_left_alone_and_made_again_when_asked(house):
    words = ["worker=main_lmim", "epochs=1"]
    house.run(*words)
    worker = house.root / "workers" / "main_lmim.py"
    worker.write_text(worker.read_text() + "\nextra = 1\n")
    planned = house.run("plan", *words)
    assert "stale: made before these changed: workers/main_lmim.py" in planned.stdout
    assert "nothing to do" in house.run(*words).stderr
    assert house.run("fill", *words, "--stale").returncode == 0
    assert "stale" not in house.run("plan", *words).stdout
    assert len(list(house.out.glob("replaced/*/main_lmim/*/done.json"))) == 1  # nothing was deleted
    assert house.run("status").returncode == 0


def test_logs_follow_a_run_and_cancel_stops_it_until_retry(house):
    words = ["worker=main_lmim", "epochs=600"]
    launched = house.start(*words, **SLOW)
    house.wait_for(lambda: list(house.out.glob("*/*/checkpoint.pt")))
    (folder,) = house.runs()
    follower = house.start("logs", folder.name[:6], "-f")
    status = house.run("status", ":running", "--json")
    assert status.returncode == 101
    line = json.loads(status.stdout)
    assert (line["state"], line["of"]) == ("running", 600)
    assert house.run("cancel", folder.name).returncode == 0
    launched.communicate(timeout=30)
    assert launched.returncode == 103
    out, _ = follower.communicate(timeout=30)
    assert "rank 0" in out
    assert house.run("status").returncode == 103
    assert "nothing to do" in house.run(*words).stderr
    assert house.run("retry", ":cancelled", FAKE_STEP_S="0").returncode == 0
    assert house.run("status").returncode == 0


def test_cancelling_many_asks_first_and_refuses_where_nobody_can_answer(house):
    done = house.run("worker=main_lmim", "seed=range(11)", "epochs=0", "env.max_parallel=4", FAKE_FAIL="0")
    assert done.returncode == 100
    for folder in house.runs():
        (folder / "done.json").unlink(missing_ok=True)
    refused = house.run("cancel", "main_lmim")
    assert refused.returncode == 4
    assert "11 runs; add -y" in refused.stderr
    assert house.run("cancel", "main_lmim", "-y").returncode == 0
    assert house.run("status").returncode == 103


def test_the_verbs_of_analysis_hand_on_its_own_flags(house):
    house.out.mkdir()
    assert house.run("ingest", "--watch", "5", "--store", "x").returncode == 0
    assert (house.out / "ingested").read_text().endswith(f"--output-dir {house.out} --watch 5 --store x")


def test_a_damaged_run_is_named_and_hides_no_other(house):
    house.run("worker=main_lmim", "seed=0,1", "epochs=1")
    broken, _ = house.runs()
    (broken / "run.json").write_text("{")
    status = house.run("status")
    assert "1 run" in status.stdout
    assert f"error: {broken / 'run.json'}: unreadable" in status.stderr


def test_the_doctor_says_how_to_mend_what_is_missing(house):
    (house.root / "configs" / "data" / "mine.yaml").write_text("data_path: /no/where\n")
    done = house.run("doctor")
    assert done.returncode == 2
    lines = done.stdout.splitlines()
    assert {line[:4] for line in lines} == {"ok  ", "MEND"}
    assert any("/no/where is not there: put the data there, or say data_path=FOLDER" in line for line in lines)


@pytest.mark.parametrize("words", [[], ["--help"], ["status", "--help"], ["table", "--help"]])
def test_help_imports_nothing_heavy(words):
    heavy = {"hydra", "omegaconf", "yaml", "torch", "pandas", "mlflow", "rich", "numpy", "submitit"}
    code = f"""
import sys
from launcher.cli import main
try:
    main({words!r})
except SystemExit as error:
    assert not error.code, error.code
print("HEAVY", sorted({heavy!r} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ})
    assert done.stdout.endswith("HEAVY []\n")
    assert "python launcher.py" in done.stdout
