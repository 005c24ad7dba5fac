"""The shell scripts, with names that a person does choose."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "cluster_scripts"
STAGE = SCRIPTS / "stage_data.sh"
NAMES = ["plain", "two words", "it's", 'say "hi"', "-t", "a:b", "semi;colon", "$(touch pwned)", "*", "new\nline", "ünï"]


@pytest.mark.parametrize("name", ["interactive.sh", "stage_data.sh", "job.sbatch"])
def test_shell_scripts_are_clean(name):
    subprocess.run(["bash", "-n", SCRIPTS / name], check=True)
    if shutil.which("shellcheck") is None:
        if "shellcheck" in os.environ.get("SIGHTLINE_REQUIRE", ""):
            pytest.fail("no shellcheck: apt-get install shellcheck")
        pytest.skip("no shellcheck")
    done = subprocess.run(["shellcheck", SCRIPTS / name], text=True, capture_output=True, check=False)
    assert not done.stdout


def stage(source, place, **env):
    """From the source's folder, by its bare name: a name may begin with a dash."""
    words = [STAGE, "-t", str(place), "--", source.name]
    env = {**os.environ, **env}
    return subprocess.run(words, cwd=source.parent, env=env, text=True, capture_output=True, timeout=60, check=False)


@pytest.fixture
def source(tmp_path):
    """A small data set with awkward names below, and a link that leads out of it."""
    folder = tmp_path / "from" / "set"
    for name in ("train/a class", "val/it's"):
        (folder / name).mkdir(parents=True)
        (folder / name / "1.jpg").write_text(name)
    (tmp_path / "elsewhere").write_text("linked")
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_a_directory_of_any_name_is_copied(source, tmp_path, name):
    source = source.rename(source.parent / name)
    done = stage(source, tmp_path / "the disk")
    assert done.returncode == 0, done.stderr
    there = Path(done.stdout.removesuffix("\n"))
    assert there.parent == tmp_path / "the disk"
    assert "\n" not in str(there)
    assert (there / "val" / "it's" / "1.jpg").read_text() == "val/it's"
    assert (there / "link").read_text() == "linked"
    assert not (there / "link").is_symlink()
    assert not list(tmp_path.rglob("pwned"))


@pytest.mark.parametrize("name", ["set.tar", "it's a:b.tar.gz", "-x.zip", "one file.bin"])
def test_archives_are_unpacked_and_files_copied(source, tmp_path, name):
    packed = source.parent / name
    if name.endswith(".zip"):
        with zipfile.ZipFile(packed, "w") as file:
            file.write(source / "link", "set/link")
    elif ".tar" in name:
        with tarfile.open(packed, "w:gz" if name.endswith("gz") else "w") as file:
            file.add(source, "set", filter=lambda entry: entry if not entry.issym() else None)
            file.add(source / "train/a class/1.jpg", "set/link")
    else:
        packed.write_text("linked")
    done = stage(packed, tmp_path / "disk")
    assert done.returncode == 0, done.stderr
    there = Path(done.stdout.removesuffix("\n"))
    if name.endswith(".bin"):
        assert there.read_text() == "linked"
    else:
        assert there.name == "set"  # the only folder in it
        assert (there / "link").exists()


def test_jobs_that_ask_at_once_share_one_copy(source, tmp_path):
    words = [STAGE, "-t", tmp_path / "disk", source]
    asked = [subprocess.Popen(words, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(8)]
    said = [each.communicate(timeout=60) for each in asked]
    assert [each.returncode for each in asked] == [0] * 8
    assert len({out for out, _ in said}) == 1
    assert sum("->" in err for _, err in said) == 1


def test_a_changed_source_is_staged_anew(source, tmp_path):
    first = stage(source, tmp_path / "disk").stdout
    assert stage(source, tmp_path / "disk").stdout == first
    os.utime(source, (1, 1))
    assert stage(source, tmp_path / "disk").stdout != first


def test_a_killed_copy_is_never_taken_for_a_whole_one(source, tmp_path):
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "cp").write_text('#!/bin/sh\n/bin/cp "$@"\nexec sleep 60\n')
    (programs / "cp").chmod(0o755)
    env = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
    slow = subprocess.Popen([STAGE, "-t", tmp_path / "disk", source], env=env, start_new_session=True)
    end = time.monotonic() + 20
    while not list((tmp_path / "disk").glob("*.partial/link")):
        assert time.monotonic() < end
        time.sleep(0.05)
    os.killpg(slow.pid, signal.SIGKILL)
    slow.wait()
    done = stage(source, tmp_path / "disk")
    assert done.returncode == 0, done.stderr
    assert (Path(done.stdout.strip()) / "link").read_text() == "linked"
    assert not list((tmp_path / "disk").glob("*.partial"))


def test_what_cannot_be_staged_is_refused_and_leaves_nothing(source, tmp_path):
    disk = tmp_path / "disk"
    broken = source.parent / "broken.tar"
    broken.write_bytes(b"not an archive")
    missing = source.parent / "missing"
    for each, reason in ((broken, "could not unpack"), (missing, "no such file")):
        done = stage(each, disk)
        assert (done.returncode, done.stdout) == (1, "")
        assert reason in done.stderr
    assert {p.suffix for p in disk.iterdir()} == {".lock"}
    if os.geteuid() == 0:
        os.chown(disk, 65534, 65534)
        assert "another user" in stage(source, disk).stderr


def test_the_site_says_where_the_disk_is(source, tmp_path):
    env = {**os.environ, "SLURM_TMPDIR": str(tmp_path / "job 7")}
    env.pop("USER", None)
    out = subprocess.run([STAGE, source], env=env, text=True, capture_output=True, check=True).stdout
    assert Path(out).parent == tmp_path / "job 7"


# -- on a real Slurm --------------------------------------------------------------------------------------------------

WORKER = """
import json, os, sys, time
from pathlib import Path
from contract import rundir

folder = Path(sys.argv[1])
checkpoint = folder / "checkpoint.pt"
step = int(checkpoint.read_text()) if checkpoint.exists() else 0
while step < 30:
    time.sleep(float(os.environ.get("FAKE_STEP_S", "0")))
    step += 1
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "time": time.time(), "train/loss": 1 / step}) + "\\n")
    checkpoint.write_text(str(step))
    if (folder / f"stop.{os.environ['SIGHTLINE_ATTEMPT']}").exists():
        sys.exit(0)
(folder / "encoder.pt").touch()
rundir.write_json(folder / "done.json", {"metrics": {"knn/top1": 0.5}})
"""


@pytest.fixture
def house(tmp_path):
    """A checkout whose worker takes no time and no torch, at a place with a blank in its name."""
    root = tmp_path / "my house"
    for name in ("launcher", "contract", "configs", "cluster_scripts"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("launcher.py", "setup.cfg"):
        shutil.copy(ROOT / name, root)
    for name, text in (("workers/main_lmim.py", WORKER), ("workers/__init__.py", ""), ("analysis/ingest.py", "")):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text)
    (root / ".venv").symlink_to(sys.prefix)
    return root


def sbatch(box, house, *words, **env):
    place = ["-D", str(house), "-o", str(house / "job.out"), "--mem=1G", "--gpus-per-node=0", "--cpus-per-task=1"]
    return box.ask("sbatch", "--parsable", *place, str(house / "cluster_scripts" / "job.sbatch"), *words, **env)


def test_a_job_that_is_told_to_leave_saves_and_is_queued_again(box, house):
    job = sbatch(box, house, "worker=main_lmim", "env.ngpu=0", FAKE_STEP_S="0.1")
    box.wait_for(lambda: list(house.glob("runs/*/*/checkpoint.pt")))
    box.ask("scancel", "--batch", "--signal=USR2", job)
    box.wait_for(lambda: list(house.glob("runs/*/*/done.json")))
    (run,) = house.glob("runs/*/*/run.json")
    records = [json.loads(line) for line in (run.parent / "attempts.0.jsonl").read_text().splitlines()]
    box.wait_for(lambda: "COMPLETED" in box.ask("sacct", "-XnP", "-o", "State", "-j", job))
    assert [r["cause"] for r in records if r["event"] == "end"][:1] == ["stopped"]
    steps = [json.loads(line)["step"] for line in (run.parent / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 31))
    assert "requeued" in (house / "job.out").read_text()


def test_a_run_directory_instead_of_words_is_given_to_the_supervisor(box, house):
    command = [sys.executable, "launcher.py", "worker=main_lmim", "env.ngpu=0", "seed=7", "-q"]
    subprocess.run(command, cwd=house, check=True, capture_output=True)
    (run,) = house.glob("runs/*/*/done.json")
    run.unlink()
    job = sbatch(box, house, str(run.parent.relative_to(house)))
    box.wait_for(lambda: "COMPLETED" in box.ask("sacct", "-XnP", "-o", "State", "-j", job))
    assert run.exists()


def test_a_job_from_the_wrong_place_says_so(box, tmp_path):
    tmp_path = tmp_path / "a" / "b"
    tmp_path.mkdir(parents=True)
    place = ["-D", str(tmp_path), "-o", f"{tmp_path}/out", "--mem=1G", "--gpus-per-node=0", "--cpus-per-task=1"]
    job = box.ask("sbatch", "--parsable", *place, str(SCRIPTS / "job.sbatch"))
    box.wait_for(lambda: box.ask("sacct", "-XnP", "-o", "State,ExitCode", "-j", job) == "FAILED|2:0")
    assert "call sbatch from the checkout" in (tmp_path / "out").read_text()


def test_a_command_instead_of_a_shell(box, house):
    words = ["--gpus-per-node=2", "--cpus-per-task=1", "--mem=1G", "-w", "node2", "--", "sh", "-c"]
    print_place = 'pwd; hostname; echo "$CUDA_VISIBLE_DEVICES"; command -v python; echo "$1"'
    said = box.ask(str(house / "cluster_scripts" / "interactive.sh"), *words, print_place, "_", "a  b")
    assert said.splitlines() == [str(house), "node2", "0,1", f"{sys.prefix}/bin/python", "a  b"]
