"""LSF, where jobs run in docker: runs of equal resources are one array, sent as ``bsub < script``.

Every element starts ``launcher.supervisor --manifest``. It takes the place of the shell, so that its exit code is the
job's: 75 has LSF queue the element again (``-Q 75``).
"""

from __future__ import annotations

import math
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from contract.settings.checks import SettingsError
from contract.settings.env import Env
from launcher import Unavailable, arrays
from launcher.arrays import Array
from launcher.backends import Report
from launcher.plan import Queued
from launcher.rundirs import Submission
from launcher.supervisor import AGAIN, command

LONGEST = 1000  # elements of an array; a site may allow fewer, seldom more
NAME = 255  # characters of an array's name with its elements


class Backend:
    def ready(self) -> None:
        raise Unavailable("env.scheduler=lsf: submission is not built yet; -n prints the scripts")

    def render(self, submission: Submission) -> str:
        made = arrays.of(submission, longest=LONGEST, room=submission.runs[0].settings.env.max_submit, start=1)
        files = {array.name: f"ID-OF-{number}.bsub" for number, array in enumerate(made)}
        texts = []
        for number, array in enumerate(made):
            after = files.get(array.after, array.after) if array.after else None
            notes = [f"# {number}.bsub: {array.count} runs"] if len(made) > 1 else []
            if docker := docker_environment(array.env, submission.output_dir):
                words = " ".join(f"{name}={shlex.quote(value)}" for name, value in docker.items())
                notes.append(f"# bsub reads these from its own environment: export {words}")
            texts.append(script(array, number, submission, arrays.cap(array, made), after, notes))
        return "\n".join(texts)

    def submit(self, submission: Submission, report: Report) -> int:
        raise NotImplementedError

    def query(self, output_dir: Path) -> dict[str, Queued]:
        return {}

    def cancel(self, jobs: Sequence[str]) -> None:
        """Nothing waits in a queue."""


def script(
    array: Array,
    number: int,
    submission: Submission,
    cap: int | None,
    after: str | None = None,
    notes: Sequence[str] = (),
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
        "n": env.cpus_per_node * env.nodes,
        "R": _resources(env),
        "M": f"{env.mem_gb:g}GB" if env.mem_gb else None,
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
        "w": f"done({after}[*])" if after else None,
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


def _resources(env: Env) -> str:
    """The one ``-R``: several are merged by some versions and refused by others."""
    wanted = [env.constraint] if env.constraint else []
    wanted += [f"mem>{env.mem_gb:g}GB"] if env.mem_gb else []
    wanted += [f"hname!='{name}'" for name in (env.exclude or "").split(",") if name]
    parts = [f"select[{' && '.join(wanted)}]"] if wanted else []
    parts += [f"rusage[mem={env.mem_gb:g}GB]"] if env.mem_gb else []  # with its unit: a bare number means KB to GB
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
