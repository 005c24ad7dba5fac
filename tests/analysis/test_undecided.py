from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from analysis import tables, undecided
from contract import rundir

MakeStudy = Callable[..., Path]


def ask(manifest: Path, rule: str) -> dict[str, object]:
    return undecided.of(tables.load(manifest), rule)


def test_a_comparison_is_settled_when_the_test_tells_the_rows_apart(make_study: MakeStudy) -> None:
    found = ask(make_study(), "ci95<0.01")  # the intervals are wider, but 20 points lie between the rows
    assert (found["open"], found["comparisons"], found["decided"]) == ({}, 2, 2)


def test_or_when_both_intervals_are_narrow_enough(output_dir: Path, make_study: MakeStudy) -> None:
    manifest = make_study()
    for seed, value in enumerate((0.5, 0.54, 0.51)):
        done = output_dir / "main_knn" / f"bb01{seed}" / rundir.DONE
        rundir.write_json(done, {"metrics": {"knn/loo1": value}, "steps": 0, "time": 1.0})
    close = "1-NN: Latent & <MIM> - random encoder"
    open_ones = {"Latent & <MIM>": [close], "random encoder": [close]}
    assert ask(manifest, "ci95<3")["open"] == open_ones  # per cent, as the cells: 2.5 and 5.2
    assert ask(manifest, "ci95<6")["open"] == {}
    assert ask(manifest, "std<2.1")["open"] == {}
    assert ask(manifest, "p<0.05")["open"] == open_ones
    assert ask(manifest, "p<0.999")["open"] == {}


def test_a_row_alone_is_open_while_its_interval_is_wide(make_study: MakeStudy) -> None:
    manifest = make_study(rows=("only",))
    assert ask(manifest, "ci95<2.4")["open"] == {"only": ["1-NN", "linear probe"]}
    assert ask(manifest, "ci95<2.6")["open"] == {}


def test_runs_that_are_not_in_are_counted_and_failed_ones_are_not(
    output_dir: Path, make_study: MakeStudy, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = make_study()
    waiting, failed = (output_dir / "main_knn" / name for name in ("bb000", "bb001"))
    (waiting / rundir.DONE).unlink()
    next(waiting.glob("attempts.*")).unlink()
    (failed / rundir.DONE).unlink()
    assert tables.main(["--manifest", str(manifest), "--open", "ci95<1"]) == 0
    assert json.loads(capsys.readouterr().out)["pending"] == 1
    assert tables.main(["--manifest", str(manifest), "--open", "ci95"]) == 2
    assert "expected ci95<NUMBER" in capsys.readouterr().err
