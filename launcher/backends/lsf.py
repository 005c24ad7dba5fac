"""LSF, where jobs run in docker: runs of equal resources are one array, sent as ``bsub < script``.

Every element starts ``launcher.supervisor --manifest``. It takes the place of the shell, so that its exit code is the
job's: 75 has LSF queue the element again (``-Q 75``). What is queued is found by the arrays' names, which are written
down before ``bsub`` is called. The truth about a run is its directory; LSF is asked only whether it is still there.
"""

from __future__ import annotations

import math
import re
import shlex
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from contract import rundir
from contract.settings.checks import SettingsError
from contract.settings.env import Env
from launcher import ROOT, NotQueued, Unavailable, arrays
from launcher.arrays import Array
from launcher.backends import Report, intents, lsf_calls
from launcher.manifest import SUBMITTED, elements
from launcher.plan import Queued, QueueState
from launcher.rundirs import Submission
from launcher.supervisor import AGAIN, command

LONGEST = 1000  # elements of an array; a site may allow fewer, seldom more
NAME = 255  # characters of an array's name with its elements
DRY = ("-n", "--dry-run")
ENDED = "ended.json"
WAITS = frozenset({"PEND", "WAIT", "PROV"})
LIVES = frozenset({"RUN", "USUSP", "SSUSP", "UNKWN", "ZOMBI"})  # suspended, or its host unreachable: not over
OVER = frozenset({"DONE", "EXIT"})


class Backend:
    def ready(self) -> None:
        if shutil.which("bsub") is None:
            raise Unavailable("bsub: no such program; is this a host of the LSF cluster?")

    def render(self, submission: Submission) -> str:
        made = _arrays(submission)
        files = {array.name: f"ID-OF-{number}.bsub" for number, array in enumerate(made)}
        texts = []
        for number, array in enumerate(made):
            after = _condition(array, files)
            notes = [f"# {number}.bsub: {array.count} runs"] if len(made) > 1 else []
            if docker := docker_environment(array.env, submission.output_dir):
                words = " ".join(f"{name}={shlex.quote(value)}" for name, value in docker.items())
                notes.append(f"# bsub reads these from its own environment: export {words}")
            said = [word for word in sys.argv[1:] if word not in DRY]
            python, launcher = array.env.python or sys.executable, str(ROOT / "launcher.py")
            prepare = shlex.join([python, launcher, *said, "--prepare", str(submission.folder)])
            first = [
                "# As this was not sent by the launcher, the first element makes the run directories.",
                f"(cd {shlex.quote(str(Path.cwd()))} && {prepare}) || exit 1",
            ]
            texts.append(script(array, number, submission, arrays.cap(array, made), after, notes, first))
        return "\n".join(texts)

    def prepare(self, submission: Submission) -> list[Array]:
        """Write down what is about to be sent."""
        made = _arrays(submission)
        (submission.folder / "logs").mkdir()
        for number, array in reversed([*enumerate(made)]):  # 0.json says that all are there
            intent = {"scheduler": "lsf", "minutes": array.env.timeout_min, **array.told()}
            rundir.write_json(submission.folder / f"{number}.json", intent)
        return made

    def submit(self, submission: Submission, report: Report) -> int:
        """Returns when LSF has accepted. Raises NotQueued with LSF's own words, or Unavailable if it was lost."""
        folder, made = submission.folder, self.prepare(submission)
        ids: dict[str, int] = {}
        for number, array in enumerate(made):
            path, docker = folder / f"{number}.bsub", docker_environment(array.env, submission.output_dir)
            after = _condition(array, {name: str(job) for name, job in ids.items()})
            rundir.write_atomic(path, script(array, number, submission, arrays.cap(array, made), after))
            try:
                ids[array.name] = lsf_calls.submit(path, array.name, docker)
            except NotQueued:
                for late in range(number, len(made)):
                    (folder / f"{late}.json").unlink()
                    (folder / f"{late}.bsub").unlink(missing_ok=True)
                raise
            rundir.write_json(folder / SUBMITTED, ids)
            report.queued(array.count, array.first.stage, str(ids[array.name]))
        return 0

    def query(self, output_dir: Path) -> dict[str, Queued]:
        """One call for all arrays that were not over when last looked at; ``bhist`` only for what ``bjobs`` forgot."""
        sent = [(path, i, _number(path, i)) for path, i in intents(output_dir) if i["scheduler"] == "lsf"]
        open_jobs = {job: (path, elements(i)) for path, i, job in sent if job is not None}
        for job, (path, _) in list(open_jobs.items()):
            if job in _ended(path.parent):
                del open_jobs[job]
        if not open_jobs:
            return {}
        wanted = {job: [int(n) for n in runs] for job, (_, runs) in open_jobs.items()}
        known, silent = lsf_calls.rows(wanted)
        found: dict[str, Queued] = {}
        for job, (path, runs) in open_jobs.items():
            over = True
            for number, mine in runs.items():
                element = (job, int(number))
                row = known.get(element)
                if row is None and element in silent and not _is_over(output_dir, mine, element):
                    row = lsf_calls.Row("UNKWN", "LSF does not say what became of it")
                if row is None or row.state in OVER:
                    continue
                over = False
                for run in mine:
                    if len(mine) == 1 or not rundir.ended_in(output_dir / run["dir"], _name(element)):
                        found[run["identity"]] = Queued(
                            "lsf", str(job), element[1], _name(element), _state(row), row.why, len(mine) > 1
                        )
            if over:
                rundir.write_json(path.parent / ENDED, {"jobs": sorted({*_ended(path.parent), job})})
        return found

    def cancel(self, jobs: Sequence[str]) -> None:
        """An element that is being started may not hear of it; it finds the mark at its run."""
        split = arrays.by_array(job.rstrip("]").split("[") for job in jobs)
        lsf_calls.kill([f"{array}[{elements}]" for array, elements in split])

    def signal(self, jobs: Sequence[str], name: str) -> None:
        lsf_calls.kill(jobs, name)


def _arrays(submission: Submission) -> list[Array]:
    return arrays.of(submission, longest=LONGEST, room=submission.runs[0].settings.env.max_submit, start=1)


def _number(path: Path, intent: Mapping[str, Any]) -> int | None:
    """The array's number: as written down, or as LSF says where the launcher was killed before it could be."""
    place = path.parent / SUBMITTED
    ids = rundir.read_json(place) if place.exists() else {}
    name = str(intent["name"])
    if name not in ids:
        jobs = lsf_calls.named(name)
        if not jobs:
            return None
        ids[name] = lsf_calls.keep_oldest(jobs)
        rundir.write_json(place, ids)
    return int(ids[name])


def _condition(array: Array, ids: Mapping[str, str]) -> str | None:
    """``-w``: an element follows that of its number, or the whole array waits for others to end well."""
    if array.after:
        return f"done({ids.get(array.after, array.after)}[*])"
    return " && ".join(f"done({ids.get(gate, gate)})" for gate in array.gate) or None


def _ended(folder: Path) -> list[int]:
    place = folder / ENDED
    return list(rundir.read_json(place)["jobs"]) if place.exists() else []


def _is_over(output_dir: Path, runs: Iterable[Mapping[str, str]], element: lsf_calls.Element) -> bool:
    folders = [output_dir / run["dir"] for run in runs]
    if all((f / rundir.DONE).exists() or rundir.ended_in(f, _name(element)) for f in folders):
        return True
    return bool(lsf_calls.remembered(element))


def _name(element: lsf_calls.Element) -> str:
    return f"{element[0]}[{element[1]}]"


def _state(row: lsf_calls.Row) -> QueueState:
    if row.state == "PSUSP":
        return "held"
    if row.state in WAITS:
        never = re.search("never satisfied|invalid", row.why, re.IGNORECASE)
        return "blocked" if never and "ependency" in row.why else "queued"
    return "leaving" if row.state == "ZOMBI" else "running"


def script(
    array: Array,
    number: int,
    submission: Submission,
    cap: int | None,
    after: str | None = None,
    notes: Sequence[str] = (),
    first_of_all: Sequence[str] = (),
) -> str:
    """What ``bsub`` reads from its standard input. One option a line, as values may hold either kind of quotes."""
    env, folder, first = array.env, submission.folder, array.first
    what = shlex.join(command(first.settings, first.folder)).replace("\n", "?")  # a line end would end the comment
    spec = f"{array.name}[{arrays.ranges(sorted(array.runs))}]" + (f"%{cap}" if cap else "")
    if len(spec) > NAME:
        raise SettingsError(f"job_name={submission.name}: with its elements {len(spec)} characters; LSF takes {NAME}")
    options: dict[str, object] = {
        "J": spec,
        "q": env.partition,
        "G": env.account,
        "g": env.job_group,
        "sla": env.qos,
        "n": env.cpus_per_node * array.pack * env.nodes,
        "R": _resources(env, array.pack),
        "M": f"{env.mem_gb * array.pack:g}GB" if env.mem_gb else None,
        "gpu": _gpus(env),
        "m": env.nodelist,
        "U": env.reservation,
        "Jd": env.comment,
        "W": f"{env.timeout_min // 60}:{env.timeout_min % 60:02d}" if env.timeout_min else None,
        "wa": "USR2" if env.timeout_min else None,
        "wt": math.ceil(env.signal_s / 60) if env.timeout_min else None,
        "Q": AGAIN,
        "r": True,
        "o": f"{folder}/logs/%J.%I.out",
        "a": f"docker({env.container})" if env.container else None,
        "w": after,
        "ti": True if after else None,
        **{name.replace("_", "-"): value for name, value in env.extra.items()},
    }
    lines = [f"#BSUB -{name}" + ("" if value is True else f" {quoted(value)}")
             for name, value in options.items() if value is not None and value is not False]  # fmt: skip
    supervisor = [env.python or sys.executable, "-m", "launcher.supervisor", "--manifest", f"{folder}/{number}.json"]
    capsule = shlex.quote(str(submission.capsule))
    return "\n".join(
        [
            "#!/bin/bash",  # LSF looks at the first line only
            *notes,
            *lines,
            "",
            *env.setup,
            *(f"export {name}={shlex.quote(value)}" for name, value in env.vars.items()),
            *first_of_all,
            f"# the supervisor starts, for the first of these runs: {what}",
            f"cd {capsule} || exit 1",
            f"export PYTHONPATH={capsule}${{PYTHONPATH:+:$PYTHONPATH}}",
            "trap '' INT TERM USR1 USR2  # until the supervisor listens",
            f"exec {shlex.join(supervisor)}",
            "",
        ]
    )


def quoted(value: object) -> str:
    """A value as ``bsub`` reads it: blanks, # and the like only within quotes, of one kind. Raises SettingsError."""
    text = str(value)
    if re.fullmatch(r"[\w./:%+,@^=-]+", text):
        return text
    for mark in "'\"":
        if mark not in text and "\\" not in text and "$" not in text and "`" not in text:
            return f"{mark}{text}{mark}"
    raise SettingsError(f"{text!r}: bsub cannot be told a text with both kinds of quotes, $, ` or a backslash")


def _resources(env: Env, pack: int) -> str:
    """The one ``-R``: several are merged by some versions and refused by others."""
    memory = env.mem_gb and env.mem_gb * pack
    wanted = [env.constraint] if env.constraint else []
    wanted += [f"mem>{memory:g}GB"] if memory else []
    wanted += [f"hname!='{name}'" for name in (env.exclude or "").split(",") if name]
    parts = [f"select[{' && '.join(wanted)}]"] if wanted else []
    parts += [f"rusage[mem={memory:g}GB]"] if memory else []  # with its unit: a bare number means KB to GB
    parts.append(f"span[ptile={env.cpus_per_node}]" if env.nodes > 1 else "span[hosts=1]")
    return " ".join(parts)


def _gpus(env: Env) -> str | None:
    """GPUs are counted per host."""
    if not env.ngpu:
        return None
    return ":".join([f"num={env.ngpu}", *([f"gmodel={env.gpu_model}"] if env.gpu_model else []), "j_exclusive=yes"])


def docker_environment(env: Env, output_dir: Path) -> dict[str, str]:
    """``LSF_DOCKER_*``, which count in the environment of ``bsub`` only. Raises SettingsError for what docker queues
    cannot mount: files, and paths with blanks or colons."""
    if not env.container:
        return {}
    mounts = [*env.mounts, f"{output_dir}:{output_dir}"]
    for mount in mounts:
        parts = mount.split(":")
        if re.search(r"\s", mount) or not 2 <= len(parts) <= 3 or (len(parts) == 3 and parts[2] not in ("ro", "rw")):
            raise SettingsError(
                f"env.mounts={mount!r}: a docker queue takes FROM:TO or FROM:TO:ro, without blanks and other colons"
            )
        if Path(parts[0]).exists() and not Path(parts[0]).is_dir():
            raise SettingsError(f"env.mounts={mount!r}: {parts[0]} is a file; a docker queue mounts directories only")
    found: Mapping[str, str | None] = {
        "LSF_DOCKER_VOLUMES": " ".join(mounts),
        "LSF_DOCKER_PRESERVE_ENVIRONMENT": "true",
        "LSF_DOCKER_SHM_SIZE": f"{env.shm_gb:g}g" if env.shm_gb else None,
        "LSF_DOCKER_NETWORK": env.network or ("host" if env.nodes > 1 else None),
        "LSF_DOCKER_IPC": env.ipc or ("host" if env.nodes > 1 else None),
        "LSF_DOCKER_ENTRYPOINT": env.entrypoint,
    }
    return {name: value for name, value in found.items() if value is not None}
