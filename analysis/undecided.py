"""Which rows of a table need another seed before it says something: what ``fill --until RULE`` asks."""

from __future__ import annotations

import math
from typing import Any

from analysis import stats
from analysis.cells import Column, Table
from contract import study


def of(table: Table, rule: str) -> dict[str, Any]:
    """``{"open": {row: [what is open]}, "pending": n, "comparisons": n, "decided": n}``.

    ``ci95<0.5``, in the units of the cells, is met by a comparison (the leading row of a column against another) when
    Holm's test tells the two apart or both intervals are that narrow; by a row without another to compare with, when
    its interval is. ``p<0.01`` asks for the test alone. Raises SettingsError for another rule.
    """
    kind, bound = study.rule(rule)
    pending = sum(r.state not in ("finished", "failed", "cancelled") for c in table.cells.values() for r in c.runs)
    found: dict[str, list[str]] = {}
    comparisons = decided = 0
    for column in table.columns:
        for one, other, p in _pairs(table, column):
            comparisons += 1
            apart = p is not None and p < (bound if kind == "p" else stats.ALPHA)
            rows = [row for row in (one, other) if row is not None]
            if apart or (kind != "p" and all(_width(table, row, column, kind) < bound for row in rows)):
                decided += 1
                continue
            for row in rows:
                found.setdefault(row, []).append(column.name if len(rows) == 1 else f"{column.name}: {one} - {other}")
    return {"open": found, "pending": pending, "comparisons": comparisons, "decided": decided}


def _pairs(table: Table, column: Column) -> list[tuple[str, str | None, float | None]]:
    made = table.comparisons(column)
    if not made:  # one row, or no results of others yet
        return [(row, None, None) for row in table.rows]
    return [(each.top, other, p) for each in made for other, p in each.p_values.items()]


def _width(table: Table, row: str, column: Column, kind: str) -> float:
    """Half of the interval, as the cell shows it; infinite where there is none yet."""
    cell, layout = table.cells[row, column.name], table.layout_of(column.name)
    found = cell.summary
    half = {"ci95": found.ci95, "std": found.std}.get(kind)
    if half is None:
        middle = cell.iqm
        half = (middle.high - middle.low) / 2
    return half * (100 if layout.percent else 1) if math.isfinite(half) else math.inf
