from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from analysis import figures, tables
from contract import rundir

MakeStudy = Callable[..., Path]


def test_a_study_has_its_pictures(output_dir: Path, make_study: MakeStudy, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = make_study(rows=("$formula_1$ & <b>", "other"))
    pictures = output_dir / "main_lmim" / "aaa01" / rundir.FIGURES
    pictures.mkdir()
    Image.new("L", (30, 20)).save(pictures / "similarity.png")
    (pictures / "broken.png").write_bytes(b"no picture")
    assert figures.main(["--manifest", str(manifest)]) == 0
    out, err = capsys.readouterr()
    made = output_dir / "figures" / "demo"
    assert out.split() == [str(made / f"{n}.{k}") for n in ("curves", "table", "sheet") for k in ("png", "pdf")]
    assert str(pictures / "broken.png") in err
    for path in map(Path, out.split()):
        if path.suffix == ".png":
            with Image.open(path) as picture:
                assert min(picture.size) > 100
                assert len(picture.convert("L").getcolors()) > 20  # something is drawn
        else:
            assert path.read_bytes().startswith(b"%PDF")


def test_curves_come_from_the_runs_behind_the_cells(make_study: MakeStudy) -> None:
    table = tables.load(make_study())
    parts = figures.ancestry(table)
    assert sorted(parts[parts["stage"] == "pretrain"]["identity"]) == [f"aaa{r}{s}" for r in "01" for s in "012"]
    figure = figures.curves(table)
    assert figure is not None
    (axes,) = figure.axes
    assert axes.get_ylabel() == "train/loss"
    assert [line.get_label() for line in axes.lines] == list(table.rows)
    assert axes.lines[0].get_ydata()[1] == 0.5


def test_an_empty_study_says_so(output_dir: Path, make_study: MakeStudy, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = make_study()
    for path in output_dir.glob("*/*/*"):
        if path.name in (rundir.DONE, rundir.METRICS):
            path.unlink()
    assert figures.main(["--manifest", str(manifest)]) == 0
    out, err = capsys.readouterr()
    assert not out
    assert "nothing to draw yet" in err
