from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from analysis import frame, runs
from contract import rundir

MakeRun = Callable[..., Path]


@pytest.fixture
def warned() -> list[str]:
    return []


def test_results_and_curves_are_tidy(output_dir: Path, make_run: MakeRun) -> None:
    make_run("a1", seed=1, steps=3, metrics={"knn/loo1": 0.9, "knn/top1": 0.8}, parents=("p1",))
    make_run("a2", seed=2, steps=2, end="failed")
    results = frame.results(output_dir)
    assert results[["identity", "seed", "state", "metric", "value", "code"]].values.tolist() == [
        ["a1", 1, "finished", "knn/loo1", 0.9, "c0de"],
        ["a1", 1, "finished", "knn/top1", 0.8, "c0de"],
    ]
    every = frame.runs(output_dir)
    assert every[["identity", "group", "worker", "stage", "state"]].values.tolist() == [
        ["a1", "g-a", "main_knn", "knn", "finished"],
        ["a2", "g-a", "main_knn", "knn", "failed"],
    ]
    assert [list(p) for p in every["parents"]] == [["p1"], []]
    loss = frame.curves(output_dir, ["a1"]).query("metric == 'train/loss'")
    assert loss[["step", "value"]].values.tolist() == [[1, 1.0], [2, 1 / 2], [3, 1 / 3]]


def test_an_empty_directory_has_empty_frames(output_dir: Path) -> None:
    assert frame.results(output_dir).empty
    assert frame.runs(output_dir).empty
    assert frame.curves(output_dir).empty


def test_only_what_changed_is_read_again(
    output_dir: Path, make_run: MakeRun, log_steps: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [make_run(f"a{i}", steps=2, metrics={"knn/loo1": i / 10}) for i in range(4)]
    frame.curves(output_dir)
    frame.results(output_dir)
    read: list[str] = []
    real = runs.read_run

    def spy(folder: Path) -> runs.Run:
        read.append(folder.name)
        return real(folder)

    monkeypatch.setattr(runs, "read_run", spy)
    assert len(frame.results(output_dir)) == 4
    assert not read
    log_steps(folders[2], range(3, 5))
    assert len(frame.results(output_dir)) == 4
    assert not read  # the results need no journal
    assert len(frame.curves(output_dir)) == 4 * 2 * 2 + 2 * 2
    assert read == ["a2"]
    (folders[1] / rundir.DONE).unlink()
    assert list(frame.results(output_dir)["identity"]) == ["a0", "a2", "a3"]
    assert frame.runs(output_dir).set_index("identity").at["a1", "state"] == "failed"


def test_a_run_that_is_gone_leaves_the_frames(output_dir: Path, make_run: MakeRun) -> None:
    gone = make_run("a1", metrics={"m": 1.0})
    make_run("a2", metrics={"m": 2.0})
    assert len(frame.results(output_dir)) == 2
    gone.rename(output_dir.parent / "elsewhere")
    assert list(frame.results(output_dir)["identity"]) == ["a2"]


@pytest.mark.parametrize("damage", [b"", b"junk", None])
def test_a_damaged_cache_is_rebuilt(
    output_dir: Path, make_run: MakeRun, warned: list[str], damage: bytes | None
) -> None:
    make_run("a1", metrics={"m": 0.25})
    frame.results(output_dir)
    cache = output_dir / frame.CACHE / "results.parquet"
    data = bytearray(cache.read_bytes())
    if damage is None:  # one bit, in the middle of the data
        data[len(data) // 8] ^= 4
    cache.write_bytes(data if damage is None else damage)
    assert list(frame.results(output_dir, warned.append)["value"]) == [0.25]
    assert len(warned) == 1
    assert str(cache) in warned[0]
    assert frame.results(output_dir, pytest.fail)["value"].item() == 0.25


def test_a_cache_that_cannot_be_written_is_no_trouble(output_dir: Path, make_run: MakeRun, warned: list[str]) -> None:
    make_run("a1", metrics={"m": 0.25})
    (output_dir / frame.CACHE).write_text("not a folder")
    assert len(frame.results(output_dir, warned.append)) == 1


def test_nan_and_infinities_stay_what_they_are(output_dir: Path, make_run: MakeRun) -> None:
    folder = make_run("a1", metrics={"m": math.nan, "n": math.inf})
    journal = rundir.Journal(folder / rundir.METRICS)
    journal.append({"step": 1, "time": 1.0, "train/loss": math.nan})
    journal.close()
    values = frame.results(output_dir)["value"].tolist()
    assert math.isnan(values[0])
    assert values[1] == math.inf
    assert frame.curves(output_dir)["value"].isna().all()


BREAKS = {
    "newer schema": (rundir.RUN, lambda t: t.replace('"schema": 1', '"schema": 99')),
    "no JSON": (rundir.RUN, lambda t: t[:20]),
    "a list": (rundir.RUN, lambda t: "[]"),
    "a key is gone": (rundir.RUN, lambda t: t.replace('"seed"', '"seeds"')),
    "seed is text": (rundir.RUN, lambda t: t.replace('"seed": 0', '"seed": "zero"')),
    "a copy": (rundir.RUN, lambda t: t.replace('"identity": "a1"', '"identity": "a9"')),
    "done is cut": (rundir.DONE, lambda t: t[:-9]),
    "done without metrics": (rundir.DONE, lambda t: "{}"),
    "a metric is text": (rundir.DONE, lambda t: t.replace("0.25", '"much"')),
}


@pytest.mark.parametrize("how", BREAKS)
def test_a_broken_run_is_one_line_that_names_the_file(
    output_dir: Path, make_run: MakeRun, warned: list[str], how: str
) -> None:
    folder = make_run("a1", metrics={"m": 0.25})
    make_run("a2", metrics={"m": 0.5})
    name, change = BREAKS[how]
    (folder / name).write_text(change((folder / name).read_text()))
    for _ in range(2):  # told every time
        assert frame.results(output_dir, warned.append)["identity"].tolist() == ["a2"]
    assert [line.splitlines() for line in warned] == [[warned[0]]] * 2
    assert str(folder / name) in warned[0]


def test_torn_and_foreign_journal_lines_are_left_out(output_dir: Path, make_run: MakeRun, warned: list[str]) -> None:
    folder = make_run("a1", steps=3, metrics={"m": 0.25})
    path = folder / rundir.METRICS
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1][:10] + b"\n" + lines[2] + lines[2][:7])
    found = frame.curves(output_dir, tell=warned.append).query("metric == 'train/loss'")
    assert found["step"].tolist() == [1, 3]
    assert [str(path) in line for line in warned] == [True, True]


def test_a_line_that_is_being_written_is_no_fault(output_dir: Path, make_run: MakeRun) -> None:
    folder = make_run("a1", steps=2)
    with (folder / rundir.METRICS).open("a") as file:
        file.write(json.dumps({"step": 3})[:5])
    assert len(frame.curves(output_dir, tell=pytest.fail)) == 4


def test_a_change_that_keeps_the_size_is_seen(output_dir: Path, make_run: MakeRun) -> None:
    folder = make_run("a1", metrics={"m": 0.25})
    frame.results(output_dir)
    done = folder / rundir.DONE
    done.write_text(done.read_text().replace("0.25", "0.75"))
    os.utime(done, ns=(1, done.stat().st_mtime_ns + 1))
    assert frame.results(output_dir)["value"].tolist() == [0.75]
