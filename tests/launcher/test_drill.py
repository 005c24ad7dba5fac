"""``drill`` on this machine: what it shows of workers that resume, and of those that do not."""

import json
import re

import pytest

from launcher import curves
from tests.house import edit, with_real_workers

FAKE = ["drill", "worker=main_lmim", "epochs=30", "--steps", "24"]
SLOW = {"FAKE_STEP_S": "0.06"}
REAL = ["worker=main_lmim", "data=fake", "data.size=16", "data.length=96", "grid_size=4", "num_vis=5", "batch_size=8"]


def left(house) -> list:
    return [*house.out.glob("drills/*")]


def test_a_worker_that_resumes_is_shown_to_and_leaves_nothing(house):
    done = house.run(*FAKE, "--json", code=0, FAKE_SAVE="4", **SLOW)
    said = json.loads(done.stdout)
    assert (said["equal"], said["steps"], said["scheduler"]) == (True, 24, "local")
    warned, killed = said["runs"]
    assert (warned["attempts"], warned["identical"], warned["encoder"]) == (2, True, "same")
    assert warned["interrupted"] == warned["resumed"]
    assert warned["interrupted"][0] >= 12
    assert (killed["attempts"], killed["identical"]) == (3, True)
    assert killed["resumed"][0] == 0 < killed["interrupted"][0]  # before there was a checkpoint
    assert killed["interrupted"][1] >= killed["resumed"][1] >= 4
    assert killed["resumed"][1] % 4 == 0
    assert left(house) == []
    assert house.runs() == []
    assert house.processes() == []


def test_a_worker_that_forgets_its_state_is_caught_and_the_first_wrong_line_is_named(house):
    done = house.run(*FAKE, code=100, FAKE_FORGETS="1", **SLOW)
    assert "differs by" in done.stdout
    assert re.search(r"warned: metrics.jsonl:(\d+), step \1: train/sum \S+ undisturbed, \S+ here", done.stdout)
    (kept,) = left(house)
    assert f"kept: {kept}" in done.stderr
    assert {path.name for path in kept.iterdir()} == {"undisturbed", "warned", "killed"}
    assert "no such run" in house.run("status", code=102).stderr  # runs of a drill are seen by nobody else


@pytest.mark.slow
def test_a_worker_that_begins_again_is_caught_though_its_curve_is_the_same(house):
    edit(house.root / "workers" / "main_lmim.py", "if checkpoint.exists() else", "if False else")
    done = house.run(*FAKE, code=100, **SLOW)
    assert "what was saved is lost: warned, it left after step" in done.stdout
    assert "it had a checkpoint, and began again from step 0" in done.stdout


def test_what_proves_nothing_is_said_to_prove_nothing(house):
    done = house.run(*FAKE, code=100)
    assert "it ended before it could be interrupted; --steps N makes it longer" in done.stdout
    assert "not shown" in done.stdout
    done = house.run(*FAKE, code=100, FAKE_FAIL="0")
    assert re.search(r"undisturbed .*failed: .*ValueError: seed 0 is unlucky", done.stdout)
    (house.root / "weights.pt").touch()
    done = house.run("drill", "worker=main_knn", f"encoder={house.root}/weights.pt", code=2)
    assert "has no training to interrupt" in done.stderr
    assert "must be at least 4" in house.run("drill", "--steps", "3", code=2).stderr


def test_tolerance_and_lines_that_only_one_of_them_has():
    calm = [("metrics.jsonl:1", {"step": 1, "train/loss": 2.0, "knn/loo1": "nan"}), ("done.json", {"step": 1})]
    close = [("metrics.jsonl:1", {"step": 1, "train/loss": 2.0002, "knn/loo1": "nan"}), ("done.json", {"step": 1})]
    worst, first = curves.compare(calm, close)
    assert worst == {"train/loss": pytest.approx(1e-4, rel=1e-3)}
    assert first == "metrics.jsonl:1, step 1: train/loss 2.0 undisturbed, 2.0002 here"
    assert curves.compare(calm, calm) == ({}, "")
    assert curves.compare(calm, calm[:1])[0] == {"step": float("inf")}
    assert curves.compare(calm, [*calm[:1], ("done.json", {"step": 2})])[0] == {"step": float("inf")}


@pytest.mark.slow
@pytest.mark.parametrize("broken", [False, True])
def test_a_real_training_loses_nothing_and_one_that_forgets_its_optimizer_is_caught(house, broken):
    with_real_workers(house)
    if broken:
        restore = "        for name, part in self.parts.items():\n            part.load"
        forget = restore.replace("            part", "            name == 'optimizer' or part")
        edit(house.root / "workers" / "engine" / "checkpoint.py", restore, forget)
    process = house.start("drill", *REAL, "epochs=40", "env.threads=1", "--steps", "40")
    out, err = process.communicate(timeout=500)
    assert process.returncode == (100 if broken else 0), err
    assert ("differs by" if broken else "preemption loses nothing here: 40 steps, the same byte for byte") in out
