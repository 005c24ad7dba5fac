from __future__ import annotations

import csv
import io
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from scipy import stats as scipy_stats

from analysis import stats, tables
from contract import rundir

MakeRun = Callable[..., Path]
MakeStudy = Callable[..., Path]
NASTY = ('a & b_c % "d" <e>', "[x]* | ^~ \\ {#} $y$", "new\nline, ±")


def said(capsys: pytest.CaptureFixture[str], *args: str | Path) -> str:
    assert tables.main([str(a) for a in args]) == 0
    return capsys.readouterr().out


def test_a_cell_is_mean_and_interval_over_seeds(make_study: MakeStudy) -> None:
    table = tables.load(make_study())
    cell = table.cells["random encoder", "1-NN"]
    values = [0.5, 0.51, 0.52]
    low, high = scipy_stats.t.interval(0.95, 2, loc=0.51, scale=scipy_stats.sem(values))
    assert list(cell.values.values()) == values
    assert cell.summary.mean == pytest.approx(0.51)
    assert cell.summary.ci95 == pytest.approx((high - low) / 2)
    assert tables.text(cell, table.layout) == "51.0 ± 2.5"


def test_layout_decides_interval_digits_and_unit(make_study: MakeStudy) -> None:
    table = tables.load(make_study(layout={"digits": 3, "interval": "std", "percent": False}))
    assert tables.text(table.cells["random encoder", "1-NN"], table.layout) == "0.510 ± 0.010"


def test_what_is_missing_is_shown(output_dir: Path, make_study: MakeStudy) -> None:
    manifest = make_study()
    knn = output_dir / "main_knn"
    (knn / "bb000" / rundir.DONE).unlink()  # ended without: failed
    for name in ("bb010", "bb011", "bb012"):
        (knn / name / rundir.DONE).unlink()
        next((knn / name).glob("attempts.*")).unlink()
    for name in ("bb100", "bb101", "bb102"):
        (output_dir / "main_linprobe" / name / rundir.DONE).unlink()
    table = tables.load(manifest)
    shown = {key: tables.text(cell, table.layout) for key, cell in table.cells.items()}
    assert shown == {
        ("random encoder", "1-NN"): "51.5 ± 6.4 (2/3, 1 failed)",
        ("Latent & <MIM>", "1-NN"): "pending (0/3)",
        ("random encoder", "linear probe"): "failed (0/3)",
        ("Latent & <MIM>", "linear probe"): "81.3 ± 3.2",
    }
    assert table.best(table.columns[0]) is None  # nothing to compare with


def test_runs_that_do_not_exist_yet_are_pending(output_dir: Path, make_study: MakeStudy) -> None:
    manifest = make_study()
    shutil.rmtree(output_dir / "main_knn")
    table = tables.load(manifest)
    assert tables.text(table.cells["random encoder", "1-NN"], table.layout) == "pending (0/3)"


def test_nan_is_shown_and_never_best(make_run: MakeRun, output_dir: Path, make_study: MakeStudy) -> None:
    manifest = make_study()
    done = output_dir / "main_knn" / "bb011" / rundir.DONE
    rundir.write_json(done, {"metrics": {"knn/loo1": math.nan}, "steps": 0, "time": 1.0})
    table = tables.load(manifest)
    assert tables.text(table.cells["Latent & <MIM>", "1-NN"], table.layout) == "NaN"
    assert table.best(table.columns[0]) is None
    assert any(note.startswith("NaN") for note in tables.grid(table).notes)
    assert json.loads(tables.to_json(tables.records(table)).splitlines()[2])["mean"] == "nan"


def test_mixed_code_is_marked(output_dir: Path, make_study: MakeStudy) -> None:
    manifest = make_study()
    path = output_dir / "main_knn" / "bb001" / rundir.RUN
    path.write_text(path.read_text().replace("c0de", "0ther"))
    table = tables.load(manifest)
    assert tables.text(table.cells["random encoder", "1-NN"], table.layout) == "51.0 ± 2.5†"
    assert any(note.startswith("†") for note in tables.grid(table).notes)


def test_a_metric_that_never_appears_is_told(
    output_dir: Path, make_study: MakeStudy, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = make_study()
    done = output_dir / "main_knn" / "bb001" / rundir.DONE
    rundir.write_json(done, {"metrics": {"knn/other": 0.5}, "steps": 0, "time": 1.0})
    table = tables.load(manifest)
    assert tables.text(table.cells["random encoder", "1-NN"], table.layout).endswith("(2/3, 1 failed)")
    assert "bb001 is finished, but has no metric knn/loo1; it has: knn/other" in capsys.readouterr().err


def test_one_seed_has_no_interval(make_study: MakeStudy) -> None:
    table = tables.load(make_study(seeds=1))
    assert tables.text(table.cells["random encoder", "1-NN"], table.layout) == "50.0"
    assert not any(cell.bold for row in tables.grid(table).rows for cell in row)


def test_best_needs_a_test() -> None:
    low, high = {0: 0.50, 1: 0.51, 2: 0.52}, {0: 0.60, 1: 0.612, 2: 0.619}
    noisy = {0: 0.40, 1: 0.61, 2: 0.80}
    assert stats.best({"low": low, "high": high}) == "high"
    assert stats.best({"low": low, "high": high}, higher=False) == "low"
    assert stats.best({"low": low, "noisy": noisy}) is None
    assert stats.best({"low": low, "high": high, "noisy": noisy}) is None
    assert stats.best({"low": low}) is None
    assert stats.best({"low": low, "same": dict(low)}) is None
    assert stats.best({"low": low, "none": {}}) is None
    assert stats.best({"one": {0: 0.9}, "other": {1: 0.1}}) is None


def test_tests_are_paired_where_seeds_are_shared() -> None:
    one, other = {0: 0.5, 1: 0.6, 2: 0.7}, {0: 0.51, 1: 0.611, 2: 0.712}
    paired = scipy_stats.ttest_rel(list(one.values()), list(other.values())).pvalue
    assert stats.p_value(one, other) == pytest.approx(paired)
    apart = {seed + 10: value for seed, value in other.items()}
    welch = scipy_stats.ttest_ind(list(one.values()), list(other.values()), equal_var=False).pvalue
    assert stats.p_value(one, apart) == pytest.approx(welch)


def test_reported_figures_stand_below_their_row(make_study: MakeStudy) -> None:
    reported = [{"row": "random encoder", "column": "1-NN", "value": 67.4, "source": "Table 2"}]
    grid = tables.grid(tables.load(make_study(reported=reported)))
    assert [cell.text for cell in grid.rows[1]] == ["random encoder, reported", "67.4 [1] (Δ −16.4)", ""]
    assert grid.notes[-1] == "[1] Table 2"


def test_a_terminal_of_80_columns_is_enough(make_study: MakeStudy, capsys: pytest.CaptureFixture[str]) -> None:
    shown = said(capsys, "--manifest", make_study(rows=("a rather long name of a row " * 2, "b")))
    assert max(map(len, shown.splitlines())) <= 80
    assert "±" in shown
    assert "\x1b" not in shown


def test_markdown_keeps_its_columns_whatever_the_names(
    make_study: MakeStudy, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = said(capsys, "--manifest", make_study(rows=NASTY), "--format", "md")
    rows = [line for line in shown.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(NASTY)
    assert {line.replace("\\|", "").count("|") for line in rows} == {4}
    assert "new line" in shown
    assert "<e>" not in shown.replace("\\<", "").replace("\\>", "")
    assert "**" in rows[-1]


class Cells(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.heads: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)
        if tag == "th":
            self.heads.append("")

    def handle_data(self, data: str) -> None:
        if "th" in self.tags[-1:]:
            self.heads[-1] += data.strip("\n")


def test_html_says_names_as_they_are(make_study: MakeStudy, capsys: pytest.CaptureFixture[str]) -> None:
    page = Cells()
    page.feed(said(capsys, "--manifest", make_study(rows=NASTY), "--format", "html"))
    assert page.heads[3:] == [NASTY[0], NASTY[1], "new line, ±"]
    assert "e" not in page.tags


def test_csv_and_json_carry_everything(make_study: MakeStudy, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = make_study(rows=NASTY)
    rows = list(csv.DictReader(io.StringIO(said(capsys, "--manifest", manifest, "--format", "csv"))))
    assert [row["row"] for row in rows[::2]] == list(NASTY)
    lines = [json.loads(line) for line in said(capsys, "--manifest", manifest, "--json").splitlines()]
    assert [(r["mean"], r["n"], r["of"], r["best"]) for r in lines[-2:]] == [
        (pytest.approx(0.916), 3, 3, True),
        (pytest.approx(1.016), 3, 3, True),
    ]
    assert float(rows[-2]["mean"]) == lines[-2]["mean"]
    assert lines[0]["runs"] == "bb000 bb001 bb002"


def test_latex_escapes_and_names_the_runs(make_study: MakeStudy, capsys: pytest.CaptureFixture[str]) -> None:
    shown = said(capsys, "--manifest", make_study(rows=NASTY), "--format", "latex")
    assert r"a \& b\_c \% ''d'' \textless{}e\textgreater{} & 51.0 $\pm$ 2.5 &" in shown
    assert "    {[}x]{*} \\textbar{} " in shown
    assert "% new line, ± | 1-NN: 0=bb020 1=bb021 2=bb022" in shown


def test_latex_compiles(make_study: MakeStudy, tmp_path: Path) -> None:
    if shutil.which("pdflatex") is None:
        assert "latex" not in os.environ.get("SIGHTLINE_REQUIRE", "").split(","), "pdflatex is required here"
        pytest.skip("no pdflatex here")
    table = tmp_path / "table.tex"
    layout = {"groups": {"A & b": [NASTY[1]], "Last": [NASTY[2]]}, "interval": "iqm", "overall": ["1-NN"]}
    reported = [{"row": NASTY[1], "column": "1-NN", "value": 99.5, "source": "Table 2_b, 5 %"}]
    manifest = make_study(rows=NASTY, layout=layout, reported=reported)
    assert tables.main(["--manifest", str(manifest), "--output", str(table)]) == 0
    page = tmp_path / "page.tex"
    page.write_text(r"\documentclass{article}\usepackage{booktabs}\begin{document}\input{table}\end{document}")
    subprocess.run(["pdflatex", "-halt-on-error", page.name], cwd=tmp_path, check=True, capture_output=True)


def test_a_cell_lists_its_runs(make_study: MakeStudy, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = make_study()
    shown = said(capsys, "--manifest", manifest, "--cell", "random encoder", "1-NN")
    assert [line.split()[:4] for line in shown.splitlines() if " bb0" in line] == [
        ["0", "bb000", "finished", "0.5"],
        ["1", "bb001", "finished", "0.51"],
        ["2", "bb002", "finished", "0.52"],
    ]
    lines = said(capsys, "--manifest", manifest, "--cell", "random encoder", "1-NN", "--json").splitlines()
    assert json.loads(lines[2])["value"] == 0.52


def test_a_cell_says_what_differs_where_it_ran_and_for_how_long(
    output_dir: Path, make_study: MakeStudy, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = make_study()
    for seed, host, seconds in ((0, "n1", 3600), (1, "n2", 1800)):
        folder = output_dir / "main_knn" / f"bb00{seed}"
        end = {"event": "end", "attempt": "a2", "time": 2e9, "host": f"{host}/pid:[1]", "seconds": seconds}
        journal = rundir.Journal(rundir.attempts_file(folder, 0))
        journal.append(end | {"gpu_seconds": 2 * seconds})
        journal.close()
    pretraining = rundir.Journal(rundir.attempts_file(output_dir / "main_lmim" / "aaa00", 0))
    pretraining.append({"event": "end", "attempt": "a2", "time": 2e9, "host": "n3", "seconds": 3600, "gpu_seconds": 0})
    pretraining.close()
    (output_dir / "main_knn" / "bb002" / rundir.CONFIG).write_text(
        "seed: 2\nworker: main_knn\nk: [1]\nenv: {ngpu: 3}\n"
    )
    shown = said(capsys, "--manifest", manifest, "--cell", "random encoder", "1-NN", "--format", "md")
    assert "| h n1 | 2 GPU-h |" in shown
    assert "3 GPU-h + 1 CPU-h with the runs that they were built upon" in shown
    assert r"differ in k: (not set) \| \[1\]" in shown
    assert "ngpu" not in shown
    source = said(capsys, "--manifest", manifest, "--format", "latex")
    assert "% commit abc; 3 GPU-h + 1 CPU-h with pretraining; on h, n1, n2, n3" in source


def test_rows_stand_in_groups_and_bold_may_be_given_within_them(
    make_study: MakeStudy, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = ("a", "b", "c", "d")
    layout = {"groups": {"First": ["a", "b"], "Second": ["d"]}, "bold": "group"}
    manifest = make_study(rows=rows, layout=layout)
    shown = said(capsys, "--manifest", manifest, "--format", "md")
    body = [line for line in shown.splitlines() if line.startswith("|")][2:]
    assert [line.split("|")[1].strip() for line in body] == ["c", "*First*", "a", "b", "*Second*", "d"]
    assert [("**" in line) for line in body] == [False, False, False, True, False, False]
    assert "every other row of its group" in shown
    assert "First" in said(capsys, "--manifest", manifest)
    assert r"\multicolumn{3}{l}{\textit{First}}" in said(capsys, "--manifest", manifest, "--format", "latex")
    assert '<th colspan="3" class="group">First</th>' in said(capsys, "--manifest", manifest, "--format", "html")
    manifest = rundir.read_json(manifest) | {"layout": {"bold": "none"}}
    assert "**" not in str(manifest)


def test_bootstrap_intervals_and_the_column_over_columns(make_study: MakeStudy) -> None:
    table = tables.load(make_study(layout={"interval": "iqm", "overall": ["1-NN", "linear probe"]}))
    assert tables.text(table.cells["random encoder", "1-NN"], table.layout) == "51.0 [50.0, 52.0]"
    shown = tables.grid(table)
    assert shown.head[-1] == "IQM"
    assert shown.rows[0][-1].text.startswith("56.0 [55.")
    assert any("stratified bootstrap" in note for note in shown.notes)


def test_a_column_may_have_digits_and_a_unit_of_its_own(make_study: MakeStudy, output_dir: Path) -> None:
    manifest = make_study()
    values = rundir.read_json(manifest)
    values["columns"][1] |= {"digits": 3, "percent": False}
    rundir.write_json(manifest, values)
    row = tables.grid(tables.load(manifest)).rows[0]
    assert [cell.text for cell in row[1:]] == ["51.0 ± 2.5", "0.610 ± 0.025"]


def test_what_was_taken_over_is_marked_with_its_source(
    output_dir: Path, make_study: MakeStudy, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = make_study()
    path = output_dir / "main_knn" / "bb001" / rundir.RUN
    rundir.write_json(path, rundir.read_json(path) | {"imported": {"source": "old.csv, line 3"}, "code": {"hash": ""}})
    table = tables.load(manifest)
    assert tables.text(table.cells["random encoder", "1-NN"], table.layout) == "51.0 ± 2.5‡"  # and not mixed
    shown = said(capsys, "--manifest", manifest, "--cell", "random encoder", "1-NN")
    assert "seed 1: from old.csv, line 3" in shown
    assert "% seed 1 from old.csv, line 3" in said(capsys, "--manifest", manifest, "--format", "latex")


def test_a_run_directory_that_was_changed_by_hand_is_left_out_with_a_line(
    output_dir: Path, make_study: MakeStudy, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = make_study()
    path = output_dir / "main_knn" / "bb001" / rundir.RUN
    rundir.write_json(path, rundir.read_json(path) | {"seed": 7})
    table = tables.load(manifest)
    assert tables.text(table.cells["random encoder", "1-NN"], table.layout).endswith("(2/3)")
    assert f"{path}: seed 7, where the study has 1: changed by hand; left out" in capsys.readouterr().err


def test_a_watched_table_is_drawn_again_as_cells_fill(output_dir: Path, make_study: MakeStudy, tmp_path: Path) -> None:
    manifest = make_study()
    done = output_dir / "main_knn" / "bb001" / rundir.DONE
    kept = done.read_text()
    done.unlink()
    next(done.parent.glob("attempts.*")).unlink()  # as if it still waited
    code = "import sys; from analysis import tables; sys.exit(tables.main(sys.argv[1:]))"
    words = ["--manifest", str(manifest), "--format", "md", "--watch", "0.1"]
    root = Path(tables.__file__).parents[1]
    process = subprocess.Popen([sys.executable, "-c", code, *words], cwd=root, text=True, stdout=subprocess.PIPE)
    assert process.stdout is not None
    first = ""
    while "(2/3)" not in first:
        line = process.stdout.readline()
        assert line, first
        first += line
    done.write_text(kept)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "51.0 ± 2.5 |" in rest


def test_parquet_holds_the_records(make_study: MakeStudy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "t.parquet"
    manifest = make_study()
    assert tables.main(["--manifest", str(manifest), "--output", str(path)]) == 0
    found = pd.read_parquet(path)
    assert list(found["mean"]) == [record["mean"] for record in tables.records(tables.load(manifest))]
    assert tables.main(["--manifest", str(manifest), "--format", "parquet"]) == 2
    assert "add --output FILE" in capsys.readouterr().err


def test_the_suffix_says_the_format(make_study: MakeStudy, tmp_path: Path) -> None:
    manifest = make_study()
    for suffix, start in ((".md", "**"), (".tex", "%"), (".html", "<!doctype"), (".csv", "row,")):
        path = tmp_path / f"t{suffix}"
        assert tables.main(["--manifest", str(manifest), "--output", str(path)]) == 0
        assert path.read_text().startswith(start)


def test_a_moved_output_directory_still_has_its_tables(output_dir: Path, make_study: MakeStudy) -> None:
    make_study()
    moved = output_dir.rename(output_dir.with_name("moved here"))
    assert tables.load(moved / "studies" / "demo.json").cells["random encoder", "1-NN"].summary.n == 3


@pytest.mark.parametrize("content", ["", "[]", '{"schema": 99}', '{"schema": 1}', '{"schema": 1, "cells": 3}'])
def test_a_bad_manifest_is_one_line(tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.json"
    path.write_text(content)
    assert tables.main(["--manifest", str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert str(path) in err


def test_an_unknown_cell_lists_the_valid_ones(make_study: MakeStudy, capsys: pytest.CaptureFixture[str]) -> None:
    assert tables.main(["--manifest", str(make_study()), "--cell", "nobody", "1-NN"]) == 2
    assert "rows: random encoder, Latent & <MIM>; columns: 1-NN, linear probe" in capsys.readouterr().err
