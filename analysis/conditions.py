"""``python -m analysis.conditions --manifest STUDY.json --baseline ROW``: how much the rows of a study differ from one.

For each column: the difference of the means with its bootstrap interval, the paired t-test over the seeds that both
rows have (else Welch's), and what is left of it after Holm's correction for so many comparisons. Prints the table,
writes ``differences.{csv,png,pdf}`` and the learning curves of every row, smoothed. Prints the paths of what it wrote.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray

from analysis import figures, frame, stats, tables
from analysis.runs import to_stderr
from contract import rundir

if TYPE_CHECKING:
    from matplotlib.axes import Axes

METRICS = ("train/top1", "linear/top1")
DRAWS = 1000  # of the bootstrap, always with the same seed
SMOOTH = 0.6  # of the moving average of curves, as published


@dataclass(frozen=True)
class Difference:
    mean: float  # over the draws
    low: float  # 2.5 % of them lie below
    high: float


def smoothed(values: Sequence[float], alpha: float) -> list[float]:
    """The moving average y_t = alpha x_t + (1 - alpha) y_{t-1}, begun at x_0."""
    found: list[float] = []
    for value in values:
        found.append(value if not found else alpha * value + (1 - alpha) * found[-1])
    return found


def resamples(n: int, seed: int) -> NDArray[np.int64]:
    """(DRAWS, n) places to draw from n values."""
    return np.random.default_rng(seed).integers(n, size=(DRAWS, n))


def difference(
    one: Sequence[float], other: Sequence[float], draws: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None
) -> Difference:
    """Bootstrap of mean(one) - mean(other), 95 %. Each group is drawn in its own size; the published program draws the
    second in the size of the first."""
    places = draws or (resamples(len(one), 0), resamples(len(other), 1))
    found = np.asarray(one)[places[0]].mean(1) - np.asarray(other)[places[1]].mean(1)
    low, high = np.quantile(found, [0.025, 0.975])
    return Difference(float(found.mean()), float(low), float(high))


def compared(rows: Mapping[str, Mapping[int, float]], baseline: str) -> pd.DataFrame:
    """A line for each row but the baseline, whose values by seed are finite: n, mean, std, difference, p, p_holm."""
    finite = {row: {s: v for s, v in values.items() if np.isfinite(v)} for row, values in rows.items()}
    against = finite.get(baseline, {})
    found = []
    for row, values in finite.items():
        if row == baseline or not values or not against:
            continue
        each, of = stats.summary(list(values.values())), difference(list(values.values()), list(against.values()))
        apart = each.mean - stats.summary(list(against.values())).mean
        enough = min(len(values), len(against)) > 1
        ends = (of.low, of.high) if enough else (float("nan"), float("nan"))
        paired = len(values.keys() & against.keys())
        found.append((row, each.n, paired, each.mean, each.std, apart, *ends, stats.p_value(values, against)))
    names = ["row", "n", "paired", "mean", "std", "difference", "low", "high", "p"]
    table: pd.DataFrame = pd.DataFrame.from_records(found, columns=names)
    table["p"] = table["p"].astype(float)
    known = table["p"].notna()
    table["p_holm"] = float("nan")
    table.loc[known, "p_holm"] = stats.holm(table.loc[known, "p"].tolist())
    return table


def differences(table: tables.Table, baseline: str) -> pd.DataFrame:
    """``compared`` for every column of a study. Raises RunDirError where there is no such row."""
    if baseline not in table.rows:
        raise rundir.RunDirError(f"--baseline {baseline}: no such row; valid: {', '.join(table.rows)}")
    parts = []
    for column in table.columns:
        rows = {row: table.cells[row, column.name].values for row in table.rows}
        part = compared(rows, baseline)
        part.insert(0, "column", column.name)
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


def forest(table: tables.Table, found: pd.DataFrame, baseline: str) -> Figure | None:
    """A panel per column, a line per row: its difference from the baseline and the interval."""
    names = [row for row in table.rows if row in set(found["row"])]
    if not names:
        return None
    figure = Figure(figsize=(1.6 + 2.6 * len(table.columns), 1.3 + 0.4 * len(names)))
    every: list[Axes] = list(figure.subplots(1, len(table.columns), squeeze=False).flat)
    for axes, column in zip(every, table.columns, strict=True):
        scale = 100 if table.layout_of(column.name).percent else 1
        for _, line in found[found["column"] == column.name].iterrows():
            i = list(table.rows).index(line["row"])
            at, middle = names.index(line["row"]), scale * line["difference"]
            colour, marker = figures.COLOURS[i % 7], figures.MARKERS[i % 7]
            filled = colour if line["p_holm"] < stats.ALPHA else "white"
            axes.plot([scale * line["low"], scale * line["high"]], [at, at], "-", color=colour)
            axes.plot(middle, at, marker, color=colour, markerfacecolor=filled, markersize=6)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_yticks(range(len(names)), names)
        axes.tick_params(labelleft=axes is every[0])
        axes.set(
            title=column.name, xlabel=f"{column.metric} minus that of {baseline}" + (" (%)" if scale == 100 else "")
        )
    figure.suptitle(f"{table.title}: 95 % bootstrap intervals; filled: p < {stats.ALPHA} after Holm", fontsize=9)
    return figure


def curves(table: tables.Table, metrics: Sequence[str] = METRICS) -> Figure | None:
    """A panel per metric, a line per row: the mean over the seeds, what is measured in training smoothed run by run."""
    runs = figures.ancestry(table)
    points = frame.curves(table.output_dir, sorted(set(runs["identity"])))
    points = runs.merge(points[points["metric"].isin(metrics)], on="identity")
    there = [metric for metric in metrics if points.loc[points["metric"] == metric, "step"].nunique() > 1]
    if not there:
        return None
    figure = Figure(figsize=(4.2 * len(there), 3.4))
    every: list[Axes] = list(figure.subplots(1, len(there), squeeze=False).flat)
    for axes, metric in zip(every, there, strict=True):
        mine = points[points["metric"] == metric].sort_values("step")
        if metric.startswith("train/"):
            values = [
                pd.Series(smoothed(v.tolist(), SMOOTH), v.index) for _, v in mine.groupby(["row", "identity"])["value"]
            ]
            mine = mine.assign(value=pd.concat(values))
        figures.bands(axes, mine, table.rows)
        axes.set(xlabel="step", ylabel=metric)
    figures.legend(figure, table.rows)
    figure.suptitle(f"{table.title}: mean and standard deviation over the seeds", fontsize=9)
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m analysis.conditions", description="Every row against one row.")
    parser.add_argument("--manifest", type=Path, required=True, help="OUTPUT_DIR/studies/NAME.json")
    parser.add_argument("--baseline", help="a row of the study; the first if not given")
    parser.add_argument("--metrics", nargs="+", default=list(METRICS), help="of the learning curves")
    args = parser.parse_args(argv)
    try:
        table = tables.load(args.manifest)
        baseline = args.baseline or table.rows[0]
        found = differences(table, baseline)
        folder = table.output_dir / "figures" / args.manifest.stem
        folder.mkdir(parents=True, exist_ok=True)
        print(
            found.to_string(index=False, float_format=lambda value: f"{value:.4g}") if len(found) else "no results yet"
        )
        found.to_csv(folder / "differences.csv", index=False)
        print(folder / "differences.csv")
        with mpl.rc_context(figures.STYLE):
            made = {"differences": forest(table, found, baseline), "conditions": curves(table, args.metrics)}
            for name, figure in made.items():
                for path in (folder / f"{name}.png", folder / f"{name}.pdf"):
                    if figure is not None:
                        figure.savefig(path, dpi=200)
                        print(path)
    except (rundir.RunDirError, OSError) as error:
        to_stderr(f"error: {error}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
