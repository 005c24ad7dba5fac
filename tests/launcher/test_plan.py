import json

import pytest
import yaml

from contract import rundir
from contract.settings.checks import SettingsError
from launcher import launches, rundirs, sweep
from launcher import plan as plans

PUBLISHED = [
    "worker=main_lmim",
    "encoder=vit_base",
    "decoder_depth=3",
    "avg_sim_coeff=0.1",
    "loss=infonce_patches",
    "patch_gap=4",
    "epochs=800",
    "warmup_epochs=40",
    "blr=1.5e-4",
    "min_lr_frac=0.25",
    "weight_decay=0.05",
    "batch_size=256",
    "accum_iter=2",
    "env.ngpu=8",
    "dataset=imagenet",
    "resume=True",
    "output_dir=./checkpoints",
    "data_path=/path/to/imagenet",
    "env.slurm=True",
    "env.distributed=True",
]


def plan(*words):
    return launches.of_launch(sweep.points(words))


@pytest.fixture
def out(tmp_path):
    return f"output_dir={tmp_path / 'runs'}"


def prepared(run, tmp_path):
    rundirs.prepare(run, tmp_path / "capsules" / "x", "abc", None)
    return run.folder


def attempt(folder, cause):
    journal = rundir.Journal(rundir.attempts_file(folder, 0))
    journal.append({"event": "start", "attempt": "1", "time": 1})
    if cause:
        journal.append({"event": "end", "attempt": "1", "time": 2, "cause": cause})
    journal.close()


def test_the_published_command_is_accepted_as_it_stands():
    (run,) = launches.of_launch(sweep.points(PUBLISHED), "lmim").runs
    assert run.settings.env.scheduler == "slurm"
    assert run.settings.effective_batch_size == 256 * 2 * 8
    assert run.processes == 8


def test_equal_runs_of_a_plan_are_one(out):
    assert len(plan("worker=main_lmim", "tau=1,1.0,1e0", out).runs) == 1
    found = plan("worker=main_lmim", "then=[main_knn,main_linprobe]", "main_linprobe.epochs=20,30", out)
    assert [r.stage for r in found.runs] == ["lmim", "knn", "linprobe", "linprobe"]


def test_stages_are_addressed_by_worker_and_other_keys_reach_the_first_only(out):
    words = [
        "worker=main_lmim",
        "then=[main_linprobe]",
        "epochs=3",
        "main_linprobe.epochs=20",
        "seed=5",
        "data=fake",
        out,
    ]
    first, probe = plan(*words).runs
    assert (first.settings.epochs, probe.settings.epochs) == (3, 20)
    assert probe.settings.seed == 5
    assert probe.settings.data.name == "fake"
    assert probe.parents == (first.identity,)
    assert probe.settings.encoder == str(first.folder)
    _, other = plan(*words, "main_linprobe.data=digits", "main_linprobe.seed=6").runs
    assert (other.settings.data.name, other.settings.seed) == ("digits", 6)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["main_knn.k=[1]"], "main_knn is no stage of this launch; add then=[main_knn]"),
        (["then=[main_lmim]"], "main_linprobe"),
        (["epochz=1"], "epochz: unknown key; did you mean epochs?"),
        (["env.gpu=1"], "env.gpu: unknown key; did you mean env.ngpu?"),
        (["tau=high"], "tau=high: expected a number"),
        (["loss=mse"], "loss=mse: unknown; valid: infonce_patches, norm_l2"),
        (["env.slurm=True", "env.lsf=True"], "choose one scheduler"),
        (["effective_batch_size=100", "batch_size=64"], "not a multiple of batch_size 64 x 1"),
        (["output_dir=a,b"], "one launch writes to one folder"),
    ],
)
def test_what_cannot_run_is_refused_with_the_key_and_the_valid_choices(words, said):
    with pytest.raises(SettingsError) as error:
        plan("worker=main_lmim", *words)
    assert said in str(error.value)


def test_every_problem_gets_its_line():
    with pytest.raises(SettingsError) as error:
        plan("worker=main_lmim", "epochz=1", "tau=high", "loss=mse")
    assert len(str(error.value).splitlines()) == 3


def test_a_run_is_new_then_reused_then_stale_when_its_code_changes(out, tmp_path):
    (run,) = plan("worker=main_lmim", out).runs
    assert run.state == "new"
    folder = prepared(run, tmp_path)
    (folder / rundir.DONE).write_text("{}")
    (run,) = plan("worker=main_lmim", out).runs
    assert run.state == "reuse"
    info = json.loads((folder / rundir.RUN).read_text())
    info["code"]["hash"] = "other"
    info["code"]["files"]["workers/main_lmim.py"] = "other"
    (folder / rundir.RUN).write_text(json.dumps(info))
    (run,) = plan("worker=main_lmim", out).runs
    assert (run.state, run.changed) == ("stale", ("workers/main_lmim.py",))


@pytest.mark.parametrize(("cause", "expected"), [("stopped", "stopped"), ("failed", "failed"), (None, "failed")])
def test_an_attempt_that_ended_badly_shows_in_the_plan(out, tmp_path, cause, expected):
    (run,) = plan("worker=main_lmim", out).runs
    attempt(prepared(run, tmp_path), cause)
    (run,) = plan("worker=main_lmim", out).runs
    assert run.state == expected


def test_a_claimed_run_is_running_and_a_cancelled_one_is_left_alone(out, tmp_path):
    (run,) = plan("worker=main_lmim", out).runs
    owner = rundir.claim(prepared(run, tmp_path))
    found = plan("worker=main_lmim", out)
    assert (found.runs[0].state, found.todo()) == ("running", list(found.runs))  # to wait for it, and take it over
    owner.release()
    (run.folder / rundir.CANCELLED).touch()
    found = plan("worker=main_lmim", out)
    assert (found.runs[0].state, found.todo()) == ("cancelled", [])


def test_what_was_built_on_a_stale_run_is_made_again_with_it(out, tmp_path):
    words = ["worker=main_lmim", "then=[main_knn]", out]
    for run in plan(*words).runs:
        (prepared(run, tmp_path) / rundir.DONE).write_text("{}")
    parent = plan(*words).runs[0]
    info = rundir.read_run(parent.folder)
    rundir.write_json(parent.folder / rundir.RUN, info | {"code": {"hash": "old", "files": {}}})
    found = plan(*words)
    assert [r.state for r in found.runs] == ["stale", "reuse"]
    assert found.todo() == []
    assert found.todo(stale=True) == list(found.runs)


def test_pictures_that_are_not_there_refuse_a_launch_but_not_a_plan(out, tmp_path):
    found = plan("worker=main_lmim", "data=imagefolder", f"data_path={tmp_path / 'no'}", out)
    with pytest.raises(SettingsError, match=r"no: no such folder here; data\.check=node"):
        plans.check_data(found.runs)
    plans.check_data(plan("worker=main_lmim", "data=imagefolder", "data_path=/no", "data.check=node", out).runs)
    with pytest.raises(SettingsError, match="data_path: missing; data=imagefolder needs"):
        plans.check_data(plan("worker=main_lmim", "data=imagefolder", out).runs)


def test_gpus_are_those_that_are_visible_here_and_one_on_a_scheduler(monkeypatch):
    for visible, expected in (("", 0), ("0,3", 2), ("-1", 0)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        plans.visible_gpus.cache_clear()
        assert plan("worker=main_lmim").runs[0].settings.env.ngpu == expected
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    plans.visible_gpus.cache_clear()
    assert plan("worker=main_lmim", "env.lsf=True").runs[0].settings.env.ngpu == 1
    with pytest.raises(SettingsError, match=r"env\.nproc=3: more than the 2 GPU\(s\) here"):
        plan("worker=main_lmim", "env.nproc=3")
    plans.visible_gpus.cache_clear()


def test_the_quickstart_study_is_two_rows_of_three_columns_over_three_seeds(tmp_path):
    found = launches.of_study("quickstart", [{"output_dir": str(tmp_path)}])
    assert len(found.runs) == 2 * 3 * 3  # pretrain, knn (both of its columns), probe
    assert {len(c) for c in found.cells.values()} == {3}
    manifest = found.manifest()
    assert manifest["rows"] == ["random encoder", "Latent MIM"]
    assert [c["name"] for c in manifest["columns"]] == ["1-NN", "20-NN", "linear probe"]
    assert len(manifest["cells"]) == 6
    assert json.loads(json.dumps(manifest)) == manifest
    random = {r.identity for r in found.runs if getattr(r.settings, "epochs", None) == 0}
    assert len(random) == 3
    assert found.cells["random encoder", "1-NN"] == found.cells["random encoder", "20-NN"]


def test_keys_beside_a_study_reach_its_stages_and_seeds_may_be_swept(tmp_path):
    points = sweep.points(["seed=0,7", "pretrain.tau=0.3", f"output_dir={tmp_path}"])
    found = launches.of_study("quickstart", points)
    assert {r.settings.seed for r in found.runs} == {0, 7}
    assert {r.settings.tau for r in found.runs if r.stage == "pretrain"} == {0.3}
    with pytest.raises(SettingsError, match="only seed may be swept"):
        launches.of_study("quickstart", sweep.points(["pretrain.tau=0.1,0.2"]))


def test_a_study_that_is_unknown_or_wrong_is_refused_with_its_file_and_key(tmp_path, monkeypatch):
    for name in ("quickstar", "../worker/main_lmim", "a;b", "x\ny"):
        with pytest.raises(SettingsError, match=r"valid: .*quickstart"):
            launches.load_study(name)
    text = yaml.safe_dump({"title": "t", "stages": {"a": {"workr": "main_lmim"}}, "columns": {}, "rows": {}})
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "mine.yaml").write_text(text)
    (tmp_path / "study" / "torn.yaml").write_text("title: [")
    monkeypatch.setattr(launches, "CONFIGS", tmp_path)
    with pytest.raises(SettingsError, match=r"mine\.yaml:\d+: .*workr"):
        launches.load_study("mine")
    with pytest.raises(SettingsError, match=r"torn\.yaml:1: "):
        launches.load_study("torn")


def test_a_directory_of_another_configuration_is_refused_and_the_science_of_a_run_never_changes(out, tmp_path):
    (run,) = plan("worker=main_lmim", out).runs
    folder = prepared(run, tmp_path)
    before = (folder / rundir.CONFIG).read_text()
    (again,) = plan("worker=main_lmim", "env.grace_s=9", out).runs
    prepared(again, tmp_path)  # how it runs may be told anew
    assert yaml.safe_load((folder / rundir.CONFIG).read_text())["env"]["grace_s"] == 9
    (folder / rundir.CONFIG).write_text(before.replace("tau: 0.2", "tau: 0.3"))
    with pytest.raises(rundir.RunDirError, match="is of another configuration"):
        prepared(run, tmp_path)
    (folder / rundir.CONFIG).write_text("worker: [")
    with pytest.raises(rundir.RunDirError, match=r"config\.yaml: unreadable"):
        prepared(run, tmp_path)


def test_a_run_that_was_begun_goes_on_with_the_threads_it_began_with(out, tmp_path):
    def threads(*words):
        (run,) = plan("worker=main_lmim", out, *words).runs
        return yaml.safe_load((prepared(run, tmp_path) / rundir.CONFIG).read_text())["env"]["threads"]

    assert threads("env.threads=2") == 2
    (run,) = plan("worker=main_lmim", out).runs
    (run.folder / rundir.CHECKPOINT).touch()
    assert threads() == 2
    assert threads("env.threads=1") == 1


def test_a_newer_schema_is_refused(out, tmp_path):
    (run,) = plan("worker=main_lmim", out).runs
    folder = prepared(run, tmp_path)
    (folder / rundir.DONE).write_text("{}")
    rundir.write_json(folder / rundir.RUN, rundir.read_json(folder / rundir.RUN) | {"schema": 99})
    with pytest.raises(rundir.RunDirError, match=r"schema 99; .* update sightline"):
        plan("worker=main_lmim", out)
