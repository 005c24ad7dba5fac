"""What a person should know of a study before filling it, a line each."""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from contract import rundir
from contract.settings import Settings
from contract.settings.checks import SettingsError
from launcher import environment
from launcher.plan import Plan, Run
from launcher.supervisor import read_settings, surroundings_of

SLACK_S = 60.0  # between the clocks of a node and of the file system
READ_ELSEWHERE = frozenset({"encoder", "oracle"})  # paths; the runs that they lead to are compared themselves


def of(plan: Plan) -> list[str]:
    assert plan.study is not None
    found = list(_renamed(plan))
    found += _edited(plan)
    found += _metrics(plan)
    found += _environments(plan)
    if len(plan.study.seeds) == 1:
        found.append(f"one seed ({plan.study.seeds[0]}): no interval, and no row can be shown to be better")
    imported = sum(_imported(run) for run in plan.runs if run.state == "reuse")
    if imported:
        found.append(f"{imported} finished run(s) were imported; table --cell says from where")
    return found


def _imported(run: Run) -> bool:
    try:
        return bool(rundir.read_run(run.folder).get("imported"))
    except rundir.RunDirError:
        return False


# -- keys that changed ------------------------------------------------------------------------------------------------


def _renamed(plan: Plan) -> Iterator[str]:
    """Why runs are new although the table had its cells full: the keys that say something else now."""
    path = plan.output_dir / "studies" / f"{plan.name}.json"
    if not path.exists():
        return
    runs = {run.identity: run for run in plan.runs}
    changed: Counter[str] = Counter()
    try:
        for old in rundir.read_json(path)["cells"]:
            now = {runs[i].settings.seed: runs[i] for i in plan.cells.get((old["row"], old["column"]), ())}
            for each in old["runs"]:
                run = now.get(each["seed"])
                folder = rundir.run_dir(plan.output_dir, str(each["worker"]), str(each["identity"]))
                if run is not None and run.identity != each["identity"] and run.state == "new":
                    changed.update(_changes(run, folder, runs, plan.output_dir))
    except (rundir.RunDirError, KeyError, TypeError) as error:
        yield f"{path}: unreadable ({error}); what changed since is not known"
        return
    for what, n in changed.most_common(8):
        yield f"new since the last fill or table, {n} cell run(s): {what}"


def _changes(run: Run, folder: Path, runs: Mapping[str, Run], output_dir: Path) -> list[str]:
    """``stage.key: old -> new``; where a run itself is the same, of what it is built upon."""
    try:
        old, parents = read_settings(folder), rundir.read_run(folder).get("parents") or ()
    except (rundir.RunDirError, SettingsError):
        return []
    found = [f"{run.stage}.{each}" for each in differences(old, run.settings)]
    if not found and parents and run.parents and run.parents[0] in runs:
        for parent in output_dir.glob(f"*/{parents[0]}"):
            return _changes(runs[run.parents[0]], parent, runs, output_dir)
    return found


def differences(old: Settings, new: Settings) -> list[str]:
    """``key: old -> new`` of what makes a result, the seed left out."""
    before, after = dict(leaves(old.science())), dict(leaves(new.science()))
    return [
        f"{key}: {_said(before, key)} -> {_said(after, key)}"
        for key in sorted({*before, *after})
        if key not in READ_ELSEWHERE | {"seed"} and before.get(key) != after.get(key)
    ]


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested keys as one, dotted."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _said(values: Mapping[str, Any], key: str) -> str:
    return str(values[key]) if key in values else "(not set)"


# -- run directories that a hand has changed --------------------------------------------------------------------------


def _edited(plan: Plan) -> Iterator[str]:
    """Finished runs whose config.yaml is newer than their result, and says something else than the study; results that
    are newer than the run."""
    later = []
    for run in plan.runs:
        if run.state not in ("reuse", "stale"):
            continue
        config, done = run.folder / rundir.CONFIG, run.folder / rundir.DONE
        try:
            ends = [float(r["time"]) for r in rundir.attempts(run.folder) if r.get("event") == "end"]
            if ends and done.stat().st_mtime > max(ends) + SLACK_S:
                later.append(done)
            if config.stat().st_mtime <= done.stat().st_mtime:
                continue
            changed = differences(read_settings(run.folder), run.settings)
        except (OSError, KeyError, ValueError, rundir.RunDirError, SettingsError) as error:
            yield f"{config}: {' '.join(str(error).split())[:200]}"
            continue
        if changed:
            yield f"{config}: changed by hand after the run ({changed[0]}); its result is not that of this file"
    if later:
        more = f" and {len(later) - 1} more" if len(later) > 1 else ""
        yield f"{later[0]}{more}: newer than the end of the run: changed by hand, or copied without its time"


# -- results that the table will not find -----------------------------------------------------------------------------


def _metrics(plan: Plan) -> Iterator[str]:
    assert plan.study is not None
    runs = {run.identity: run for run in plan.runs}
    read: dict[str, Mapping[str, Any]] = {}
    for name, column in plan.study.columns.items():
        there: set[str] = set()
        without = bad = 0
        for row in plan.study.rows:
            for identity in plan.cells[row, name]:
                run = runs[identity]
                if run.state not in ("reuse", "stale"):
                    continue
                if identity not in read:
                    read[identity] = _results(run.folder)
                value = read[identity].get(column.metric)
                if value is None:
                    without += 1
                    there |= read[identity].keys()
                elif isinstance(value, str) or not math.isfinite(value):
                    bad += 1
        if without:
            close = difflib.get_close_matches(column.metric, there, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            have = f"{hint}they have: {', '.join(sorted(there)) or 'none'}"
            yield f"column {name}: {without} finished run(s) have no metric {column.metric}; {have}"
        if bad:
            yield f"column {name}: {bad} finished run(s) have {column.metric}=NaN"


def _results(folder: Path) -> Mapping[str, Any]:
    try:
        found = rundir.read_json(folder / rundir.DONE).get("metrics")
    except rundir.RunDirError:
        return {}
    return found if isinstance(found, dict) else {}


# -- machines and packages --------------------------------------------------------------------------------------------


def _environments(plan: Plan) -> Iterator[str]:
    """Rows whose runs of a stage were made by different versions, GPUs or thread counts, or would be if the rest of
    them started here."""
    known: dict[str, Mapping[str, str]] = {}  # by hash: a thousand runs share a few
    mixed: dict[str, list[str]] = {}
    would: dict[str, list[str]] = {}
    for (row, stage), runs in _stages(plan).items():
        found = [(run, e) for run in runs if run.state in ("reuse", "stale") and (e := _made_in(run.folder, known))]
        counts = {key: Counter(e[key] for _, e in found if key in e) for _, each in found for key in each}
        for key, values in counts.items():
            if len(values) > 1:
                said = " | ".join(f"{value} ({n})" for value, n in sorted(values.items()))
                mixed.setdefault(f"{key} {said}", []).append(f"{row}, {stage}")
        todo = [run for run in runs if run.state in ("new", "failed") and run.settings.env.scheduler == "local"]
        if todo and found:
            here = environment.matters(surroundings_of(todo[0].settings))
            if todo[0].settings.env.threads is None:
                here.pop("threads", None)  # it depends on how many runs will go side by side
            for key, values in counts.items():
                if key in here and here[key] not in values:
                    had = " | ".join(values)
                    would.setdefault(f"{key} {had}; here it is {here[key]}", []).append(f"{row}, {stage}")
    for what, where in mixed.items():
        yield f"mixed in one cell: {what}: {_some(where)}"
    for what, where in would.items():
        yield f"a cell would mix: finished runs had {what}: {_some(where)}"


def _some(where: list[str]) -> str:
    return "; ".join(where[:2]) + (f" and {len(where) - 2} more" if len(where) > 2 else "")


def _stages(plan: Plan) -> dict[tuple[str, str], list[Run]]:
    """The runs of each row by stage, with those that they are built upon."""
    runs = {run.identity: run for run in plan.runs}
    found: dict[tuple[str, str], dict[str, Run]] = {}
    for (row, _), identities in plan.cells.items():
        todo = list(identities)
        while todo:
            run = runs.get(todo.pop())
            if run is not None and run.identity not in (there := found.setdefault((row, run.stage), {})):
                there[run.identity] = run
                todo += run.parents
    return {key: list(each.values()) for key, each in found.items()}


def _made_in(folder: Path, known: dict[str, Mapping[str, str]]) -> Mapping[str, str] | None:
    names = list(folder.glob("environment.*.json"))
    if len(names) == 1 and names[0].name in known:
        return known[names[0].name]
    found = rundir.environment(folder)
    if found is None:
        return None
    name, content = found
    return known.setdefault(f"environment.{name}.json", environment.matters(content))
