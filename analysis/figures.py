"""``python -m analysis.figures --manifest STUDY.json``: the pictures of a study: learning curves with bands over seeds,
the cells of its table as dots, and the runs' own pictures on one sheet. Prints the paths of what it wrote.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

from analysis import frame, tables
from analysis.runs import to_stderr
from contract import rundir

if TYPE_CHECKING:
    from matplotlib.axes import Axes

METRICS = ("train/loss", "knn/loo1")
SHEET, WIDE = 60, 12  # so many pictures on a contact sheet, and side by side
# Okabe and Ito's colours, told apart by (nearly) everybody; markers and dashes say it again
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", "-.", ":")
MARKERS = "osD^vPX"
STYLE: dict[Any, Any] = {
    "text.parse_math": False,  # names are names, not formulas
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "legend.frameon": False,
    "grid.alpha": 0.3,
    "pdf.fonttype": 42,  # text stays text
    "figure.constrained_layout.use": True,
}


def ancestry(table: tables.Table) -> pd.DataFrame:
    """One row per table row and run that had a part in it, the pretraining behind an evaluation included."""
    runs = frame.runs(table.output_dir).set_index("identity")
    found = []
    for row in table.rows:
        todo = [run.identity for column in table.columns for run in table.cells[row, column.name].runs]
        seen: set[str] = set()
        while todo:
            identity = todo.pop(0)
            if identity not in seen and identity in runs.index:
                seen.add(identity)
                todo += list(runs.at[identity, "parents"])
                found.append((row, identity, runs.at[identity, "stage"], runs.at[identity, "seed"]))
    parts: pd.DataFrame = pd.DataFrame.from_records(found, columns=["row", "identity", "stage", "seed"])
    return parts


def panels(table: tables.Table, metrics: Sequence[str] = METRICS) -> list[tuple[str, str, pd.DataFrame]]:
    """Each stage and metric that has a curve, with its points: row, identity, seed, step, value."""
    runs = ancestry(table)
    points = frame.curves(table.output_dir, sorted(set(runs["identity"])))
    points = runs.merge(points[points["metric"].isin(metrics)], on="identity")
    found = [(*panel, each) for panel, each in points.groupby(["stage", "metric"], sort=False)]
    found = [panel for panel in found if panel[2]["step"].nunique() > 1]
    return sorted(found, key=lambda panel: (metrics.index(panel[1]), panel[0]))


def curves(table: tables.Table, metrics: Sequence[str] = METRICS) -> Figure | None:
    """A panel per stage and metric, a line per row: the mean over seeds, its band the standard deviation."""
    found = panels(table, metrics)
    if not found:
        return None
    figure = Figure(figsize=(4.2 * len(found), 3.2 + 0.2 * math.ceil(len(table.rows) / 4)))
    for axes, (stage, metric, points) in zip(_axes(figure, 1, len(found)), found, strict=True):
        bands(axes, points, table.rows)
        axes.set(xlabel="step", ylabel=metric, title=stage)
    legend(figure, table.rows)
    seeds = f"{len(table.seeds)} seeds" if len(table.seeds) > 1 else "1 seed"
    figure.suptitle(f"{table.title}: mean and standard deviation over {seeds}", fontsize=9)
    return figure


def bands(axes: Axes, points: pd.DataFrame, rows: Sequence[str], marked: bool = False) -> None:
    """For each row the mean of its values at every step, and a band of the standard deviation."""
    for i, row in enumerate(rows):
        over = points[points["row"] == row].groupby("step")["value"].agg(["mean", "std", "count"])
        if over.empty:
            continue
        marker = MARKERS[i % 7] if marked else "o" if len(over) == 1 else ""
        axes.plot(over.index, over["mean"], DASHES[i % 4], color=COLOURS[i % 7], label=row, marker=marker, markersize=4)
        band = over[over["count"] > 1]
        low, high = band["mean"] - band["std"], band["mean"] + band["std"]
        axes.fill_between(band.index, low, high, color=COLOURS[i % 7], alpha=0.2, linewidth=0)


def legend(figure: Figure, rows: Sequence[str]) -> None:
    """One for all panels, below them."""
    lines = {str(line.get_label()): line for axes in figure.axes for line in axes.lines}
    named = [row for row in rows if row in lines]
    figure.legend([lines[row] for row in named], named, loc="outside lower center", ncols=min(4, len(named)))


def dots(table: tables.Table) -> Figure | None:
    """The cells of the table: a panel per column, every seed a small dot, the mean and its interval a large one."""
    cells = [cell for cell in table.cells.values() if any(map(math.isfinite, cell.values.values()))]
    if not cells:
        return None
    figure = Figure(figsize=(1.2 + 2.6 * len(table.columns), 1.3 + 0.4 * len(table.rows)))
    every = _axes(figure, 1, len(table.columns))
    for axes, column in zip(every, table.columns, strict=True):
        percent = table.layout_of(column.name).percent
        scale = 100 if percent else 1
        for i, row in enumerate(table.rows):
            cell = table.cells[row, column.name]
            (middle, low, high), colour = cell.shown(table.layout), COLOURS[i % 7]
            values = [scale * v for v in cell.values.values() if math.isfinite(v)]
            axes.plot(values, [i + 0.22] * len(values), ".", color=colour, alpha=0.6, markersize=4)
            if math.isfinite(middle):
                ends = [scale * max(0.0, end) if math.isfinite(end) else 0.0 for end in (middle - low, high - middle)]
                axes.errorbar(
                    scale * middle, i, xerr=[[ends[0]], [ends[1]]], fmt=MARKERS[i % 7], color=colour, capsize=3
                )
        axes.set_ylim(len(table.rows) - 0.5, -0.5)
        axes.set_yticks(range(len(table.rows)), list(table.rows))
        axes.tick_params(labelleft=axes is every[0])
        axes.set(title=column.name, xlabel=column.metric + (" (%)" if percent else ""))
    shown = tables.INTERVALS[table.layout.interval].replace(" ± ", " and ")
    figure.suptitle(f"{table.title}: {shown}; small: single seeds", fontsize=9)
    return figure


def sheet(table: tables.Table) -> Figure | None:
    """The runs' own pictures (figures/*.png), a line per table row."""
    runs = ancestry(table).sort_values(["seed", "stage"], kind="stable")
    found = {row: pictures_of(table, runs[runs["row"] == row]) for row in table.rows}
    fit = min(WIDE, max(1, SHEET // len(table.rows)))
    if (most := max(map(len, found.values()))) > fit:
        to_stderr(f"contact sheet: the first {fit} of up to {most} pictures of each row")
    opened = {
        row: [(title, each) for title, p in all_[:fit] if (each := open_picture(p))] for row, all_ in found.items()
    }
    lines = {row: pictures for row, pictures in opened.items() if pictures}
    if not lines:
        return None
    wide = max(map(len, lines.values()))
    tallest = max(picture.height / picture.width for pictures in lines.values() for _, picture in pictures)
    inches = 4.0 if wide <= 4 else 2.4
    figure = Figure(figsize=(inches * wide, (inches * min(tallest, 3) + 0.5) * len(lines)))
    grid = _axes(figure, len(lines), wide)
    for axes in grid:
        axes.axis("off")
    for i, (row, pictures) in enumerate(lines.items()):
        for axes, (title, picture) in zip(grid[i * wide :], pictures, strict=False):
            axes.imshow(picture)
            axes.set_title(title, fontsize=7, loc="left")
        first = grid[i * wide]
        first.annotate(row, (0, 1), (0, 18), "axes fraction", "offset points", fontsize=9, fontweight="bold")
    return figure


def pictures_of(table: tables.Table, runs: pd.DataFrame) -> list[tuple[str, Path]]:
    return [
        (f"{stage} seed {seed}: {path.stem}", path)
        for identity, stage, seed in zip(runs["identity"], runs["stage"], runs["seed"], strict=True)
        for path in sorted(table.output_dir.glob(f"*/{identity}/{rundir.FIGURES}/*.png"))
    ]


def open_picture(path: Path) -> Image.Image | None:
    try:
        with Image.open(path) as picture:
            converted: Image.Image = picture.convert("RGB")
            return converted
    except (OSError, SyntaxError, ValueError) as error:
        to_stderr(f"{path}: unreadable ({error!s}); left out")
        return None


def _axes(figure: Figure, rows: int, columns: int) -> list[Axes]:
    return list(figure.subplots(rows, columns, squeeze=False).flat)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m analysis.figures", description="The pictures of a study.")
    parser.add_argument("--manifest", type=Path, required=True, help="OUTPUT_DIR/studies/NAME.json")
    parser.add_argument("--metrics", nargs="+", default=list(METRICS), help="of the learning curves")
    args = parser.parse_args(argv)
    try:
        table = tables.load(args.manifest)
        folder = table.output_dir / "figures" / args.manifest.stem
        folder.mkdir(parents=True, exist_ok=True)
        with mpl.rc_context(STYLE):
            made = {"curves": curves(table, args.metrics), "table": dots(table), "sheet": sheet(table)}
            for name, figure in made.items():
                for path in (folder / f"{name}.png", folder / f"{name}.pdf"):
                    if figure is not None:
                        figure.savefig(path, dpi=200)
                        print(path)
    except (rundir.RunDirError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not any(made.values()):
        print("nothing to draw yet: no run of this study has written a curve, a result or a picture", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
