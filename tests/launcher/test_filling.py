"""``fill`` until a comparison is decided, within a budget, and on one of several clusters."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from contract import rundir, study
from contract.settings.checks import SettingsError
from launcher import launches, prices, rounds
from tests.house import INGEST, ROOT
from tests.launcher.studies import STUDY, finish

WORKER = """
import sys
from pathlib import Path
import yaml
from contract import rundir

folder = Path(sys.argv[1])
config = yaml.safe_load((folder / "config.yaml").read_text())
ahead = {1: [0, 0, 0, 0], 2: [0.10, 0.02, 0.06, 0.06]}[config["epochs"]]  # told apart at four seeds
seed = config["seed"]
value = 0.5 + 0.01 * seed + (ahead + [0.06] * 20)[seed]
rundir.write_json(folder / "done.json", {"metrics": {"lmim/score": value}})
"""
TWO = """\
title: T
seeds: [0, 1]
stages: {pretrain: {worker: main_lmim}}
rows: {one: {pretrain.epochs: 1}, two: {pretrain.epochs: 2}}
columns: {score: {stage: pretrain, metric: lmim/score}}
"""


@pytest.fixture
def mine(house):
    """A house with the real analysis, whose pretraining has a score."""
    shutil.copytree(ROOT / "analysis", house.root / "analysis", dirs_exist_ok=True)
    (house.root / "analysis" / "ingest.py").write_text(INGEST)
    (house.root / "workers" / "main_lmim.py").write_text(WORKER)
    (house.root / "configs" / "study" / "mine.yaml").write_text(TWO)
    return house


@pytest.fixture
def plan(tmp_path, monkeypatch):
    folder = tmp_path / "configs" / "study"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text(STUDY.replace("pretrain.epochs: 0", "pretrain.tau: 0.3"))
    monkeypatch.setattr(launches, "CONFIGS", tmp_path / "configs")
    out = {"output_dir": str(tmp_path / "runs")}
    return lambda **said: launches.of_study("mine", [out | said])


def test_seeds_are_added_until_the_rows_are_told_apart_or_there_are_enough(mine):
    done = mine.run("fill", "mine", "--until", "p<0.0001", "--most", "3", code=0)
    assert "0 of 1 comparisons are decided (p<0.0001); one more seed for two (2), one (2)" in done.stderr
    assert "open at 3 seeds: score: two - one; --most N allows more" in done.stderr
    assert len(mine.runs()) == 6
    done = mine.run("fill", "mine", "--until", "ci95<0.01", code=0)
    assert "1 of 1 comparisons are decided (ci95<0.01)" in done.stderr
    assert sorted(rundir.read_run(f)["seed"] for f in mine.runs()) == [0, 0, 1, 1, 2, 2, 3, 3]
    shown = mine.run("table", "mine", "--json", code=0).stdout  # which knows of the seeds that were added
    assert [json.loads(line)["n"] for line in shown.splitlines()] == [4, 4]
    assert [json.loads(line)["best"] for line in shown.splitlines()] == [False, True]


def test_a_budget_finds_the_price_with_one_run_and_holds_the_rest(mine):
    done = mine.run("fill", "mine", "--budget", "0.00001h", code=4)
    assert "price not known yet: one run of pretrain starts, to find out" in done.stderr
    assert "held: 3 runs" in done.stderr
    assert len(mine.runs()) == 1
    done = mine.run("fill", "mine", "--budget", "1h", code=0)
    assert "held" not in done.stderr
    assert len(mine.runs()) == 4


def test_a_budget_counts_what_was_used_and_never_starts_an_evaluation_without_its_encoder(plan):
    for run in plan().runs[:2]:
        finish(run, seconds=3600, gpus=1)
    found = plan()
    todo = found.todo()
    assert [run.stage for run in todo] == ["pretrain", "knn"] * 3
    split = prices.within(found, todo, 4.5)  # 2 used, room for one pair
    assert [run.stage for run in split.go] == ["pretrain", "knn"]
    assert (split.used, split.asked, len(split.held)) == (2, 2, 4)
    split = prices.within(found, todo, 5.0)
    assert [run.stage for run in split.go] == ["pretrain", "knn", "pretrain"]
    assert prices.within(found, todo, 2.0).go == ()


@pytest.mark.parametrize(("text", "hours"), [("40h", 40), ("90min", 1.5), ("2d", 48), ("0.5", 0.5)])
def test_budgets_are_hours(text, hours):
    assert prices.hours(text) == hours


def test_shards_are_disjoint_complete_and_keep_what_belongs_together(plan):
    found = plan()
    halves = [prices.shard(found, found.todo(), f"{i}/2") for i in (1, 2)]
    assert sorted(r.identity for half in halves for r in half) == sorted(r.identity for r in found.runs)
    for half in halves:
        identities = {run.identity for run in half}
        assert all(identities.issuperset(run.parents) for run in half)
        assert len(half) == 4
    finish(halves[0][0])  # done on one cluster, which the other cannot see
    again = plan()
    left = {run.identity for run in prices.shard(again, again.todo(), "2/2")}
    assert left == {run.identity for run in halves[1]}


def test_added_seeds_belong_to_their_rows_and_explicit_seeds_leave_them_out(plan, tmp_path):
    found = plan()
    assert rounds.add(tmp_path / "runs", "mine", found.study, ["b"], most=3) == [("b", 2)]
    assert rounds.add(tmp_path / "runs", "mine", found.study, ["b"], most=3) == []
    found = plan()
    assert [len(found.cells[row, "1-NN"]) for row in found.study.rows] == [2, 3]
    assert len(plan(seed=0).runs) == 4
    (tmp_path / "runs" / "studies" / "mine.seeds").write_text('{"rows": {"b": "all"}}')
    with pytest.raises(rundir.RunDirError, match=r"mine\.seeds: expected"):
        plan()


@pytest.mark.parametrize("text", ["ci95", "ci95<", "ci95<0", "ci95<x", "mean<1", "ci95>1", "p<1.2.3"])
def test_a_rule_that_means_nothing_is_refused(text):
    with pytest.raises(SettingsError, match="expected ci95<NUMBER"):
        study.rule(text)


def test_what_makes_no_sense_is_refused_before_anything_starts(house):
    for words, said in (
        (["quickstart", "--until", "ci95"], "--until ci95: expected ci95<NUMBER"),
        (["quickstart", "seed=0,1", "--until", "ci95<1"], "--until chooses the seeds; leave seed= away"),
        (["quickstart", "--until", "ci95<1", "--shard", "1/2"], "a cluster that has one half cannot decide"),
        (["worker=main_lmim", "--until", "ci95<1"], "say which study"),
        (["quickstart", "--budget", "much"], "--budget much: expected hours"),
        (["quickstart", "--shard", "3/2"], "--shard 3/2: expected NUMBER/COUNT"),
    ):
        refused = house.run("fill", *words, code=2)
        assert said in refused.stderr
        assert refused.stderr.count("\n") == 1
    assert not Path(house.out).exists()


def test_what_is_queued_counts_and_one_queued_run_is_enough_to_learn_a_price(plan):
    found = plan()
    first = found.runs[0]
    queued = dataclasses.replace(found, runs=(dataclasses.replace(first, state="queued"), *found.runs[1:]))
    split = prices.within(queued, queued.todo(), 10)
    assert [run.stage for run in split.go] == ["knn"]  # of the stage whose first run is on its way, none
    for run in found.runs[2:4]:
        finish(run, seconds=3600, gpus=1)
    runs = [dataclasses.replace(run, state="queued") if run == first else run for run in plan().runs]
    priced = dataclasses.replace(found, runs=tuple(runs))
    assert prices.within(priced, priced.todo(), 3.5).used == pytest.approx(3)
