"""The record of the environment; runs made again from their capsule; what is not the same in two runs."""

import importlib.metadata
import json
import re
import shutil
import stat
import subprocess
import sys

import pytest

from contract import rundir
from launcher import environment, launches, remarks
from tests.house import ROOT, House, build
from tests.launcher.studies import STUDY, finish

# -- the environment ----------------------------------------------------------------------------------------------


def test_the_packages_are_those_that_python_finds():
    found = environment.here(threads=1)["packages"]
    wanted = {re.sub(r"[-_.]+", "-", d.name).lower(): d.version for d in importlib.metadata.distributions()}
    assert {name: found.get(name) for name in wanted} == wanted


def nvidia_smi(folder, said, seconds=0):
    tool = folder / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\nsleep {seconds}\nprintf '{said}'\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)


@pytest.mark.parametrize(
    ("visible", "names"),
    [(None, ["NVIDIA H100", "NVIDIA L40S, PCIe"]), ("1", ["NVIDIA L40S, PCIe"]), ("GPU-aa", ["NVIDIA H100"]), ("", [])],
)
def test_the_gpus_are_those_that_are_visible(tmp_path, monkeypatch, visible, names):
    nvidia_smi(tmp_path, r"0, GPU-aa, 550.1, NVIDIA H100\n1, GPU-bb, 550.1, NVIDIA L40S, PCIe\n")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    environment._gpus.cache_clear()
    found = environment.here(threads=1)
    environment._gpus.cache_clear()
    assert (found["gpus"], found["driver"]) == (names, "550.1" if names else None)


def test_a_driver_that_does_not_answer_is_not_waited_for(tmp_path, monkeypatch):
    nvidia_smi(tmp_path, "", seconds=60)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(environment, "ASK_S", 0.2)
    environment._gpus.cache_clear()
    assert environment.here(threads=1)["gpus"] == []
    environment._gpus.cache_clear()


def test_every_attempt_names_its_environment_and_each_is_written_down_once(house):
    house.run("worker=main_lmim", "epochs=1", "data=digits", code=0)
    (folder,) = house.runs()
    (start,) = [each for each in house.attempts(folder) if each["event"] == "start"]
    name, found = rundir.environment(folder)
    assert name == start["environment"] == environment.digest(found)
    assert found["packages"]["pyyaml"] == importlib.metadata.version("PyYAML")
    assert (found["gpus"], found["container"], found["python"]) == ([], None, sys.version.split()[0])
    (folder / rundir.DONE).unlink()
    house.run("worker=main_lmim", "epochs=1", "data=digits", code=0)
    assert len(house.attempts(folder)) == 4
    assert len(list(folder.glob("environment.*.json"))) == 1
    (folder / rundir.DONE).unlink()
    house.run("worker=main_lmim", "epochs=1", "data=digits", code=0, MKL_CBWR="AVX2")
    assert len(list(folder.glob("environment.*.json"))) == 2
    assert rundir.environment(folder)[1]["variables"] == {"MKL_CBWR": "AVX2"}


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.setattr(launches, "CONFIGS", tmp_path / "configs")
    path = tmp_path / "configs" / "study" / "mine.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(STUDY)
    return lambda: launches.of_study("mine", [{"output_dir": str(tmp_path / "runs")}])


def made_in(run, **changes):
    finish(run)
    here = environment.here(threads=2, gpus=False)
    here["packages"] = here["packages"] | changes.pop("packages", {})
    environment.keep(run.folder, here | changes)


def test_a_plan_warns_of_a_cell_that_mixes_environments_or_would(study):
    runs = [run for run in study().runs if run.stage == "pretrain" and run.settings.epochs]
    assert len(runs) == 2
    made_in(runs[0], packages={"torch": "1.13", "rich": "0.1"})
    (line,) = remarks.of(study())
    here = importlib.metadata.version("torch")
    assert line == f"a cell would mix: finished runs had torch 1.13; here it is {here}: ViT-B/16 v1.0, pretrain"
    made_in(runs[1], gpus=["NVIDIA H100"])
    gpus, torch = sorted(remarks.of(study()))
    assert gpus == "mixed in one cell: gpus NVIDIA H100 (1) | none (1): ViT-B/16 v1.0, pretrain"
    assert torch == f"mixed in one cell: torch 1.13 (1) | {here} (1): ViT-B/16 v1.0, pretrain"


def test_threads_count_on_cpus_only():
    assert "threads" in environment.matters(environment.here(threads=2, gpus=False))
    assert "threads" not in environment.matters(environment.here(threads=2) | {"gpus": ["H100"]})


# -- again --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """Two pretrained runs with an evaluation each."""
    house = build(tmp_path_factory.mktemp("swept") / "house")
    words = ["worker=main_lmim", "epochs=80", "seed=0,1", "then=[main_knn]", "data=digits"]
    house.run(*words, code=0, FAKE_STEP_S="0.005")
    return house


@pytest.fixture
def sweep(swept, tmp_path):
    """The same elsewhere: a test may do with it what it likes."""
    shutil.copytree(swept.root, tmp_path / "house", symlinks=True)
    return House(tmp_path / "house", tmp_path / "house" / "runs")


def one(house, worker="main_lmim", seed=0):
    (found,) = [f for f in house.runs() if f.parent.name == worker and rundir.read_run(f)["seed"] == seed]
    return found


def tree(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and "repro" not in p.parts}


def test_a_run_is_made_again_from_its_capsule_and_the_first_steps_are_compared(sweep):
    folder = one(sweep)
    before = tree(folder)
    (sweep.root / "workers" / "main_lmim.py").write_text("raise SystemExit('today it is broken')\n")
    done = sweep.run("repro", folder.name, code=0, FAKE_STEP_S="0.05")
    assert "environment: as it was" in done.stdout
    assert "reproduced: all 100 values up to step 50 are the same to the last bit" in done.stdout
    assert tree(folder) == before
    assert not list(sweep.out.glob("repro/*"))  # nothing is left where there is nothing to see
    assert not sweep.processes()


def test_other_numbers_are_told_and_a_tolerance_accepts_them(sweep):
    folder = one(sweep)
    path = folder / rundir.METRICS
    path.write_text(path.read_text().replace('"train/loss": 0.5,', '"train/loss": 0.50001,'))
    done = sweep.run("repro", folder.name, code=100)
    assert (
        "not reproduced: the largest relative difference is 2e-05, train/loss at step 2: 0.50001 -> 0.5" in done.stdout
    )
    (made,) = sweep.out.glob(f"repro/*/main_lmim/{folder.name}")
    assert rundir.state(made) in ("stopped", "finished")
    said = json.loads(sweep.run("repro", folder.name, "--tolerance", "1e-4", "--json", "-q", code=0).stdout)
    assert (said["reproduced"], said["identical"], said["largest"]["where"]) == (True, False, "train/loss at step 2")


def test_a_run_that_logs_rarely_is_compared_up_to_its_first_line_after_that(sweep):
    folder = one(sweep)
    path = folder / rundir.METRICS
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if json.loads(line)["step"] % 30 == 0))
    said = json.loads(sweep.run("repro", folder.name, "--json", code=0).stdout)
    assert said["steps"] == [30, 60]


def test_an_evaluation_is_made_again_to_its_end_with_its_results(sweep):
    folder = one(sweep, "main_knn")
    said = json.loads(sweep.run("repro", folder.name, "--json", code=0).stdout)
    assert said["identical"]
    assert said["values"] == 2 * len(sweep.steps(folder)) + 1
    rundir.write_json(folder / rundir.DONE, {"metrics": {"knn/top1": 0.25}})
    assert "the result knn/top1: 0.25 -> 0.5" in sweep.run("repro", folder.name, code=100).stdout


def test_what_is_missing_is_said_in_one_line(sweep):
    knn, folder = one(sweep, "main_knn"), one(sweep)

    def refused(code, *words):
        done = sweep.run("repro", *words, code=code)
        (line,) = done.stderr.splitlines()
        assert not list(sweep.out.glob("repro/*"))
        return line

    assert "2 runs match" in refused(2, "main_knn")
    assert "no study, sweep, worker or run of this name" in refused(102, "feedbeef")
    (folder / rundir.ENCODER).rename(folder / "away")
    assert f"encoder.pt: gone; {knn.name} is built upon it" in refused(2, knn.name)
    (folder / "away").rename(folder / rundir.ENCODER)
    assert "--into" in refused(2, knn.name, "--into", str(sweep.root))
    assert "no such folder here; --data-path" in refused(2, knn.name, "--data-path", "/nowhere")
    capsule = (folder / rundir.CAPSULE).resolve()
    with (capsule / "workers" / "main_lmim.py").open("a") as file:
        file.write("# by hand\n")
    assert "changed since it was made" in refused(4, folder.name)
    shutil.rmtree(capsule)
    assert f"{capsule}: gone, and with it the code of {folder.name}" in refused(2, folder.name)
    info = rundir.read_run(folder)
    rundir.write_json(folder / rundir.RUN, {**info, "imported": {"source": "Table 3"}})
    assert "was imported" in refused(4, folder.name)


def test_a_run_that_fails_this_time_is_told_with_its_reason(sweep):
    folder = one(sweep)
    done = sweep.run("repro", folder.name, code=2, FAKE_FAIL="0")
    assert "it failed this time: user bug: ValueError: seed 0 is unlucky" in done.stderr


# -- differences --------------------------------------------------------------------------------------------------


def test_two_runs_are_compared_in_everything_that_makes_them(sweep):
    first, before = one(sweep), one(sweep, seed=1)
    worker = sweep.root / "workers" / "main_lmim.py"
    worker.write_text(worker.read_text() + "print('new')\n")
    sweep.run("worker=main_lmim", "epochs=81", "data=digits", "log_every=7", code=0, MKL_CBWR="AVX2")
    (second,) = {f for f in sweep.runs() if f.parent.name == "main_lmim"} - {first, before}
    found = json.loads(sweep.run("diff", first.name, second.name, "--json", "--code", code=0).stdout)
    assert found["science"] == {"epochs": [80, 81]}
    assert found["settings"]["log_every"] == [20, 7]
    assert found["code"]["changed"] == ["workers/main_lmim.py"]
    assert "+print('new')" in found["code"]["patch"]
    assert found["environment"]["MKL_CBWR"] == ["none", "AVX2"]
    assert found["results"]["knn/top1"] == [0.5, 0.5]
    said = sweep.run("diff", first.name, second.name, code=0).stdout
    assert re.search(r"config, science +epochs +80 +81", said)
    assert re.search(r"code +workers/main_lmim.py +differs", said)
    assert max(map(len, said.splitlines())) <= 200
    shutil.rmtree((first / rundir.CAPSULE).resolve())
    assert "is gone" in sweep.run("diff", first.name, second.name, "--code", code=0).stdout


def test_evaluations_lead_to_what_they_are_built_upon(sweep):
    a, b = one(sweep, "main_knn", 0), one(sweep, "main_knn", 1)
    said = sweep.run("diff", a.name, b.name, code=0).stdout
    assert f"next: python launcher.py diff {one(sweep, seed=0).name} {one(sweep, seed=1).name}" in said
    assert "the same: code, data" in said
    sweep.run("diff", a.name, code=2)
    sweep.run("diff", a.name, "main_knn", code=2)


@pytest.mark.parametrize("verb", ["repro", "diff", "report"])
def test_help_says_what_to_say(verb):
    done = subprocess.run([sys.executable, "launcher.py", verb, "--help"], cwd=ROOT, capture_output=True, check=True)
    assert b"exit codes" in done.stdout
