"""The logs of some runs, as people read them."""

import os
import pty
import select
import subprocess
import sys

import pytest

from contract import rundir

SLOW = {"FAKE_STEP_S": "0.1"}


def seeds(text):
    return {line.partition(" |")[0].rpartition("=")[2] for line in text.splitlines()}


def test_several_runs_are_followed_side_by_side_also_those_that_start_later_until_all_have_ended(house):
    launched = house.start("worker=main_lmim", "seed=0,1,2", "epochs=8", "env.max_parallel=1", **SLOW)
    house.wait_for(lambda: len(house.runs()) == 3 and [*house.out.glob("*/*/log.txt")])
    follower = house.start("logs", "main_lmim", "-f")
    out, err = follower.communicate(timeout=60)
    assert follower.returncode == 0, err
    assert launched.communicate(timeout=60)
    assert house.all("finished")
    assert seeds(out) == {"0", "1", "2"}
    for folder in house.runs():
        mine = [line.partition(" | ")[2] for line in out.splitlines() if line.startswith(folder.name[:8])]
        assert mine == (folder / rundir.LOG).read_text().splitlines()  # each line once, whole


def test_the_end_of_one_or_of_many(house):
    house.run("worker=main_lmim", "seed=0,1", "epochs=1", "env.max_parallel=2")
    first, second = house.runs()
    assert house.run("logs", first.name).stdout == (first / rundir.LOG).read_text()  # as it stands there
    assert house.run("logs", first.name, "--tail", "1").stdout == "devices  VERSION 1\n"
    assert house.run("logs", first.name, "--tail", "0").stdout == ""
    assert house.run("logs", "main_lmim", "--tail", "1").stdout.count("VERSION 1\n") == 2
    with (first / rundir.LOG).open("ab") as file:
        file.write(b"\x1b[31mred\x07 \xff without an end")
    said = house.run("logs", "main_lmim", "--tail", "1").stdout
    assert "\x1b" not in said
    assert said.count(" | ") == 2
    (second / rundir.LOG).unlink()
    assert "no log yet; python launcher.py logs ... --job" in house.run("logs", second.name).stderr


def test_too_many_are_refused_with_what_narrows_them_down(house):
    house.run("worker=main_lmim", "seed=range(21)", "epochs=0", "-n")
    for seed in range(21):
        folder = house.out / "main_lmim" / f"{seed:012x}"
        folder.mkdir(parents=True)
        run = {"schema": 1, "identity": folder.name, "group": "g", "worker": "main_lmim", "seed": seed}
        rundir.write_json(folder / rundir.RUN, run)
    done = house.run("logs", "main_lmim")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "21 runs match, more than 20; narrow down by" in done.stderr
    assert house.run("logs", "main_lmim", "0-1").returncode == 0


@pytest.mark.parametrize("flags", [[], ["--no-color"]])
def test_on_a_terminal_every_run_has_a_colour(house, flags):
    house.run("worker=main_lmim", "seed=0,1", "epochs=1", "env.max_parallel=2")
    ours, theirs = pty.openpty()
    words = [sys.executable, "launcher.py", "logs", "main_lmim", *flags]
    subprocess.run(words, cwd=house.root, env=house.environ(TERM="xterm"), stdout=theirs, check=True)
    said = b""
    while select.select([ours], [], [], 0)[0]:
        said += os.read(ours, 65536)
    os.close(ours)
    os.close(theirs)
    assert (b"\x1b[36m" in said, b"\x1b[33m" in said) == (not flags, not flags)
