"""What goes by the stated policy, what never does, and what a kill in the middle leaves."""

import json
import os
import shutil
import subprocess
import time

import pytest

from contract import rundir
from launcher import prune
from tests.house import STEPS

OLD = time.time() - 99 * 86400
SLOW = {"FAKE_STEP_S": "0.1"}


def age(*paths):
    for path in paths:
        os.utime(path, (OLD, OLD), follow_symlinks=False)


def shown(house, *words):
    """What may go: (what, the path below the output folder)."""
    lines = house.run("prune", "-n", "--json", *words).stdout.splitlines()
    return sorted((line["what"], os.path.relpath(line["path"], house.out)) for line in map(json.loads, lines))


def run_dir(house, name, **files):
    """A run directory of long ago that was never started."""
    folder = house.out / "main_lmim" / name
    folder.mkdir(parents=True)
    run = {"schema": 1, "identity": name, "group": "g", "worker": "main_lmim", "seed": 0, "stage": "lmim"}
    rundir.write_json(folder / rundir.RUN, run | {"capsule": "unknown"})
    for file, text in files.items():
        (folder / file.replace("__", ".")).write_text(text)
    age(folder / rundir.RUN)
    return folder


def litter(house):
    """One of each that may go."""
    for folder in house.runs():
        if (folder / rundir.DONE).exists():
            (folder / "checkpoint.pt").write_text("2")
            (folder / "checkpoint.previous.pt").write_text("1")
    (house.out / "capsules" / "0123").mkdir()
    (house.out / "capsules" / "0123" / "code.py").write_text("x = 1")
    (house.out / "capsules" / ".partial-x").mkdir()
    half = house.runs()[0] / ".done.json.0123abcd"
    half.write_text("{")
    run_dir(house, "aaaaaaaaaaaa")
    age(house.out / "capsules" / "0123", house.out / "capsules" / ".partial-x", half)


@pytest.fixture
def done(house):
    """Two finished runs, and what is never pruned of them."""
    assert house.run("worker=main_lmim", "seed=0,1", "epochs=2", "env.max_parallel=2").returncode == 0
    house.kept = {p for p in house.out.rglob("*") if p.is_file() and "checkpoint" not in p.name}
    return house


def test_what_may_go_is_shown_and_goes_after_a_yes_and_nothing_else_does(done):
    litter(done)
    found = shown(done)
    ids = [f.name for f in done.runs() if f.name != "aaaaaaaaaaaa"]
    assert found == sorted(
        [("checkpoints", f"main_lmim/{i}/{name}") for i in ids for name in ("checkpoint.pt", "checkpoint.previous.pt")]
        + [("capsules", "capsules/0123"), ("leftovers", "capsules/.partial-x"), ("abandoned", "main_lmim/aaaaaaaaaaaa")]
        + [("leftovers", f"main_lmim/{done.runs()[0].name}/.done.json.0123abcd")] * (done.runs()[0].name in ids)
    )
    before = set(done.out.rglob("*"))
    table = done.run("prune", "-n").stdout
    assert "checkpoints" in table
    assert "of finished runs; encoder.pt stays" in table
    refused = done.run("prune")
    assert (refused.returncode, "add -y" in refused.stderr) == (4, True)
    assert set(done.out.rglob("*")) - before <= {done.out / "submissions" / ".lock"}
    assert done.run("prune", "-y").returncode == 0
    assert shown(done) == []
    assert done.kept <= {*done.out.rglob("*")}
    assert done.run("status").returncode == 0
    assert "nothing to do" in done.run("worker=main_lmim", "seed=0,1", "epochs=2").stderr


def test_what_runs_waits_or_was_ended_by_a_person_stays(house):
    launched = house.start("worker=main_lmim", "seed=0,1", "epochs=600", "env.max_parallel=1", **SLOW)
    house.wait_for(lambda: [*house.out.glob("*/*/checkpoint.pt")])
    age(*house.out.glob("*/*/run.json"), *house.out.glob("capsules/*"), *house.out.glob("submissions/*/manifest.json"))
    for name in ("attempts__0__jsonl", "stop", "CANCELLED", "encoder__pt", "metrics__jsonl"):
        run_dir(house, f"bbbbbbbbbb{len(name):02d}", **{name: ""})
    assert shown(house) == []
    assert "nothing may go" in house.run("prune", "-y").stdout
    launched.terminate()
    launched.communicate(timeout=30)
    assert shown(house, "--days", "0.000001")[0][0] == "abandoned"  # the second, which will not come any more


def test_a_selection_keeps_to_its_runs_and_old_runs_need_a_word_of_their_own(done):
    litter(done)
    one = next(f for f in done.runs() if (f / rundir.DONE).exists())
    assert {what for what, _ in shown(done, one.name)} <= {"checkpoints", "leftovers"}
    assert all(one.name in path for _, path in shown(done, one.name))
    worker = done.root / "workers" / "main_lmim.py"
    worker.write_text(worker.read_text() + "\nextra = 1\n")
    assert done.run("fill", "worker=main_lmim", "seed=0", "epochs=2", "--stale").returncode == 0
    (aside,) = done.out.glob("replaced/*")
    age(aside)
    assert "replaced" not in {what for what, _ in shown(done)}
    assert "replaced" in {what for what, _ in shown(done, "--replaced")}
    first = rundir.read_run(next(aside.glob("*/*")))["capsule"]
    age(*done.out.glob("capsules/*"))
    assert ("capsules", f"capsules/{first}") not in shown(done)  # it still shows how that was made


def test_a_capsule_that_is_taken_up_again_in_the_very_moment_stays(done, monkeypatch):
    (capsule,) = done.out.glob("capsules/*")
    age(capsule)
    item = prune.Item("capsules", capsule, 0, lambda: True)
    rename = type(capsule).rename

    def used_meanwhile(path, target):
        if path == capsule:
            os.utime(path)  # as a launch does
        return rename(path, target)

    monkeypatch.setattr(type(capsule), "rename", used_meanwhile)
    assert not prune.remove(item, done.out)
    assert (capsule / "launcher").is_dir()


def test_killed_at_any_step_it_leaves_what_the_next_one_removes(done, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(STEPS)
    pristine = tmp_path / "pristine"
    litter(done)
    shutil.copytree(done.out, pristine, symlinks=True)

    def say(**more):
        env = {**done.environ(), "PYTHONPATH": str(tmp_path), "HERE": "1", "COUNT": str(tmp_path / "steps"), **more}
        words = ["python", "launcher.py", "prune", "-y"]
        return subprocess.run([os.sys.executable, *words[1:]], cwd=done.root, env=env, check=False, capture_output=True)

    assert say().returncode == 0
    steps = int((tmp_path / "steps").read_text())
    for at in range(0, steps, max(1, steps // 5)):
        shutil.rmtree(done.out)
        shutil.copytree(pristine, done.out, symlinks=True)
        assert say(DIE_AT=str(at)).returncode == -9
        assert done.kept <= {*done.out.rglob("*")}
        assert done.run("status").returncode in (0, 101)  # the abandoned run waits
        assert say().returncode == 0
        assert shown(done) == []
        assert not [*done.out.glob(".pruned-*")]
        assert done.all("finished")
