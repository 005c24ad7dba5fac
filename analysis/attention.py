"""``python -m analysis.attention [NAME=]RUN ... | --study NAME``: attention statistics of several encoders, by block.

A line per encoder, the mean over its seeds with a band of the standard deviation, in ``attention.png`` and ``.pdf``;
the same numbers in ``attention.csv``; and, on the screen, those of one block. A RUN is the directory of a run of
main_attention_stats. Runs that differ in nothing but the seed are one encoder; so are those that get the same NAME.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import pandas as pd
import yaml
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis import figures, render, runs, tables
from contract import rundir

WORKER = "main_attention_stats"
PREFIX = "attention/"
PANELS = {  # without the prefix: what it is
    "cls_cls": "class token to itself",
    "entropy": "entropy of the class token's attention",
    "patch_cls": "patches to the class token",
    "patch_self": "patches to themselves",
    "patch_entropy": "entropy of the patches' attention",
    "patch_magnitude": "norm of the patches' attention branch over its input",
}
COLUMNS = ["row", "identity", "metric", "step", "value"]


def points(named: Sequence[tuple[str, Path]]) -> pd.DataFrame:
    """(encoder, run directory) -> a line per run, statistic and block, in ``COLUMNS``; the step is the block."""
    found = []
    for row, folder in named:
        run = runs.read_run(folder)
        curves, problems = runs.curves(folder)
        for problem in problems:
            runs.to_stderr(problem)
        own = [p for p in curves if p.key.startswith(PREFIX)]
        if not own:
            runs.to_stderr(f"{folder}: no attention statistics ({rundir.state(folder)}); left out")
        found += [(row, run.identity, p.key.removeprefix(PREFIX), p.step, p.value) for p in own]
    frame = pd.DataFrame.from_records(found, columns=COLUMNS)
    once: pd.DataFrame = frame.drop_duplicates(COLUMNS[:-1], keep="last")  # a run that was begun again says it twice
    return once


def given(said: Sequence[str]) -> list[tuple[str, Path]]:
    """``[NAME=]RUN`` as it was said; runs without a name are called after the encoder of the first of their group."""
    called: dict[str, str] = {}
    named = []
    for each in said:
        name, equals, rest = each.partition("=")
        if not equals or Path(each).exists():
            name, rest = "", each
        folder = Path(rest).resolve()
        group = runs.read_run(folder).group
        named.append((name or called.setdefault(group, encoder_of(folder)), folder))
    return named


def encoder_of(folder: Path) -> str:
    """What a run of an evaluation calls its encoder: ``worker/identity`` of a run, the name of a file."""
    path = folder / rundir.CONFIG
    try:
        said = str(yaml.safe_load(path.read_text())["encoder"])
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        raise rundir.RunDirError(f"{path}: names no encoder; expected a run of {WORKER}") from None
    parts = Path(said).parts
    return "/".join(parts[-2:]) if (Path(said) / rundir.RUN).exists() else parts[-1]


def of_study(table: tables.Table) -> list[tuple[str, Path]]:
    parts = figures.ancestry(table)
    folders = [table.output_dir / WORKER / identity for identity in parts["identity"]]
    return [(row, folder) for row, folder in zip(parts["row"], folders, strict=True) if folder.is_dir()]


def draw(found: pd.DataFrame, title: str) -> Figure:
    """A panel per statistic that is there, a line per encoder."""
    rows = list(dict.fromkeys(found["row"]))
    panels = [name for name in PANELS if name in set(found["metric"])]
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(3.6 * columns, 2.5 * lines + 0.6 + 0.2 * math.ceil(len(rows) / 4)))
    every = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes, name in itertools.zip_longest(every, panels):
        if name is None:
            axes.set_axis_off()
            continue
        figures.bands(axes, found[found["metric"] == name], rows, marked=True)
        axes.set_title(PANELS[name], fontsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("block")
    figures.legend(figure, rows)
    figure.suptitle(title, fontsize=9)
    return figure


def tidy(found: pd.DataFrame) -> pd.DataFrame:
    """encoder, block, statistic: mean and standard deviation over the runs, and how many these are."""
    keys = {"row": "encoder", "step": "block", "metric": "statistic"}
    over = found.rename(columns=keys).groupby(list(keys.values()), sort=False)["value"]
    table: pd.DataFrame = over.agg(["mean", "std", "count"]).rename(columns={"count": "runs"}).reset_index()
    return table


def at(table: pd.DataFrame, block: int) -> render.Grid:
    """One block of every encoder, from the end where negative: a line per statistic."""
    encoders = list(dict.fromkeys(table["encoder"]))
    depth = {each: int(table.loc[table["encoder"] == each, "block"].max()) + 1 for each in encoders}
    chosen = {each: block + n if block < 0 else block for each, n in depth.items()}
    for each, n in depth.items():
        if not 0 <= chosen[each] < n:
            raise rundir.RunDirError(f"--block {block}: {each} has {n} blocks; choose {-n} to {n - 1}")
    here = table[[chosen[e] == b for e, b in zip(table["encoder"], table["block"], strict=True)]]
    cells = {(r.encoder, r.statistic): _cell(r.mean, r.std) for r in here.itertuples()}
    lines = [
        [render.Text(name), *(render.Text(cells.get((each, name), "-")) for each in encoders)]
        for name in dict.fromkeys(table["statistic"])
    ]
    number = sorted(set(here["runs"]))
    blocks = ", ".join(map(str, sorted(set(chosen.values()))))
    notes = [f"mean and standard deviation over runs ({'-'.join(map(str, {number[0], number[-1]}))} each)"]
    return render.Grid("attention", f"Attention statistics, block {blocks}", ["", *encoders], lines, notes, [])


def _cell(mean: float, std: float) -> str:
    return f"{mean:.3g}" if math.isnan(std) else f"{mean:.3g} ± {std:.1g}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m analysis.attention", description="Attention, block by block.")
    parser.add_argument("runs", nargs="*", metavar="[NAME=]RUN", help=f"directories of runs of {WORKER}")
    parser.add_argument("--study", metavar="NAME", help="or all of a study's")
    parser.add_argument("--output-dir", type=Path, default=Path("runs"), help="where the study's runs are")
    parser.add_argument("--output", type=Path, help="folder to write to; default OUTPUT_DIR/figures/NAME")
    parser.add_argument("--block", type=int, default=-1, help="on the screen; negative: from the end")
    args = parser.parse_args(argv)
    if bool(args.runs) == bool(args.study):
        parser.error("give run directories, or --study NAME")
    try:
        if args.study:
            study = tables.load(args.output_dir / "studies" / f"{args.study}.json")
            named, title = of_study(study), study.title
        else:
            named, title = given(args.runs), "Attention"
        found = points(named)
        if found.empty:
            print(f"nothing to draw yet: no finished run of {WORKER}", file=sys.stderr)
            return 0
        folder = args.output or args.output_dir / "figures" / (args.study or "attention")
        folder.mkdir(parents=True, exist_ok=True)
        table = tidy(found)
        print(render.term(at(table, args.block)))
        with mpl.rc_context(figures.STYLE):
            figure = draw(found, f"{title}: mean and standard deviation over seeds")
            for path in (folder / "attention.png", folder / "attention.pdf"):
                figure.savefig(path, dpi=200)
                print(path)
        table.to_csv(folder / "attention.csv", index=False)
        print(folder / "attention.csv")
    except (rundir.RunDirError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
