from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from analysis import conditions, tables

MakeStudy = Callable[..., Path]


def test_a_moving_average_begins_at_the_first_value() -> None:
    values = [3.0, 5.0, 4.0, 8.0]
    found = conditions.smoothed(values, 0.6)
    for t, value in enumerate(found):  # the published form
        terms = [0.6 * 0.4 ** (t - i) * x for i, x in enumerate(values[: t + 1])]
        assert value == pytest.approx(values[0] * 0.4 ** (t + 1) + sum(terms))


def test_each_group_is_drawn_in_its_own_size() -> None:
    one, other = [5.0, 6.0, 7.0], [1.0] * 30
    found = conditions.difference(one, other)
    assert found.low < found.mean < found.high
    assert found.mean == pytest.approx(5, abs=0.1)
    assert found == conditions.difference(one, other)


def test_rows_are_compared_with_the_baseline_seed_by_seed() -> None:
    noise = np.random.default_rng(0).normal(size=5)
    rows = {
        "baseline": dict(enumerate(noise)),
        "a little better": dict(enumerate(noise + 0.1 + 0.001 * np.arange(5))),
        "as good": dict(enumerate(noise[::-1])),
        "one seed": {9: 1.0},
        "none": {},
        "diverged": {0: math.nan},
    }
    found = conditions.compared(rows, "baseline").set_index("row")
    assert list(found.index) == ["a little better", "as good", "one seed"]
    assert found.at["a little better", "difference"] == pytest.approx(0.102)
    assert found.at["a little better", "p_holm"] < 0.001  # though the seeds differ by far more
    assert found.at["as good", "p_holm"] > 0.5
    assert (found["p_holm"].dropna() >= found["p"].dropna()).all()
    assert pd.isna(found.at["one seed", "p"])
    assert pd.isna(found.at["one seed", "low"])


def test_a_study_has_its_differences_and_curves(
    output_dir: Path, make_study: MakeStudy, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = make_study()
    rows = tables.load(manifest).rows
    assert conditions.main(["--manifest", str(manifest), "--baseline", rows[1], "--metrics", "train/loss"]) == 0
    made = output_dir / "figures" / "demo"
    found = pd.read_csv(made / "differences.csv")
    assert set(found["row"]) == {row for row in rows if row != rows[1]}
    printed = capsys.readouterr().out.splitlines()
    for name in ("differences", "conditions"):
        assert str(made / f"{name}.pdf") in printed
        with Image.open(made / f"{name}.png") as picture:
            assert len(picture.convert("L").getcolors()) > 20  # something is drawn


def test_a_baseline_that_is_no_row_is_refused(make_study: MakeStudy, capsys: pytest.CaptureFixture[str]) -> None:
    assert conditions.main(["--manifest", str(make_study()), "--baseline", "nobody"]) == 2
    assert "--baseline nobody: no such row; valid: " in capsys.readouterr().err
