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
from launcher.plan import Plan, Run
from launcher.supervisor import read_settings

SLACK_S = 60.0  # between the clocks of a node and of the file system
READ_ELSEWHERE = frozenset({"encoder", "oracle"})  # paths; the runs that they lead to are compared themselves


def of(plan: Plan) -> list[str]:
    assert plan.study is not None
    found = list(_renamed(plan))
    found += _edited(plan)
    found += _metrics(plan)
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
    before, after = dict(_leaves(old.science(), "")), dict(_leaves(new.science(), ""))
    return [
        f"{key}: {_said(before, key)} -> {_said(after, key)}"
        for key in sorted({*before, *after})
        if key not in READ_ELSEWHERE | {"seed"} and before.get(key) != after.get(key)
    ]


def _leaves(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
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
