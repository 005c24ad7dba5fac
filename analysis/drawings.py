"""The pictures of a study as they stand in its page: figures as SVG, the runs' own pictures as small WebP."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from analysis import attention, figures
from analysis.cells import Table
from analysis.runs import to_stderr
from contract import rundir

POINTS = 6000  # of one figure's lines together; a page with more is slow, and no eye sees them
LEGEND = 14  # rows; more are not told apart by colour
SIDE = 360  # pixels of the longer side of a picture
BYTES = 2_000_000  # of all pictures of a page
PER_ROW = 8


@dataclass(frozen=True)
class Drawing:
    title: str
    alt: str
    source: str  # a data: address
    width: int  # pixels at which its text has the size of the page's
    height: int


def figures_of(table: Table) -> Iterator[tuple[str, str, Figure]]:
    rows = ", ".join(table.rows[:LEGEND])
    if (dots := figures.dots(table)) is not None:
        yield "Cells", f"the cells of the table as dots, for {rows}", dots
    metrics = tuple(dict.fromkeys((*figures.METRICS, *(column.metric for column in table.columns))))
    for stage, metric, points in figures.panels(table, metrics):
        figure = Figure(figsize=(4.6, 3.2 + 0.2 * (min(len(table.rows), LEGEND) + 1) // 2))
        axes = figure.subplots()
        figures.bands(axes, _thinned(points, len(table.rows)), table.rows)
        axes.set(xlabel="step", ylabel=metric, title=f"{stage}: {metric}")
        if len(table.rows) <= LEGEND:
            lines = [line for line in axes.lines if not str(line.get_label()).startswith("_")]
            figure.legend(lines, [str(x.get_label()) for x in lines], loc="outside lower center", ncols=2)
        last = points[points["step"] == points["step"].max()].groupby("row")["value"].mean()
        ends = ", ".join(f"{row} {value:.4g}" for row, value in last.items())
        yield f"{stage}: {metric}", f"{metric} over steps, mean and band over seeds; at the end: {ends}", figure
    if named := [(row, folder) for row, folder in attention.of_study(table) if (folder / rundir.DONE).exists()]:
        found = attention.points(named)
        if not found.empty:
            title = "Attention, block by block: mean and standard deviation over seeds"
            yield "Attention", f"attention statistics over blocks, for {rows}", attention.draw(found, title)


def figures_as_svg(table: Table) -> list[Drawing]:
    """Cells, learning curves and attention, as far as there are any."""
    found = []
    with mpl.rc_context({**figures.STYLE, "svg.hashsalt": table.name}):
        for title, alt, figure in figures_of(table):
            file = io.BytesIO()
            figure.savefig(file, format="svg", metadata={"Date": None})
            wide, high = (round(96 * inches) for inches in figure.get_size_inches())
            found.append(Drawing(title, alt, _address("svg+xml", file.getvalue()), wide, high))
    return found


def _thinned(points: pd.DataFrame, rows: int) -> pd.DataFrame:
    """Every so many steps only, the first and the last among them."""
    steps = np.sort(points["step"].unique())
    most = max(50, POINTS // max(rows, 1))
    if len(steps) <= most:
        return points
    kept = steps[np.linspace(0, len(steps) - 1, most).round().astype(int)]
    thin: pd.DataFrame = points[points["step"].isin(kept)]
    return thin


@dataclass(frozen=True)
class Line:
    row: str
    pictures: list[Drawing]


def thumbnails(table: Table) -> list[Line]:
    """The runs' own pictures, a line per row of the table: as many of each as fit in a page."""
    runs = figures.ancestry(table).sort_values(["seed", "stage"], kind="stable")
    lines, used, left_out = [], 0, 0
    named = {row: figures.pictures_of(table, runs[runs["row"] == row]) for row in table.rows}
    most = max(1, min(PER_ROW, BYTES // 20_000 // max(1, len(named))))
    for row, paths in named.items():
        left_out += len(paths[most:])
        made = []
        for title, path in paths[:most]:
            each = _thumbnail(f"{row}, {title}", title, path) if used < BYTES else None
            if each is not None:
                made.append(each)
                used += len(each.source)
        if made:
            lines.append(Line(row, made))
    if left_out:
        to_stderr(f"report: {left_out} pictures left out; the first {most} of each row are in it")
    return lines


def _thumbnail(alt: str, title: str, path: Path) -> Drawing | None:
    picture = figures.open_picture(path)
    if picture is None:
        return None
    picture.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    picture.save(file, "WEBP", quality=80)
    return Drawing(title, alt, _address("webp", file.getvalue()), *picture.size)


def _address(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
