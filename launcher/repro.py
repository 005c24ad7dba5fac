"""``repro RUN``: the same run again, from its own code and settings, in a folder of its own; are its numbers the same?

The supervisor and the worker are those of the run's capsule, its settings those of its ``config.yaml``; only where it
writes, and where what it is built upon lies today, is told anew. The run itself is never touched.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from contract import rundir
from contract.settings.checks import SettingsError
from launcher import Refused, capsule, environment, show
from launcher.backends.local import supervise
from launcher.plan import absolute, visible_gpus
from launcher.rundirs import Found
from launcher.supervisor import POLL_S, read_settings, surroundings_of

REPRODUCED, DIFFERS = 0, 100
FOLDER = "repro"  # below the output folder, unless said otherwise
ABOUT = frozenset({"step", "of", "time"})  # what a line of the journal says besides its values
READ = ("encoder", "oracle")  # the settings that may name another run


@dataclass
class Comparison:
    """Two journals, value by value."""

    steps: list[int] = field(default_factory=list)
    values: int = 0
    missing: list[str] = field(default_factory=list)  # what one of the two does not have
    worst: tuple[float, str, float, float] | None = None  # relative difference, where, before, now

    def add(self, where: str, before: float, now: float) -> None:
        self.values += 1
        if before == now or (math.isnan(before) and math.isnan(now)):
            return
        size = abs(before - now) / max(abs(before), abs(now))
        size = size if math.isfinite(size) else math.inf
        if self.worst is None or size > self.worst[0]:
            self.worst = (size, where, before, now)

    def within(self, tolerance: float) -> bool:
        return not self.missing and self.values > 0 and (self.worst is None or self.worst[0] <= tolerance)


def repro(found: Found, output_dir: Path, args: argparse.Namespace) -> int:
    """Raises RunDirError or Refused where the run cannot be made again here; each says what is missing."""
    out = show.console(args.no_color, stderr=args.json)
    recorded = rundir.environment(found.folder)
    values = _settings(found, output_dir, args, recorded[1] if recorded else {})
    wanted, until = _wanted(found, args.steps)
    code = _code(found)
    into = _folder(found, output_dir, args.into)

    out.print(f"{found.info.get('name')} {found.identity} seed={found.info['seed']}, capsule {code.name}")
    changes = _changes(found, recorded)
    for line in changes if isinstance(changes, list) else [changes]:
        out.print(f"environment: {show.plain(line)}")
    if isinstance(changes, list) and not changes:
        out.print("environment: as it was")
    folder = _prepare(found, values, code, into, output_dir)
    try:
        _run(folder, code, until, show.Watch(1, args.no_color, args.quiet or args.json))
    except BaseException:  # Ctrl-C, mostly
        shutil.rmtree(into, ignore_errors=True)
        raise
    made = _compared(found.folder, folder, wanted, until)
    if made.missing and rundir.state(folder) == "failed":
        raise rundir.RunDirError(f"{folder / rundir.LOG}: it failed this time: {show.last_words(folder)}")
    good = made.within(args.tolerance)
    if good and not args.keep:
        shutil.rmtree(into)
    if args.json:
        print(json.dumps(_described(found, made, changes, None if good and not args.keep else folder, good)))
    else:
        out.print(show.plain(_verdict(made, args.tolerance, good)))
        if not good or args.keep:
            out.print(f"made in {show.plain(show.short(folder))}; delete it when you have seen enough")
    return REPRODUCED if good else DIFFERS


# -- what there is to go by -------------------------------------------------------------------------------------------


def _code(found: Found) -> Path:
    folder = (found.folder / rundir.CAPSULE).resolve()
    commit = found.info.get("commit")
    if not folder.is_dir():
        hint = f"; its commit was {commit}: check that out and launch the run again" if commit else ""
        raise rundir.RunDirError(f"{folder}: gone, and with it the code of {found.identity}{hint}")
    if (now := capsule.hash_of(folder)) != folder.name:
        raise Refused(f"{folder}: changed since it was made (it hashes to {now}); it is not the code that ran")
    return folder


def _settings(found: Found, output_dir: Path, args: argparse.Namespace, recorded: Mapping[str, Any]) -> dict[str, Any]:
    """The run's settings as plain data (its code may be older than ours), less the scheduler, plus today's places."""
    if source := found.info.get("imported"):
        raise Refused(f"{found.identity}: was imported ({source}); no run of ours made it")
    read_settings(found.folder)  # one line for a damaged file
    values: dict[str, Any] = yaml.safe_load((found.folder / rundir.CONFIG).read_text())
    env = values["env"] = dict(values.get("env") or {})
    processes = int(found.info.get("processes") or 1)
    if gpus := int(env.get("ngpu") or 0) * int(env.get("nodes") or 1):
        have = len(visible_gpus())
        if 0 < have < min(gpus, processes):
            raise Refused(f"{found.identity}: ran on {gpus} GPUs; here are {have}")
        gpus = min(gpus, have)
    env |= {"scheduler": "local", "slurm": False, "lsf": False, "nodes": 1, "nproc": processes, "ngpu": gpus}
    env["threads"] = recorded.get("threads") or env.get("threads")  # other counts, other sums
    if args.data_path:
        values["data_path"] = absolute(args.data_path)
    if (where := values.get("data_path")) and not Path(where).is_dir():
        raise SettingsError(f"data_path={where}: no such folder here; --data-path FOLDER says where the data is now")
    parents = [str(each) for each in found.info.get("parents", ())]
    for key in READ:
        named = values.get(key)
        if isinstance(named, str) and Path(named).name in parents:
            values[key] = str(_parent(found, Path(named).name, output_dir))
        elif isinstance(named, str) and named.startswith("/") and not Path(named).exists():
            raise rundir.RunDirError(f"{named}: gone; {found.identity} reads it as its {key}")
    return values


def _parent(found: Found, identity: str, output_dir: Path) -> Path:
    for folder in output_dir.glob(f"*/{identity}"):
        if not (folder / rundir.ENCODER).exists():
            raise rundir.RunDirError(
                f"{folder / rundir.ENCODER}: gone; {found.identity} is built upon it; python launcher.py repro "
                f"{identity} can make that run again, in part; launched anew it makes all of it"
            )
        return folder
    raise rundir.RunDirError(f"{found.identity}: is built upon {identity}, which is not in {output_dir}")


def _wanted(found: Found, steps: int) -> tuple[list[dict[str, Any]], int | None]:
    """The lines of its journal up to ``steps``, or to the first after that where it logged more rarely; and the last
    step among them, None where that is its end, so that its results are compared too."""
    records = [r for r in rundir.read_journal(found.folder / rundir.METRICS)[0] if isinstance(r.get("step"), int)]
    if not records and found.state != "finished":
        raise rundir.RunDirError(f"{found.folder / rundir.METRICS}: empty: there is nothing to compare with")
    until = next((int(r["step"]) for r in records if r["step"] >= steps), None)
    if until is None or (found.state == "finished" and until == records[-1]["step"]):
        if found.state == "finished":
            return records, None
        until = int(records[-1]["step"])
    return [r for r in records if r["step"] <= until], until


def _changes(found: Found, recorded: tuple[str, dict[str, Any]] | None) -> list[str] | str:
    if recorded is None:
        return "not known; the run is older than its record"
    settings = read_settings(found.folder)
    settings.env.container = None  # we are not in it
    settings.env.threads = recorded[1].get("threads") or settings.env.threads
    settings.env.ngpu = settings.env.ngpu and min(settings.env.ngpu, len(visible_gpus()))
    changed = environment.differences(recorded[1], surroundings_of(settings))
    return [f"{what}: {old} -> {new}" for what, old, new in changed]


# -- again ------------------------------------------------------------------------------------------------------------


def _folder(found: Found, output_dir: Path, into: str | None) -> Path:
    if into is None:
        return output_dir / FOLDER / f"{found.identity}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    place = Path(absolute(into))
    if place.exists() and any(place.iterdir()):
        raise SettingsError(f"--into {place}: not empty; say a new folder")
    return place


def _prepare(found: Found, values: dict[str, Any], code: Path, into: Path, output_dir: Path) -> Path:
    """A run directory in an output folder of its own, with links to the code and to the finished parents."""
    folder = rundir.run_dir(into, found.folder.parent.name, found.identity)
    folder.mkdir(parents=True)
    values["output_dir"] = str(into)
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    rundir.write_atomic(folder / rundir.CONFIG, text, sync=False)
    (folder / rundir.CAPSULE).symlink_to(code)
    rundir.write_json(folder / rundir.RUN, {**found.info, "submitted": time.time()}, sync=False)
    for parent in found.info.get("parents", ()):
        for there in output_dir.glob(f"*/{parent}"):
            link = rundir.run_dir(into, there.parent.name, there.name)
            link.parent.mkdir(exist_ok=True)
            link.symlink_to(there.resolve())
    return folder


def _run(folder: Path, code: Path, until: int | None, watch: show.Watch) -> None:
    """Until ``until`` steps are written down (None: the end); then it is asked to stop. Ctrl-C asks, too."""
    words = supervise(folder, "--parent", str(os.getpid()))
    env = {**os.environ, "PYTHONPATH": str(code), "PYTHONDONTWRITEBYTECODE": "1"}
    name = f"{rundir.read_run(folder).get('name')} {folder.name[:8]} again"
    with watch, subprocess.Popen(words, cwd=code, env=env, stdin=subprocess.DEVNULL, start_new_session=True) as process:
        watch.started(folder, name)
        try:
            while process.poll() is None:
                record = rundir.last_record(folder / rundir.METRICS) or {}
                if until is not None and int(record.get("step") or 0) >= until:
                    (folder / rundir.STOP).touch()
                watch.moved(folder, name)
                time.sleep(POLL_S)
        except BaseException:
            process.terminate()
            process.wait()
            raise


# -- the same? --------------------------------------------------------------------------------------------------------


def _compared(old: Path, new: Path, wanted: Sequence[Mapping[str, Any]], until: int | None) -> Comparison:
    made = Comparison()
    before, now = dict(_values(wanted)), dict(_values(rundir.read_journal(new / rundir.METRICS)[0]))
    if until is None:
        before |= _results(old)
        now |= _results(new)
    for key, value in before.items():
        if key in now:
            made.add(f"{key[1]} at step {key[0]}" if key[0] is not None else f"the result {key[1]}", value, now[key])
        else:
            made.missing.append(f"{key[1]} at step {key[0]}" if key[0] is not None else f"the result {key[1]}")
    made.steps = sorted({step for step, _ in before if step is not None})
    return made


Key = tuple[int | None, str]
"""A step, None for a result, and a metric."""


def _values(records: Sequence[Mapping[str, Any]]) -> Iterator[tuple[Key, float]]:
    for record in records:
        for name, value in record.items():
            if name not in ABOUT and (number := _number(value)) is not None:
                yield (int(record["step"]), name), number


def _results(folder: Path) -> dict[Key, float]:
    if not (folder / rundir.DONE).exists():
        return {}
    metrics = rundir.read_json(folder / rundir.DONE).get("metrics") or {}
    return {(None, str(name)): number for name, value in metrics.items() if (number := _number(value)) is not None}


def _number(value: Any) -> float | None:
    """The journal spells NaN and the infinities as text."""
    if isinstance(value, (int, float)):
        return float(value)
    return float(value) if value in ("nan", "inf", "-inf") else None


def _verdict(made: Comparison, tolerance: float, good: bool) -> str:
    where = f" up to step {made.steps[-1]}" if made.steps else ""
    if made.missing:
        return f"not reproduced: {len(made.missing)} values did not come again, first {made.missing[0]}"
    if made.worst is None:
        return f"reproduced: all {made.values} values{where} are the same to the last bit"
    size, at, before, now = made.worst
    said = f"the largest relative difference is {size:.3g}, {at}: {before!r} -> {now!r}"
    if good:
        return f"reproduced within {tolerance:g}: {made.values} values{where}; {said}"
    return f"not reproduced: {said}" + ("" if tolerance else "; --tolerance X accepts what is below X")


def _described(
    found: Found, made: Comparison, changes: list[str] | str, folder: Path | None, good: bool
) -> dict[str, Any]:
    """For ``--json``; these keys stay."""
    worst = dict(zip(("relative", "where", "before", "now"), made.worst, strict=True)) if made.worst else None
    return {
        "identity": found.identity,
        "reproduced": good,
        "identical": made.worst is None and not made.missing,
        "values": made.values,
        "steps": made.steps,
        "missing": made.missing,
        "largest": worst,
        "environment": changes if isinstance(changes, list) else None,
        "dir": str(folder) if folder else None,
    }
