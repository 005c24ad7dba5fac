"""``import``: what was there before becomes finished runs of a study, marked with their source."""

import json
import subprocess
import sys

import pytest

from contract import rundir
from contract.settings.checks import SettingsError
from launcher import adopt, cli, launches
from tests.house import ROOT
from tests.launcher.studies import STUDY, finish

TINY = {"patch_size": 4, "dim": 32, "depth": 1, "heads": 2, "grid_size": 2}
CSV = "row,column,seed,value,source\nb,1-NN,0,0.25,old table\nb,1-NN,1,0.5,\nb,20-NN,1,0.75,\n"


@pytest.fixture
def out(tmp_path, monkeypatch):
    folder = tmp_path / "configs" / "study"
    folder.mkdir(parents=True)
    more = "columns:\n  20-NN: {stage: knn, metric: knn/top1_k20}\n"
    (folder / "mine.yaml").write_text(STUDY.replace("columns:\n", more))
    monkeypatch.setattr(launches, "CONFIGS", tmp_path / "configs")
    return tmp_path / "runs"


def plan(out):
    return launches.of_study("mine", [{"output_dir": str(out)}])


def bring(out, *words):
    """Like a person; the exit code."""
    with pytest.raises(SystemExit) as left:
        cli.main(["import", "mine", f"output_dir={out}", *map(str, words)])
    return left.value.code


@pytest.fixture
def csv_file(tmp_path):
    path = tmp_path / "old.csv"
    path.write_text(CSV)
    return path


def test_figures_of_a_csv_file_are_finished_runs_that_name_it(out, csv_file, capsys):
    assert bring(out, "--csv", csv_file) == 0
    assert capsys.readouterr().err == "2 runs imported\n"
    found = {folder.name: folder for folder in rundir.find_runs(out)}
    first, second = plan(out).cells["b", "1-NN"]
    assert set(found) == {first, second}
    assert rundir.read_json(found[first] / rundir.DONE)["metrics"] == {"knn/loo1": 0.25}
    assert rundir.read_json(found[second] / rundir.DONE)["metrics"] == {"knn/loo1": 0.5, "knn/top1_k20": 0.75}
    assert rundir.read_run(found[first])["imported"]["source"] == "old table"
    assert "old.csv, line 3" in rundir.read_run(found[second])["imported"]["source"]
    again = plan(out)
    assert [run.state for run in again.runs if run.identity in found] == ["reuse", "reuse"]
    assert not set(found) & {run.identity for run in again.todo()}
    assert len(again.todo()) == 4  # the other row: nothing is trained for cells that have their figures
    assert json.loads((out / "studies" / "mine.json").read_text())["name"] == "mine"


def test_a_table_marks_what_was_imported(out, csv_file, capfd):
    assert bring(out, "--csv", csv_file) == 0
    words = ["--manifest", str(out / "studies" / "mine.json")]
    command = [sys.executable, "-m", "analysis.tables", *words, "--format", "md"]
    shown = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert "37.5 ± 158.8‡" in shown
    assert "| pending (0/2) |" in shown


def test_other_metrics_may_be_added_later_and_other_values_may_not(out, csv_file, tmp_path, capsys):
    assert bring(out, "--csv", csv_file) == 0
    more = tmp_path / "more.csv"
    more.write_text("row,column,seed,value\nb,20-NN,0,0.4\n")
    assert bring(out, "--csv", more) == 0
    first = out / "main_knn" / plan(out).cells["b", "1-NN"][0]
    assert rundir.read_json(first / rundir.DONE)["metrics"] == {"knn/loo1": 0.25, "knn/top1_k20": 0.4}
    assert "old table; more.csv, line 2" in rundir.read_run(first)["imported"]["source"]
    more.write_text("row,column,seed,value\nb,20-NN,0,0.9\n")
    assert bring(out, "--csv", more) == 2
    assert "has knn/top1_k20=0.4 from an import" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("row,column,seed\nb,1-NN,0\n", ":1: no column 'value'; expected row,column,seed,value"),
        ("", ":1: no column 'row'"),
        ("row,column,seed,value\nc,1-NN,0,0.1\n", ":2: row=c: unknown; valid: ViT-B/16 v1.0, b"),
        ("row,column,seed,value\nb,2-NN,0,0.1\n", ":2: column=2-NN: unknown; did you mean 20-NN?"),
        ("row,column,seed,value\nb,1-NN,9,0.1\n", ":2: seed=9: the study has 0, 1"),
        ("row,column,seed,value\nb,1-NN,0,high\n", ":2: seed=0, value=high: expected numbers"),
        ("row,column,seed,value\nb,1-NN,0,67.4\n", ":2: 1-NN=67.4: this metric is a fraction; --percent"),
        ("row,column,seed,value\nb,1-NN,0,0.1\nb,1-NN,0,0.2\n", ":3: b | 1-NN | seed 0: a second figure, 0.2"),
    ],
)
def test_a_wrong_line_is_named_and_nothing_is_written(out, tmp_path, capsys, text, said):
    path = tmp_path / "bad.csv"
    path.write_text(text)
    assert bring(out, "--csv", path) == 2
    err = capsys.readouterr().err
    assert f"{path}{said}" in err
    assert err.count("\n") == 1
    assert not out.exists()


def test_per_cent_nan_and_a_dry_run(out, tmp_path, capsys):
    path = tmp_path / "old.csv"
    path.write_text("row,column,seed,value\nb,1-NN,0,67.5\nb,1-NN,1,nan\n")
    assert bring(out, "--csv", path, "--percent", "-n") == 0
    assert not out.exists()
    assert bring(out, "--csv", path, "--percent") == 0
    values = [rundir.read_json(f / rundir.DONE)["metrics"]["knn/loo1"] for f in rundir.find_runs(out)]
    assert sorted(map(str, values)) == ["0.675", "nan"]


def test_a_result_of_our_own_is_never_written_over(out, csv_file, capsys):
    run = next(r for r in plan(out).runs if r.identity == plan(out).cells["b", "1-NN"][0])
    finish(run)
    assert bring(out, "--csv", csv_file) == 2
    assert "is reuse already; it is not written over" in capsys.readouterr().err
    assert rundir.read_json(run.folder / rundir.DONE)["metrics"] == {"knn/loo1": 0.5}


def test_runs_of_an_mlflow_store_become_a_row(out, tmp_path, monkeypatch):
    answer = [
        {"seed": seed, "metrics": {"best": 0.1 * (seed + 1), "knn/top1_k20": 0.3}, "source": f"MLflow run {seed}"}
        for seed in (0, 1)
    ]
    real, called = subprocess.run, []

    def run(command, **more):
        called.append(command)
        script = f"print({chr(10).join(map(json.dumps, answer))!r})"
        return real([sys.executable, "-c", script], **more)

    monkeypatch.setattr(adopt.subprocess, "run", run)
    words = ["--mlflow", "sqlite:///x.db", "--experiment", "old", "--row", "b", "--metric", "1-NN=best"]
    assert bring(out, *words, "--filter", "params.tau = '0.1'") == 0
    assert called[0][called[0].index("--filter") + 1] == "params.tau = '0.1'"
    assert [rundir.read_run(f)["imported"]["source"] for f in rundir.find_runs(out)] != []
    (first, second) = (out / "main_knn" / i / rundir.DONE for i in plan(out).cells["b", "1-NN"])
    assert rundir.read_json(first)["metrics"] == {"knn/loo1": 0.1, "knn/top1_k20": 0.3}
    assert rundir.read_json(second)["metrics"]["knn/loo1"] == 0.2


def test_what_is_missing_in_an_import_is_said(out, tmp_path, capsys):
    for words, said in (
        ([], "give one of --csv FILE, --mlflow URI, --checkpoint FILE"),
        (["--mlflow", "sqlite:///x.db"], "add --experiment NAME and --row ROW"),
        (["--mlflow", "x", "--experiment", "e", "--row", "b", "--metric", "7-NN=a"], "expected COLUMN=METRIC; columns"),
        (["--checkpoint", tmp_path / "no.pt", "--row", "b"], "no such file"),
        (["--csv", tmp_path / "no.csv"], "No such file"),
    ):
        assert bring(out, *words) == 2
        assert said in capsys.readouterr().err
    with pytest.raises(SettingsError, match="say the study"):
        adopt.adopt(launches.of_launch([{"worker": "main_lmim"}]), None)


def test_a_checkpoint_becomes_the_encoder_of_a_row(out, tmp_path, capsys):
    from workers import models
    from workers.engine import convert
    from workers.engine.encoder import save_encoder

    (tmp_path / "from").mkdir()
    save_encoder(tmp_path / "from", models.build("vit", TINY), "elsewhere")
    theirs = (tmp_path / "from" / "encoder.pt").rename(tmp_path / "from" / "theirs.pt")
    assert bring(out, "--checkpoint", theirs, "--row", "b", "--seed", "1") == 0
    found = plan(out)
    (made,) = [run for run in found.runs if run.state == "reuse"]
    assert (made.stage, made.settings.seed, made.settings.epochs) == ("pretrain", 1, 0)
    assert (made.folder / rundir.ENCODER).stat().st_size > 1e4
    assert str(theirs) in rundir.read_run(made.folder)["imported"]["source"]
    assert [run.stage for run in found.todo()].count("knn") == 4  # its evaluations are still to be run, upon it
    bad = tmp_path / "bad.pt"
    bad.write_bytes(b"nothing")
    assert convert.main(str(bad), str(tmp_path), "x") == 2
    assert f"error: {bad}: " in capsys.readouterr().err


def test_a_file_that_is_no_checkpoint_leaves_nothing_behind(out, tmp_path, monkeypatch, capsys):
    real = subprocess.run
    script = "import sys; sys.exit('warning: x\\nerror: bad.pt: unreadable')"
    monkeypatch.setattr(adopt.subprocess, "run", lambda _, **more: real([sys.executable, "-c", script], **more))
    (tmp_path / "bad.pt").touch()
    assert bring(out, "--checkpoint", tmp_path / "bad.pt", "--row", "b") == 2
    assert capsys.readouterr().err == f"error: --checkpoint {tmp_path / 'bad.pt'}: bad.pt: unreadable\n"
    assert not list(out.glob("*/*"))
