"""The launcher's hand in the run directories: makes them, finds them again, takes them out of use."""

from __future__ import annotations

import contextlib
import re
import socket
import sys
import time
import uuid
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

import yaml

import contract.settings
from contract import rundir
from contract.settings import Settings
from contract.settings.checks import SettingsError
from launcher import NotFound, breaker, why
from launcher.identity import Input, find_encoder, takes_encoder
from launcher.manifest import SUBMISSIONS
from launcher.plan import Plan, Queued, Run, build, with_queue
from launcher.supervisor import read_settings

STUDIES, REPLACED = "studies", "replaced"
PLANNED = time.time()  # what is newer was made by others, after this process looked


# -- making -----------------------------------------------------------------------------------------------------------


def prepare(
    run: Run, capsule: Path, commit: str | None, study: str | None, more: Mapping[str, Any] = MappingProxyType({})
) -> None:
    """The directory of one run, ready for its supervisor. Raises RunDirError for one of another configuration."""
    run.folder.mkdir(parents=True, exist_ok=True)
    if not rundir.write_once(run.folder / rundir.CONFIG, to_yaml(run.settings)):
        _go_on(run)
    if rundir.owner_alive(run.folder):
        return  # another launcher was faster; its supervisor reads these files now
    link = run.folder / f".{rundir.CAPSULE}.{uuid.uuid4().hex[:8]}"
    link.symlink_to(Path("..") / ".." / "capsules" / capsule.name)
    link.replace(run.folder / rundir.CAPSULE)
    described = {
        "schema": rundir.SCHEMA,
        "identity": run.identity,
        "group": run.group,
        "name": run.name,
        "worker": run.settings.worker,
        "stage": run.stage,
        "seed": run.settings.seed,
        "parents": list(run.parents),
        "processes": run.processes,
        "code": {"hash": run.code.hash, "files": dict(run.code.files)},
        "commit": commit,
        "capsule": capsule.name,
        "submitted": time.time(),
        **more,
    }
    rundir.write_json(run.folder / rundir.RUN, described | ({"study": study} if study else {}), sync=False)


def _go_on(run: Run) -> None:
    """A directory that exists already: the science must be the same; where and how to run it may be told anew."""
    old = read_settings(run.folder)
    if _science(old) != _science(run.settings):
        raise rundir.RunDirError(
            f"{run.folder / rundir.CONFIG}: is of another configuration than {run.identity}; move the directory away"
        )
    if (run.folder / rundir.CHECKPOINT).exists():  # as many threads as it began with, or its bits change
        for key in {"threads", "max_parallel"} - {k.removeprefix("env.") for k in run.explicit}:
            setattr(run.settings.env, key, getattr(old.env, key))
    if run.settings != old and not rundir.owner_alive(run.folder):
        rundir.write_atomic(run.folder / rundir.CONFIG, to_yaml(run.settings))


def _science(settings: Settings) -> dict[str, Any]:
    return {k: v for k, v in settings.science().items() if k not in ("encoder", "oracle")}  # paths, which may move


def to_yaml(settings: Settings) -> str:
    return "".join(_entry(key, repr(value), value) for key, value in contract.settings.plain(settings).items())


_entries: dict[tuple[str, str], str] = {}  # the runs of a sweep have nearly all entries in common


def _entry(key: str, what: str, value: Any) -> str:
    if (key, what) not in _entries:
        dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
        _entries[key, what] = str(yaml.dump({key: value}, Dumper=dumper, sort_keys=False, allow_unicode=True))
    return _entries[key, what]


def set_aside(run: Run) -> None:
    """A finished run makes room for a new one under the same identity; nothing is deleted."""
    done = run.folder / rundir.DONE
    if rundir.owner_alive(run.folder) or not done.exists() or done.stat().st_mtime > PLANNED:
        return  # another launcher was faster
    place = Path(run.settings.output_dir) / REPLACED / time.strftime("%Y%m%d-%H%M%S") / run.settings.worker
    place.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        run.folder.rename(place / f"{run.identity}-{uuid.uuid4().hex[:4]}")


def allow(folder: Path) -> None:
    """Take back ``stop`` and ``cancel``."""
    for name in (rundir.STOP, rundir.CANCELLED):
        (folder / name).unlink(missing_ok=True)


@dataclass(frozen=True, kw_only=True)
class Submission:
    """Runs that are ready to start, parents before children, and where that is written down."""

    name: str
    output_dir: Path
    capsule: Path
    runs: tuple[Run, ...]
    folder: Path  # what this launch writes about itself
    slots: int = 1  # how many side by side
    fresh: frozenset[str] = frozenset()  # the identities that had no directory before
    queue: Mapping[str, Queued] = field(default_factory=dict)  # what is queued already
    canary: tuple[str, ...] = ()  # the identities that must end well before all others start


def write(submission: Submission, plan: Plan, commit: str | None) -> None:
    """Everything on the disk that the runs need to be started, and a manifest of the whole plan."""
    study = plan.name if plan.study else None
    mine = {"submission": submission.folder.name}
    for run in submission.runs:
        if run.state in ("stale", "reuse"):
            set_aside(run)
        if not run.runs_here:
            waits = submission.canary and run.identity not in submission.canary
            prepare(run, submission.capsule, commit, study, mine | ({"canary": submission.canary} if waits else {}))
    rundir.sync_all(submission.output_dir)
    started = {r.identity for r in submission.runs}
    manifest = {
        "schema": rundir.SCHEMA,
        "name": plan.name,
        "study": study,
        "time": time.time(),
        "host": socket.gethostname(),
        "command": sys.argv[1:],
        "capsule": submission.capsule.name,
        "commit": commit,
        "canary": list(submission.canary),
        "runs": [{"index": i, **r.line(), "started": r.identity in started} for i, r in enumerate(plan.runs)],
    }
    submission.folder.mkdir(parents=True)
    rundir.write_json(submission.folder / "manifest.json", manifest)


def new_folder(output_dir: Path, name: str) -> Path:
    """A name that no other launch takes; it is not made here."""
    slug = re.sub(r"[^\w.-]+", "-", name).strip("-.")[:60] or "launch"
    return output_dir / SUBMISSIONS / f"{time.strftime('%Y%m%d-%H%M%S')}-{slug}-{uuid.uuid4().hex[:4]}"


def write_study(plan: Plan) -> Path:
    path = plan.output_dir / STUDIES / f"{plan.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    rundir.write_json(path, plan.manifest())
    return path


# -- finding ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """A run directory, as its files describe it."""

    folder: Path
    info: Mapping[str, Any]
    state: str  # of the files and the queue
    index: int = 0  # within the names of the selection

    @property
    def identity(self) -> str:
        return str(self.info["identity"])


STATES = (*get_args(rundir.State), "queued", "blocked", "held")


def select(words: Iterable[str], output_dir: Path, queue: Mapping[str, Queued] | None = None) -> list[Found]:
    """SELECTION: any of the names (of a study, a sweep, a worker, the beginning of an identity), narrowed down by index
    ranges (``0,4-7``, counted within the names), ``:state`` and ``key=value``. ``NAME:state`` works too, and
    ``why=KIND`` or ``why=MARK`` for runs that failed so."""
    names: list[str] = []
    ranges: list[str] = []
    states: list[str] = []
    keys: list[tuple[str, str]] = []
    for word in words:
        if "=" in word:
            key, _, value = word.partition("=")
            keys.append((key, value))
        elif re.fullmatch(r"\d{1,3}|\d+([-,]\d+)+", word):
            ranges.append(word)
        else:
            name, colon, state = word.partition(":")
            names += [name] if name else []
            states += [state] if colon else []
    for state in states:
        if state not in STATES:
            raise SettingsError(contract.settings.unknown("state", state, STATES))
    for value in [value for key, value in keys if key == "why"]:
        if value not in why.KINDS and not re.fullmatch(r"[0-9a-f]{8}", value):
            raise SettingsError(contract.settings.unknown("why", value, why.KINDS))
    wanted = _indices(ranges)
    found = []
    held = breaker.held(output_dir)
    for i, folder in enumerate(_named(names, output_dir)):
        if ranges and i not in wanted:
            continue
        try:
            info = rundir.read_run(folder)
            found.append(Found(folder, info, _state(folder, info, queue or {}, held), i))
        except rundir.RunDirError as error:  # one damaged run hides no other
            print(f"error: {error}", file=sys.stderr)
    found = [f for f in found if not states or f.state in states]
    return [f for f in found if all(_matches(f, k, v, output_dir) for k, v in keys)]


def _state(folder: Path, info: Mapping[str, Any], queue: Mapping[str, Queued], held: Container[tuple[Any, Any]]) -> str:
    state = with_queue(rundir.state(folder), queue.get(str(info["identity"])))
    if state in ("waiting", "queued", "stopped") and (info.get("submission"), info.get("stage")) in held:
        return "held"
    if state == "waiting":  # for ever, where what it needs has come to an end
        for parent in (*info.get("parents", ()), *info.get("canary", ())):
            for at in folder.parent.parent.glob(f"*/{parent}"):
                if with_queue(rundir.state(at), queue.get(str(parent))) in ("failed", "cancelled"):
                    return "blocked"
    return state


def _named(names: Sequence[str], output_dir: Path) -> Iterator[Path]:
    every = {folder.name: folder for folder in rundir.find_runs(output_dir)}
    if not names:
        yield from every.values()
        return
    seen: set[str] = set()
    for name in names:
        identities = list(_listed(name, output_dir))
        identities += [i for i, f in every.items() if f.parent.name == name or (len(name) >= 4 and i.startswith(name))]
        if not identities:
            raise NotFound(f"{name}: no study, sweep, worker or run of this name in {output_dir}")
        for identity in identities:
            if identity in every and identity not in seen:
                seen.add(identity)
                yield every[identity]


def _listed(name: str, output_dir: Path) -> Iterator[str]:
    """The identities that the study, and every submission, of this name lists."""
    for path in output_dir.glob(f"{STUDIES}/*.json"):
        if path.stem == name:
            yield from rundir.read_json(path)["identities"]
    for path in sorted(output_dir.glob(f"{SUBMISSIONS}/*/manifest.json")):
        manifest = rundir.read_json(path)
        if name in (manifest.get("name"), path.parent.name):
            yield from (str(run["identity"]) for run in manifest["runs"])


def _indices(ranges: Sequence[str]) -> set[int]:
    wanted: set[int] = set()
    for part in ",".join(ranges).split(",") if ranges else ():
        low, _, high = part.partition("-")
        wanted |= set(range(int(low), int(high or low) + 1))
    return wanted


def _matches(found: Found, key: str, value: str, output_dir: Path) -> bool:
    """``seed=0``, ``tau=0.1``, ``data.name=digits``; numbers are compared as numbers."""
    if key == "why":
        cause = why.of_run(found.folder, output_dir) if found.state != "finished" else None
        return cause is not None and value in (cause.kind, cause.mark)
    at: Any = contract.settings.plain(read_settings(found.folder))
    for part in key.split("."):
        if not isinstance(at, dict) or part not in at:
            return False
        at = at[part]
    return bool(at == yaml.safe_load(value)) or str(at) == value


def again(
    found: Iterable[Found],
    output_dir: Path,
    change: Callable[[Settings], Settings] | None = None,
    said: frozenset[str] = frozenset(),
) -> list[Run]:
    """Runs as they were launched, from their own files, parents before children; with ``change``, in settings that no
    result depends on, of which ``said`` are the keys. Raises RunDirError for one whose settings mean another run."""
    runs = []
    for each in found:
        settings = read_settings(each.folder)
        settings = change(settings) if change else settings
        settings.output_dir = str(output_dir)  # where it is, wherever it was made
        source = _source(each, settings, output_dir) if takes_encoder(settings.worker) else None
        run = build(settings, source, str(each.info.get("stage")), said)
        if run.identity != each.identity:
            now = "with this change" if change else "today"
            raise rundir.RunDirError(f"{each.folder}: its settings mean run {run.identity} {now}; launch that one anew")
        runs.append(run)
    return sorted(runs, key=lambda r: len(r.parents))


def _source(each: Found, settings: Settings, output_dir: Path) -> Input:
    parents = [str(p) for p in each.info.get("parents", ())]
    for identity in parents:
        for parent in output_dir.glob(f"*/{identity}"):
            setattr(settings, "encoder", str(parent))  # noqa: B010  # not all settings have one
            group = str(rundir.read_run(parent)["group"])
            return Input(path=str(parent), identity=identity, group=group, parents=tuple(parents))
        raise rundir.RunDirError(f"{each.folder / rundir.RUN}: its parent {identity} is not in {output_dir}")
    return find_encoder(str(getattr(settings, "encoder")), output_dir)  # noqa: B009
