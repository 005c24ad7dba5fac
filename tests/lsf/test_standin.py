"""The stand-in against the tables of what LSF says: a test against it is worth what it is worth."""

import time

import pytest

GOOD = "#BSUB -J a\n#BSUB -o x.%J\n"


def bsub(lsf, script, *words, **more):
    return lsf.call("bsub", *words, stdin=script, **more)


def options(lsf):
    return [job["said"] for job in lsf.state()["jobs"].values()]


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        ("#BSUB -q general -J y -o z # note -e no", {"q": "general", "J": "y", "o": "z"}),
        ("   # BSUB -q general\n#BSUB -o z", {"q": "general", "o": "z"}),
        ('##BSUB -q general\necho "#BSUB -q general"\n#BSUB -o z', {"o": "z"}),
        ("#BSUB hello\n#BSUB -o z", {"o": "z"}),
        ("#BSUB -o z\n#BSUB -q general extra words\n#BSUB -n 2", {"o": "z", "q": "general"}),
        ("true\n#BSUB -o z\ncat <<E\n#BSUB -J n\nE\n   #BSUB -W 7", {"o": "z", "J": "n", "W": "7"}),
        ("#BSUB -o \"a b.%J.out\"\n#BSUB -a 'docker(img:tag)'", {"o": "a b.%J.out", "a": "docker(img:tag)"}),
        ("#BSUB -o z\n#BSUB -W 5\n#BSUB -W 6", {"o": "z", "W": "5"}),
    ],
)
def test_what_is_read_of_a_script(lsf, lines, found):
    assert bsub(lsf, f"#!/bin/sh\n{lines}\ntrue\n").returncode == 0
    assert options(lsf) == [found]


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        ("#BSUB -q nosuch", "nosuch: No such queue. Job not submitted."),
        ("#BSUB -Z9 x", "bsub: illegal option -- Z9"),
        ("#BSUB -o", "bsub: option requires an argument -- o"),
        ("#BSUB -R 'rusage=[mem=20MB]'", "Bad resource requirement syntax. Job not submitted."),
        ("#BSUB -R 'span[hosts=1]]'", "Bad resource requirement syntax. Job not submitted."),
        ("#BSUB -R 'rusage[mem=64GB] select[gpuhost]'", "Bad resource requirement syntax. Job not submitted."),
        ("#BSUB -R 'rusage[mem=64]'", "Bad resource requirement syntax. Job not submitted."),
        ("#BSUB -R span[hosts=1]\n#BSUB -R rusage[mem=1GB]", "Bad resource requirement syntax. Job not submitted."),
        ("#BSUB -M 32", "32: MEMLIMT value should be a positive integer. Job not submitted."),
        ("#BSUB -n x", "Bad argument for option -n. Job not submitted."),
        ("#BSUB -n 0", "The number of processors must be a positive integer. Job not submitted."),
        ("#BSUB -W abc", "abc: Bad RUNLIMIT specification. Job not submitted."),
        ("#BSUB -W 1:00:00", "1:00:00: Bad RUNLIMIT specification. Job not submitted."),
        ("#BSUB -W 999:00", "RUNLIMIT: Cannot exceed queue's hard limit(s). Job not submitted."),
        ("#BSUB -w 'done(99999)'", "99999: No matching job found. Job not submitted."),
        ("#BSUB -w 'done('", "done(: Dependency condition syntax error. Job not submitted."),
        ("#BSUB -m nohost", "nohost: Bad host name, host group name or cluster name. Job not submitted."),
        ("#BSUB -gpu 'gmodel=A100'", "gmodel=A100: Bad GPU requirement syntax. Job not submitted."),
        ("#BSUB -J 'a[1-3'", "Bad job array index list. Job not submitted."),
        ("#BSUB -J 'a[3-1]'", "Job array index error. Job not submitted."),
        ("#BSUB -J 'a[0-3]'", "Job array index error. Job not submitted."),
        ("#BSUB -J 'a[1-1001]'", "Job array index too large. Job not submitted."),
        ("#BSUB -app nosuch", "nosuch: No such application profile. Job not submitted."),
        ("#BSUB -wa Q", "Bad job warning action or time. Job not submitted."),
        ("#BSUB -R 'select[nonsense]'", "Bad resource requirement syntax. Job not submitted."),
        ("#BSUB -G nobody", "Request aborted by esub. Job not submitted."),
    ],
)
def test_what_is_refused(lsf, lines, text):
    done = bsub(lsf, f"#!/bin/sh\n#BSUB -o x\n{lines}\ntrue\n")
    assert (done.returncode, done.stdout) == (255, "")
    assert text in done.stderr.splitlines()
    assert lsf.stats() == []


def test_no_command_no_output_file_and_a_script_that_is_an_argument(lsf):
    assert bsub(lsf, "#BSUB -o x\n# only\n").stderr == "No command is specified. Job not submitted.\n"
    assert "Please use the -o option" in bsub(lsf, "#!/bin/sh\ntrue\n").stderr
    (lsf.folder / "job.sh").write_text("#!/bin/sh\n#BSUB -J named\ntrue\n")
    assert bsub(lsf, "", "-o", "x", "sh", "job.sh").returncode == 0
    assert options(lsf) == [{"o": "x"}]  # the script's own lines count for nothing


def test_exact_answers(lsf):
    done = bsub(lsf, f"#!/bin/sh\n{GOOD}true\n")
    assert done.stdout == "Job <1> is submitted to default queue <normal>.\n"
    assert bsub(lsf, f"#!/bin/sh\n{GOOD}true\n", BSUB_QUIET="1").stdout == ""
    unknown = lsf.call("bjobs", "-noheader", "-a", "-o", "jobid stat delimiter='^'", "1", "99999")
    assert (unknown.returncode, unknown.stderr) == (255, "Job <99999> is not found\n")
    assert unknown.stdout.startswith("1^")
    assert lsf.call("bjobs", "1,2").stderr == "1,2: Illegal job ID.\n"
    assert "is not a valid field name" in lsf.call("bjobs", "-o", "nonsense").stderr
    assert lsf.call("bkill", "99999").stderr == "Job <99999>: No matching job found\n"
    assert lsf.call("bkill", "-s", "FOO", "1").stderr == "FOO: Illegal signal value\n"
    assert lsf.call("bhist", "-l", "99999").stdout == "No matching job found\n"


def wait(condition, seconds=15):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_arrays_dependencies_and_orphans(lsf):
    bsub(lsf, "#!/bin/sh\n#BSUB -J a[1-4]%2\n#BSUB -o x\n[ $LSB_JOBINDEX -ne 2 ] && sleep 0.3\n")
    bsub(lsf, "#!/bin/sh\n#BSUB -J b[1-4]\n#BSUB -o x\n#BSUB -w 'done(1[*])'\n#BSUB -ti\ntrue\n")
    most = 0
    while not lsf.idle():
        most = max(most, sum(s == "RUN" for s in lsf.stats()[:4]))
        time.sleep(0.02)
    assert most == 2
    assert lsf.stats() == ["DONE", "EXIT", "DONE", "DONE"] * 2


def test_an_exit_code_queues_again_and_its_output_is_gone(lsf):
    script = "#!/bin/sh\n#BSUB -J a\n#BSUB -Q 75\n#BSUB -o out\necho said\n[ -e again ] || { touch again; exit 75; }\n"
    bsub(lsf, script)
    wait(lsf.idle)
    assert (lsf.folder / "out").read_text().count("said") == 1


def test_bkill_sends_int_term_and_kill_and_without_an_id_hits_the_newest(lsf):
    bsub(
        lsf,
        "#!/bin/bash\n#BSUB -o x\ntrap 'echo int >>seen' INT\n"
        "trap 'echo term >>seen' TERM\nwhile :; do sleep 0.05; done\n",
    )
    bsub(lsf, "#!/bin/bash\n#BSUB -o x\nsleep 30\n")
    wait(lambda: lsf.stats() == ["RUN", "RUN"])
    assert lsf.call("bkill", "1").stdout == "Job <1> is being terminated\n"
    wait(lambda: lsf.stats()[0] == "EXIT")
    assert (lsf.folder / "seen").read_text().split() == ["int", "term"]
    lsf.call("bkill")
    wait(lsf.idle)


def test_a_stopped_job_is_alive_and_a_forgotten_one_is_not_found(lsf):
    bsub(lsf, "#!/bin/sh\n#BSUB -o x\nsleep 0.5\n")
    wait(lambda: lsf.stats() == ["RUN"])
    lsf.call("bstop", "1")
    wait(lambda: lsf.stats() == ["USUSP"])
    lsf.call("bresume", "1")
    wait(lsf.idle)
    lsf.profile(clean_period_s=0)
    assert lsf.call("bjobs", "-a", "1").stderr == "Job <1> is not found\n"


def test_faults(lsf):
    for kind in ("mute", "noise", "duplicate", "killed", "error"):
        lsf.fault("bsub", kind)
        done = bsub(lsf, f"#!/bin/sh\n{GOOD}true\n")
        assert (done.returncode == 0) == (kind in ("mute", "noise", "duplicate"))
    assert len(options(lsf)) == 5
    lsf.fault("bjobs", "empty")
    assert (lsf.call("bjobs", "-a").returncode, lsf.call("bjobs", "-a").stdout.count("\n")) == (0, 6)
