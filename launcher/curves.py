"""Two runs of the same identity, compared by what they wrote down: where do they differ first, and by how much?"""

from __future__ import annotations

import filecmp
import itertools
import math
from pathlib import Path
from typing import Any

from contract import rundir

Lines = list[tuple[str, dict[str, Any]]]  # where each stands, and what it says


def written(folder: Path) -> Lines:
    """The lines of its journal, and the metrics at the end, without the times; each with its name."""
    lines, _ = rundir.read_journal(folder / rundir.METRICS)
    named = [(f"{rundir.METRICS}:{number}", line) for number, line in enumerate(lines, 1)]
    done = rundir.read_json(folder / rundir.DONE)
    named.append((rundir.DONE, {"step": done.get("steps"), **(done.get("metrics") or {})}))
    return [(name, {key: value for key, value in line.items() if key != "time"}) for name, line in named]


def compare(calm: Lines, other: Lines) -> tuple[dict[str, float], str]:
    """(the largest relative difference of every metric that differs, what differs first). A line or a metric that only
    one of them has, or another step, is an infinite difference."""
    worst: dict[str, float] = {}
    first = ""
    for here, there in itertools.zip_longest(calm, other):
        name = (here or there)[0]
        one, two = (each[1] if each else {} for each in (here, there))
        for key in {**one, **two}:
            if (distance := _distance(key, one.get(key), two.get(key))) > 0:
                worst[key] = max(worst.get(key, 0.0), distance)
                place = f"{name}, step {one.get('step', two.get('step'))}"
                first = first or f"{place}: {key} {one.get(key)} undisturbed, {two.get(key)} here"
    return worst, first


def _distance(key: str, one: Any, two: Any) -> float:
    if one == two:
        return 0.0
    if key in ("step", "of") or not all(isinstance(each, (int, float)) for each in (one, two)):
        return math.inf
    return float(abs(one - two) / max(abs(one), abs(two)))


def encoders(one: Path, two: Path) -> str:
    """Equal tensors are saved as equal bytes."""
    if one.exists() != two.exists():
        return "differs"
    if not one.exists():
        return "none"
    return "same" if filecmp.cmp(one, two, shallow=False) else "differs"
