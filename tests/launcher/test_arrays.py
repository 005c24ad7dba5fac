"""Runs as job arrays, and the scripts that are made of them."""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contract.settings.checks import SettingsError
from launcher import NotQueued, arrays, launches, sweep
from launcher.backends import lsf, slurm
from launcher.rundirs import Submission


def submission(*words: str, queue=None) -> Submission:
    plan = launches.of_launch(sweep.points([*words, "output_dir=/out"]))
    return Submission(
        name=plan.name,
        output_dir=Path("/out"),
        capsule=Path("/out/capsules/abc"),
        runs=plan.runs,
        folder=Path("/out/submissions/one"),
        queue=queue or {},
    )


def in_order(made: list[arrays.Array]) -> None:
    """Every run once; a child in the element of its parent's number, no earlier than the parent."""
    seen = [run.identity for array in made for runs in array.runs.values() for run in runs]
    assert len(seen) == len(set(seen))
    place = {run.identity: (array.name, number, at) for array in made
             for number, runs in array.runs.items() for at, run in enumerate(runs)}  # fmt: skip
    for array in made:
        for number, runs in array.runs.items():
            for run in runs:
                for parent in run.parents:
                    assert place[parent][:2] == (array.after, number)


def test_a_thousand_runs_of_four_stages_are_few_submissions():
    words = ["worker=main_lmim", "env=slurm", "seed=range(1000)", "then=[main_knn,main_linprobe]"]
    made = arrays.of(submission(*words), longest=1001)
    assert len(made) == 3
    assert [array.count for array in made] == [1000] * 3
    in_order(made)


@given(
    seeds=st.integers(1, 9), rates=st.integers(1, 3), longest=st.integers(2, 12), room=st.none() | st.integers(1, 40)
)
def test_every_run_has_one_place_and_nothing_is_longer_than_the_site_allows(seeds, rates, longest, room):
    said = submission(
        "worker=main_lmim",
        "env=slurm",
        f"seed=range({seeds})",
        "then=[main_knn,main_linprobe]",
        f"main_linprobe.blr={','.join(str(0.1 * (i + 1)) for i in range(rates))}",
    )
    try:
        made = arrays.of(said, longest=longest, room=room)
    except NotQueued:
        assert room is not None
        assert room < 2 + rates
        return
    in_order(made)
    assert sum(array.count for array in made) == len(said.runs)
    assert all(len(array.runs) <= longest for array in made)
    assert room is None or sum(len(array.runs) for array in made) <= room


def test_the_cap_is_for_a_stage_however_many_arrays_it_takes():
    said = submission("worker=main_lmim", "env=slurm", "seed=range(10)", "env.max_parallel=4")
    made = arrays.of(said, longest=5)
    assert [arrays.cap(array, made) for array in made] == [2, 2]


NASTY = ["env.comment='it is; rm -rf ~'", "env.vars.NAME='$(touch x) `y` \"z\"'", "job_name='a;b c'"]


def test_slurm_reads_our_options_and_nothing_else(monkeypatch):
    monkeypatch.setattr(slurm, "_max_array_size", lambda: 1001)
    said = submission(
        "worker=main_lmim", "env=slurm", *NASTY, "env.extra.signal=null", "env.container=img", "env.mounts=[/a:/a]"
    )
    script = slurm.Backend().render(said)
    options = re.findall(r"^#SBATCH --([\w-]+)", script, re.MULTILINE)
    assert len(options) == len(set(options))
    assert "signal" not in options
    assert "export NAME='$(touch x) `y` \"z\"'" in script
    assert "--container-image=img --container-mounts=/a:/a,/out:/out" in script


def bsub_options(script: str) -> dict[str, str]:
    """As bsub reads them: shell words of every line that begins with #BSUB."""
    lines = [shlex.split(line)[1:] for line in script.splitlines() if re.match(r"\s*#\s*BSUB", line)]
    assert all(len(words) in (1, 2) for words in lines)
    assert len({words[0] for words in lines}) == len(lines)  # one of each, and one -R
    return {words[0]: words[-1] for words in lines}


def test_an_lsf_script_is_complete():
    words = ["env=lsf", "seed=0,1,2", "env.max_parallel=2", "env.mem_gb=64", "env.cpus=8", "env.gpu_model=A100"]
    words += ["env.constraint=gpuhost", "env.container=lab/image:1", "env.shm_gb=16", *NASTY]
    script = lsf.Backend().render(submission("worker=main_lmim", *words))
    options = bsub_options(script)
    assert re.fullmatch(r"[\w.-]+\[1-3\]%2", options["-J"])
    assert options["-R"] == "select[gpuhost && mem>64GB] rusage[mem=64GB] span[hosts=1]"
    assert options["-M"] == "64GB"
    assert options["-gpu"] == "num=1:gmodel=A100:j_exclusive=yes"
    assert (options["-n"], options["-W"], options["-wa"], options["-wt"], options["-Q"]) == (
        "8", "24:00", "USR2", "10", "75",
    )  # fmt: skip
    assert options["-a"] == "docker(lab/image:1)"
    assert options["-Jd"] == "it is; rm -rf ~"
    assert script.startswith("#!/bin/bash\n")
    assert "LSF_DOCKER_VOLUMES=/out:/out" in script
    assert "LSF_DOCKER_SHM_SIZE=16g" in script
    assert script.splitlines()[-1].startswith("exec ")  # the exit code must be the supervisor's


def test_lsf_stages_are_linked_and_hosts_are_filled():
    words = ["env=lsf", "seed=0,1", "then=[main_knn]", "env.nodes=2", "env.ngpu=4", "env.cpus=8"]
    first, second = lsf.Backend().render(submission("worker=main_lmim", *words)).split("#!/bin/bash")[1:]
    assert bsub_options(first)["-n"] == "64"
    assert bsub_options(first)["-R"] == "span[ptile=32]"
    assert bsub_options(first)["-gpu"] == "num=4:j_exclusive=yes"
    assert bsub_options(second)["-w"] == "done(ID-OF-0.bsub[*])"


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("env.mounts=['/a b:/c']", "without blanks"),
        ("env.mounts=['/etc/passwd:/x']", "is a file"),
        ("env.comment='say \"it\\'s\"'", "both kinds of quotes"),
        ("env.vars.A='x\n#BSUB -q other'", "control character"),
    ],
)
def test_what_an_lsf_docker_queue_cannot_do_is_refused(word, says):
    with pytest.raises(SettingsError, match=says):
        lsf.Backend().render(submission("worker=main_lmim", "env=lsf", "env.container=i", word))


def test_a_run_that_is_queued_keeps_its_number_for_those_that_follow():
    from launcher.plan import Queued

    said = submission("worker=main_lmim", "env=slurm", "seed=0,1", "then=[main_knn]")
    parents = [r for r in said.runs if not r.parents]
    queue = {
        run.identity: Queued("slurm", "77", number, f"77_{number}", "queued", "")
        for run, number in zip(parents, (4, 9), strict=True)
    }
    (array,) = arrays.of(
        dataclasses.replace(said, runs=tuple(r for r in said.runs if r.parents), queue=queue), longest=20
    )
    assert array.after == "77"
    assert sorted(array.runs) == [4, 9]
