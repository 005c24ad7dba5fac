"""What is to be done about failures: they are grouped by cause, and every cause has the command that mends it.

host OOM        half as much memory again; of shared memory, twice as much, or no loader processes
CUDA OOM        half the batch, accumulated twice as often: the same effective batch, so the same run
node, NCCL      without that node
disk full       space in that folder, then again
data missing    the data, then again
user bug        never again by itself: the code, then the same launch
all others      again
"""

from __future__ import annotations

import copy
import math
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

import contract.settings
from contract import rundir
from contract.settings import NOT_SCIENCE, Settings, Stepping
from contract.settings.checks import SettingsError
from launcher import arrays, why
from launcher.plan import absolute, located
from launcher.rundirs import Found
from launcher.supervisor import read_settings

MORE = 1.5  # times the memory that was too little
AT_MOST = 12  # groups on a screen
FEW = 4  # runs that are named; more are numbered
NOT_TO_SET = frozenset({"output_dir", "then", "job_name"})


# -- grouping ----------------------------------------------------------------------------------------------------------


@dataclass
class Group:
    """Runs that failed alike."""

    kind: str
    mark: str
    runs: list[Found] = field(default_factory=list)
    causes: list[why.Cause] = field(default_factory=list)
    blocked: int = 0  # runs that wait for these
    good: tuple[int, int] = (0, 0)  # of the same stages: how many finished, and the most memory of one process, MB

    def nodes(self) -> list[str]:
        return sorted({str(c.where["node"]) for c in self.causes if c.where.get("node")})

    def ranges(self) -> str:
        """Their numbers, as SELECTION takes them."""
        return arrays.ranges(sorted(f.index for f in self.runs))


def groups(found: Iterable[Found], every: Sequence[Found], output_dir: Path) -> list[Group]:
    """Of the runs that failed, or left and were not started again; the most frequent cause first. ``every`` run of the
    folder tells who waits for them, and what others of the same stage needed."""
    made: dict[tuple[str, str], Group] = {}
    for each in found:
        if each.state in ("failed", "stopped", "waiting") and (cause := why.of_run(each.folder, output_dir)):
            group = made.setdefault((cause.kind, cause.mark), Group(cause.kind, cause.mark))
            group.runs.append(each)
            group.causes.append(cause)
    for group in made.values():
        group.blocked = len(_behind(every, {f.identity for f in group.runs}))
        if group.kind == why.HOST_OOM:
            group.good = _good(every, {f.info.get("stage") for f in group.runs})
    return sorted(made.values(), key=lambda g: (-len(g.runs), g.kind, g.mark))


def _behind(found: Sequence[Found], failed: set[str]) -> set[str]:
    """What waits for these, and what waits for that."""
    behind: set[str] = set()
    while more := {
        f.identity
        for f in found
        if f.state in ("blocked", "waiting")
        and f.identity not in behind
        and (failed | behind).intersection((*f.info.get("parents", ()), *f.info.get("canary", ())))
    }:
        behind |= more
    return behind


def _good(found: Iterable[Found], stages: set[Any]) -> tuple[int, int]:
    peaks = [_peak(f.folder) for f in found if f.state == "finished" and f.info.get("stage") in stages]
    return len(peaks), max(peaks, default=0)


def _peak(folder: Path) -> int:
    """MB, of the largest process of the last attempt."""
    last = rundir.last_record(rundir.attempts_file(folder, 0)) or {}
    return int(last.get("peak_rss_mb") or 0)


# -- the command that mends it -----------------------------------------------------------------------------------------


def mend(group: Group, words: Sequence[str]) -> tuple[str | None, str]:
    """(the command, what is to be done or known before); ``words``: the selection in which they were found."""
    flags: list[str] = []
    note = ""
    settings = _settings(group) if group.kind != why.BUG else []
    match group.kind:
        case why.BUG:
            places = Counter(str(c.where["place"]) for c in group.causes if c.where.get("place"))
            place = f" ({places.most_common(1)[0][0]})" if places else ""
            return None, f"mend the code{place}, then the same launch again; as it is it fails again"
        case why.CUDA_OOM:
            if reason := next(filter(None, map(_not_to_halve, settings)), None):
                return None, f"batch_size cannot be halved: {reason}"
            flags = ["--halve-batch"]
        case why.HOST_OOM:
            flags, note = _more_memory(group, settings)
        case why.NODE | why.NCCL:
            if (nodes := group.nodes()) and any(s.env.scheduler != "local" for s in settings):
                known = [n for s in settings for n in _nodes(s.env.exclude)]
                flags = ["--set", f"env.exclude={','.join(dict.fromkeys([*known, *nodes]))}"]
        case why.DISK:
            paths = sorted({str(Path(c.where["path"]).parent) for c in group.causes if c.where.get("path")})
            where = ", ".join(paths[:3]) or settings[0].output_dir
            note = f"make room in {where} (python launcher.py prune -n shows what may go), then"
        case why.DATA:
            paths = sorted({str(c.where["path"]) for c in group.causes if c.where.get("path")})
            note = f"put {', '.join(paths[:3])}{' and others' if len(paths) > 3 else ''} there, then"
        case why.UNKNOWN | why.GAVE_UP:
            note = f"python launcher.py logs {group.runs[0].identity[:8]} says more; then"
    return shlex.join(["python", "launcher.py", "retry", *_selection(group, words), *flags]), note


def _settings(group: Group) -> list[Settings]:
    """Of the runs; once for all that differ in their seed only."""
    different: dict[str, Path] = {}
    for each in group.runs:
        text = (each.folder / rundir.CONFIG).read_text()
        different.setdefault(re.sub(r"^seed: \d+$", "", text, flags=re.MULTILINE), each.folder)
    return [read_settings(folder) for folder in different.values()]


def _selection(group: Group, words: Sequence[str]) -> list[str]:
    """Exactly these runs, also when others have come in between."""
    place = [w for w in words if w.startswith("output_dir=")]
    if len(group.runs) == 1:
        return [group.runs[0].identity[:8], *place]
    kept = [w for w in words if not w.startswith((":", "why=", "output_dir="))]
    kept = [w.partition(":")[0] if "=" not in w else w for w in kept]
    states = sorted({f":{f.state}" for f in group.runs})
    return [*kept, *states, f"why={group.mark}" if group.kind == why.BUG else f"why={group.kind}", *place]


def _more_memory(group: Group, settings: Sequence[Settings]) -> tuple[list[str], str]:
    if all(s.env.scheduler == "local" for s in settings):
        return ["--set", "env.max_parallel=1"], "one at a time:"
    if all(c.where.get("shm") for c in group.causes):
        if any(s.env.scheduler == "lsf" and s.env.container for s in settings):
            asked = max(s.env.shm_gb or 4 for s in settings)
            return ["--set", f"env.shm_gb={2 * asked:g}"], "of shared memory, which loader processes need:"
        return ["--set", "env.workers=0"], "of shared memory (/dev/shm), which loader processes need; without them:"
    asked = max(s.env.mem_gb or 0 for s in settings)
    peak = max(int(c.where.get("peak_mb") or 0) for c in group.causes) / 1024  # of a whole job, as LSF measured it
    each = max([group.good[1], *(_peak(f.folder) for f in group.runs)]) / 1024  # of one process
    seen = max(peak, each * max(s.env.processes_per_node for s in settings))
    wanted = math.ceil(max(MORE * asked, 1.1 * peak) if asked else MORE * seen)
    said = f"asked for {asked:g} GB" if asked else "asked for no memory (env.mem_gb)"
    said += f", used {peak:.1f} GB" if peak else ""
    if group.good[1]:
        said += f"; {group.good[0]} good runs of this stage: at most {group.good[1] / 1024:.1f} GB a process"
    return (["--set", f"env.mem_gb={wanted}"] if wanted else []), said + ":"


def _nodes(hosts: str | None) -> list[str]:
    """``a,b[1,2]`` in parts; Slurm's brackets are kept."""
    parts, depth, part = [], 0, ""
    for c in hosts or "":
        depth += (c == "[") - (c == "]")
        if c == "," and not depth:
            parts.append(part)
            part = ""
        else:
            part += c
    return [each for each in [*parts, part] if each]


def _not_to_halve(settings: Settings) -> str | None:
    if not isinstance(settings, Stepping):
        return f"{settings.worker} trains nothing"
    if settings.batch_size % 2:
        return f"batch_size={settings.batch_size} is odd"
    if _halved(settings).science() != settings.science():
        return f"the batch of one process is part of this method ({settings.worker}); more memory, or another run"
    return None


def _halved(settings: Stepping) -> Stepping:
    half = copy.copy(settings)
    half.batch_size, half.accum_iter = settings.batch_size // 2, 2 * (settings.accum_iter or 1)
    return half


# -- what is told anew -------------------------------------------------------------------------------------------------


def change(said: Sequence[str], halve: bool) -> tuple[Callable[[Settings], Settings] | None, frozenset[str]]:
    """``--set KEY=VALUE`` and ``--halve-batch`` as a change of settings, and the keys said. Raises SettingsError."""
    keys: dict[str, Any] = {}
    for word in said:
        key, equals, value = word.partition("=")
        if not equals:
            raise SettingsError(f"--set {word}: expected KEY=VALUE")
        if key in NOT_TO_SET or not {key, key.partition(".")[0]} & NOT_SCIENCE:
            raise SettingsError(
                f"--set {key}: can change the result, or where it is; retry takes what cannot: env.*, "
                f"{', '.join(sorted(NOT_SCIENCE - NOT_TO_SET - {'env'}))}"
            )
        try:
            keys[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise SettingsError(f"--set {key}={value}: unreadable") from None
        if key == "data_path" and keys[key]:
            keys[key] = absolute(str(keys[key]))
    if not keys and not halve:
        return None, frozenset()
    return lambda settings: _changed(settings, keys, halve), frozenset(keys)


def _changed(settings: Settings, keys: Mapping[str, Any], halve: bool) -> Settings:
    values = contract.settings.plain(settings)
    for name in ("scheduler", "slurm", "lsf"):
        if f"env.{name}" in keys:  # it takes the place of what was said before
            values["env"] |= {"scheduler": "local", "slurm": False, "lsf": False}
    for key, value in keys.items():
        at = values
        *groups_of, last = key.split(".")
        for part in groups_of:
            at = at.setdefault(part, {})
            if not isinstance(at, dict):
                raise SettingsError(f"--set {key}: {part} has no keys of its own")
        at[last] = value
    if halve:
        if reason := _not_to_halve(settings):
            raise SettingsError(f"--halve-batch: {reason}")
        values["batch_size"] //= 2
        values["accum_iter"] = 2 * (values["accum_iter"] or 1)
    made = contract.settings.read(values)
    made.env = located(made.env)
    if isinstance(made, Stepping) and made.env.processes != settings.env.processes:
        made.accum_iter = None
        made.resolve_batch(made.env.processes)  # the effective batch stays
    return made


def bugs(found: Iterable[Found], output_dir: Path, today: Mapping[str, str]) -> dict[str, why.Cause]:
    """The runs, by identity, that ended by a bug in code that is still what it was; ``today``: the hashes now."""
    same = [f for f in found if f.state == "failed" and (f.info.get("code") or {}).get("hash") == today.get(f.identity)]
    causes = {f.identity: why.of_run(f.folder, output_dir) for f in same}
    return {identity: cause for identity, cause in causes.items() if cause and cause.kind == why.BUG}


# -- what a person sees ------------------------------------------------------------------------------------------------


def described(group: Group, words: Sequence[str]) -> dict[str, Any]:
    """For ``--json``; these keys stay."""
    command, note = mend(group, words)
    finished, peak = group.good
    return {
        "kind": group.kind,
        "mark": group.mark,
        "count": len(group.runs),
        "said": group.causes[0].said,
        "where": dict(group.causes[0].where),
        "runs": [f.identity for f in group.runs],
        "nodes": group.nodes(),
        "blocked": group.blocked,
        "good_runs": finished,
        "good_peak_mb": peak,
        "command": command,
        "note": note,
    }


def lines(found: Sequence[Group], words: Sequence[str]) -> list[tuple[str, str]]:
    """(what it is, line) for a screen: head, cause, runs or mend."""
    count, blocked = sum(len(g.runs) for g in found), sum(g.blocked for g in found)
    causes = "1 cause" if len(found) == 1 else f"{len(found)} causes"
    behind = f"; {blocked} more wait for them, and are started with them" if blocked else ""
    said = [("head", f"{count} failed, {causes}{behind}")]
    for group in found[:AT_MOST]:
        cause = group.causes[0]
        said.append(("cause", f"{group.kind} x{len(group.runs)}  {cause.said}"))
        stages = ", ".join(dict.fromkeys(str(f.info.get("stage")) for f in group.runs))
        which = ", ".join(f.identity[:8] for f in group.runs) if len(group.runs) <= FEW else f"runs {group.ranges()}"
        on = f" on {', '.join(group.nodes()[:6])}" if group.kind in (why.NODE, why.NCCL) and group.nodes() else ""
        said.append(
            ("runs", f"{stages}: {_short(which)}{on}" + (f"; {group.blocked} blocked" if group.blocked else ""))
        )
        command, note = mend(group, words)
        said.append(("mend", " ".join(filter(None, [note, command]))))
    if len(found) > AT_MOST:
        said.append(("head", f"and {len(found) - AT_MOST} causes more: python launcher.py why --json"))
    return said


def _short(text: str) -> str:
    return text if len(text) <= 100 else text[:96].rpartition(",")[0] + ", ..."
