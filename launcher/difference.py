"""``diff A B``: what is not the same in two runs: settings, code, data, parents, environment, results."""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from contract import cost, rundir
from contract.settings import NOT_SCIENCE
from launcher import environment, identity, remarks, show
from launcher.rundirs import Found
from launcher.supervisor import read_settings

NONE = "(not set)"
PATHS = ("encoder", "oracle")  # of runs; which ones these are is said under *built upon*
SHOWN = 12  # packages that changed; --json has all

Pair = tuple[Any, Any]


def difference(a: Found, b: Found, args: argparse.Namespace) -> int:
    found = of(a, b, patches=args.code)
    if args.json:
        print(json.dumps(found, ensure_ascii=False))
    else:
        _show(show.console(args.no_color), found, a, b)
    return 0


def of(a: Found, b: Found, patches: bool = False) -> dict[str, Any]:
    """All of it as plain data, for ``--json``; these keys stay. Where something is known of one run only, or of none,
    its section is null."""
    one, two = _config(a.folder), _config(b.folder)
    changed = {key: pair for key, pair in _pairs(one, two).items() if key not in PATHS or not _runs(pair)}
    return {
        "runs": [_about(each) for each in (a, b)],
        "same_identity": a.identity == b.identity,
        "science": {key: pair for key, pair in changed.items() if not _not_science(key)},
        "settings": {key: pair for key, pair in changed.items() if _not_science(key)},
        "code": _code(a, b, patches),
        "data": _data(a, b),
        "parents": _parents(a, b),
        "environment": _environment(a.folder, b.folder),
        "results": _results(a.folder, b.folder),
    }


def _about(run: Found) -> dict[str, Any]:
    info = {key: run.info.get(key) for key in ("identity", "name", "worker", "stage", "seed", "commit", "capsule")}
    return {**info, "state": run.state, "dir": str(run.folder)}


# -- settings ---------------------------------------------------------------------------------------------------------


def _config(folder: Path) -> dict[str, Any]:
    path = folder / rundir.CONFIG
    try:
        said = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise rundir.RunDirError(f"{path}: unreadable ({' '.join(str(error).split())})") from None
    return dict(remarks.leaves(said)) if isinstance(said, Mapping) else {}


def _pairs(one: Mapping[str, Any], two: Mapping[str, Any]) -> dict[str, Pair]:
    return {
        key: (one.get(key, NONE), two.get(key, NONE))
        for key in sorted({*one, *two})
        if one.get(key, NONE) != two.get(key, NONE)
    }


def _not_science(key: str) -> bool:
    return any(key == each or key.startswith(f"{each}.") for each in NOT_SCIENCE)


def _runs(pair: Pair) -> bool:
    """Two run directories."""
    return all(isinstance(each, str) and (Path(each) / rundir.RUN).exists() for each in pair)


# -- code -------------------------------------------------------------------------------------------------------------


def _code(a: Found, b: Found, patches: bool) -> dict[str, Any] | None:
    """The files that the workers run, by what they say without comments; ``patches``: as they are in the capsules."""
    hashes = [dict((each.info.get("code") or {}).get("files") or {}) for each in (a, b)]
    if not all(hashes):
        return None
    one, two = hashes
    changed = sorted(path for path in one.keys() & two.keys() if one[path] != two[path])
    found: dict[str, Any] = {"changed": changed, "only_a": sorted(one.keys() - two), "only_b": sorted(two.keys() - one)}
    if patches:
        every = sorted({*changed, *found["only_a"], *found["only_b"]})
        places = [(each.folder / rundir.CAPSULE).resolve() for each in (a, b)]
        gone = [str(place) for place in places if not place.is_dir()]
        found["gone"] = gone
        found["patch"] = "" if gone else "".join(_patch(places[0], places[1], path) for path in every)
    return found


def _patch(one: Path, two: Path, path: str) -> str:
    before, after = (
        (each / path).read_text().splitlines(True) if (each / path).exists() else [] for each in (one, two)
    )
    return "".join(difflib.unified_diff(before, after, f"a/{path}", f"b/{path}"))


# -- data, parents, environment, results ------------------------------------------------------------------------------


def _data(a: Found, b: Found) -> dict[str, Any]:
    """As declared, or as the class folders are named now."""
    prints = []
    for each in (a, b):
        settings = read_settings(each.folder)
        said = identity.fingerprint(settings)
        prints.append(f"{settings.data.name} {said}" if said else settings.data.name)
    return {"a": prints[0], "b": prints[1], "same": prints[0] == prints[1]}


def _parents(a: Found, b: Found) -> dict[str, Any]:
    one, two = (list(map(str, each.info.get("parents") or ())) for each in (a, b))
    return {"a": one, "b": two, "same": one == two}


def _environment(a: Path, b: Path) -> dict[str, Pair] | None:
    one, two = rundir.environment(a), rundir.environment(b)
    if one is None or two is None:
        return None
    return {what: (old, new) for what, old, new in environment.differences(one[1], two[1])}


def _results(a: Path, b: Path) -> dict[str, Pair]:
    """All final values of both, the equal ones too, and what the runs cost."""
    found: list[dict[str, Any]] = []
    for folder in (a, b):
        try:
            metrics = rundir.read_json(folder / rundir.DONE).get("metrics")
        except rundir.RunDirError:
            metrics = None
        found.append(metrics if isinstance(metrics, dict) else {})
    one, two = found
    results: dict[str, Pair] = {key: (one.get(key), two.get(key)) for key in dict.fromkeys((*one, *two))}
    results["hours"] = (round(_cost(a).hours, 6), round(_cost(b).hours, 6))
    return results


def _cost(folder: Path) -> cost.Cost:
    return cost.of(folder, int(rundir.read_run(folder).get("processes") or 1))


# -- the screen -------------------------------------------------------------------------------------------------------


def _show(out: Console, found: Mapping[str, Any], a: Found, b: Found) -> None:
    for letter, each in zip("AB", found["runs"], strict=True):
        commit = f", commit {str(each['commit'])[:12]}" if each["commit"] else ""
        name = f"{each['name']} {each['identity']}  {each['stage']} seed={each['seed']} {each['state']}{commit}"
        out.print(f"{letter}  {show.plain(name)}  {show.plain(show.short(Path(each['dir'])))}")
    rows: list[tuple[str, str, Any, Any]] = []
    for section, pairs in (("config, science", found["science"]), ("config, other", found["settings"])):
        rows += [(section, key, *pair) for key, pair in pairs.items() if _same_worker(found) or NONE not in pair]
    data, parents, code = found["data"], found["parents"], found["code"]
    rows += [] if data["same"] else [("data", "fingerprint", data["a"], data["b"])]
    if not parents["same"]:
        rows.append(("built upon", "", ", ".join(parents["a"]) or "none", ", ".join(parents["b"]) or "none"))
    if code is not None:
        rows += [("code", path, "", "differs") for path in code["changed"]]
        rows += [("code", path, "there", "not there") for path in code["only_a"]]
        rows += [("code", path, "not there", "there") for path in code["only_b"]]
    around = list((found["environment"] or {}).items())
    rows += [("environment", key, *pair) for key, pair in around[:SHOWN]]
    if len(around) > SHOWN:
        rows.append(("environment", f"and {len(around) - SHOWN} more", "", "--json"))
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("", "", "A", "B"):
        table.add_column(name, overflow="fold")
    before = ""
    for section, key, one, two in rows:
        table.add_row(section if section != before else "", *map(show.plain, (key, _said(one), _said(two))))
        before = section
    if rows:
        out.print(table)
    for line in _remarks(found):
        out.print(show.plain(line))
    results = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("results", "A", "B", "B - A"):
        results.add_column(name, justify="left" if name == "results" else "right")
    for key, (one, two) in found["results"].items():
        numbers = isinstance(one, (int, float)) and isinstance(two, (int, float))
        results.add_row(
            *map(
                show.plain,
                (key, *("" if v is None else _said(v) for v in (one, two)), f"{two - one:+.4g}" if numbers else ""),
            )
        )
    out.print(results)
    if code and code.get("patch"):
        out.print(code["patch"], end="")


def _same_worker(found: Mapping[str, Any]) -> bool:
    one, two = (run["worker"] for run in found["runs"])
    return bool(one == two)


def _remarks(found: Mapping[str, Any]) -> Iterator[str]:
    """What is the same, and what is not known."""
    code, data, parents = found["code"], found["data"], found["parents"]
    same = ["config"] if not found["science"] and not found["settings"] else []
    same += ["code"] if code and not any(code[key] for key in ("changed", "only_a", "only_b")) else []
    same += ["data"] if data["same"] else []
    same += ["what they are built upon"] if parents["same"] and parents["a"] else []
    same += ["environment"] if found["environment"] == {} else []
    if same:
        yield f"the same: {', '.join(same)}"
    unknown = ["code"] if code is None else []
    unknown += ["environment"] if found["environment"] is None else []
    if not _same_worker(found):
        one, two = (run["worker"] for run in found["runs"])
        yield f"keys that only {one} or {two} has are left out; --json has them"
    if unknown:
        yield f"not recorded in both: {', '.join(unknown)}"
    if code and any(code[key] for key in ("changed", "only_a", "only_b")):
        if code.get("gone"):
            yield f"no lines to show: {', '.join(code['gone'])} is gone"
        elif "patch" not in code:
            yield "--code shows the lines"
    if not parents["same"] and len(parents["a"]) == len(parents["b"]) == 1:
        yield f"next: python launcher.py diff {parents['a'][0]} {parents['b'][0]}"


def _said(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return "null" if value is None else str(value)
