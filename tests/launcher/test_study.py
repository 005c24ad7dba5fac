"""Studies: what their files may say, and what is missing, stale, changed by hand or dear."""

import json
import os
import textwrap

import pytest

from contract import rundir
from contract.settings.checks import SettingsError
from launcher import launches, prices, remarks, rundirs, show, study_file
from tests.launcher.studies import STUDY, finish


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Puts a study in the place of the shipped ones; returns its file."""
    monkeypatch.setattr(launches, "CONFIGS", tmp_path / "configs")

    def put(text=STUDY, old="", new=""):
        path = tmp_path / "configs" / "study" / "mine.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        assert old in text
        path.write_text(text.replace(old, new, 1))
        return path

    return put


@pytest.fixture
def plan(tmp_path, write):
    def made(text=STUDY, *pairs):
        for old, new in pairs:
            assert old in text
            text = text.replace(old, new, 1)
        write(text)
        return launches.of_study("mine", [{"output_dir": str(tmp_path / "runs")}])

    return made


def said(plan, capsys):
    show.study(show.console(no_color=True), plan, plan.todo())
    return capsys.readouterr().out


# -- the file -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        ("after: pretrain", "aftr: pretrain", 6, "stages.knn.aftr: unknown key; did you mean stages.knn.after?"),
        ("after: pretrain", "after: train", 6, "stages.knn.after=train: no such stage; valid: pretrain, knn"),
        ("worker: main_lmim", "worker: main_lmim, after: knn", 6, "a cycle: pretrain -> knn -> pretrain"),
        ("after: pretrain", "after: knn", 6, "stages.knn.after=knn: a cycle: knn -> knn"),
        ("ViT-B/16 v1.0: {}", "ViT-B/16 v1.0: {tau: 0.1}", 8, "rows.ViT-B/16 v1.0.tau: address a stage"),
        ("pretrain.epochs", "pretrian.epochs", 10, "rows.b.pretrian.epochs: address a stage"),
        ("  b:\n", "  ViT-B/16 v1.0:\n", 9, "rows.ViT-B/16 v1.0: said twice"),
        ("stage: knn", "stage: probe", 12, "columns.1-NN.stage=probe: no such stage"),
        ("stage: knn", "stage: knn, better: up", 12, "columns.1-NN.better=up: unknown; valid: higher, lower"),
        (', source: "Table 1"', "", 14, "reported[0].source: missing"),
        ('source: "Table 1"', 'source: " "', 14, "reported[0].source: empty; say where 50.1 is printed"),
        ("row: b", "row: c", 14, "reported[0].row=c: is not a row; valid: ViT-B/16 v1.0, b"),
        ("digits: 1", "digits: 1, intervall: std", 15, "layout.intervall: unknown key; did you mean layout.interval?"),
        ("digits: 1", "interval: sem", 15, "layout.interval=sem: unknown; valid: ci95, std, iqm"),
        ("digits: 1", "groups: {G: [a]}", 15, "layout.groups.G: 'a' is not a row"),
        ("digits: 1", "groups: {G: [b], H: [b]}", 15, "layout.groups.H: 'b' stands in 'G' already"),
        ("digits: 1", "overall: [x]", 15, "layout.overall: 'x' is not a column"),
        ("[0, 1]", "[0, 0]", 2, "seeds=[0, 0]: expected different seeds"),
        ("title: T", "title: [", 3, "not YAML"),
        ("seeds: [0, 1]", "seeds: [0, one]", 2, "seeds[1]=one: expected an integer"),
    ],
)  # fmt: skip
def test_an_error_names_the_file_the_line_and_the_key(write, old, new, line, words):
    path = write(STUDY, old, new)
    with pytest.raises(SettingsError) as error:
        study_file.read(path)
    (message,) = str(error.value).splitlines()
    assert message.startswith(f"{path}:{line}: ")
    assert words in message


def test_every_problem_of_a_file_gets_its_line(write):
    path = write(STUDY.replace("workers", "x").replace("after: pretrain", "aftre: pretrain"), "digits: 1", "digit: 1")
    with pytest.raises(SettingsError) as error:
        study_file.read(path)
    assert [message.split(":")[1] for message in str(error.value).splitlines()] == ["6", "15"]


def test_stages_may_stand_in_any_order(write):
    text = STUDY.replace(
        "  pretrain: {worker: main_lmim}\n  knn: {worker: main_knn, after: pretrain}\n",
        "  knn: {worker: main_knn, after: pretrain}\n  pretrain: {worker: main_lmim}\n",
    )
    assert [step.stage for step in study_file.read(write(text)).steps()][:2] == ["pretrain", "knn"]


def test_a_stage_without_repeats_runs_once_for_all_seeds_of_what_comes_after(plan, write):
    once = ("worker: main_lmim", "worker: main_lmim, repeat: false")
    found = plan(STUDY, once)
    seeds = {stage: sorted({r.settings.seed for r in found.runs if r.stage == stage}) for stage in ("pretrain", "knn")}
    assert len(found.study.seeds) > 1
    assert seeds == {"pretrain": [found.study.seeds[0]], "knn": sorted(found.study.seeds)}
    for runs in found.cells.values():
        assert len(set(runs)) == len(found.study.seeds)
    with pytest.raises(SettingsError, match=r"columns\.1-NN: stage knn has repeat=false, and one run is no mean"):
        study_file.read(write(STUDY.replace(*once).replace("after: pretrain", "after: pretrain, repeat: false")))
    with pytest.raises(SettingsError, match=r"stages\.knn\.repeat=false: pretrain, before it, is repeated"):
        study_file.read(write(STUDY, "after: pretrain", "after: pretrain, repeat: false"))


def test_rows_that_are_the_same_runs_are_refused(plan):
    with pytest.raises(SettingsError, match=r"mine\.yaml: rows 'ViT-B/16 v1\.0' and 'b' are the same runs"):
        plan(STUDY, ("    pretrain.epochs: 0", "    pretrain.log_every: 7"))  # which is no science


def test_columns_that_are_the_same_are_refused(write):
    path = write(STUDY, "columns:\n", "columns:\n  again: {stage: knn, metric: knn/loo1}\n")
    with pytest.raises(SettingsError, match=r"mine\.yaml:13: columns\.1-NN: the same as column 'again'"):
        study_file.read(path)


def test_every_shipped_study_can_be_read():
    for name in launches.studies():
        assert launches.load_study(name).title


# -- what exists, and what it costs -------------------------------------------------------------------------------


def test_a_plan_says_what_is_missing_and_its_price_from_finished_runs(plan, capsys):
    found = plan()
    assert "to do: 8 runs; of unknown price, as none has finished: 4 of pretrain, 4 of knn" in said(found, capsys)
    first, knn = found.runs[:2]
    finish(first, seconds=7200, gpus=4)
    finish(knn, seconds=360, gpus=1)
    shown = said(plan(), capsys)
    assert [line.split()[-1] for line in shown.splitlines()[1:3]] == ["1/2", "0/2"]
    assert "used so far: 8.1 GPU-h; to do: 6 runs, about 8.3 GPU-h (pretrain 8 GPU-h, knn 0.3 GPU-h)" in shown
    assert "of unknown price, as none has finished: 2 of pretrain" in shown  # those without training


def test_the_price_of_a_run_is_that_of_its_own_row_where_there_is_one(plan):
    found = plan()
    for run in found.runs:
        if run.stage == "pretrain" and run.settings.seed == 0:
            finish(run, seconds=3600 if run.settings.epochs else 36)
    found = plan(STUDY, ("ViT-B/16 v1.0: {}", "ViT-B/16 v1.0: {}\n  longer: {pretrain.epochs: 32}"))
    known = prices.Prices(found)
    by_row = {run.settings.epochs: known.of(run).hours for run in found.todo() if run.stage == "pretrain"}
    assert by_row.pop(0) == pytest.approx(0.01)
    assert by_row == {16: pytest.approx(1.0), 32: pytest.approx(2.0)}  # no training is no measure of training


def test_what_nothing_needs_any_more_is_not_run_for_a_study(plan):
    found = plan()
    knn = found.runs[1]
    finish(knn)
    todo = {run.identity for run in plan().todo()}
    assert knn.parents[0] not in todo  # its pretraining is gone, or was never here: the cell has its number
    assert len(todo) == 6


def test_an_imported_run_is_never_stale(plan):
    knn = plan().runs[1]
    finish(knn, imported={"source": "old.csv"}, code={"hash": "", "files": {}})
    found = plan()
    assert next(r for r in found.runs if r.identity == knn.identity).state == "reuse"
    assert "1 finished run(s) were imported" in "\n".join(remarks.of(found))


def test_keys_that_changed_since_the_last_fill_are_named(plan):
    found = plan()
    for run in found.runs:
        finish(run)
    rundirs.write_study(found)
    lines = remarks.of(plan(STUDY, ("ViT-B/16 v1.0: {}", "ViT-B/16 v1.0: {pretrain.tau: 0.1}")))
    assert lines == ["new since the last fill or table, 2 cell run(s): pretrain.tau: 0.2 -> 0.1"]


def test_a_config_that_was_changed_by_hand_is_told(plan):
    run = plan().runs[0]
    finish(run)
    config = run.folder / rundir.CONFIG
    config.write_text(config.read_text().replace("tau: 0.2", "tau: 0.7"))
    later = (run.folder / rundir.DONE).stat().st_mtime + 5
    os.utime(config, (later, later))
    (line,) = remarks.of(plan())
    assert line.startswith(f"{config}: changed by hand after the run (tau: 0.7 -> 0.2)")
    config.write_text("worker: [")
    os.utime(config, (later, later))
    (line,) = remarks.of(plan())
    assert f"{config}: unreadable" in line


def test_a_result_that_is_newer_than_its_run_is_told(plan):
    first, second = plan().runs[:2]
    for run in (first, second):
        finish(run)
        later = (run.folder / rundir.DONE).stat().st_mtime + 3600
        os.utime(run.folder / rundir.DONE, (later, later))
    (line,) = remarks.of(plan())
    assert line.startswith(f"{first.folder / rundir.DONE} and 1 more: newer than the end of the run: changed by hand")


def test_metrics_that_never_appear_one_seed_and_nan_are_told(plan):
    text = STUDY.replace("knn/loo1", "knn/loo").replace("[0, 1]", "[3]")
    knn = plan(text).runs[1]
    finish(knn, {"knn/loo1": 0.5, "knn/top1_k20": 0.4})
    metric, seed = remarks.of(plan(text))
    assert metric.startswith(
        "column 1-NN: 1 finished run(s) have no metric knn/loo; did you mean knn/loo1? they have: "
    )
    assert seed == "one seed (3): no interval, and no row can be shown to be better"
    rundir.write_json(knn.folder / rundir.DONE, {"metrics": {"knn/loo": "nan"}})
    assert "column 1-NN: 1 finished run(s) have knn/loo=NaN" in remarks.of(plan(text))


def test_the_manifest_has_what_a_column_and_the_layout_say(plan):
    layout = "layout: {groups: {G: [b]}, bold: group, interval: iqm, overall: [1-NN]}"
    found = plan(
        STUDY, ("metric: knn/loo1", "metric: knn/loo1, digits: 3, percent: false"), ("layout: {digits: 1}", layout)
    )
    manifest = json.loads(json.dumps(found.manifest()))
    assert manifest["columns"][0] | {"digits": 3, "percent": False} == manifest["columns"][0]
    assert manifest["layout"]["groups"] == {"G": ["b"]}


def test_the_docstring_of_the_schema_is_a_study(write):
    from contract import study

    text = textwrap.dedent(study.__doc__.partition("::\n\n")[2].partition("\n\nGroup choices")[0])
    assert study_file.read(write(text)).layout.overall == ["1-NN", "linear probe"]
