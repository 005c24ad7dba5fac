"""Slurm: runs of equal resources are one array; a stage that needs another one follows it element by element.

What is queued is found by the arrays' names, which are written down before ``sbatch`` is called: nothing is lost or
doubled whenever this process dies. Every element starts ``launcher.supervisor --manifest``, which finds its run there.
"""

from __future__ import annotations

import ctypes
import functools
import getpass
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from contract import rundir
from contract.settings.env import Env
from launcher import NotQueued, Unavailable, arrays
from launcher.arrays import Array
from launcher.backends import Report, intents
from launcher.backends.slurm_node import seconds as _seconds
from launcher.manifest import SUBMITTED, elements
from launcher.plan import Queued, QueueState, Run
from launcher.rundirs import Submission
from launcher.supervisor import AGAIN, command

TIMEOUT_S = 60
SETTLE_S = 3.0  # after which the sbatch of a launcher that was killed has been heard, or never will be
# What an enclosing job says of itself is wrong in the jobs that it submits.
ENCLOSING = re.compile(r"SLURM_(?!CONF$)|SLURMD_|SRUN_|PMIX?_|SIGHTLINE_ATTEMPT$|(LOCAL_)?(RANK|WORLD_SIZE)$|MASTER_")
# Slurm's commands are not in a container: what the supervisor would ask them is told, what it would have done is done.
OUTSIDE = [
    'export SIGHTLINE_FIRST_NODE=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
    'ends=$(squeue -h -j "$SLURM_JOB_ID" -o %e)',
    'export SLURM_JOB_END_TIME=${SLURM_JOB_END_TIME:-$(date +%s -d "$ends" 2>/dev/null)}',
]
AFTER = f"""
code=$?
[ "$code" -ne {AGAIN} ] || scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID"
exit "$code"
"""
LOST = re.compile(r"timed out|unable to contact|connect failure|communication|zero bytes", re.IGNORECASE)


class Backend:
    def ready(self) -> None:
        if shutil.which("sbatch") is None:
            raise Unavailable("sbatch: no such program; is this a login node of the cluster?")

    def render(self, submission: Submission) -> str:
        made = arrays.of(submission, longest=_max_array_size())
        files = {array.name: f"the job of {number}.sbatch" for number, array in enumerate(made)}
        texts = []
        for number, array in enumerate(made):
            after = f", by --dependency=aftercorr after {files.get(array.after, array.after)}" if array.after else ""
            if array.gate:
                after = f", by --dependency=afterok after {', '.join(files.get(g, g) for g in array.gate)}"
            head = f"# {number}.sbatch: {array.count} runs{after}\n" if len(made) > 1 else ""
            texts.append(head + script(array, number, submission, arrays.cap(array, made)))
        return "\n".join(texts)

    def submit(self, submission: Submission, report: Report) -> int:
        """Returns when Slurm has accepted. Raises NotQueued with Slurm's own words, or Unavailable if it was lost."""
        folder, made = submission.folder, self.prepare(submission)
        ids: dict[str, str] = {}
        for number, array in enumerate(made):
            after = f"aftercorr:{ids.get(array.after, array.after)}" if array.after else None
            if array.gate:
                after = f"afterok:{':'.join(ids.get(gate, gate) for gate in array.gate)}"
            try:
                ids[array.name] = _sbatch(folder / f"{number}.sbatch", array.name, after)
            except NotQueued:
                for late in range(number, len(made)):
                    (folder / f"{late}.json").unlink()
                    (folder / f"{late}.sbatch").unlink()
                raise
            rundir.write_json(folder / SUBMITTED, ids)
            report.queued(array.count, array.first.stage, ids[array.name])
        return 0

    def prepare(self, submission: Submission) -> list[Array]:
        _check_limits(submission.runs)
        made = arrays.of(submission, longest=_max_array_size(), room=_room(submission.runs[0].settings.env))
        folder = submission.folder
        (folder / "logs").mkdir()
        for number, array in enumerate(made):
            text = script(array, number, submission, arrays.cap(array, made))
            rundir.write_atomic(folder / f"{number}.sbatch", text)
            rundir.write_json(folder / f"{number}.json", {"scheduler": "slurm", **array.told()})
        return made

    def query(self, output_dir: Path) -> dict[str, Queued]:
        written = [(path, intent) for path, intent in intents(output_dir) if intent["scheduler"] == "slurm"]
        if not written:
            return {}
        unknown = [path.stat().st_mtime for path, _ in written if not (path.parent / SUBMITTED).exists()]
        if (wait := max(unknown, default=0.0) + SETTLE_S - time.time()) > 0:
            time.sleep(min(wait, SETTLE_S))
        known = {intent["name"]: elements(intent) for _, intent in written}
        found = {}
        for line in _call("squeue", "-h", "-r", "-u", str(os.getuid()), "-o", "%j|%F|%K|%T|%r").splitlines():
            name, *rest = line.split("|")
            if name in known and len(rest) == 4 and rest[1] in known[name]:
                array, index, state, why = rest
                job, runs = f"{array}_{index}", known[name][index]
                for run in runs:
                    if len(runs) == 1 or not rundir.ended_in(output_dir / run["dir"], job):
                        found[run["identity"]] = Queued(
                            "slurm", array, int(index), job, _state(state, why), why, shared=len(runs) > 1
                        )
        return found

    def cancel(self, jobs: Sequence[str]) -> None:
        for array, numbers in arrays.by_array(job.split("_") for job in jobs):
            _call("scancel", f"{array}_[{numbers}]")

    def signal(self, jobs: Sequence[str], name: str) -> None:
        """To the jobs' steps, as a preemption does. KILL by the steps' own names: sent to a job it means to cancel it,
        which warns first."""
        if name == "KILL":
            steps = _call("squeue", "-s", "-h", "-j", ",".join(jobs), "-o", "%i").split()
            jobs = [step for step in steps if not step.endswith((".batch", ".extern"))]
        if jobs:  # of nothing scancel would say that nothing was said
            _call("scancel", f"--signal={name}", *jobs)


def script(array: Array, number: int, submission: Submission, cap: int | None) -> str:
    from submitit.slurm.slurm import _convert_mem, _make_sbatch_string  # 0.1 s that only a launch has to wait for

    env, folder, first = array.env, submission.folder, array.first
    what = shlex.join(command(first.settings, first.folder)).replace("\n", "?")  # a line end would end the comment
    if env.nodes > 1:
        what = what.replace("--standalone", f"--nnodes={env.nodes} ...")
    more: dict[str, Any] = {
        "array": arrays.ranges(sorted(array.runs)) + (f"%{cap}" if cap else ""),
        "requeue": True,
        "kill-on-invalid-dep": "yes",
        **({"reservation": env.reservation} if env.reservation else {}),
        **{name.replace("_", "-"): value for name, value in env.extra.items() if value is not None},
    }
    unwanted = tuple(f"#SBATCH --{name.replace('_', '-')}" for name, value in env.extra.items() if value is None)
    cpus = env.cpus_per_node * array.pack
    srun = [f"--cpus-per-task={cpus}", "--open-mode=append"]
    if env.nodes > 1:
        srun.append("--kill-on-bad-exit=1")
    capsule = shlex.quote(str(submission.capsule))
    supervisor = [env.python or sys.executable, "-m", "launcher.supervisor", "--manifest", f"{folder}/{number}.json"]
    outside, after = [], ""
    if env.container:
        mounts = ",".join([*env.mounts, f"{submission.output_dir}:{submission.output_dir}"])
        if env.container_by == "pyxis":
            srun += [f"--container-image={env.container}", f"--container-mounts={mounts}"]
        else:
            gpus = ["--nv"] if env.ngpu else []
            supervisor = ["apptainer", "exec", *gpus, "--bind", mounts, env.container, *supervisor]
        outside, after = OUTSIDE, AFTER
    text = str(
        _make_sbatch_string(
            command=shlex.join(supervisor),
            folder=folder / "logs",
            job_name=array.name,
            partition=env.partition,
            account=env.account,
            qos=env.qos,
            constraint=env.constraint,
            nodelist=env.nodelist,
            exclude=env.exclude,
            comment=env.comment,
            time=env.timeout_min,  # type: ignore[arg-type]  # None leaves it out
            nodes=env.nodes,
            ntasks_per_node=1,
            cpus_per_task=cpus,
            gpus_per_node=f"{env.gpu_model}:{env.ngpu}" if env.gpu_model and env.ngpu else env.ngpu or None,  # type: ignore[arg-type]
            mem=_convert_mem(env.mem_gb * array.pack) if env.mem_gb else None,
            signal_delay_s=env.signal_s,
            wckey=None,  # type: ignore[arg-type]
            map_count=len(array.runs),
            stderr_to_stdout=True,
            setup=[
                *outside,
                *env.setup,
                *(f"export {name}={shlex.quote(value)}" for name, value in env.vars.items()),
                f"# the supervisor of each node starts, for the first of these runs: {what}",
                f"cd {capsule} || exit 1",
                f"export PYTHONPATH={capsule}${{PYTHONPATH:+:$PYTHONPATH}}",
            ],
            additional_parameters=more,
            srun_args=srun,
        )
    )
    lines = [line for line in text.splitlines() if line.partition("=")[0] not in unwanted]
    return "\n".join(lines) + "\n" + after


# -- calling Slurm ----------------------------------------------------------------------------------------------------


def _sbatch(path: Path, name: str, after: str | None) -> str:
    words = ["sbatch", "--parsable", *([f"--dependency={after}"] if after else []), str(path)]
    try:
        said = _call(*words)
    except NotQueued as error:
        if not LOST.search(str(error)):
            raise
        try:  # it may have been heard all the same
            time.sleep(1)
            found = _call("squeue", "-h", "-u", str(os.getuid()), "--name", name, "-o", "%F").split()
        except NotQueued:
            raise Unavailable(
                f"{error}\nperhaps queued; the same command finds out, and queues nothing twice"
            ) from None
        if not found:
            raise
        return found[0]
    return said.strip().split(";")[0]  # JOB, or JOB;CLUSTER


def _call(*words: str) -> str:
    """What it prints. Raises NotQueued with what it says instead."""

    def before_exec() -> None:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG: die when the launcher is killed
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C must not leave the outcome open

    env = {key: value for key, value in os.environ.items() if not ENCLOSING.match(key)}
    if "SLURM_JOB_ID" in os.environ:
        env.pop("CUDA_VISIBLE_DEVICES", None)
    try:
        done = subprocess.run(
            words,
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
            preexec_fn=before_exec,  # this process has one thread
        )
    except FileNotFoundError:
        raise NotQueued(f"{words[0]}: no such program; is this a login node of the cluster?") from None
    except subprocess.TimeoutExpired:
        raise NotQueued(f"{words[0]}: timed out, no answer in {TIMEOUT_S} s") from None
    if done.returncode:
        raise NotQueued(done.stderr.strip() or done.stdout.strip() or f"{words[0]}: exit {done.returncode}")
    return done.stdout


@functools.cache
def _config() -> dict[str, str]:
    """The site's settings; none where Slurm does not answer: a script can be looked at anywhere."""
    try:
        said = _call("scontrol", "show", "config")
    except NotQueued:
        return {}
    return dict(re.findall(r"^(\w+)\s*= (.*?)\s*$", said, re.MULTILINE))


def _max_array_size() -> int:
    """How many elements an array may have; their numbers are below it."""
    return int(_config().get("MaxArraySize", 1000))


def _check_limits(runs: Sequence[Run]) -> None:
    """A partition that refuses longer jobs would let one wait for ever, unless the site has it refused at once."""
    asked = {(r.settings.env.partition, r.settings.env.timeout_min) for r in runs if r.settings.env.timeout_min}
    if not asked:
        return
    said = _call("scontrol", "show", "partition", "-o")
    limits = {m[1]: m[0] for m in re.finditer(r"^PartitionName=(\S+).*$", said, re.MULTILINE)}
    for partition, minutes in asked:
        names = partition.split(",") if partition else [n for n, line in limits.items() if " Default=YES" in line]
        longest = {}
        for name in set(names) & set(limits):  # of others Slurm says itself that they do not exist
            found = re.search(r" MaxTime=(\S+)", limits[name])
            longest[name] = _seconds(found[1]) if found else None
        if longest and all(most is not None and minutes * 60 > most for most in longest.values()):
            name, most = max(longest.items(), key=lambda item: item[1] or 0)
            raise NotQueued(
                f"env.timeout_min={minutes}: Requested time limit is invalid; partition {name} has a MaxTime of "
                f"{int(most or 0) // 60} minutes, and runs go on in another attempt anyway"
            )


def _room(env: Env) -> int | None:
    """How many more jobs the site takes of this user, as far as it says; None: no limit."""
    if "limits" not in _config().get("AccountingStorageEnforce", "") and env.max_submit is None:
        return None
    try:
        user = getpass.getuser()
        mine = _call(
            "sacctmgr", "-nP", "show", "assoc", f"user={user}", "format=account,maxsubmit,grpsubmit,defaultqos"
        )
        qos = _call("sacctmgr", "-nP", "show", "qos", "format=name,maxsubmitpu,grpsubmit")
    except (NotQueued, OSError, KeyError):  # no accounting, no name: where there are limits, sbatch will say so
        return env.max_submit
    said = [env.max_submit]
    names = {env.qos}
    for line in mine.splitlines():
        account, *limits, default = line.split("|")
        if env.account in (None, account):
            said += [int(limit) for limit in limits if limit]
            names |= {default} if env.qos is None else set()
    for line in qos.splitlines():
        name, *limits = line.split("|")
        said += [int(limit) for limit in limits if limit] if name in names else []
    limits_said = [limit for limit in said if limit is not None]
    if not limits_said:
        return None
    there = len(_call("squeue", "-h", "-r", "-u", str(os.getuid()), "-o", "%i").split())
    return min(limits_said) - there


def _state(state: str, why: str) -> QueueState:
    if why.startswith("DependencyNeverSatisfied"):
        return "blocked"
    if why.startswith("JobHeld"):
        return "held"
    return "running" if state == "RUNNING" else "leaving" if state == "COMPLETING" else "queued"
