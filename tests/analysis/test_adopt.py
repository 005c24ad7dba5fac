from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from analysis import adopt
from analysis.store import Store

URI = "sqlite:///{}"


@pytest.fixture
def old(store_file: Path, output_dir: Path) -> str:
    """Somebody's store: two finished runs of an experiment, and one that failed."""
    uri = URI.format(store_file)
    client = Store(uri, output_dir).open()
    experiment = client.create_experiment("theirs")
    for seed, status in ((3, "FINISHED"), (4, "FINISHED"), (5, "FAILED")):
        run = client.create_run(experiment)
        client.log_param(run.info.run_id, "seed", str(seed))
        client.log_param(run.info.run_id, "tau", "0.1" if seed == 3 else "0.2")
        client.log_metric(run.info.run_id, "top1", 0.1, step=1)
        client.log_metric(run.info.run_id, "top1", seed / 10, step=2)
        client.set_terminated(run.info.run_id, status)
    return uri


def test_finished_runs_come_with_their_last_values_and_where_they_are(
    old: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert adopt.main(["--store", old, "--experiment", "theirs"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert sorted((line["seed"], line["metrics"]["top1"]) for line in lines) == [(3, 0.3), (4, 0.4)]
    assert all("experiment theirs, run " in line["source"] for line in lines)
    assert adopt.main(["--store", old, "--experiment", "theirs", "--filter", "params.tau = '0.2'"]) == 0
    assert json.loads(capsys.readouterr().out)["seed"] == 4
    assert adopt.main(["--store", old, "--experiment", "others"]) == 2
    assert "no experiment others; there are: Default, theirs" in capsys.readouterr().err
    assert adopt.main(["--store", old, "--experiment", "theirs", "--seed", "tags.x"]) == 2
    assert "no seed in tags.x; --seed-key names it; it has: params.seed, params.tau" in capsys.readouterr().err


def test_a_store_that_is_not_there_is_not_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert adopt.main(["--store", URI.format(tmp_path / "no.db"), "--experiment", "e"]) == 2
    assert "no.db: no such file" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_imported_run_reaches_the_store_with_its_source(
    output_dir: Path, make_run: Callable[..., Path], store_file: Path
) -> None:
    from analysis.ingest import ingest
    from contract import rundir

    folder = make_run("aaa00", metrics={"knn/loo1": 0.5})
    rundir.write_json(folder / rundir.RUN, rundir.read_run(folder) | {"imported": {"source": "old.csv, line 2"}})
    next(folder.glob("attempts.*")).unlink()
    store = Store(URI.format(store_file), output_dir)
    assert ingest([folder], store).new == 1
    client = store.open()
    experiment = client.get_experiment_by_name("main_knn")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.tags["sightline.imported"] == "old.csv, line 2"
    assert run.data.metrics["knn/loo1"] == 0.5
